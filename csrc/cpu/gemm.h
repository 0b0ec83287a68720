// Block products over ATen's brgemm, and the copies that bring operands into the form it wants.
//
// C[m, n] (+)= A[m, k] B[k, n], fp32 C. A is row-major. B of a two-byte type is "VNNI": pairs of
// rows interleaved, [k / 2, n, 2]; B of fp32 is row-major. Where this machine has no dot product for
// a two-byte type (AMX, or AVX512-BF16 for bf16), operands are widened to fp32 as they are copied.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/native/CPUBlas.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <type_traits>
#include <vector>

namespace bvpo {

template <typename T>
constexpr bool kPairs = sizeof(T) == 2;

// Granularity of k: an AMX tile row holds 32 two-byte numbers.
template <typename T>
constexpr int64_t kStepK = kPairs<T> ? 32 : 1;

constexpr int64_t round_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

template <typename T>
void gemm(int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const T* b, int64_t ldb,
          float* c, int64_t ldc, bool accumulate) {
  // fp32 products in stretches of k: one chain of 4096 additions loses more than torch's GEMM does.
  const int64_t stretch = kPairs<T> ? k : 256;
  for (int64_t i = 0; i < k; i += stretch) {
    at::native::cpublas::brgemm(m, n, std::min(stretch, k - i), lda, ldb, ldc, accumulate || i > 0,
                                a + i, b + i * ldb, c, kPairs<T>);
  }
}

// Whether brgemm takes VNNI operands: it refuses them where oneDNN has no kernel, be it for want of
// the instructions or because oneDNN is held to an older set of them. ATen offers only the attempt.
inline bool takes_vnni() {
  constexpr int64_t n = 32;
  const std::vector<c10::BFloat16> zeros(n * n);
  std::vector<float> c(n * n);
  try {
    at::native::cpublas::brgemm(n, n, n, n, n, n, false, zeros.data(), zeros.data(), c.data(), true);
    at::native::cpublas::brgemm_release(true);
  } catch (const std::exception&) {
    return false;
  }
  return true;
}

template <typename T, typename In>
T cast_to(In x) {
  if constexpr (std::is_same_v<T, In>) return x;
  else return static_cast<T>(static_cast<float>(x));
}

// A matrix as the caller holds it: any strides, rows optionally selected by an index.
template <typename In>
struct Source {
  const In* data;
  int64_t row_stride;
  int64_t column_stride;
  const int64_t* index = nullptr;

  const In* row(int64_t i) const { return data + (index ? index[i] : i) * row_stride; }
};

// out[i, j] = source[i, j], zeros beyond `rows` x `columns` up to `padded_rows` x `ld`.
template <typename T, typename In>
void copy_rows(const Source<In>& source, int64_t first, int64_t rows, int64_t columns, T* out,
               int64_t padded_rows, int64_t ld) {
  for (int64_t i = 0; i < padded_rows; ++i, out += ld) {
    int64_t j = 0;
    if (i < rows) {
      const In* in = source.row(first + i);
      for (; j < columns; ++j) out[j] = cast_to<T>(in[j * source.column_stride]);
    }
    for (; j < ld; ++j) out[j] = T(0.0f);
  }
}

// Right factor from the transpose: B[k = column, n = row], for H^T of the logits. Blocks of 16 x 16
// pairs keep both sides of the transposition in L1.
template <typename T, typename In>
void pack_transposed(const Source<In>& source, int64_t first, int64_t rows, int64_t columns, T* out,
                     int64_t padded_columns, int64_t n) {
  constexpr int64_t f = kPairs<T> ? 2 : 1;
  constexpr int64_t block = 16;
  for (int64_t k0 = 0; k0 < padded_columns; k0 += block * f) {
    for (int64_t i0 = 0; i0 < n; i0 += block) {
      for (int64_t i = i0; i < i0 + block && i < n; ++i) {
        const In* in = i < rows ? source.row(first + i) : nullptr;
        for (int64_t k = k0; k < k0 + block * f && k < padded_columns; ++k) {
          const bool inside = in && k < columns;
          out[(k / f * n + i) * f + k % f] =
              inside ? cast_to<T>(in[k * source.column_stride]) : T(0.0f);
        }
      }
    }
  }
}

// Right factor as it stands: B[k = row, n = column], for H of dW = dZ^T H.
template <typename T, typename In>
void pack_rows(const Source<In>& source, int64_t first, int64_t rows, int64_t columns, T* out,
               int64_t padded_rows, int64_t n) {
  constexpr int64_t f = kPairs<T> ? 2 : 1;
  for (int64_t k = 0; k < padded_rows; ++k) {
    const In* in = k < rows ? source.row(first + k) : nullptr;
    T* row = out + k / f * n * f + k % f;
    for (int64_t j = 0; j < n; ++j) {
      row[j * f] = in && j < columns ? cast_to<T>(in[j * source.column_stride]) : T(0.0f);
    }
  }
}

}  // namespace bvpo
