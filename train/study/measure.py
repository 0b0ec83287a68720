"""The error of the mixed gradient by brute force, beside what the package estimates.

At a checkpoint every unit's trace, empty and marginal gradients are taken by plain autograd through
the model's own padded logits: no packing, no fused head, no `GradStats`. One half of the units
gives the truth, the mean marginal gradient; random batches of the other half give |a t_bar +
(1 - a) e_bar - truth|^2 for each a; then the halves change places. Beside it stand a* and its
interval from `GradStats` and `AlphaEstimator`, for both references, from the same units in steps.

Suffixes: M units, K = 3 kinds (trace, empty, marginal), R random batches, J jackknife groups.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from tqdm import tqdm
from transformers import PreTrainedModel

from bvpo_kernels.grad_stats import GradStats
from bvpo_kernels.mixing import MARGINAL, AlphaEstimator
from bvpo_kernels.mixing.moments import MIN_ESS, MIN_UNITS
from bvpo_kernels.mixing.optimum import t_quantile
from bvpo_kernels.types import TRACE, Unit
from train.model.head import FusedHeadLM
from train.study.arms import PROBE_TRACES, World, pair_rows, reference_scores
from train.study.marginal import margin_and_weights, marginal_loss, marginal_rows, measure
from train.study.preferences import score_rows

GRID = tuple(k / 20 for k in range(21))
BATCHES = 400
GROUPS = 16
# Numbers of a gradient that are multiplied at a time: fp32 products are summed in fp64 beyond.
_STRETCH = 65536


def unit_gradients(
    model: PreTrainedModel, unit: Unit, reference_4: Tensor, world: World
) -> tuple[Tensor, float]:
    """[3, D] fp32, gradients of the DPO losses of trace, empty and marginal; the least ESS."""
    rows = [*pair_rows(unit), *marginal_rows(unit, world.cfg.pool_traces)]
    parameters = list(model.parameters())
    losses = []
    for first in (0, 2):
        ratio = score_rows(model, rows[first : first + 2]) - reference_4[first : first + 2]
        losses.append(-logsigmoid(world.cfg.beta * (ratio[0] - ratio[1])))
    scores_2N = score_rows(model, rows[4:]).view(2, -1)
    losses.append(marginal_loss(scores_2N, unit, world.posterior, world.cfg.beta))
    ess = margin_and_weights(scores_2N, unit, world.posterior)[2].item()
    parts = [torch.autograd.grad(loss, parameters) for loss in losses]
    return torch.stack([torch.cat([p.flatten() for p in part]) for part in parts]), ess


def gram_matrix(rows_ND: Tensor) -> Tensor:
    """<g_i, g_j>, [N, N] fp64."""
    gram = torch.zeros(len(rows_ND), len(rows_ND), dtype=torch.float64)
    for part in rows_ND.split(_STRETCH, dim=1):
        gram += (part @ part.T).double()
    return gram


class BruteForce:
    """MSE(a) of random batches from the Gram matrix of all gradients, [K, M, K, M]."""

    def __init__(self, gram_KMKM: Tensor, batch: int, seed: int) -> None:
        self.gram, self.batch = gram_KMKM, batch
        self.units = gram_KMKM.shape[1]
        self.rng = np.random.default_rng(seed)
        order = self.rng.permutation(self.units)
        self.halves = (order[: self.units // 2], order[self.units // 2 :])

    def _products(self, truth: np.ndarray, others: np.ndarray) -> Tensor:
        """Means over random batches of <x, y> for x, y in (t_bar - m, e_bar - m), [2, 2], less the
        noise of m itself, which adds the same to all of them."""
        size = min(self.batch, len(others))
        weights = torch.zeros(BATCHES, self.units, dtype=torch.float64)
        for row in weights:
            row[self.rng.choice(others, size, replace=False)] = 1 / size
        mean_m = torch.zeros(self.units, dtype=torch.float64)
        mean_m[truth] = 1 / len(truth)
        gram = self.gram
        own = torch.einsum("rm,kmln,rn->rkl", weights, gram[:2, :, :2], weights)
        cross = torch.einsum("rm,kmn,n->rk", weights, gram[:2, :, 2], mean_m)
        square = mean_m @ gram[2, :, 2] @ mean_m
        noise = (gram[2, truth, 2, truth].mean() - square) / (len(truth) - 1)
        products = own - cross[:, :, None] - cross[:, None, :] + square - noise
        return products.mean(0)

    def _both(self, left_out: np.ndarray) -> Tensor:
        first, second = (np.setdiff1d(half, left_out) for half in self.halves)
        return (self._products(first, second) + self._products(second, first)) / 2

    def curve(self) -> dict[str, Any]:
        """MSE on `GRID`, its argmin with a delete-a-group jackknife interval of 95 %."""
        none = np.empty(0, dtype=int)
        whole = self._both(none)
        order = self.rng.permutation(self.units)
        left_out = [argmin(self._both(group)) for group in np.array_split(order, GROUPS)]
        spread = np.var(left_out) * (GROUPS - 1)
        raw, half = argmin(whole), t_quantile(0.975, GROUPS - 1) * float(np.sqrt(spread))
        return {
            "a": list(GRID),
            "mse": [error(whole, a) for a in GRID],
            "argmin": raw,
            "low": min(1.0, max(0.0, raw - half)),
            "high": min(1.0, max(0.0, raw + half)),
            "se": float(np.sqrt(spread)),
        }


def error(products_22: Tensor, a: float) -> float:
    mix = torch.tensor([a, 1 - a], dtype=torch.float64)
    return (mix @ products_22 @ mix).item()


def argmin(products_22: Tensor) -> float:
    """Unclipped minimum of the parabola."""
    tt, te, ee = products_22[0, 0], products_22[0, 1], products_22[1, 1]
    return ((ee - te) / (tt - 2 * te + ee)).item()


def moments_of(gram_KMKM: Tensor) -> dict[str, float]:
    """Unbiased traces of covariances and squared distances of means, from the Gram matrix."""
    units = gram_KMKM.shape[1]
    same = torch.einsum("kmlm->kl", gram_KMKM)
    every = gram_KMKM.sum((1, 3))
    covariance = (same - every / units) / (units - 1)
    means = (every - same) / (units * (units - 1))

    def distance(u: int, v: int) -> float:
        return (means[u, u] - 2 * means[u, v] + means[v, v]).item()

    return {
        "trS_t": covariance[0, 0].item(), "trS_e": covariance[1, 1].item(),
        "trS_te": covariance[0, 1].item(), "trS_m": covariance[2, 2].item(),
        "delta_sq": distance(0, 1), "bias_t_sq": distance(0, 2), "bias_e_sq": distance(1, 2),
        "mu_m_sq": means[2, 2].item(),
    }  # fmt: skip


def estimate(model: PreTrainedModel, units: Sequence[Unit], world: World) -> dict[str, Any]:
    """a* of both references as the package measures it, from steps over the units.

    The steps have half the units of a training step, so that there are enough of them for their
    spread to give the interval; a* is that of a whole step.
    """
    cfg = world.cfg
    policy = FusedHeadLM(model)
    head = model.get_output_embeddings()
    stats = GradStats(policy, cross="exact", seed=world.seed, head=head)
    references = reference_scores(world, units)
    estimators = {
        name: AlphaEstimator(reference=name, ema_halflife=float("inf"), warmup=0)
        for name in (TRACE, MARGINAL)
    }
    size = max(MIN_UNITS, cfg.units_per_step // 2)
    for start in range(0, len(units) - size + 1, size):
        part = units[start : start + size]
        step = measure(policy, stats, part, world.posterior, references, PROBE_TRACES, cfg.beta)
        for estimator in estimators.values():
            estimator.update(step)
    return {
        name: {**asdict(estimator.estimate(cfg.units_per_step)), "log": estimator.log()}
        for name, estimator in estimators.items()
    }


def measure_checkpoint(model: PreTrainedModel, world: World, step: int) -> dict[str, Any]:
    """Everything that is measured at a checkpoint."""
    start, units = time.perf_counter(), world.preferences.units[: world.cfg.pool]
    references = reference_scores(world, units)
    gradients, sizes = [], []
    for unit in tqdm(units, desc=f"seed {world.seed}: gradients at step {step}", mininterval=2):
        rows_KD, ess = unit_gradients(model, unit, references[unit.unit_id], world)
        gradients.append(rows_KD)
        sizes.append(ess)
    kept = [index for index, ess in enumerate(sizes) if ess >= MIN_ESS]
    gradients = [gradients[index] for index in kept]
    if len(kept) < 2 * world.cfg.units_per_step:
        raise ValueError(
            f"pool: expected {2 * world.cfg.units_per_step} units with an effective sample size of "
            f"{MIN_ESS:g} after step {step}, got {len(kept)} of {len(units)}; a lower lr keeps the "
            f"policy nearer to the traces' sampler"
        )
    rows = torch.stack(gradients, 1)  # [K, M, D]
    kinds, count = rows.shape[:2]
    gram = gram_matrix(rows.flatten(0, 1)).view(kinds, count, kinds, count)
    del rows, gradients
    brute = BruteForce(gram, world.cfg.units_per_step, world.seed).curve()
    return {
        "step": step, "seed": world.seed, "units": count, "skipped": len(units) - count,
        "ess": float(np.mean(sizes)), "batch": world.cfg.units_per_step, "brute": brute,
        "moments": moments_of(gram), "package": estimate(model, [units[k] for k in kept], world),
        "seconds": time.perf_counter() - start,
    }  # fmt: skip
