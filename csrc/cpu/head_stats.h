// Schedule "trained, exact" with the statistics of the weight gradient, group by group of tokens.
//
// A group's tokens are contiguous, so its share of dW has the FLOPs of a share of the plain product.
// Per panel of the vocabulary every group forms its rows of dW; one pass then multiplies the groups
// with each other and adds them up. Nothing of size [G, V, D] or [T, V] exists.
#pragma once

#include "backward.h"
#include "gram.h"

namespace bvpo {

// What the statistics need and give; null where not wanted. G groups, V columns, D dimensions.
struct Statistics {
  const int64_t* edges;  // [G + 1], scored tokens of group g are [edges[g], edges[g + 1])
  int64_t groups;
  double* gram;         // [G, G], upper triangle
  const int64_t* kind;  // [G]
  float* kinds;         // [K, V, D], sums of the groups of a kind, zero before
  const int64_t* ids;   // [U], ascending
  int64_t num_ids;
  float* id_rows;     // [G, U, D], the rows `ids` of each group's dW, zero before
  float* bias;        // [G, V], zero before
  const float* left;  // [V, k]
  int64_t sketch;     // k
  float* sketched;    // [T, k], dZ left by row of the caller's tensors, zero before
};

template <typename T, typename In>
class GroupedBackward {
 public:
  GroupedBackward(const Head<T, In>& head, const BackwardIn& in, const BackwardOut& out,
                  const Statistics& stats, int64_t workspace)
      : head_(head), in_(in), out_(out), stats_(stats), workspace_(workspace) {
    for (int64_t g = 0; g < stats.groups; ++g) {
      if (stats.edges[g] < stats.edges[g + 1]) groups_.push_back(g);
    }
    heads_.reserve(groups_.size());
    outs_.reserve(groups_.size());
    parts_.reserve(groups_.size());
    for (int64_t g : groups_) {
      Head<T, In> own = head;
      own.index += stats.edges[g];
      own.hidden.index = own.index;
      own.num_tokens = stats.edges[g + 1] - stats.edges[g];
      heads_.push_back(own);
      outs_.push_back(out);
      outs_.back().dbias = stats.bias ? stats.bias + g * head.vocab : nullptr;
      parts_.emplace_back(heads_.back(), in, outs_.back(), workspace);
    }
    gram_.assign(groups_.size() * groups_.size(), 0.0);
  }

  void run() {
    bool hidden = out_.dhidden;
    if (hidden && kept_bytes(true) > workspace_) {
      BackwardOut alone = out_;
      alone.dweight = alone.dbias = nullptr;
      Backward<T, In>(head_, in_, alone, workspace_).run();
      hidden = false;
    }
    sweep(hidden);
    const size_t n = groups_.size();
    for (size_t i = 0; stats_.gram && i < n; ++i) {
      for (size_t j = i; j < n; ++j) {
        stats_.gram[groups_[i] * stats_.groups + groups_[j]] = gram_[i * n + j];
      }
    }
  }

 private:
  using Part = Backward<T, In>;
  using Panel = typename Part::Panel;
  using Tokens = typename Part::Tokens;
  static constexpr int64_t kTaskRows = 16;

  int64_t dim() const { return head_.padded_dim(); }
  int64_t left_rows(bool hidden) const { return (hidden ? dim() : 0) + stats_.sketch; }
  int64_t padded(size_t i) const {
    return round_up(heads_[i].num_tokens, heads_[i].block_tokens());
  }

  // What all tokens keep in memory if none is loaded twice.
  int64_t kept_bytes(bool hidden) const {
    int64_t bytes = 0;
    for (size_t i = 0; i < heads_.size(); ++i) {
      bytes += padded(i) * (2 * dim() * static_cast<int64_t>(sizeof(T)) + left_rows(hidden) * 4);
    }
    return bytes;
  }

  // Vocabulary columns between two barriers: the groups' rows of dW take a quarter of the workspace.
  int64_t panel_rows() const {
    const int64_t bytes = static_cast<int64_t>(groups_.size()) * dim() * 4;
    return std::clamp(workspace_ / 4 / bytes / kTileRows * kTileRows, kTileRows, Part::kPanel);
  }

  // Tokens of part i that are loaded at once.
  int64_t chunk(size_t i, bool resident) const {
    const int64_t block = heads_[i].block_tokens(), size = sizeof(T);
    const int64_t fits = workspace_ / 2 / ((2 * dim() + panel_rows()) * size) / block * block;
    return resident ? heads_[i].num_tokens : std::min(std::max(block, fits), heads_[i].num_tokens);
  }

  void sweep(bool hidden) {
    const bool resident = kept_bytes(hidden) <= workspace_, weight = out_.dweight;
    size_t widest = 0;
    int64_t most = 0;
    for (size_t i = 0; i < parts_.size(); ++i) {
      parts_[i].panel_ = panel_rows();
      if (heads_[i].block_tokens() > heads_[widest].block_tokens()) widest = i;
      most = std::max(most, round_up(chunk(i, resident), heads_[i].block_tokens()));
    }
    Panel panel(parts_[widest], most, hidden, false, stats_.sketch);
    panel.dz = Buffer<T>(weight ? panel_rows() * most : 0);
    const int64_t tile = panel_rows() * dim();
    Buffer<float> tiles(weight ? tile * static_cast<int64_t>(parts_.size()) : 0);
    std::vector<Buffer<float>> sums;  // per part: dH^T and the sketch, [blocks, left_rows, block]
    std::vector<Tokens> tokens(parts_.size());
    for (size_t i = 0; i < parts_.size(); ++i) {
      sums.emplace_back(padded(i) * panel.left_rows);
      std::fill_n(sums[i].get(), padded(i) * panel.left_rows, 0.0f);
    }
    for (int64_t v = 0; v < head_.vocab; v += panel_rows()) {
      panel.start(parts_[widest], v, hidden);
      if (stats_.sketch) load_left(panel, hidden);
      for (size_t i = 0; i < parts_.size(); ++i) {
        form_part(panel, i, tokens[i], chunk(i, resident), sums[i].get(), tiles.get() + i * tile);
      }
      if (weight) reduce(panel, tiles.get(), tile);
    }
    for (size_t i = 0; i < parts_.size(); ++i) {
      if (hidden) parts_[i].write_hidden(0, heads_[i].num_tokens, sums[i].get(), panel.left_rows);
      if (stats_.sketch) write_sketch(i, sums[i].get(), panel.left_rows);
    }
  }

  // One group's rows of dW for the panel, its targets included.
  void form_part(Panel& panel, size_t i, Tokens& tokens, int64_t chunk, float* sums, float* dweight) {
    Part& part = parts_[i];
    const int64_t count = heads_[i].num_tokens;
    float* bias = outs_[i].dbias;
    if (bias) std::fill_n(panel.row_sums.get(), panel_rows(), 0.0f);
    for (int64_t t = 0; t < count; t += chunk) {
      const int64_t n = std::min(chunk, count - t);
      if (tokens.first != t || tokens.packed.count != n) tokens = part.load(t, n, out_.dweight);
      part.form(panel, tokens, panel.left_rows ? sums + t * panel.left_rows : nullptr);
      if (out_.dweight) part.accumulate(panel, tokens, {dweight, dim()}, t == 0);
    }
    at::parallel_for(0, panel.rows, kTaskRows, [&](int64_t begin, int64_t end) {
      part.add_targets(panel, {dweight, dim()}, begin, end, 0, count);
    });
    for (int64_t v = 0; bias && v < panel.rows; ++v) bias[panel.first + v] = panel.row_sums[v];
  }

  // The sketch's left factor, transposed, below W^T.
  void load_left(Panel& panel, bool hidden) {
    const int64_t padded = parts_[0].padded_panel(panel.rows), k = stats_.sketch;
    T* rows = panel.transposed.get() + (hidden ? dim() : 0) * padded;
    for (int64_t j = 0; j < k; ++j) {
      for (int64_t v = 0; v < padded; ++v) {
        const bool inside = v < panel.rows;
        rows[j * padded + v] = T(inside ? stats_.left[(panel.first + v) * k + j] : 0.0f);
      }
    }
  }

  // All groups' rows of the panel: products with each other, their sum, and what is kept of them.
  void reduce(const Panel& panel, const float* tiles, int64_t tile) {
    const size_t size = gram_.size();
    const int64_t tasks = (panel.rows + kTaskRows - 1) / kTaskRows;
    const GroupTiles source{tiles, static_cast<int64_t>(groups_.size()), tile, false};
    std::vector<double> partial(stats_.gram ? tasks * size : 0, 0.0);
    at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
      Buffer<float> total(head_.dim);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t begin_row = task * kTaskRows;
        const int64_t last = std::min(begin_row + kTaskRows, panel.rows);
        if (stats_.gram) {  // padding beyond D is zero
          add_gram(source, begin_row * dim(), (last - begin_row) * dim(), &partial[task * size]);
        }
        for (int64_t v = begin_row; v < last; ++v) {
          const int64_t row = v * dim();
          sum_groups(source, row, head_.dim, {total.get(), false, nullptr, false});
          In* out = static_cast<In*>(out_.dweight) + (panel.first + v) * head_.dim;
          for (int64_t d = 0; d < head_.dim; ++d) out[d] = static_cast<In>(total[d]);
          keep(panel.first + v, tiles + row, tile);
        }
      }
    });
    for (size_t i = 0; i < partial.size(); ++i) gram_[i % size] += partial[i];
  }

  // Row v of the weight: to its kinds' sums, and to the rows of the token ids.
  void keep(int64_t v, const float* rows, int64_t tile) {
    const int64_t dim = head_.dim;
    const int64_t* found = nullptr;
    if (stats_.id_rows) {
      const int64_t* end = stats_.ids + stats_.num_ids;
      found = std::lower_bound(stats_.ids, end, v);
      if (found == end || *found != v) found = nullptr;
    }
    for (size_t i = 0; i < groups_.size(); ++i) {
      const float* row = rows + i * tile;
      if (stats_.kinds) {
        float* sum = stats_.kinds + (stats_.kind[groups_[i]] * head_.vocab + v) * dim;
        for (int64_t d = 0; d < dim; ++d) sum[d] += row[d];
      }
      if (found) {
        std::copy_n(row, dim, stats_.id_rows + (groups_[i] * stats_.num_ids + (found - stats_.ids)) * dim);
      }
    }
  }

  // sum_v dz_tv left_v by token; the target's own entry is added here, in fp32.
  void write_sketch(size_t i, const float* sums, int64_t rows) {
    const int64_t k = stats_.sketch, block = heads_[i].block_tokens();
    const Part& part = parts_[i];
    for (int64_t t = 0; t < heads_[i].num_tokens; ++t) {
      const float own = part.vectors_.own[t] * part.vectors_.slope[t];
      const float* left = stats_.left + part.target(t) * k;
      float* out = stats_.sketched + heads_[i].index[t] * k;
      const float* sum = sums + (t / block * rows + rows - k) * block + t % block;
      for (int64_t j = 0; j < k; ++j) out[j] = sum[j * block] + own * left[j];
    }
  }

  const Head<T, In>& head_;
  const BackwardIn& in_;
  const BackwardOut& out_;
  const Statistics& stats_;
  const int64_t workspace_;
  std::vector<int64_t> groups_;  // those with scored tokens
  std::vector<Head<T, In>> heads_;
  std::vector<BackwardOut> outs_;
  std::vector<Part> parts_;
  std::vector<double> gram_;
};

}  // namespace bvpo
