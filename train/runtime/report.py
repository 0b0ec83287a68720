"""What a run leaves to look at: its log, a figure of it, and a table of before and after."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch.utils.tensorboard import SummaryWriter

from bvpo_kernels.types import EMPTY, KINDS, TRACE
from train.runtime.files import replace_file

COLORS = {TRACE: "#1f5fa8", EMPTY: "#d9731a"}
TABLE_METRICS = {"loss": "loss", "rewards/accuracies": "accuracy", "rewards/margins": "margin"}


class RunLog:
    """`log.jsonl` (a line per step and per evaluation) and TensorBoard events, as they come.

    A line has `event` ("train" or "eval"), `step` (optimizer steps done), `time` (seconds of
    running until then; a run that goes on counts on from its last line) and metrics: the manual has
    a table of all. A new run in the same folder replaces the old log; one that goes on
    after `step` steps keeps what was written up to there. Where it is not `active`, nothing is
    written: one rank of several keeps the log.
    """

    def __init__(self, run_dir: Path, active: bool = True, step: int = 0) -> None:
        self.run_dir, self.active, self.step = run_dir, active, step

    def __enter__(self) -> RunLog:
        if not self.active:
            return self
        self.run_dir.mkdir(parents=True, exist_ok=True)
        path = self.run_dir / "log.jsonl"
        spent = _cut_log(path, self.step) if self.step > 0 and path.exists() else 0.0
        self.file: IO[str] = open(path, "a" if self.step > 0 else "w", encoding="utf-8")
        # Hides the events of an earlier run in this folder, all or from there on.
        purge_step = self.step + 1 if self.step > 0 else 0
        self.board = SummaryWriter(str(self.run_dir / "tensorboard"), purge_step=purge_step)
        self.start = time.perf_counter() - spent
        return self

    def __exit__(self, *_: object) -> None:
        if not self.active:
            return
        self.file.close()
        self.board.close()

    def write(self, event: str, step: int, metrics: Mapping[str, float]) -> None:
        if not self.active:
            return
        line = {"event": event, "step": step, "time": time.perf_counter() - self.start, **metrics}
        self.file.write(json.dumps(line, allow_nan=False) + "\n")
        self.file.flush()
        for name, value in metrics.items():
            self.board.add_scalar(f"{event}/{name}", value, step)


def _cut_log(path: Path, step: int) -> float:
    """Keep the lines up to a step; what a kill left of a line goes. Returns the last one's time."""
    kept, spent = [], 0.0
    for text in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if text.endswith("\n") and (line := json.loads(text))["step"] <= step:
            kept.append(text)
            spent = max(spent, line.get("time", 0.0))
    replace_file(path, lambda name: name.write_text("".join(kept), encoding="utf-8"))
    return spent


def read_log(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Lines of a log by event.

    Raises:
        ValueError: naming the file and the line that is not a JSON object with `event` and `step`.
    """
    events: dict[str, list[dict[str, Any]]] = {"train": [], "eval": []}
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            line = json.loads(text)
            events[line["event"]].append({"step": line["step"], **line})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}:{number}: expected a line of a run's log: {error}") from None
    return events


def _series(lines: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    present = [line for line in lines if name in line and not _is_tie(line, name)]
    return [line["step"] for line in present], [line[name] for line in present]


def _is_tie(metrics: Mapping[str, Any], name: str) -> bool:
    """Is this an accuracy where policy = reference? All margins are 0 then, and so is the share of
    those above 0, which says nothing about the policy."""
    kind, _, metric = name.partition("/")
    return metric == "rewards/accuracies" and metrics.get(f"{kind}/rewards/margins") == 0


def _panel(axes: Axes, title: str, unit: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set_ylabel(unit)
    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _per_kind(axes: Axes, events: dict[str, list[dict[str, Any]]], metric: str) -> None:
    """Training as a thin line, held-out as a bold one with markers, one colour per kind."""
    for kind in KINDS:
        name, color = f"{kind}/{metric}", COLORS[kind]
        steps, values = _series(events["train"], name)
        axes.plot(steps, values, color=color, alpha=0.45, lw=1.2, label=f"{kind}, train")
        steps, values = _series(events["eval"], name)
        axes.plot(steps, values, color=color, lw=2, marker="o", ms=5, label=f"{kind}, held-out")


def _draw_loss(axes: Axes, events: dict[str, list[dict[str, Any]]]) -> None:
    _per_kind(axes, events, "loss")
    axes.axhline(math.log(2), color="0.5", ls=":", lw=1, label="log 2")
    axes.legend(fontsize=8, frameon=False)


def _draw_margin(axes: Axes, events: dict[str, list[dict[str, Any]]]) -> None:
    _per_kind(axes, events, "rewards/margins")
    axes.axhline(0, color="0.5", ls=":", lw=1)


def _draw_accuracy(axes: Axes, events: dict[str, list[dict[str, Any]]]) -> None:
    _per_kind(axes, events, "rewards/accuracies")
    axes.set_ylim(-0.03, 1.03)


def _draw_alpha(axes: Axes, events: dict[str, list[dict[str, Any]]]) -> None:
    axes.plot(*_series(events["train"], "alpha"), color="#444444", lw=1.6, label="used")
    steps, star = _series(events["train"], "alpha_star")
    if steps:
        axes.plot(steps, star, color="#b3262e", lw=1.6, ls="--", label="a*, measured")
        banded = [line for line in events["train"] if "alpha_hi" in line]
        low, high = ([line[name] for line in banded] for name in ("alpha_lo", "alpha_hi"))
        steps = [line["step"] for line in banded]
        axes.fill_between(steps, low, high, color="#b3262e", alpha=0.15, lw=0, label="95 %")
        axes.legend(fontsize=8, frameon=False)
    axes.set_ylim(-0.03, 1.03)


def _draw_variances(axes: Axes, events: dict[str, list[dict[str, Any]]]) -> None:
    for name, label, color in (
        ("trS_t", r"tr $S_t$, trace", COLORS[TRACE]),
        ("trS_e", r"tr $S_e$, empty", COLORS[EMPTY]),
        ("trS_te", r"tr $S_{te}$", "#444444"),
        ("delta_sq", r"$|\Delta|^2$", "#b3262e"),
    ):
        axes.plot(*_series(events["train"], name), color=color, lw=1.6, label=label)
    axes.axhline(0, color="0.5", ls=":", lw=1)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    axes.legend(fontsize=8, frameon=False)


def _draw_error(axes: Axes, events: dict[str, list[dict[str, Any]]]) -> None:
    """MSE(a) from the last step's averages, in units of MSE(1), with the minimum and its band."""
    last = next(line for line in reversed(events["train"]) if "mse_2" in line)
    weights = [index / 100 for index in range(101)]
    curve = [last["mse_0"] + a * last["mse_1"] + a * a * last["mse_2"] for a in weights]
    scale = abs(curve[-1]) or 1.0
    axes.plot(weights, [value / scale for value in curve], color="#444444", lw=1.8)
    axes.axvline(
        last["alpha_star"], color="#b3262e", lw=1.6, label=f"a* = {last['alpha_star']:.2f}"
    )
    if "alpha_hi" in last:
        axes.axvspan(last["alpha_lo"], last["alpha_hi"], color="#b3262e", alpha=0.15, lw=0)
    axes.set_xlabel("weight of the trace loss, a")
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.legend(fontsize=8, frameon=False)


def _draw_optimizer(axes: Axes, events: dict[str, list[dict[str, Any]]]) -> None:
    steps, norms = _series(events["train"], "grad_norm")
    axes.plot(steps, norms, color="#7a3b8f", lw=1.6)
    axes.yaxis.label.set_color("#7a3b8f")
    axes.set_ylim(bottom=0)
    rates = axes.twinx()
    rates.plot(*_series(events["train"], "lr"), color="#2d7d46", lw=1.6, ls="--")
    rates.set_ylabel("learning rate (dashed)", color="#2d7d46")
    rates.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    rates.set_ylim(bottom=0)
    rates.spines["top"].set_visible(False)


def _draw_speed(axes: Axes, events: dict[str, list[dict[str, Any]]]) -> None:
    axes.plot(*_series(events["train"], "tokens_per_second"), color="#444444", lw=1.6)
    axes.set_ylim(bottom=0)


_PANELS: tuple[tuple[str, str, Callable[[Axes, dict[str, list[dict[str, Any]]]], None]], ...] = (
    ("Loss", "nats per pair", _draw_loss),
    ("Reward margin", r"$\beta\,(r_w - r_l)$, nats", _draw_margin),
    ("Accuracy", "share of pairs with margin > 0", _draw_accuracy),
    ("Mixing weight", r"$\alpha$ (weight of the trace loss)", _draw_alpha),
    ("Gradient and learning rate", "gradient norm before clipping", _draw_optimizer),
    ("Throughput", "tokens per second (no padding)", _draw_speed),
)


# Shown where the weight was estimated.
_ESTIMATE_PANELS = (
    ("Gradient noise per unit, and bias", "squared gradient norm", _draw_variances),
    ("Error of the mixed gradient", "MSE(a) / MSE(1)", _draw_error),
)


def figure_of(events: dict[str, list[dict[str, Any]]], title: str = "") -> Figure:
    """Six panels over the optimizer steps; eight where the mixing weight was estimated."""
    panels = _PANELS
    if any("mse_2" in line for line in events["train"]):
        panels = (*_PANELS[:4], *_ESTIMATE_PANELS, *_PANELS[4:])
    figure = Figure(figsize=(14 * len(panels) / 6, 7.6), dpi=110)
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.12)
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=10, color="0.35", parse_math=False)
    grid = figure.subplots(2, len(panels) // 2).flatten()
    for axes, (title, unit, fill) in zip(grid, panels, strict=True):
        _panel(axes, title, unit)
        fill(axes, events)
    return figure


def draw(log_path: Path, image_path: Path) -> None:
    """Draw a run's log as a PNG, under the name of the run: the end of its folder's path."""
    name = "/".join(log_path.absolute().parts[1:-1][-3:])
    figure = figure_of(read_log(log_path), name)
    replace_file(image_path, lambda path: figure.savefig(path, format="png"))


def alpha_summary(log: Mapping[str, float], batch_size: int, measured: str = "") -> str:
    """The last estimate of a*, a line each; nothing for a fixed weight.

    Args:
        log: `AlphaSource.log`.
        batch_size: units of a step.
        measured: what the gradients were taken over (`alpha.describe`); a line where given.
    """
    if "alpha_star" not in log:
        return ""
    interval = f"[{log.get('alpha_lo', 0.0):.3f}, {log.get('alpha_hi', 1.0):.3f}]"
    what = f"95 % interval {interval}, for batches of {batch_size} units"
    determined = bool(log.get("alpha_determined", 1.0))
    star = (
        f"a* = {log['alpha_star']:.3f}," if determined else "a* is not determined by these steps:"
    )
    lines = [
        f"{star} {what}",
        *_weight_lines(log, determined),
        *([f"  {measured}"] if measured else []),
        *(_error_lines(log) if determined else []),
        *_moment_lines(log),
    ]
    return "".join(f"{line}\n" for line in lines)


def _weight_lines(log: Mapping[str, float], determined: bool) -> list[str]:
    """What the next step's weight is, and why."""
    if "alpha_next" not in log:
        return []
    weight, left = f"{log['alpha_next']:.3f}", log.get("alpha_warmup_left", 0)
    if determined and left:
        return [f"  the weight stays at {weight} for {left:.0f} more steps of warm-up"]
    if determined:
        share = 100 * log["alpha_credibility"]
        return [f"  the next weight is {weight}: the data count for {share:.0f} %"]
    if "alpha_se" not in log:
        why = "no error is known yet: it takes four steps, and gradients that differ"
    elif "alpha_units_needed" in log:
        why = f"about {log['alpha_units_needed']:.0f} more units are needed"
    else:
        why = "more are needed than ema_halflife holds: raise it, or units per step"
    return [f"  the weight stays at {weight} after {log['alpha_units']:.0f} units; {why}"]


def _moment_lines(log: Mapping[str, float]) -> list[str]:
    """What a* is made of. An unbiased estimate of a square may come out negative: that is said."""
    hidden = log["delta_sq"] <= 0
    mix = f"{log['B_mix']:.1f} units" if "B_mix" in log else "not known"
    kappa = f"{log['kappa']:.3f}" if "kappa" in log else "not known"
    difference = "not above 0 within its noise" if hidden else f"{log['delta_sq']:.3g}"
    return [
        f"  kappa = {kappa}, B_mix = {mix}"
        + (": noise hides the mean difference" if hidden else ""),
        f"  noise per unit: trace {log['trS_t']:.3g}, empty {log['trS_e']:.3g}, shared "
        f"{log['trS_te']:.3g}; |mean difference|^2 {difference}",
    ]


def _error_lines(log: Mapping[str, float]) -> list[str]:
    """MSE(a*) in units of that of the choices that measure nothing. None where the estimates of
    these are not positive, as those of a few noisy steps may be."""
    if "mse_2" not in log:
        return []

    def error(a: float) -> float:
        return log["mse_0"] + a * log["mse_1"] + a * a * log["mse_2"]

    best, others = error(log["alpha_star"]), {"0": 0.0, "1/2": 0.5, "1": 1.0}
    if min(best, *map(error, others.values())) <= 0:
        return []
    shown = ", ".join(f"{best / error(a):.3f} x a = {name}" for name, a in others.items())
    return [f"  error of the gradient at a*: {shown}"]


def before_after_table(
    before: Mapping[str, float], after: Mapping[str, float], num_units: int
) -> str:
    """Loss, accuracy and margin of the held-out pairs, per kind, before and after training."""
    rows = [("kind", "metric", "before", "after", "change")]
    for kind in KINDS:
        for metric, title in TABLE_METRICS.items():
            name = f"{kind}/{metric}"
            if name in before:
                old, new = before[name], after[name]
                known = not (_is_tie(before, name) or _is_tie(after, name))
                shown = "tie" if _is_tie(before, name) else f"{old:.4f}"
                change = f"{new - old:+.4f}" if known else ""
                rows.append((kind, title, shown, f"{new:.4f}", change))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = [
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([f"held-out pairs of {num_units} units", *lines])
