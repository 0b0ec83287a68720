// Inner products and sums of group gradients: the passes of gram.h, and the operators on tensors.
#include "gram.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "vec.h"

namespace bvpo {
namespace {

constexpr int64_t kStretch = 2048;
constexpr int64_t kTaskElements = 1 << 15;
constexpr int64_t kTaskRows = 64;

// kColumns: of a block of 4 groups against that many, the sums fit the registers.
template <typename V>
struct Vec;

template <>
struct Vec<v16> {
  typedef v16i Ints;
  typedef v16h Halves;
  static constexpr int64_t kLanes = 16, kColumns = 4;
};

template <>
struct Vec<v8> {
  typedef v8i Ints;
  typedef v8h Halves;
  static constexpr int64_t kLanes = 8, kColumns = 2;
};

template <typename V>
BVPO_INLINE V load_float(const float* p) {
  V x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}

template <typename V>
BVPO_INLINE V load_float(const uint16_t* p) {
  typename Vec<V>::Halves bits;
  std::memcpy(&bits, p, sizeof(bits));
  return (V)(__builtin_convertvector(bits, typename Vec<V>::Ints) << 16);
}

BVPO_INLINE float one_float(float x) { return x; }

BVPO_INLINE float one_float(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float x;
  std::memcpy(&x, &wide, sizeof(x));
  return x;
}

template <typename V>
BVPO_INLINE void store_float(float* p, V x) {
  std::memcpy(p, &x, sizeof(x));
}

// Rounded to nearest even.
template <typename V>
BVPO_INLINE void store_float(uint16_t* p, V x) {
  typedef typename Vec<V>::Ints Ints;
  const Ints bits = (Ints)x;
  const Ints rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const auto narrow = __builtin_convertvector(rounded & 0xffff, typename Vec<V>::Halves);
  std::memcpy(p, &narrow, sizeof(narrow));
}

template <typename V>
BVPO_INLINE double lane_sum(V x) {
  double sum = 0.0;
  for (int64_t i = 0; i < Vec<V>::kLanes; ++i) sum += x[i];
  return sum;
}

// Products of A tiles from `left` on with B tiles from `right` on, over one stretch.
template <typename V, int64_t A, int64_t B, typename E>
BVPO_INLINE void dots(const E* left, const E* right, int64_t stride, int64_t n, double* gram,
                      int64_t ld) {
  V sums[A][B] = {};
  int64_t i = 0;
  for (; i + Vec<V>::kLanes <= n; i += Vec<V>::kLanes) {
    V r[B];
    for (int64_t b = 0; b < B; ++b) r[b] = load_float<V>(right + b * stride + i);
    for (int64_t a = 0; a < A; ++a) {
      const V l = load_float<V>(left + a * stride + i);
      for (int64_t b = 0; b < B; ++b) sums[a][b] += l * r[b];
    }
  }
  for (int64_t a = 0; a < A; ++a) {
    for (int64_t b = 0; b < B; ++b) {
      double sum = lane_sum(sums[a][b]);
      for (int64_t j = i; j < n; ++j) {
        sum += static_cast<double>(one_float(left[a * stride + j])) *
               static_cast<double>(one_float(right[b * stride + j]));
      }
      gram[a * ld + b] += sum;
    }
  }
}

// Rows of a block: four groups, then two, then one; its columns likewise, `most` at most.
BVPO_INLINE int64_t block_size(int64_t left, int64_t most) {
  return left >= most ? most : left >= 2 ? 2 : 1;
}

template <typename V, typename E>
BVPO_INLINE void gram_of(const E* data, GroupTiles tiles, int64_t n, double* gram) {
  constexpr int64_t kColumns = Vec<V>::kColumns;
  const int64_t groups = tiles.groups, stride = tiles.stride;
  for (int64_t start = 0; start < n; start += kStretch) {
    const int64_t count = std::min(kStretch, n - start);
    for (int64_t g = 0, rows; g < groups; g += rows) {
      rows = block_size(groups - g, 4);
      for (int64_t h = g, columns; h < groups; h += columns) {
        columns = block_size(groups - h, std::min(rows, kColumns));
        const E* left = data + g * stride + start;
        const E* right = data + h * stride + start;
        double* out = gram + g * groups + h;
        switch (rows * 10 + columns) {
          case 44: dots<V, 4, kColumns>(left, right, stride, count, out, groups); break;
          case 42: dots<V, 4, 2>(left, right, stride, count, out, groups); break;
          case 41: dots<V, 4, 1>(left, right, stride, count, out, groups); break;
          case 22: dots<V, 2, 2>(left, right, stride, count, out, groups); break;
          case 21: dots<V, 2, 1>(left, right, stride, count, out, groups); break;
          default: dots<V, 1, 1>(left, right, stride, count, out, groups);
        }
      }
    }
  }
}

template <typename V>
BVPO_INLINE void add_gram_body(GroupTiles tiles, int64_t first, int64_t n, double* gram) {
  if (tiles.bf16) {
    gram_of<V>(static_cast<const uint16_t*>(tiles.data) + first, tiles, n, gram);
  } else {
    gram_of<V>(static_cast<const float*>(tiles.data) + first, tiles, n, gram);
  }
}

template <typename V, typename E>
BVPO_INLINE V weighted(const E* data, const float* weights, int64_t group) {
  const V x = load_float<V>(data);
  return weights ? x * weights[group] : x;
}

template <typename V, typename E, typename Out>
BVPO_INLINE void sum_of(const E* data, GroupTiles tiles, int64_t n, Out* total,
                        const float* weights, bool add) {
  constexpr int64_t kLanes = Vec<V>::kLanes;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    V sum = weighted<V>(data + i, weights, 0);
    for (int64_t g = 1; g < tiles.groups; ++g) {
      sum += weighted<V>(data + g * tiles.stride + i, weights, g);
    }
    if (add) sum += load_float<V>(total + i);
    store_float<V>(total + i, sum);
  }
  if (i == n) return;
  // The last lanes, through memory of a whole vector.
  E tail[kLanes] = {};
  Out out[kLanes] = {};
  V sum = {};
  for (int64_t g = 0; g < tiles.groups; ++g) {
    std::memcpy(tail, data + g * tiles.stride + i, (n - i) * sizeof(E));
    sum += weighted<V>(tail, weights, g);
  }
  std::memcpy(out, total + i, (n - i) * sizeof(Out));
  if (add) sum += load_float<V>(out);
  store_float<V>(out, sum);
  std::memcpy(total + i, out, (n - i) * sizeof(Out));
}

template <typename V, typename E>
BVPO_INLINE void sum_into(const E* data, GroupTiles tiles, int64_t n, GroupSum sum) {
  if (sum.bf16) {
    sum_of<V>(data, tiles, n, static_cast<uint16_t*>(sum.total), sum.weights, sum.add);
  } else {
    sum_of<V>(data, tiles, n, static_cast<float*>(sum.total), sum.weights, sum.add);
  }
}

template <typename V>
BVPO_INLINE void sum_groups_body(GroupTiles tiles, int64_t first, int64_t n, GroupSum sum) {
  if (tiles.bf16) sum_into<V>(static_cast<const uint16_t*>(tiles.data) + first, tiles, n, sum);
  else sum_into<V>(static_cast<const float*>(tiles.data) + first, tiles, n, sum);
}

template <typename V, typename E>
BVPO_INLINE void norm_rows(const NormRows& rows, int64_t first, int64_t n, float* weight,
                           float* bias) {
  constexpr int64_t kLanes = Vec<V>::kLanes;
  const int64_t dim = rows.dim, whole = dim / kLanes * kLanes;
  for (int64_t t = first; t < first + n; ++t) {
    const E* x = static_cast<const E*>(rows.x) + t * dim;
    const E* dy = static_cast<const E*>(rows.dy) + t * dim;
    float mean = 0.0f, scale = 0.0f;
    if (weight) {
      V sum = {}, squares = {};
      double tail = 0.0, tail_squares = 0.0;
      if (rows.centered) {
        for (int64_t d = 0; d < whole; d += kLanes) sum += load_float<V>(x + d);
        for (int64_t d = whole; d < dim; ++d) tail += one_float(x[d]);
        mean = static_cast<float>((lane_sum(sum) + tail) / dim);
      }
      for (int64_t d = 0; d < whole; d += kLanes) {
        const V c = load_float<V>(x + d) - mean;
        squares += c * c;
      }
      for (int64_t d = whole; d < dim; ++d) {
        const double c = one_float(x[d]) - mean;
        tail_squares += c * c;
      }
      const double variance = (lane_sum(squares) + tail_squares) / dim;
      scale = static_cast<float>(1.0 / std::sqrt(variance + rows.eps));
    }
    for (int64_t d = 0; d < whole; d += kLanes) {
      const V g = load_float<V>(dy + d);
      if (weight) {
        const V xhat = (load_float<V>(x + d) - mean) * scale;
        store_float<V>(weight + d, load_float<V>(weight + d) + xhat * g);
      }
      if (bias) store_float<V>(bias + d, load_float<V>(bias + d) + g);
    }
    for (int64_t d = whole; d < dim; ++d) {
      const float g = one_float(dy[d]);
      if (weight) weight[d] += (one_float(x[d]) - mean) * scale * g;
      if (bias) bias[d] += g;
    }
  }
}

template <typename V>
BVPO_INLINE void add_norm_rows_body(NormRows rows, int64_t first, int64_t n, float* weight,
                                    float* bias) {
  if (rows.bf16) norm_rows<V, uint16_t>(rows, first, n, weight, bias);
  else norm_rows<V, float>(rows, first, n, weight, bias);
}

}  // namespace

BVPO_DISPATCH_WIDTHS(add_gram, (GroupTiles tiles, int64_t first, int64_t n, double* gram),
                     (tiles, first, n, gram))
BVPO_DISPATCH_WIDTHS(sum_groups, (GroupTiles tiles, int64_t first, int64_t n, GroupSum sum),
                     (tiles, first, n, sum))
BVPO_DISPATCH_WIDTHS(add_norm_rows,
                     (NormRows rows, int64_t first, int64_t n, float* weight, float* bias),
                     (rows, first, n, weight, bias))

namespace {

using at::Tensor;

bool is_bf16(const char* name, const Tensor& tensor) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kBFloat16,
                   name, ": expected fp32 or bf16, got ", tensor.scalar_type());
  return tensor.scalar_type() == at::kBFloat16;
}

// total = or += sum_g w_g A_g for tiles [G, R, D]; returns the Gram matrix [G, G] in fp64. Tasks are
// stretches of a fixed length and their partial sums are added in order, whatever the number of
// threads. The total may be tiles[0]: a stretch is written when its products have been formed.
Tensor pair_reduce(const Tensor& tiles, Tensor& total, const std::optional<Tensor>& weights,
                   bool add) {
  const int64_t groups = tiles.size(0), n = groups ? tiles.numel() / groups : 0;
  TORCH_CHECK_VALUE(tiles.dim() == 3 && groups > 0 && tiles[0].is_contiguous(),
                    "tiles: expected [G, R, D] of contiguous tiles, got ", tiles.sizes());
  TORCH_CHECK_VALUE(total.numel() == n && total.is_contiguous(), "total: expected a contiguous [",
                    tiles.size(1), ", ", tiles.size(2), "], got ", total.sizes());
  const GroupTiles source{tiles.const_data_ptr(), groups, tiles.stride(0), is_bf16("tiles", tiles)};
  TORCH_CHECK_VALUE(!weights || (weights->scalar_type() == at::kFloat &&
                                 weights->numel() == groups && weights->is_contiguous()),
                    "weights: expected [", groups, "] in fp32, got ", weights->sizes(), " ",
                    weights->scalar_type());
  const bool narrow = is_bf16("total", total);
  const float* scale = weights ? weights->const_data_ptr<float>() : nullptr;
  char* out = static_cast<char*>(total.mutable_data_ptr());
  const int64_t tasks = (n + kTaskElements - 1) / kTaskElements;
  std::vector<double> partial(tasks * groups * groups, 0.0);
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      double* gram = &partial[task * groups * groups];
      const int64_t last = std::min((task + 1) * kTaskElements, n);
      for (int64_t i = task * kTaskElements; i < last; i += kStretch) {
        const int64_t count = std::min(kStretch, last - i);
        add_gram(source, i, count, gram);
        sum_groups(source, i, count, {out + i * total.element_size(), narrow, scale, add});
      }
    }
  });
  Tensor gram = at::zeros({groups, groups}, tiles.options().dtype(at::kDouble));
  double* sums = gram.mutable_data_ptr<double>();
  for (int64_t task = 0; task < tasks; ++task) {
    for (int64_t i = 0; i < groups * groups; ++i) sums[i] += partial[task * groups * groups + i];
  }
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t h = 0; h < g; ++h) sums[g * groups + h] = sums[h * groups + g];
  }
  return gram;
}

// Group sums [G, D] for a norm's weight and bias (empty where not wanted), from rows [T, D] and the
// row range of each group, [G, 2]. Tasks of `kTaskRows` rows, added in order in fp64.
std::tuple<Tensor, Tensor> norm_sums(const Tensor& dy, const Tensor& x, const Tensor& ranges,
                                     double eps, bool centered, bool need_weight, bool need_bias) {
  const Tensor g = dy.contiguous(), input = x.contiguous();
  TORCH_CHECK_VALUE(g.dim() == 2 && g.sizes() == input.sizes(), "x: expected the shape of dy, ",
                    g.sizes(), ", got ", input.sizes());
  TORCH_CHECK_TYPE(g.scalar_type() == input.scalar_type(), "x: expected the dtype of dy");
  const int64_t dim = g.size(1), groups = ranges.size(0);
  const NormRows rows{g.const_data_ptr(), input.const_data_ptr(), dim, is_bf16("dy", g),
                      static_cast<float>(eps), centered};
  struct Task {
    int64_t group, first, rows;
  };
  std::vector<Task> tasks;
  const auto bounds = ranges.accessor<int64_t, 2>();
  for (int64_t i = 0; i < groups; ++i) {
    for (int64_t t = bounds[i][0]; t < bounds[i][1]; t += kTaskRows) {
      tasks.push_back({i, t, std::min(kTaskRows, bounds[i][1] - t)});
    }
  }
  const int64_t kinds = need_weight + need_bias, count = static_cast<int64_t>(tasks.size());
  std::vector<float> partial(count * kinds * dim, 0.0f);
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float* out = &partial[i * kinds * dim];
      add_norm_rows(rows, tasks[i].first, tasks[i].rows, need_weight ? out : nullptr,
                    need_bias ? out + (kinds - 1) * dim : nullptr);
    }
  });
  std::vector<double> sums(groups * kinds * dim, 0.0);
  for (int64_t i = 0; i < count; ++i) {
    double* sum = &sums[tasks[i].group * kinds * dim];
    for (int64_t d = 0; d < kinds * dim; ++d) sum[d] += partial[i * kinds * dim + d];
  }
  const auto fp32 = g.options().dtype(at::kFloat);
  const Tensor weight = at::empty({need_weight ? groups : 0, dim}, fp32);
  const Tensor bias = at::empty({need_bias ? groups : 0, dim}, fp32);
  for (int64_t i = 0; i < groups; ++i) {
    const double* sum = &sums[i * kinds * dim];
    float* w = weight.mutable_data_ptr<float>() + (need_weight ? i * dim : 0);
    float* b = bias.mutable_data_ptr<float>() + (need_bias ? i * dim : 0);
    for (int64_t d = 0; need_weight && d < dim; ++d) w[d] = static_cast<float>(sum[d]);
    for (int64_t d = 0; need_bias && d < dim; ++d) {
      b[d] = static_cast<float>(sum[(kinds - 1) * dim + d]);
    }
  }
  return {weight, bias};
}

TORCH_LIBRARY_IMPL(bvpo, CPU, m) {
  m.impl("cpu_pair_reduce", pair_reduce);
  m.impl("cpu_norm_sums", norm_sums);
}

}  // namespace
}  // namespace bvpo
