// Transposition of in-core matrices, by registers.
#pragma once

#include <cstdint>

namespace bvpo {

// out[j, i] = in[i, j] of four-byte and of two-byte numbers.
void transpose_words(const float* in, int64_t rows, int64_t columns, int64_t ld_in, float* out,
                     int64_t ld_out);
void transpose_halves(const uint16_t* in, int64_t rows, int64_t columns, int64_t ld_in,
                      uint16_t* out, int64_t ld_out);

template <typename T>
void transpose(const T* in, int64_t rows, int64_t columns, int64_t ld_in, T* out, int64_t ld_out) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 2);
  if constexpr (sizeof(T) == 4) {
    transpose_words(in, rows, columns, ld_in, out, ld_out);
  } else {
    transpose_halves(reinterpret_cast<const uint16_t*>(in), rows, columns, ld_in,
                     reinterpret_cast<uint16_t*>(out), ld_out);
  }
}

}  // namespace bvpo
