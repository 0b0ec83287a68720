"""The study's tables: rows of dictionaries, as CSV and as Markdown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

import pandas as pd
from tabulate import tabulate

from bvpo_kernels.mixing import MARGINAL
from bvpo_kernels.types import TRACE
from train.study.results import (
    BASELINE,
    MODES,
    Interval,
    Results,
    accuracy,
    curve_value,
    difference,
    steps_to_loss,
)

Rows = list[dict[str, Any]]
_TITLES = {"thinking": "Thinking", "no_thinking": "NoThinking"}
_ERRORS = {
    "MSE(0)": "mse_0",
    "MSE(.5)": "mse_0.5",
    "MSE(1)": "mse_1",
    "at a* trace": "mse_trace_star",
    "at a* marginal": "mse_marginal_star",
}


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


def markdown_accuracy(results: Results) -> Rows:
    """The report's table of arms, as texts."""
    rows = []
    for row in accuracy_rows(results):
        cells = {"arm": row["arm"]}
        for mode in MODES:
            interval = Interval(row[mode], row[f"{mode}_low"], row[f"{mode}_high"])
            cells[f"{_TITLES[mode]}, %"] = interval.shown(100)
            key = f"{mode}_vs_half"
            known = key in row
            change = Interval(row[key], row[f"{key}_low"], row[f"{key}_high"]) if known else None
            cells[f"{_TITLES[mode]} - {BASELINE}"] = change.shown(100) if change else ""
        cells["trace length"] = f"{row['trace_length']:.1f}"
        cells["marginal loss"] = f"{row['loss_marginal']:.4f}" if "loss_marginal" in row else ""
        cells["steps to loss"] = shown(row["steps_to_loss"]) if "steps_to_loss" in row else ""
        cells["last a"] = f"{row['last_weight']:.2f}" if "last_weight" in row else ""
        cells["pairs/step"] = str(row.get("pairs_per_step", ""))
        cells["train s"] = f"{row['train_seconds']:.0f}" if "train_seconds" in row else ""
        rows.append(cells)
    return rows


def markdown_optimum(results: Results) -> Rows:
    rows = []
    for row in optimum_rows(results):
        cells = {"seed": str(row["seed"]), "step": str(row["step"])}
        for title, name, middle in (
            ("minimum, brute force", "brute", "brute_argmin"),
            ("a*, trace", TRACE, f"{TRACE}_raw"),
            ("a*, marginal", MARGINAL, f"{MARGINAL}_raw"),
        ):
            interval = Interval(row[middle], row[f"{name}_low"], row[f"{name}_high"])
            cells[title] = interval.shown(digits=2)
        cells["a*, formula"] = f"{row['formula']:.2f}"
        for title, key in _ERRORS.items():
            cells[f"{title} / least"] = f"{row[key] / row['mse_best']:.3f}"
        cells["tr S_t"], cells["tr S_e"] = f"{row['trS_t']:.3g}", f"{row['trS_e']:.3g}"
        cells["tr S_te"], cells["ESS"] = f"{row['trS_te']:.3g}", f"{row['ess']:.1f}"
        rows.append(cells)
    return rows


def all_tables(results: Results) -> dict[str, Rows]:
    return {
        "accuracy": accuracy_rows(results),
        "optimum": optimum_rows(results),
        "curves": curve_rows(results),
        "training": training_rows(results),
        "probes": probe_rows(results),
    }


def to_csv(rows: Rows) -> str:
    """Columns in the order in which they first occur; floats with six digits."""
    # As objects: a column of whole numbers with gaps must not become one of floats.
    return pd.DataFrame(rows, dtype=object).map(_cell).to_csv(index=False, lineterminator="\n")


def _cell(value: Any) -> str:
    if pd.isna(value):
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def to_markdown(rows: Rows) -> str:
    """A table of texts."""
    return tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)


def shown(value: float, digits: int = 1) -> str:
    return "not reached" if math.isinf(value) else f"{value:.{digits}f}"
