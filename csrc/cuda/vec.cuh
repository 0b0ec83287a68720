// Accesses of up to 16 bytes, conversions, and reductions over a block in a fixed order.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace bvpo::cuda {

constexpr int kWarp = 32;

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }

template <typename T>
__device__ T narrow(float x);
template <>
__device__ inline float narrow(float x) { return x; }
template <>
__device__ inline __nv_bfloat16 narrow(float x) { return __float2bfloat16_rn(x); }
template <>
__device__ inline __half narrow(float x) { return __float2half_rn(x); }

// One access: 16 bytes, or N elements where these are fewer.
template <typename T, int N>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Pack {
  static constexpr int kSize = N * sizeof(T) < 16 ? N : 16 / sizeof(T);
  T value[kSize];
};

// out[i] = from[i] for i < count, 0 beyond. With `kVector`, `from` is aligned to 16 bytes, or to all
// of N elements where these are fewer bytes.
template <bool kVector, int N, typename T>
__device__ inline void load(const T* from, int count, float (&out)[N]) {
  if (kVector && count >= N) {
    using Access = Pack<T, N>;
#pragma unroll
    for (int i = 0; i < N; i += Access::kSize) {
      const Access pack = *reinterpret_cast<const Access*>(from + i);
#pragma unroll
      for (int j = 0; j < Access::kSize; ++j) out[i + j] = widen(pack.value[j]);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < N; ++i) out[i] = i < count ? widen(from[i]) : 0.0f;
}

template <bool kVector, int N, typename T>
__device__ inline void store(T* to, int count, const float (&in)[N]) {
  if (kVector && count >= N) {
    using Access = Pack<T, N>;
#pragma unroll
    for (int i = 0; i < N; i += Access::kSize) {
      Access pack;
#pragma unroll
      for (int j = 0; j < Access::kSize; ++j) pack.value[j] = narrow<T>(in[i + j]);
      *reinterpret_cast<Access*>(to + i) = pack;
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (i < count) to[i] = narrow<T>(in[i]);
  }
}

__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
  return x;
}

// The same value in every thread. Warps meet in their order: the same bits every time. `scratch`
// holds one float per warp, and may be used again at once.
__device__ inline float block_sum(float x, float* scratch) {
  x = warp_sum(x);
  const int warps = blockDim.x / kWarp;
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = x;
  __syncthreads();
  float total = scratch[0];
  for (int i = 1; i < warps; ++i) total += scratch[i];
  __syncthreads();
  return total;
}

}  // namespace bvpo::cuda
