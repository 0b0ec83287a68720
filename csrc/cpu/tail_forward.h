// Forward of the schedule "trained, certified sparse": log-probabilities, and per token the entries
// of the softmax that leave out at most `tolerance`, where those are few.
#pragma once

#include <cmath>

#include "forward.h"
#include "lists.h"

namespace bvpo {

struct TailRule {
  float tolerance;    // probability that a list may leave out
  int64_t longest;    // entries of a list; a token that needs more has none
  int64_t capacity;   // entries of all lists
};

// By row of the caller's tensors. A token without a list has tail = 1 - p_y: nothing but its
// target's own entry is known.
struct TailOut {
  float* tail;       // [T]
  int64_t* offsets;  // [T + 1]
  int32_t* columns;  // [capacity]
  float* entries;    // [capacity] p_v, times the softcap's slope
};

// A list may leave out this many times the tolerance: its token's upstream gradient may be small.
constexpr float kGiveUp = 4.0f;
// What is left out is rounded up by more than fp32 sums lose.
constexpr double kRoundUp = 1.0 + 1.0 / 1024;

// The smallest candidates go, by quarters of an octave, until the next quarter would leave out more
// than `tolerance`. `z` becomes p; returns the smallest p that stays, and updates `left_out`.
inline float choose_entries(float* z, int64_t n, double lse_minus_max, float max, double tolerance,
                            double* left_out) {
  constexpr int kShift = 21, kBins = (0x7f << (23 - kShift)) + 1;
  double mass[kBins + 1] = {};
  int lowest = kBins, highest = 0;
  for (int64_t i = 0; i < n; ++i) {
    z[i] = static_cast<float>(std::exp((double)z[i] - max - lse_minus_max));
    int32_t bits;
    std::memcpy(&bits, &z[i], sizeof(bits));
    const int bin = std::clamp(bits >> kShift, 0, kBins);
    mass[bin] += z[i];
    lowest = std::min(lowest, bin);
    highest = std::max(highest, bin);
  }
  int bin = lowest;
  for (; bin <= highest && *left_out + mass[bin] <= tolerance; ++bin) *left_out += mass[bin];
  const int32_t bits = bin << kShift;
  float smallest;
  std::memcpy(&smallest, &bits, sizeof(smallest));
  return smallest;
}

// The state of a chunk of tokens while the vocabulary passes by.
struct TailState {
  Buffer<float> numbers, z;
  Buffer<int32_t> column, count;
  ListedSums sums;
  Candidates lists;

  TailState(int64_t tokens, const TailRule& rule, bool entropy)
      : numbers(tokens * 6), z(tokens * (rule.longest + kTileRows)),
        column(tokens * (rule.longest + kTileRows)), count(tokens) {
    float* at = numbers.get();
    sums = {at, at + tokens, at + 2 * tokens, entropy ? at + 3 * tokens : nullptr};
    std::fill_n(sums.max, tokens, -std::numeric_limits<float>::infinity());
    std::fill_n(sums.kept, 3 * tokens, 0.0f);
    std::fill_n(count.get(), tokens, 0);
    // Padding is not listed.
    std::fill_n(at + 4 * tokens, tokens, std::numeric_limits<float>::infinity());
    std::fill_n(at + 5 * tokens, tokens, 0.0f);
    lists = {column.get(), z.get(), rule.longest + kTileRows, rule.longest,
             kGiveUp * rule.tolerance, count.get(), at + 4 * tokens, at + 5 * tokens};
  }

  static int64_t bytes_per_token(const TailRule& rule) {
    return (rule.longest + kTileRows) * 8 + 7 * static_cast<int64_t>(sizeof(float));
  }
};

template <typename T, typename In>
class TailForward {
 public:
  TailForward(const Head<T, In>& head, const TailRule& rule, const ForwardOut& out,
              const TailOut& lists)
      : head_(head), rule_(rule), out_(out), lists_(lists) {}

  // Tokens own their lists; the vocabulary passes in order, so that what a list holds does not
  // depend on the number of threads.
  void run(int64_t workspace) {
    const int64_t all = head_.num_tokens;
    const int64_t per_token = head_.padded_dim() * sizeof(T) + TailState::bytes_per_token(rule_);
    const int64_t chunk = head_.pass_tokens(per_token, workspace);
    for (int64_t t = 0; t < all; t += chunk) run_chunk(t, std::min(chunk, all - t));
  }

 private:
  void run_chunk(int64_t first, int64_t count) {
    constexpr int64_t panel = 4 * kTileRows;
    const auto tokens = pack_tokens(head_, first, count);
    const int64_t block = tokens.block;
    TailState state(tokens.padded(), rule_, out_.entropy != nullptr);
    start(state, first, count);
    auto z = per_thread<float>(kTileRows * block);
    Buffer<T> copy(head_.weight_in_place() ? 0 : panel * head_.padded_dim());
    Buffer<float> target_z(head_.num_tokens);
    for (int64_t v = 0; v < head_.vocab; v += panel) {
      const int64_t end = std::min(head_.vocab, v + panel);
      const auto weight = weight_tile(head_, v, end - v, copy.get());
      for_each_task(tokens.num_blocks(), kPairs<T>, [&](int64_t b) {
        float* tile = z[at::get_thread_num()].get();
        for (int64_t r = v; r < end; r += kTileRows) {
          const int64_t rows = std::min(kTileRows, end - r);
          const WeightTile<T> part{weight.data + (r - v) * weight.ld, weight.ld};
          logits_tile(head_, tokens, b, part, r, rows, tile, nullptr, {target_z.get()});
          online_candidates({tile, rows, block, block}, r, state.sums.at(b * block),
                            state.lists.at(b * block));
        }
      });
    }
    finish(state, first, count, target_z.get());
  }

  // Where p_v falls like v^-a, the entry at which `longest` of them leave out the tolerance has
  // p = (a - 1) tolerance / longest: candidates start below that for every a >= 1.25.
  void start(TailState& state, int64_t first, int64_t count) const {
    const float floor = std::log(rule_.tolerance / (4.0f * static_cast<float>(rule_.longest)));
    std::fill_n(state.lists.floor, count, floor);
    float* target_z = const_cast<float*>(state.lists.target_z);
    at::parallel_for(0, count, 64, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) target_z[t] = target_logit(first + t);
    });
  }

  float target_logit(int64_t token) const {
    const int64_t v = head_.target[head_.index[token]];
    const In* h = head_.hidden.row(token);
    const In* w = head_.weight.row(v);
    float z = head_.transform.bias ? head_.transform.bias[v] : 0.0f;
    for (int64_t d = 0; d < head_.dim; ++d) {
      z += static_cast<float>(h[d * head_.hidden.column_stride]) *
           static_cast<float>(w[d * head_.weight.column_stride]);
    }
    const float cap = head_.transform.softcap;
    if (cap != 0.0f) z = cap * std::tanh(z / cap);
    return z / head_.transform.temperature;
  }

  void finish(const TailState& state, int64_t first, int64_t count, const float* target_z) {
    std::vector<float> smallest(count);
    at::parallel_for(0, count, 16, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) smallest[t] = finish_list(state, first, t, target_z);
    });
    std::vector<int64_t> starts(count);
    for (int64_t t = 0; t < count; ++t) {
      starts[t] = used_;
      const int64_t row = head_.index[first + t], n = lists_.offsets[row + 1];
      if (used_ + n > rule_.capacity) {
        lists_.offsets[row + 1] = 0;
        lists_.tail[row] = unlisted(row);
      }
      used_ += lists_.offsets[row + 1];
    }
    at::parallel_for(0, count, 16, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) copy_list(state, first, t, smallest[t], starts[t]);
    });
  }

  float unlisted(int64_t row) const {
    return static_cast<float>(-std::expm1((double)out_.logprobs[row]) * kRoundUp);
  }

  // Results of a token, its tail, and its number of entries (in offsets[row + 1]).
  float finish_list(const TailState& state, int64_t first, int64_t t, const float* target_z) {
    const int64_t row = head_.index[first + t];
    const ListedSums& sums = state.sums;
    finish_token(sums.max[t], sums.kept[t] + sums.rest[t], sums.weighted ? sums.weighted[t] : 0.0f,
                 target_z[first + t], row, out_);
    float* z = state.z.get() + t * state.lists.room;
    const int64_t n = state.lists.count[t];
    const double unit = std::exp(-(double)out_.logsum[row]);
    double left_out = sums.rest[t] * unit * kRoundUp;
    const float smallest = choose_entries(z, n, out_.logsum[row], out_.max[row],
                                          rule_.tolerance / kRoundUp, &left_out);
    int64_t stay = 0;
    for (int64_t i = 0; i < n; ++i) stay += z[i] >= smallest;
    const bool listed = std::isfinite(state.lists.floor[t]) && left_out <= kGiveUp * rule_.tolerance;
    lists_.offsets[row + 1] = listed ? stay : 0;
    lists_.tail[row] = listed ? static_cast<float>(left_out * kRoundUp) : unlisted(row);
    return smallest;
  }

  void copy_list(const TailState& state, int64_t first, int64_t t, float smallest, int64_t start) {
    const int64_t row = head_.index[first + t];
    if (lists_.offsets[row + 1] == 0) return;
    const float cap = head_.transform.softcap;
    const double lse = (double)out_.max[row] + out_.logsum[row];
    for (int64_t i = 0; i < state.lists.count[t]; ++i) {
      const float p = state.z[t * state.lists.room + i];
      if (!(p >= smallest)) continue;
      const double tanh = cap != 0.0f ? (std::log((double)p) + lse) * head_.transform.temperature / cap : 0;
      lists_.columns[start] = state.column[t * state.lists.room + i];
      lists_.entries[start++] = static_cast<float>(p * (1 - tanh * tanh));
    }
  }

  const Head<T, In>& head_;
  const TailRule rule_;
  const ForwardOut& out_;
  const TailOut& lists_;
  int64_t used_ = 0;
};

}  // namespace bvpo
