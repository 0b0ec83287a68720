"""Results as long-form records, one per measured number: written as CSV, shown as tables."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import torch
from tabulate import tabulate

import bvpo_kernels
from benchmarks.registry import Case
from train.runtime.files import replace_file

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
# What a record says, and then where and when it was measured.
MEASURED = ("group", "case", "shape", "dtype", "mode", "device", "row", "metric", "value", "unit",
            "note")  # fmt: skip
WHERE = ("threads", "cpu", "cores", "isa", "ram_gib", "gpu", "torch", "python", "bvpo_kernels",
         "commit", "date")  # fmt: skip
COLUMNS = (*MEASURED, *WHERE)
WORDS = ("note", "torch", "python", "bvpo_kernels", "commit", "date")
# What makes times comparable: a file holds the same case once for each.
MACHINE = ("threads", "cpu", "isa")
OK = "ok"
MISSING = "missing: "
FAILED = "failed: "
REFUSED = "refused: "
# Instruction sets beyond what torch's capability string tells, by their name in /proc/cpuinfo.
_EXTRA_ISA = ("avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")

Record = dict[str, Any]


def record(
    group: str, case: Case, row: str, metric: str, value: float | None, unit: str, note: str = ""
) -> Record:
    """One measured number (or, with no value, a fact in words)."""
    return {
        "group": group, "case": case.name, "shape": case.shape_name, "dtype": case.dtype,
        "mode": case.mode, "device": case.device, "row": row, "metric": metric, "value": value,
        "unit": unit, "note": note,
    }  # fmt: skip


def _cpu_fields() -> dict[str, str]:
    """The first processor of /proc/cpuinfo; empty where there is none."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _commit() -> str:
    """Short hash of the checkout, with a plus when tracked files beside results differ."""
    changed = ["status", "--porcelain", "-uno", "--", ".", ":(exclude)benchmarks/results"]
    try:
        out = [
            subprocess.run(
                ["git", *command], cwd=ROOT, capture_output=True, text=True, check=True
            ).stdout.strip()
            for command in (["rev-parse", "--short", "HEAD"], changed)
        ]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return out[0] + ("+" if out[1] else "")


def environment(threads: int) -> Record:
    """Machine, versions, date and commit: the same for all records of a run."""
    cpu = _cpu_fields()
    flags = cpu.get("flags", cpu.get("Features", "")).split()
    isa = [torch.backends.cpu.get_cpu_capability(), *(f for f in _EXTRA_ISA if f in flags)]
    return {
        "threads": threads,
        "cpu": cpu.get("model name") or platform.processor() or platform.machine(),
        "cores": psutil.cpu_count(logical=False) or os.cpu_count(),
        "isa": " ".join(isa),
        "ram_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "bvpo_kernels": bvpo_kernels.__version__,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }


def is_machine(entry: Record, where: Mapping[str, Any]) -> bool:
    """Whether a record was made by the machine, and the number of threads, of `where`."""
    return all(str(entry[column]) == str(where[column]) for column in MACHINE)


def _on(frame: pd.DataFrame, where: Mapping[str, Any]) -> pd.Series:
    """Which records were made by the machine, and the number of threads, of `where`."""
    same = [frame[column].astype(str) == str(where[column]) for column in MACHINE]
    return pd.concat(same, axis=1).all(axis=1)


def of_machine(frame: pd.DataFrame, where: Mapping[str, Any]) -> pd.DataFrame:
    """The records that were made by the machine, and the number of threads, of `where`."""
    return frame[_on(frame, where)]


def kept(
    path: Path, cases: Iterable[Case], rows: Iterable[str], where: Mapping[str, Any]
) -> list[Record]:
    """The records of a file, if there is one, but for those of the cases' rows on this machine."""
    if not path.exists():
        return []
    frame = read_csv(path)
    again = frame["case"].isin([case.name for case in cases]) & frame["row"].isin(list(rows))
    return frame[~(again & _on(frame, where))].to_dict("records")


def in_order(records: Iterable[Record], cases: Sequence[str], rows: Sequence[str]) -> list[Record]:
    """The records by case and row in the given orders; what is not listed comes first, what is
    listed twice (as rows of different modes) has its first place."""
    case_places = {name: place for place, name in reversed(list(enumerate(cases)))}
    row_places = {name: place for place, name in reversed(list(enumerate(rows)))}
    return sorted(
        records,
        key=lambda one: (case_places.get(one["case"], -1), row_places.get(one["row"], -1)),
    )


def write_csv(path: Path, records: Iterable[Record]) -> None:
    """Records with the columns of COLUMNS; the file appears at once or not at all."""
    frame = pd.DataFrame(list(records), columns=list(COLUMNS))
    replace_file(path, lambda part: frame.to_csv(part, index=False))


def read_csv(path: Path) -> pd.DataFrame:
    """A file of `write_csv`; ValueError names what is wrong with another one."""
    if not path.exists():
        raise ValueError(
            f"{path.name}: expected a result of `python -m benchmarks.run`, found none"
        )
    # A commit may consist of digits: a number to whoever is not told.
    frame = pd.read_csv(
        path, keep_default_na=False, na_values={"value": [""]}, dtype=dict.fromkeys(WORDS, str)
    )
    if list(frame.columns) != list(COLUMNS):
        raise ValueError(
            f"{path}: line 1: expected columns {list(COLUMNS)}, got {list(frame.columns)}"
        )
    return frame


def shape_of(shape_name: str) -> dict[str, int]:
    """Sizes by name, from `Case.shape_name`."""
    return {key: int(size) for key, _, size in (part.partition("=") for part in shape_name.split())}


def values(frame: pd.DataFrame) -> dict[str, float]:
    """Metric -> value, of the records of one case and row."""
    measured = frame.dropna(subset=["value"])
    return dict(zip(measured["metric"], measured["value"].astype(float), strict=True))


def status(frame: pd.DataFrame) -> str:
    """The status note of one case and row."""
    return str(frame.loc[frame["metric"] == "status", "note"].iloc[0])


def baseline(frame: pd.DataFrame) -> str:
    """The row that ratios are relative to: the first."""
    return str(frame["row"].iloc[0])


def speeds(frame: pd.DataFrame) -> pd.DataFrame:
    """Per timed case and row of a group whose rows say their `tokens`: tokens/s, peak memory, and
    both relative to the first row."""
    lines: list[dict[str, Any]] = []
    first = baseline(frame)
    for case, of_case in frame.groupby("case", sort=False):
        base: dict[str, float] = {}
        for row, of_row in of_case.groupby("row", sort=False):
            found = values(of_row)
            if "time" not in found:
                continue
            base = base or found
            lines.append({
                "case": case, "row": row, "tokens/s": found["tokens"] / found["time"],
                f"x {first}": 1 / found["ratio"], "peak MiB": found["peak_memory"],
                f"peak / {first}": found["peak_memory"] / base["peak_memory"],
            })  # fmt: skip
    return pd.DataFrame(lines)


def _duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _error_columns(metrics: Mapping[str, float]) -> dict[str, str]:
    names = [key.removeprefix("max_error:") for key in metrics if key.startswith("max_error:")]
    return {
        f"{name} error (max, rel.)": (
            f"{metrics[f'max_error:{name}']:.1e}, {metrics[f'relative_error:{name}']:.1e}"
        )
        for name in names
    }


def terminal_table(frame: pd.DataFrame) -> str:
    """Every case and row: time, spread, ratio, memory, errors, and why a time is missing."""
    lines = []
    absent, ratio = _absent(frame), f"x {baseline(frame)}"
    for case, of_case in frame[~frame["row"].isin(absent)].groupby("case", sort=False):
        shown = str(case)
        for row, of_row in of_case.groupby("row", sort=False):
            metrics, state = values(of_row), status(of_row)
            line = {"case": shown, "row": row}
            if "time" in metrics:
                spread = (metrics["time_high"] - metrics["time_low"]) / metrics["time"]
                line |= {"time": _duration(metrics["time"]), "spread": f"{100 * spread:.0f} %"}
            if "ratio" in metrics:
                line[ratio] = f"{metrics['ratio']:.2f}"
            if "peak_memory" in metrics:
                line["MiB"] = f"{metrics['peak_memory']:.0f}"
            lines.append({**line, **_error_columns(metrics), "note": "" if state == OK else state})
            shown = ""
    order = ["case", "row", "time", "spread", ratio, "MiB"]
    order += [*sorted({key for line in lines for key in line} - {*order, "note"}), "note"]
    cells = [[line.get(key, "") for key in order] for line in lines]
    table = tabulate(cells, headers=order, disable_numparse=True)
    return "\n".join([table, *(f"{row}: {reason}" for row, reason in absent.items())])


def _absent(frame: pd.DataFrame) -> dict[str, str]:
    """Rows that cannot run in any case, all for one reason, and that reason."""
    states = frame[frame["metric"] == "status"]
    notes = {str(row): set(of_row["note"]) for row, of_row in states.groupby("row", sort=False)}
    return {
        row: reasons.pop()
        for row, reasons in notes.items()
        if len(reasons) == 1 and next(iter(reasons)).startswith((MISSING, FAILED))
    }


def markdown_table(frame: pd.DataFrame) -> str:
    """A table per machine: a line per case, a column per row, with time, ratio and peak memory.

    A row that cannot run in any case is left out of the table and named under it.
    """
    machines = frame.groupby(list(MACHINE), sort=False)
    return "\n\n".join(_machine_table(measured) for _, measured in machines)


def _machine_table(frame: pd.DataFrame) -> str:
    absent = _absent(frame)
    rows = [row for row in frame["row"].unique() if row not in absent]
    lines = []
    for case, of_case in frame.groupby("case", sort=False):
        cells = []
        for row in rows:
            of_row = of_case[of_case["row"] == row]
            cells.append(_markdown_cell(values(of_row), status(of_row)) if len(of_row) else "")
        lines.append([case, *cells])
    first = frame.iloc[0]
    noise = frame.loc[frame["metric"] == "other_load", "value"].max()
    text = [
        tabulate(lines, headers=["case", *rows], tablefmt="github", disable_numparse=True),
        f"Median time per call, time relative to {baseline(frame)}, peak memory above inputs "
        f"and gradients. {first['cpu']}, {first['cores']} cores ({first['isa']}), "
        f"{first['threads']} threads, {first['ram_gib']} GiB; GPU: {first['gpu']}; torch "
        f"{first['torch']}, Python {first['python']}, bvpo_kernels {first['bvpo_kernels']}, commit "
        f"{', '.join(frame['commit'].unique())}, {', '.join(frame['date'].unique())}; other "
        f"processes took up to {noise:.0f} % of the CPU.",
    ]
    if absent:
        text.append("\n".join(f"- {row}: {reason}" for row, reason in absent.items()))
    return "\n\n".join(text)


def _markdown_cell(metrics: Mapping[str, float], state: str) -> str:
    if "time" not in metrics:
        return state
    parts = [_duration(metrics["time"])]
    if "ratio" in metrics:
        parts.append(f"{metrics['ratio']:.2f}x")
    if "peak_memory" in metrics:
        parts.append(f"{metrics['peak_memory']:.0f} MiB")
    return ", ".join(parts)
