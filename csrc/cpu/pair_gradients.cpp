// linear_logprobs with its gradients for factors known beforehand: outputs and registration.
// The schema is defined in bvpo_kernels/backends/extensions.py.

#include "pair_gradients.h"

#include <torch/library.h>

#include <optional>
#include <tuple>

#include "call.h"

namespace bvpo {
namespace {

// Blocks of tokens are the tasks that form dZ and dH, and a chunk has few of them.
constexpr int64_t kChunkBlock = kMostBlockTokens / 2;

float* sums_of(const char* name, const std::optional<Tensor>& sums, at::IntArrayRef sizes) {
  if (!sums) return nullptr;
  TORCH_CHECK(sums->scalar_type() == at::kFloat && sums->is_contiguous() && sums->sizes() == sizes,
              name, ": contiguous fp32 ", sizes, " expected, got ", sums->scalar_type(), " ",
              sums->sizes());
  return sums->mutable_data_ptr<float>();
}

// logprobs [T] and factor_t d logp_t / d hidden_t [T, D]; `sums` [V, D] and `bias_sums` [V] take the
// sums over t of factor_t d logp_t / d W and d bias.
std::tuple<Tensor, Tensor> pair_gradients(
    const Tensor& hidden, const Tensor& weight, const Tensor& target,
    const std::optional<Tensor>& bias, const Tensor& factor, double temperature,
    std::optional<double> softcap, int64_t ignore_index, int64_t chunk_tokens, bool need_hidden,
    const std::optional<Tensor>& sums, const std::optional<Tensor>& bias_sums) {
  check(hidden, weight, target);
  TORCH_CHECK(factor.sizes() == target.sizes(), "factor: ", target.sizes(), " expected, got ",
              factor.sizes());
  TORCH_CHECK(chunk_tokens > 0, "chunk_tokens: a positive number expected, got ", chunk_tokens);
  const auto fp32 = hidden.options().dtype(at::kFloat);
  const int64_t tokens = hidden.size(0);
  const Tensor upstream = factor.to(at::kFloat).contiguous();
  const Tensor logprobs = at::zeros(tokens, fp32), max = at::zeros(tokens, fp32);
  const Tensor logsum = at::zeros(tokens, fp32);
  const Tensor unit = need_hidden ? at::empty(hidden.sizes(), hidden.options())
                                  : at::empty(0, hidden.options());
  const ForwardOut scores{logprobs.mutable_data_ptr<float>(), max.mutable_data_ptr<float>(),
                          logsum.mutable_data_ptr<float>(), nullptr, nullptr, 0};
  const BackwardIn in{upstream.const_data_ptr<float>(), scores.logprobs, scores.max, scores.logsum};
  const BackwardOut out{need_hidden ? unit.mutable_data_ptr() : nullptr, hidden.size(1),
                        sums_of("sums", sums, weight.sizes()),
                        sums_of("bias_sums", bias_sums, weight.size(0))};
  const Options options{temperature, softcap, ignore_index, 0};
  const auto rows = scored_rows(target, ignore_index);
  with_head(hidden, weight, target, rows, bias, options, [&](auto head) {
    head.most_block = kChunkBlock;
    PairGradients(head, in, scores, out, chunk_tokens).run();
  });
  if (need_hidden) zero_ignored(unit, target, ignore_index);
  if (rows.empty()) {
    if (sums) sums->zero_();
    if (bias_sums) bias_sums->zero_();
  }
  return {logprobs, unit};
}

TORCH_LIBRARY_IMPL(bvpo, CPU, m) { m.impl("cpu_pair_gradients", pair_gradients); }

}  // namespace
}  // namespace bvpo
