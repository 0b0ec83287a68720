"""What benchmarks/README.md shows of the results of `benchmarks.gpu`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from tabulate import tabulate

from benchmarks import records

# Modes of the LM head with the error that each is judged by.
_MODES = {"scores": "logprobs", "frozen": "dhidden", "trained": "dweight"}
_SHORT = {"logprobs": "logp", "dhidden": "dH", "dweight": "dW"}


def _table(lines: Sequence[Sequence[str]], headers: Sequence[str]) -> str:
    return tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True)


def _rows(frame: pd.DataFrame, case: str) -> dict[str, dict[str, float]]:
    """Row -> metrics, of the rows that were timed."""
    found = frame[frame["case"] == case].groupby("row", sort=False)
    numbers = {str(row): records.values(part) for row, part in found}
    return {row: metrics for row, metrics in numbers.items() if "time" in metrics}


def _head(frame: pd.DataFrame, shape: str) -> str:
    """Rows against modes: milliseconds, memory, and the error of the mode's own result."""
    of_shape = frame[frame["shape"] == shape]
    cases = dict(zip(of_shape["mode"], of_shape["case"], strict=True))
    numbers = {mode: _rows(of_shape, cases[mode]) for mode in _MODES}
    headers, lines = [""], []
    for mode, output in _MODES.items():
        headers += [f"{mode}: ms", "MiB", f"{_SHORT[output]} error"]
    for row in of_shape["row"].unique():
        cells = [str(row)]
        for mode, output in _MODES.items():
            found = numbers[mode].get(str(row))
            cells += ["", "", ""] if found is None else [
                f"{1e3 * found['time']:.1f}", f"{found['peak_memory']:.0f}",
                f"{found[f'relative_error:{output}']:.1e}",
            ]  # fmt: skip
        if any(cells[1:]):
            lines.append(cells)
    return f"**{shape}**, bf16:\n\n{_table(lines, headers)}"


def _tail(frame: pd.DataFrame) -> str:
    headers, lines = [""], []
    modes = list(frame["mode"].unique())
    cases = dict(zip(frame["mode"], frame["case"], strict=True))
    for mode in modes:
        headers += [f"{mode}: ms", "dH error", "dW error"]
    for row in frame["row"].unique():
        cells = [str(row)]
        for mode in modes:
            found = _rows(frame, cases[mode])[str(row)]
            cells += [
                f"{1e3 * found['time']:.1f}",
                f"{found['relative_error:dhidden']:.1e}",
                f"{found['relative_error:dweight']:.1e}",
            ]
        lines.append(cells)
    shape = frame["shape"].iloc[0]
    return (
        f"**Hidden and weight trained, by `tail_tolerance`** and kind of tokens, {shape}, bf16:"
        f"\n\n{_table(lines, headers)}"
    )


def _stats(frame: pd.DataFrame) -> str:
    case = frame["case"].iloc[0]
    parts = [
        f"{row} {1e3 * found['time']:.0f} ms ({found['ratio']:.2f}x)"
        for row, found in _rows(frame, case).items()
    ]
    return f"**A step with gradient statistics**, {frame['shape'].iloc[0]}: {', '.join(parts)}."


def _lines(frame: pd.DataFrame) -> str:
    cells = [
        [line, limit, f"{measured:.4g}", "yes" if holds else "no"]
        for line, limit, measured, holds in frame.values
    ]
    return _table(cells, ["line", "limit", "measured", "holds"])


def section(folder: Path) -> str:
    """The tables of one GPU, from the files that `benchmarks.gpu` wrote into `folder`."""
    head, tail, stats = (
        records.read_csv(folder / f"gpu-{name}.csv") for name in ("logprobs", "tail", "stats")
    )
    ceilings = pd.read_csv(folder / "ceilings.csv", dtype={"commit": str}).iloc[0]
    shapes = [shape for shape in head["shape"].unique() if "D=4096" in shape]
    where = (
        f"{ceilings['gpu']}: copy {ceilings['copy'] / 1e9:.0f} GB/s, bf16 matmul "
        f"{ceilings['matmul'] / 1e12:.0f} TFLOP/s. torch {ceilings['torch']}, Python "
        f"{ceilings['python']}, commit {ceilings['commit']}, {ceilings['date']}. Medians of "
        "interleaved runs; MiB above inputs and results; errors relative to fp64 (Euclidean). All "
        f"sizes: `results/{folder.name}/`."
    )
    return "\n\n".join([
        where, *(_head(head, shape) for shape in shapes), _tail(tail),
        f"![time and error by tolerance](results/{folder.name}/gpu-tail.png)",
        _stats(stats), _lines(pd.read_csv(folder / "lines.csv")),
    ])  # fmt: skip
