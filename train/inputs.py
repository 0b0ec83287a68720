"""What a run trains on: its file of pairs, checked against the options and the model."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from bvpo_kernels.mixing import MARGINAL
from bvpo_kernels.mixing.moments import MIN_UNITS
from bvpo_kernels.types import KINDS, Unit
from train.config import RunConfig
from train.model.models import tokenizer_fingerprint
from train.preferences.pairs import PairSet, load_pairs, meta_path, output_path, split_holdout
from train.runtime.parallel import ALONE, World
from train.steps import StepPlan, check_budget, lacks_a_kind
from train.trace_sum import check_traces, without_extra

_SIDES = ("prompt", "chosen", "rejected")
_SHOWN = 3


@dataclass(frozen=True)
class Inputs:
    """The file, and what the run takes of it: disjoint training and held-out units."""

    pairs: PairSet
    training: list[Unit]
    held_out: list[Unit]

    def check_model(
        self, config: PretrainedConfig, tokenizer: Any, cfg: RunConfig, world: World = ALONE
    ) -> None:
        """Refuse ids that mean nothing, or something else, to the model.

        Raises:
            ValueError: naming file and line of an id beyond the vocabulary; naming the sidecar, if
                it records another tokenizer than the model's.
        """
        size = config.get_text_config().vocab_size
        for unit in self.pairs.units:
            for what, ids in _sequences(unit):
                if (largest := max(ids)) >= size:
                    where = self.pairs.lines[unit.unit_id]
                    raise ValueError(
                        f"{where}: unit {unit.unit_id!r}, {what}: expected token ids below {size}, "
                        f"the vocabulary of model.name {cfg.model.name!r}, got {largest}"
                    )
        if tokenizer is not None and cfg.train.check_tokenizer:
            _check_tokenizer(self.pairs, tokenizer, cfg, world)

    def describe(self, cfg: RunConfig) -> str:
        """Lines for the reader: file, units, tokens, and what is left out or not measured."""
        used = [*self.training, *self.held_out]
        counts = {
            kind: sum(len(u.pairs.get(kind, ())) for u in used) for kind in (*KINDS, MARGINAL)
        }
        named = ", ".join(f"{n} {kind}" for kind, n in counts.items() if n or kind in KINDS)
        dropped = sum(map(_num_pairs, self.pairs.units)) - sum(map(_num_pairs, used))
        why = f" of kind {MARGINAL!r}, which nothing here reads" if dropped else ""
        lines = [
            f"pairs: {self.pairs.path}: {len(used)} units ({named} pairs), "
            f"{sum(unit.num_tokens for unit in used)} tokens; {len(self.training)} units to train "
            f"on, {len(self.held_out)} held out; dropped: {dropped} pairs{why}"
        ]
        if rest := len(self.training) % max(cfg.train.units_per_step, 1):
            lines.append(
                f"  {rest} of {len(self.training)} sit out each epoch, others each time "
                f"(train.units_per_step {cfg.train.units_per_step})"
            )
        if lacking := [unit for unit in self.training if lacks_a_kind(unit)]:
            fate = "trained on" if cfg.alpha.estimate is None else "trained on, not measured"
            shown = [f"{self.pairs.lines[u.unit_id]} has no {_absent(u)}" for u in lacking[:_SHOWN]]
            more = ", ..." if len(lacking) > _SHOWN else ""
            lines.append(
                f"  {len(lacking)} of {len(self.training)} lack a kind and are {fate}: "
                f"{', '.join(shown)}{more}"
            )
        return "\n".join(lines)


def pairs_path(cfg: RunConfig) -> Path:
    """The file that a run trains on: the one that is named, else what `rank` wrote.

    Raises:
        FileNotFoundError: if it is not there.
    """
    path = output_path(cfg) if cfg.train.pairs is None else Path(cfg.train.pairs)
    if not path.is_file():
        expected = "the output of `rank`" if cfg.train.pairs is None else "a file of pairs"
        raise FileNotFoundError(
            f"train.pairs: expected {expected}, got {path}: no such file; run `rank` first, or "
            f"name another one"
        )
    return path


def load_inputs(cfg: RunConfig) -> Inputs:
    """The configured pairs, split.

    Raises:
        FileNotFoundError: for a missing file.
        ValueError: naming file and line, or the option: as `load_pairs`, `split_holdout` and
            `check_traces`; for a unit that no micro-batch holds.
    """
    pairs = load_pairs(pairs_path(cfg))
    training, held_out = split_holdout(pairs.units, cfg.train.holdout, cfg.seed)
    training, held_out = check_traces(training, cfg), [without_extra(unit) for unit in held_out]
    check_budget([*training, *held_out], cfg.train.tokens_per_micro_batch, pairs.lines)
    return Inputs(pairs, training, held_out)


def plan_of(cfg: RunConfig, units: Sequence[Unit], world: World = ALONE) -> StepPlan:
    """The steps of the run, and this rank's part of them."""
    measured = cfg.alpha.estimate is not None
    return StepPlan(units, cfg.train, cfg.seed, world.rank, world.size, measured=measured)


def check_measurable(plan: StepPlan, cfg: RunConfig) -> None:
    """Refuse a measured weight where no step of the run can measure it.

    Raises:
        ValueError: naming the option.
    """
    if cfg.alpha.estimate is None:
        return
    if plan.units_per_step < MIN_UNITS:
        raise ValueError(
            f"train.units_per_step: expected at least {MIN_UNITS} with alpha.estimate, which takes "
            f"a variance over the units of a step, got {plan.units_per_step}"
        )
    if not any(count >= MIN_UNITS for count in plan.complete_units()):
        lacking = [unit for unit in plan.units if lacks_a_kind(unit)]
        shown = ", ".join(f"{u.unit_id!r} has no {_absent(u)}" for u in lacking[:_SHOWN])
        raise ValueError(
            f"alpha.estimate: expected a step with {MIN_UNITS} or more units of both kinds, got "
            f"none in {plan.num_steps} steps: {len(lacking)} of {len(plan.units)} training units "
            f"lack a kind ({shown}); rank with rank.both_kinds true, or use alpha.fixed"
        )


def _check_tokenizer(pairs: PairSet, tokenizer: Any, cfg: RunConfig, world: World) -> None:
    """The tokenizer that the sidecar records must be the model's."""
    settings: Any = pairs.meta.get("settings", {})
    recorded, source = settings.get("tokenizer"), settings.get("model.name")
    if recorded is None or recorded == (own := tokenizer_fingerprint(tokenizer)):
        return
    sidecar = meta_path(pairs.path)
    if source == cfg.model.name and (changed := _changed_versions(pairs)):
        # What is hashed is the library's own form of the tokenizer.
        if world.is_main:
            print(
                f"{sidecar}: the fingerprint of the tokenizer of {source!r} is another one now; "
                f"taken for the same tokenizer under other versions ({', '.join(changed)})"
            )
        return
    raise ValueError(
        f"{sidecar}: settings.tokenizer: the pairs hold ids of another tokenizer "
        f"({str(recorded)[:12]}, of {source!r}) than model.name {cfg.model.name!r} has "
        f"({own[:12]}); sample and rank with this model, or set train.check_tokenizer false if the "
        f"ids mean the same"
    )


def _changed_versions(pairs: PairSet) -> list[str]:
    versions = pairs.meta.get("versions")
    versions = versions if isinstance(versions, dict) else {}
    now = {name: importlib.metadata.version(name) for name in ("transformers", "tokenizers")}
    return [
        f"{name} {versions.get(name)} then, {version} now"
        for name, version in now.items()
        if versions.get(name) != version
    ]


def _sequences(unit: Unit) -> Iterator[tuple[str, Sequence[int]]]:
    for kind, pairs in unit.pairs.items():
        for number, pair in enumerate(pairs):
            for side in _SIDES:
                yield f"{kind} pair {number}, {side}", getattr(pair, side)


def _num_pairs(unit: Unit) -> int:
    return sum(map(len, unit.pairs.values()))


def _absent(unit: Unit) -> str:
    return " and no ".join(kind for kind in KINDS if not unit.pairs.get(kind))
