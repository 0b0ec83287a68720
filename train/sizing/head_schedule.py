"""Which schedule the LM head takes in a step, and the bytes that it works in."""

from __future__ import annotations

from typing import NamedTuple

import torch

from bvpo_kernels.backends.one_pass import LEAST_ROWS, fits_default, slower
from bvpo_kernels.backends.slopes import SLOPES
from bvpo_kernels.head.cost import HeadShape, default_workspace, one_pass_bytes, trained_flops
from train.config import RunConfig


class HeadSchedule(NamedTuple):
    """Bytes beside the results while the forward and the backward run; FLOPs of both."""

    forward: int
    backward: int
    flops: int
    one_pass: bool


def head_schedule(
    cfg: RunConfig, shape: HeadShape, groups: int, device: str, *, weight: bool
) -> HeadSchedule:
    """Of a micro-batch with so many groups; `weight`: whether the head itself is trained.

    One pass where `linear_bvpo_loss` takes it, else tiles that are computed again.
    """
    dtype = getattr(torch, cfg.model.compute_dtype)
    mib = cfg.train.head_workspace_mib
    given = None if mib is None else mib * 2**20
    measured = cfg.alpha.estimate is not None and cfg.alpha.estimate.mode == "exact"
    tiles = groups if measured else min(groups, 2)
    impl = "triton" if device == "cuda" else "cpp"
    if shape.rank and impl == "cpp":
        impl = "eager"
    needed = one_pass_bytes(shape, dtype, impl, weight=weight, tiles=tiles)
    least = one_pass_bytes(shape, dtype, impl, weight=weight, tiles=tiles, rows=LEAST_ROWS).total
    serves = (weight or shape.rank > 0) and cfg.loss.name in SLOPES
    serves = serves and cfg.train.tail_tolerance == 0 and not slower(impl, dtype, device)
    if serves and (fits_default(tiles, needed.tiles) if given is None else given >= least):
        flops = trained_flops(shape, dtype, None, weight=weight)
        return HeadSchedule(given or needed.total, needed.tiles, flops, True)
    workspace = default_workspace(device) if given is None else given
    lists = 2 if cfg.train.tail_tolerance > 0 else 1
    flops = trained_flops(shape, dtype, workspace, weight=weight)
    return HeadSchedule(lists * workspace, lists * workspace, flops, False)
