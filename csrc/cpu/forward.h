// Schedules "scores only" (2 TVD) and "frozen weight" (4 TVD).
#pragma once

#include <cmath>

#include "head.h"

namespace bvpo {

// Per-token results, by row of the caller's tensors; null where not wanted. unit is [T, D].
struct ForwardOut {
  float* logprobs;
  float* max;
  float* logsum;
  float* entropy;
  void* unit;
  int64_t unit_stride;
};

// Online-softmax state of tokens: sums over the columns other than the target.
struct Sums {
  float* max;
  float* sum;
  float* weighted;  // null unless entropy is wanted

  Sums at(int64_t t) const { return {max + t, sum + t, weighted ? weighted + t : nullptr}; }
};

inline Sums empty_sums(const Buffer<float>& storage, int64_t n, bool entropy) {
  Sums sums{storage.get(), storage.get() + n, entropy ? storage.get() + 2 * n : nullptr};
  std::fill_n(sums.max, n, -std::numeric_limits<float>::infinity());
  std::fill_n(sums.sum, n, 0.0f);
  if (entropy) std::fill_n(sums.weighted, n, 0.0f);
  return sums;
}

// Joins the target's entry to the other columns' sums. With s = sum_{v != y} exp(z_v - m):
// logp = -log1p(s exp(m - z_y)), lse - m = logaddexp(z_y - m, log s). Few per token: fp64.
inline void finish_token(float max, float sum, float weighted, float target_z, int64_t row,
                         const ForwardOut& out) {
  const bool alone = max == -std::numeric_limits<float>::infinity();
  const double shift = alone ? target_z : max;
  const double relative = target_z - shift, log_others = alone ? -INFINITY : std::log((double)sum);
  const double margin = relative - log_others;
  const double logp = margin > 0 ? -std::log1p(std::exp(-margin)) : margin - std::log1p(std::exp(margin));
  const double logsum = margin > 0 ? relative - logp : log_others + std::log1p(std::exp(margin));
  out.logprobs[row] = static_cast<float>(logp);
  out.max[row] = static_cast<float>(shift);
  out.logsum[row] = static_cast<float>(logsum);
  if (out.entropy) {
    const double rest = weighted * std::exp(-logsum) + logsum * std::expm1(logp);
    const double p = std::exp(logp), own = p > 0 ? p * logp : 0.0;  // a masked target has none
    out.entropy[row] = static_cast<float>(std::max(-(own + rest), 0.0));
  }
}

// Vocabulary columns of a task of `score_tokens`; a task leaves one partial per token.
constexpr int64_t kSpan = 4 * kTileRows;

// Merges the partials of the spans, in their order.
template <typename T, typename In>
void merge_spans(const Head<T, In>& head, const PackedTokens<T>& tokens, const Sums& partial,
                 const float* target_z, const ForwardOut& out) {
  const int64_t spans = (head.vocab + kSpan - 1) / kSpan, n = tokens.padded();
  at::parallel_for(0, tokens.count, 64, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      float max = partial.max[t];
      for (int64_t s = 1; s < spans; ++s) max = std::max(max, partial.max[s * n + t]);
      double sum = 0, weighted = 0;
      for (int64_t s = 0; s < spans; ++s) {
        const float part = partial.max[s * n + t];
        if (part == -std::numeric_limits<float>::infinity()) continue;
        const double step = (double)part - max, scale = std::exp(step);
        sum += scale * partial.sum[s * n + t];
        if (out.entropy) {
          weighted += scale * (partial.weighted[s * n + t] + step * partial.sum[s * n + t]);
        }
      }
      const int64_t token = tokens.first + t;
      finish_token(max, sum, weighted, target_z[token], head.index[token], out);
    }
  });
}

// Scores of packed tokens. Vocabulary spans are independent tasks. The weight is read where it lies
// (else widened into `copies`) and never packed. A tile of logits goes where place(v, rows, b) says,
// the targets taken out of it and into `target_z`.
template <typename T, typename In, typename Place>
void score_tokens(const Head<T, In>& head, const PackedTokens<T>& tokens,
                  const std::vector<Buffer<T>>& copies, float* target_z, const ForwardOut& out,
                  const Place& place) {
  const int64_t spans = (head.vocab + kSpan - 1) / kSpan, n = tokens.padded(), block = tokens.block;
  const bool entropy = out.entropy != nullptr;
  Buffer<float> storage(spans * n * (entropy ? 3 : 2));
  const Sums partial = empty_sums(storage, spans * n, entropy);
  for_each_task(spans, kPairs<T>, [&](int64_t s) {
    const int64_t end = std::min(head.vocab, (s + 1) * kSpan);
    for (int64_t v = s * kSpan; v < end; v += kTileRows) {
      const int64_t rows = std::min(kTileRows, end - v);
      const auto weight = weight_tile(head, v, rows, copies[at::get_thread_num()].get());
      for (int64_t b = 0; b < tokens.num_blocks(); ++b) {
        float* z = place(v, rows, b);
        logits_tile(head, tokens, b, weight, v, rows, z, nullptr, {target_z});
        const Sums sums = partial.at(s * n + b * block);
        online_sums({z, rows, block, block}, sums.max, sums.sum, sums.weighted);
      }
    }
  });
  merge_spans(head, tokens, partial, target_z, out);
}

template <typename T, typename In>
std::vector<Buffer<T>> weight_copies(const Head<T, In>& head) {
  return per_thread<T>(head.weight_in_place() ? 0 : kTileRows * head.padded_dim());
}

template <typename T, typename In>
void forward_scores(const Head<T, In>& head, int64_t workspace, const ForwardOut& out) {
  const int64_t spans = (head.vocab + kSpan - 1) / kSpan;
  const int64_t per_token = head.padded_dim() * sizeof(T) + spans * (out.entropy ? 12 : 8);
  const int64_t chunk = head.pass_tokens(per_token, workspace);
  const auto z = per_thread<float>(kTileRows * head.block_tokens());
  const auto copies = weight_copies(head);
  Buffer<float> target_z(head.num_tokens);
  for (int64_t first = 0; first < head.num_tokens; first += chunk) {
    const auto tokens = pack_tokens(head, first, std::min(chunk, head.num_tokens - first));
    score_tokens(head, tokens, copies, target_z.get(), out,
                 [&](int64_t, int64_t, int64_t) { return z[at::get_thread_num()].get(); });
  }
}

// unit_t = [(1 - p_y) s_y W_y - sum_{v != y} p_v s_v W_v] / temperature, s the softcap's slope.
template <typename T, typename In>
void write_unit(const Head<T, In>& head, int64_t token, const float* others, int64_t stride,
                float slope, const ForwardOut& out) {
  const int64_t row = head.index[token];
  const float inverse = 1.0f / head.transform.temperature;
  const float scale = -std::exp(-out.logsum[row]) * inverse;
  const float own = -std::expm1(out.logprobs[row]) * slope * inverse;
  const In* w = head.weight.row(head.target[row]);
  In* unit = static_cast<In*>(out.unit) + row * out.unit_stride;
  for (int64_t d = 0; d < head.dim; ++d) {
    const float weight = static_cast<float>(w[d * head.weight.column_stride]);
    unit[d] = static_cast<In>(own * weight + scale * others[d * stride]);
  }
}

// Tokens own their accumulator U^T = sum_v W_v p_v; vocabulary tiles pass by in order.
template <typename T, typename In>
void forward_frozen(const Head<T, In>& head, int64_t workspace, const ForwardOut& out) {
  constexpr int64_t rows_max = 2 * kTileRows;
  const int64_t block = head.block_tokens(), dim = head.padded_dim();
  const bool entropy = out.entropy != nullptr, capped = head.transform.softcap != 0.0f;
  const int64_t per_token = dim * (sizeof(T) + sizeof(float));
  const int64_t chunk = head.pass_tokens(per_token, workspace);
  auto z = per_thread<float>(rows_max * block * (capped ? 2 : 1));
  auto packed = per_thread<T>(rows_max * block);
  auto rescale = per_thread<float>(block);
  Buffer<T> transposed(dim * rows_max), copy(head.weight_in_place() ? 0 : rows_max * dim);
  Buffer<float> target_z(head.num_tokens), target_slope(head.num_tokens);
  for (int64_t first = 0; first < head.num_tokens; first += chunk) {
    const auto tokens = pack_tokens(head, first, std::min(chunk, head.num_tokens - first));
    const int64_t n = tokens.padded();
    Buffer<float> storage(n * (entropy ? 3 : 2)), acc(n * dim);
    const Sums sums = empty_sums(storage, n, entropy);
    std::fill_n(acc.get(), n * dim, 0.0f);
    for (int64_t v = 0; v < head.vocab; v += rows_max) {
      const int64_t rows = std::min(rows_max, head.vocab - v);
      const int64_t padded = round_up(rows, kStepK<T>);
      const auto weight = weight_tile(head, v, rows, copy.get());
      transpose_weight(weight, rows, head.dim, transposed.get(), padded);
      for_each_task(tokens.num_blocks(), kPairs<T>, [&](int64_t b) {
        const int thread = at::get_thread_num();
        float* zt = z[thread].get();
        float* slope = capped ? zt + rows_max * block : nullptr;
        T* p = packed[thread].get();
        logits_tile(head, tokens, b, weight, v, rows, zt, slope,
                    {target_z.get(), target_slope.get()});
        const Sums s = sums.at(b * block);
        std::fill(p + rows / 2 * 2 * block, p + padded * block, T(0.0f));
        online_probabilities({zt, rows, block, block}, slope, s.max, s.sum, s.weighted,
                             rescale[thread].get(), {nullptr, 0, p}, store_as<T>());
        float* u = acc.get() + b * block * dim;
        scale_columns(u, head.dim, block, block, rescale[thread].get());
        gemm(head.dim, block, padded, transposed.get(), padded, p, block, u, block, true);
      });
    }
    at::parallel_for(0, tokens.count, 16, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const int64_t token = first + t;
        finish_token(sums.max[t], sums.sum[t], entropy ? sums.weighted[t] : 0.0f, target_z[token],
                     head.index[token], out);
        const float* others = acc.get() + t / block * block * dim + t % block;
        write_unit(head, token, others, block, target_slope[token], out);
      }
    });
  }
}

}  // namespace bvpo
