"""Figures from the long-form CSV: time relative to the baseline, and memory against T."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import records
from benchmarks.registry import Group
from train.runtime.files import replace_file

# The row that figures draw in black.
OURS = "bvpo_kernels"


def machine(entry: Any) -> str:
    """Where a record was measured, in a few words."""
    if str(entry["device"]).startswith("cuda"):
        return str(entry["gpu"])
    return f"{entry['cpu']}, {entry['threads']} threads"


def _colors(frame: pd.DataFrame) -> dict[str, Any]:
    rows = frame["row"].unique()
    colors = plt.get_cmap("tab10" if len(rows) <= 10 else "tab20").colors  # type: ignore
    return {row: colors[index % len(colors)] for index, row in enumerate(rows)}


def _time_bars(axes: Axes, frame: pd.DataFrame, colors: dict[str, Any]) -> None:
    """One cluster of horizontal bars per case."""
    ratios = frame[frame["metric"] == "ratio"]
    cases, rows = list(ratios["case"].unique()), list(ratios["row"].unique())
    thickness = 0.8 / max(len(rows), 1)
    for index, row in enumerate(rows):
        of_row = ratios[ratios["row"] == row]
        places = [cases.index(case) + index * thickness for case in of_row["case"]]
        axes.barh(places, of_row["value"].astype(float), thickness, color=colors[row], label=row)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks([place + 0.4 - thickness / 2 for place in range(len(cases))], cases, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel(f"time / {records.baseline(frame)}")
    if rows:
        axes.legend(fontsize=7)


def _memory_lines(axes: Axes, frame: pd.DataFrame, mode: str, colors: dict[str, Any]) -> None:
    """Peak memory against T, a line per row and set of other sizes."""
    markers: dict[str, str] = {}
    for (row, others), line in frame[frame["mode"] == mode].groupby(["row", "others"], sort=False):
        line = line.sort_values("T").assign(value=line["value"].astype(float).clip(lower=1))
        marker = markers.setdefault(others, "osv^Dx"[len(markers) % 6])
        axes.plot(line["T"], line["value"], marker=marker, color=colors[row])
    for others, marker in markers.items():
        axes.plot([], [], marker=marker, color="grey", linestyle="", label=others)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.margins(0.1, 0.1)
    axes.set_title(mode, fontsize=8)
    axes.set_xlabel("T (tokens)")
    axes.set_ylabel("MiB above inputs and gradients", fontsize=7)
    axes.legend(fontsize=6)


def _over_tokens(frame: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Records of a metric of cases that have a T, with the sizes apart from T in words."""
    memory = frame[frame["metric"] == metric].copy()
    shapes = [records.shape_of(name) for name in memory["shape"]]
    memory["T"] = [shape.pop("T", None) for shape in shapes]
    sizes = [" ".join(f"{key}={size}" for key, size in shape.items()) for shape in shapes]
    memory["others"] = [
        f"{size} {dtype}" for size, dtype in zip(sizes, memory["dtype"], strict=True)
    ]
    return memory.dropna(subset=["T"])


def plot_group(group: Group, frame: pd.DataFrame, path: Path) -> list[Path]:
    """The figures of a group beside its CSV; returns their paths."""
    if group.draw is not None:
        group.draw(frame, path.with_suffix(".png"))
        return [path.with_suffix(".png")]
    if not group.against_T:
        plot(frame, path.with_suffix(".png"))
        return [path.with_suffix(".png")]
    figures = []
    for metric in group.against_T:
        figures.append(path.with_name(f"{path.stem}-{metric}.png"))
        plot_against_tokens(frame, metric, figures[-1])
    return figures


def plot_against_tokens(frame: pd.DataFrame, metric: str, path: Path) -> None:
    """One metric against T on logarithmic axes: a panel per mode and dtype, a line per row."""
    points = _over_tokens(frame, metric)
    counts = points.groupby("mode", sort=False)["T"].nunique()
    modes = [mode for mode in points["mode"].unique() if counts[mode] > 1] or list(counts.index)
    dtypes = list(points["dtype"].unique())
    colors, labels = _colors(frame), {"time": "seconds", "peak_memory": "MiB above inputs"}
    shape = max(len(dtypes), 1), max(len(modes), 1)
    figure, axes = plt.subplots(
        *shape,
        figsize=(2.8 * shape[1] + 1, 2.6 * shape[0] + 1.2),
        layout="constrained",
        squeeze=False,
        sharex="col",
        sharey="row",
    )
    for across, dtype in zip(axes, dtypes, strict=False):
        for panel, mode in zip(across, modes, strict=False):
            of_panel = points[(points["mode"] == mode) & (points["dtype"] == dtype)]
            _token_lines(panel, of_panel, metric, colors)
            panel.set_title(f"{mode}, {dtype}", fontsize=9)
        across[0].set_ylabel(labels.get(metric, metric))
    for panel, mode in zip(axes[-1], modes, strict=False):
        tokens = sorted(points.loc[points["mode"] == mode, "T"].unique())
        panel.set_xscale("log", base=2)
        panel.set_xticks(tokens, [str(int(count)) for count in tokens])
        panel.set_xlabel("T (tokens)")
    found: dict[str, Artist] = {}
    for panel in axes.flat:
        found |= dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
    columns = min(2 * len(modes), 5)
    figure.legend(
        found.values(), found.keys(), loc="outside lower center", ncols=columns, fontsize=7
    )
    first = frame.iloc[0]
    sizes = ", ".join(dict.fromkeys(points["others"].str.rpartition(" ")[0]))
    figure.suptitle(f"{machine(first)}: {sizes}", fontsize=8)
    save(figure, path)


def _token_lines(panel: Axes, points: pd.DataFrame, metric: str, colors: dict[str, Any]) -> None:
    """A line per row; the smallest values are cut, so that 0 MiB has a place on the axis."""
    for row, line in points.groupby("row", sort=False):
        line = line.sort_values("T")
        ours = row == OURS
        panel.plot(
            line["T"],
            line["value"].astype(float).clip(lower=1e-3 if metric == "time" else 1),
            marker="o",
            color="black" if ours else colors[row],
            label=row,
            linewidth=2.5 if ours else 1.2,
            zorder=3 if ours else 2,
        )
    panel.set_yscale("log")
    panel.grid(alpha=0.3)


def save(figure: Figure, path: Path) -> None:
    """As PNG; the figure is closed."""
    replace_file(path, lambda part: figure.savefig(part, dpi=120, format="png"))
    plt.close(figure)


@contextmanager
def drawing(path: Path, size: tuple[float, float]) -> Iterator[Figure]:
    """A figure to draw on; written to `path`, whole or not at all."""
    figure = plt.figure(figsize=size, layout="constrained")
    try:
        yield figure
        save(figure, path)
    finally:
        plt.close(figure)


def plot(frame: pd.DataFrame, path: Path) -> None:
    """Write the figure of one group as PNG."""
    memory = _over_tokens(frame, "peak_memory")
    modes = list(memory["mode"].unique())
    colors = _colors(frame)
    cases = frame.loc[frame["metric"] == "ratio", "case"].nunique()
    heights = [1 + 0.6 * cases, 4] if modes else [1 + 0.6 * cases]
    figure = plt.figure(figsize=(10, sum(heights)), layout="constrained")
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    _time_bars(parts[0].subplots(), frame, colors)
    if modes:
        panels = parts[1].subplots(1, len(modes), squeeze=False)[0]
        for axes, mode in zip(panels, modes, strict=True):
            _memory_lines(axes, memory, mode, colors)
    first = frame.iloc[0]
    figure.suptitle(f"{first['group']}: {machine(first)}", fontsize=9)
    save(figure, path)
