"""Runs of the loop on two gloo processes, for the tests: what to run, and how to start it."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from tiny_runs import make_cfg, make_units, tiny_model

from train.config import AlphaConfig, EstimateConfig, RunConfig
from train.model.head import FusedHeadLM
from train.runtime import parallel
from train.trainer import Trainer

RANKS = 2


def spawn(worker: Callable[..., None], folder: Path, *arguments: Any) -> None:
    """Run `worker(rank, folder, *arguments)` in two processes of a gloo group, on the CPU."""
    with mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES=""):
        torch.multiprocessing.spawn(_worker, (worker, str(folder), arguments), RANKS)


def _worker(rank: int, worker: Callable[..., None], folder: str, arguments: tuple) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", RANK=str(rank), WORLD_SIZE=str(RANKS))
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", RANKS)
    wait = timedelta(seconds=60)  # a rank that fell behind is an error soon
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=wait)
    try:
        worker(rank, Path(folder), *arguments)
    finally:
        dist.destroy_process_group()


@dataclass
class Case:
    """A run of three steps in fp64, in which nothing but the order of sums can differ."""

    train: dict[str, Any] = field(default_factory=dict)
    estimate: dict[str, Any] | None = None
    loss: str = "dpo"
    tied: bool = False
    replicate: int = 1
    sync_every_micro_batch: bool = False
    units: Callable[[], list] = lambda: make_units(9)

    def cfg(self, run_dir: Path) -> RunConfig:
        cfg = make_cfg(run_dir, **self.train)
        cfg.model.param_dtype = cfg.model.compute_dtype = "float64"  # type: ignore[assignment]
        cfg.loss.name, cfg.optim.weight_decay = self.loss, 0.1  # type: ignore[assignment]
        if self.estimate is not None:
            cfg.alpha = AlphaConfig(estimate=EstimateConfig(**{"warmup": 1, **self.estimate}))
        cfg.parallel.replicate = self.replicate
        cfg.parallel.reduce_dtype = "float64"  # type: ignore[assignment]
        cfg.parallel.sync_every_micro_batch = self.sync_every_micro_batch
        return cfg

    def trainer(self, run_dir: Path, sharded: bool) -> Trainer:
        """The trainer of this rank, or that of one process alone."""
        cfg, units = self.cfg(run_dir), self.units()
        policy = FusedHeadLM(tiny_model(dtype=torch.float64, tie_word_embeddings=self.tied))
        world = parallel.ALONE
        if sharded:
            world = parallel.make_world(cfg.parallel, torch.device("cpu"))
            parallel.shard(policy, cfg.parallel, world, torch.float64)
        held_out = make_units(3, seed=5)
        return Trainer(cfg, policy, None, units, held_out, world)


def run(case: Case, run_dir: Path, sharded: bool) -> dict[str, Any]:
    """Log lines of the steps and the held-out metrics, and the final weights."""
    trainer = case.trainer(run_dir, sharded)
    lines = [trainer.train_step(step) for step in range(trainer.plan.num_steps)]
    held_out = trainer.evaluate(_Silent(), trainer.plan.num_steps)  # type: ignore[arg-type]
    weights = {name: parallel.whole(p).detach() for name, p in trainer.policy.named_parameters()}
    return {"lines": lines, "held_out": held_out, "weights": weights}


class _Silent:
    def write(self, event: str, step: int, metrics: dict) -> None:
        pass
