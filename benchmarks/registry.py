"""What is compared: a group is an op, its cases (shape, dtype, mode) and rows (implementations).

A group is data in a module of `benchmarks/groups/` that defines GROUP; the module's name is the
group's name. The first row is the baseline of every ratio.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from benchmarks import groups

Outputs = dict[str, Tensor]
Call = Callable[[], Outputs]


@dataclass(frozen=True)
class Case:
    """One set of inputs: sizes by name (T, D, V, ...), dtype by its torch name, and mode.

    `rounds` is how often each row is timed unless the command line says otherwise.
    """

    shape: Mapping[str, int]
    dtype: str = "float32"
    mode: str = ""
    device: str = "cpu"
    rounds: int = 5

    @property
    def shape_name(self) -> str:
        return " ".join(f"{key}={size}" for key, size in self.shape.items())

    @property
    def name(self) -> str:
        short = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}.get(
            self.dtype, self.dtype
        )
        parts = [self.shape_name, short, self.mode, "" if self.device == "cpu" else self.device]
        return " ".join(part for part in parts if part)

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


@dataclass(frozen=True)
class Gate:
    """What a row must reproduce before it is timed.

    inputs: given to the row. select: picks the compared entries from a row's outputs (all of them
    would not fit in fp64). oracle: those entries in fp64. baseline: the naive row's, which earn the
    tolerance.
    """

    inputs: Any
    select: Callable[[Outputs], Outputs]
    oracle: Outputs
    baseline: Outputs


def _always(_: Case) -> str:
    return ""


def _unpredicted(_: Case) -> int:
    return 0


def _no_facts(_: Case, __: Any) -> dict[str, float]:
    return {}


@dataclass(frozen=True)
class Row:
    """One implementation.

    make: binds it to the inputs of a case; the result runs it once and returns its outputs.
    missing: why it cannot run here ("" when it can), asked before `make`.
    predicted_bytes: peak memory besides the inputs, so that a case that does not fit is refused.
    yardstick: for a row without outputs to check (a bare GEMM), what it stands for.
    modes: those of the cases that the row is for; none means all.
    package: whose version is recorded with the row's results.
    make_certified: what the gate runs in the place of `make`, for a row that states how far it may
        be off: its outputs hold `bound:NAME`, in the Euclidean norm, beside NAME.
    facts: further numbers of a row, by metric; asked for once, outside of what is timed.
    """

    name: str
    make: Callable[[Case, Any], Call]
    missing: Callable[[Case], str] = _always
    predicted_bytes: Callable[[Case], int] = _unpredicted
    yardstick: str = ""
    modes: tuple[str, ...] = ()
    package: str = ""
    make_certified: Callable[[Case, Any], Call] | None = None
    facts: Callable[[Case, Any], dict[str, float]] = _no_facts


@dataclass(frozen=True)
class Group:
    """An op: its cases, the subset of quick ones, its rows, its inputs and its gate.

    tiny: a very small case of the same dtype and mode; it runs first where memory is measured, so
    that what libraries allocate once is not counted.
    against_T: metrics that get a figure of their own, a line per row against the tokens.
    memory: whether peak memory is measured, each row in a process of its own.
    draw: the group's own figure, from the records to a PNG, in the place of all others.
    """

    name: str
    title: str
    cases: tuple[Case, ...]
    quick: tuple[Case, ...]
    rows: tuple[Row, ...]
    make_inputs: Callable[[Case], Any]
    gate: Callable[[Case, Any], Gate]
    tiny: Callable[[Case], Case]
    against_T: tuple[str, ...] = ()
    memory: bool = True
    draw: Callable[[pd.DataFrame, Path], None] | None = None

    @property
    def baseline(self) -> Row:
        return self.rows[0]

    def rows_of(self, case: Case) -> tuple[Row, ...]:
        """The rows that are for the case's mode; their names are distinct."""
        return tuple(row for row in self.rows if not row.modes or case.mode in row.modes)

    def row(self, name: str, case: Case | None = None) -> Row:
        """The row of that name, of all or of those for a case; ValueError lists the names."""
        rows = self.rows if case is None else self.rows_of(case)
        found = next((row for row in rows if row.name == name), None)
        if found is None:
            raise ValueError(f"row: expected one of {[r.name for r in rows]}, got {name!r}")
        return found


def names() -> list[str]:
    """Names of all groups."""
    return sorted(module.name for module in pkgutil.iter_modules(groups.__path__))


def load(name: str) -> Group:
    """The group of that name; ValueError lists the names."""
    if name not in names():
        raise ValueError(f"group: expected one of {names()}, got {name!r}")
    group: Group = importlib.import_module(f"{groups.__name__}.{name}").GROUP
    return group


def why_not(package: str, module: str) -> str:
    """Why an optional peer cannot run; '' when `module` can be imported."""
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        return f"{package} is not installed"
    try:
        importlib.import_module(module)
    except Exception as error:
        return f"{package} does not import: {error}"
    return ""
