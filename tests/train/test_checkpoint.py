"""Checkpoints alone: bitwise, whole or absent, refused where they are defective or foreign."""

import json
import pickle
import random
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from processes import KILLED, kill_at, run_processes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from train.alpha import FixedAlpha
from train.checkpoint import checkpoint
from train.checkpoint.checkpoint import Checkpointer, checkpoints, find_defect
from train.checkpoint.state import MAY_CHANGE, TrainState, model_tensors, run_identity
from train.checkpoint.state_files import read_state
from train.config import CheckpointConfig, RunConfig
from train.runtime.parallel import ALONE, World

IDENTITY = {"optim.lr": "0.1", "weights": "abc"}


class Tied(nn.Module):
    """Two names for one weight, a buffer, a frozen parameter, and rows that two ranks share
    unevenly."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5)
        self.head.weight = self.embed.weight
        self.frozen = nn.Linear(3, 3)
        self.frozen.requires_grad_(False)
        self.register_buffer("count", torch.zeros(2))

    def forward(self, ids):
        return self.head(self.frozen(self.embed(ids)))


class Run:
    """A training run that draws its data from the generators."""

    def __init__(self, shard: bool = False) -> None:
        torch.manual_seed(3)
        self.model = Tied()
        if shard:
            fully_shard(self.model, mesh=init_device_mesh("cpu", (2,)))
        trained = [param for param in self.model.parameters() if param.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=0.1, betas=(0.8, 0.9), fused=True)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 0.9**step)
        self.state = TrainState(self.model, self.optimizer, self.schedule, FixedAlpha(0.5), None)
        random.seed(4)
        np.random.seed(5)
        torch.manual_seed(6)

    def step(self) -> list[float]:
        """One step; returns what was drawn."""
        drawn = [random.random(), float(np.random.rand()), torch.rand(()).item()]
        ids = torch.arange(5)
        scale = sum(drawn) * torch.ones(5, 5)
        (self.model(ids) * scale).square().sum().backward()
        self.model.count += 1  # the same on every rank, as buffers are
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        return drawn

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything that training changed, whole."""
        found = dict(self.model.state_dict())
        for number, state in enumerate(self.optimizer.state.values()):
            found |= {f"{number}.{name}": value for name, value in state.items()}
        found["lr"] = torch.tensor(self.optimizer.param_groups[0]["lr"])
        return {
            name: (value.full_tensor() if isinstance(value, DTensor) else value).clone()
            for name, value in found.items()
        }


def make(folder: Path, world=ALONE, identity=None, **options) -> Checkpointer:
    cfg = CheckpointConfig(**{"every": 1, **options})
    return Checkpointer(folder, world, cfg, IDENTITY if identity is None else identity)


def assert_equal(got, expected):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


def trained(folder: Path, steps: int, **options) -> Run:
    run, saver = Run(), make(folder, **options)
    for step in range(steps):
        run.step()
        saver.save(step + 1, run.state.state_dict())
    saver.finish()
    return run


def resume(folder: Path, **options) -> tuple[Run, int | None]:
    run = Run()
    loaded = make(folder, **options).load_latest(run.state.state_dict)
    if loaded is None:
        return run, None
    run.state.load_state_dict(loaded.state)
    return run, loaded.step


@pytest.mark.parametrize("async_save", [False, True])
def test_a_run_goes_on_bitwise(tmp_path, async_save):
    """Weights, optimizer, schedule and three generators; with `async_save` the state moves on while
    the copy is written."""
    trained(tmp_path, 3, async_save=async_save)
    whole = Run()
    for _ in range(3):
        whole.step()
    after_three, drawn = whole.tensors(), [whole.step(), whole.step()]
    run, step = resume(tmp_path)
    assert step == 3
    assert_equal(run.tensors(), after_three)
    assert [run.step(), run.step()] == drawn
    assert_equal(run.tensors(), whole.tensors())
    assert run.optimizer.param_groups[0]["betas"] == (0.8, 0.9)


def test_without_a_checkpoint_nothing_changes(tmp_path):
    run, step = resume(tmp_path / "none")
    assert step is None
    assert not run.optimizer.state


def test_what_is_written(tmp_path):
    """Tied weights once, frozen ones never, no pickle but that of the format."""
    trained(tmp_path, 1)
    (folder,) = checkpoints(tmp_path)
    names = {"manifest.json", "state.json", "rng-0.json", ".metadata", "__0_0.distcp"}
    assert {path.name for path in folder.iterdir()} == names
    assert set(json.loads((folder / "manifest.json").read_text())["manifest"]["files"]) == (
        names - {"manifest.json"}
    )
    model = json.loads((folder / "state.json").read_text())["model"]
    assert set(model) == {"embed.weight", "head.bias", "count"}


def test_only_the_latest_are_kept(tmp_path):
    trained(tmp_path, 5, keep_latest=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000004", "step-00000005"]
    with pytest.raises(ValueError, match=r"checkpoint.keep_latest: expected >= 1, got 0"):
        make(tmp_path, keep_latest=0)
    with pytest.raises(ValueError, match=r"checkpoint.every: expected >= 1, got 0"):
        make(tmp_path, every=0)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "file", "reason"),
    [
        (truncate, "__0_0.distcp", r"__0_0.distcp: expected \d+ bytes, got \d+"),
        (flip, "__0_0.distcp", "__0_0.distcp: its sha256 is not the one in manifest.json"),
        (flip, "state.json", "state.json: its sha256"),
        (flip, ".metadata", ".metadata: its sha256"),
        (Path.unlink, "__0_0.distcp", "__0_0.distcp is missing"),
        (Path.unlink, "rng-0.json", "rng-0.json is missing"),
        (Path.unlink, "manifest.json", "manifest.json is missing"),
        (truncate, "manifest.json", "manifest.json: "),
        (flip, "manifest.json", "manifest.json: "),
    ],
)
def test_a_defective_checkpoint_is_refused_and_the_one_before_used(tmp_path, damage, file, reason):
    trained(tmp_path, 3)
    damage(tmp_path / "step-00000003" / file)
    with pytest.warns(UserWarning, match=f"step-00000003: checkpoint refused: {reason}") as caught:
        run, step = resume(tmp_path)
    assert (len(caught), step) == (1, 2)
    # Going on, the run replaces it.
    run.step()
    make(tmp_path).save(3, run.state.state_dict())
    assert find_defect(tmp_path / "step-00000003") is None
    assert_equal(resume(tmp_path)[0].tensors(), run.tensors())


def test_no_whole_checkpoint_is_none(tmp_path):
    trained(tmp_path, 3)
    for path in checkpoints(tmp_path):
        truncate(path / "state.json")
    with pytest.warns(UserWarning, match="refused") as caught:
        _, step = resume(tmp_path)
    assert (len(caught), step) == (2, None)


def test_a_later_defective_one_goes_when_the_run_has_gone_on(tmp_path):
    trained(tmp_path, 5, keep_latest=3)
    for step in (4, 5):
        truncate(tmp_path / f"step-0000000{step}" / "state.json")
    run, saver = Run(), make(tmp_path)
    with pytest.warns(UserWarning, match="refused"):
        assert saver.load_latest(run.state.state_dict).step == 3
    saver.save(4, run.state.state_dict())
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000003", "step-00000004"]


def test_another_run_is_refused_by_what_differs(tmp_path):
    trained(tmp_path, 1)
    other = {"optim.lr": "0.2", "weights": "abc", "seed": "1"}
    seen = r"optim.lr: expected 0.2 \(this command\), got 0.1 \(the checkpoint\); seed: expected 1 "
    with pytest.raises(ValueError, match=seen):
        resume(tmp_path, identity=other)
    with pytest.raises(ValueError, match=r"checkpoint.resume: expected true, or a run_dir without"):
        resume(tmp_path, resume=False)


def test_identity_names_options_and_data():
    cfg = RunConfig()
    found = run_identity(cfg, [], [], "abc")
    assert found["optim.lr"] == "5e-07"
    assert found["weights"] == "abc"
    assert {"training units", "held-out units", "train.max_steps", "alpha.fixed"} <= set(found)
    cfg.run_dir, cfg.checkpoint.keep_latest, cfg.train.head_workspace_mib = "elsewhere", 7, 1
    assert run_identity(cfg, [], [], "abc") == found
    cfg.optim.betas = (0.9, 0.95)
    assert run_identity(cfg, [], [], "abc") != found


def test_options_that_may_change_exist():
    for name in MAY_CHANGE:
        value = asdict(RunConfig())
        for part in name.split("."):
            assert part in value, name
            value = value[part]


def test_what_json_cannot_hold_is_named(tmp_path):
    saver = make(tmp_path)
    with pytest.raises(TypeError, match=r"state.alpha.x: expected a tensor or what JSON can hold"):
        saver.save(1, {"alpha": {"x": object()}})
    with pytest.raises(TypeError, match=r"state.alpha: expected names that are str, got 3"):
        saver.save(1, {"alpha": {3: 1.0}})


@pytest.mark.parametrize("async_save", [False, True])
def test_an_error_surfaces_at_the_next_call(tmp_path, async_save):
    (tmp_path / "file").write_text("where the folder should be")
    saver, run = make(tmp_path / "file", async_save=async_save), Run()
    run.step()
    if async_save:
        saver.save(1, run.state.state_dict())
        with pytest.raises(OSError, match="file"):
            saver.finish()
        saver.finish()
    else:
        with pytest.raises(OSError, match="file"):
            saver.save(1, run.state.state_dict())


class Explosive:
    def __reduce__(self):
        return Path.touch, (Path("exploded"),)


def test_pickles_of_the_format_run_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trained(tmp_path, 1)
    (folder,) = checkpoints(tmp_path)
    (folder / ".metadata").write_bytes(pickle.dumps(Explosive()))
    # torch 2.11 goes on after the first, without metadata.
    with pytest.raises(RuntimeError, match=r"does not describe a tensor|metadata is None"):
        read_state(folder, {"model": model_tensors(Tied())})
    assert not Path("exploded").exists()
    pickle.loads((folder / ".metadata").read_bytes())
    assert Path("exploded").exists()


def _killed_save(folder: Path, target: str, call: int) -> None:
    run, step = resume(folder)
    assert step == 2
    run.step()
    with kill_at(target, call):
        make(folder).save(3, run.state.state_dict())


# A name, where the process dies in place of a call of it, and the step that is there afterwards.
@pytest.mark.parametrize(
    ("target", "call", "step"),
    [
        ("torch.distributed.checkpoint.save", 1, 2),
        ("train.checkpoint.checkpoint.write_synced", 1, 2),
        ("train.checkpoint.checkpoint.write_synced", 3, 2),
        ("train.checkpoint.checkpoint.sync_folder", 1, 2),
        ("train.checkpoint.checkpoint.os.replace", 1, 2),
        ("train.checkpoint.checkpoint.sync_folder", 2, 3),
        ("train.checkpoint.checkpoint.os.replace", 2, 3),
        ("train.checkpoint.checkpoint.shutil.rmtree", 1, 3),
    ],
)
def test_a_killed_save_leaves_the_old_or_the_new(tmp_path, target, call, step):
    trained(tmp_path, 2)
    assert run_processes(partial(_killed_save, tmp_path, target, call), 1) == [KILLED]
    run, found = resume(tmp_path)
    assert found == step
    for _ in range(step, 4):
        run.step()
    make(tmp_path).save(4, run.state.state_dict())
    assert {path.name for path in tmp_path.iterdir()} <= {
        "step-00000002",
        "step-00000003",
        "step-00000004",
    }
    whole = Run()
    for _ in range(4):
        whole.step()
    assert_equal(run.tensors(), whole.tensors())


def world_of_two() -> World:
    return World(dist.get_rank(), 2, torch.device("cpu"), group=dist.group.WORLD)


def _save_on_two(folder: Path, rank: int) -> None:
    run = Run(shard=True)
    saver = make(folder, world_of_two(), async_save=True)
    random.seed(100 + rank)
    for step in range(2):
        run.step()
        saver.save(step + 1, run.state.state_dict())
    saver.finish()
    torch.save((run.tensors(), run.step()), folder / f"after-{rank}.pt")


def _load_on_two(folder: Path, rank: int) -> None:
    run = Run(shard=True)
    loaded = make(folder, world_of_two()).load_latest(run.state.state_dict)
    run.state.load_state_dict(loaded.state)
    torch.save((loaded.step, run.tensors(), run.step()), folder / f"loaded-{rank}.pt")


def _on_rank(work, folder: Path) -> None:
    work(folder, dist.get_rank())


def test_ranks(tmp_path):
    """2 -> 2 ranks with the generators of each, 2 -> 1 and 1 -> 2 with all tensors equal."""
    two, one = tmp_path / "two", tmp_path / "one"
    two.mkdir()
    assert run_processes(partial(_on_rank, _save_on_two, two), 2) == [0, 0]
    assert run_processes(partial(_on_rank, _load_on_two, two), 2) == [0, 0]
    for rank in range(2):
        tensors, drawn = torch.load(two / f"after-{rank}.pt")
        step, loaded, drawn_again = torch.load(two / f"loaded-{rank}.pt")
        assert step == 2
        assert_equal(loaded, tensors)
        assert drawn_again == drawn
    alone, step = resume(two)
    assert step == 2
    assert_equal(alone.tensors(), tensors)

    saved = trained(one, 2)
    assert run_processes(partial(_on_rank, _load_on_two, one), 2) == [0, 0]
    draws = []
    for rank in range(2):
        step, loaded, drawn = torch.load(one / f"loaded-{rank}.pt")
        assert step == 2
        assert_equal(loaded, saved.tensors())
        draws.append(drawn)
    assert draws[0] == saved.step()
    assert draws[1] != draws[0]


def test_a_missing_shard_is_refused_on_all_ranks(tmp_path):
    assert run_processes(partial(_on_rank, _save_on_two, tmp_path), 2) == [0, 0]
    (tmp_path / "step-00000002" / "__1_0.distcp").unlink()
    assert run_processes(partial(_on_rank, _load_on_two, tmp_path), 2) == [0, 0]
    assert [torch.load(tmp_path / f"loaded-{rank}.pt")[0] for rank in range(2)] == [1, 1]


def _fail_on_one(folder: Path, rank: int) -> None:
    run = Run(shard=True)
    run.step()
    if rank == 1:
        checkpoint.write_synced = partial(_raise)
    with pytest.raises(RuntimeError, match="rank 1: OSError: no space"):
        make(folder, world_of_two()).save(1, run.state.state_dict())


def _raise(*_: object) -> None:
    raise OSError("no space")


def test_a_rank_that_cannot_write_stops_all(tmp_path):
    assert run_processes(partial(_on_rank, _fail_on_one, tmp_path), 2) == [0, 0]
    assert checkpoints(tmp_path) == []
