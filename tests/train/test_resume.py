"""A run that is interrupted ends as one that is not, bit for bit; what does not fit is refused."""

import json
import math
import random
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from processes import KILLED, kill_at, run_processes
from ranks import Case
from safetensors.torch import load_file
from test_checkpoint import flip
from tiny_runs import make_units, read_lines

from train.checkpoint.checkpoint import checkpoints
from train.checkpoint.state_files import read_state
from train.runtime import report
from train.trainer import Trainer

STEPS = 8
TIMES = ("time", "tokens_per_second", "mfu", "seconds/")
KILLS = 20
# Where a process dies: between and within steps, and before each thing that a save does.
_SAVE = "train.checkpoint.checkpoint"
TARGETS = (
    "train.trainer.Trainer.train_step",
    "train.trainer.Trainer.evaluate",
    "train.runtime.report.RunLog.write",
    "torch.optim.AdamW.step",
    "torch.distributed.checkpoint.save",
    f"{_SAVE}.write_synced",
    f"{_SAVE}.sync_folder",
    f"{_SAVE}.os.replace",
    f"{_SAVE}.shutil.rmtree",
)


@dataclass
class Interrupted(Case):
    """Everything that has a state: a measured weight, sketches, evaluation, AdamW, warm-up."""

    every: int | None = 1
    tied: bool = True

    def __post_init__(self) -> None:
        self.train = {"max_steps": STEPS, "eval_every": 3, **self.train}
        self.estimate = {"warmup": 1}

    def cfg(self, run_dir: Path):
        cfg = super().cfg(run_dir)
        cfg.checkpoint.every = self.every
        return cfg


def run(run_dir: Path, sharded: bool = False, **options) -> None:
    Interrupted(**options).trainer(run_dir, sharded).run()


def lines_of(run_dir: Path) -> list[dict]:
    return [
        {name: value for name, value in line.items() if not name.startswith(TIMES)}
        for line in read_lines(run_dir)
    ]


def final_state(run_dir: Path) -> dict:
    """All that the last checkpoint holds, whole, as tensors and values by name."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = Interrupted().trainer(Path(folder), sharded=False)
    return read_state(checkpoints(run_dir / "checkpoints")[-1], trainer.state.state_dict())


def assert_equal_states(got, expected):
    if isinstance(expected, torch.Tensor):
        assert torch.equal(got, expected)
    elif isinstance(expected, dict):
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            assert_equal_states(got[name], value)
    elif isinstance(expected, list):
        for one, other in zip(got, expected, strict=True):
            assert_equal_states(one, other)
    else:
        assert got == expected


def assert_same_run(run_dir: Path, expected: Path):
    assert lines_of(run_dir) == lines_of(expected)
    assert_equal_states(final_state(run_dir), final_state(expected))
    model = "model/model.safetensors"
    assert_equal_states(load_file(run_dir / model), load_file(expected / model))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    run(folder)
    return folder


def interrupt(run_dir: Path, monkeypatch, step: int, **options) -> None:
    """A run that fails in that step, after its optimizer moved."""
    train_step = Trainer.train_step

    def fail(self, number):
        line = train_step(self, number)
        if number == step:
            raise KeyboardInterrupt
        return line

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", fail)
        with pytest.raises(KeyboardInterrupt):
            run(run_dir, **options)


@pytest.mark.parametrize("every", [1, 2])
def test_resume_is_bitwise(tmp_path, monkeypatch, whole, every):
    """Weights, optimizer, estimator, schedule and log; with every = 2 a step is run twice, but is
    in the log and the events once."""
    interrupt(tmp_path, monkeypatch, 5, every=every)
    run(tmp_path, every=every)
    assert_same_run(tmp_path, whole)
    assert (tmp_path / "report.png").exists()
    # Imported here: the processes of the other tests would wait for it.
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, STEPS + 1))


def test_checkpoints_change_nothing(tmp_path, whole):
    run(tmp_path, every=None)
    assert not (tmp_path / "checkpoints").exists()
    assert lines_of(tmp_path) == lines_of(whole)


def test_a_finished_run_is_not_run_again(tmp_path, monkeypatch, capsys):
    run(tmp_path)
    first, table = lines_of(tmp_path), capsys.readouterr().out
    monkeypatch.setattr(Trainer, "train_step", None)
    run(tmp_path)
    assert lines_of(tmp_path) == first
    again = capsys.readouterr().out
    assert again.startswith("resumed after step 8 of 8\n")
    assert again.splitlines()[1:] == table.splitlines()[1:]


def test_a_defective_checkpoint_costs_its_step(tmp_path, monkeypatch, whole):
    interrupt(tmp_path, monkeypatch, 5)
    flip(checkpoints(tmp_path / "checkpoints")[-1] / "__0_0.distcp")
    with pytest.warns(UserWarning, match=r"step-00000005: checkpoint refused: __0_0.distcp: its"):
        run(tmp_path)
    assert_same_run(tmp_path, whole)


def test_another_configuration_or_dataset_is_refused(tmp_path, monkeypatch):
    interrupt(tmp_path, monkeypatch, 2)
    case = Interrupted()
    cfg = case.cfg(tmp_path)
    cfg.optim.lr = 0.5
    monkeypatch.setattr(case, "cfg", lambda run_dir: cfg)
    with pytest.raises(
        ValueError, match=r"\(optim.lr: expected 0.5 \(this command\), got 0.001 \(the"
    ):
        case.trainer(tmp_path, sharded=False).run()
    more = Interrupted(units=lambda: make_units(10))
    (tmp_path / "reference.safetensors").unlink()
    with pytest.raises(ValueError, match=r"training units: expected \w+ \(this command\), got"):
        more.trainer(tmp_path, sharded=False).run()


def _attempt(run_dir: Path, ranks: int, target: str | None, call: int, dying: int) -> None:
    rank = torch.distributed.get_rank() if ranks > 1 else 0
    report.draw = lambda *_: None  # most of the time of so short a run
    if target is None or rank != dying:
        run(run_dir, sharded=ranks > 1)
    else:
        with kill_at(target, call):
            run(run_dir, sharded=ranks > 1)


def kill_and_resume(folder: Path, ranks: int, kills: int, check) -> None:
    """Kill runs at random places until enough have died; every run that ends is checked."""
    rng, runs, died = random.Random(ranks), 0, 0
    while True:
        run_dir = folder / str(runs)
        target = rng.choice(TARGETS) if died < kills else None
        work = partial(_attempt, run_dir, ranks, target, rng.randint(1, 6), rng.randrange(ranks))
        codes = run_processes(work, ranks)
        # A rank that lost the one that was killed may fail of that before it is killed itself.
        assert set(codes) == {0} or KILLED in codes
        died += KILLED in codes
        if set(codes) == {0}:
            check(run_dir)
            runs += 1
            if died >= kills:
                return


@pytest.mark.slow
def test_killed_at_random_places(tmp_path, whole):
    kill_and_resume(tmp_path, 1, KILLS, partial(assert_same_run, expected=whole))


@pytest.fixture(scope="module")
def whole_on_two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    assert run_processes(partial(_attempt, folder, 2, None, 1, 0), 2) == [0, 0]
    return folder


@pytest.mark.slow
def test_two_ranks_killed_at_random_places(tmp_path, whole_on_two):
    kill_and_resume(tmp_path, 2, 5, partial(assert_same_run, expected=whole_on_two))


def _stop_early(run_dir: Path, ranks: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        interrupt_here = partial(interrupt, run_dir, patch, 4)
        interrupt_here(sharded=ranks > 1)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_another_number_of_ranks(tmp_path, whole, before, after):
    """Equal up to the order of sums, in fp64; the state itself is moved exactly."""
    assert run_processes(partial(_stop_early, tmp_path, before), before) == [0] * before
    # Weights that FSDP2 casts are not those that autocast casts, and the cache says which it was.
    (tmp_path / "reference.safetensors").unlink()
    assert run_processes(partial(_attempt, tmp_path, after, None, 1, 0), after) == [0] * after
    got, expected = (load_file(d / "model/model.safetensors") for d in (tmp_path, whole))
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-12, msg=name)
    for line, other in zip(lines_of(tmp_path), lines_of(whole), strict=True):
        assert line["step"] == other["step"]
        for name, value in other.items():
            if isinstance(value, float) and name not in ("fill",):
                assert math.isclose(line[name], value, rel_tol=1e-7, abs_tol=1e-10), name


def test_the_log_keeps_what_was_written_before(tmp_path):
    """A line that was cut off by a kill goes, with all after the checkpoint."""
    run(tmp_path)
    log = tmp_path / "log.jsonl"
    complete = log.read_text()
    state = json.loads(complete.splitlines()[-1])
    log.write_text(complete + json.dumps({**state, "step": STEPS + 1}) + '\n{"event": "tr')
    run(tmp_path)
    assert log.read_text() == complete


@pytest.mark.parametrize("async_save", [False, True])
def test_a_save_is_timed_in_the_line_of_the_next_step(tmp_path, monkeypatch, async_save):
    """Written with its own step's line, that line would be missing after a kill during the save."""
    case = Interrupted(every=3)
    cfg = case.cfg(tmp_path)
    cfg.checkpoint.async_save = async_save
    monkeypatch.setattr(case, "cfg", lambda run_dir: cfg)
    case.trainer(tmp_path, sharded=False).run()
    lines = [line for line in read_lines(tmp_path) if line["event"] == "train"]
    name = "seconds/checkpoint"
    timed = {line["step"]: line[name] for line in lines if name in line}
    assert timed.keys() == {4, 7}
    assert all(0 < seconds < 60 for seconds in timed.values())
