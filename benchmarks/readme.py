"""Tables of results in benchmarks/README.md, between `<!-- NAME -->` and `<!-- /NAME -->`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
from tabulate import tabulate

from benchmarks import records
from train.runtime.files import replace_file

README = records.ROOT / "benchmarks" / "README.md"
# Error columns of the table: the outputs whose relative errors they show, of which a row has one.
_ERRORS = {
    "logp": ("logprobs", "scores"),
    "dH": ("dhidden",),
    "dW": ("dweight",),
    "gram": ("gram",),
}
_FIGURES = {"time": "time", "peak_memory": "memory"}


def cases(frame: pd.DataFrame) -> str:
    """A line per case, a column per row that was timed in one of them."""
    timed = frame.loc[frame["metric"] == "time", "row"].unique()
    return records.markdown_table(frame[frame["row"].isin(timed)])


def peers(frame: pd.DataFrame, stem: str = "results/peers") -> str:
    """What the group "peers" shows: the two figures; per machine a table per mode."""
    parts = [f"![{title} against T]({stem}-{name}.png)" for name, title in _FIGURES.items()]
    for _, of_machine in frame.groupby(list(records.MACHINE), sort=False):
        parts += [_where(of_machine), mode_tables(of_machine)]
    return "\n\n".join(parts)


def mode_tables(frame: pd.DataFrame) -> str:
    """Per dtype and mode, the rows of the case with most tokens that others were timed at, and of
    the cases beyond it."""
    blocks = []
    for kind, of_mode in frame.groupby(_kinds(frame), sort=False):
        sizes = {case: records.shape_of(shape) for case, shape in of_mode[["case", "shape"]].values}
        ordered = sorted(sizes, key=lambda name: sizes[name].get("T", 0))
        compared = [case for case in ordered if len(_timed(of_mode, case)) > 1] or ordered[-1:]
        for case in ordered[ordered.index(compared[-1]) :]:
            title = f"**{kind}**, {case.removesuffix(str(kind)).strip()}"
            blocks.append(f"{title}:\n\n{_rows_table(of_mode[of_mode['case'] == case])}")
    return "\n\n".join(blocks)


def _rows_table(of_case: pd.DataFrame) -> str:
    lines = [_line(str(row), of_row) for row, of_row in of_case.groupby("row", sort=False)]
    headers = ["", "ms", "x naive", "peak MiB", *(f"{name} error" for name in _ERRORS), ""]
    used = [n for n in range(len(headers)) if any(line[n] for line in lines)]
    return tabulate(
        [[line[n] for n in used] for line in lines],
        headers=[headers[n] for n in used],
        tablefmt="github",
        disable_numparse=True,
    )


def _kinds(frame: pd.DataFrame) -> list[str]:
    """A case's name without its sizes: dtype and mode."""
    pairs = zip(frame["case"], frame["shape"], strict=True)
    return [case.removeprefix(shape).strip() for case, shape in pairs]


def _timed(frame: pd.DataFrame, case: str) -> dict[str, dict[str, float]]:
    """Row -> its numbers, of the rows of a case that were timed."""
    rows = frame[frame["case"] == case].groupby("row", sort=False)
    numbers = {str(row): records.values(of_row) for row, of_row in rows}
    return {row: found for row, found in numbers.items() if "time" in found}


def _span(values: Sequence[float]) -> str:
    low, high = (f"{value:.2g}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def _line(row: str, of_row: pd.DataFrame) -> list[str]:
    metrics, state = records.values(of_row), records.status(of_row)
    versions = of_row.loc[of_row["metric"] == "version", "note"]
    name = f"{row} {versions.iloc[0]}" if len(versions) else row

    def number(metric: str, form: str, scale: float = 1.0) -> str:
        return form.format(scale * metrics[metric]) if metric in metrics else ""

    errors = [
        next((cell for o in outputs if (cell := number(f"relative_error:{o}", "{:.1e}"))), "")
        for outputs in _ERRORS.values()
    ]
    return [
        name,
        number("time", "{:.0f}", 1e3),
        number("ratio", "{:.2f}"),
        number("peak_memory", "{:.0f}"),
        *errors,
        "" if state == records.OK else state,
    ]


def stats_table(frame: pd.DataFrame) -> str:
    """Group "stats", a table per machine: a line per row with time, overhead and memory at the
    largest model, then the time relative to the step without statistics by trace length."""
    machines = frame.groupby(list(records.MACHINE), sort=False)
    tables = [_stats_of_machine(measured) for _, measured in machines]
    return "\n\n".join([*tables, "![overhead and growth](results/stats.png)"])


def _stats_of_machine(frame: pd.DataFrame) -> str:
    shapes = {case: records.shape_of(shape) for case, shape in frame[["case", "shape"]].values}
    model = next(case for case, shape in shapes.items() if shape["L"] > 1)
    growth = {case: shape["R"] for case, shape in shapes.items() if shape["L"] == 1}
    headers = ["", "s", "overhead", "peak MiB", *(f"{size} tokens" for size in growth.values()), ""]
    lines = []
    for row, of_row in frame.groupby("row", sort=False):
        by_case = {case: records.values(part) for case, part in of_row.groupby("case")}
        here = by_case.get(model, {})
        state = records.status(of_row[of_row["case"] == model])
        lines.append([
            str(row), f"{here['time']:.2f}" if "time" in here else "",
            f"{100 * (here['ratio'] - 1):.1f} %" if "ratio" in here else "",
            f"{here['peak_memory']:.0f}" if "peak_memory" in here else "",
            *(f"{by_case[case]['ratio']:.2f}x" if "ratio" in by_case.get(case, {}) else ""
              for case in growth),
            "" if state == records.OK else state,
        ])  # fmt: skip
    table = tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True)
    return (
        f"{model}; by tokens of a trace, a small model of one layer:\n\n{table}\n\n{_where(frame)}"
    )


def steps(frame: pd.DataFrame) -> str:
    """Per machine and case of the group "train": a line per row that was timed, and the rows that
    were not."""
    machines = frame.groupby(list(records.MACHINE), sort=False)
    return "\n\n".join(_machine_steps(measured) for _, measured in machines)


def _machine_steps(frame: pd.DataFrame) -> str:
    blocks = []
    for case, of_case in records.speeds(frame).groupby("case", sort=False):
        table = tabulate(
            of_case.drop(columns="case"),
            tablefmt="github",
            showindex=False,
            headers="keys",
            floatfmt=("", ".0f", ".2f", ".0f", ".2f"),
        )
        states = frame[(frame["case"] == case) & (frame["metric"] == "status")]
        why = [
            f"{row}: {note}" for row, note in states[["row", "note"]].values if note != records.OK
        ]
        blocks += [f"**{case}**:\n\n{table}", *(["; ".join(why) + "."] if why else [])]
    first = frame.iloc[0]
    noise = frame.loc[frame["metric"] == "other_load", "value"].max()
    return "\n\n".join([*blocks, (
        f"Medians of interleaved steps, a process (or two) per row; tokens without padding; peak "
        f"resident memory above the loaded model, gradients and optimizer state included. "
        f"{first['cpu']} ({first['isa']}), {first['threads']} of {first['cores']} cores, torch "
        f"{first['torch']}, commit {first['commit']}, {first['date']}; other processes took up to "
        f"{noise:.0f} % of the CPU."
    )])  # fmt: skip


def _where(frame: pd.DataFrame) -> str:
    first = frame.iloc[0]
    noise = frame.loc[frame["metric"] == "other_load", "value"].max()
    rounds = frame.loc[frame["metric"] == "rounds", "value"]
    runs = "interleaved runs" if rounds.empty else f"{_span(rounds)} interleaved runs"
    return (
        f"Medians of {runs} in one process; peak memory above inputs and gradients; "
        f"errors relative to fp64 (Euclidean). {first['cpu']} ({first['isa']}), "
        f"{first['threads']} of {first['cores']} cores, torch {first['torch']}, commit "
        f"{', '.join(frame['commit'].unique())}, {', '.join(frame['date'].unique())}; other "
        f"processes took up to {noise:.0f} % of the CPU."
    )


def put(blocks: Mapping[str, str], path: Path = README) -> None:
    """Replace what stands between the markers of each name.

    Raises:
        ValueError: naming a block without markers.
    """
    text = path.read_text(encoding="utf-8")
    for name, block in blocks.items():
        pattern = re.compile(rf"<!-- {name} -->\n.*?<!-- /{name} -->", re.S)
        if not pattern.search(text):
            raise ValueError(f"{path.name}: expected <!-- {name} --> and <!-- /{name} -->")
        text = pattern.sub(lambda _, b=block, n=name: f"<!-- {n} -->\n{b}\n<!-- /{n} -->", text)  # type: ignore[misc]
    replace_file(path, lambda part: part.write_text(text, encoding="utf-8"))
