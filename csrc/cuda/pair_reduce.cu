// dW += w_t G_t + w_e G_e and the three inner products of (G_t, G_e), in one read: the CUDA twin of
// bvpo_kernels/kernels/grad_stats.py. The grid is persistent, but a partial belongs to a tile of
// fixed size and not to a block, so that the result does not depend on the device.
#include "host.cuh"
#include "vec.cuh"

namespace bvpo::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kBlocksPerSm = 2;
constexpr int64_t kTile = 1 << 16;  // elements per partial, TILE of the Triton kernel

template <typename Gradient, typename Weight>
__global__ void __launch_bounds__(kThreads) pair_reduce_kernel(
    const Gradient* g_trace, const Gradient* g_empty, const float* weights, Weight* dweight,
    float* partials, int64_t numel, int64_t tiles) {
  __shared__ float scratch[kThreads / kWarp];
  const float weight_trace = weights[0], weight_empty = weights[1];
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    float trace = 0.0f, empty = 0.0f, cross = 0.0f;
    const int64_t end = min((tile + 1) * kTile, numel);
    int64_t first = tile * kTile + int64_t{threadIdx.x} * kPerThread;
    for (; first < end; first += kThreads * kPerThread) {
      const int left = static_cast<int>(end - first);
      float t[kPerThread], e[kPerThread], w[kPerThread];
      load8<true>(g_trace + first, left, t);
      load8<true>(g_empty + first, left, e);
      load8<true>(dweight + first, left, w);
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) {
        trace += t[i] * t[i];
        empty += e[i] * e[i];
        cross += t[i] * e[i];
        w[i] += weight_trace * t[i] + weight_empty * e[i];
      }
      store8<true>(dweight + first, left, w);
    }
    trace = block_reduce<false>(trace, scratch);
    empty = block_reduce<false>(empty, scratch);
    cross = block_reduce<false>(cross, scratch);
    if (threadIdx.x == 0) {
      partials[3 * tile] = trace;
      partials[3 * tile + 1] = empty;
      partials[3 * tile + 2] = cross;
    }
  }
}

template <typename Gradient, typename Weight>
void launch(const Tensor& g_trace, const Tensor& g_empty, const float* weights, Tensor& dweight,
            float* partials, int64_t tiles) {
  pair_reduce_kernel<Gradient, Weight>
      <<<persistent_grid(dweight, tiles, kBlocksPerSm), kThreads, 0, current_stream(dweight)>>>(
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
    STD_TORCH_CHECK(tensor->is_cuda() && tensor->is_contiguous() && aligned(tensor->const_data_ptr()),
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
