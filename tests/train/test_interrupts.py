"""Signals become a request, handlers are given back, and the exit code says what happened."""

import os
import signal
import threading
from signal import SIGTERM

import pytest
import torch
from ranks import spawn
from tiny_runs import make_cfg, make_trainer, make_units, read_lines, tiny_model

from train.model.head import FusedHeadLM
from train.runtime import parallel
from train.runtime.interrupts import UNDER_TORCHRUN, Interruption
from train.trainer import Trainer


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_remembered(number, monkeypatch):
    monkeypatch.delenv(UNDER_TORCHRUN, raising=False)
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    with Interruption() as interruption:
        assert not interruption.requested
        os.kill(os.getpid(), number)
        assert interruption.requested
        assert interruption.signal == number
        assert interruption.exit_code == 128 + number
        os.kill(os.getpid(), signal.SIGTERM)  # an agent may forward it twice
    assert {n: signal.getsignal(n) for n in before} == before


def test_a_second_sigint_interrupts():
    with Interruption():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_torchrun_gets_zero(monkeypatch):
    monkeypatch.setenv(UNDER_TORCHRUN, "none")
    assert Interruption().exit_code == 0
    monkeypatch.delenv(UNDER_TORCHRUN)
    # Another rank got the signal.
    assert Interruption().exit_code == 128 + signal.SIGTERM


def test_other_threads_have_no_handlers():
    found = []

    def body():
        with Interruption() as interruption:
            found.append(interruption.requested)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert found == [False]


def signal_in(trainer, at, number):
    """The trainer, whose process gets a signal in the middle of a step."""
    take = trainer.train_step

    def train_step(step):
        if step == at:
            os.kill(os.getpid(), number)
        return take(step)

    trainer.train_step = train_step
    return trainer


def steps_of(run_dir):
    return [line["step"] for line in read_lines(run_dir) if line["event"] == "train"]


def test_a_run_stops_after_its_step(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv(UNDER_TORCHRUN, raising=False)
    trainer = signal_in(make_trainer(make_cfg(tmp_path, max_steps=5), make_units(4)), 1, SIGTERM)
    assert trainer.run() == 143
    assert steps_of(tmp_path) == [1, 2]
    assert "stopped by a signal after step 2 of 5" in capsys.readouterr().out
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("every", [None, 10])
def test_a_stopped_run_goes_on_from_its_checkpoint(tmp_path, monkeypatch, capsys, every):
    """Only the signal asks for one; a run that went on from one ends with one."""
    monkeypatch.delenv(UNDER_TORCHRUN, raising=False)

    def trainer(name):
        cfg = make_cfg(tmp_path / name, max_steps=4)
        cfg.checkpoint.every = every
        return make_trainer(cfg, make_units(4))

    whole = trainer("whole")
    assert whole.run() == 0
    assert signal_in(trainer("stopped"), 1, SIGTERM).run() == 143
    assert "goes on from its checkpoint" in capsys.readouterr().out
    again = trainer("stopped")
    assert again.run() == 0
    assert steps_of(tmp_path / "stopped") == [1, 2, 3, 4]
    for name, value in whole.policy.named_parameters():
        assert torch.equal(again.policy.get_parameter(name), value), name
    assert (tmp_path / "whole" / "checkpoints").exists() is (every is not None)
    finished = trainer("stopped")
    finished.train_step = None
    assert finished.run() == 0
    assert "resumed after step 4 of 4" in capsys.readouterr().out


def test_a_stopped_run_that_may_not_go_on_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv(UNDER_TORCHRUN, raising=False)
    cfg = make_cfg(tmp_path)
    cfg.checkpoint.resume = False
    assert signal_in(make_trainer(cfg, make_units(4)), 0, SIGTERM).run() == 143
    assert "checkpoint.resume true goes on from its checkpoint" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"checkpoint\.resume: expected true"):
        make_trainer(cfg, make_units(4)).run()


def test_a_signal_in_the_last_step_changes_nothing(tmp_path):
    trainer = signal_in(make_trainer(make_cfg(tmp_path), make_units(4)), 2, signal.SIGINT)
    assert trainer.run() == 0
    assert steps_of(tmp_path) == [1, 2, 3]
    assert (tmp_path / "model").exists()


def _one_rank_is_told(rank, folder):
    cfg = make_cfg(folder / "run", max_steps=5)
    world = parallel.make_world(cfg.parallel, parallel.ALONE.device)
    policy = FusedHeadLM(tiny_model())
    policy.run_device = world.device
    parallel.shard(policy, cfg.parallel, world, policy.model.dtype)
    trainer = Trainer(cfg, policy, None, make_units(4), [], world)
    code = signal_in(trainer, 1 if rank == 1 else None, SIGTERM).run()
    (folder / f"code-{rank}").write_text(str(code))


def test_all_ranks_stop_after_the_same_step(tmp_path, monkeypatch):
    monkeypatch.delenv(UNDER_TORCHRUN, raising=False)
    spawn(_one_rank_is_told, tmp_path)
    assert [(tmp_path / f"code-{rank}").read_text() for rank in (0, 1)] == ["143", "143"]
    assert steps_of(tmp_path / "run") == [1, 2]
