// The linear head of one call: operands, block sizes, and the one thing that every schedule does,
// forming a transposed tile of logits with the targets taken out.
#pragma once

#include <ATen/Parallel.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "gemm.h"
#include "rows.h"
#include "transpose.h"

namespace bvpo {

// Vocabulary columns of a logits tile. With 256 tokens the fp32 tile takes 256 KiB, beside it in a
// 2 MiB L2 the weight tile and one block of tokens (458 KiB each at D = 896, bf16).
constexpr int64_t kTileRows = 256;

constexpr int64_t kMostBlockTokens = 256;

// Tokens of one pass over the vocabulary, where the workspace admits them. Widening or transposing
// an element of the weight for a pass is one copy beside 2 x 4096 FLOPs: more would only hold memory.
constexpr int64_t kPassTokens = 4096;

// Uninitialised memory, aligned for AMX loads. Large buffers are mapped, so that they leave the
// process when they are freed: glibc keeps up to 64 MiB of freed heap, which a second sweep whose
// buffers have other sizes would add to its own.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t size = 0)
      : data_(nullptr, Free{round_up(size * static_cast<int64_t>(sizeof(T)), 64)}) {
    if (size > 0) data_.reset(allocate(data_.get_deleter().bytes));
  }
  T* get() const { return data_.get(); }
  T& operator[](int64_t i) const { return data_.get()[i]; }

 private:
  static constexpr int64_t kMappedBytes = int64_t{4} << 20;
  struct Free {
    int64_t bytes;
    void operator()(T* p) const {
      if (bytes < kMappedBytes) std::free(p);
      else munmap(p, bytes);
    }
  };
  static T* allocate(int64_t bytes) {
    void* p = nullptr;
    if (bytes < kMappedBytes) {
      p = std::aligned_alloc(64, bytes);
    } else {
      p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (p == MAP_FAILED) p = nullptr;
      // Pages of 4 KiB would cost more to fault in, once per call, than to fill with logits.
      else madvise(p, bytes, MADV_HUGEPAGE);
    }
    if (!p) throw std::bad_alloc();
    return static_cast<T*>(p);
  }
  std::unique_ptr<T, Free> data_;
};

// What a call computes on, `index` being the scored rows of hidden. T is the type of the products
// (bf16, fp16 where brgemm serves them, else float), In the type of the caller's tensors.
template <typename T, typename In>
struct Head {
  Source<In> hidden;
  Source<In> weight;
  int64_t vocab;
  int64_t dim;
  Transform transform;
  const int64_t* index;   // [num_tokens], rows of the caller's tensors
  const int64_t* target;  // by row of the caller's tensors
  int64_t num_tokens;
  int64_t most_block = kMostBlockTokens;

  int64_t padded_dim() const { return round_up(dim, kStepK<T>); }

  // Tokens of a block, from the problem alone: results must not depend on the number of threads.
  int64_t block_tokens() const {
    return std::clamp<int64_t>(round_up((num_tokens + 7) / 8, 32), 32, most_block);
  }

  // Tokens of a pass over the vocabulary that keeps so many bytes for each: within the workspace,
  // no more than pay, but some blocks for every thread; about equal passes.
  int64_t pass_tokens(int64_t bytes_per_token, int64_t workspace) const {
    const int64_t block = block_tokens();
    const int64_t enough = std::max(kPassTokens, 4 * block * at::get_num_threads());
    const int64_t most = std::max(block, std::min(enough, workspace / bytes_per_token) / block * block);
    const int64_t passes = (num_tokens + most - 1) / most;
    return round_up((num_tokens + passes - 1) / passes, block);
  }

  // The weight's rows can serve as the left factor where they lie.
  bool weight_in_place() const {
    return std::is_same_v<T, In> && weight.column_stride == 1 && dim % kStepK<T> == 0;
  }
};

// A left factor: rows of the weight, in place or copied.
template <typename T>
struct WeightTile {
  const T* data;
  int64_t ld;
};

template <typename T, typename In>
WeightTile<T> weight_tile(const Head<T, In>& head, int64_t first, int64_t rows, T* scratch) {
  if constexpr (std::is_same_v<T, In>) {
    if (head.weight_in_place()) return {head.weight.row(first), head.weight.row_stride};
  }
  const int64_t ld = head.padded_dim();
  copy_rows(head.weight, first, rows, head.dim, scratch, rows, ld);
  return {scratch, ld};
}

// Tokens [first, first + count) packed as right factors, block by block.
template <typename T>
struct PackedTokens {
  int64_t first;
  int64_t count;
  int64_t block;
  int64_t stride;  // elements of a packed block
  Buffer<T> data;

  int64_t num_blocks() const { return (count + block - 1) / block; }
  int64_t padded() const { return num_blocks() * block; }
  const T* at(int64_t b) const { return data.get() + b * stride; }
};

template <typename T, typename In>
PackedTokens<T> pack_tokens(const Head<T, In>& head, int64_t first, int64_t count) {
  const int64_t block = head.block_tokens(), stride = head.padded_dim() * block;
  const int64_t blocks = (count + block - 1) / block;
  PackedTokens<T> tokens{first, count, block, stride, Buffer<T>(blocks * stride)};
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t rows = std::min(block, count - b * block);
      pack_transposed(head.hidden, first + b * block, rows, head.dim,
                      tokens.data.get() + b * stride, head.padded_dim(), block);
    }
  });
  return tokens;
}

// Where the targets' own entries go when they are taken out of a tile, by scored token.
struct TargetEntries {
  float* z = nullptr;
  float* slope = nullptr;
};

// Z[v, t] for `rows` columns of the vocabulary from `first_row` on and one block of tokens.
// The entry of a token's target is recorded and replaced by -inf. `slope` may be null.
template <typename T, typename In>
void logits_tile(const Head<T, In>& head, const PackedTokens<T>& tokens, int64_t b,
                 WeightTile<T> weight, int64_t first_row, int64_t rows, float* z, float* slope,
                 TargetEntries entries) {
  const int64_t n = tokens.block;
  gemm(rows, n, head.padded_dim(), weight.data, weight.ld, tokens.at(b), n, z, n, false);
  if (!head.transform.identity()) {
    transform_rows({z, rows, n, n}, head.transform, first_row, slope);
  }
  const int64_t count = std::min(n, tokens.count - b * n);
  for (int64_t t = 0; t < count; ++t) {
    const int64_t token = tokens.first + b * n + t;
    const int64_t v = head.target[head.index[token]] - first_row;
    if (v < 0 || v >= rows) continue;
    float& entry = z[v * n + t];
    if (entries.z) entries.z[token] = entry;
    if (entries.slope) entries.slope[token] = slope ? slope[v * n + t] : 1.0f;
    entry = -std::numeric_limits<float>::infinity();
  }
}

// The tile as left factor of dH^T = W^T dZ^T: [dim, padded], zeros beyond `rows`.
template <typename T>
void transpose_weight(WeightTile<T> weight, int64_t rows, int64_t dim, T* out, int64_t padded) {
  at::parallel_for(0, dim, 64, [&](int64_t begin, int64_t end) {
    transpose(weight.data + begin, rows, end - begin, weight.ld, out + begin * padded, padded);
    for (int64_t d = begin; d < end; ++d) std::fill(out + d * padded + rows, out + (d + 1) * padded, T(0.0f));
  });
}

template <typename T>
constexpr Store store_as() {
  if (std::is_same_v<T, c10::BFloat16>) return Store::kBFloat16;
  return std::is_same_v<T, c10::Half> ? Store::kHalf : Store::kFloat;
}

// One scratch area per thread, allocated once per call.
template <typename T>
std::vector<Buffer<T>> per_thread(int64_t size) {
  std::vector<Buffer<T>> buffers;
  for (int i = 0; i < at::get_num_threads(); ++i) buffers.emplace_back(size);
  return buffers;
}

// fn(i) for i in [0, n), one thread each; brgemm's tile registers are released afterwards.
template <typename F>
void for_each_task(int64_t n, bool pairs, const F& fn) {
  at::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) fn(i);
    at::native::cpublas::brgemm_release(pairs);
  });
}

}  // namespace bvpo
