"""The study's tables: rows of dictionaries, as CSV and as Markdown."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from bvpo_kernels.mixing import MARGINAL
from bvpo_kernels.types import TRACE
from train.study.results import (
    BASELINE,
    MODES,
    Results,
    accuracy,
    curve_value,
    difference,
    steps_to_loss,
)

Rows = list[dict[str, Any]]


def accuracy_rows(results: Results) -> Rows:
    """One row per arm, the base model first."""
    rows: Rows = [{"arm": "base model", **_scores(results, results.base)}]
    for name, by_seed in results.arms.items():
        row = {"arm": name, **_scores(results, by_seed)}
        for mode in MODES:
            change = difference(results, name, BASELINE, mode)
            if change is not None and name != BASELINE:
                row |= {
                    f"{mode}_vs_half": change.mean,
                    f"{mode}_vs_half_low": change.low,
                    f"{mode}_vs_half_high": change.high,
                }
        last = [run["probe"][-1] for run in by_seed.values()]
        for kind in ("trace", "empty", "marginal"):
            row[f"loss_{kind}"] = statistics.fmean(probe[kind] for probe in last)
        reached = [steps_to_loss(results, name, seed) for seed in by_seed]
        row["steps_to_loss"] = statistics.fmean(reached)
        used = [run["log"][-1]["alpha"] for run in by_seed.values()]
        row["last_weight"] = statistics.fmean(used)
        row["pairs_per_step"] = next(iter(by_seed.values()))["pairs_per_step"]
        row["train_seconds"] = statistics.fmean(run["seconds"]["train"] for run in by_seed.values())
        rows.append(row)
    return rows


def _scores(results: Results, by_seed: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {"seeds": len(by_seed)}
    for mode in MODES:
        interval = accuracy(results, by_seed, mode)
        row |= {mode: interval.mean, f"{mode}_low": interval.low, f"{mode}_high": interval.high}
        values = [run["evaluation"][mode]["accuracy"] for run in by_seed.values()]
        row[f"{mode}_seeds"] = " ".join(f"{value:.4f}" for value in values)
    lengths = [run["evaluation"]["thinking"]["trace_length"] for run in by_seed.values()]
    return row | {"trace_length": statistics.fmean(lengths)}


def optimum_rows(results: Results) -> Rows:
    """One row per seed and checkpoint: the brute-force minimum beside the package's a*."""
    rows: Rows = []
    for (seed, step), curve in sorted(results.curves.items()):
        brute, row = curve["brute"], {"seed": seed, "step": step, "units": curve["units"]}
        row |= {"skipped": curve["skipped"], "ess": curve["ess"], "batch": curve["batch"]}
        row["formula"] = formula(curve["moments"], curve["batch"])
        row |= {f"brute_{key}": brute[key] for key in ("argmin", "low", "high")}
        for name in (TRACE, MARGINAL):
            star = curve["package"][name]
            row |= {f"{name}_{key}": star[key] for key in ("raw", "low", "high")}
            row[f"mse_{name}_star"] = curve_value(brute, star["alpha"])
        best = min(1.0, max(0.0, brute["argmin"]))
        row |= {f"mse_{a:g}": curve_value(brute, a) for a in (0.0, 0.5, 1.0)}
        rows.append(row | {"mse_best": curve_value(brute, best)} | curve["moments"])
    return rows


def formula(moments: Mapping[str, float], batch: int) -> float:
    """a* = [-<b_e, Delta> - tr S_ed / B] / [|Delta|^2 + tr S_d / B], unclipped, from the unbiased
    moments of all units; 2 <b_e, Delta> = |b_t|^2 - |b_e|^2 - |Delta|^2."""
    cross = (moments["bias_t_sq"] - moments["bias_e_sq"] - moments["delta_sq"]) / 2
    noise_ed = moments["trS_te"] - moments["trS_e"]
    noise_d = moments["trS_t"] + moments["trS_e"] - 2 * moments["trS_te"]
    return (-cross - noise_ed / batch) / (moments["delta_sq"] + noise_d / batch)


def curve_rows(results: Results) -> Rows:
    return [
        {"seed": seed, "step": step, "a": a, "mse": mse}
        for (seed, step), curve in sorted(results.curves.items())
        for a, mse in zip(curve["brute"]["a"], curve["brute"]["mse"], strict=True)
    ]


TRAINING = (
    "step", "alpha", "loss", "grad_norm", "alpha_star", "alpha_se", "alpha_lo", "alpha_hi",
    "trS_t", "trS_e", "trS_te", "delta_sq", "bias_t_sq", "bias_e_sq", "units_skipped", "seconds",
)  # fmt: skip


def training_rows(results: Results) -> Rows:
    """Every logged step of every run."""
    return [
        {"arm": name, "seed": seed} | {key: line.get(key) for key in TRAINING}
        for name, by_seed in results.arms.items()
        for seed, run in by_seed.items()
        for line in run["log"]
    ]


def probe_rows(results: Results) -> Rows:
    return [
        {"arm": name, "seed": seed, **probe}
        for name, by_seed in results.arms.items()
        for seed, run in by_seed.items()
        for probe in run["probe"]
    ]


def all_tables(results: Results) -> dict[str, Rows]:
    return {
        "accuracy": accuracy_rows(results),
        "optimum": optimum_rows(results),
        "curves": curve_rows(results),
        "training": training_rows(results),
        "probes": probe_rows(results),
    }


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Columns in the order in which they first occur; floats with six digits."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow([_cell(row.get(name)) for name in columns])
    return text.getvalue()


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def to_markdown(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """A table of texts; the columns are those of the first row."""
    if not rows:
        return []
    columns = list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(row[name] for name in columns) + " |" for row in rows]
    return lines


def shown(value: float, digits: int = 1) -> str:
    return "not reached" if math.isinf(value) else f"{value:.{digits}f}"
