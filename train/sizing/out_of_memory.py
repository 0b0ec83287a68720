"""What to turn when a step does not fit: a message instead of the allocator's traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from bvpo_kernels.head.cost import default_workspace
from train.config import RunConfig
from train.runtime.files import replace_file

# torch's allocator of the CPU raises RuntimeError.
_CPU_ALLOCATOR = "DefaultCPUAllocator"
MIB = 2**20


class StepDoesNotFit(MemoryError):
    """A step ran out of memory; the message names the options that help, the first one first."""


@contextmanager
def explained(cfg: RunConfig, ranks: int, rank: int) -> Iterator[None]:
    """Turn an allocation that fails inside into `StepDoesNotFit`.

    On a GPU the allocator's snapshot goes to `run_dir`/out_of_memory-rank-R.pickle, for
    https://pytorch.org/memory_viz.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        where = _snapshot(Path(cfg.run_dir), rank)
        raise StepDoesNotFit(
            f"rank {rank} is out of memory: {reason[:200]}. What helps, in this order: "
            f"{'; '.join(advice(cfg, ranks))}.{where} `python -m train estimate` says what a "
            f"setting needs."
        ) from error


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return not isinstance(error, StepDoesNotFit)
    return _CPU_ALLOCATOR in str(error)


def _snapshot(run_dir: Path, rank: int) -> str:
    if not torch.cuda.is_available():
        return ""
    path = run_dir / f"out_of_memory-rank-{rank}.pickle"
    replace_file(path, lambda part: torch.cuda.memory._dump_snapshot(str(part)))
    return f" The allocator's snapshot is in {path}."


def advice(cfg: RunConfig, ranks: int) -> list[str]:
    """The options that lower the peak, cheapest first, as this configuration has them."""
    train, parallel = cfg.train, cfg.parallel
    found = []
    if train.checkpoint_layers is None:
        found.append("train.checkpoint_layers 1 recomputes activations, for a third more time")
    elif train.checkpoint_layers > 1:
        found.append(f"train.checkpoint_layers 1 instead of {train.checkpoint_layers}")
    found.append(
        f"train.tokens_per_micro_batch below {train.tokens_per_micro_batch}: activations are in "
        f"proportion to it, down to the longest unit"
    )
    small = default_workspace("cpu") // MIB
    if train.head_workspace_mib is None:
        found.append(
            f"train.head_workspace_mib {small}: the LM head keeps no fp32 gradients of its weight, "
            f"and computes tiles of logits again, a third more of its FLOPs"
        )
    elif train.head_workspace_mib > 64:
        found.append(
            f"train.head_workspace_mib below {train.head_workspace_mib}: the LM head's own memory"
        )
    if ranks > 1 and not parallel.reshard_after_forward:
        found.append("parallel.reshard_after_forward true frees gathered layers")
    if ranks > 1 and not parallel.sync_every_micro_batch:
        found.append("parallel.sync_every_micro_batch true keeps a shard of the gradient only")
    if ranks > 1 and parallel.replicate > 1:
        found.append(f"parallel.replicate 1 instead of {parallel.replicate} shards further")
    if ranks > 1 and torch.cuda.is_available() and not parallel.cpu_offload:
        found.append("parallel.cpu_offload true keeps weights and optimizer on the host")
    if ranks == 1:
        found.append("more ranks: torchrun --nproc-per-node N shards weights and optimizer")
    return found
