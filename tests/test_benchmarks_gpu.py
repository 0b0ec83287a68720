"""The GPU benchmark as far as a machine without a GPU can run it."""

import dataclasses

import pandas as pd
import pytest
import torch
from tqdm import tqdm

from benchmarks import gpu, gpu_groups, gpu_pairs, gpu_rows, records, run, verify
from benchmarks.registry import Case
from bvpo_kernels import backends


@pytest.fixture(autouse=True)
def _no_memory_processes(monkeypatch):
    """On the CPU peak memory takes a process per row, which knows registered groups only."""
    monkeypatch.setattr(run, "_peak", lambda group, case, row: (0, ""))


def statuses(rows):
    return {r["row"]: r["note"] for r in rows if r["metric"] == "status"}


@pytest.mark.slow
def test_head_group_gates_and_times(monkeypatch):
    monkeypatch.setattr(gpu_groups, "VOCAB", 700)
    group = gpu_groups.head_group("cpu", (48,), (24,))
    compiled = ("torch.compile", "cut-cross-entropy")  # half a minute
    rows = tuple(row for row in group.rows if row.name not in compiled)
    group = dataclasses.replace(group, rows=rows)
    assert [case.mode for case in group.cases] == ["scores", "frozen", "trained"]
    for case in group.cases:
        states = statuses(run.run_case(group, case, 1, tqdm(disable=True)))
        ours = [name for name in ("triton", "triton, unfused") if name in states]
        for row in ("naive", "eager", *(ours if backends.INTERPRETED else [])):
            assert states[row].startswith("ok"), (row, states[row])
        assert states["Liger"].startswith((records.MISSING, records.FAILED, "ok"))


def test_pair_reduce_group_gates_and_times():
    group = gpu_groups.pair_reduce_group("cpu", rows=1700, dim=40)
    assert [case.shape.get("K", 2) for case in group.cases] == [2, 2, 1, 3, 4]
    for case in group.cases:
        states = statuses(run.run_case(group, case, 1, tqdm(disable=True)))
        for row in ("naive", *(["triton"] if backends.INTERPRETED else [])):
            assert states[row] == "ok", (row, states[row])


def test_rows_group_gates_and_times():
    group = gpu_rows.rows_group("cpu", tokens=100, vocab=700)
    for case in group.cases:
        states = statuses(run.run_case(group, case, 1, tqdm(disable=True)))
        for row in ("naive", *(["triton"] if backends.INTERPRETED else [])):
            assert states[row] == "ok", (row, states[row])


@pytest.mark.skipif(not backends.INTERPRETED, reason="the kernels run on a CPU interpreted")
@pytest.mark.parametrize("mode", gpu_rows.BYTES)
def test_the_gate_of_the_rows_rejects_a_wrong_kernel(mode):
    """Another target in one of the rows that are compared."""
    group = gpu_rows.rows_group("cpu", tokens=100, vocab=700)
    case = next(case for case in group.cases if case.mode == mode)
    gate = group.gate(case, group.make_inputs(case))
    wrong_T = gate.inputs.target_T.clone()
    wrong_T[97] = (wrong_T[97] + 1) % 700
    outputs = group.row("triton").make(case, gate.inputs._replace(target_T=wrong_T))()
    assert "max error" in verify.judge(outputs, gate).failure


@pytest.mark.skipif(not backends.INTERPRETED, reason="the kernels run on a CPU interpreted")
def test_pairs_group_gates_and_times():
    """Statistics of the one pass and of tiles that are computed again, too."""
    group = gpu_pairs.pairs_group("cpu", vocab=300, shrink=128)
    for case in group.quick:
        states = statuses(run.run_case(group, case, 1, tqdm(disable=True)))
        for row in ("naive", "one pass", "tiles again", "one pass + statistics"):
            assert states[row] == "ok", (row, states[row])


def test_tail_group_gates_and_times():
    group = gpu_groups.tail_group("cpu", 64, 32, 768)
    assert [case.mode for case in group.cases] == ["peaked", "reasoning", "flat"]
    for case in group.cases:
        states = statuses(run.run_case(group, case, 1, tqdm(disable=True)))
        if not backends.MISSING["cpp"]:
            assert set(states.values()) == {"ok"}, states
        assert set(states) == {"naive", "exact", "2^-5", "2^-7", "2^-9", "2^-11"}


def test_stats_group_gates_and_times():
    group = gpu_groups.stats_group("cpu", {"R": 8, "B": 2, "L": 1, "D": 64, "V": 512})
    states = statuses(run.run_case(group, group.cases[0], 1, tqdm(disable=True)))
    for row in ("none", "exact", "exact+sketch", "loop"):
        assert states[row].startswith(("ok", "yardstick")), (row, states[row])


def test_the_gate_of_pair_reduce_rejects_a_wrong_kernel():
    group = gpu_groups.pair_reduce_group("cpu", rows=2000, dim=16)
    case = group.cases[1]
    gate = group.gate(case, group.make_inputs(case))

    def wrong(tiles, total, weights, add):
        return gpu_groups._naive_pair_reduce(tiles, total, weights.flip(0), add) * (1 + 1e-4)

    for function, outputs in ((gpu_groups._naive_pair_reduce, 0), (wrong, 2)):
        call = gpu_groups._make_pair_reduce(function, case, gate.inputs)
        assert verify.judge(call(), gate).failure.count("max error") == outputs


def test_rates_count_the_needed_work():
    case = Case({"T": 10, "D": 20, "V": 1000}, "bfloat16", "trained", "cuda")
    pair = Case({"V": 1000, "D": 20}, "bfloat16", "pair_reduce", "cuda")
    three = Case({"K": 3, "V": 1000, "D": 20}, "float32", "pair_reduce", "cuda")
    rows_case = Case({"T": 10, "V": 1000}, "bfloat16", gpu_rows.BACKWARD, "cuda")
    rows = [
        records.record("g", case, "triton", "time", 2.0, "s"),
        records.record("g", case, "triton", "peak_memory", 7.0, "MiB"),
        records.record("g", case, "triton", "relative_error:dhidden", 3e-3, ""),
        records.record("g", case, "triton", "relative_error:dweight", 2e-3, ""),
        records.record("g", case, "liger", "status", None, "", "missing: liger"),
        records.record("p", pair, "cuda", "time", 0.5, "s"),
        records.record("p", three, "triton", "time", 0.5, "s"),
        records.record("r", rows_case, "triton", "time", 0.5, "s"),
    ]
    table = gpu.rates(pd.DataFrame(rows), {"copy": 1e6, "matmul": 2e6})
    assert table["row"].tolist() == ["triton", "cuda", "triton", "triton"]
    moved = [12 * 20_000, (3 * 4 + 2 * 4) * 20_000, 6 * 10_000]
    assert table["rate"].tolist() == pytest.approx(
        [6 * 200_000 / 2 / 1e12, *(count / 0.5 / 1e9 for count in moved)]
    )
    assert table["share_of_ceiling"].tolist() == pytest.approx([0.3, 0.48, 0.8, 0.12])
    assert table["ms"].tolist() == [2000.0, 500.0, 500.0, 500.0]
    missing = float("nan")
    assert table["error"].tolist() == pytest.approx([3e-3, *[missing] * 3], nan_ok=True)


def test_lines_say_what_holds():
    def row(case, name, ms, share=0.5, extra=100.0, unit="TFLOP/s"):
        return (case, name, ms, 1.0, unit, share, extra, 1e-3)

    scores, frozen = (gpu_groups.headline(mode).name for mode in ("scores", "frozen"))
    table = pd.DataFrame(
        [
            row(scores, "triton", 17.0),
            row(scores, "cuda", 19.0),
            row(scores, "Liger", 16.0),
            row(scores, "TRL chunked", 40.0),
            row(frozen, "triton", 37.0, extra=1025.0),
            row(gpu_pairs.headline().name, "one pass", 46.0, extra=7000.0),
            row(gpu_pairs.unit().name, "one pass + statistics", 46.5),
            row("V=1 pair_reduce", "cuda", 1.0, 0.84, unit="GB/s"),
            row("V=1 pair_reduce", "triton", 1.0, 0.86, unit="GB/s"),
        ],
        columns=gpu.COLUMNS,
    )
    found = gpu.lines(table).set_index("line")["holds"].to_dict()
    assert found == {
        "scores: ms": True,
        "scores: extra MiB": True,
        "scores: ms, Liger": False,
        "scores: ms, TRL chunked": True,
        "frozen: ms": False,
        "frozen: extra MiB": False,
        "T=8192 D=4096 V=151936 bf16 dpo cuda one pass: ms": True,
        "T=8192 D=4096 V=151936 bf16 dpo cuda one pass: extra MiB": False,
        "T=17408 E=1024 D=1536 V=151936 bf16 dpo cuda one pass + statistics: ms": False,
        "V=1 pair_reduce: share of copy": True,
    }


def test_peers_that_compile_per_shape_run_at_the_headline_only():
    group = gpu_groups.head_group("cuda", gpu_groups.TOKENS, gpu_groups.HIDDEN_SIZES)
    assert len(group.cases) == 18
    assert group.cases[:3] == tuple(map(gpu_groups.headline, gpu_groups.MODES))
    row = group.row("torch.compile")
    assert not any(row.missing(case) for case in group.cases[:3])
    assert all("compiles per shape" in row.missing(case) for case in group.cases[3:])


def test_no_case_begins_when_the_time_is_up(tmp_path, capsys):
    group = gpu_groups.pair_reduce_group("cpu", rows=30, dim=8)
    path = run.run_group(group, out=tmp_path, rounds=1, until=0.0)
    measured = records.read_csv(path)["case"].unique().tolist()
    assert measured == [group.cases[0].name]
    assert f"Out of time, not measured: {group.cases[1].name}" in capsys.readouterr().out


def test_only_the_named_groups_are_measured(tmp_path, monkeypatch):
    """Rates and lines are of the groups that have FLOPs or bytes to count."""
    monkeypatch.setattr(gpu, "measure_ceilings", lambda: {"copy": 1e9, "matmul": 1e9})
    measured = []

    def run_group(group, **options):
        measured.append(group.name)
        case = group.cases[0]
        path = tmp_path / f"{group.name}.csv"
        entry = records.record(group.name, case, "triton", "time", 1.0, "s")
        records.write_csv(path, [entry | records.environment(1)])
        return path

    monkeypatch.setattr(run, "run_group", run_group)
    gpu.measure(tmp_path, quick=True, until=0.0, only="pair-reduce|tail")
    assert measured == ["gpu-pair-reduce", "gpu-tail"]
    with pytest.raises(ValueError, match=r"only: 'nothing' matches none of .*'gpu-stats'"):
        gpu.measure(tmp_path, quick=True, until=0.0, only="nothing")
    rates = pd.read_csv(tmp_path / "rates.csv")
    assert rates["case"].tolist() == [gpu_groups.pair_reduce_group("cuda").cases[0].name]


def test_help_explains_itself(capsys):
    with pytest.raises(SystemExit) as end:
        gpu.main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    for word in ("--out", "--minutes", "--quick", "copy", "pair_reduce", "fp64", "lines.csv"):
        assert word in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="this is about machines without a GPU")
def test_without_a_gpu_it_says_so(tmp_path, capsys):
    assert gpu.main(["--out", str(tmp_path / "results")]) == 2
    assert "no CUDA device is usable" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()
