#include "lists.h"

#include <c10/util/Half.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#include "vec.h"

namespace bvpo {

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kLog2 = 0.693147181f;
// Rows that share one test for candidates.
constexpr int64_t kGroup = 4;

typedef int8_t v16c __attribute__((vector_size(16)));

// A byte of ones per lane that is set.
struct LaneBytes {
  uint64_t half[2];
  bool any() const { return (half[0] | half[1]) != 0; }
};

BVPO_INLINE LaneBytes lane_bytes(v16i mask) {
  const v16c narrow = __builtin_convertvector(mask, v16c);
  LaneBytes bytes;
  std::memcpy(&bytes, &narrow, sizeof(bytes));
  return bytes;
}

BVPO_INLINE void append(const Candidates& lists, int64_t t, LaneBytes lanes, v16 z, int64_t column) {
  float values[kLanes];
  store(values, z);
  for (int64_t i = 0; i < 2; ++i) {
    for (uint64_t bytes = lanes.half[i]; bytes != 0;) {
      const int64_t byte = __builtin_ctzll(bytes) / 8;
      bytes &= ~(uint64_t{0xff} << (8 * byte));
      const int64_t lane = 8 * i + byte, token = t + lane;
      const int64_t at = token * lists.room + lists.count[token]++;
      lists.column[at] = static_cast<int32_t>(column);
      lists.z[at] = values[lane];
    }
  }
}

// log(exp(target) + sum exp(z - max)) from below, to one bit of the sum.
float log_sum_bound(float target_z, float max, float sum) {
  return std::max(target_z, max + kLog2 * std::floor(std::log2(std::max(sum, 1.0f))));
}

// The lower half of a list that has grown too long goes. Where that leaves out more than a list
// may, the token is abandoned: flat distributions pay for one list and no more.
void halve(const Candidates& lists, int64_t t, const ListedSums& sums) {
  int32_t* column = lists.column + t * lists.room;
  float* z = lists.z + t * lists.room;
  const int64_t n = lists.count[t];
  std::vector<float> sorted(z, z + n);
  std::nth_element(sorted.begin(), sorted.begin() + n / 2, sorted.end(), std::greater<float>());
  const float level = sorted[n / 2], shift = sums.max[t];
  float kept = 0, dropped = 0;
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    const float p = std::exp(z[i] - shift);
    if (z[i] > level) {
      column[count] = column[i];
      z[count++] = z[i];
      kept += p;
    } else {
      dropped += p;
    }
  }
  const float rest = sums.rest[t] + dropped, bound = log_sum_bound(lists.target_z[t], shift, kept + rest);
  const bool abandoned = rest * std::exp(shift - bound) > 2 * lists.give_up;
  sums.kept[t] = abandoned ? 0 : kept;
  sums.rest[t] = abandoned ? rest + kept : rest;
  lists.count[t] = abandoned ? 0 : static_cast<int32_t>(count);
  lists.floor[t] = abandoned ? kInf : std::max(lists.floor[t], level - bound);
}

// As in rows.cpp: a tile may hold nothing but a token's target.
BVPO_INLINE v16 finite(v16 max) { return max > splat(-kInf) ? max : v16{}; }

template <bool kEntropy>
BVPO_INLINE void list_tile(Tile tile, int64_t first_row, ListedSums sums, const Candidates& lists) {
  for (int64_t t = 0; t < tile.tokens; t += kLanes) {
    const v16 old_max = load(sums.max + t);
    v16 new_max = old_max;
    const float* z = tile.z + t;
    for (int64_t v = 0; v < tile.rows; ++v) new_max = max(new_max, load(z + v * tile.stride));
    const v16 shift = finite(new_max), step = old_max - shift, rescale = exp_nonpositive(step);
    const v16 kept = load(sums.kept + t) * rescale, rest = load(sums.rest + t) * rescale;
    // The exponent of the sum is a lower bound of its logarithm, and costs nothing.
    const v16i exponent = ((v16i)max(kept + rest, splat(1.0f)) >> 23) - 127;
    const v16 sum_log = __builtin_convertvector(exponent, v16) * kLog2;
    const v16 level = max(load(lists.target_z + t), new_max + sum_log) + load(lists.floor + t);
    const v16 near = level - shift;
    v16 kept_part{}, even{}, odd{}, weighted{};
    const auto group = [&](int64_t v, int64_t rows) __attribute__((always_inline)) {
      v16 x[kGroup], p[kGroup];
      for (int64_t i = 0; i < kGroup; ++i) {
        x[i] = i < rows ? load(z + (v + i) * tile.stride) - shift : splat(-kInf);
        p[i] = exp_nonpositive(x[i]);
        if (kEntropy) weighted += p[i] > v16{} ? p[i] * x[i] : v16{};
      }
      const v16 top = max(max(x[0], x[1]), max(x[2], x[3]));
      if (!lane_bytes(top >= near).any()) [[likely]] {
        even += p[0] + p[1];
        odd += p[2] + p[3];
        return;
      }
      for (int64_t i = 0; i < kGroup; ++i) {
        const v16i listed = x[i] >= near;
        kept_part += listed ? p[i] : v16{};
        even += listed ? v16{} : p[i];
        const LaneBytes lanes = lane_bytes(listed);
        if (lanes.any()) append(lists, t, lanes, load(z + (v + i) * tile.stride), first_row + v + i);
      }
    };
    int64_t v = 0;
    for (; v + kGroup <= tile.rows; v += kGroup) group(v, kGroup);
    if (v < tile.rows) group(v, tile.rows - v);
    if (kEntropy) {
      const v16 sum = load(sums.kept + t) + load(sums.rest + t);
      const v16 moved = (sum > v16{} ? step : v16{}) * sum;
      store(sums.weighted + t, (load(sums.weighted + t) + moved) * rescale + weighted);
    }
    // A tile is summed on its own and then added, as in `online_sums`.
    store(sums.kept + t, kept + kept_part);
    store(sums.rest + t, rest + (even + odd));
    store(sums.max + t, new_max);
    for (int64_t i = t; i < t + kLanes; ++i) {
      if (lists.count[i] > lists.longest) halve(lists, i, sums);
    }
  }
}

BVPO_INLINE void online_candidates_body(Tile tile, int64_t first_row, ListedSums sums,
                                        const Candidates& lists) {
  if (sums.weighted) return list_tile<true>(tile, first_row, sums, lists);
  list_tile<false>(tile, first_row, sums, lists);
}

BVPO_INLINE void add_scaled_body(const void* x, Store type, int64_t n, float factor, float* acc) {
  int64_t i = 0;
  if (type == Store::kFloat) {
    const float* in = static_cast<const float*>(x);
    for (; i + kLanes <= n; i += kLanes) store(acc + i, load(acc + i) + load(in + i) * factor);
    for (; i < n; ++i) acc[i] += factor * in[i];
    return;
  }
  const uint16_t* in = static_cast<const uint16_t*>(x);
  if (type == Store::kHalf) {
    for (; i < n; ++i) acc[i] += factor * static_cast<float>(c10::Half(in[i], c10::Half::from_bits()));
    return;
  }
  for (; i + kLanes <= n; i += kLanes) {
    v16h narrow;
    std::memcpy(&narrow, in + i, sizeof(narrow));
    const v16 wide = (v16)(__builtin_convertvector(narrow, v16i) << 16);
    store(acc + i, load(acc + i) + wide * factor);
  }
  for (; i < n; ++i) {
    const uint32_t bits = static_cast<uint32_t>(in[i]) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof(wide));
    acc[i] += factor * wide;
  }
}

}  // namespace

BVPO_DISPATCH(online_candidates,
              (Tile tile, int64_t first_row, ListedSums sums, const Candidates& lists),
              (tile, first_row, sums, lists))
BVPO_DISPATCH(add_scaled, (const void* x, Store type, int64_t n, float factor, float* acc),
              (x, type, n, factor, acc))

}  // namespace bvpo
