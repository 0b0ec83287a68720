#include "rows.h"

#include <c10/util/Half.h>

#include <cmath>
#include <limits>

#include "vec.h"

namespace bvpo {

namespace {

constexpr float kMinusInf = -std::numeric_limits<float>::infinity();

BVPO_INLINE bool any(v16i mask) {
  int32_t bits = 0;
  for (int64_t i = 0; i < kLanes; ++i) bits |= mask[i];
  return bits != 0;
}

BVPO_INLINE void store_half(uint16_t* p, v16 x) {
  for (int64_t i = 0; i < kLanes; ++i) p[i] = c10::Half(x[i]).x;
}

// Writes one pair of rows (the second may be absent: then its values are zeros) in the wanted form.
BVPO_INLINE void emit(const Output& out, Store store_as, int64_t row, bool second, int64_t tokens,
                      int64_t t, v16 a, v16 b) {
  if (store_as == Store::kFloat) {
    float* rows = static_cast<float*>(out.rows);
    float* packed = static_cast<float*>(out.packed);
    if (rows) store(rows + row * out.rows_stride + t, a);
    if (packed) store(packed + row * tokens + t, a);
    if (rows && second) store(rows + (row + 1) * out.rows_stride + t, b);
    if (packed && second) store(packed + (row + 1) * tokens + t, b);
    return;
  }
  v16i low, high;
  if (store_as == Store::kBFloat16) {
    low = to_bf16_bits(a);
    high = to_bf16_bits(b);
  } else {
    uint16_t halves[2 * kLanes];
    store_half(halves, a);
    store_half(halves + kLanes, b);
    for (int64_t i = 0; i < kLanes; ++i) {
      low[i] = halves[i];
      high[i] = halves[kLanes + i];
    }
  }
  if (out.rows) {
    uint16_t* rows = static_cast<uint16_t*>(out.rows) + row * out.rows_stride + t;
    store_low_halves(rows, low);
    if (second) store_low_halves(rows + out.rows_stride, high);
  }
  if (out.packed) {
    const v16i pair = low | (high << 16);
    std::memcpy(static_cast<uint32_t*>(out.packed) + (row / 2) * tokens + t, &pair, sizeof(pair));
  }
}

// A tile that holds nothing but a token's target leaves its maximum at -inf: shift by 0 instead.
BVPO_INLINE v16 finite_shift(v16 max) { return max > kMinusInf ? max : v16{}; }

// The maximum over a column of lanes, from `start` on. Four chains hide the latency.
BVPO_INLINE v16 column_max(const Tile& tile, int64_t t, v16 start) {
  v16 a = start, b = start, c = start, d = start;
  const float* z = tile.z + t;
  int64_t v = 0;
  for (; v + 4 <= tile.rows; v += 4, z += 4 * tile.stride) {
    a = max(a, load(z));
    b = max(b, load(z + tile.stride));
    c = max(c, load(z + 2 * tile.stride));
    d = max(d, load(z + 3 * tile.stride));
  }
  for (; v < tile.rows; ++v, z += tile.stride) a = max(a, load(z));
  return max(max(a, b), max(c, d));
}

// Moves sum p (z - m) to a new shift: e^{m - m'} (w + (m - m') s). An empty sum has nothing to move.
BVPO_INLINE v16 shift_weighted(v16 weighted, v16 sum, v16 step, v16 rescale) {
  const v16 moved = (sum > v16{} ? step : v16{}) * sum;
  return (weighted + moved) * rescale;
}

BVPO_INLINE void transform_rows_body(Tile tile, Transform transform, int64_t first_row, float* slope) {
  const float inverse_temperature = 1.0f / transform.temperature;
  const float inverse_cap = transform.softcap != 0.0f ? 1.0f / transform.softcap : 0.0f;
  for (int64_t v = 0; v < tile.rows; ++v) {
    const float bias = transform.bias ? transform.bias[first_row + v] : 0.0f;
    float* z = tile.z + v * tile.stride;
    for (int64_t t = 0; t < tile.tokens; t += kLanes) {
      v16 x = load(z + t) + bias;
      if (transform.softcap != 0.0f) {
        const v16 capped = tanh(x * inverse_cap);
        if (slope) store(slope + v * tile.stride + t, 1.0f - capped * capped);
        x = capped * transform.softcap;
      }
      store(z + t, x * inverse_temperature);
    }
  }
}

BVPO_INLINE void softcap_slopes_body(Tile tile, Transform transform, float* slope) {
  const float scale = transform.temperature / transform.softcap;
  for (int64_t v = 0; v < tile.rows; ++v) {
    for (int64_t t = v * tile.stride; t < v * tile.stride + tile.tokens; t += kLanes) {
      const v16 tanh = max(load(tile.z + t) * scale, splat(-1.0f));
      store(slope + t, 1.0f - tanh * tanh);
    }
  }
}

BVPO_INLINE void online_sums_body(Tile tile, float* max_t, float* sum_t, float* weighted_t) {
  for (int64_t t = 0; t < tile.tokens; t += kLanes) {
    const v16 old_max = load(max_t + t);
    const v16 new_max = column_max(tile, t, old_max);
    const v16 shift = finite_shift(new_max);
    const v16 step = old_max - shift;
    const v16 rescale = exp_nonpositive(step);
    // A tile is summed on its own and then added: 150 000 small terms added to one large running
    // sum would lose 1e-3 of it in fp32.
    v16 sum = load(sum_t + t);
    const float* z = tile.z + t;
    if (weighted_t) {
      v16 part{}, weighted{};
      for (int64_t v = 0; v < tile.rows; ++v, z += tile.stride) {
        const v16 x = load(z) - shift;
        const v16 p = exp_nonpositive(x);
        part += p;
        weighted += p > v16{} ? p * x : v16{};
      }
      store(weighted_t + t, shift_weighted(load(weighted_t + t), sum, step, rescale) + weighted);
      sum = sum * rescale + part;
    } else {
      v16 even{}, odd{};
      int64_t v = 0;
      for (; v + 2 <= tile.rows; v += 2, z += 2 * tile.stride) {
        even += exp_nonpositive(load(z) - shift);
        odd += exp_nonpositive(load(z + tile.stride) - shift);
      }
      if (v < tile.rows) even += exp_nonpositive(load(z) - shift);
      sum = sum * rescale + (even + odd);
    }
    store(sum_t + t, sum);
    store(max_t + t, new_max);
  }
}

BVPO_INLINE void online_probabilities_body(Tile tile, const float* slope, float* max_t, float* sum_t,
                          float* weighted_t, float* rescale_t, Output out, Store store_as) {
  for (int64_t t = 0; t < tile.tokens; t += kLanes) {
    const v16 old_max = load(max_t + t);
    const v16 new_max = column_max(tile, t, old_max);
    const v16 shift = finite_shift(new_max);
    const v16 step = old_max - shift;
    const v16 rescale = exp_nonpositive(step);
    const v16 sum = load(sum_t + t);
    v16 part{}, weighted{};
    for (int64_t v = 0; v < tile.rows; v += 2) {
      const bool second = v + 1 < tile.rows;
      const float* z = tile.z + v * tile.stride + t;
      const v16 xa = load(z) - shift;
      const v16 xb = second ? load(z + tile.stride) - shift : splat(kMinusInf);
      v16 a = exp_nonpositive(xa), b = exp_nonpositive(xb);
      part += a + b;
      if (weighted_t) {
        weighted += a > v16{} ? a * xa : v16{};
        weighted += b > v16{} ? b * xb : v16{};
      }
      if (slope) {
        const float* s = slope + v * tile.stride + t;
        a *= load(s);
        if (second) b *= load(s + tile.stride);
      }
      emit(out, store_as, v, second, tile.tokens, t, a, b);
    }
    if (weighted_t) {
      store(weighted_t + t, shift_weighted(load(weighted_t + t), sum, step, rescale) + weighted);
    }
    store(rescale_t + t, rescale);
    store(sum_t + t, sum * rescale + part);
    store(max_t + t, new_max);
  }
}

BVPO_INLINE void logit_gradients_body(Tile tile, const float* slope, const float* max_t, const float* logsum_t,
                     const float* scale_t, Output out, Store store_as, float* row_sums) {
  for (int64_t v = 0; v < tile.rows; v += 2) {
    const bool second = v + 1 < tile.rows;
    v16 sum_a{}, sum_b{};
    for (int64_t t = 0; t < tile.tokens; t += kLanes) {
      const float* z = tile.z + v * tile.stride + t;
      const v16 shift = load(max_t + t), logsum = load(logsum_t + t), scale = load(scale_t + t);
      // z - max first: a large offset of all logits then cancels exactly.
      v16 a = scale * exp_nonpositive(load(z) - shift - logsum);
      v16 b{};
      if (second) b = scale * exp_nonpositive(load(z + tile.stride) - shift - logsum);
      if (slope) {
        const float* s = slope + v * tile.stride + t;
        a *= load(s);
        if (second) b *= load(s + tile.stride);
      }
      sum_a += a;
      sum_b += b;
      emit(out, store_as, v, second, tile.tokens, t, a, b);
    }
    if (row_sums) {
      for (int64_t i = 0; i < kLanes; ++i) {
        row_sums[v] += sum_a[i];
        if (second) row_sums[v + 1] += sum_b[i];
      }
    }
  }
}

BVPO_INLINE void scale_columns_body(float* acc, int64_t rows, int64_t tokens, int64_t stride, const float* factor) {
  for (int64_t t = 0; t < tokens; t += kLanes) {
    const v16 f = load(factor + t);
    if (!any(f != splat(1.0f))) continue;
    for (int64_t i = 0; i < rows; ++i) {
      float* p = acc + i * stride + t;
      store(p, load(p) * f);
    }
  }
}

}  // namespace

BVPO_DISPATCH(transform_rows, (Tile tile, Transform transform, int64_t first_row, float* slope),
              (tile, transform, first_row, slope))
BVPO_DISPATCH(softcap_slopes, (Tile tile, Transform transform, float* slope),
              (tile, transform, slope))
BVPO_DISPATCH(online_sums, (Tile tile, float* max_t, float* sum_t, float* weighted_t),
              (tile, max_t, sum_t, weighted_t))
BVPO_DISPATCH(online_probabilities, (Tile tile, const float* slope, float* max_t, float* sum_t, float* weighted_t, float* rescale_t, Output out, Store store_as),
              (tile, slope, max_t, sum_t, weighted_t, rescale_t, out, store_as))
BVPO_DISPATCH(logit_gradients, (Tile tile, const float* slope, const float* max_t, const float* logsum_t, const float* scale_t, Output out, Store store_as, float* row_sums),
              (tile, slope, max_t, logsum_t, scale_t, out, store_as, row_sums))
BVPO_DISPATCH(scale_columns, (float* acc, int64_t rows, int64_t tokens, int64_t stride, const float* factor),
              (acc, rows, tokens, stride, factor))

}  // namespace bvpo
