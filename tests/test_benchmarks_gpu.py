"""The GPU benchmark as far as a machine without a GPU can run it."""

import dataclasses

import pandas as pd
import pytest
import torch
from tqdm import tqdm

from benchmarks import gpu, gpu_groups, records, run, verify
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
        for row in ("naive", "eager", *(["triton"] if backends.INTERPRETED else [])):
            assert states[row].startswith("ok"), (row, states[row])
        assert states["Liger"].startswith((records.MISSING, records.FAILED, "ok"))


def test_pair_reduce_group_gates_and_times():
    group = gpu_groups.pair_reduce_group("cpu", rows=3000, dim=40)
    for case in group.cases:
        states = statuses(run.run_case(group, case, 1, tqdm(disable=True)))
        for row in ("naive", *(["triton"] if backends.INTERPRETED else [])):
            assert states[row] == "ok", (row, states[row])


def test_the_gate_of_pair_reduce_rejects_a_wrong_kernel():
    group = gpu_groups.pair_reduce_group("cpu", rows=2000, dim=16)
    case = group.cases[1]
    gate = group.gate(case, group.make_inputs(case))

    def wrong(trace, empty, weights, dweight):
        return gpu_groups._naive_pair_reduce(trace, empty, weights.flip(0), dweight) * (1 + 1e-4)

    for function, outputs in ((gpu_groups._naive_pair_reduce, 0), (wrong, 2)):
        call = gpu_groups._make_pair_reduce(function, case, gate.inputs)
        assert verify.judge(call(), gate).failure.count("max error") == outputs


def test_rates_count_the_needed_work():
    case = Case({"T": 10, "D": 20, "V": 1000}, "bfloat16", "trained", "cuda")
    pair = Case({"V": 1000, "D": 20}, "bfloat16", "pair_reduce", "cuda")
    rows = [
        records.record("g", case, "triton", "time", 2.0, "s"),
        records.record("g", case, "triton", "peak_memory", 7.0, "MiB"),
        records.record("g", case, "liger", "status", None, "", "missing: liger"),
        records.record("p", pair, "cuda", "time", 0.5, "s"),
    ]
    table = gpu.rates(pd.DataFrame(rows), {"copy": 1e6, "matmul": 2e6})
    assert table["row"].tolist() == ["triton", "cuda"]
    assert table["rate"].tolist() == pytest.approx(
        [6 * 200_000 / 2 / 1e12, 12 * 20_000 / 0.5 / 1e9]
    )
    assert table["share_of_ceiling"].tolist() == pytest.approx([0.3, 0.48])
    assert table["ms"].tolist() == [2000.0, 500.0]


def test_help_explains_itself(capsys):
    with pytest.raises(SystemExit) as end:
        gpu.main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert "--out" in text
    assert "copy" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="this is about machines without a GPU")
def test_without_a_gpu_it_says_so(tmp_path, capsys):
    assert gpu.main(["--out", str(tmp_path / "results")]) == 2
    assert "no CUDA device is usable" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()
