"""The trace of a few steps: which, of which ranks, and what is refused."""

import gzip
import json

import pytest
import torch
from tiny_runs import make_cfg, make_trainer, make_units

from train.config import ProfileConfig
from train.runtime.profiling import recording, trace_path


def run_steps(cfg, folder, count, rank=0):
    with recording(cfg, folder, rank) as steps:
        for number in range(count):
            with torch.profiler.record_function(f"step-{number}"):
                torch.ones(3) + 1
            steps.step()


def names(folder, rank=0):
    trace = json.loads(gzip.decompress(trace_path(folder, rank).read_bytes()))
    return {event.get("name") for event in trace["traceEvents"]}


def test_the_steps_asked_for_are_recorded(tmp_path):
    run_steps(ProfileConfig(steps=2, skip=3), tmp_path, 8)
    assert {name for name in names(tmp_path) if name and name.startswith("step-")} == {
        "step-3",
        "step-4",
    }
    assert "aten::add" in names(tmp_path)
    assert [path.name for path in (tmp_path / "profile").iterdir()] == ["rank-0.json.gz"]


def test_others_leave_nothing(tmp_path):
    run_steps(ProfileConfig(), tmp_path, 3)
    run_steps(ProfileConfig(steps=1, skip=1), tmp_path, 3, rank=1)
    run_steps(ProfileConfig(steps=1, skip=3), tmp_path, 2)
    assert not (tmp_path / "profile").exists()


@pytest.mark.parametrize(
    ("cfg", "what"),
    [
        (ProfileConfig(steps=21), "profile.steps: expected 0 to 20, got 21"),
        (ProfileConfig(steps=-1), "profile.steps: expected 0 to 20, got -1"),
        (ProfileConfig(steps=1, skip=0), "profile.skip: expected at least 1, got 0"),
    ],
)
def test_numbers_out_of_range_are_named(cfg, what, tmp_path):
    with pytest.raises(ValueError, match=what), recording(cfg, tmp_path, 0):
        pass


def test_a_run_records_its_steps(tmp_path):
    cfg = make_cfg(tmp_path, max_steps=3)
    cfg.profile = ProfileConfig(steps=1, skip=1)
    make_trainer(cfg, make_units(4)).run()
    assert any(name and name.startswith("Optimizer.step") for name in names(tmp_path))
