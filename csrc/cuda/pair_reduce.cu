// Launcher of pair_reduce. The schema is defined in bvpo_kernels/ops.py.
#include "pair_reduce.cuh"

#include "host.cuh"

namespace bvpo::cuda {
namespace {

constexpr int kBlocksPerSm = 2;

template <typename Gradient, typename Weight>
void launch(const Tensor& g_trace, const Tensor& g_empty, const float* weights, Tensor& dweight,
            float* partials, int64_t tiles) {
  pair_reduce_kernel<Gradient, Weight>
      <<<persistent_grid(dweight, tiles, kBlocksPerSm), kReduceThreads, 0,
         current_stream(dweight)>>>(
          static_cast<const Gradient*>(g_trace.const_data_ptr()),
          static_cast<const Gradient*>(g_empty.const_data_ptr()), weights,
          static_cast<Weight*>(dweight.mutable_data_ptr()), partials, dweight.numel(), tiles);
}

void pair_reduce(Tensor g_trace, Tensor g_empty, Tensor weights, Tensor dweight, Tensor partials) {
  const int64_t tiles = (dweight.numel() + kTile - 1) / kTile;
  STD_TORCH_CHECK(partials.numel() == 3 * tiles, "partials: expected [", tiles, ", 3]");
  STD_TORCH_CHECK(g_trace.numel() == dweight.numel() && g_empty.numel() == dweight.numel(),
                  "g_trace, g_empty: expected the shape of dweight");
  STD_TORCH_CHECK(g_trace.scalar_type() == g_empty.scalar_type(),
                  "g_trace, g_empty: expected one dtype");
  for (const Tensor* tensor : {&g_trace, &g_empty, &dweight}) {
    STD_TORCH_CHECK(tensor->is_cuda() && tensor->is_contiguous() &&
                        aligned(tensor->const_data_ptr()),
                    "g_trace, g_empty, dweight: expected contiguous CUDA tensors at 16 bytes");
  }
  const float* scale = pointer<float>(weights, ScalarType::Float, "weights");
  float* out = pointer<float>(partials, ScalarType::Float, "partials");
  const auto is = [](const Tensor& tensor, ScalarType dtype) {
    STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float ||
                        tensor.scalar_type() == ScalarType::BFloat16,
                    "fp32 or bf16 expected");
    return tensor.scalar_type() == dtype;
  };
  const bool wide_gradient = is(g_trace, ScalarType::Float);
  const bool wide_weight = is(dweight, ScalarType::Float);
  if (wide_gradient && wide_weight) {
    launch<float, float>(g_trace, g_empty, scale, dweight, out, tiles);
  } else if (wide_gradient) {
    launch<float, __nv_bfloat16>(g_trace, g_empty, scale, dweight, out, tiles);
  } else if (wide_weight) {
    launch<__nv_bfloat16, float>(g_trace, g_empty, scale, dweight, out, tiles);
  } else {
    launch<__nv_bfloat16, __nv_bfloat16>(g_trace, g_empty, scale, dweight, out, tiles);
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bvpo, CUDA, m) {
  m.impl("cuda_pair_reduce", TORCH_BOX(&pair_reduce));
}

}  // namespace bvpo::cuda
