// Launcher of pair_reduce. The schema is defined in bvpo_kernels/backends/extensions.py.
#include "pair_reduce.cuh"

#include <optional>

#include "host.cuh"

namespace bvpo::cuda {
namespace {

constexpr int kBlocksPerSm = 2;

template <typename Gradient, typename Weight>
void launch(const Tensor& tiles, const float* weights, bool add, Tensor& total, float* partials,
            int64_t stretches) {
  const auto* g_trace = static_cast<const Gradient*>(tiles.const_data_ptr());
  const Gradient* g_empty = g_trace + total.numel();
  auto* out = static_cast<Weight*>(total.mutable_data_ptr());
  const bool vector = aligned(g_trace) && aligned(g_empty) && aligned(out);
  const auto run = [&](auto kernel) {
    kernel<<<persistent_grid(total, stretches, kBlocksPerSm), kReduceThreads, 0,
             current_stream(total)>>>(g_trace, g_empty, weights, add, out, partials,
                                      total.numel(), stretches);
  };
  if (vector) return run(pair_reduce_kernel<true, Gradient, Weight>);
  run(pair_reduce_kernel<false, Gradient, Weight>);
}

bool is_bf16(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.is_contiguous(), name,
                  ": expected a contiguous CUDA tensor");
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float ||
                      tensor.scalar_type() == ScalarType::BFloat16,
                  name, ": expected fp32 or bf16");
  return tensor.scalar_type() == ScalarType::BFloat16;
}

void pair_reduce(Tensor tiles, std::optional<Tensor> weights, Tensor total, bool add,
                 Tensor partials) {
  const int64_t stretches = (total.numel() + kTile - 1) / kTile;
  STD_TORCH_CHECK(tiles.numel() == 2 * total.numel(), "tiles: expected two of the shape of total");
  STD_TORCH_CHECK(partials.numel() == 3 * stretches, "partials: expected [", stretches, ", 3]");
  const float* scale = weights ? pointer<float>(*weights, ScalarType::Float, "weights") : nullptr;
  float* out = pointer<float>(partials, ScalarType::Float, "partials");
  const bool narrow_tiles = is_bf16(tiles, "tiles"), narrow_total = is_bf16(total, "total");
  if (narrow_tiles && narrow_total) {
    launch<__nv_bfloat16, __nv_bfloat16>(tiles, scale, add, total, out, stretches);
  } else if (narrow_tiles) {
    launch<__nv_bfloat16, float>(tiles, scale, add, total, out, stretches);
  } else if (narrow_total) {
    launch<float, __nv_bfloat16>(tiles, scale, add, total, out, stretches);
  } else {
    launch<float, float>(tiles, scale, add, total, out, stretches);
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bvpo, CUDA, m) {
  m.impl("cuda_pair_reduce", TORCH_BOX(&pair_reduce));
}

}  // namespace bvpo::cuda
