"""From what each micro-batch measured to the inner products of the whole step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bvpo_kernels.eager.grad_stats import inner_products
from bvpo_kernels.mixing import StepStats


@dataclass(frozen=True)
class MicroBatchStats:
    """One collection.

    place_BK: index of the group of a unit and kind. record: see `Plan`. sketch_GF: all sketches of
    a group in a row. moved: indices of the parameters whose gradient changed.
    """

    unit_ids: tuple[str, ...]
    kinds: tuple[str, ...]
    scales: tuple[float, ...]
    place_BK: Tensor
    record: Tensor
    sketch_GF: Tensor | None
    moved: tuple[int, ...]

    def scale_KK(self) -> Tensor:
        scale_K = torch.tensor(self.scales, dtype=torch.float64)
        return scale_K[:, None] * scale_K

    def gram_BBKK(self) -> Tensor:
        """<g_k,i, g_l,j> of the units of this micro-batch, the losses' factors divided out."""
        groups = self.place_BK.numel()
        gram_GG = self.record[: groups**2].reshape(groups, groups).cpu()
        place = self.place_BK
        return gram_GG[place[:, None, :, None], place[None, :, None, :]] / self.scale_KK()

    def sketch_BKF(self) -> Tensor:
        """Sketches by unit and kind, fp64, on the device of the statistics."""
        assert self.sketch_GF is not None
        scale_K1 = torch.tensor(self.scales, dtype=torch.float64, device=self.sketch_GF.device)
        place = self.place_BK.to(self.sketch_GF.device)
        return self.sketch_GF.double()[place] / scale_K1[:, None]


def combine(
    micro_batches: Sequence[MicroBatchStats],
    mode: str,
    cross: str,
    kind_sums: Sequence[Tensor | None],
    process_group: Any,
) -> StepStats:
    """Products within a micro-batch from its Gram matrix, the others from sketches or kind sums."""
    kinds = micro_batches[0].kinds
    ranks = 1 if process_group is None else dist.get_world_size(process_group)
    alone = len(micro_batches) == 1 and ranks == 1
    if cross == "none" and not alone:
        raise RuntimeError(
            f"result: cross='none' expects one micro-batch on one rank, got "
            f"{len(micro_batches)} on {ranks}"
        )
    if mode != "exact":
        gram, rows = _sketched(micro_batches, process_group)
    else:
        gram = torch.cat([m.gram_BBKK().diagonal().permute(2, 0, 1) for m in micro_batches])
        rows = torch.cat([m.gram_BBKK().sum(1) for m in micro_batches])
        if cross == "sketch" and not alone:
            rows = rows + _sketched_cross(micro_batches, gram, process_group)
    gram = 0.5 * (gram + gram.mT)
    if process_group is not None:
        device = micro_batches[0].record.device
        gram, rows = (_all_gather(t, device, process_group) for t in (gram, rows))
    if cross == "exact" and mode == "exact" and not alone:
        sums = _sum_products(kind_sums, process_group) / micro_batches[0].scale_KK()
        return StepStats(kinds, gram, sums)
    return StepStats(kinds, gram, rows.sum(0), rows)


def _sketched(micro_batches: Sequence[MicroBatchStats], group: Any) -> tuple[Tensor, Tensor]:
    """<g_k,i, g_l,i> and <g_k,i, G_l>, [B, K, K] both, from the sketches alone."""
    own = [micro.sketch_BKF() for micro in micro_batches]
    total_KF = _reduce(torch.stack([part.sum(0) for part in own]).sum(0), group)
    gram = torch.cat([part @ part.mT for part in own])
    rows = torch.cat([part @ total_KF.T for part in own])
    return gram.cpu(), rows.cpu()


def _sketched_cross(
    micro_batches: Sequence[MicroBatchStats], gram_BKK: Tensor, group: Any
) -> Tensor:
    """<g_k,i, G_l - the part of G_l that is in i's micro-batch>, [B, K, K].

    Calibrated by what is known of the same sketches: the exact sum of |d_i|^2 over the sketched
    one. The error that all units share, as where their gradients are parallel, cancels; the ratio's
    own bias is of the order of the variance of that sum.
    """
    own = [micro.sketch_BKF() for micro in micro_batches]
    total_KF = _reduce(torch.stack([part.sum(0) for part in own]).sum(0), group)
    cross = torch.cat([part @ (total_KF - part.sum(0)).T for part in own]).cpu()
    sketched = torch.cat([part @ part.mT for part in own]).cpu()
    spread = torch.stack([_spread(gram_BKK), _spread(sketched)])
    exact, estimate = _reduce(spread.to(own[0].device), group).tolist()
    return cross * (exact / estimate if estimate > 0 else 1.0)


def _spread(gram_BKK: Tensor) -> Tensor:
    """sum_i sum_k |g_k,i - mean_k g_k,i|^2, for two kinds sum_i |d_i|^2 / 2; |g_i|^2 for one."""
    kinds = gram_BKK.shape[1]
    squares = gram_BKK.diagonal(dim1=1, dim2=2).sum()
    return squares if kinds == 1 else squares - gram_BKK.sum() / kinds


def _sum_products(kind_sums: Sequence[Tensor | None], group: Any) -> Tensor:
    """<G_k, G_l> from the gradients of the kinds, [K, K]."""
    sums = [_reduce(part, group) for part in kind_sums if part is not None]
    return torch.stack([inner_products(part, part) for part in sums]).sum(0).cpu()


def _reduce(tensor: Tensor, group: Any) -> Tensor:
    if group is not None:
        dist.all_reduce(tensor, group=group)
    return tensor


def _all_gather(units_BKK: Tensor, device: torch.device, group: Any) -> Tensor:
    """Units of all ranks, in the order of the ranks; they may have different numbers of units."""
    ranks = dist.get_world_size(group)
    count = torch.tensor([units_BKK.shape[0]], device=device)
    counts = [torch.empty_like(count) for _ in range(ranks)]
    dist.all_gather(counts, count, group=group)
    sizes = [int(size) for size in counts]
    padded = torch.zeros((max(sizes), *units_BKK.shape[1:]), dtype=torch.float64, device=device)
    padded[: units_BKK.shape[0]] = units_BKK.to(device)
    parts = [torch.empty_like(padded) for _ in range(ranks)]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)]).cpu()
