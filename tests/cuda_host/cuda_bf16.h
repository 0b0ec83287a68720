// Stands in for CUDA's headers so that the host compiler can build csrc/cuda's kernels for tests:
// one std::thread per CUDA thread, one block at a time. Slow, and exact about barriers.
#pragma once

#include <algorithm>
#include <barrier>
#include <bit>
#include <cmath>
#include <cstdint>
#include <thread>
#include <vector>

#define __device__
#define __global__
#define __launch_bounds__(...)
#define __shared__ static  // one block runs at a time, so its threads share what is static

struct Index {
  unsigned x;
};
inline thread_local Index threadIdx;
inline Index blockIdx, blockDim, gridDim;
inline std::barrier<>* block_barrier;
inline float lane_values[1024];

inline void __syncthreads() { block_barrier->arrive_and_wait(); }

// Every thread of the block must call it, as block_sum does.
inline float __shfl_xor_sync(unsigned, float x, int offset) {
  lane_values[threadIdx.x] = x;
  __syncthreads();
  const float other = lane_values[threadIdx.x ^ static_cast<unsigned>(offset)];
  __syncthreads();
  return other;
}

inline float __expf(float x) { return std::exp(x); }
using std::min;

struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 x) {
  return std::bit_cast<float>(uint32_t{x.bits} << 16);
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return {static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)};
}

template <typename Kernel>
void launch(unsigned grid, unsigned threads, const Kernel& kernel) {
  gridDim.x = grid;
  blockDim.x = threads;
  for (unsigned block = 0; block < grid; ++block) {
    blockIdx.x = block;
    std::barrier barrier(threads);
    block_barrier = &barrier;
    std::vector<std::thread> running;
    for (unsigned thread = 0; thread < threads; ++thread) {
      running.emplace_back([&kernel, thread] {
        threadIdx.x = thread;
        kernel();
        // Threads of a block leave together: one that is still at a barrier would wait for ever.
        block_barrier->arrive_and_drop();
      });
    }
    for (std::thread& one : running) one.join();
  }
}
