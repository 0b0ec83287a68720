"""Tables of results in README.md, between `<!-- NAME -->` and `<!-- /NAME -->`."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
from tabulate import tabulate

from benchmarks import records

README = records.ROOT / "README.md"
# Error columns of the table: the outputs whose relative errors they show, of which a row has one.
_ERRORS = {
    "logp": ("logprobs", "scores"),
    "dH": ("dhidden",),
    "dW": ("dweight",),
    "gram": ("gram",),
}


def mode_tables(frame: pd.DataFrame) -> str:
    """Per mode, its case with most tokens: a line per row, with times, memory and errors."""
    blocks = []
    for mode, of_mode in frame.groupby("mode", sort=False):
        sizes = {case: records.shape_of(shape) for case, shape in of_mode[["case", "shape"]].values}
        case = max(sizes, key=lambda name: sizes[name].get("T", 0))
        lines = [
            _line(str(row), of_row)
            for row, of_row in of_mode[of_mode["case"] == case].groupby("row", sort=False)
        ]
        headers = ["", "ms", "x naive", "peak MiB", *(f"{name} error" for name in _ERRORS), ""]
        used = [n for n in range(len(headers)) if any(line[n] for line in lines)]
        table = tabulate(
            [[line[n] for n in used] for line in lines], headers=[headers[n] for n in used],
            tablefmt="github", disable_numparse=True,
        )  # fmt: skip
        size = case.removesuffix(str(mode)).strip()
        blocks.append(f"**{mode}**, {size}:\n\n{table}")
    return "\n\n".join([*blocks, _where(frame)])


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
        name, number("time", "{:.0f}", 1e3), number("ratio", "{:.2f}"),
        number("peak_memory", "{:.0f}"), *errors, "" if state == records.OK else state,
    ]  # fmt: skip


def _where(frame: pd.DataFrame) -> str:
    first = frame.iloc[0]
    noise = frame.loc[frame["metric"] == "other_load", "value"].max()
    return (
        f"Medians of interleaved runs in one process; peak memory above inputs and gradients; "
        f"errors relative to fp64 (Euclidean). {first['cpu']} ({first['isa']}), "
        f"{first['threads']} of {first['cores']} cores, torch {first['torch']}, commit "
        f"{first['commit']}, {first['date']}; other processes took up to {noise:.0f} % of the CPU."
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
    part = path.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
