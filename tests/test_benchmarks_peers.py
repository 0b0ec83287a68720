"""Other people's kernels, small: each runs, passes the gate or says why not, and is told apart."""

import functools
import re

import pandas as pd
import pytest
import torch

from benchmarks import plot, readme, records, run, verify
from benchmarks.groups.peers import GROUP
from benchmarks.registry import Case

HEAD = {"T": 96, "D": 64, "V": 999}
CASES = [
    *(Case(HEAD, "float32", mode) for mode in ("scores", "frozen", "trained", "dpo")),
    Case({"B": 3, "R": 9, "L": 2, "D": 16}, "float32", "stats"),
]
# Compiling takes longer than everything else here.
COMPILED = ("torch.compile", "cut-cross-entropy", "Liger DPO")
# They need a GPU.
REASONS = {"Liger": "missing: its fused", "QuACK": "missing: its kernels"}


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.mode)
def test_peers_pass_the_gate_or_say_why_not(case):
    inputs = GROUP.make_inputs(case)
    gate = GROUP.gate(case, inputs)
    seen = {}
    for row in GROUP.rows_of(case):
        if row.name not in COMPILED:
            seen[row.name] = run.admit(row, case, inputs, gate).status
    assert seen["naive"] == seen["bvpo_kernels"] == records.OK
    for name, status in seen.items():
        missing = REASONS.get(name) if not torch.cuda.is_available() else None
        assert status.startswith(missing or records.OK), (name, status)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_peers_pass_the_gate(name, monkeypatch):
    # Tracing and partitioning are the row's; what inductor makes of them, its own gate sees.
    compiler = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", compiler)
    case = CASES[3 if name == "Liger DPO" else 2]
    inputs = GROUP.make_inputs(case)
    row = GROUP.row(name, case)
    assert run.admit(row, case, inputs, GROUP.gate(case, inputs)).status == records.OK


def test_a_wrong_pair_and_wrong_statistics_are_stopped():
    for case in CASES[3:]:
        inputs = GROUP.make_inputs(case)
        gate = GROUP.gate(case, inputs)
        row = GROUP.row("bvpo_kernels", case)
        outputs = row.make(case, gate.inputs)()
        for name, value in outputs.items():
            wrong = outputs | {name: 1.01 * value}
            assert verify.judge(wrong, gate).failure
        assert not verify.judge(outputs, gate).failure


def _measured(mode, tokens, row, value, status=records.OK, memory=5.0):
    case = Case({"T": tokens, "D": 8, "V": 16}, "bfloat16", mode)
    where = records.environment(1)
    entries = [records.record("peers", case, row, "status", None, "", status)]
    if status == records.OK:
        numbers = {
            "time": value,
            "ratio": value,
            "peak_memory": memory,
            "other_load": 0.0,
            "relative_error:logprobs": 1e-3,
        }
        entries += [records.record("peers", case, row, *item, "") for item in numbers.items()]
        entries.append(records.record("peers", case, row, "version", None, "", "1.2"))
    return [{**entry, **where} for entry in entries]


def test_figures_tables_and_parts(tmp_path):
    path = tmp_path / "peers.csv"
    rows = [
        entry
        for tokens in (8, 16)
        for mode in ("scores", "trained")
        for entry in (
            *_measured(mode, tokens, "naive", 1.0),
            *_measured(mode, tokens, "bvpo_kernels", 0.5),
            *_measured(mode, tokens, "Liger", 0.0, "missing: no device"),
        )
    ]
    records.write_csv(path, rows)
    frame = records.read_csv(path)
    for figure in plot.plot_group(GROUP, frame, path):
        assert figure.read_bytes().startswith(b"\x89PNG")
    assert {p.name for p in tmp_path.glob("*.png")} == {"peers-time.png", "peers-peak_memory.png"}
    text = readme.peers(frame)
    assert "**bf16 trained**, T=16 D=8 V=16:" in text
    assert "| bvpo_kernels 1.2 | 500  | 0.50" in text
    assert "missing: no device" in text
    assert "![memory against T](results/peers-peak_memory.png)" in text
    header = "| case | naive | bvpo_kernels |"
    assert re.sub(" +", " ", readme.cases(frame)).startswith(header)  # Liger has no time
    page = tmp_path / "README.md"
    page.write_text("a\n<!-- peers -->\nold\n<!-- /peers -->\nb\n")
    readme.put({"peers": text}, page)
    assert page.read_text().startswith("a\n<!-- peers -->\n![time against T]")
    assert page.read_text().endswith("<!-- /peers -->\nb\n")
    with pytest.raises(ValueError, match="expected <!-- nothing -->"):
        readme.put({"nothing": ""}, page)
    changed = Case({"T": 8, "D": 8, "V": 16}, "bfloat16", "trained")
    where = records.environment(1)
    kept = records.kept(path, [changed], ["naive"], where)
    # What another machine measured stays, and has a table of its own.
    elsewhere = where | {"cpu": "another"}
    assert len(records.kept(path, [changed], ["naive"], elsewhere)) == len(rows)
    both = records.markdown_table(pd.concat([frame, frame.assign(cpu="another", commit="abc")]))
    assert both.count("| case") == 2
    assert "another, " in both.split("| case")[2]
    new = _measured("trained", 8, "naive", 2.0)
    assert len(kept) == len(rows) - len(new)
    names = ["T=8 D=8 V=16 bf16 trained", "T=16 D=8 V=16 bf16 trained"]
    ordered = records.in_order(
        [*kept, *new], names, ["naive", "bvpo_kernels", "Liger", "naive", "bvpo_kernels"]
    )
    places = [(entry["case"], entry["row"]) for entry in ordered if entry["mode"] == "trained"]
    assert list(dict.fromkeys(places)) == [
        (case, row) for case in names for row in ("naive", "bvpo_kernels", "Liger")
    ]


def _frame(tmp_path, *parts):
    path = tmp_path / "peers.csv"
    records.write_csv(path, [entry for part in parts for entry in part])
    return records.read_csv(path)


def test_a_case_that_only_ours_was_timed_at_has_its_table_too(tmp_path):
    frame = _frame(
        tmp_path,
        _measured("dpo", 8, "naive", 1.0),
        _measured("dpo", 8, "bvpo_kernels", 0.5),
        _measured("dpo", 16, "naive", 0.0, "refused: about 900 s a call"),
        _measured("dpo", 16, "bvpo_kernels", 1.25),
    )
    text = readme.mode_tables(frame)
    assert "**bf16 dpo**, T=8 D=8 V=16:" in text
    (beyond,) = [block for block in text.split("**bf16 dpo**, ") if block.startswith("T=16")]
    assert "refused: about 900 s a call" in beyond
    assert "1250" in beyond


def test_rows_that_would_take_too_long_are_refused():
    case = Case({"T": 64, "D": 8, "V": 16}, "bfloat16", "scores")
    row = GROUP.row("TRL chunked", case)
    found = _measured("scores", 8, row.name, 1.0) + _measured("scores", 16, row.name, 3.0)
    assert run.too_long(row, case, found, 12.0) == ""
    said = run.too_long(row, case, found, 11.0)
    assert said == "about 12 s a call, by its time at T=16; the limit is 11 s"
    assert run.too_long(row, case, found, None) == ""
    other = Case({"T": 64, "D": 8, "V": 16}, "bfloat16", "trained")
    assert run.too_long(row, other, found, 1.0) == ""
    assert run.too_long(GROUP.row("naive", case), case, found, 1.0) == ""
    candidate = run.admit(row, case, None, None, said)
    assert candidate.status in (f"refused: {said}", "missing: trl is not installed")
