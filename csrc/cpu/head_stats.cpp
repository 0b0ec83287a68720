// linear_logprobs' backward with the statistics of its weight gradient: outputs and registration.
// The schema is defined in bvpo_kernels/backends/extensions.py.

#include <torch/library.h>

#include <optional>
#include <tuple>

#include "call.h"
#include "head_stats.h"

namespace bvpo {
namespace {

// Scored tokens [edges[g], edges[g + 1]) of each group; one group of all without `ranges`.
std::vector<int64_t> group_edges(const std::vector<int64_t>& rows,
                                 const std::optional<Tensor>& ranges) {
  const int64_t scored = static_cast<int64_t>(rows.size());
  if (!ranges) return {0, scored};
  const auto bounds = ranges->accessor<int64_t, 2>();
  std::vector<int64_t> edges{0};
  for (int64_t g = 0, previous = 0; g < ranges->size(0); previous = bounds[g++][1]) {
    TORCH_CHECK_VALUE(bounds[g][0] == previous && bounds[g][1] >= previous,
                      "ranges: expected the tokens cut into groups, got ", *ranges);
    edges.push_back(std::lower_bound(rows.begin(), rows.end(), bounds[g][1]) - rows.begin());
  }
  TORCH_CHECK_VALUE(edges.back() == scored, "ranges: expected groups of all tokens, got ", *ranges);
  return edges;
}

// The gradients of `backward`, and of the groups' weight gradients: gram [G, G], kinds [K, V, D],
// rows [G, U, D] of `ids`; per-group bias gradients [G, V]; dZ left, [T, k]. Empty if not wanted.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> statistics(
    const Tensor& dlogprobs, const Tensor& hidden, const Tensor& weight, const Tensor& target,
    const std::optional<Tensor>& bias, const Tensor& logprobs, const Tensor& max,
    const Tensor& logsum, double temperature, std::optional<double> softcap, int64_t ignore_index,
    int64_t workspace, bool need_hidden, bool need_weight, bool need_bias,
    const std::optional<Tensor>& ranges, const std::optional<Tensor>& kind, int64_t num_kinds,
    const std::optional<Tensor>& ids, const std::optional<Tensor>& left) {
  check(hidden, weight, target);
  const std::vector<int64_t> scored = scored_rows(target, ignore_index);
  const std::vector<int64_t> edges = group_edges(scored, ranges);
  const int64_t groups = static_cast<int64_t>(edges.size()) - 1, dim = weight.size(1);
  const int64_t vocab = weight.size(0), num_ids = ids ? ids->size(0) : 0;
  const auto fp32 = hidden.options().dtype(at::kFloat);
  const bool grouped = ranges && need_weight, keeps = kind && num_kinds && need_weight;
  const bool wants_bias = need_bias && bias;
  const Tensor upstream = dlogprobs.to(at::kFloat).contiguous();
  const auto none = [&] { return at::empty(0, fp32); };  // outputs must not be one tensor
  const Tensor dhidden = need_hidden ? gradient_rows(hidden) : at::empty(0, hidden.options());
  const Tensor dweight = need_weight ? at::empty(weight.sizes(), weight.options())
                                     : at::empty(0, weight.options());
  const Tensor gram = at::zeros({groups, groups}, fp32.dtype(at::kDouble));
  const Tensor kinds = keeps ? at::zeros({num_kinds, vocab, dim}, fp32) : none();
  const Tensor rows = ids && grouped ? at::zeros({groups, num_ids, dim}, fp32) : none();
  const Tensor dbias = wants_bias ? at::zeros({groups, vocab}, fp32) : none();
  const Tensor signs = left ? left->to(at::kFloat).contiguous() : none();
  const Tensor sketched = left ? at::zeros({hidden.size(0), signs.size(1)}, fp32) : none();
  const auto data = [](const Tensor& t, bool wanted) {
    return wanted ? t.mutable_data_ptr<float>() : nullptr;
  };
  const Statistics stats{edges.data(), groups, grouped ? gram.mutable_data_ptr<double>() : nullptr,
                         keeps ? kind->const_data_ptr<int64_t>() : nullptr, data(kinds, keeps),
                         ids ? ids->const_data_ptr<int64_t>() : nullptr, num_ids,
                         data(rows, ids && grouped), data(dbias, wants_bias),
                         left ? signs.const_data_ptr<float>() : nullptr,
                         left ? signs.size(1) : 0, data(sketched, left.has_value())};
  const BackwardIn in{upstream.const_data_ptr<float>(), logprobs.const_data_ptr<float>(),
                      max.const_data_ptr<float>(), logsum.const_data_ptr<float>()};
  const BackwardOut out{need_hidden ? dhidden.mutable_data_ptr() : nullptr, hidden.size(1),
                        need_weight ? dweight.mutable_data_ptr() : nullptr, nullptr};
  const Options options{temperature, softcap, ignore_index, workspace};
  bool ran = false;
  with_head(hidden, weight, target, scored, bias, options, [&](const auto& head) {
    GroupedBackward(head, in, out, stats, workspace).run();
    ran = true;
  });
  if (need_hidden) zero_ignored(dhidden, target, ignore_index);
  if (!ran) dweight.zero_();
  return {dhidden, dweight, dbias, gram + gram.triu(1).t(), kinds, rows, sketched};
}

TORCH_LIBRARY_IMPL(bvpo, CPU, m) { m.impl("cpu_linear_logprobs_statistics", statistics); }

}  // namespace
}  // namespace bvpo
