// total = w_t G_t + w_e G_e (with `add`, added to what it holds) and the three inner products of
// (G_t, G_e), in one read: the CUDA twin of bvpo_kernels/backends/triton/grad_stats.py for two
// tiles. The grid is persistent, but a partial belongs to a tile of fixed size and not to a block,
// so that the result does not depend on the device.
#pragma once

#include <cstdint>

#include "vec.cuh"

namespace bvpo::cuda {

constexpr int kReduceThreads = 512;
constexpr int kPerThread = 8;  // 16 bytes in half precision, twice 16 in fp32
constexpr int64_t kTile = 1 << 16;  // elements per partial, TILE of the Triton kernel

// weights: two numbers, or null for 1. With `kVector` all pointers are aligned to 16 bytes.
template <bool kVector, typename Gradient, typename Weight>
__global__ void __launch_bounds__(kReduceThreads) pair_reduce_kernel(
    const Gradient* g_trace, const Gradient* g_empty, const float* weights, bool add, Weight* total,
    float* partials, int64_t numel, int64_t tiles) {
  __shared__ float scratch[kReduceThreads / kWarp];
  const float weight_trace = weights == nullptr ? 1.0f : weights[0];
  const float weight_empty = weights == nullptr ? 1.0f : weights[1];
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    float trace = 0.0f, empty = 0.0f, cross = 0.0f;
    const int64_t end = min((tile + 1) * kTile, numel);
    int64_t first = tile * kTile + int64_t{threadIdx.x} * kPerThread;
    for (; first < end; first += kReduceThreads * kPerThread) {
      const int left = static_cast<int>(end - first);
      float t[kPerThread], e[kPerThread], sum[kPerThread];
      load<kVector>(g_trace + first, left, t);
      load<kVector>(g_empty + first, left, e);
      load<kVector>(total + first, add ? left : 0, sum);
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) {
        trace += t[i] * t[i];
        empty += e[i] * e[i];
        cross += t[i] * e[i];
        sum[i] += weight_trace * t[i] + weight_empty * e[i];
      }
      store<kVector>(total + first, left, sum);
    }
    trace = block_sum(trace, scratch);
    empty = block_sum(empty, scratch);
    cross = block_sum(cross, scratch);
    if (threadIdx.x == 0) {
      partials[3 * tile] = trace;
      partials[3 * tile + 1] = cross;
      partials[3 * tile + 2] = empty;
    }
  }
}

}  // namespace bvpo::cuda
