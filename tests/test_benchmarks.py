"""The benchmark package: what it refuses to time, what it writes, and whether it can see memory."""

from __future__ import annotations

import csv
from dataclasses import replace

import pytest
import torch

from benchmarks import head_cases, measure, records, registry, run, token_profiles, verify
from benchmarks.groups import logprobs, tail
from benchmarks.registry import Case, Group, Row

# Not multiples of any tile, and many tokens per vocabulary row, so that dW is a sum.
SMALL = Case({"T": 300, "D": 200, "V": 999}, "bfloat16", "trained", rounds=2)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Small tensors on shared cores: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _row(name, **changes):
    """The naive row with some of its outputs changed by functions of (inputs, outputs)."""

    def make(case, inputs):
        call = logprobs.GROUP.baseline.make(case, inputs)

        def changed():
            outputs = call()
            return outputs | {key: fn(inputs, outputs) for key, fn in changes.items()}

        return changed

    return Row(name, make)


def _zeros(key):
    return lambda inputs, outputs: torch.zeros_like(outputs[key])


def _half_accumulated(inputs, outputs):
    """dW summed token by token in bf16: the field's most reported bug, at its worst."""
    dz_TV = -torch.softmax((inputs.hidden_TD @ inputs.weight_VD.T).float(), -1)
    dz_TV[torch.arange(len(dz_TV)), inputs.target_T] += 1
    dz_TV = (dz_TV * inputs.dlogprobs_T[:, None]).bfloat16()
    dweight = torch.zeros_like(inputs.weight_VD)
    for dz_V, hidden_D in zip(dz_TV, inputs.hidden_TD, strict=True):
        dweight += dz_V[:, None] * hidden_D
    return dweight


def _without_softmax(key):
    """Only the target's part of a gradient: what a flat softmax would hide."""

    def wrong(inputs, outputs):
        upstream_T1, wrong = inputs.dlogprobs_T[:, None], torch.zeros_like(outputs[key]).float()
        if key == "dhidden":
            return (upstream_T1 * inputs.weight_VD[inputs.target_T].float()).bfloat16()
        return wrong.index_add_(
            0, inputs.target_T, upstream_T1 * inputs.hidden_TD.float()
        ).bfloat16()

    return wrong


def _shifted_target(inputs, outputs):
    return outputs["logprobs"].roll(1)


def _not_a_number(inputs, outputs):
    outputs["dhidden"][0, 0] = float("nan")
    return outputs["dhidden"]


def _judge(row, case=SMALL):
    inputs = head_cases.make_inputs(case)
    gate = head_cases.gate(case, inputs)
    return verify.judge(row.make(case, gate.inputs)(), gate)


@pytest.mark.parametrize("name", registry.names())
def test_groups_are_complete(name):
    group = registry.load(name)
    assert group.name == name
    for case in (*group.cases, *group.quick):
        rows = group.rows_of(case)
        assert len({row.name for row in rows}) == len(rows)
        assert rows[0].name == group.baseline.name
    for cases in (group.cases, group.quick):
        assert cases
        assert len({case.name for case in cases}) == len(cases)
        assert all(records.shape_of(case.shape_name) == dict(case.shape) for case in cases)


def test_logprobs_covers_what_it_promises():
    cases = logprobs.GROUP.cases
    assert {case.mode for case in cases} == {"scores", "frozen", "trained", "dpo"}
    assert {case.dtype for case in cases} == {"bfloat16", "float32"}
    assert {case.shape["T"] for case in cases} >= {4096, 32_768}
    assert {case.shape["V"] for case in cases} >= {49_152, 151_936}
    assert logprobs.GROUP.baseline.name == "naive"
    assert any(case.shape.get("ignored") == 50 for case in logprobs.GROUP.quick)
    names = {row.name for row in logprobs.GROUP.rows}
    assert names >= {"naive", "trl-style", "eager", "cpp", "one pass", "tiles again"}


def test_a_stated_bound_is_allowed_besides():
    def off(inputs, outputs):
        return outputs["dhidden"] + 0.1 * outputs["dhidden"].abs().max()

    assert "dhidden" in _judge(_row("off", dhidden=off)).failure
    bound = {"bound:dhidden": lambda _, outputs: 0.2 * outputs["dhidden"].abs().max() * 300}
    assert _judge(_row("off", dhidden=off, **bound)).failure == ""
    other = {"bound:dweight": bound["bound:dhidden"]}
    assert "dhidden" in _judge(_row("off", dhidden=off, **other)).failure


@pytest.mark.parametrize("mode", ["peaked", "reasoning", "flat"])
def test_sparse_rows_pass_their_gate(mode):
    case = tail.GROUP.tiny(Case({"T": 1, "D": 1, "V": 1}, "bfloat16", mode))
    inputs = tail.GROUP.make_inputs(case)
    gate = tail.GROUP.gate(case, inputs)
    for name in ("exact", "2^-5", "2^-12"):
        row = tail.GROUP.row(name)
        if row.missing(case):
            continue
        candidate = run.admit(row, case, inputs, gate)
        assert candidate.status == records.OK
        facts = row.facts(case, inputs)
        if name != "exact":
            assert 0 <= facts["dense_share"] <= 1
            assert facts["max_bound"] <= 2.0 ** -int(name.removeprefix("2^-")) * (1 + 1e-6)
    assert 0 <= tail.GROUP.baseline.facts(case, inputs)["share_p99"] <= 1


def test_entropies_follow_the_published_profile():
    share = torch.linspace(0, 1, 10001)
    entropy = token_profiles.entropy_quantiles("reasoning", share)
    assert float((entropy < 0.01).float().mean()) == pytest.approx(0.5064, abs=1e-3)
    assert float((entropy > 0.672).float().mean()) == pytest.approx(0.2, abs=1e-3)


@pytest.mark.parametrize("mode", head_cases.MODES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("ignored", [0, 50])
@pytest.mark.parametrize("row", ["naive", "trl-style", "eager"])
def test_gate_passes_correct_rows(row, ignored, dtype, mode):
    case = replace(SMALL, dtype=dtype, mode=mode, shape={**SMALL.shape, "ignored": ignored})
    verdict = _judge(logprobs.GROUP.row(row), case)
    assert verdict.failure == ""
    judged = {"scores": 1, "frozen": 2, "trained": 4}[mode]
    assert list(verdict.errors) == sorted(
        ["logprobs", "dhidden", "dweight", "dweight_rest"][:judged]
    )


@pytest.mark.parametrize(
    ("output", "wrong"),
    [
        ("logprobs", _zeros("logprobs")),
        ("logprobs", _shifted_target),
        ("dhidden", _zeros("dhidden")),
        ("dhidden", _not_a_number),
        ("dweight", _zeros("dweight")),
        ("dweight", _half_accumulated),
        ("dhidden", _without_softmax("dhidden")),
        ("dweight", _without_softmax("dweight")),
    ],
)
def test_gate_stops_wrong_rows(output, wrong):
    verdict = _judge(_row("wrong", **{output: wrong}))
    assert verdict.failure.startswith(output)
    failed = {part.partition(":")[0] for part in verdict.failure.split("; ")}
    assert failed <= {output, f"{output}_rest"}


def test_gate_stops_a_row_that_leaves_an_output_out():
    inputs = head_cases.make_inputs(SMALL)
    gate = head_cases.gate(SMALL, inputs)
    outputs = logprobs.GROUP.baseline.make(SMALL, gate.inputs)()
    del outputs["dweight"]
    assert verify.judge(outputs, gate).failure == (
        "dweight: not returned; dweight_rest: not returned"
    )


def _raises(case, inputs):
    raise RuntimeError("no such kernel\nat line 1")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A run of one small case with every way a row can end."""
    rows = (
        logprobs.GROUP.baseline,
        logprobs.GROUP.row("eager"),
        _row("broken", dweight=_half_accumulated),
        Row("peer", _raises, missing=lambda _: registry.why_not("peer-kernel", "no_such_peer")),
        Row("crash", _raises),
        Row("huge", _raises, predicted_bytes=lambda _: 2**60),
    )
    group = replace(logprobs.GROUP, quick=(SMALL,), rows=rows)
    out = tmp_path_factory.mktemp("results")
    run.run_group(group, quick=True, out=out)
    return out


def _metrics(out, row):
    frame = records.read_csv(out / "logprobs.csv")
    of_row = frame[frame["row"] == row]
    return records.status(of_row), records.values(of_row)


def test_csv_has_the_columns_and_says_where_it_was_measured(results):
    with (results / "logprobs.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert tuple(lines[0]) == records.COLUMNS
    for line in lines:
        assert all(line[key] for key in ("group", "case", "row", "metric", *records.WHERE))
        assert line["case"] == SMALL.name
    assert (results / "logprobs.png").read_bytes().startswith(b"\x89PNG")


def test_correct_rows_are_timed(results):
    for row in ("naive", "eager"):
        state, metrics = _metrics(results, row)
        assert state == records.OK
        assert metrics["time_low"] <= metrics["time"] <= metrics["time_high"]
        assert metrics["peak_memory"] < 64
        assert {"max_error:dweight", "relative_error:logprobs", "ratio"} <= metrics.keys()
    assert _metrics(results, "naive")[1]["ratio"] == 1.0


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ("broken", "FAIL: dweight_rest: max error "),
        ("peer", "missing: peer-kernel is not installed"),
        ("crash", "failed: RuntimeError: no such kernel"),
        ("huge", "refused: needs 1073741824.0 GiB, "),
    ],
)
def test_other_rows_say_why_they_are_not_timed(results, row, why):
    state, metrics = _metrics(results, row)
    assert state.startswith(why)
    assert not {"time", "ratio", "peak_memory"} & metrics.keys()
    assert ("max_error:dweight" in metrics) == (row == "broken")


def test_tables(results, capsys):
    run.main(["table", "logprobs", "--out", str(results)])
    markdown = capsys.readouterr().out
    header, rule, line, *notes = markdown.splitlines()
    assert [cell.strip() for cell in header.strip("|").split("|")] == [
        "case",
        "naive",
        "eager",
        "broken",
        "huge",
    ]
    assert set(rule) == set("|-")
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[0] == SMALL.name
    assert ", 1.00x, " in cells[1]
    assert cells[3].startswith("FAIL")
    assert "- peer: missing: peer-kernel is not installed" in notes
    text = records.terminal_table(records.read_csv(results / "logprobs.csv"))
    assert "dweight error (max, rel.)" in text
    assert "crash: failed: RuntimeError: no such kernel" in text


def test_a_yardstick_is_timed_without_a_gate():
    row = Row("gemm", lambda case, inputs: dict, yardstick="the GEMM alone")
    inputs = head_cases.make_inputs(SMALL)
    candidate = run.admit(row, SMALL, inputs, head_cases.gate(SMALL, inputs))
    assert candidate.status == "yardstick: the GEMM alone"
    assert candidate.call is not None


def test_rows_take_turns_and_the_first_turn_rotates(monkeypatch):
    monkeypatch.setattr(measure, "MIN_SAMPLE_SECONDS", 0.0)
    turns = []
    calls = {name: lambda name=name: turns.append(name) or {} for name in "abc"}
    times = measure.interleave(calls, rounds=3, gate_seconds={"a": 9.0})
    assert "".join(turns) == "bc" + "abc" + "bca" + "cab"
    assert all(len(row) == 3 for row in times.values())


def test_ratio_is_the_median_of_the_ratios_per_round():
    timings = measure.summarize({"naive": [1.0, 10.0, 2.0], "x": [2.0, 5.0, 6.0]}, "naive")
    assert timings["x"].ratio == 2.0
    assert timings["x"].median == 5.0
    assert measure.summarize({"x": [1.0]}, "naive")["x"].ratio is None


def test_peak_memory_sees_what_is_freed_and_not_what_is_returned():
    def work():
        kept = torch.ones(50 * 2**18)
        torch.ones(200 * 2**18).sum()
        return {"kept": kept}

    assert measure.peak_bytes(work) / 2**20 == pytest.approx(200, rel=0.1)
    # The earlier peak is forgotten.
    assert measure.peak_bytes(lambda: {}) / 2**20 < 5


def test_peak_memory_in_a_process_of_its_own():
    # The naive row keeps logits and log-softmax, 4 bytes each: 200 MiB.
    case = Case({"T": 512, "D": 8, "V": 51_200}, "float32", "scores")
    peak = measure.peak_in_subprocess("logprobs", case, "naive", 1)
    assert peak / 2**20 == pytest.approx(200, rel=0.1)
    assert logprobs.GROUP.baseline.predicted_bytes(case) == 200 * 2**20


def test_a_process_that_dies_is_an_error():
    with pytest.raises(RuntimeError, match="ended with code 1"):
        measure.peak_in_subprocess("logprobs", SMALL, "no-such-row", 1)


def test_other_load_is_a_share():
    with measure.OtherLoad() as load:
        torch.randn(500, 500) @ torch.randn(500, 500)
    assert 0 <= load.percent <= 100


def test_peers_that_do_not_import_say_why(tmp_path, monkeypatch):
    (tmp_path / "half_a_peer.py").write_text("import no_such_compiler\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert registry.why_not("peer", "half_a_peer") == (
        "peer does not import: No module named 'no_such_compiler'"
    )
    assert registry.why_not("torch", "torch.nn") == ""


def test_bad_names_and_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"group: expected one of \["):
        registry.load("nonsense")
    with pytest.raises(ValueError, match=r"row: expected one of \['naive'"):
        logprobs.GROUP.row("nonsense")
    with pytest.raises(ValueError, match="filter: 'nonsense' matches none of"):
        run.select_cases(logprobs.GROUP, True, "nonsense")
    assert len(run.select_cases(logprobs.GROUP, True, "T=256 D=576 V=49152")) == 1
    with pytest.raises(ValueError, match="rows: 'nonsense' matches none of"):
        run.select_rows(logprobs.GROUP, "nonsense")
    chosen = [row.name for row in run.select_rows(logprobs.GROUP, "^cpp|^eager").rows]
    assert chosen == ["naive", "eager", "cpp", "naive"]  # a baseline of each set of modes
    with pytest.raises(ValueError, match=r"none\.csv: expected a result"):
        records.read_csv(tmp_path / "none.csv")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"other\.csv: line 1: expected columns"):
        records.read_csv(tmp_path / "other.csv")


def test_a_commit_of_digits_is_read_as_words(tmp_path):
    case = Case({"T": 1, "D": 1, "V": 2}, "float32", "scores", "cpu")
    entry = records.record("g", case, "naive", "time", 1.0, "s") | records.environment(1)
    records.write_csv(tmp_path / "g.csv", [entry | {"commit": "2212583"}])
    assert records.read_csv(tmp_path / "g.csv")["commit"].tolist() == ["2212583"]


def test_help_lists_the_groups(capsys):
    with pytest.raises(SystemExit):
        run.main(["--help"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in [*registry.names(), "table"])


def test_a_group_is_data():
    assert isinstance(logprobs.GROUP, Group)
    assert registry.load("logprobs") is logprobs.GROUP
