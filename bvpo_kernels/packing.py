"""Pairs of token ids -> one packed row, and back; the plan of the rows; sums over segments."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bvpo_kernels import checks, ops
from bvpo_kernels.ops.derivatives import check_reverse_mode
from bvpo_kernels.ops.packing import choose_sum
from bvpo_kernels.oracles import packing as oracle
from bvpo_kernels.types import IGNORE_INDEX, KINDS, PackedBatch, Unit

_FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_MAX_TOKENS = torch.iinfo(torch.int32).max


class _Segment(NamedTuple):
    prompt: list[int]
    response: list[int]


class _Group(NamedTuple):
    """The segments of one unit and kind, chosen and rejected alternating."""

    unit: int
    kind: int
    segments: list[_Segment]


def _token_ids(where: str, ids: Sequence[int]) -> list[int]:
    try:
        listed = [operator.index(token) for token in ids]
    except TypeError as error:
        raise TypeError(f"{where}: expected integer token ids: {error}") from None
    if not listed:
        raise ValueError(f"{where}: expected at least one token, got none")
    if min(listed) < 0:
        raise ValueError(f"{where}: expected token ids >= 0, got {min(listed)}")
    return listed


def _groups(units: Sequence[Unit], kinds: Sequence[str]) -> Iterator[_Group]:
    """Every (unit, kind) that has pairs, in pack order."""
    for unit_index, unit in enumerate(units):
        unknown = sorted(set(unit.pairs) - set(kinds))
        if unknown:
            raise ValueError(f"unit {unit.unit_id!r}: expected kinds of {kinds}, got {unknown}")
        for kind_index, kind in enumerate(kinds):
            segments = []
            for number, pair in enumerate(unit.pairs.get(kind, ())):
                where = f"unit {unit.unit_id!r}, kind {kind!r}, pair {number}"
                prompt = _token_ids(f"{where}, prompt", pair.prompt)
                for side in ("chosen", "rejected"):
                    response = _token_ids(f"{where}, {side}", getattr(pair, side))
                    segments.append(_Segment(prompt, response))
            if segments:
                yield _Group(unit_index, kind_index, segments)


def pack(
    units: Sequence[Unit],
    *,
    kinds: Sequence[str] = KINDS,
    device: torch.device | str | None = None,
    ignore_index: int = IGNORE_INDEX,
) -> PackedBatch:
    """Lay `units` out as one row of tokens: each pair is [prompt chosen] [prompt rejected].

    The first response token is predicted by the last prompt token, hence `target_T` at the last
    position of the prompt; no other prompt position, and no last position of a segment, is scored.

    Args:
        units: packed in the given order; a unit may lack a kind. No units give an empty batch.
        kinds: names of the kinds, in the order in which a unit's groups are laid out.
        device: where the tensors go; None is the CPU.
        ignore_index: target of positions that are not scored, < 0.

    Raises:
        ValueError: a kind that `kinds` does not name, an empty prompt or response, a negative token
            id (with the unit, the kind and the pair), or more tokens than int32 counts.
        TypeError: a token id that is not an integer.
    """
    kinds = tuple(kinds)
    if len(set(kinds)) != len(kinds):
        raise ValueError(f"kinds: expected distinct names, got {kinds}")
    if ignore_index >= 0:
        raise ValueError(f"ignore_index: expected a number < 0, got {ignore_index}")
    tokens: list[int] = []
    position_ids: list[int] = []
    target: list[int] = []
    bounds, scored_lengths, pair_group, group_ranges = [0], [], [], []
    groups = list(_groups(units, kinds))
    for index, group in enumerate(groups):
        start = len(tokens)
        for prompt, response in group.segments:
            tokens += prompt + response
            position_ids += range(len(prompt) + len(response))
            target += [ignore_index] * (len(prompt) - 1) + response + [ignore_index]
            bounds.append(len(tokens))
            scored_lengths.append(len(response))
        pair_group += [index] * (len(group.segments) // 2)
        group_ranges.append((start, len(tokens)))
    if len(tokens) > _MAX_TOKENS:
        raise ValueError(f"units: expected at most {_MAX_TOKENS} tokens, got {len(tokens)}")
    batch = PackedBatch(
        tokens_T=torch.tensor(tokens, dtype=torch.int64),
        position_ids_T=torch.tensor(position_ids, dtype=torch.int64),
        target_T=torch.tensor(target, dtype=torch.int64),
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        scored_lengths_S=torch.tensor(scored_lengths, dtype=torch.int64),
        pair_group_P=torch.tensor(pair_group, dtype=torch.int64),
        group_ranges_G2=torch.tensor(group_ranges, dtype=torch.int64).reshape(-1, 2),
        group_unit_G=torch.tensor([group.unit for group in groups], dtype=torch.int64),
        group_kind_G=torch.tensor([group.kind for group in groups], dtype=torch.int64),
        unit_ids=tuple(unit.unit_id for unit in units),
        kinds=kinds,
        max_seqlen=max((len(p) + len(r) for g in groups for p, r in g.segments), default=0),
        num_scored=sum(scored_lengths),
    )
    return batch if device is None else batch.to(device)


@dataclass(frozen=True)
class PackPlan:
    """Which units share a pack.

    bins: indices of the units of each pack, ascending. fill: tokens / (packs * budget), in [0, 1];
    1 for a plan without packs.
    """

    bins: list[list[int]]
    fill: float


def plan_packs(
    lengths: Sequence[int], token_budget: int, *, names: Sequence[str] | None = None
) -> PackPlan:
    """Distribute whole units over packs of at most `token_budget` tokens: first-fit decreasing.

    The longest unit goes first, each one into the first pack that has room (equal lengths in the
    given order), which needs at most 11/9 of the fewest packs possible plus 6/9. A unit is never
    split: what is inside one must meet in one backward.

    Args:
        lengths: tokens of each unit (`Unit.num_tokens`), >= 0.
        token_budget: tokens that a pack may hold, > 0.
        names: what to call the units in errors; their indices if None.

    Raises:
        ValueError: a negative length, a budget that is not positive, names of another number than
            lengths, or a unit longer than the budget (with its name, its length and the budget).

    Source: Dosa, "The tight bound of first fit decreasing bin-packing algorithm is
    FFD(I) <= 11/9 OPT(I) + 6/9", ESCAPE 2007.
    """
    if token_budget <= 0:
        raise ValueError(f"token_budget: expected a number > 0, got {token_budget}")
    if names is not None and len(names) != len(lengths):
        raise ValueError(f"names: expected {len(lengths)} names, got {len(names)}")
    for index, length in enumerate(lengths):
        name = f"unit {index if names is None else repr(names[index])}"
        if length < 0:
            raise ValueError(f"lengths: {name}: expected a number >= 0, got {length}")
        if length > token_budget:
            raise ValueError(
                f"token_budget: {name} has {length} tokens, more than the budget of {token_budget}"
                " (units are never split)"
            )
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        target = next((b for b, left in enumerate(room) if left >= length), None)
        if target is None:
            target = len(bins)
            bins.append([])
            room.append(token_budget)
        bins[target].append(index)
        room[target] -= length
    fill = sum(lengths) / (len(bins) * token_budget) if bins else 1.0
    return PackPlan([sorted(members) for members in bins], fill)


def segment_sum(values: Tensor, cu_seqlens: Tensor, *, impl: str = "auto") -> Tensor:
    """sum_s = sum_{t in [cu_s, cu_{s+1})} values_t, the same bits wherever the segment lies.

    Args:
        values: [T], bf16, fp16, fp32 or fp64. T = 0 is allowed.
        cu_seqlens: [S + 1], int32, device of `values`; first 0, never decreasing, last T. A segment
            may be empty: its sum is 0.
        impl: "auto", or "reference", "eager", ... (`python -m bvpo_kernels` lists them).

    Returns:
        [S], fp32 (fp64 for fp64 values), in the unit of `values`: added in fp64 in a fixed order
        within each segment, rounded once. The gradient of a token is that of its segment, exactly.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what was given. The values
            of a CUDA `cu_seqlens` are asserted on the device, without waiting for it.

    Source: DESIGN.md, "Contracts".
    """
    if not isinstance(values, Tensor):
        raise TypeError(f"values: expected a Tensor, got {type(values).__name__}")
    if values.dtype not in _FLOAT_DTYPES:
        raise TypeError(f"values: expected bf16, fp16, fp32 or fp64, got {values.dtype}")
    if values.ndim != 1:
        raise ValueError(f"values: expected shape [T], got {tuple(values.shape)}")
    checks.cu_seqlens_form(cu_seqlens)
    if cu_seqlens.device != values.device:
        raise ValueError(f"cu_seqlens: expected device {values.device}, got {cu_seqlens.device}")
    chosen = choose_sum(impl, values.device.type)
    if chosen == "reference":
        checks.cu_seqlens_values(cu_seqlens, values.shape[0])
        return oracle.segment_sum(values, cu_seqlens)
    check_reverse_mode("segment_sum", values)
    return ops.segment_sum(values, cu_seqlens, chosen)
