// Accesses of 8 elements per thread (16 bytes in half precision, twice 16 in fp32), conversions,
// and reductions over a block in a fixed order.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace bvpo::cuda {

constexpr int kPerThread = 8;
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

template <typename T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  T value[kSize];
};

// out[i] = from[i] for i < count, 0 beyond. With `kVector`, `from` is aligned to 16 bytes.
template <bool kVector, typename T>
__device__ inline void load8(const T* from, int count, float (&out)[kPerThread]) {
  if (kVector && count >= kPerThread) {
#pragma unroll
    for (int i = 0; i < kPerThread; i += Pack<T>::kSize) {
      const Pack<T> pack = *reinterpret_cast<const Pack<T>*>(from + i);
#pragma unroll
      for (int j = 0; j < Pack<T>::kSize; ++j) out[i + j] = widen(pack.value[j]);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) out[i] = i < count ? widen(from[i]) : 0.0f;
}

template <bool kVector, typename T>
__device__ inline void store8(T* to, int count, const float (&in)[kPerThread]) {
  if (kVector && count >= kPerThread) {
#pragma unroll
    for (int i = 0; i < kPerThread; i += Pack<T>::kSize) {
      Pack<T> pack;
#pragma unroll
      for (int j = 0; j < Pack<T>::kSize; ++j) pack.value[j] = narrow<T>(in[i + j]);
      *reinterpret_cast<Pack<T>*>(to + i) = pack;
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    if (i < count) to[i] = narrow<T>(in[i]);
  }
}

__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(~0u, x, offset);
  return x;
}

__device__ inline float warp_max(float x) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, offset));
  }
  return x;
}

// The same value in every thread. Warps meet in their order: the same bits every time. `scratch`
// holds one float per warp, and may be used again at once.
template <bool kMax>
__device__ inline float block_reduce(float x, float* scratch) {
  x = kMax ? warp_max(x) : warp_sum(x);
  const int warps = blockDim.x / kWarp;
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = x;
  __syncthreads();
  float total = scratch[0];
  for (int i = 1; i < warps; ++i) total = kMax ? fmaxf(total, scratch[i]) : total + scratch[i];
  __syncthreads();
  return total;
}

}  // namespace bvpo::cuda
