"""The study's figures, drawn from its results."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bvpo_kernels.mixing import MARGINAL
from bvpo_kernels.types import EMPTY, TRACE
from train.runtime.report import COLORS
from train.study.results import MODES, Results, accuracy, curve_value

_INK, _STAR, _MARGINAL = "#444444", "#b3262e", "#2d7d46"
_KIND_COLORS = {**COLORS, MARGINAL: _MARGINAL}
_TITLES = {"thinking": "Thinking", "no_thinking": "NoThinking"}
# Fixed weights run from the colour of the empties to that of the traces.
_ARM_COLORS = {
    "a=0": "#d9731a", "a=.25": "#c9995a", "a=.5": "#444444", "a=.75": "#7a9cc6", "a=1": "#1f5fa8",
    "a* trace": "#b3262e", "a* marginal": "#2d7d46", "DPO 2x": "#7a3b8f", "SimPO 2x": "#b77fc4",
    "KTO 2x": "#8c8c00", "K=4": "#00808c",
}  # fmt: skip


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=110)
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.08)
    FigureCanvasAgg(figure)
    return figure


def _plain(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def draw_accuracy(results: Results) -> Figure:
    """Accuracy of every arm in both modes, and the length of its traces."""
    names = list(results.arms)
    figure = _figure(13, 0.36 * len(names) + 1.6)
    panels = figure.subplots(1, 3, sharey=True)
    for axes, mode in zip(panels, MODES, strict=False):
        for place, name in enumerate(names):
            by_seed, color = results.arms[name], _ARM_COLORS[name]
            interval = accuracy(results, by_seed, mode)
            bar = [[100 * (interval.mean - interval.low)], [100 * (interval.high - interval.mean)]]
            axes.errorbar(100 * interval.mean, place, xerr=bar, fmt="o", color=color, ms=6, lw=2)
            seeds = [100 * run["evaluation"][mode]["accuracy"] for run in by_seed.values()]
            axes.plot(seeds, [place] * len(seeds), "|", color=color, ms=11, alpha=0.7)
        start = 100 * accuracy(results, results.base, mode).mean
        axes.axvline(start, color=_INK, ls=":", lw=1.2)
        _plain(axes, f"{_TITLES[mode]} accuracy", "% of test prompts (dotted: base model)", "")
    for place, name in enumerate(names):
        runs = results.arms[name].values()
        lengths = [run["evaluation"]["thinking"]["trace_length"] for run in runs]
        panels[2].plot(statistics.fmean(lengths), place, "o", color=_ARM_COLORS[name], ms=6)
        panels[2].plot(lengths, [place] * len(lengths), "|", color=_ARM_COLORS[name], ms=11)
    start = statistics.fmean(
        run["evaluation"]["thinking"]["trace_length"] for run in results.base.values()
    )
    panels[2].axvline(start, color=_INK, ls=":", lw=1.2)
    _plain(panels[2], "Trace length", "tokens (dotted: base model)", "")
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    return figure


def draw_error(results: Results) -> Figure:
    """MSE(a) by brute force, one panel per checkpoint; below it, minima and the package's a*."""
    steps = results.steps
    figure = _figure(4.6 * len(steps), 4.4)
    for axes, step in zip(figure.subplots(1, len(steps), squeeze=False)[0], steps, strict=True):
        seeds = [seed for seed in results.seeds if (seed, step) in results.curves]
        for place, seed in enumerate(seeds):
            curve = results.curves[seed, step]
            brute = curve["brute"]
            scale = curve_value(brute, 1.0)
            axes.plot(brute["a"], [v / scale for v in brute["mse"]], color=_INK, lw=1.4, alpha=0.8,
                      label="brute force, one line per seed" if place == 0 else None)  # fmt: skip
            best = min(1.0, max(0.0, brute["argmin"]))
            axes.plot(best, curve_value(brute, best) / scale, "o", color=_INK, ms=5)
            axes.annotate(f"seed {seed}", (brute["a"][0], brute["mse"][0] / scale), (8, 2),
                          textcoords="offset points", fontsize=8, color=_INK)  # fmt: skip
            rows = [(brute["low"], best, brute["high"], _INK, "minimum, brute force")]
            for name, color in ((TRACE, _STAR), (MARGINAL, _MARGINAL)):
                star = curve["package"][name]
                rows.append((star["low"], star["alpha"], star["high"], color, f"a*, {name}"))
            for line, (low, middle, high, color, label) in enumerate(rows):
                height = -0.05 - 0.16 * line - 0.045 * place
                axes.plot([low, high], [height, height], color=color, lw=2)
                axes.plot(
                    middle, height, "o-", color=color, ms=4, label=label if place == 0 else None
                )
        axes.set_ylim(-0.55, None)
        axes.set_yticks([tick for tick in axes.get_yticks() if 0 <= tick < axes.get_ylim()[1]])
        axes.set_xlim(-0.03, 1.03)
        axes.axhline(0, color="0.6", lw=0.8)
        _plain(axes, f"after {step} steps", "a, weight of the trace gradient", "")
    figure.axes[0].set_ylabel("MSE(a) / MSE(1)")
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=4,
        frameon=False,
        title="below 0: 95 % intervals, the seeds in turn",
    )
    return figure


def _series(run: dict[str, Any], key: str) -> tuple[list[int], list[float]]:
    lines = [line for line in run["log"] if line.get(key) is not None]
    return [line["step"] for line in lines], [line[key] for line in lines]


def draw_variances(results: Results) -> Figure | None:
    """Variances and covariance over training, from `GradStats`, and by brute force."""
    runs = results.arms.get("a* trace")
    if not runs:
        return None
    figure = _figure(12, 4)
    left, right = figure.subplots(1, 2)
    shown = (("trS_t", r"tr $S_t$", COLORS[TRACE]), ("trS_e", r"tr $S_e$", COLORS[EMPTY]),
             ("trS_te", r"tr $S_{te}$", _INK), ("delta_sq", r"$|\Delta|^2$", _STAR))  # fmt: skip
    for key, label, color in shown:
        for place, run in enumerate(runs.values()):
            left.plot(*_series(run, key), color=color, lw=1.3, alpha=0.8,
                      label=label if place == 0 else None)  # fmt: skip
        for (_, step), curve in results.curves.items():
            left.plot(step, curve["moments"][key], "x", color=color, ms=7)
    left.axhline(0, color="0.6", lw=0.8)
    left.set_ylim(top=1.3 * left.get_ylim()[1])
    left.legend(frameon=False, fontsize=9, ncols=4, loc="upper center",
                title="lines: arm a* trace, a line per seed; x: brute force, arm a=.5")  # fmt: skip
    _plain(left, "Gradient noise per unit", "optimizer step", "squared gradient norm")
    drift = (("bias_t_sq", "traces", COLORS[TRACE]), ("bias_e_sq", "empty traces", COLORS[EMPTY]))
    for key, label, color in drift:
        for place, run in enumerate(results.arms.get("a* marginal", {}).values()):
            right.plot(*_series(run, key), color=color, lw=1.3, alpha=0.8,
                       label=label if place == 0 else None)  # fmt: skip
        for (_, step), curve in results.curves.items():
            right.plot(step, curve["moments"][key], "x", color=color, ms=7)
    right.axhline(0, color="0.6", lw=0.8)
    right.legend(
        frameon=False, fontsize=9, title="lines: arm a* marginal; x: brute force, arm a=.5"
    )
    _plain(right, "Squared bias against the marginal (unbiased estimates)", "optimizer step",
           "squared gradient norm")  # fmt: skip
    return figure


def draw_weights(results: Results) -> Figure | None:
    """The weight that was used at every step of the arms that measure it."""
    names = [name for name in ("a* trace", "a* marginal") if name in results.arms]
    if not names:
        return None
    figure = _figure(6 * len(names), 3.6)
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        title = name
        for place, (seed, run) in enumerate(results.arms[name].items()):
            color = ("#b3262e", "#2d7d46", "#1f5fa8", "#7a3b8f")[place % 4]
            axes.plot(*_series(run, "alpha"), color=color, lw=1.6, label=f"seed {seed}")
            # Without a standard error (three effective steps or fewer, no rows) there is no band.
            banded = [line for line in run["log"] if line.get("alpha_se") is not None]
            title = f"{name} (band: 95 %)" if banded else title
            steps = [line["step"] for line in banded]
            low, high = ([line[key] for line in banded] for key in ("alpha_lo", "alpha_hi"))
            axes.fill_between(steps, low, high, color=color, alpha=0.1, lw=0)
        axes.axhline(0.5, color="0.5", ls=":", lw=1)
        axes.set_ylim(-0.03, 1.03)
        axes.legend(frameon=False, fontsize=9)
        _plain(axes, title, "optimizer step", "weight of the trace loss")
    return figure


def draw_losses(results: Results) -> Figure:
    """Held-out DPO losses over training, mean over seeds."""
    figure = _figure(14, 4.4)
    for axes, kind in zip(figure.subplots(1, 3), (MARGINAL, TRACE, EMPTY), strict=True):
        for name, by_seed in results.arms.items():
            probes = [run["probe"] for run in by_seed.values()]
            steps = [point["step"] for point in probes[0]]
            means = [statistics.fmean(p[k][kind] for p in probes) for k in range(len(steps))]
            dashed = "--" if name not in ("a=0", "a=.25", "a=.5", "a=.75", "a=1") else "-"
            axes.plot(steps, means, dashed, color=_ARM_COLORS[name], lw=1.6, label=name)
        axes.axhline(math.log(2), color="0.5", ls=":", lw=1)
        _plain(axes, f"Held-out {kind} loss", "optimizer step", "")
    figure.axes[0].set_ylabel("nats per pair")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    return figure


DRAWINGS = {
    "accuracy": draw_accuracy,
    "error": draw_error,
    "variances": draw_variances,
    "weights": draw_weights,
    "losses": draw_losses,
}


def all_figures(results: Results, names: Sequence[str] = tuple(DRAWINGS)) -> dict[str, Figure]:
    """Those for which there is something to draw."""
    skipped = set() if results.curves and results.arms else {"error"}
    if not results.arms:
        skipped |= {"accuracy", "losses"}
    drawn = {name: DRAWINGS[name](results) for name in names if name not in skipped}
    return {name: figure for name, figure in drawn.items() if figure is not None}
