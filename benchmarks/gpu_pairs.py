"""The group "gpu-head-pairs": the trained head under a pair's loss, in one pass and by tiles that
are computed again, with and without the statistics of a unit's two gradients, on a GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from benchmarks.gpu_groups import VOCAB, head_inputs
from benchmarks.head_cases import tiny
from benchmarks.peers import pair
from benchmarks.registry import Case, Group

MIB = 2**20


class Line(NamedTuple):
    """What a row of a case must reach on an H100 or H200: milliseconds, and MiB beside."""

    row: str
    most_ms: float
    most_mib: float | None = None


def headline(device: str = "cuda", vocab: int = VOCAB) -> Case:
    """One pair of 2 x 4096 tokens."""
    return Case({"T": 8192, "D": 4096, "V": vocab}, "bfloat16", pair.MODE, device, rounds=3)


def unit(device: str = "cuda", vocab: int = VOCAB) -> Case:
    """Traces of 2 x 8192 tokens and empty ones of 2 x 512."""
    shape = {"T": 17_408, "E": 1024, "D": 1536, "V": vocab}
    return Case(shape, "bfloat16", pair.MODE, device, rounds=3)


def long(device: str = "cuda", vocab: int = VOCAB) -> Case:
    """Whether memory grows with T: one pair of 2 x 32 768 tokens."""
    return Case({"T": 65_536, "D": 4096, "V": vocab}, "bfloat16", pair.MODE, device, rounds=1)


def _room(case: Case) -> float:
    """Two fp32 tiles of dW and 1.3 GiB."""
    return 2 * 4 * case.shape["V"] * case.shape["D"] / MIB + 1.3 * 1024


LINES = {
    headline().name: Line("one pass", 47.0, _room(headline())),
    unit().name: Line("one pass + statistics", 46.0),
    long().name: Line("one pass", float("inf"), _room(long())),
}


def pairs_group(device: str, vocab: int = VOCAB, shrink: int = 1) -> Group:
    """shrink: divides tokens and dimensions, for a machine without a GPU."""
    cases = []
    for case in (headline(device, vocab), unit(device, vocab), long(device, vocab)):
        sizes = {key: size // shrink for key, size in case.shape.items() if key != "V"}
        cases.append(replace(case, shape={**sizes, "V": vocab}))
    selective = next(row for row in pair.ROWS if row.name == "TRL selective")
    return Group(
        name="gpu-head-pairs",
        title="a pair's loss through the trained head on a GPU",
        cases=tuple(cases),
        quick=tuple(cases[:2]),
        rows=(pair.NAIVE, selective, *pair.own_rows("triton"), *pair.measured_rows("triton")),
        make_inputs=head_inputs,
        gate=pair.gate,
        tiny=tiny,
    )
