// linear_logprobs with tail_tolerance > 0 on the CPU: outputs, the choice of the sparse tokens, and
// registration. Schemas: bvpo_kernels/backends/extensions.py; the rule: DESIGN.md, section 12.

#include <torch/library.h>

#include <cstdlib>
#include <tuple>

#include "call.h"
#include "tail_backward.h"
#include "tail_forward.h"

namespace bvpo {
namespace {

// Zeros that cost nothing until they are touched: the capacity is rarely used up.
Tensor lazy_zeros(int64_t size, at::ScalarType dtype) {
  const auto bytes = static_cast<size_t>(std::max<int64_t>(size, 1)) * at::elementSize(dtype);
  void* data = std::calloc(bytes, 1);
  if (!data) throw std::bad_alloc();
  return at::from_blob(data, {size}, [](void* p) { std::free(p); }, at::TensorOptions().dtype(dtype));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& hidden, const Tensor& weight, const Tensor& target,
    const std::optional<Tensor>& bias, double temperature, std::optional<double> softcap,
    int64_t ignore_index, int64_t workspace, double tolerance, int64_t longest, int64_t capacity,
    bool need_entropy) {
  check(hidden, weight, target);
  const auto fp32 = hidden.options().dtype(at::kFloat);
  const int64_t tokens = hidden.size(0);
  const Tensor logprobs = at::zeros(tokens, fp32), max = at::zeros(tokens, fp32);
  const Tensor logsum = at::zeros(tokens, fp32), tail = at::zeros(tokens, fp32);
  const Tensor entropy = need_entropy ? at::zeros(tokens, fp32) : at::empty(0, hidden.options());
  const Tensor offsets = at::zeros(tokens + 1, fp32.dtype(at::kLong));
  const Tensor columns = lazy_zeros(capacity, at::kInt), entries = lazy_zeros(capacity, at::kFloat);
  const ForwardOut out{logprobs.mutable_data_ptr<float>(),
                       max.mutable_data_ptr<float>(),
                       logsum.mutable_data_ptr<float>(),
                       need_entropy ? entropy.mutable_data_ptr<float>() : nullptr,
                       nullptr,
                       0};
  int64_t* starts = offsets.mutable_data_ptr<int64_t>();
  const TailOut lists{tail.mutable_data_ptr<float>(), starts, columns.mutable_data_ptr<int32_t>(),
                      entries.mutable_data_ptr<float>()};
  const Options options{temperature, softcap, ignore_index, workspace};
  const TailRule rule{static_cast<float>(tolerance), longest, capacity};
  const auto rows = scored_rows(target, ignore_index);
  with_head(hidden, weight, target, rows, bias, options,
            [&](const auto& head) { TailForward(head, rule, out, lists).run(workspace); });
  std::partial_sum(starts, starts + tokens + 1, starts);
  return {logprobs, max, logsum, entropy, tail, offsets, columns, entries};
}

struct Choice {
  std::vector<int64_t> sparse, dense;
};

// A token is sparse if what its list leaves out of the gradient is small beside the largest
// upstream weight: |dlogp_t| tail_t <= tolerance max_s |dlogp_s|.
Choice choose(const std::vector<int64_t>& rows, const BackwardIn& in, const float* tail,
              double tolerance) {
  double largest = 0;
  for (const int64_t row : rows) largest = std::max(largest, std::abs((double)in.dlogprobs[row]));
  Choice choice;
  for (const int64_t row : rows) {
    const double bound = std::abs((double)in.dlogprobs[row]) * tail[row];
    (bound <= tolerance * largest ? choice.sparse : choice.dense).push_back(row);
  }
  return choice;
}

std::tuple<Tensor, Tensor, Tensor> backward(
    const Tensor& dlogprobs, const Tensor& hidden, const Tensor& weight, const Tensor& target,
    const std::optional<Tensor>& bias, const Tensor& logprobs, const Tensor& max,
    const Tensor& logsum, const Tensor& tail, const Tensor& offsets, const Tensor& columns,
    const Tensor& entries, double temperature, std::optional<double> softcap, int64_t ignore_index,
    int64_t workspace, double tolerance, bool need_hidden, bool need_weight, bool need_bias) {
  check(hidden, weight, target);
  const Tensor upstream = dlogprobs.to(at::kFloat).contiguous();
  const Tensor dhidden = need_hidden ? gradient_rows(hidden) : at::empty(0, hidden.options());
  Tensor dweight = at::empty(0, weight.options());
  if (need_weight) dweight = at::empty(weight.sizes(), weight.options());
  const bool wants_bias = need_bias && bias;
  Tensor dbias = at::empty(wants_bias ? weight.size(0) : 0, weight.options().dtype(at::kFloat));
  const BackwardIn in{upstream.const_data_ptr<float>(), logprobs.const_data_ptr<float>(),
                      max.const_data_ptr<float>(), logsum.const_data_ptr<float>()};
  const TailIn lists{tail.const_data_ptr<float>(), offsets.const_data_ptr<int64_t>(),
                     columns.const_data_ptr<int32_t>(), entries.const_data_ptr<float>()};
  const BackwardOut out{need_hidden ? dhidden.mutable_data_ptr() : nullptr, hidden.size(1),
                        need_weight ? dweight.mutable_data_ptr() : nullptr,
                        wants_bias ? dbias.mutable_data_ptr<float>() : nullptr};
  const Options options{temperature, softcap, ignore_index, workspace};
  const auto rows = scored_rows(target, ignore_index);
  const Choice choice = choose(rows, in, lists.tail, tolerance);
  const bool columns_wanted = need_weight || wants_bias;
  with_head(hidden, weight, target, rows, bias, options, [&](const auto& head) {
    auto few = head, many = head;
    few.index = few.hidden.index = choice.sparse.data();
    few.num_tokens = static_cast<int64_t>(choice.sparse.size());
    many.index = many.hidden.index = choice.dense.data();
    many.num_tokens = static_cast<int64_t>(choice.dense.size());
    SparseRows sparse(few, in, lists);
    if (columns_wanted) sparse.transpose();
    if (many.num_tokens > 0) {
      const RowAdder others = [&](int64_t v, float* row) { return sparse.add_column(v, row); };
      Backward(many, in, out, workspace, others).run();
    } else if (columns_wanted) {
      sparse.weight(out);
    }
    if (need_hidden) sparse.hidden(out);  // after the dense tokens, whose sums lie in all rows
  });
  if (need_hidden) zero_ignored(dhidden, target, ignore_index);
  if (rows.empty()) {
    dweight.zero_();
    dbias.zero_();
  }
  return {dhidden, dweight, wants_bias ? dbias.to(bias->scalar_type()) : dbias};
}

TORCH_LIBRARY_IMPL(bvpo, CPU, m) {
  m.impl("cpu_tail_logprobs_forward", forward);
  m.impl("cpu_tail_logprobs_backward", backward);
}

}  // namespace
}  // namespace bvpo
