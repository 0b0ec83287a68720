// linear_logprobs with its gradients for factors known beforehand: outputs and registration.
// The schema is defined in bvpo_kernels/backends/extensions.py.

#include "pair_gradients.h"

#include <torch/library.h>

#include <memory>
#include <optional>

#include "call.h"

namespace bvpo {
namespace {

// Blocks of tokens are the tasks that form dZ and dH, and a chunk has few of them.
constexpr int64_t kChunkBlock = kMostBlockTokens / 2;

// Where a result goes; null where it is not wanted.
void* place_of(const char* name, const std::optional<Tensor>& result, at::ScalarType type,
               at::IntArrayRef sizes) {
  if (!result) return nullptr;
  TORCH_CHECK(result->scalar_type() == type && result->is_contiguous() && result->sizes() == sizes,
              name, ": contiguous ", type, " ", sizes, " expected, got ", result->scalar_type(), " ",
              result->sizes());
  return result->mutable_data_ptr();
}

// logprobs [T]; `unit` [T, D] takes factor_t d logp_t / d hidden_t, `sums` [V, D] and `bias_sums` [V]
// the sums over t of factor_t d logp_t / d W and d bias.
Tensor pair_gradients(
    const Tensor& hidden, const Tensor& weight, const Tensor& target,
    const std::optional<Tensor>& bias, const Tensor& factor, double temperature,
    std::optional<double> softcap, int64_t ignore_index, int64_t chunk_tokens,
    const std::optional<Tensor>& unit, const std::optional<Tensor>& sums, const std::optional<Tensor>& bias_sums) {
  check(hidden, weight, target);
  TORCH_CHECK(factor.sizes() == target.sizes(), "factor: ", target.sizes(), " expected, got ",
              factor.sizes());
  TORCH_CHECK(chunk_tokens > 0, "chunk_tokens: a positive number expected, got ", chunk_tokens);
  const auto fp32 = hidden.options().dtype(at::kFloat);
  const int64_t tokens = hidden.size(0);
  const Tensor upstream = factor.to(at::kFloat).contiguous();
  const Tensor logprobs = at::zeros(tokens, fp32), max = at::zeros(tokens, fp32);
  const Tensor logsum = at::zeros(tokens, fp32);
  const ForwardOut scores{logprobs.mutable_data_ptr<float>(), max.mutable_data_ptr<float>(),
                          logsum.mutable_data_ptr<float>(), nullptr, nullptr, 0};
  const BackwardIn in{upstream.const_data_ptr<float>(), scores.logprobs, scores.max, scores.logsum};
  const BackwardOut out{
      place_of("unit", unit, hidden.scalar_type(), hidden.sizes()), hidden.size(1),
      place_of("sums", sums, at::kFloat, weight.sizes()),
      static_cast<float*>(place_of("bias_sums", bias_sums, at::kFloat, weight.size(0)))};
  const Options options{temperature, softcap, ignore_index, 0};
  const auto rows = scored_rows(target, ignore_index);
  with_head(hidden, weight, target, rows, bias, options, [&](auto head) {
    head.most_block = kChunkBlock;
    PairGradients(head, in, scores, out, chunk_tokens).run();
  });
  if (unit) zero_ignored(*unit, target, ignore_index);
  if (rows.empty()) {
    if (sums) sums->zero_();
    if (bias_sums) bias_sums->zero_();
  }
  return logprobs;
}

// Uninitialised fp32 memory in large pages: torch's own is faulted in by 4 KiB, at a third of the rate.
Tensor scratch(at::IntArrayRef sizes) {
  const auto buffer = std::make_shared<Buffer<float>>(c10::multiply_integers(sizes));
  return at::from_blob(buffer->get(), sizes, [buffer](void*) {}, at::TensorOptions(at::kFloat));
}

TORCH_LIBRARY_IMPL(bvpo, CPU, m) { m.impl("cpu_pair_gradients", pair_gradients); }

TORCH_LIBRARY_IMPL(bvpo, CompositeExplicitAutograd, m) { m.impl("cpu_scratch", scratch); }

}  // namespace
}  // namespace bvpo
