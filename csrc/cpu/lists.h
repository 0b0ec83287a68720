// Lists of likely columns: the pass over a tile that gathers them, and the sums over rows that
// they name.
#pragma once

#include "rows.h"

namespace bvpo {

// A block of tokens' candidates, in the order of the vocabulary.
struct Candidates {
  int32_t* column;         // [tokens, room]
  float* z;                // [tokens, room]
  int64_t room;            // longest list + rows of a tile
  int64_t longest;         // a longer list is halved
  float give_up;           // probability left out at which a token's list is abandoned
  int32_t* count;          // [tokens]
  float* floor;            // [tokens] log p from which on a column is a candidate; +inf: abandoned
  const float* target_z;   // [tokens] the target's logit, a lower bound of the log-sum-exp

  Candidates at(int64_t t) const {
    return {column + t * room, z + t * room, room, longest, give_up, count + t, floor + t, target_z + t};
  }
};

// Sums over the columns other than the target, in units of exp(max): of listed ones, of the others,
// and, unless null, sum of exp(z - max) (z - max) over both.
struct ListedSums {
  float* max;
  float* kept;
  float* rest;
  float* weighted;

  ListedSums at(int64_t t) const {
    return {max + t, kept + t, rest + t, weighted ? weighted + t : nullptr};
  }
};

// `online_sums` that also lists each column whose probability may reach exp(floor). The target's
// entry must be -inf. `rest` never is a difference, so that it is exact however small it is.
void online_candidates(Tile tile, int64_t first_row, ListedSums sums, const Candidates& lists);

// acc[i] += factor x[i].
void add_scaled(const void* x, Store type, int64_t n, float factor, float* acc);

}  // namespace bvpo
