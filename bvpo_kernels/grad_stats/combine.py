"""From what each micro-batch measured to the inner products of the whole step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bvpo_kernels.mixing import StepStats
from bvpo_kernels.mixing.moments import MIN_ESS
from bvpo_kernels.mixing.traces import within_unit
from bvpo_kernels.ops.grad_stats import inner_products


@dataclass(frozen=True)
class MicroBatchStats:
    """One collection.

    owner_G: unit * K + kind of each group; several groups (pairs) may make one gradient. record:
    see `Plan`. sketch_GF: all sketches of a group in a row. moved: indices of the parameters whose
    gradient changed. counted: whether its units belong to the step.
    """

    unit_ids: tuple[str, ...]
    kinds: tuple[str, ...]
    scales: tuple[float, ...]
    owner_G: Tensor
    record: Tensor
    sketch_GF: Tensor | None
    moved: tuple[int, ...]
    counted: bool = True

    def scale_KK(self) -> Tensor:
        scale_K = torch.tensor(self.scales, dtype=torch.float64)
        return scale_K[:, None] * scale_K

    def _gram_GG(self) -> Tensor:
        groups = self.owner_G.numel()
        return self.record[: groups**2].reshape(groups, groups).cpu()

    def _by_unit(self, values_GF: Tensor) -> Tensor:
        """Sums over the groups of a unit and kind, [B, K, F]."""
        shape = (len(self.unit_ids), len(self.kinds), values_GF.shape[1])
        sums = values_GF.new_zeros(shape[0] * shape[1], shape[2])
        return sums.index_add_(0, self.owner_G.to(sums.device), values_GF).view(shape)

    def gram_BBKK(self) -> Tensor:
        """<g_k,i, g_l,j> of the units of this micro-batch, the losses' factors divided out."""
        half_BKG = self._by_unit(self._gram_GG())
        gram_BKBK = torch.stack([self._by_unit(unit_KG.T) for unit_KG in half_BKG])
        return gram_BKBK.permute(0, 1, 3, 2) / self.scale_KK()

    def sketch_BKF(self) -> Tensor:
        """Sketches by unit and kind, fp64, on the device of the statistics."""
        assert self.sketch_GF is not None
        scale_K1 = torch.tensor(self.scales, dtype=torch.float64, device=self.sketch_GF.device)
        return self._by_unit(self.sketch_GF.double()) / scale_K1[:, None]

    def within_BKK(self) -> Tensor:
        """tr Cov(g_k,i, g_l,i | prompt), from the R pairs of a kind as independent replicates.

        A kind of one pair is taken to be fixed given the prompt's data, and different kinds to be
        sampled independently: diagonal, R / (R - 1) [sum_r |u_r|^2 - |sum_r u_r|^2 / R].
        """
        gram_GG, kinds = self._gram_GG(), len(self.kinds)
        within_BKK = torch.zeros(len(self.unit_ids), kinds, kinds, dtype=torch.float64)
        for owner in self.owner_G.unique().tolist():
            pairs = (self.owner_G == owner).nonzero()[:, 0]
            if (count := len(pairs)) > 1:
                gram_RR = gram_GG[pairs][:, pairs]
                unit, kind = divmod(owner, kinds)
                within_BKK[unit, kind, kind] = count * within_unit(gram_RR[None, None])[0, 0]
        return within_BKK / self.scale_KK()


def combine(
    micro_batches: Sequence[MicroBatchStats],
    mode: str,
    cross: str,
    kind_sums: Sequence[Tensor | None],
    process_group: Any,
    ess: Mapping[str, float] | None = None,
    within: bool = False,
) -> StepStats:
    """Products within a micro-batch from its Gram matrix, the others from sketches or kind sums,
    the losses' factors divided out of the last.

    Units whose effective sample size is below `MIN_ESS` are left out and counted.
    """
    kept = [
        torch.tensor(
            [micro.counted and (ess is None or ess[name] >= MIN_ESS) for name in micro.unit_ids]
        )
        for micro in micro_batches
    ]
    skipped = sum(
        int((~keep_B).sum()) for m, keep_B in zip(micro_batches, kept, strict=True) if m.counted
    )
    kinds = micro_batches[0].kinds
    ranks = 1 if process_group is None else dist.get_world_size(process_group)
    alone = len(micro_batches) == 1 and ranks == 1
    if cross == "none" and not alone:
        raise RuntimeError(
            f"result: cross='none' expects one micro-batch on one rank, got "
            f"{len(micro_batches)} on {ranks}"
        )
    sketches = []
    if micro_batches[0].sketch_GF is not None:
        sketches = [m.sketch_BKF()[keep_B] for m, keep_B in zip(micro_batches, kept, strict=True)]
    if mode != "exact":
        gram, rows = _sketched(sketches, process_group)
    else:
        exact = [m.gram_BBKK()[k][:, k] for m, k in zip(micro_batches, kept, strict=True)]
        gram = torch.cat([part.diagonal().permute(2, 0, 1) for part in exact])
        rows = torch.cat([part.sum(1) for part in exact])
        if cross == "sketch" and not alone:
            rows = rows + _sketched_cross(sketches, gram, process_group)
    gram = 0.5 * (gram + gram.mT)
    more: dict[str, Any] = {}
    if within:
        parts = [m.within_BKK()[keep_B] for m, keep_B in zip(micro_batches, kept, strict=True)]
        more["within_BKK"] = torch.cat(parts)
    if ess is not None:
        sizes = [ess.get(name, 0.0) for micro in micro_batches for name in micro.unit_ids]
        more["ess_B"] = torch.tensor(sizes, dtype=torch.float64)[torch.cat(kept)]
    if process_group is not None:
        device = micro_batches[0].record.device
        gram, rows = (_all_gather(t, device, process_group) for t in (gram, rows))
        more = {name: _all_gather(t, device, process_group) for name, t in more.items()}
        skipped = int(_reduce(torch.tensor(skipped, device=device), process_group))
    if cross == "exact" and mode == "exact" and not alone:
        if skipped:
            raise RuntimeError(
                f"result: expected an effective sample size >= {MIN_ESS} in every unit for "
                f"cross='exact', whose sums hold all units; got {skipped} below; use cross='sketch'"
            )
        return StepStats(kinds, gram, _sum_products(kind_sums, process_group), **more)
    return StepStats(kinds, gram, rows.sum(0), rows, skipped=skipped, **more)


def _sketched(own: Sequence[Tensor], group: Any) -> tuple[Tensor, Tensor]:
    """<g_k,i, g_l,i> and <g_k,i, G_l>, [B, K, K] both, from the sketches of each micro-batch."""
    total_KF = _reduce(torch.stack([part.sum(0) for part in own]).sum(0), group)
    gram = torch.cat([part @ part.mT for part in own])
    rows = torch.cat([part @ total_KF.T for part in own])
    return gram.cpu(), rows.cpu()


def _sketched_cross(own: Sequence[Tensor], gram_BKK: Tensor, group: Any) -> Tensor:
    """<g_k,i, G_l - the part of G_l that is in i's micro-batch>, [B, K, K].

    Calibrated by what is known of the same sketches: the exact sum of |d_i|^2 over the sketched
    one. The error that all units share, as where their gradients are parallel, cancels; the ratio's
    own bias is of the order of the variance of that sum.
    """
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
