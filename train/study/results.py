"""What the study left on disk, and the statistics that its tables and figures share."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from bvpo_kernels.types import EMPTY, TRACE
from train.study.config import ARMS, StudyConfig

MODES = ("thinking", "no_thinking")
BASELINE = "a=.5"
_NORMAL = 1.96
_ROUNDING = 1e-5  # of a loss


@dataclass(frozen=True)
class Results:
    """Files by what they are of: base: seed; arms: name, then seed; curves: (seed, step)."""

    base: Mapping[int, dict[str, Any]]
    arms: Mapping[str, Mapping[int, dict[str, Any]]]
    curves: Mapping[tuple[int, int], dict[str, Any]]
    prompts: int

    @property
    def seeds(self) -> list[int]:
        return sorted(self.base)

    @property
    def steps(self) -> list[int]:
        return sorted({step for _, step in self.curves})


def load(out: Path, cfg: StudyConfig) -> Results:
    """Every file that is there: a report of a study that is not finished is possible.

    Raises:
        ValueError: for a folder without any seed's base model.
    """
    base, curves = {}, {}
    arms: dict[str, dict[int, dict[str, Any]]] = {}
    for seed in cfg.seeds:
        folder = out / f"seed{seed}"
        if not (folder / "base.json").is_file():
            continue
        base[seed] = _read(folder / "base.json")
        for path in sorted(folder.glob("curve-*.json")):
            curve = _read(path)
            curves[seed, curve["step"]] = curve
        for path in sorted(folder.glob("arm-*.json")):
            arm = _read(path)
            arms.setdefault(arm["arm"], {})[seed] = arm
    if not base:
        raise ValueError(f"out: expected results of at least one of the seeds {cfg.seeds} in {out}")
    ordered = {arm.name: arms[arm.name] for arm in ARMS if arm.name in arms}
    return Results(base, ordered, curves, cfg.eval_prompts)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Interval:
    mean: float
    low: float
    high: float

    def shown(self, factor: float = 1.0, digits: int = 1) -> str:
        low, mean, high = (f"{factor * x:.{digits}f}" for x in (self.low, self.mean, self.high))
        return f"{mean} [{low}, {high}]"


def solved(evaluation: Mapping[str, Any], mode: str, prompts: int) -> np.ndarray:
    """Which test prompts were solved, 0 or 1."""
    packed = np.frombuffer(bytes.fromhex(evaluation[mode]["bits"]), dtype=np.uint8)
    return np.unpackbits(packed)[:prompts].astype(float)


def _mean_interval(samples: Sequence[np.ndarray]) -> Interval:
    """Mean over seeds of the means over prompts; the interval is that of the prompts, the seeds
    held fixed."""
    mean = statistics.fmean(float(s.mean()) for s in samples)
    variance = sum(float(s.var(ddof=1)) / len(s) for s in samples) / len(samples) ** 2
    half = _NORMAL * math.sqrt(variance)
    return Interval(mean, mean - half, mean + half)


def accuracy(results: Results, by_seed: Mapping[int, Mapping[str, Any]], mode: str) -> Interval:
    """Of an arm's or the base model's files."""
    runs = [file["evaluation"] for file in by_seed.values()]
    return _mean_interval([solved(run, mode, results.prompts) for run in runs])


def difference(results: Results, name: str, other: str, mode: str) -> Interval | None:
    """Accuracy of an arm less that of another, over the prompts that both were asked."""
    if name not in results.arms or other not in results.arms:
        return None
    first, second = results.arms[name], results.arms[other]
    pairs = [
        solved(first[seed]["evaluation"], mode, results.prompts)
        - solved(second[seed]["evaluation"], mode, results.prompts)
        for seed in sorted(set(first) & set(second))
    ]
    return _mean_interval(pairs) if pairs else None


def mixed_loss(probe: Mapping[str, float]) -> float:
    """(L_trace + L_empty) / 2, the paper's objective: what all arms are compared on."""
    return (probe[TRACE] + probe[EMPTY]) / 2


def target_loss(results: Results, seed: int) -> float | None:
    """A seed's fixed loss, half-way from ln 2 to the least held-out loss of the arm a = .5; none
    where that arm never was below ln 2."""
    run = results.arms.get(BASELINE, {}).get(seed)
    least = math.inf if run is None else min(map(mixed_loss, run["probe"]))
    return (math.log(2) + least) / 2 if least < math.log(2) - _ROUNDING else None


def steps_to_loss(results: Results, name: str, seed: int) -> float:
    """Optimizer steps until the held-out loss is at the seed's fixed loss, interpolated between
    probes; inf where it is not reached."""
    target, probes = target_loss(results, seed), results.arms[name][seed]["probe"]
    if target is None:
        return math.inf
    for before, after in pairwise(probes):
        first, second = mixed_loss(before), mixed_loss(after)
        if second <= target:
            share = (first - target) / (first - second)
            return before["step"] + share * (after["step"] - before["step"])
    return math.inf


def curve_value(brute: Mapping[str, Any], a: float) -> float:
    """MSE at any a: the curve is a parabola, so three of its points give it."""
    zero, half, one = (brute["mse"][brute["a"].index(x)] for x in (0.0, 0.5, 1.0))
    c2 = 2 * (zero - 2 * half + one)
    return zero + (one - zero - c2) * a + c2 * a * a
