"""The cases and rows of all groups, as parameters of `bench_groups.py`."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from benchmarks import measure, records, registry, run
from benchmarks.registry import Case, Gate, Group, Row

# `-k` takes no expression with a space or an equals sign in it.
_ID = str.maketrans({" ": "-", "=": None})


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="the full cases instead of the quick ones")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "timed_row" not in metafunc.fixturenames:
        return
    full = metafunc.config.getoption("--full")
    timed = [
        (group, case, row)
        for group in map(registry.load, registry.names())
        for case in (group.cases if full else group.quick)
        for row in group.rows_of(case)
    ]
    ids = [f"{group.name}-{case.name}-{row.name}".translate(_ID) for group, case, row in timed]
    metafunc.parametrize("timed_row", timed, indirect=True, ids=ids)


@functools.lru_cache(maxsize=1)
def _prepared(group_name: str, case_name: str) -> tuple[Any, Gate]:
    """Inputs and gate of the case at hand: its rows come one after the other."""
    group = registry.load(group_name)
    case = next(case for case in (*group.quick, *group.cases) if case.name == case_name)
    inputs = group.make_inputs(case)
    return inputs, group.gate(case, inputs)


@pytest.fixture
def timed_row(request: pytest.FixtureRequest, benchmark: Any) -> Any:
    """Gate one row of one case, then return a function that benchmarks it."""
    group, case, row = request.param
    inputs, gate = _prepared(group.name, case.name)
    candidate = run.admit(row, case, inputs, gate)
    if candidate.call is None:
        cannot = candidate.status.startswith((records.MISSING, records.REFUSED))
        (pytest.skip if cannot else pytest.fail)(candidate.status)
    benchmark.group = f"{group.name}: {case.name}"
    benchmark.extra_info.update(_facts(group, case, row))
    call = candidate.call

    def once() -> None:
        call()
        measure.synchronize(case.device)

    return functools.partial(benchmark.pedantic, once, rounds=case.rounds, warmup_rounds=1)


def _facts(group: Group, case: Case, row: Row) -> dict[str, str]:
    return {"baseline": group.baseline.name, "row": row.name, "case": case.name}
