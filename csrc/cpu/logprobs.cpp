// linear_logprobs on the CPU: checks, choice of the product type, and registration.
// Schemas are defined in bvpo_kernels/ops.py.

#include <ATen/ATen.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <tuple>

#include "backward.h"
#include "forward.h"

namespace bvpo {
namespace {

using at::Tensor;

struct Options {
  double temperature;
  std::optional<double> softcap;
  int64_t ignore_index;
  int64_t workspace;
};

void check(const Tensor& hidden, const Tensor& weight, const Tensor& target) {
  TORCH_CHECK(hidden.dim() == 2 && weight.dim() == 2 && hidden.size(1) == weight.size(1),
              "hidden [T, D] and weight [V, D] expected, got ", hidden.sizes(), " and ", weight.sizes());
  TORCH_CHECK(hidden.scalar_type() == weight.scalar_type(), "hidden and weight of one dtype expected");
  TORCH_CHECK(target.scalar_type() == at::kLong && target.is_contiguous() &&
                  target.dim() == 1 && target.size(0) == hidden.size(0),
              "target: contiguous int64 [", hidden.size(0), "] expected, got ", target.sizes());
}

// Whether brgemm multiplies VNNI operands of this type faster than it multiplies them widened: with
// AMX, and for bf16 with AVX512-BF16 (twice the fp32 rate).
bool has_pairs(at::ScalarType dtype) {
  if (dtype == at::kFloat || !at::globalContext().userEnabledMkldnn()) return false;
  if (at::native::cpublas::could_pack(dtype)) return true;
  static const bool dot_products = [] {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512bf16") && takes_vnni();
  }();
  return dtype == at::kBFloat16 && dot_products;
}

template <typename In>
Source<In> source_of(const Tensor& tensor, const int64_t* index) {
  return {tensor.const_data_ptr<In>(), tensor.stride(0), tensor.stride(1), index};
}

std::vector<int64_t> scored_rows(const Tensor& target, int64_t ignore_index) {
  std::vector<int64_t> rows;
  const int64_t* y = target.const_data_ptr<int64_t>();
  for (int64_t t = 0; t < target.size(0); ++t) {
    if (y[t] != ignore_index) rows.push_back(t);
  }
  return rows;
}

template <typename T, typename In, typename F>
void call(const Tensor& hidden, const Tensor& weight, const Tensor& target,
          const std::vector<int64_t>& rows, const Transform& transform, const F& fn) {
  const Head<T, In> head{source_of<In>(hidden, rows.data()),
                         source_of<In>(weight, nullptr),
                         weight.size(0),
                         weight.size(1),
                         transform,
                         rows.data(),
                         target.const_data_ptr<int64_t>(),
                         static_cast<int64_t>(rows.size())};
  fn(head);
}

// Calls fn with the Head of this call: fn is generic over the product type and the input type.
template <typename F>
void with_head(const Tensor& hidden, const Tensor& weight, const Tensor& target,
               const std::optional<Tensor>& bias, const Options& options, const F& fn) {
  const std::vector<int64_t> rows = scored_rows(target, options.ignore_index);
  if (rows.empty()) return;
  const Tensor bias_fp32 = bias ? bias->to(at::kFloat).contiguous() : Tensor();
  const Transform transform{bias ? bias_fp32.const_data_ptr<float>() : nullptr,
                            static_cast<float>(options.softcap.value_or(0.0)),
                            static_cast<float>(options.temperature)};
  AT_DISPATCH_SWITCH(
      hidden.scalar_type(), "linear_logprobs",
      AT_DISPATCH_CASE(at::kFloat, [&] { call<float, scalar_t>(hidden, weight, target, rows, transform, fn); })
      AT_DISPATCH_CASE(at::kBFloat16, [&] {
        if (has_pairs(at::kBFloat16)) {
          call<scalar_t, scalar_t>(hidden, weight, target, rows, transform, fn);
        } else {
          call<float, scalar_t>(hidden, weight, target, rows, transform, fn);
        }
      })
      AT_DISPATCH_CASE(at::kHalf, [&] {
        if (has_pairs(at::kHalf)) {
          call<scalar_t, scalar_t>(hidden, weight, target, rows, transform, fn);
        } else {
          call<float, scalar_t>(hidden, weight, target, rows, transform, fn);
        }
      }));
}

// A gradient by row of hidden: every scored row is written, the others are zero.
Tensor gradient_rows(const Tensor& hidden, const Tensor& target, int64_t ignore_index) {
  Tensor rows = at::empty(hidden.sizes(), hidden.options());
  const int64_t* y = target.const_data_ptr<int64_t>();
  for (int64_t t = 0; t < hidden.size(0); ++t) {
    if (y[t] == ignore_index) rows[t].zero_();
  }
  return rows;
}

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
  const Tensor unit = need_unit ? gradient_rows(hidden, target, ignore_index)
                                : at::empty(0, hidden.options());
  const ForwardOut out{logprobs.mutable_data_ptr<float>(),
                       max.mutable_data_ptr<float>(),
                       logsum.mutable_data_ptr<float>(),
                       need_entropy ? entropy.mutable_data_ptr<float>() : nullptr,
                       need_unit ? unit.mutable_data_ptr() : nullptr,
                       hidden.size(1)};
  const Options options{temperature, softcap, ignore_index, workspace};
  with_head(hidden, weight, target, bias, options, [&](const auto& head) {
    if (need_unit) {
      forward_frozen(head, workspace, out);
    } else {
      forward_scores(head, workspace, out);
    }
  });
  return {logprobs, max, logsum, entropy, unit};
}

std::tuple<Tensor, Tensor, Tensor> backward(
    const Tensor& dlogprobs, const Tensor& hidden, const Tensor& weight, const Tensor& target,
    const std::optional<Tensor>& bias, const Tensor& logprobs, const Tensor& max,
    const Tensor& logsum, double temperature, std::optional<double> softcap, int64_t ignore_index,
    int64_t workspace, bool need_hidden, bool need_weight, bool need_bias) {
  check(hidden, weight, target);
  const Tensor upstream = dlogprobs.to(at::kFloat).contiguous();
  const Tensor dhidden = need_hidden ? gradient_rows(hidden, target, ignore_index)
                                     : at::empty(0, hidden.options());
  Tensor dweight = at::empty(0, weight.options());
  if (need_weight) dweight = at::empty(weight.sizes(), weight.options());
  const bool wants_bias = need_bias && bias;
  Tensor dbias = at::empty(wants_bias ? weight.size(0) : 0, weight.options().dtype(at::kFloat));
  const BackwardIn in{upstream.const_data_ptr<float>(), logprobs.const_data_ptr<float>(),
                      max.const_data_ptr<float>(), logsum.const_data_ptr<float>()};
  const BackwardOut out{need_hidden ? dhidden.mutable_data_ptr() : nullptr, hidden.size(1),
                        need_weight ? dweight.mutable_data_ptr() : nullptr,
                        wants_bias ? dbias.mutable_data_ptr<float>() : nullptr};
  bool ran = false;
  const Options options{temperature, softcap, ignore_index, workspace};
  with_head(hidden, weight, target, bias, options, [&](const auto& head) {
    Backward(head, in, out, workspace).run();
    ran = true;
  });
  if (!ran) {
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
