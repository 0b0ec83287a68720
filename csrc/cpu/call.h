// What every op on a linear head does first: checks of its arguments, the rows to compute, and the
// choice of the product type.
#pragma once

#include <ATen/ATen.h>

#include <cstring>
#include <optional>
#include <vector>

#include "head.h"

namespace bvpo {

using at::Tensor;

struct Options {
  double temperature;
  std::optional<double> softcap;
  int64_t ignore_index;
  int64_t workspace;
};

inline void check(const Tensor& hidden, const Tensor& weight, const Tensor& target) {
  TORCH_CHECK(hidden.dim() == 2 && weight.dim() == 2 && hidden.size(1) == weight.size(1),
              "hidden [T, D] and weight [V, D] expected, got ", hidden.sizes(), " and ", weight.sizes());
  TORCH_CHECK(hidden.scalar_type() == weight.scalar_type(), "hidden and weight of one dtype expected");
  TORCH_CHECK(target.scalar_type() == at::kLong && target.is_contiguous() &&
                  target.dim() == 1 && target.size(0) == hidden.size(0),
              "target: contiguous int64 [", hidden.size(0), "] expected, got ", target.sizes());
}

// Whether brgemm multiplies VNNI operands of this type faster than it multiplies them widened: with
// AMX, and for bf16 with AVX512-BF16 (twice the fp32 rate).
inline bool has_pairs(at::ScalarType dtype) {
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

inline std::vector<int64_t> scored_rows(const Tensor& target, int64_t ignore_index) {
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

// Calls fn with the Head of these rows, if any: fn is generic over the product and the input type.
template <typename F>
void with_head(const Tensor& hidden, const Tensor& weight, const Tensor& target,
               const std::vector<int64_t>& rows, const std::optional<Tensor>& bias,
               const Options& options, const F& fn) {
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

// Memory for a gradient by row of hidden. fp32 sums grow in it, block by block of tokens, before its
// rows are written: hence room for the rest of a last block, and ignored rows are zeroed at the end.
inline Tensor gradient_rows(const Tensor& hidden) {
  const int64_t tokens = hidden.size(0);
  const int64_t spare = hidden.scalar_type() == at::kFloat ? kMostBlockTokens : 0;
  return at::empty({tokens + spare, hidden.size(1)}, hidden.options()).narrow(0, 0, tokens);
}

inline void zero_ignored(const Tensor& rows, const Tensor& target, int64_t ignore_index) {
  const int64_t* y = target.const_data_ptr<int64_t>();
  const int64_t bytes = rows.size(1) * rows.element_size();
  char* row = static_cast<char*>(rows.mutable_data_ptr());
  for (int64_t t = 0; t < rows.size(0); ++t, row += bytes) {
    if (y[t] == ignore_index) std::memset(row, 0, bytes);
  }
}

}  // namespace bvpo
