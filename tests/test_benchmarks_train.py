"""The group "train": every step passes its gate, wrong ones do not, and processes come and go."""

from dataclasses import replace

import psutil
import pytest
import torch

from benchmarks import plot, readme, records, run, step_workers, steps, verify
from benchmarks.groups import train
from benchmarks.registry import Case
from benchmarks.steps import STEPS

CASES = {dtype: Case({"units": 2, "ranks": 1}, dtype, "tiny", rounds=1) for dtype in train.DTYPES}
OURS = "bvpo_kernels"


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def check(name, inputs):
    """What the gate asks of a step, in this process."""
    step = STEPS[name](inputs, inputs.load())
    found = {}
    step.optimizer.register_step_pre_hook(
        lambda *_: found.update(gradient=steps.gradient_sample(step.model))
    )
    return {"loss": step.run().double().reshape(1), **found}


@pytest.mark.parametrize("dtype", train.DTYPES)
def test_every_step_is_the_same_step(dtype):
    case = CASES[dtype]
    inputs = steps.make_inputs(case)
    expected, baseline = steps.oracle(inputs), check(train.BASELINE, inputs)
    assert abs(float(expected["loss"]) - 0.6931) > 0.01  # the references are shifted
    gate = run.Gate(inputs, lambda outputs: outputs, expected, baseline)
    for name in STEPS:
        outputs = check(name, inputs) | {"bound:loss": torch.tensor(train.LOSS_NOISE[dtype])}
        assert verify.judge(outputs, gate).failure == "", name
    wrong = check(OURS, replace(inputs, cfg=_with_beta(inputs.cfg, 0.11)))
    assert "gradient" in verify.judge(wrong, gate).failure


def _with_beta(cfg, beta):
    return replace(cfg, loss=replace(cfg.loss, beta=beta))


@pytest.mark.slow
def test_two_processes_take_the_step_of_one(tmp_path):
    inputs = step_workers.inputs_of(Case({"units": 3, "ranks": 2}, "float32", "tiny"))
    gate = train.gate(inputs.data.case, inputs)
    for name in (train.BASELINE, "padded by kind", OURS):
        row = train.GROUP.row(name)
        assert run.admit(row, inputs.data.case, inputs, gate).status == records.OK
    crew = inputs.crews[OURS]
    pids = [process.pid for process in crew.processes]
    assert len(pids) == 2
    crew.close()
    assert not any(psutil.pid_exists(pid) for pid in pids)
    with pytest.raises(RuntimeError, match="a process of the step ended"):
        crew.ask(step_workers.STEP)


def test_peak_memory_is_that_of_a_process_of_its_own():
    inputs = step_workers.inputs_of(CASES["float32"])
    peak = inputs.peak_bytes(train.BASELINE)
    # Logits of 8 sequences of 170 tokens, and their log-softmax.
    assert peak > 2 * 8 * 170 * 4096 * 4


def test_a_process_that_fails_is_an_error():
    inputs = step_workers.inputs_of(CASES["float32"])
    with pytest.raises(RuntimeError, match="a process of the step ended"):
        inputs.call("no such step")()


def _frame(tmp_path):
    case, where = CASES["float32"], records.environment(1)
    entries = []
    for row, time, peak in ((train.BASELINE, 2.0, 400.0), (OURS, 1.0, 100.0)):
        numbers = {
            "time": time,
            "ratio": time / 2,
            "other_load": 0.0,
            "tokens": 50.0,
            "peak_memory": peak,
        }
        entries.append(records.record("train", case, row, "status", None, "", records.OK))
        entries += [records.record("train", case, row, *item, "") for item in numbers.items()]
    entries.append(records.record("train", case, "TRL", "status", None, "", "missing: none"))
    records.write_csv(tmp_path / "train.csv", [{**entry, **where} for entry in entries])
    return records.read_csv(tmp_path / "train.csv")


def test_speeds_figure_and_table(tmp_path):
    frame = _frame(tmp_path)
    table = records.speeds(frame).set_index("row")
    assert table.loc[OURS, "tokens/s"] == 50.0
    assert table.loc[OURS, "x padded"] == 2.0
    assert table.loc[OURS, "peak / padded"] == 0.25
    assert list(table.index) == [train.BASELINE, OURS]
    (figure,) = plot.plot_group(train.GROUP, frame, tmp_path / "train.csv")
    assert figure.read_bytes().startswith(b"\x89PNG")
    text = readme.steps(frame)
    assert "| bvpo_kernels |" in text
    assert "2.00" in text
