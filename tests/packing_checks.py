"""A packed batch taken apart again, and its invariants recomputed from its tokens."""

import torch
from torch import Tensor

from bvpo_kernels import checks
from bvpo_kernels.types import IGNORE_INDEX, PackedBatch, TokenPair, Unit


def unpack(batch: PackedBatch) -> list[Unit]:
    """The inverse of `pack`: token ids come back as tuples, kinds without pairs are left out."""
    tokens, bounds = batch.tokens_T.tolist(), batch.cu_seqlens.tolist()
    scored = batch.scored_lengths_S.tolist()
    group_unit, group_kind = batch.group_unit_G.tolist(), batch.group_kind_G.tolist()
    pairs: list[dict[str, tuple[TokenPair, ...]]] = [{} for _ in batch.unit_ids]
    for number, group in enumerate(batch.pair_group_P.tolist()):
        start, middle, end = bounds[2 * number : 2 * number + 3]
        chosen_start, rejected_start = middle - scored[2 * number], end - scored[2 * number + 1]
        pair = TokenPair(
            prompt=tuple(tokens[start:chosen_start]),
            chosen=tuple(tokens[chosen_start:middle]),
            rejected=tuple(tokens[rejected_start:end]),
        )
        of_unit, kind = pairs[group_unit[group]], batch.kinds[group_kind[group]]
        of_unit[kind] = (*of_unit.get(kind, ()), pair)
    return [Unit(name, of_unit) for name, of_unit in zip(batch.unit_ids, pairs, strict=True)]


def validate_cu_seqlens(cu_seqlens: Tensor, num_tokens: int) -> None:
    """Check segment bounds: int32 [S + 1], first 0, never decreasing, last `num_tokens`.

    Raises:
        TypeError, ValueError: with what was expected and what was given. The values of a CUDA
            tensor are asserted on the device, without waiting for it.
    """
    checks.cu_seqlens_form(cu_seqlens)
    checks.cu_seqlens_values(cu_seqlens, num_tokens)


def validate(batch: PackedBatch, *, ignore_index: int = IGNORE_INDEX) -> None:
    """Check that the tensors of a batch agree with each other and with `PackedBatch`'s contract.

    Args:
        batch: what `pack` made, or something that claims to be like it.
        ignore_index: the one that it was packed with.

    Raises:
        TypeError, ValueError: naming the field, what was expected and what was given. The values of
            CUDA tensors are asserted on the device, without waiting for it.
    """
    _validate_forms(batch)
    validate_cu_seqlens(batch.cu_seqlens, batch.num_tokens)
    _validate_tokens(batch, ignore_index)
    _validate_groups(batch)


def _validate_forms(batch: PackedBatch) -> None:
    tokens, pairs, groups = batch.num_tokens, batch.num_pairs, batch.group_kind_G.numel()
    shapes = {
        "tokens_T": (tokens,),
        "position_ids_T": (tokens,),
        "target_T": (tokens,),
        "cu_seqlens": (2 * pairs + 1,),
        "scored_lengths_S": (2 * pairs,),
        "pair_group_P": (pairs,),
        "group_ranges_G2": (groups, 2),
        "group_unit_G": (groups,),
        "group_kind_G": (groups,),
    }
    for name, shape in shapes.items():
        tensor = getattr(batch, name)
        dtype = torch.int32 if name == "cu_seqlens" else torch.int64
        if tensor.dtype != dtype:
            raise TypeError(f"{name}: expected {dtype}, got {tensor.dtype}")
        if tensor.shape != shape:
            raise ValueError(f"{name}: expected shape {list(shape)}, got {list(tensor.shape)}")
        if tensor.device != batch.tokens_T.device:
            raise ValueError(
                f"{name}: expected device {batch.tokens_T.device}, got {tensor.device}"
            )


def _validate_tokens(batch: PackedBatch, ignore_index: int) -> None:
    """Lengths, positions and targets, recomputed from tokens_T, cu_seqlens and scored_lengths_S."""
    tokens_T, scored_S = batch.tokens_T, batch.scored_lengths_S
    bounds = batch.cu_seqlens.to(torch.int64)
    length_S = bounds.diff()
    longest = torch.cat([length_S, length_S.new_zeros(1)]).max()
    checks.require(
        longest == batch.max_seqlen,
        f"max_seqlen: expected the length of the longest segment for {batch.max_seqlen}",
        lambda: f"segments of up to {int(longest)}",
    )
    _require_all(
        (scored_S >= 1) & (scored_S < length_S),
        scored_S,
        "scored_lengths_S",
        "a response and a prompt of at least one token in each segment",
    )
    _require_all(tokens_T >= 0, tokens_T, "tokens_T", "token ids >= 0")
    index_T = torch.arange(batch.num_tokens, device=tokens_T.device)
    segment_T = torch.searchsorted(bounds[1:].contiguous(), index_T, right=True)
    position_T = index_T - bounds[:-1][segment_T]
    _require_all(
        batch.position_ids_T == position_T,
        batch.position_ids_T,
        "position_ids_T",
        "positions that restart at 0 in each segment",
    )
    first_T = (length_S - scored_S)[segment_T] - 1
    scored_T = (position_T >= first_T) & (position_T < length_S[segment_T] - 1)
    target_T = tokens_T.roll(-1).where(scored_T, ignore_index)
    _require_all(
        batch.target_T == target_T,
        batch.target_T,
        "target_T",
        "the next token where it belongs to the response of the same segment, and "
        f"{ignore_index} elsewhere",
    )
    if batch.num_scored is not None:
        checks.require(
            scored_S.sum() == batch.num_scored,
            f"num_scored: expected None or the sum of scored_lengths_S for {batch.num_scored}",
            lambda: f"a sum of {int(scored_S.sum())}",
        )


def _validate_groups(batch: PackedBatch) -> None:
    """Pairs lie in groups in order; groups are contiguous, cover the row and are not repeated."""
    unit_G, kind_G, group_P = batch.group_unit_G, batch.group_kind_G, batch.pair_group_P
    num_groups = unit_G.numel()
    units, kinds = len(batch.unit_ids), len(batch.kinds)
    _require_all(
        (unit_G >= 0) & (unit_G < units), unit_G, "group_unit_G", f"values in [0, {units})"
    )
    _require_all(
        (kind_G >= 0) & (kind_G < kinds), kind_G, "group_kind_G", f"values in [0, {kinds})"
    )
    _require_all(
        (unit_G * kinds + kind_G).diff() > 0,
        unit_G[1:],
        "group_unit_G",
        "groups in order of unit, then kind, without repetition",
    )
    group_G = torch.arange(num_groups, device=group_P.device)
    first_G = torch.searchsorted(group_P, group_G)
    stop_G = torch.searchsorted(group_P, group_G, right=True)
    inside_P = (group_P >= 0) & (group_P < num_groups)
    _require_all(inside_P, group_P, "pair_group_P", f"values in [0, {num_groups})")
    _require_all(group_P.diff() >= 0, group_P[1:], "pair_group_P", "values that do not decrease")
    pairs_G = stop_G - first_G
    _require_all(pairs_G > 0, pairs_G, "pair_group_P", "at least one pair in each group")
    bounds = batch.cu_seqlens.to(torch.int64)
    ranges_G2 = torch.stack([bounds[2 * first_G], bounds[2 * stop_G]], 1)
    _require_all(
        batch.group_ranges_G2 == ranges_G2,
        batch.group_ranges_G2,
        "group_ranges_G2",
        "the token range of each group's pairs",
    )


def _require_all(valid: Tensor, values: Tensor, name: str, expected: str) -> None:
    """All of `valid`; otherwise say which entry of `values`, the first that is not."""

    def got() -> str:
        index = int((~valid).flatten().nonzero()[0])
        return f"{int(values.flatten()[index])} at flat index {index}"

    checks.require(valid.all(), f"{name}: expected {expected}", got)
