#include "transpose.h"

#include <utility>

#include "vec.h"

namespace bvpo {

namespace {

template <typename V>
constexpr int kWidth = sizeof(V) / 4;

// Rows a and b, S apart in a square whose blocks of S x S lie in place: exchanges the blocks off the
// diagonal.
template <int S, typename V, int... L>
BVPO_INLINE void exchange(V& a, V& b, std::integer_sequence<int, L...>) {
  constexpr int n = kWidth<V>;
#if defined(__clang__)
  const V first = __builtin_shufflevector(a, b, ((L & S) ? n + L - S : L)...);
  b = __builtin_shufflevector(a, b, ((L & S) ? n + L : L + S)...);
#else  // gcc has that name from 12 on
  typedef int32_t Index __attribute__((vector_size(sizeof(V))));
  const V first = __builtin_shuffle(a, b, Index{((L & S) ? n + L - S : L)...});
  b = __builtin_shuffle(a, b, Index{((L & S) ? n + L : L + S)...});
#endif
  a = first;
}

template <int S, typename V>
BVPO_INLINE void exchange_all(V* rows) {
#pragma GCC unroll 16
  for (int i = 0; i < kWidth<V>; ++i) {
    if (!(i & S)) exchange<S>(rows[i], rows[i + S], std::make_integer_sequence<int, kWidth<V>>());
  }
}

template <typename V>
BVPO_INLINE void transpose_square(V* rows) {
  exchange_all<1>(rows);
  exchange_all<2>(rows);
  exchange_all<4>(rows);
  if constexpr (kWidth<V> == 16) exchange_all<8>(rows);
}

template <typename E>
BVPO_INLINE void transpose_part(const E* in, int64_t i0, int64_t i1, int64_t j0, int64_t j1,
                                int64_t ld_in, E* out, int64_t ld_out) {
  for (int64_t i = i0; i < i1; ++i) {
    for (int64_t j = j0; j < j1; ++j) out[j * ld_out + i] = in[i * ld_in + j];
  }
}

// Squares of vectors; read(in) gives one of their rows, which takes `step` rows of the matrix.
template <typename V, typename E, typename Read>
BVPO_INLINE void transpose_by(const E* in, int64_t rows, int64_t columns, int64_t ld_in, E* out,
                              int64_t ld_out, int64_t step, const Read& read) {
  constexpr int64_t n = kWidth<V>;
  const int64_t high = n * step, full_rows = rows / high * high, full_columns = columns / n * n;
  for (int64_t i = 0; i < full_rows; i += high) {
    for (int64_t j = 0; j < full_columns; j += n) {
      V square[n];
#pragma GCC unroll 16
      for (int64_t k = 0; k < n; ++k) square[k] = read(in + (i + k * step) * ld_in + j);
      transpose_square(square);
#pragma GCC unroll 16
      for (int64_t k = 0; k < n; ++k) std::memcpy(out + (j + k) * ld_out + i, &square[k], sizeof(V));
    }
  }
  transpose_part(in, 0, full_rows, full_columns, columns, ld_in, out, ld_out);
  transpose_part(in, full_rows, rows, 0, columns, ld_in, out, ld_out);
}

template <typename V>
BVPO_INLINE void transpose_words_body(const float* in, int64_t rows, int64_t columns, int64_t ld_in,
                                      float* out, int64_t ld_out) {
  const auto read = [](const float* p) __attribute__((always_inline)) {
    V row;
    std::memcpy(&row, p, sizeof(row));
    return row;
  };
  transpose_by<V>(in, rows, columns, ld_in, out, ld_out, 1, read);
}

// Two rows at a time: a pair of halves, one above the other, is a word whose transposition moves
// both to where they belong.
template <typename V>
BVPO_INLINE void transpose_halves_body(const uint16_t* in, int64_t rows, int64_t columns,
                                       int64_t ld_in, uint16_t* out, int64_t ld_out) {
  typedef decltype(V{} < V{}) Words;
  typedef uint16_t Halves __attribute__((vector_size(sizeof(V) / 2)));
  const auto read = [ld_in](const uint16_t* p) __attribute__((always_inline)) {
    Halves upper, lower;
    std::memcpy(&upper, p, sizeof(upper));
    std::memcpy(&lower, p + ld_in, sizeof(lower));
    return __builtin_convertvector(upper, Words) | (__builtin_convertvector(lower, Words) << 16);
  };
  transpose_by<Words>(in, rows, columns, ld_in, out, ld_out, 2, read);
}

}  // namespace

BVPO_DISPATCH_WIDTHS(transpose_words,
                     (const float* in, int64_t rows, int64_t columns, int64_t ld_in, float* out,
                      int64_t ld_out),
                     (in, rows, columns, ld_in, out, ld_out))
BVPO_DISPATCH_WIDTHS(transpose_halves,
                     (const uint16_t* in, int64_t rows, int64_t columns, int64_t ld_in,
                      uint16_t* out, int64_t ld_out),
                     (in, rows, columns, ld_in, out, ld_out))

}  // namespace bvpo
