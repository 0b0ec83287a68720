"""The training loop: read `Trainer.run` and `Trainer.train_step` from top to bottom."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from bvpo_kernels.grad_stats import LossScale
from bvpo_kernels.head import Certificate, tail_certificates
from bvpo_kernels.losses import LOSSES
from bvpo_kernels.mixing import MARGINAL, StepStats
from bvpo_kernels.types import EMPTY, TRACE, BVPOLoss, Unit
from train import online, reference
from train.alpha import build_alpha, build_stats, describe
from train.checkpoint.checkpoint import Checkpointer
from train.checkpoint.state import TrainState, run_identity
from train.config import OptimConfig, RunConfig
from train.inputs import check_measurable, load_inputs, plan_of
from train.model.adapters import save_adapter
from train.model.export import save_model
from train.model.head import FusedHeadLM, build_policy
from train.objective import MetricSum, Objective, evaluate
from train.online import OnlineReference
from train.reference import ReferenceCache
from train.runtime import parallel, report
from train.runtime.interrupts import Interruption
from train.runtime.parallel import ALONE, World, synchronise, whole
from train.runtime.profiling import recording
from train.runtime.run_dir import check_run_dir, set_aside, write_config
from train.sizing import head_memory
from train.sizing.dry_run import planned
from train.sizing.out_of_memory import explained
from train.sizing.throughput import StepFlops, Stopwatch, peak_flops, utilization
from train.steps import MicroBatch, Step
from train.trace_sum import UNTRAINED


class NonFiniteError(FloatingPointError):
    """A score, loss or gradient that is NaN or infinite; the weights are those of the last step."""


@dataclass
class Findings:
    """What the micro-batches of a step on this rank gave besides gradients.

    ess: unit id -> effective sample size of its extra traces; None where no unit has any.
    problems: why the optimizer must not move.
    """

    metrics: MetricSum
    ess: dict[str, float] | None
    problems: list[str]


def lr_factor(step: int, num_steps: int, cfg: OptimConfig) -> float:
    """Linear warm-up from 1/w to 1 over the w first steps, then cosine to `min_lr_ratio`.

    The last step, `num_steps` - 1, runs at `min_lr_ratio` unless it is still part of the warm-up.
    """
    warmup = math.ceil(cfg.warmup_ratio * num_steps)
    if step < warmup:
        return (step + 1) / warmup
    # Step w - 1 is at 1, so the decay begins there.
    progress = min((step + 1 - warmup) / max(num_steps - warmup, 1), 1.0)
    return cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * (1 + math.cos(math.pi * progress)) / 2


def build_optimizer(model: nn.Module, cfg: OptimConfig) -> torch.optim.AdamW:
    """AdamW over what is trained; vectors (norms, biases) do not decay."""
    trained = [param for param in model.parameters() if param.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": cfg.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=cfg.betas, fused=True)


class Trainer:
    """One run: the policy, its reference scores, the plan of its steps and its optimizer.

    Args:
        cfg: the run; `train.pairs` and `model.name` have been read into the other arguments.
        policy: what is trained, in place.
        tokenizer: saved beside the final model; None saves none.
        train_units, held_out: disjoint; `held_out` may be empty; the same on every rank.
        world: the ranks that the policy is spread over.
        frozen: for `reference: frozen_copy`, a second model with the policy's weights.
    """

    def __init__(
        self,
        cfg: RunConfig,
        policy: FusedHeadLM,
        tokenizer: Any,
        train_units: Sequence[Unit],
        held_out: Sequence[Unit],
        world: World = ALONE,
        frozen: FusedHeadLM | None = None,
    ) -> None:
        self.cfg, self.policy, self.tokenizer, self.held_out = cfg, policy, tokenizer, held_out
        self.world = world
        self.run_dir = Path(cfg.run_dir)
        self.plan = plan_of(cfg, train_units, world)
        check_measurable(self.plan, cfg)
        self.alpha = build_alpha(cfg.alpha)
        policy.self_check()
        scores: ReferenceCache | OnlineReference | None = None
        if LOSSES[cfg.loss.name].reference:
            if cfg.reference == "cache":
                scores = reference.load_or_build(policy, self.plan, held_out, cfg, world)
            else:
                scores = online.online_reference(cfg, policy, frozen)
        parallel.reshard(policy)
        self.objective = Objective(policy, scores, cfg.loss, world)
        head = policy.model.get_output_embeddings()
        self.stats = build_stats(cfg.alpha, policy, head, cfg.seed)
        policy.train()  # transformers checkpoints activations in this mode only; no dropout is left
        parallel.checkpoint_activations(policy.model, cfg.train.checkpoint_layers)
        self.optimizer = build_optimizer(policy, cfg.optim)
        self.flops = StepFlops(policy.model)
        self.peak = peak_flops(world.device, getattr(torch, cfg.model.compute_dtype))
        num_steps = self.plan.num_steps
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: lr_factor(step, num_steps, cfg.optim)
        )
        # Held-out metrics before the first step and after the last that was evaluated.
        self.before: dict[str, float] = {}
        self.after: dict[str, float] = {}
        self.state = TrainState(policy, self.optimizer, self.schedule, self.alpha, self.stats)
        # Known by their scores; a signal may ask for a checkpoint when these weights are gone.
        start = scores.fingerprint["weights"] if isinstance(scores, ReferenceCache) else None
        identity = run_identity(
            cfg, self.plan.units, held_out, start or reference.weights_digest(policy.model)
        )
        self.checkpointer = Checkpointer(
            self.run_dir / "checkpoints", world, cfg.checkpoint, identity, cfg.seed
        )
        self.resumed = False

    def run(self) -> int:
        """Train, evaluate, save the model and draw the report; returns the exit code.

        Goes on where a checkpoint is. A run that is told to stop returns after its step, with a
        checkpoint but without a model and a report. What another run left in the folder is kept.
        """
        eval_every, num_steps = self.cfg.train.eval_every, self.plan.num_steps
        main, start, saving = self.world.is_main, self.resume(), Stopwatch()
        self._take_folder(start)
        with (
            report.RunLog(self.run_dir, active=main, step=start) as log,
            recording(self.cfg.profile, self.run_dir, self.world.rank) as profiled,
            Interruption() as interruption,
        ):
            if start == 0:
                self.before = self.after = self.evaluate(log, 0)
            bar = tqdm(
                range(start, num_steps), desc="train", unit="step", initial=start, total=num_steps,
                disable=not main,
            )  # fmt: skip
            for step in bar:
                with explained(self.cfg, self.world.size, self.world.rank):
                    line = self.train_step(step)
                profiled.step()
                log.write("train", step + 1, line | saving.log())
                bar.set_postfix(loss=f"{line['loss']:.4f}")
                if step == 0 and self.cfg.loss.name == "dpo" and main:
                    tqdm.write(first_loss(line["loss"], line["alpha"], self.plan[0]))
                last = step + 1 == num_steps
                stop = self.world.any(interruption.requested) and not last
                if last or (eval_every and (step + 1) % eval_every == 0):
                    self.after = self.evaluate(log, step + 1)
                saving = self._save(step + 1, stop)
                if stop:
                    return self._stop(step + 1, interruption)
        self.checkpointer.finish()
        save_model(self.policy.model, self.tokenizer, self.run_dir / "model", self.world)
        save_adapter(self.policy.model, self.run_dir / "adapter", self.world)
        if main:
            self._report()
        return 0

    def resume(self) -> int:
        """Go on from the newest whole checkpoint; returns the optimizer steps done, 0 if none."""
        loaded = self.checkpointer.load_latest(self._state_dict)
        if loaded is None:
            return 0
        self.state.load_state_dict(loaded.state)
        self.before, self.after = loaded.state["evaluation"]
        self.resumed = True
        if self.world.is_main:
            print(f"resumed after step {loaded.step} of {self.plan.num_steps}")
        return loaded.step

    def _take_folder(self, step: int) -> None:
        """Before the log is opened: a new run keeps what an earlier one left."""
        if self.world.is_main:
            if step == 0 and (kept := set_aside(self.run_dir)) is not None:
                print(f"run_dir: what an earlier run left in {self.run_dir} is now in {kept}")
            write_config(self.cfg)
        self.world.barrier()

    def _state_dict(self) -> dict[str, Any]:
        return {**self.state.state_dict(), "evaluation": [self.before, self.after]}

    def _save(self, step: int, stop: bool) -> Stopwatch:
        """A checkpoint after every n-th step, where the run is told to stop, and at its end if it
        has any; the log's lines are written by then: the time that it takes from training is for
        the line of the step after it."""
        every, watch = self.cfg.checkpoint.every, Stopwatch()
        end = step == self.plan.num_steps and (every is not None or self.resumed)
        if stop or end or (every is not None and step % every == 0):
            with watch("checkpoint"):
                self.checkpointer.save(step, self._state_dict())
        return watch

    def _stop(self, steps: int, interruption: Interruption) -> int:
        """End a run after some steps because a rank was told to."""
        self.checkpointer.finish()
        how = "the same command" if self.cfg.checkpoint.resume else "checkpoint.resume true"
        if self.world.is_main:
            tqdm.write(
                f"stopped by a signal after step {steps} of {self.plan.num_steps}; {how} goes on "
                f"from its checkpoint"
            )
        return interruption.exit_code

    def _report(self) -> None:
        report.draw(self.run_dir / "log.jsonl", self.run_dir / "report.png")
        if self.held_out:
            print(report.before_after_table(self.before, self.after, len(self.held_out)))
        summary = report.alpha_summary(
            self.alpha.log(), self.cfg.train.units_per_step, describe(self.stats)
        )
        print(summary, end="")
        if self.cfg.train.measure_head_memory and self.world.mesh is None:
            print(head_memory.compare(self.policy, self.plan[0].micro_batches[0].batch))

    def train_step(self, step: int) -> dict[str, float]:
        """One optimizer step; returns its log line, the same on every rank but for times.

        Raises:
            NonFiniteError: on every rank, before the optimizer moves, naming the units.
        """
        watch, alpha = Stopwatch(), self.alpha.value()
        with watch("data"):
            data = self.plan[step]
        found = Findings(MetricSum(), {} if MARGINAL in data.kinds else None, [])
        with watch("reference"):
            self.objective.prepare(data.micro_batches)
        with watch("forward"):
            kl = self.objective.kl(data.micro_batches)
        with tail_certificates() if self.policy.tail_tolerance > 0 else nullcontext() as tails:
            for number, micro in enumerate(data.micro_batches, 1):
                last = number == len(data.micro_batches)
                synchronise(self.policy, last or self.cfg.parallel.sync_every_micro_batch)
                with self._measured(micro) as scale:
                    with watch("forward"):
                        loss = self._loss(micro, alpha, data, kl, found)
                    if scale is not None and found.ess is not None:
                        scale.scale({MARGINAL: UNTRAINED / data.unit_counts[MARGINAL]})
                    with watch("backward"):
                        loss.backward()
        with watch("optimizer"):
            grad_norm = self._clip(data, found)
            self._stop_if(found.problems, step)
            lr = self.optimizer.param_groups[0]["lr"]
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad(set_to_none=True)
        if self.stats is not None:
            with watch("statistics"):
                self.alpha.update(self._statistics(data, found.ess))
        line = found.metrics.result(self.world) | _tail_values(tails, self.world)
        return line | self._step_values(data, watch, alpha, lr, grad_norm)

    def _loss(
        self,
        micro: MicroBatch,
        alpha: float,
        data: Step,
        kl: Mapping[str, Tensor] | None,
        found: Findings,
    ) -> Tensor:
        """What a micro-batch adds to the loss of the step; what is wrong with it is found."""
        if micro.is_filler:
            return 0.0 * self.objective.scores(micro).sum()
        result = self.objective.loss(micro, alpha, data.pair_counts, kl, data.unit_counts)
        found.problems += _non_finite_scores(result.scores_S, micro)
        found.metrics.add(result)
        found.problems += _non_finite_loss(result, micro)
        if found.ess is None:
            return result.loss
        marginal = self.objective.marginal(result.scores_S, micro)
        found.ess |= marginal.ess
        return result.loss + UNTRAINED / data.unit_counts[MARGINAL] * marginal.total

    def _measured(self, micro: MicroBatch) -> AbstractContextManager[LossScale | None]:
        """Where a micro-batch runs: measured if alpha is estimated and no unit lacks a kind."""
        if self.stats is None or not micro.measured:
            return nullcontext()
        return self.stats.collect(micro.batch.to(self.policy.device), counted=not micro.is_filler)

    def _statistics(self, data: Step, ess: Mapping[str, float] | None) -> StepStats:
        """Of the units with every kind; the others are counted as skipped."""
        assert self.stats is not None
        if any(micro.measured for micro in data.micro_batches):
            stats = self.stats.result(self.world.group, ess=ess)
        else:
            kinds, none_KK = data.kinds, torch.zeros(len(data.kinds), len(data.kinds)).double()
            stats = StepStats(kinds, none_KK[None][:0], none_KK)
        return replace(stats, skipped=stats.skipped + data.num_lacking)

    def _clip(self, data: Step, found: Findings) -> float:
        """Scale the gradient to `max_grad_norm`; returns its norm before that, over all ranks."""
        norm = nn.utils.clip_grad_norm_(self.policy.parameters(), self.cfg.optim.max_grad_norm)
        value = whole(norm).item()
        if not math.isfinite(value):
            names = [unit.unit_id for unit in data.units]
            found.problems.append(f"gradient norm {value} from the units {names}")
        return value

    def _stop_if(self, problems: Sequence[str], step: int) -> None:
        """Raise on every rank if there is a problem on any."""
        if self.world.any(bool(problems)):
            found = [text for rank in self.world.gather_objects(list(problems)) for text in rank]
            raise NonFiniteError(f"step {step}: {found[0]}")

    def _step_values(
        self, data: Step, watch: Stopwatch, alpha: float, lr: float, grad_norm: float
    ) -> dict[str, float]:
        total = sum(watch.seconds.values())
        return {
            "epoch": data.epoch,
            "alpha": alpha,
            **self.alpha.log(),
            "lr": lr,
            "grad_norm": grad_norm,
            "tokens": data.num_tokens,
            "tokens_per_second": data.num_tokens / total,
            **utilization(self.flops(data.units), total, self.peak, self.world.size),
            "fill": data.fill,
            "micro_batches": len(data.micro_batches),
            "units_lacking_a_kind": data.num_lacking,
            **watch.log(),
        }

    def evaluate(self, log: report.RunLog, step: int) -> dict[str, float]:
        """Metrics of the held-out units after `step` steps; none if nothing was held out."""
        if not self.held_out:
            return {}
        metrics = evaluate(
            self.objective, self.held_out, self.alpha.value(), self.plan.token_budget
        )
        log.write("eval", step, metrics)
        return metrics


def first_loss(loss: float, alpha: float, data: Step) -> str:
    """The first loss beside that of equal policies: log 2, times the weights of the kinds that the
    step has."""
    weights = {TRACE: alpha, EMPTY: 1.0 - alpha}
    absent = [kind for kind, weight in weights.items() if weight and not data.pair_counts[kind]]
    share = sum(weight for kind, weight in weights.items() if kind not in absent)
    why = f"; no unit of the step has kind {absent[0]!r}" if absent else ""
    times = f"{share:g} " if absent else ""
    return f"first loss {loss:.4f} ({times}log 2 = {share * math.log(2):.4f}{why})"


def _tail_values(certificates: Sequence[Certificate] | None, world: World) -> dict[str, float]:
    """Share of the tokens that took the exact backward of the head; 1 where all did."""
    if certificates is None:
        return {}
    counts = (
        sum(int(c.num_tokens) for c in certificates),
        sum(int(c.num_dense) for c in certificates),
    )
    tokens, dense = (sum(n) for n in zip(*world.gather_objects(counts), strict=True))
    return {"tail/dense_share": dense / tokens if tokens else 1.0}


def _non_finite_scores(scores_S: Tensor, micro: MicroBatch) -> list[str]:
    """Name the units whose scores are NaN or infinite."""
    batch = micro.batch
    bad_S = ~scores_S.detach().isfinite().cpu()
    if not bool(bad_S.any()):
        return []
    unit_S = batch.group_unit_G[batch.pair_group_P].repeat_interleave(2)
    names = [batch.unit_ids[index] for index in unit_S[bad_S].unique().tolist()]
    return [f"non-finite score of the units {names}"]


def _non_finite_loss(result: BVPOLoss, micro: MicroBatch) -> list[str]:
    if bool(result.loss.isfinite()):
        return []
    return [f"loss {result.loss.item()} from the units {list(micro.batch.unit_ids)}"]


def run(cfg: RunConfig) -> int:
    """`train`: from the configuration to the final model and its report in `run_dir`."""
    check_run_dir(cfg)
    with parallel.start(cfg.parallel) as world:
        torch.manual_seed(cfg.seed)
        inputs = load_inputs(cfg)
        if world.is_main:
            print(inputs.describe(cfg))
        policy, tokenizer = build_policy(cfg, world)
        inputs.check_model(policy.model.config, tokenizer, cfg, world)
        frozen = build_policy(cfg, world)[0] if online.needs_copy(cfg) else None
        trainer = Trainer(cfg, policy, tokenizer, inputs.training, inputs.held_out, world, frozen)
        if not cfg.dry_run:
            return trainer.run()
        if world.is_main:
            print(planned(cfg, trainer.plan, policy, len(trainer.held_out), world))
        return 0
