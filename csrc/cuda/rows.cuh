// Row passes over a tile of logits [rows, columns] in fp32, the products h W^T: the CUDA twins of
// bvpo_kernels/kernels/logprobs.py, whose comments hold here. One block walks a row at a time; the
// grid is persistent.
#pragma once

#include <cstdint>

#include "vec.cuh"

namespace bvpo::cuda {

constexpr int kRowThreads = 256;
// Per multiprocessor. On an H200 the best of 2, 3, 4, 6 and 8 forward, with and without p; 4 is 3 %
// better backward.
constexpr int kRowBlocksPerSm = 6;
// A thread takes two accesses of 16 bytes per step, each beside its neighbours': were they beside each
// other, every access of a warp would use half of each 32-byte sector, and stores to the row drop the
// other half from L1 before it is read (1.5 instead of 4 TB/s on an H200).
constexpr int kAccess = 4;
constexpr int kAccesses = 2;
constexpr int kStride = kRowThreads * kAccess;
constexpr int kStep = kAccesses * kStride;
// Stands for -inf where -inf - -inf would be NaN.
constexpr float kLowest = -3.0e38f;
enum StateRow { kMax, kSum, kWeighted, kTargetZ, kTargetSlope, kRescale };

struct Transform {
  const float* bias;  // [V] or null
  float softcap;      // 0: none
  float inv_temperature;

  __device__ float logit(float z, int column, float* slope) const {
    if (bias != nullptr) z += bias[column];
    *slope = 1.0f;
    if (softcap != 0.0f) {
      const float tanh = tanhf(z / softcap);
      *slope = (1.0f - tanh) * (1.0f + tanh);
      z = softcap * tanh;
    }
    return z * inv_temperature;
  }
};

struct Tile {
  const float* z;
  int64_t stride;
  int rows;
  int columns;
  int column_start;
  int row_start;

  // The target's column inside the tile, -1 where it lies elsewhere.
  __device__ int local(int64_t target) const {
    const int64_t column = target - column_start;
    return column >= 0 && column < columns ? static_cast<int>(column) : -1;
  }
};

struct Softmax {
  float max = kLowest;
  float sum = 0.0f;
  float weighted = 0.0f;

  // One exp per logit: it rescales either what was summed or what comes in.
  template <bool kEntropy>
  __device__ void add(float z) {
    const float distance = -fabsf(z - max);
    const float e = __expf(distance);
    if (z > max) {
      if (kEntropy) weighted = e * (weighted + distance * sum);
      sum = sum * e + 1.0f;
      max = z;
    } else {
      if (kEntropy) weighted += e == 0.0f ? 0.0f : e * distance;  // a masked logit is -inf
      sum += e;
    }
  }
};

// Merge a tile's statistics into the row's state; returns the new maximum. One thread writes.
template <bool kEntropy>
__device__ float fold(const Softmax& tile, float* state, int64_t stride) {
  const float old_max = fmaxf(state[kMax * stride], kLowest), old_sum = state[kSum * stride];
  const float old_weighted = state[kWeighted * stride];
  const float max = fmaxf(old_max, tile.max);
  const float keep = __expf(old_max - max), scale = __expf(tile.max - max);
  const float sum = old_sum * keep + tile.sum * scale;
  __syncthreads();  // every thread has read the old state
  if (threadIdx.x == 0) {
    state[kMax * stride] = sum > 0.0f ? max : -INFINITY;
    state[kSum * stride] = sum;
    state[kRescale * stride] = keep;
    if (kEntropy) {
      state[kWeighted * stride] = keep * (old_weighted + (old_max - max) * old_sum) +
                                  scale * (tile.weighted + (tile.max - max) * tile.sum);
    }
  }
  return max;
}

// A thread's part of the step that starts at its column `first`; 0 from column `end` on.
template <bool kVector>
__device__ inline void load_step(const float* z, int first, int end,
                                 float (&value)[kAccesses][kAccess]) {
#pragma unroll
  for (int a = 0; a < kAccesses; ++a) {
    const int start = first + a * kStride;
    load<kVector>(z + start, end - start, value[a]);
  }
}

// out[i] = value_of(z[i], column i) over a row, which may lie over z with the same start and elements
// of at most its size. Step s of the output then covers what step s / 2 of z held (of equal size: what
// the same thread read), so it waits until all threads have read that far. They read one step ahead,
// and a barrier lets them write twice as far: a row takes log2(steps) barriers, and loads in flight
// while exponentials are formed.
template <typename Out, bool kVector, typename ValueOf>
__device__ void rewrite_row(const float* z, Out* out, int columns, bool read,
                            const ValueOf& value_of) {
  int first = static_cast<int>(threadIdx.x) * kAccess, writable = 0;
  float next[kAccesses][kAccess];
  load_step<kVector>(z, first, read ? columns : 0, next);
  for (int step = 0; step * kStep < columns; ++step, first += kStep) {
    float value[kAccesses][kAccess];
#pragma unroll
    for (int i = 0; i < kStep / kRowThreads; ++i) {
      value[i / kAccess][i % kAccess] = next[i / kAccess][i % kAccess];
    }
    load_step<kVector>(z, first + kStep, read ? columns : 0, next);
    if (sizeof(Out) < sizeof(float) && step >= writable) {
      __syncthreads();
      writable = 2 * (step + 2);
    }
#pragma unroll
    for (int a = 0; a < kAccesses; ++a) {
      const int start = first + a * kStride;
#pragma unroll
      for (int i = 0; i < kAccess; ++i) {
        const bool inside = read && start + i < columns;
        value[a][i] = inside ? value_of(value[a][i], start + i) : 0.0f;
      }
      store<kVector>(out + start, columns - start, value[a]);
    }
  }
}

template <typename Out, bool kEntropy, bool kVector>
__global__ void __launch_bounds__(kRowThreads, kRowBlocksPerSm) forward_kernel(
    Tile tile, Out* p, int64_t p_stride, Transform transform, const int64_t* targets,
    const int32_t* count, float* state, int64_t state_stride) {
  __shared__ float scratch[kRowThreads / kWarp];
  for (int64_t row = blockIdx.x; row < tile.rows; row += gridDim.x) {
    const bool scored = tile.row_start + row < *count;
    const float* z = tile.z + row * tile.stride;
    const int target = scored ? tile.local(targets[row]) : -1;
    float max = 0.0f;
    if (scored) {
      Softmax lane;
      for (int first = threadIdx.x * kAccess; first < tile.columns; first += kStep) {
        float value[kAccesses][kAccess], slope;
        load_step<kVector>(z, first, tile.columns, value);
#pragma unroll
        for (int i = 0; i < kStep / kRowThreads; ++i) {
          const int column = first + i / kAccess * kStride + i % kAccess;
          if (column >= tile.columns || column == target) continue;
          const float product = value[i / kAccess][i % kAccess];
          lane.add<kEntropy>(transform.logit(product, tile.column_start + column, &slope));
        }
      }
      Softmax block;
      block.max = block_reduce<true>(lane.max, scratch);
      const float distance = lane.max - block.max, scale = __expf(distance);
      block.sum = block_reduce<false>(lane.sum * scale, scratch);
      if (kEntropy) {
        const float moved = scale * (lane.weighted + distance * lane.sum);
        block.weighted = block_reduce<false>(moved, scratch);
      }
      max = fold<kEntropy>(block, state + row, state_stride);
      if (threadIdx.x == 0 && target >= 0) {
        float slope;
        const float logit = transform.logit(z[target], tile.column_start + target, &slope);
        state[kTargetZ * state_stride + row] = logit;
        state[kTargetSlope * state_stride + row] = slope;
      }
      __syncthreads();  // z[target] is read before p may overwrite it
    }
    if (p != nullptr) {
      const auto p_of = [&](float product, int column) {
        float slope;
        const float logit = transform.logit(product, tile.column_start + column, &slope);
        return column == target ? 0.0f : __expf(logit - max) * slope;
      };
      rewrite_row<Out, kVector>(z, p + row * p_stride, tile.columns, scored, p_of);
    }
  }
}

template <typename Out, bool kVector>
__global__ void __launch_bounds__(kRowThreads, kRowBlocksPerSm) backward_kernel(
    Tile tile, Out* dz, int64_t dz_stride, Transform transform, const int64_t* targets,
    const int32_t* count, const float* upstream, const float* coefficient, const float* max,
    const float* logsum) {
  for (int64_t row = blockIdx.x; row < tile.rows; row += gridDim.x) {
    const bool used = tile.row_start + row < *count && upstream[row] != 0.0f;
    const int target = used ? tile.local(targets[row]) : -1;
    const float row_max = used ? max[row] : 0.0f, row_logsum = used ? logsum[row] : 0.0f;
    const float scale = used ? -upstream[row] : 0.0f, at_target = used ? coefficient[row] : 0.0f;
    const float* z = tile.z + row * tile.stride;
    const auto dz_of = [&](float product, int column) {
      float slope;
      const float logit = transform.logit(product, tile.column_start + column, &slope);
      // The maximum first: an offset common to all logits must not eat the fraction.
      const float p = __expf((logit - row_max) - row_logsum);
      return (column == target ? at_target : scale * p) * slope;
    };
    rewrite_row<Out, kVector>(z, dz + row * dz_stride, tile.columns, used, dz_of);
  }
}

}  // namespace bvpo::cuda
