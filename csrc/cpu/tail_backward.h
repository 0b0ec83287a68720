// Backward of the schedule "trained, certified sparse": sums over a few rows for tokens with a list
// that leaves out little, the exact backward for the others.
#pragma once

#include <cmath>

#include "backward.h"
#include "lists.h"

namespace bvpo {

// What the forward kept beside `BackwardIn`, by row of the caller's tensors.
struct TailIn {
  const float* tail;
  const int64_t* offsets;
  const int32_t* columns;
  const float* entries;
};

// A row's gradient with respect to its target's logit before temperature and softcap.
inline float target_gradient(const BackwardIn& in, const Transform& transform, int64_t row) {
  const double slope = transform.slope((double)in.logprobs[row] + in.logsum[row] + in.max[row]);
  return static_cast<float>(-std::expm1((double)in.logprobs[row]) * in.dlogprobs[row] * slope /
                            transform.temperature);
}

// Over the sparse rows of `head` (their lists and their targets' entries).
template <typename T, typename In>
class SparseRows {
 public:
  SparseRows(const Head<T, In>& head, const BackwardIn& in, const TailIn& lists)
      : head_(head), in_(in), lists_(lists) {}

  // dH_t = dlogp_t (W_y (1 - p_y) - sum_v p_v W_v), in fp32, rounded once.
  void hidden(const BackwardOut& out) const {
    at::parallel_for(0, head_.num_tokens, 8, [&](int64_t begin, int64_t end) {
      Buffer<float> acc(head_.dim);
      for (int64_t t = begin; t < end; ++t) {
        const int64_t row = head_.index[t];
        std::fill_n(acc.get(), head_.dim, 0.0f);
        if (in_.dlogprobs[row] != 0.0f) {
          const float scale = entry_scale(row);
          for (int64_t i = lists_.offsets[row]; i < lists_.offsets[row + 1]; ++i) {
            add(head_.weight, lists_.columns[i], scale * lists_.entries[i], acc.get());
          }
          add(head_.weight, head_.target[row], target_gradient(in_, head_.transform, row), acc.get());
        }
        In* to = static_cast<In*>(out.dhidden) + row * out.dhidden_stride;
        for (int64_t d = 0; d < head_.dim; ++d) to[d] = static_cast<In>(acc[d]);
      }
    });
  }

  // Sorts all entries by column (counting sort, stable: tokens stay in order).
  void transpose() {
    starts_.assign(head_.vocab + 1, 0);
    const auto each = [&](const auto& fn) {
      for (int64_t t = 0; t < head_.num_tokens; ++t) {
        const int64_t row = head_.index[t];
        if (in_.dlogprobs[row] == 0.0f) continue;
        const float scale = entry_scale(row);
        for (int64_t i = lists_.offsets[row]; i < lists_.offsets[row + 1]; ++i) {
          fn(t, lists_.columns[i], scale * lists_.entries[i]);
        }
        fn(t, head_.target[row], target_gradient(in_, head_.transform, row));
      }
    };
    each([&](int64_t, int64_t v, float) { ++starts_[v + 1]; });
    std::partial_sum(starts_.begin(), starts_.end(), starts_.begin());
    by_column_ = Buffer<Entry>(starts_.back());
    std::vector<int64_t> next(starts_.begin(), starts_.end() - 1);
    each([&](int64_t t, int64_t v, float dz) { by_column_[next[v]++] = {static_cast<int32_t>(t), dz}; });
  }

  // row += sum over tokens that list column v of dz_t,v h_t; returns the sum of dz. Row may be null.
  float add_column(int64_t v, float* row) const {
    float sum = 0;
    for (int64_t i = starts_[v]; i < starts_[v + 1]; ++i) {
      sum += by_column_[i].dz;
      if (row) add(head_.hidden, by_column_[i].token, by_column_[i].dz, row);
    }
    return sum;
  }

  // dW and dbias where no token is dense.
  void weight(const BackwardOut& out) const {
    at::parallel_for(0, head_.vocab, 64, [&](int64_t begin, int64_t end) {
      Buffer<float> acc(head_.dim);
      for (int64_t v = begin; v < end; ++v) {
        std::fill_n(acc.get(), head_.dim, 0.0f);
        const float sum = add_column(v, out.dweight ? acc.get() : nullptr);
        if (out.dbias) out.dbias[v] = sum;
        if (!out.dweight) continue;
        In* to = static_cast<In*>(out.dweight) + v * head_.dim;
        for (int64_t d = 0; d < head_.dim; ++d) to[d] = static_cast<In>(acc[d]);
      }
    });
  }

 private:
  struct Entry {
    int32_t token;
    float dz;
  };

  float entry_scale(int64_t row) const { return -in_.dlogprobs[row] / head_.transform.temperature; }

  void add(const Source<In>& source, int64_t i, float factor, float* acc) const {
    const In* row = source.row(i);
    if (source.column_stride == 1) return add_scaled(row, store_as<In>(), head_.dim, factor, acc);
    for (int64_t d = 0; d < head_.dim; ++d) {
      acc[d] += factor * static_cast<float>(row[d * source.column_stride]);
    }
  }

  const Head<T, In>& head_;
  const BackwardIn in_;
  const TailIn lists_;
  std::vector<int64_t> starts_;
  Buffer<Entry> by_column_;
};

}  // namespace bvpo
