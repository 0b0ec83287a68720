"""The objective of a micro-batch, its metrics over many, and the evaluation of held-out units."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bvpo_kernels.head import linear_bvpo_loss
from bvpo_kernels.losses import LOSSES, bvpo_loss
from bvpo_kernels.mixing import MARGINAL
from bvpo_kernels.packing import segment_sum
from bvpo_kernels.types import EMPTY, KINDS, TRACE, BVPOLoss, Unit
from train.config import LossConfig
from train.model.head import FusedHeadLM
from train.online import OnlineReference
from train.reference import ReferenceCache
from train.runtime.parallel import ALONE, World, reshard
from train.steps import MicroBatch, make_step
from train.trace_sum import MarginalLoss, marginal_loss


class Objective:
    """L_c = a L_trace + (1 - a) L_empty of a micro-batch, as the configuration asks for it.

    Training and evaluation call the same one. Losses are divided by the pairs of the whole step,
    so that those of its micro-batches add up however the units were distributed.
    """

    def __init__(
        self,
        policy: FusedHeadLM,
        reference: ReferenceCache | OnlineReference | None,
        cfg: LossConfig,
        world: World = ALONE,
    ) -> None:
        self.policy, self.reference, self.cfg, self.world = policy, reference, cfg, world
        self.options = {
            name: getattr(cfg, name) for name in LOSSES[cfg.name].options if hasattr(cfg, name)
        }

    def scores(self, micro: MicroBatch) -> Tensor:
        """log pi(y|x) of each segment, [S], in nats."""
        batch = micro.batch.to(self.policy.device)
        return segment_sum(self.policy(batch), batch.cu_seqlens)

    def loss(
        self,
        micro: MicroBatch,
        alpha: float,
        pair_counts: Mapping[str, int],
        kl: Mapping[str, Tensor] | None,
        unit_counts: Mapping[str, int] | None = None,
    ) -> BVPOLoss:
        """The loss of a micro-batch from its tokens, the head in one pass where that serves."""
        batch = micro.batch.to(self.policy.device)
        mixture = self._mixture(micro, alpha, pair_counts, kl)
        # The loss on the sum over traces differentiates the scores once more.
        one_pass = False if MARGINAL in batch.kinds else None
        mixture |= {"unit_counts": unit_counts, "one_pass": one_pass}
        return self._own(self.policy(batch, loss=partial(linear_bvpo_loss, **mixture)), micro)

    def loss_of(
        self,
        scores_S: Tensor,
        micro: MicroBatch,
        alpha: float,
        pair_counts: Mapping[str, int],
        kl: Mapping[str, Tensor] | None,
    ) -> BVPOLoss:
        """The same from scores that are at hand."""
        mixture = self._mixture(micro, alpha, pair_counts, kl)
        batch = micro.batch.to(scores_S.device)
        return self._own(bvpo_loss(scores_S, batch=batch, **mixture), micro)

    def _mixture(
        self,
        micro: MicroBatch,
        alpha: float,
        pair_counts: Mapping[str, int],
        kl: Mapping[str, Tensor] | None,
    ) -> dict[str, Any]:
        weights = {TRACE: alpha, EMPTY: 1.0 - alpha, MARGINAL: 0.0}
        return {
            "ref_scores_S": self._reference_scores(micro),
            "alpha": {kind: weights[kind] for kind in micro.batch.kinds},
            "loss": self.cfg.name,
            "beta": self.cfg.beta,
            "pair_counts": pair_counts,
            "kl": kl,
            **self.options,
        }

    @staticmethod
    def _own(result: BVPOLoss, micro: MicroBatch) -> BVPOLoss:
        """Without the metrics of kind "marginal": those of pairs say nothing of its loss."""
        if MARGINAL not in micro.batch.kinds:
            return result
        own = {n: v for n, v in result.metrics.items() if not n.startswith(MARGINAL)}
        return result._replace(metrics=own)

    def marginal(self, scores_S: Tensor, micro: MicroBatch) -> MarginalLoss:
        """The loss on the sum over traces, of a micro-batch whose units have extra ones."""
        reference_S, batch = self._reference_scores(micro), micro.batch.to(scores_S.device)
        assert reference_S is not None, "losses of log-ratios have a reference"
        options = {"beta": self.cfg.beta, **self.options}
        return marginal_loss(scores_S, reference_S, batch, self.cfg.name, options)

    def _reference_scores(self, micro: MicroBatch) -> Tensor | None:
        if self.reference is None:
            return None
        return self.reference.of(micro).to(self.policy.device)

    def prepare(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Have the reference scores of what the other methods are given; all ranks call."""
        if self.reference is not None:
            self.reference.prepare(micro_batches)

    @torch.no_grad()
    def kl(self, micro_batches: Sequence[MicroBatch]) -> dict[str, Tensor] | None:
        """max(0, mean log pi / pi_ref) over all responses of a kind; None for losses without it.

        It needs the scores of the whole step before the first loss, hence a forward of its own.
        """
        if not LOSSES[self.cfg.name].kl:
            return None
        return self.kl_of_scores([(self.scores(micro), micro) for micro in micro_batches])

    def kl_of_scores(self, scored: Iterable[tuple[Tensor, MicroBatch]]) -> dict[str, Tensor] | None:
        """The same from scores that are at hand, of this rank's micro-batches; all ranks call."""
        if not LOSSES[self.cfg.name].kl or self.reference is None:
            return None
        sums: defaultdict[str, float] = defaultdict(float)
        counts: defaultdict[str, int] = defaultdict(int)
        for scores_S, micro in scored:
            if micro.is_filler:
                continue
            ratio_S = scores_S.cpu().double() - self.reference.of(micro).cpu()
            kind_S = micro.batch.pair_kind_P.repeat_interleave(2)
            for index, kind in enumerate(micro.batch.kinds):
                sums[kind] += ratio_S[kind_S == index].sum().item()
                counts[kind] += int((kind_S == index).sum())
        parts = self.world.gather_objects({kind: (sums[kind], counts[kind]) for kind in counts})
        result = {}
        for kind in sorted({kind for part in parts for kind in part}):
            total, count = (
                sum(n) for n in zip(*(p[kind] for p in parts if kind in p), strict=True)
            )
            result[kind] = torch.tensor(max(total / max(count, 1), 0.0), dtype=torch.float32)
        return {kind: value.to(self.policy.device) for kind, value in result.items()}


class MetricSum:
    """Metrics of micro-batches -> those of their union: losses add, means are weighted by pairs."""

    def __init__(self) -> None:
        self.parts: list[Mapping[str, Tensor]] = []

    def add(self, result: BVPOLoss) -> None:
        """Keep the tensors: reading them here would make the host wait for the device."""
        self.parts.append(result.metrics)

    def result(self, world: World = ALONE) -> dict[str, float]:
        """`loss` and, per kind, `kind/loss` and the means; pair counts and alpha are left out.

        Of the micro-batches of all ranks, each of which must call.
        """
        own = [{name: value.item() for name, value in part.items()} for part in self.parts]
        parts = [part for rank in world.gather_objects(own) for part in rank]
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
    world = objective.world
    step = make_step(units, token_budget, rank=world.rank, num_ranks=world.size)
    objective.prepare(step.micro_batches)
    scored = [(objective.scores(micro), micro) for micro in step.micro_batches]
    reshard(objective.policy)
    kl, metrics = objective.kl_of_scores(scored), MetricSum()
    for scores_S, micro in scored:
        if not micro.is_filler:
            metrics.add(objective.loss_of(scores_S, micro, alpha, step.pair_counts, kl))
    return metrics.result(world)
