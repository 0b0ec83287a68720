// linear_logprobs on the CPU: outputs, schedules, and registration.
// Schemas are defined in bvpo_kernels/backends/extensions.py.

#include <torch/library.h>

#include <optional>
#include <string>
#include <tuple>

#include "backward.h"
#include "call.h"
#include "forward.h"

namespace bvpo {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& hidden, const Tensor& weight, const Tensor& target,
    const std::optional<Tensor>& bias, double temperature, std::optional<double> softcap,
    int64_t ignore_index, int64_t workspace, bool need_entropy, bool need_unit) {
  check(hidden, weight, target);
  const auto fp32 = hidden.options().dtype(at::kFloat);
  const int64_t tokens = hidden.size(0);
  const Tensor logprobs = at::zeros(tokens, fp32), max = at::zeros(tokens, fp32);
  const Tensor logsum = at::zeros(tokens, fp32);
  const Tensor entropy = need_entropy ? at::zeros(tokens, fp32) : at::empty(0, hidden.options());
  const Tensor unit = need_unit ? at::empty(hidden.sizes(), hidden.options())
                                : at::empty(0, hidden.options());
  const ForwardOut out{logprobs.mutable_data_ptr<float>(),
                       max.mutable_data_ptr<float>(),
                       logsum.mutable_data_ptr<float>(),
                       need_entropy ? entropy.mutable_data_ptr<float>() : nullptr,
                       need_unit ? unit.mutable_data_ptr() : nullptr,
                       hidden.size(1)};
  const Options options{temperature, softcap, ignore_index, workspace};
  const auto rows = scored_rows(target, ignore_index);
  with_head(hidden, weight, target, rows, bias, options, [&](const auto& head) {
    if (need_unit) {
      forward_frozen(head, workspace, out);
    } else {
      forward_scores(head, workspace, out);
    }
  });
  if (need_unit) zero_ignored(unit, target, ignore_index);
  return {logprobs, max, logsum, entropy, unit};
}

std::tuple<Tensor, Tensor, Tensor> backward(
    const Tensor& dlogprobs, const Tensor& hidden, const Tensor& weight, const Tensor& target,
    const std::optional<Tensor>& bias, const Tensor& logprobs, const Tensor& max,
    const Tensor& logsum, double temperature, std::optional<double> softcap, int64_t ignore_index,
    int64_t workspace, bool need_hidden, bool need_weight, bool need_bias) {
  check(hidden, weight, target);
  const Tensor upstream = dlogprobs.to(at::kFloat).contiguous();
  const Tensor dhidden = need_hidden ? gradient_rows(hidden) : at::empty(0, hidden.options());
  Tensor dweight = at::empty(0, weight.options());
  if (need_weight) dweight = at::empty(weight.sizes(), weight.options());
  const bool wants_bias = need_bias && bias;
  Tensor dbias = at::empty(wants_bias ? weight.size(0) : 0, weight.options().dtype(at::kFloat));
  const BackwardIn in{upstream.const_data_ptr<float>(), logprobs.const_data_ptr<float>(),
                      max.const_data_ptr<float>(), logsum.const_data_ptr<float>()};
  const BackwardOut out{need_hidden ? dhidden.mutable_data_ptr() : nullptr, hidden.size(1),
                        need_weight ? dweight.mutable_data_ptr() : nullptr,
                        wants_bias ? dbias.mutable_data_ptr<float>() : nullptr};
  const Options options{temperature, softcap, ignore_index, workspace};
  const auto rows = scored_rows(target, ignore_index);
  with_head(hidden, weight, target, rows, bias, options, [&](const auto& head) {
    Backward(head, in, out, workspace).run();
  });
  if (need_hidden) zero_ignored(dhidden, target, ignore_index);
  if (rows.empty()) {
    dweight.zero_();
    dbias.zero_();
  }
  return {dhidden, dweight, wants_bias ? dbias.to(bias->scalar_type()) : dbias};
}

// What the products run on, for `python -m bvpo_kernels`.
std::string path(at::ScalarType dtype) {
  if (dtype == at::kFloat) return "fp32 brgemm";
  if (!has_pairs(dtype)) return "widened to fp32 brgemm";
  return at::native::cpublas::could_pack(dtype) ? "AMX brgemm" : "AVX512-BF16 brgemm";
}

TORCH_LIBRARY_IMPL(bvpo, CPU, m) {
  m.impl("cpu_linear_logprobs_forward", forward);
  m.impl("cpu_linear_logprobs_backward", backward);
}

TORCH_LIBRARY_IMPL(bvpo, CompositeExplicitAutograd, m) { m.impl("cpu_path", path); }

}  // namespace
}  // namespace bvpo
