"""The objective of a micro-batch, its metrics over many, and the evaluation of held-out units."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from bvpo_kernels.losses import LOSSES, bvpo_loss
from bvpo_kernels.mixing import MARGINAL
from bvpo_kernels.packing import segment_sum
from bvpo_kernels.types import EMPTY, KINDS, TRACE, BVPOLoss, Unit
from train.config import LossConfig
from train.data import MicroBatch, count_pairs, make_step
from train.head import FusedHeadLM
from train.marginal import MarginalLoss, marginal_loss
from train.reference import ReferenceCache


class Objective:
    """L_c = a L_trace + (1 - a) L_empty of a micro-batch, as the configuration asks for it.

    Training and evaluation call the same one. Losses are divided by the pairs of the whole step,
    so that those of its micro-batches add up however the units were distributed.
    """

    def __init__(
        self, policy: FusedHeadLM, reference: ReferenceCache | None, cfg: LossConfig
    ) -> None:
        self.policy, self.reference, self.cfg = policy, reference, cfg
        self.options = {
            name: getattr(cfg, name) for name in LOSSES[cfg.name].options if hasattr(cfg, name)
        }

    def scores(self, micro: MicroBatch) -> Tensor:
        """log pi(y|x) of each segment, [S], in nats."""
        batch = micro.batch.to(self.policy.device)
        return segment_sum(self.policy(batch), batch.cu_seqlens)

    def loss(
        self, scores_S: Tensor, micro: MicroBatch, alpha: float, pair_counts: Mapping[str, int],
        kl: Mapping[str, Tensor] | None,
    ) -> BVPOLoss:  # fmt: skip
        batch = micro.batch.to(scores_S.device)
        weights = {TRACE: alpha, EMPTY: 1.0 - alpha, MARGINAL: 0.0}
        result = bvpo_loss(
            scores_S, self._reference_scores(micro), batch, {k: weights[k] for k in batch.kinds},
            loss=self.cfg.name, beta=self.cfg.beta, pair_counts=pair_counts, kl=kl, **self.options,
        )  # fmt: skip
        if MARGINAL not in batch.kinds:
            return result
        # Metrics of pairs say nothing of a loss on the sum over traces.
        own = {n: v for n, v in result.metrics.items() if not n.startswith(MARGINAL)}
        return replace(result, metrics=own)

    def marginal(self, scores_S: Tensor, micro: MicroBatch) -> MarginalLoss:
        """The loss on the sum over traces, of a micro-batch whose units have extra ones."""
        reference_S, batch = self._reference_scores(micro), micro.batch.to(scores_S.device)
        assert reference_S is not None, "losses of log-ratios have a reference"
        options = {"beta": self.cfg.beta, **self.options}
        return marginal_loss(scores_S, reference_S, batch, self.cfg.name, options)

    def _reference_scores(self, micro: MicroBatch) -> Tensor | None:
        if self.reference is None:
            return None
        return self.reference.scores(micro.units).to(self.policy.device)

    @torch.no_grad()
    def kl(self, micro_batches: Sequence[MicroBatch]) -> dict[str, Tensor] | None:
        """max(0, mean log pi / pi_ref) over all responses of a kind; None for losses without it.

        It needs the scores of the whole step before the first loss, hence a forward of its own.
        """
        if not LOSSES[self.cfg.name].kl:
            return None
        return self.kl_of_scores([(self.scores(micro), micro) for micro in micro_batches])

    def kl_of_scores(self, scored: Iterable[tuple[Tensor, MicroBatch]]) -> dict[str, Tensor] | None:
        """The same from scores that are at hand."""
        if not LOSSES[self.cfg.name].kl or self.reference is None:
            return None
        ratios: dict[str, list[Tensor]] = {}
        for scores_S, micro in scored:
            ratio_S = scores_S.cpu() - self.reference.scores(micro.units)
            kind_S = micro.batch.pair_kind_P.repeat_interleave(2)
            for index, kind in enumerate(micro.batch.kinds):
                ratios.setdefault(kind, []).append(ratio_S[kind_S == index])
        joined = {kind: torch.cat(parts) for kind, parts in ratios.items()}
        return {
            kind: (ratio.mean() if len(ratio) else ratio.sum()).clamp_min(0).to(self.policy.device)
            for kind, ratio in joined.items()
        }


class MetricSum:
    """Metrics of micro-batches -> those of their union: losses add, means are weighted by pairs."""

    def __init__(self) -> None:
        self.parts: list[Mapping[str, Tensor]] = []

    def add(self, result: BVPOLoss) -> None:
        """Keep the tensors: reading them here would make the host wait for the device."""
        self.parts.append(result.metrics)

    def result(self) -> dict[str, float]:
        """`loss` and, per kind, `kind/loss` and the means; pair counts and alpha are left out."""
        parts = [{name: value.item() for name, value in part.items()} for part in self.parts]
        pairs = {kind: sum(part.get(f"{kind}/pairs", 0) for part in parts) for kind in KINDS}
        result: defaultdict[str, float] = defaultdict(float)
        for part in parts:
            for name, value in part.items():
                kind, _, metric = name.partition("/")
                if name == "loss" or metric == "loss":
                    result[name] += value
                elif metric and metric != "pairs":
                    result[name] += value * part[f"{kind}/pairs"] / max(pairs[kind], 1)
        return dict(result)


@torch.no_grad()
def evaluate(
    objective: Objective, units: Sequence[Unit], alpha: float, token_budget: int
) -> dict[str, float]:
    """Metrics of `units` under the current weights: `loss` and, per kind, loss, rewards, logps.

    The packs are always the same ones, so that two evaluations differ by the weights only.
    """
    micro_batches = make_step(units, token_budget).micro_batches
    scored = [(objective.scores(micro), micro) for micro in micro_batches]
    kl, pair_counts = objective.kl_of_scores(scored), count_pairs(units)
    metrics = MetricSum()
    for scores_S, micro in scored:
        metrics.add(objective.loss(scores_S, micro, alpha, pair_counts, kl))
    return metrics.result()
