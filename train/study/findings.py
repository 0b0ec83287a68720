"""What the numbers say, as sentences: computed, so that they say so whichever way it falls."""

from __future__ import annotations

import math
import statistics

from bvpo_kernels.mixing import MARGINAL
from bvpo_kernels.types import TRACE
from train.study.results import BASELINE, MODES, Interval, Results, difference
from train.study.tables import Rows, accuracy_rows, optimum_rows, shown

_TITLES = {"thinking": "Thinking", "no_thinking": "NoThinking"}


def _verdict(change: Interval) -> str:
    if change.low > 0:
        return "beats"
    return "is worse than" if change.high < 0 else "cannot be told from"


def accuracy_findings(results: Results) -> list[str]:
    """Each measured weight against the paper's fixed one, and the best fixed weight per mode."""
    lines = []
    for name in ("a* trace", "a* marginal", "DPO 2x"):
        parts = []
        for mode in MODES:
            change = difference(results, name, BASELINE, mode)
            if change is not None:
                text = f"{_verdict(change)} {BASELINE} in {_TITLES[mode]}"
                parts.append(f"{text} ({change.shown(100)} points)")
        if parts:
            lines.append(f"**{name}** " + " and ".join(parts) + ".")
    rows = [row for row in accuracy_rows(results) if row["arm"] in results.arms]
    for mode in MODES:
        best = max(rows, key=lambda row: row[mode])
        lines.append(
            f"Highest {_TITLES[mode]} accuracy: **{best['arm']}**, {100 * best[mode]:.1f} % "
            f"[{100 * best[f'{mode}_low']:.1f}, {100 * best[f'{mode}_high']:.1f}]."
        )
    return lines


def optimum_findings(results: Results) -> list[str]:
    """Does a* minimise what it says, and what is lost by the fixed weight?"""
    rows = optimum_rows(results)
    if not rows:
        return []
    apart = [abs(row["formula"] - row["brute_argmin"]) for row in rows]
    lines = [
        f"a* by its formula, from the moments of all units, is within {max(apart):.2f} of the "
        f"minimum of the brute-force curve at all {len(rows)} checkpoints (median "
        f"{statistics.median(apart):.2f})."
    ]
    for name in (TRACE, MARGINAL):
        both = sum(_overlap(row, name) for row in rows)
        lost = [row[f"mse_{name}_star"] / row["mse_best"] - 1 for row in rows]
        lines.append(
            f"As the package measures it from a few small steps, with the {name} as reference: its "
            f"95 % interval and that of the brute-force "
            f"minimum overlap at {both} of {len(rows)} checkpoints; the error at a* is "
            f"{100 * statistics.median(lost):.1f} % above the least error (median; at most "
            f"{100 * max(lost):.1f} %)."
        )
    used = [
        f"{run['log'][-1]['alpha']:.2f} (minimum {_last_minimum(rows, seed):.2f})"
        for seed, run in results.arms.get("a* trace", {}).items()
    ]
    if used:
        lines.append(
            "The lagged weight at the last step of the arm a* trace, and the brute-force minimum "
            f"at the last checkpoint of a=.5, for the seeds in turn: {', '.join(used)}."
        )
    lost = [row["mse_0.5"] / row["mse_best"] - 1 for row in rows]
    lines.append(
        f"The fixed weight .5 has {100 * statistics.median(lost):.1f} % more error than the least "
        f"(median over checkpoints; {100 * min(lost):.1f} to {100 * max(lost):.1f} %)."
    )
    for kind, key in (("trace", "mse_1"), ("empty", "mse_0")):
        ratio = statistics.median(row[key] / row["mse_best"] for row in rows)
        lines.append(f"The {kind} gradient alone has {ratio:.1f} times the least error (median).")
    return lines


def _last_minimum(rows: Rows, seed: int) -> float:
    own = [row for row in rows if row["seed"] == seed]
    return max(own, key=lambda row: row["step"])["brute_argmin"] if own else math.nan


def _overlap(row: dict, name: str) -> bool:
    return row["brute_low"] <= row[f"{name}_high"] and row[f"{name}_low"] <= row["brute_high"]


def why(results: Results) -> list[str]:
    """Why a better gradient need not be a better model: quantities of this run."""
    rows = optimum_rows(results)
    lines = []
    if rows:
        share = statistics.median(
            row["bias_e_sq"] / (row["bias_e_sq"] + row["trS_e"] / row["batch"]) for row in rows
        )
        ratios = ", ".join(
            f"{row['trS_e'] / (row['trS_e'] + row['trS_t']):.2f}" for row in _first_rows(rows)
        )
        signal = statistics.median(row["mu_m_sq"] / row["mse_best"] for row in rows)
        lost = statistics.median(row["mse_0.5"] / row["mse_best"] - 1 for row in rows)
        lines += [
            f"Noise rules here: bias is {100 * share:.0f} % of the squared error of the empty "
            f"gradient at this batch size (median). Then a* is close to the ratio of noises "
            f"tr S_e / (tr S_t + tr S_e), at the start {ratios} for the seeds in turn: which of "
            "the two kinds is the noisier one differs between seeds, and so does a*.",
            f"The squared norm of the true gradient is {signal:.2f} of the least error of one "
            "step's gradient (median): even the best mixture of one step is mostly noise.",
            f"The curve is flat around its minimum: .5 costs {100 * lost:.1f} % of squared error "
            "(median), which these runs cannot resolve in accuracy.",
        ]
    change = difference(results, "a=0", "a=1", "no_thinking")
    if change is not None:
        lines.append(
            "The error is measured against the marginal gradient, which is about answers after a "
            "trace; NoThinking accuracy is no part of it. There the empty loss is the objective "
            f"itself: a=0 less a=1 is {change.shown(100)} points."
        )
    return lines


def _first_rows(rows: Rows) -> Rows:
    """Of each seed, the first checkpoint."""
    first = min(row["step"] for row in rows)
    return [row for row in rows if row["step"] == first]


def markdown_accuracy(results: Results) -> Rows:
    """The table of the report, as texts."""
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
        for title, key in (("MSE(0)", "mse_0"), ("MSE(.5)", "mse_0.5"), ("MSE(1)", "mse_1"),
                           ("at a* trace", "mse_trace_star"),
                           ("at a* marginal", "mse_marginal_star")):  # fmt: skip
            cells[f"{title} / least"] = f"{row[key] / row['mse_best']:.3f}"
        cells["tr S_t"], cells["tr S_e"] = f"{row['trS_t']:.3g}", f"{row['trS_e']:.3g}"
        cells["tr S_te"], cells["ESS"] = f"{row['trS_te']:.3g}", f"{row['ess']:.1f}"
        rows.append(cells)
    return rows
