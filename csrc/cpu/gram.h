// Passes over the gradients of several groups of tokens, held tile beside tile.
#pragma once

#include <cstdint>

namespace bvpo {

// Element i of group g is at data + g * stride + i; fp32, or bf16 as bit patterns.
struct GroupTiles {
  const void* data;
  int64_t groups;
  int64_t stride;
  bool bf16;
};

// gram[g, h] += sum_i A_g[i] A_h[i] over n elements from `first` on, for g <= h; gram is [G, G].
// Of 2048 products the sums are fp32, lane by lane; beyond that fp64.
void add_gram(GroupTiles tiles, int64_t first, int64_t n, double* gram);

// Where a sum goes, fp32 or bf16, and how it is formed: weights of the groups (null: 1 for each), and
// whether it is added to what is there.
struct GroupSum {
  void* total;
  bool bf16;
  const float* weights;
  bool add;
};

// total[i] = or += sum_g w_g A_g[first + i], added in fp32 in the order of the groups. The total may
// be those elements of A_0.
void sum_groups(GroupTiles tiles, int64_t first, int64_t n, GroupSum sum);

// Rows of a norm's input x and of the gradient dy of its output: fp32, or bf16 as bit patterns.
struct NormRows {
  const void* dy;
  const void* x;
  int64_t dim;
  bool bf16;
  float eps;
  bool centered;  // LayerNorm: the mean is subtracted first
};

// weight[d] += sum_t dy[t, d] xhat[t, d] and bias[d] += sum_t dy[t, d] over n rows from `first` on,
// xhat = x / sqrt(mean x^2 + eps). Either may be null; fp32.
void add_norm_rows(NormRows rows, int64_t first, int64_t n, float* weight, float* bias);

}  // namespace bvpo
