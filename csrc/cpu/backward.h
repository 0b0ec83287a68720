// Schedule "trained, exact": each tile of logits is recomputed once and gives dH and dW.
#pragma once

#include <cmath>
#include <functional>
#include <numeric>

#include "head.h"

namespace bvpo {

// Upstream gradient and what the forward kept, by row of the caller's tensors.
struct BackwardIn {
  const float* dlogprobs;
  const float* logprobs;
  const float* max;
  const float* logsum;
};

// Gradients; null where not wanted.
struct BackwardOut {
  void* dhidden;  // `gradient_rows`: only rows of the tokens of the call have their final values
  int64_t dhidden_stride;
  void* dweight;  // [V, D], contiguous
  float* dbias;   // [V]
};

// fp32 rows of dW for a panel, `width` apart: D numbers, and padding up to `width`.
struct WeightRows {
  float* data;
  int64_t width;

  float* at(int64_t v) const { return data + v * width; }
};

// Adds what tokens outside of this call contribute to row v of dW (in fp32, before it is rounded;
// null where dW is not wanted) and returns their contribution to the bias.
using RowAdder = std::function<float(int64_t v, float* row)>;

// Per-token vectors in the order of the scored tokens, padded with harmless values.
struct TokenVectors {
  Buffer<float> max, logsum, scale, own, slope;

  template <typename T, typename In>
  TokenVectors(const Head<T, In>& head, const BackwardIn& in)
      : max(size(head)), logsum(size(head)), scale(size(head)), own(size(head)), slope(size(head)) {
    set(head, in, 0, size(head));
  }

  template <typename T, typename In>
  void set(const Head<T, In>& head, const BackwardIn& in, int64_t first, int64_t end) {
    const float inverse = 1.0f / head.transform.temperature;
    for (int64_t t = first; t < end; ++t) {
      const bool real = t < head.num_tokens;
      const int64_t row = real ? head.index[t] : 0;
      const float upstream = real ? in.dlogprobs[row] * inverse : 0.0f;
      max[t] = real ? in.max[row] : 0.0f;
      logsum[t] = real ? in.logsum[row] : 0.0f;
      scale[t] = -upstream;
      // The target's own gradient, dlogp (1 - p_y), kept out of the tile and added in fp32.
      own[t] = real ? -std::expm1(in.logprobs[row]) * upstream : 0.0f;
      slope[t] = 1.0f;
    }
  }

  template <typename H>
  static int64_t size(const H& head) {
    return round_up(head.num_tokens, head.block_tokens());
  }
};

template <typename T, typename In>
class Backward {
  template <typename, typename>
  friend class GroupedBackward;
  template <typename, typename>
  friend class PairGradients;

 public:
  Backward(const Head<T, In>& head, const BackwardIn& in, const BackwardOut& out, int64_t workspace,
           const RowAdder& others = {})
      : head_(head), out_(out), workspace_(workspace), others_(others), vectors_(head, in),
        order_(head.num_tokens) {
    std::iota(order_.begin(), order_.end(), 0);
    std::stable_sort(order_.begin(), order_.end(),
                     [&](int64_t a, int64_t b) { return target(a) < target(b); });
  }

  // Both gradients in one sweep (8 TVD with the forward) where the sums of dH fit half of the
  // workspace, or can grow in their output; else dH in a sweep of its own (10 TVD).
  void run() {
    const bool hidden = out_.dhidden, weight = out_.dweight || out_.dbias;
    const int64_t all = head_.num_tokens, block = head_.block_tokens();
    const int64_t sums = hidden && !kSumInPlace ? round_up(all, block) * dim() * 4 : 0;
    const bool together = weight && sums <= workspace_ / 2;
    if (hidden && !together) {
      const int64_t per_token = dim() * static_cast<int64_t>(sizeof(T) + sizeof(float));
      const int64_t chunk = head_.pass_tokens(per_token, workspace_);
      for (int64_t t = 0; t < all; t += chunk) {
        const int64_t count = std::min(chunk, all - t);
        sweep(t, count, count, true, false);
      }
    }
    if (!weight) return;
    const int64_t left = workspace_ - (together ? sums : 0);
    int64_t chunk = all;
    if (round_up(all, block) * bytes_per_token() > left) {
      // Tokens will be packed again for every panel: wide panels pay for that. A panel takes up to
      // half of the memory, for W^T and dW.
      const int64_t rows = left / 4 / (dim() * 4) / kTileRows * kTileRows;
      panel_ = std::clamp(rows, kPanel, kWidePanel);
      chunk = std::max(block, left / 2 / bytes_per_token() / block * block);
    }
    sweep(0, all, chunk, hidden && together, true);
  }

 private:
  static constexpr int64_t kPanel = 4 * kTileRows;  // vocabulary columns between two barriers
  static constexpr int64_t kWidePanel = 16 * kTileRows;
  // fp32 sums of fp32 gradients need no memory of their own.
  static constexpr bool kSumInPlace = std::is_same_v<In, float>;
  // One product of phase 2: 256 rows of dW x 512 columns over 512 tokens. Its fp32 block and the
  // tokens' panel stay in a 2 MiB L2 (960 GFLOP/s on one AMX core; 620 with all 896 columns). fp32
  // takes half of each, for the 512 KiB of processors with AVX2 alone.
  static constexpr int64_t kOwnedRows = 256;
  static constexpr int64_t kOwnedColumns = kPairs<T> ? 512 : 256;
  static constexpr int64_t kTokensPerProduct = kPairs<T> ? 512 : 256;

  int64_t target(int64_t token) const { return head_.target[head_.index[token]]; }
  int64_t dim() const { return head_.padded_dim(); }
  int64_t padded_panel(int64_t rows) const { return round_up(rows, kStepK<T>); }

  // What a token keeps in memory during a sweep for dW: H^T, H and a panel of dZ.
  int64_t bytes_per_token() const {
    return (2 * dim() + panel_) * static_cast<int64_t>(sizeof(T));
  }

  // One panel of vocabulary columns after the other; within it, phase 1: token blocks are tasks
  // (dZ, and dH += dZ W), phase 2: rows of dW are tasks (dW += dZ^T H). Each output element has one
  // owner and one order of addition, whatever the number of threads.
  void sweep(int64_t first, int64_t count, int64_t chunk, bool hidden, bool weight) {
    const int64_t block = head_.block_tokens(), padded = round_up(count, block);
    Panel panel(*this, round_up(std::min(chunk, count), block), hidden, weight);
    const bool in_place = kSumInPlace && weight;  // the only sweep over dH's memory
    const Buffer<float> own(hidden && !in_place ? padded * dim() : 0);
    float* sums = nullptr;
    if (hidden) {
      sums = in_place ? static_cast<float*>(out_.dhidden) : own.get();
      at::parallel_for(0, padded, block, [&](int64_t begin, int64_t end) {
        std::fill(sums + begin * dim(), sums + end * dim(), 0.0f);
      });
    }
    Tokens tokens;
    for (int64_t v = 0; v < head_.vocab; v += panel_) {
      panel.start(*this, v, hidden);
      for (int64_t t = 0; t < count; t += chunk) {
        if (tokens.first != first + t) tokens = load(first + t, std::min(chunk, count - t), weight);
        form(panel, tokens, hidden ? sums + t * dim() : nullptr);
        if (out_.dweight && weight) accumulate(panel, tokens, {panel.dweight.get(), dim()}, t == 0);
      }
      if (weight) finish(panel, first, count);
    }
    if (hidden) write_hidden(first, count, sums, dim());
  }

  struct Tokens {
    int64_t first = -1;
    PackedTokens<T> packed;  // H^T, for the logits
    Buffer<T> rows;          // H, for dW
  };

  // One panel of the vocabulary and the scratch that goes with it.
  struct Panel {
    int64_t first = 0, rows = 0;
    WeightTile<T> weight{nullptr, 0};
    Buffer<T> copy, transposed, dz;  // dz: [panel, tokens], row-major
    Buffer<float> dweight;           // [panel, dim]
    Buffer<float> row_sums;          // [blocks, panel]
    int64_t dz_stride;
    int64_t left_rows;  // rows of `transposed`, the left factor of dH^T += W^T dZ^T
    std::vector<Buffer<float>> z;
    std::vector<Buffer<T>> packed;

    // `extra` more rows of the left factor, which the caller fills, give sums beside dH^T.
    Panel(const Backward& self, int64_t tokens, bool hidden, bool weight_wanted, int64_t extra = 0)
        : copy(self.head_.weight_in_place() ? 0 : self.panel_ * self.dim()),
          transposed(((hidden ? self.dim() : 0) + extra) * self.panel_),
          dz(weight_wanted ? self.panel_ * tokens : 0),
          dweight(weight_wanted ? self.panel_ * self.dim() : 0),
          row_sums(self.out_.dbias ? self.panel_ : 0),
          dz_stride(tokens),
          left_rows((hidden ? self.dim() : 0) + extra),
          z(per_thread<float>(kTileRows * self.head_.block_tokens() * 2)),
          packed(per_thread<T>(left_rows ? self.panel_ * self.head_.block_tokens() : 0)) {
      std::fill_n(transposed.get(), left_rows * self.panel_, T(0.0f));
    }

    void start(const Backward& self, int64_t v, bool hidden) {
      first = v;
      rows = std::min(self.panel_, self.head_.vocab - v);
      weight = weight_tile(self.head_, v, rows, copy.get());
      if (hidden) {
        transpose_weight(weight, rows, self.head_.dim, transposed.get(), self.padded_panel(rows));
      }
      if (self.out_.dbias) std::fill_n(row_sums.get(), self.panel_, 0.0f);
    }
  };

  Tokens load(int64_t first, int64_t count, bool weight) const {
    Tokens tokens{first, pack_tokens(head_, first, count), Buffer<T>(0)};
    if (!weight) return tokens;
    // In stretches of one task each; k is even within a stretch, so pairs of rows stay together.
    const int64_t padded = tokens.packed.padded();
    tokens.rows = Buffer<T>(padded * dim());
    constexpr int64_t stretch = 128;
    at::parallel_for(0, (padded + stretch - 1) / stretch, 1, [&](int64_t begin, int64_t end) {
      for (int64_t s = begin * stretch; s < end * stretch && s < padded; s += stretch) {
        const int64_t rows = std::clamp<int64_t>(count - s, 0, stretch);
        pack_rows(head_.hidden, first + s, rows, head_.dim, tokens.rows.get() + s * dim(),
                  std::min(stretch, padded - s), dim());
      }
    });
    return tokens;
  }

  // Phase 1 with recomputed logits.
  void form(Panel& panel, const Tokens& tokens, float* dhidden) {
    const auto recompute = [&](int64_t b, int64_t r, int64_t rows, float* z, float* slope) {
      const WeightTile<T> weight{panel.weight.data + r * panel.weight.ld, panel.weight.ld};
      logits_tile(head_, tokens.packed, b, weight, panel.first + r, rows, z, slope,
                  {nullptr, vectors_.slope.get()});
      return z;
    };
    form(panel, tokens.packed, dhidden, recompute);
  }

  // Phase 1: dZ of the panel for every block of tokens; with `dhidden`, dH^T += W^T dZ^T.
  // logits(b, r, rows, z, slope) gives the tile of block b and the panel's rows from r on, in the
  // scratch z or elsewhere, its targets taken out, and with a softcap writes the slopes.
  template <typename Logits>
  void form(Panel& panel, const PackedTokens<T>& packed, float* dhidden, const Logits& logits) {
    const int64_t block = packed.block, padded = padded_panel(panel.rows);
    const bool capped = head_.transform.softcap != 0.0f, rows_wanted = out_.dweight && panel.dz.get();
    Buffer<float> sums(out_.dbias ? packed.num_blocks() * panel_ : 0);
    for_each_task(packed.num_blocks(), kPairs<T>, [&](int64_t b) {
      const int thread = at::get_thread_num();
      float* z = panel.z[thread].get();
      float* slope = capped ? z + kTileRows * block : nullptr;
      T* right = dhidden ? panel.packed[thread].get() : nullptr;
      const int64_t token = packed.first + b * block;
      if (out_.dbias) std::fill_n(sums.get() + b * panel_, panel_, 0.0f);
      if (right) std::fill(right + panel.rows / 2 * 2 * block, right + padded * block, T(0.0f));
      for (int64_t r = 0; r < panel.rows; r += kTileRows) {
        const int64_t rows = std::min(kTileRows, panel.rows - r);
        float* tile = logits(b, r, rows, z, slope);
        Output out;
        if (rows_wanted) out = {panel.dz.get() + r * panel.dz_stride + b * block, panel.dz_stride};
        if (right) out.packed = right + r * block;
        logit_gradients({tile, rows, block, block}, slope, &vectors_.max[token],
                        &vectors_.logsum[token], &vectors_.scale[token], out, store_as<T>(),
                        out_.dbias ? sums.get() + b * panel_ + r : nullptr);
      }
      if (right) {
        gemm(panel.left_rows, block, padded, panel.transposed.get(), padded, right, block,
             dhidden + b * block * panel.left_rows, block, true);
      }
    });
    for (int64_t b = 0; out_.dbias && b < packed.num_blocks(); ++b) {
      for (int64_t v = 0; v < panel.rows; ++v) panel.row_sums[v] += sums[b * panel_ + v];
    }
  }

  // Phase 2: blocks of dW, each owned by one task.
  void accumulate(const Panel& panel, const Tokens& tokens, WeightRows dweight, bool first_chunk) {
    const int64_t padded = tokens.packed.padded(), ld = dweight.width;
    const int64_t parts = (ld + kOwnedColumns - 1) / kOwnedColumns;
    const int64_t columns = round_up((ld + parts - 1) / parts, 32);
    const int64_t tasks = (panel.rows + kOwnedRows - 1) / kOwnedRows * parts;
    for_each_task(tasks, kPairs<T>, [&](int64_t i) {
      const int64_t v = i / parts * kOwnedRows, rows = std::min(kOwnedRows, panel.rows - v);
      const int64_t d = i % parts * columns, width = std::min(columns, ld - d);
      for (int64_t t = 0; t < padded; t += kTokensPerProduct) {
        const T* right = tokens.rows.get() + t * dim() + d * (kPairs<T> ? 2 : 1);
        gemm(rows, width, std::min(kTokensPerProduct, padded - t),
             panel.dz.get() + v * panel.dz_stride + t, panel.dz_stride, right, dim(),
             dweight.at(v) + d, ld, !(first_chunk && t == 0));
      }
    });
  }

  // Adds the targets' own entries to rows [begin, end) of the panel, for tokens [first, + count).
  void add_targets(const Panel& panel, WeightRows dweight, int64_t begin, int64_t end,
                   int64_t first, int64_t count) const {
    const auto by_target = [&](int64_t a, int64_t v) { return target(a) < v; };
    auto it = std::lower_bound(order_.begin(), order_.end(), panel.first + begin, by_target);
    for (; it != order_.end() && target(*it) < panel.first + end; ++it) {
      if (*it < first || *it >= first + count) continue;
      const int64_t v = target(*it) - panel.first;
      const float own = vectors_.own[*it] * vectors_.slope[*it];
      if (out_.dbias) panel.row_sums[v] += own;
      const In* h = head_.hidden.row(*it);
      for (int64_t d = 0; out_.dweight && d < head_.dim; ++d) {
        dweight.at(v)[d] += own * static_cast<float>(h[d * head_.hidden.column_stride]);
      }
    }
  }

  // Adds the targets' own entries to the panel's rows and rounds them once.
  void finish(Panel& panel, int64_t first, int64_t count) {
    at::parallel_for(0, panel.rows, 16, [&](int64_t begin, int64_t end) {
      add_targets(panel, {panel.dweight.get(), dim()}, begin, end, first, count);
      for (int64_t v = begin; v < end; ++v) {
        float* row = panel.dweight.get() + v * dim();
        if (others_) {
          const float sum = others_(panel.first + v, out_.dweight ? row : nullptr);
          if (out_.dbias) panel.row_sums[v] += sum;
        }
        if (out_.dbias) out_.dbias[panel.first + v] = panel.row_sums[v];
        if (!out_.dweight) continue;
        In* out = static_cast<In*>(out_.dweight) + (panel.first + v) * head_.dim;
        for (int64_t d = 0; d < head_.dim; ++d) out[d] = static_cast<In>(row[d]);
      }
    });
  }

  // `stride`: floats of a token in the sums, whose blocks are [stride, block]. Where the sums lie in
  // the output, the last block goes first: a token's row is never before its place among the tokens.
  void write_hidden(int64_t first, int64_t count, const float* sums, int64_t stride) {
    constexpr int64_t part = 32;  // of a block's tokens; blocks are multiples of it
    const int64_t block = head_.block_tokens();
    Buffer<float> rows(block * head_.dim);
    for (int64_t b = (count - 1) / block; b >= 0; --b) {
      const float* of_block = sums + b * block * stride;
      const int64_t tokens = std::min(block, count - b * block);
      at::parallel_for(0, block / part, 1, [&](int64_t begin, int64_t end) {
        transpose(of_block + begin * part, head_.dim, (end - begin) * part, block,
                  rows.get() + begin * part * head_.dim, head_.dim);
      });
      at::parallel_for(0, tokens, part, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) {
          write_hidden_row(first + b * block + t, &rows[t * head_.dim]);
        }
      });
    }
  }

  void write_hidden_row(int64_t token, const float* sum) {
    const float own = vectors_.own[token] * vectors_.slope[token];
    const In* w = head_.weight.row(target(token));
    In* out = static_cast<In*>(out_.dhidden) + head_.index[token] * out_.dhidden_stride;
    for (int64_t d = 0; d < head_.dim; ++d) {
      const float weight = static_cast<float>(w[d * head_.weight.column_stride]);
      out[d] = static_cast<In>(sum[d] + own * weight);
    }
  }

  const Head<T, In>& head_;
  const BackwardOut& out_;
  const int64_t workspace_;
  const RowAdder others_;
  TokenVectors vectors_;
  std::vector<int64_t> order_;  // tokens by target
  int64_t panel_ = kPanel;
};

}  // namespace bvpo
