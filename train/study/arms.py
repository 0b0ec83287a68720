"""One arm: preference training of the base model in one way, its log, and its accuracy."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from tqdm import tqdm
from transformers import PreTrainedModel

from bvpo_kernels.grad_stats import GradStats
from bvpo_kernels.losses import LOSSES
from bvpo_kernels.mixing import MARGINAL, AlphaEstimator
from bvpo_kernels.types import EMPTY, KINDS, TRACE, PackedBatch, Unit
from train import reference
from train.alpha import AlphaSource, FixedAlpha
from train.config import LossConfig, ModelConfig, OptimConfig, TrainConfig
from train.model.head import FusedHeadLM
from train.objective import MetricSum, Objective
from train.steps import StepPlan
from train.study import task
from train.study.config import Arm, StudyConfig
from train.study.marginal import Posterior, margin_and_weights, marginal_rows, measure
from train.study.model import generate
from train.study.preferences import Preferences, score_all
from train.trainer import build_optimizer, lr_factor

# Attention over a packed row costs its square; rows of this size are the fastest here.
PACK_TOKENS = 384
PROBE_TRACES = 4


@dataclass(frozen=True)
class World:
    """What all arms of a seed share: the base model, which is the reference, and its data."""

    cfg: StudyConfig
    seed: int
    base: PreTrainedModel
    preferences: Preferences
    posterior: Posterior
    test_N5: np.ndarray


def kinds_of(arm: Arm) -> tuple[str, ...]:
    """The kinds whose weight is not 0."""
    if isinstance(arm.weight, str):
        return KINDS
    return tuple(k for k, w in ((TRACE, arm.weight), (EMPTY, 1 - arm.weight)) if w > 0)


def units_of(arm: Arm, preferences: Preferences) -> list[Unit]:
    """The arm's units, with the pairs that it trains on.

    With K traces the further ones are those of the marginal, repeated where there are too few.
    """
    units = []
    source = [*preferences.units, *preferences.extra] if arm.double else preferences.units
    for unit in source:
        pairs = {kind: tuple(unit.pairs[kind]) for kind in kinds_of(arm)}
        if arm.traces > 1:
            members = (*pairs[TRACE], *unit.pairs[MARGINAL])
            pairs[TRACE] = tuple(members[k % len(members)] for k in range(arm.traces))
        units.append(Unit(unit.unit_id, pairs))
    return units


class Probe:
    """DPO losses of held-out units: trace, empty, and the marginal that both stand for."""

    def __init__(self, world: World) -> None:
        self.units, self.posterior = world.preferences.probe, world.posterior
        self.beta = world.cfg.beta
        self.reference = self._scores(world.base)

    def _scores(self, model: PreTrainedModel) -> list[Tensor]:
        """Per unit: chosen and rejected of trace and empty, then the marginal's 2 N."""
        groups = [pair_rows(unit) + marginal_rows(unit, PROBE_TRACES) for unit in self.units]
        flat = score_all(model, [row for rows in groups for row in rows])
        return list(flat.split([len(rows) for rows in groups]))

    def losses(self, model: PreTrainedModel) -> dict[str, float]:
        margins: dict[str, list[Tensor]] = {TRACE: [], EMPTY: [], MARGINAL: []}
        for unit, scores, ref in zip(self.units, self._scores(model), self.reference, strict=True):
            ratio = scores - ref
            margins[TRACE].append(ratio[0] - ratio[1])
            margins[EMPTY].append(ratio[2] - ratio[3])
            traces_2N = scores[4:].view(2, -1)
            margins[MARGINAL].append(margin_and_weights(traces_2N, unit, self.posterior)[0])
        return {
            kind: -logsigmoid(self.beta * torch.stack(m).double()).mean().item()
            for kind, m in margins.items()
        }


def pair_rows(unit: Unit) -> list[tuple[Sequence[int], Sequence[int]]]:
    """(prompt, response) of the trace pair, then of the empty pair."""
    pairs = [unit.pairs[kind][0] for kind in KINDS]
    return [(pair.prompt, side) for pair in pairs for side in (pair.chosen, pair.rejected)]


def reference_scores(world: World, units: Sequence[Unit]) -> dict[str, Tensor]:
    """unit id -> scores [4] of trace and empty pair under the base model."""
    flat = score_all(world.base, [row for unit in units for row in pair_rows(unit)]).split(4)
    return {unit.unit_id: scores for unit, scores in zip(units, flat, strict=True)}


class ArmTrainer:
    """The steps of one arm. `policy` starts as a copy of the base model."""

    def __init__(self, world: World, arm: Arm) -> None:
        cfg = world.cfg
        self.world, self.arm = world, arm
        self.policy = FusedHeadLM(copy.deepcopy(world.base))
        size = cfg.units_per_step * (2 if arm.double else 1)
        pack_tokens = PACK_TOKENS * (2 if arm.traces > 1 else 1)
        options = TrainConfig(
            units_per_step=size, tokens_per_micro_batch=pack_tokens, max_steps=cfg.steps
        )
        self.plan = StepPlan(units_of(arm, world.preferences), options, world.seed)
        self.beta = cfg.beta if arm.beta is None else arm.beta
        loss = LossConfig(name=arm.loss, beta=self.beta)  # type: ignore[arg-type]
        scores = None
        if LOSSES[arm.loss].reference:
            model_cfg = ModelConfig(name="study", compute_dtype="float32")
            scores = reference.build(self.policy, reference.first_packs(self.plan, ()), model_cfg)
        self.objective = Objective(self.policy, scores, loss)
        self.alpha: AlphaSource = self._alpha()
        self.stats = None
        if isinstance(arm.weight, str):
            head = self.policy.model.get_output_embeddings()
            self.stats = GradStats(self.policy, cross="exact", seed=world.seed, head=head)
        optim = OptimConfig(lr=cfg.lr, max_grad_norm=100.0)
        self.max_norm = optim.max_grad_norm
        self.optimizer = build_optimizer(self.policy, optim)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: lr_factor(step, cfg.steps, optim)
        )
        self.by_id = {unit.unit_id: unit for unit in world.preferences.units}
        self.references = reference_scores(world, world.preferences.units)

    def _alpha(self) -> AlphaSource:
        arm, cfg = self.arm, self.world.cfg
        if not isinstance(arm.weight, str):
            return FixedAlpha(arm.weight)
        every = cfg.measure_every if arm.weight == MARGINAL else 1
        return AlphaEstimator(
            reference=arm.weight,
            ema_halflife=max(1.0, cfg.halflife / every),
            warmup=max(1, cfg.warmup // every),
        )

    def step(self, number: int) -> dict[str, float]:
        """One optimizer step; its log line."""
        data, metrics, start = self.plan[number], MetricSum(), time.perf_counter()
        if self.arm.weight == MARGINAL and number % self.world.cfg.measure_every == 0:
            self._measure_marginal([unit.unit_id for unit in data.units])
        weight, measured = self.alpha.value(), self.arm.weight == TRACE
        kl = self.objective.kl(data.micro_batches)
        for micro in data.micro_batches:
            with self._measured(micro.batch):
                result = self.objective.loss(micro, weight, data.pair_counts, kl)
                result.loss.backward()
            metrics.add(result)
        norm = nn.utils.clip_grad_norm_(self.policy.parameters(), self.max_norm)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        if measured and self.stats is not None:
            self.alpha.update(self.stats.result())
        line = {"step": number + 1, "alpha": weight, "grad_norm": norm.item(), **metrics.result()}
        return line | self.alpha.log() | {"seconds": time.perf_counter() - start}

    def _measured(self, batch: PackedBatch) -> AbstractContextManager:
        """Where a micro-batch runs: measured if the weight comes from the steps' own gradients."""
        if self.stats is None or self.arm.weight != TRACE:
            return nullcontext()
        return self.stats.collect(batch)

    def _measure_marginal(self, names: Sequence[str]) -> None:
        units = [self.by_id[name] for name in names]
        assert self.stats is not None
        stats = measure(
            self.policy, self.stats, units, self.world.posterior, self.references,
            PROBE_TRACES, self.beta,
        )  # fmt: skip
        self.alpha.update(stats)


def evaluate(model: PreTrainedModel, world: World) -> dict[str, Any]:
    """Accuracy on the test prompts in both modes, sampled as the training data were.

    `bits` says for each prompt, in hexadecimal, whether it was solved: arms share prompts, so their
    differences are known better than their accuracies.
    """
    result: dict[str, Any] = {}
    cfg = world.cfg
    for mode, thinking in (("thinking", True), ("no_thinking", False)):
        drawn = generate(model, world.test_N5, thinking, 1, cfg.temperature, 10**9 + world.seed)
        responses = [responses[0] for responses in drawn]
        right = [
            task.is_correct(row, r, thinking)
            for row, r in zip(world.test_N5, responses, strict=True)
        ]
        lengths = [r.index(task.CLOSE) if task.CLOSE in r else len(r) for r in responses]
        result[mode] = {
            "accuracy": float(np.mean(right)),
            "answered": float(np.mean([task.answer(r, thinking) is not None for r in responses])),
            "trace_length": float(np.mean(lengths)) if thinking else 0.0,
            "bits": np.packbits(right).tobytes().hex(),
        }
    return result


def run_arm(
    world: World, arm: Arm, keep: Callable[[int, PreTrainedModel], None] | None = None
) -> dict[str, Any]:
    """Train and evaluate one arm. keep: called with (steps done, model) at every checkpoint."""
    start, cfg = time.perf_counter(), world.cfg
    trainer, probe = ArmTrainer(world, arm), Probe(world)
    model = trainer.policy.model
    probes = [{"step": 0, **probe.losses(model)}]
    lines = []
    bar = tqdm(range(cfg.steps), desc=f"seed {world.seed}: {arm.name}", mininterval=2)
    for number in bar:
        lines.append(trainer.step(number))
        done = number + 1
        if done % cfg.probe_every == 0 or done == cfg.steps:
            probes.append({"step": done, **probe.losses(model)})
        if keep is not None and done in cfg.checkpoints:
            keep(done, model)
    training = time.perf_counter() - start
    scores = evaluate(model, world)
    return {
        "arm": arm.name,
        "seed": world.seed,
        "log": lines,
        "probe": probes,
        "evaluation": scores,
        "pairs_per_step": sum(trainer.plan[0].pair_counts.values()),
        "tokens_per_step": float(np.mean([trainer.plan[n].num_tokens for n in range(3)])),
        "seconds": {"train": training, "all": time.perf_counter() - start},
    }
