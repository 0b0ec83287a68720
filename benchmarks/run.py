"""`python -m benchmarks.run NAME`: gate, time, measure, then print and write the results."""

from __future__ import annotations

import gc
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from jsonargparse import ArgumentParser
from jsonargparse.typing import PositiveFloat, PositiveInt
from tqdm import tqdm

from benchmarks import gpu_readme, measure, plot, proxies, readme, records, registry, verify
from benchmarks.records import Record
from benchmarks.registry import Call, Case, Gate, Group, Row

# Above this share of the machine in other hands, a time is said to be noisy.
NOISY_PERCENT = 5.0
NOTHING: Mapping[str, str] = MappingProxyType({})


@dataclass
class Candidate:
    """A row in one case: what the gate said, and the call to time if it passed."""

    row: Row
    status: str = records.OK
    call: Call | None = None
    gate_seconds: float = 0.0
    verdict: verify.Verdict | None = None


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def too_long(row: Row, case: Case, found: Sequence[Record], longest: float | None) -> str:
    """Why a row is not started: at its time per token so far a call would outlast `longest` s."""
    tokens = case.shape.get("T")
    if longest is None or tokens is None:
        return ""
    times = {
        records.shape_of(r["shape"])["T"]: r["value"]
        for r in found
        if (r["row"], r["mode"], r["dtype"], r["metric"])
        == (row.name, case.mode, case.dtype, "time")
    }
    if not times:
        return ""
    measured = max(times)
    expected = times[measured] * tokens / measured
    if expected <= longest:
        return ""
    return f"about {expected:.0f} s a call, by its time at T={measured}; the limit is {longest:g} s"


def admit(row: Row, case: Case, inputs: Any, gate: Gate, refused: str = "") -> Candidate:
    """Run a row once on the gate's inputs; a peer that fails is a row that says why."""
    if missing := row.missing(case):
        return Candidate(row, f"{records.MISSING}{missing}")
    if refused := measure.refusal(row.predicted_bytes(case), case.device) or refused:
        return Candidate(row, f"{records.REFUSED}{refused}")
    try:
        start = time.perf_counter()
        outputs = (row.make_certified or row.make)(case, gate.inputs)()
        measure.synchronize(case.device)
        elapsed = time.perf_counter() - start
        call = row.make(case, inputs)
    except Exception as error:
        return Candidate(row, f"{records.FAILED}{_reason(error)}")
    if row.yardstick:
        return Candidate(row, f"yardstick: {row.yardstick}", call, elapsed)
    verdict = verify.judge(outputs, gate)
    if verdict.failure:
        return Candidate(row, f"FAIL: {verdict.failure}", verdict=verdict)
    return Candidate(row, records.OK, call, elapsed, verdict)


def _peak(group: Group, case: Case, row: Row) -> tuple[int | None, str]:
    """Peak memory, and what to note when it could not be measured."""
    if case.device.startswith("cuda"):
        inputs = group.make_inputs(case)
        return measure.peak_bytes(lambda: row.make(case, inputs)(), case.device), ""
    try:
        return measure.peak_in_subprocess(group.name, case, row.name, torch.get_num_threads()), ""
    except RuntimeError as error:
        return None, _reason(error)


def run_case(
    group: Group, case: Case, rounds: int | None, bar: tqdm, refused: Mapping[str, str] = NOTHING
) -> list[Record]:
    """All rows of one case: gate, interleaved times, memory; as records. `refused`: why, by row."""
    inputs = group.make_inputs(case)
    gate = group.gate(case, inputs)
    candidates = [
        admit(row, case, inputs, gate, refused.get(row.name, "")) for row in group.rows_of(case)
    ]
    del gate
    gc.collect()
    calls = {c.row.name: c.call for c in candidates if c.call is not None}
    first = {c.row.name: c.gate_seconds for c in candidates}
    with measure.OtherLoad() as load:
        times = measure.interleave(calls, rounds or case.rounds, case.device, first, bar.update)
    timings = measure.summarize(times, group.baseline.name)
    facts = {c.row.name: c.row.facts(case, inputs) for c in candidates if c.call is not None}
    del inputs, calls
    for candidate in candidates:
        candidate.call = None
    out: list[Record] = []
    for candidate in candidates:
        row = candidate.row
        timing = timings.get(row.name)
        peak, why = _peak(group, case, row) if timing and group.memory else (None, "")
        note = candidate.status if not why else f"{candidate.status}; memory: {why}"
        out += _records(group, case, candidate, timing, peak, note, load.percent)
        out += [
            records.record(group.name, case, row.name, metric, value, "")
            for metric, value in facts.get(row.name, {}).items()
        ]
    return out


def _records(
    group: Group, case: Case, candidate: Candidate, timing: measure.Timing | None,
    peak: int | None, note: str, other_load: float,
) -> list[Record]:  # fmt: skip
    name = candidate.row.name

    def make(metric: str, value: float | None, unit: str, note: str = "") -> Record:
        return records.record(group.name, case, name, metric, value, unit, note)

    out = [make("status", None, "", note)]
    if candidate.row.package and timing:
        out.append(make("version", None, "", version(candidate.row.package)))
    if timing:
        out += [
            make("time", timing.median, "s"),
            make("time_low", timing.low, "s"),
            make("time_high", timing.high, "s"),
            make("rounds", timing.rounds, ""),
            make("other_load", other_load, "%"),
        ]
        if timing.ratio is not None:
            out.append(make("ratio", timing.ratio, f"x {group.baseline.name}"))
    if peak is not None:
        out.append(make("peak_memory", peak / measure.MIB, "MiB"))
    for output, error in (candidate.verdict.errors if candidate.verdict else {}).items():
        out.append(make(f"max_error:{output}", error.largest, ""))
        out.append(make(f"relative_error:{output}", error.relative, ""))
    return out


def select_cases(group: Group, quick: bool, pattern: str | None) -> Sequence[Case]:
    """Cases whose name matches; ValueError when none does."""
    cases = group.quick if quick else group.cases
    chosen = [case for case in cases if re.search(pattern or "", case.name)]
    if not chosen:
        raise ValueError(f"filter: {pattern!r} matches none of {[case.name for case in cases]}")
    return chosen


def select_rows(group: Group, pattern: str | None) -> Group:
    """The group with its baseline and the rows whose name matches; ValueError when none does."""
    names = {row.name for row in group.rows if re.search(pattern or "", row.name)}
    if not names:
        raise ValueError(f"rows: {pattern!r} matches none of {[row.name for row in group.rows]}")
    kept = [row for row in group.rows if row.name in names | {group.baseline.name}]
    return replace(group, rows=tuple(kept))


def run_group(
    group: Group,
    quick: bool = False,
    out: Path | None = None,
    rounds: int | None = None,
    threads: int | None = None,
    filter: str | None = None,
    rows: str | None = None,
    update: bool = False,
    longest: float | None = None,
    no_memory: bool = False,
    until: float = math.inf,
) -> Path:
    """Measure a group; returns the path of the CSV, beside which the PNG lies.

    Args:
        group: what to measure.
        quick: the small cases only; results go to NAME-quick.*.
        out: folder of the results (default benchmarks/results); file names are NAME.* in it.
        rounds: times that every row is measured (default: as the case says).
        threads: CPU threads (default: as torch chooses).
        filter: regular expression on case names; the results of a part go to NAME-part.*.
        rows: regular expression on the names of rows besides the baseline; a part likewise.
        update: put the results of a part into NAME.* instead, in place of what its cases and rows
            had there on this machine and number of threads; the others stay. A row's ratio is to
            the baseline that ran beside it.
        longest: seconds of a call; a row that, by its time at fewer tokens in the same mode, would
            take longer is not started, and says so.
        no_memory: leave peak memory out, which runs every row once more, in a process of its own.
        until: what `time.monotonic()` says when no further case is begun; the first always is.
    """
    cases = select_cases(group, quick, filter)
    every_row = [row.name for row in group.rows]
    group = select_rows(group, rows)
    if no_memory:
        group = replace(group, memory=False)
    if threads is not None:
        torch.set_num_threads(threads)
    part = (filter or rows) and not update
    suffix = "" if out else ("-quick" if quick else "") + ("-part" if part else "")
    path = (out or records.RESULTS) / f"{group.name}{suffix}.csv"
    where = records.environment(torch.get_num_threads())
    measured_rows = [row.name for row in group.rows]
    others = records.kept(path, cases, measured_rows, where) if update else []
    earlier = [entry for entry in others if records.is_machine(entry, where)]
    found: list[Record] = []
    steps = sum((rounds or case.rounds) * len(group.rows_of(case)) for case in cases)
    with tqdm(total=steps, unit="sample") as bar:
        done = 0
        for number, case in enumerate(cases):
            bar.set_description(case.name)
            if number and time.monotonic() > until:
                left = ", ".join(case.name for case in cases[number:])
                print(f"Out of time, not measured: {left}")
                break
            known = [*earlier, *found]
            refused = {row.name: too_long(row, case, known, longest) for row in group.rows_of(case)}
            found += run_case(group, case, rounds, bar, refused)
            measured = [{**entry, **where} for entry in found]
            every = [case.name for case in (group.quick if quick else group.cases)]
            records.write_csv(path, records.in_order([*others, *measured], every, every_row))
            done += (rounds or case.rounds) * len(group.rows_of(case))
            bar.update(done - bar.n)
    frame = records.of_machine(records.read_csv(path), where)
    figures = plot.plot_group(group, frame, path)
    print(records.terminal_table(frame))
    noisy = frame.loc[frame["metric"] == "other_load", "value"].astype(float).max()
    if noisy > NOISY_PERCENT:
        print(f"Noisy: other processes took up to {noisy:.0f} % of the CPU while rows were timed.")
    print(f"Wrote {path} and {', '.join(figure.name for figure in figures)}.")
    return path


def show_table(name: str, out: Path | None = None) -> None:
    """Print the results in NAME.csv as Markdown."""
    print(records.markdown_table(records.read_csv((out or records.RESULTS) / f"{name}.csv")))


def write_readme() -> None:
    """Put the results that have a place in benchmarks/README.md there, where they were measured."""
    tables = {
        "logprobs": lambda path: readme.cases(records.read_csv(path)),
        "peers": lambda path: readme.peers(records.read_csv(path)),
        "stats": lambda path: readme.stats_table(records.read_csv(path)),
        "train": lambda path: readme.steps(records.read_csv(path)),
        "proxies": lambda path: proxies.markdown(proxies.read(path)),
    }
    paths = {name: records.RESULTS / f"{name}.csv" for name in tables}
    found = {name: table(paths[name]) for name, table in tables.items() if paths[name].exists()}
    found["gpu"] = gpu_readme.section(records.RESULTS / "h200")
    readme.put(found)


def _parser(groups: Mapping[str, Group]) -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m benchmarks.run",
        description="Benchmarks, gated on correctness and timed against naive code.",
    )
    commands = parser.add_subcommands(required=True, dest="command", metavar="NAME")
    for name, group in groups.items():
        command = ArgumentParser(description=group.title)
        add = command.add_argument
        add("--quick", action="store_true", help="the small cases only; written to NAME-quick.*")
        add("--out", type=Path, help="folder of NAME.csv and NAME.png")
        add("--rounds", type=PositiveInt, help="times that each row is measured")
        add("--threads", type=PositiveInt, help="CPU threads")
        add("--filter", help="regular expression on case names; written to NAME-part.*")
        add("--rows", help="regular expression on rows' names; written to NAME-part.*")
        add("--no-memory", action="store_true", help="leave out peak memory")
        add("--update", action="store_true", help="write a part into NAME.*, among other cases")
        add("--longest", type=PositiveFloat, help="seconds of a call that is still worth timing")
        commands.add_subcommand(name, command, help=group.title)
    table = ArgumentParser(description="Print NAME.csv as a Markdown table.")
    table.add_argument("name", metavar="NAME", help="a group, or a group and suffix: NAME-quick")
    table.add_argument("--out", type=Path, help="folder of NAME.csv")
    into = ArgumentParser(description="Put the tables of results into benchmarks/README.md.")
    commands.add_subcommand("readme", into, help="rewrite the tables of benchmarks/README.md")
    commands.add_subcommand("table", table, help="print results as a Markdown table: table NAME")
    return parser


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of `python -m benchmarks.run`."""
    groups = {name: registry.load(name) for name in registry.names()}
    parser = _parser(groups)
    parsed = parser.parse_args(args)
    options = parsed[parsed.command].as_dict()
    if parsed.command == "table":
        show_table(**options)
    elif parsed.command == "readme":
        write_readme()
    else:
        run_group(groups[parsed.command], **options)


if __name__ == "__main__":
    main()
