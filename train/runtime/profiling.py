"""`--profile.steps N`: a few steps under torch's profiler, as a trace for chrome://tracing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from train.config import ProfileConfig
from train.runtime.files import replace_file

# A step of a large model is some 10 MB of compressed trace.
MAX_STEPS = 20
# Steps that the profiler watches before it records: its own start-up is not in the trace.
WARMUP = 1


class Steps(Protocol):
    """What counts steps."""

    def step(self) -> None:
        """A step has ended."""


class _Nothing:
    def step(self) -> None:
        """Nothing is recorded."""


def trace_path(run_dir: Path, rank: int) -> Path:
    return run_dir / "profile" / f"rank-{rank}.json.gz"


@contextmanager
def recording(cfg: ProfileConfig, run_dir: Path, rank: int) -> Iterator[Steps]:
    """Record `cfg.steps` steps after the first `cfg.skip`; the caller counts them.

    The trace is `run_dir`/profile/rank-R.json.gz; a run that ends while it is recorded leaves what
    there is, one that ends before leaves none.

    Raises:
        ValueError: for numbers of steps that are out of range.
    """
    if not 0 <= cfg.steps <= MAX_STEPS:
        raise ValueError(f"profile.steps: expected 0 to {MAX_STEPS}, got {cfg.steps}")
    if cfg.skip < WARMUP:
        raise ValueError(f"profile.skip: expected at least {WARMUP}, got {cfg.skip}")
    if not cfg.steps or rank not in cfg.ranks:
        yield _Nothing()
        return
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)

    def write(profiler: profile) -> None:
        replace_file(trace_path(run_dir, rank), lambda path: _export(profiler, path))

    plan = schedule(wait=cfg.skip - WARMUP, warmup=WARMUP, active=cfg.steps, repeat=1)
    with profile(
        activities=activities, schedule=plan, on_trace_ready=write, profile_memory=cfg.memory
    ) as profiler:
        yield profiler


def _export(profiler: profile, path: Path) -> None:
    # The suffix decides whether the trace is compressed, and a temporary name has another one.
    named = path.with_name(f"{path.name}.json.gz")
    profiler.export_chrome_trace(str(named))
    named.replace(path)
