// What the launchers share: checks, the current stream, and the size of a persistent grid.
// LibTorch stable ABI only, so that one binary serves torch 2.11 and later.
#pragma once

#define TORCH_TARGET_VERSION (((0ULL + 2) << 56) | ((0ULL + 11) << 48))
#ifndef USE_CUDA
#define USE_CUDA  // the stream of the C shim is behind it
#endif

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>

namespace bvpo::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline cudaStream_t current_stream(const Tensor& on) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(on.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// Blocks that fill the device, and no more than there is work.
inline int persistent_grid(const Tensor& on, int64_t work, int blocks_per_sm) {
  int sms = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount,
                                        on.get_device_index()));
  return static_cast<int>(std::min<int64_t>(work, int64_t{sms} * blocks_per_sm));
}

inline bool aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

template <typename T>
T* pointer(const Tensor& tensor, ScalarType dtype, const char* name) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.scalar_type() == dtype, name,
                  ": unexpected device or dtype");
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// A matrix whose rows are contiguous. 16-byte accesses need every row to start at 16 bytes.
template <typename T>
bool vector_rows(const Tensor& tensor) {
  return aligned(tensor.mutable_data_ptr()) && tensor.stride(0) * int64_t{sizeof(T)} % 16 == 0;
}

}  // namespace bvpo::cuda
