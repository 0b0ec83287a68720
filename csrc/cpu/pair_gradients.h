// Schedule "trained, one pass" (6 TVD): the upstream gradient of a token is known, up to one number
// of the caller's, before the forward, so that dH and dW are formed from logits that exist once.
#pragma once

#include "backward.h"
#include "forward.h"

namespace bvpo {

// Per chunk of tokens: logits over the whole vocabulary are formed, scored and kept, tile by tile;
// then panels of the vocabulary turn them into dZ, dH and dW as `Backward` does. Sums of dW are the
// output itself, fp32 over all tokens.
template <typename T, typename In>
class PairGradients {
 public:
  // `in` reads what `scores` writes; its upstream gradients are the factors. out.dweight, out.dbias
  // are fp32 and overwritten.
  PairGradients(const Head<T, In>& head, const BackwardIn& in, const ForwardOut& scores,
                const BackwardOut& out, int64_t chunk_tokens)
      : head_(head), in_(in), scores_(scores), out_(out), part_(head, in, out, 0),
        chunk_(chunk(chunk_tokens)), logits_(head.vocab * chunk_), target_z_(head.num_tokens),
        copies_(weight_copies(head)), panel_(part_, chunk_, out.dhidden, false),
        hidden_sums_(out.dhidden ? chunk_ * head.padded_dim() : 0) {
    panel_.dz = Buffer<T>(out.dweight ? part_.panel_ * chunk_ : 0);
  }

  void run() {
    for (int64_t first = 0; first < head_.num_tokens; first += chunk_) {
      const int64_t count = std::min(chunk_, head_.num_tokens - first);
      const Tokens tokens = part_.load(first, count, out_.dweight);
      score(tokens.packed);
      if (out_.dhidden || out_.dweight || out_.dbias) differentiate(tokens);
    }
  }

 private:
  using Part = Backward<T, In>;
  using Panel = typename Part::Panel;
  using Tokens = typename Part::Tokens;

  // About equal chunks of whole blocks, of no more tokens than were asked for or one block.
  int64_t chunk(int64_t asked) const {
    const int64_t block = head_.block_tokens(), all = head_.num_tokens;
    const int64_t most = std::max(block, asked / block * block), chunks = (all + most - 1) / most;
    return round_up((all + chunks - 1) / chunks, block);
  }

  // Tiles lie one after the other: all blocks of 256 columns, then those of the next 256.
  float* tile(const PackedTokens<T>& tokens, int64_t v, int64_t rows, int64_t b) const {
    return logits_.get() + v * tokens.padded() + b * rows * tokens.block;
  }

  void score(const PackedTokens<T>& tokens) {
    score_tokens(head_, tokens, copies_, target_z_.get(), scores_,
                 [&](int64_t v, int64_t rows, int64_t b) { return tile(tokens, v, rows, b); });
    const int64_t end = tokens.first + tokens.count;
    TokenVectors& vectors = part_.vectors_;
    vectors.set(head_, in_, tokens.first, end);
    for (int64_t t = tokens.first; t < end; ++t) {
      vectors.slope[t] = static_cast<float>(head_.transform.slope(target_z_[t]));
    }
  }

  void differentiate(const Tokens& tokens) {
    const PackedTokens<T>& packed = tokens.packed;
    float* hidden = out_.dhidden ? hidden_sums_.get() : nullptr;
    if (hidden) std::fill_n(hidden, packed.padded() * part_.dim(), 0.0f);
    const auto stored = [&](int64_t b, int64_t r, int64_t rows, float*, float* slope) {
      float* z = tile(packed, panel_.first + r, rows, b);
      if (slope) softcap_slopes({z, rows, packed.block, packed.block}, head_.transform, slope);
      return z;
    };
    for (int64_t v = 0; v < head_.vocab; v += part_.panel_) {
      panel_.start(part_, v, hidden);
      part_.form(panel_, packed, hidden, stored);
      add_weight(tokens);
    }
    if (hidden) part_.write_hidden(packed.first, packed.count, hidden, part_.dim());
  }

  // The panel's rows of dW and of the bias; the first chunk overwrites.
  void add_weight(const Tokens& tokens) {
    const int64_t first = tokens.packed.first, count = tokens.packed.count;
    float* weight = static_cast<float*>(out_.dweight);
    const WeightRows rows{weight ? weight + panel_.first * head_.dim : nullptr, head_.dim};
    if (weight) part_.accumulate(panel_, tokens, rows, first == 0);
    at::parallel_for(0, panel_.rows, 16, [&](int64_t begin, int64_t end) {
      part_.add_targets(panel_, rows, begin, end, first, count);
      for (int64_t v = begin; out_.dbias && v < end; ++v) {
        float& sum = out_.dbias[panel_.first + v];
        sum = (first == 0 ? 0.0f : sum) + panel_.row_sums[v];
      }
    });
  }

  const Head<T, In>& head_;
  const BackwardIn& in_;
  const ForwardOut& scores_;
  const BackwardOut& out_;
  Part part_;
  const int64_t chunk_;
  Buffer<float> logits_, target_z_;
  std::vector<Buffer<T>> copies_;
  Panel panel_;
  Buffer<float> hidden_sums_;  // dH^T of a chunk, [blocks, dim, block]
};

}  // namespace bvpo
