// Passes over one tile of logits, held transposed: Z[v, t], a row a vocabulary column, tokens along
// the lanes. Per-token numbers are then vectors, and no pass needs a horizontal reduction.
#pragma once

#include <cstdint>

namespace bvpo {

// z = softcap tanh((h W^T + b) / softcap) / temperature, for the rows of one tile.
struct Transform {
  const float* bias = nullptr;  // [V] or none
  float softcap = 0.0f;         // 0: none
  float temperature = 1.0f;

  bool identity() const { return bias == nullptr && softcap == 0.0f && temperature == 1.0f; }

  // The softcap's derivative, 1 - tanh^2, where the transform gave z.
  double slope(double z) const {
    if (softcap == 0.0f) return 1.0;
    const double tanh = z * temperature / softcap;
    return 1.0 - tanh * tanh;
  }
};

// A tile: `rows` vocabulary columns from `first_row` on, `tokens` (a multiple of 16) wide.
struct Tile {
  float* z;
  int64_t rows;
  int64_t tokens;
  int64_t stride;
};

// Applies the transform in place. With a softcap, writes the derivative 1 - tanh^2 to `slope`
// (same layout as z) unless it is null.
void transform_rows(Tile tile, Transform transform, int64_t first_row, float* slope);

// The softcap's derivatives of logits that the transform has passed; harmless where z = -inf.
void softcap_slopes(Tile tile, Transform transform, float* slope);

// Running maximum, sum of exp(z - max) and, unless null, sum of exp(z - max) (z - max) per token.
// The target's entry must be -inf: it is kept out of the sums.
void online_sums(Tile tile, float* max, float* sum, float* weighted);

// Where results of a pass go: row-major for use as the left factor, `packed` as the right factor
// (pairs of rows interleaved for two-byte types). Either may be null.
struct Output {
  void* rows = nullptr;  // [rows, rows_stride]
  int64_t rows_stride = 0;
  void* packed = nullptr;  // [ceil(rows / 2), tokens, 2] or [rows, tokens]
};

enum class Store { kFloat, kBFloat16, kHalf };

// p = exp(z - max') (times slope) with the running maximum max' after this tile. Updates the
// sums as `online_sums` does and sets rescale = exp(max - max'), which earlier results need.
// `weighted` must be null unless entropy is wanted.
void online_probabilities(Tile tile, const float* slope, float* max, float* sum, float* weighted,
                          float* rescale, Output out, Store store);

// dz = scale exp(z - max - logsum) (times slope), except that the entries with z = -inf are 0.
// Row sums are added to `row_sums` unless it is null.
void logit_gradients(Tile tile, const float* slope, const float* max, const float* logsum,
                     const float* scale, Output out, Store store, float* row_sums);

// acc[i, t] *= factor[t]; skips groups of lanes whose factors are all one.
void scale_columns(float* acc, int64_t rows, int64_t tokens, int64_t stride, const float* factor);

}  // namespace bvpo
