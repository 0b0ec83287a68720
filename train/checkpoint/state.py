"""What a checkpoint holds: the state that a run goes on from, and the identity of that run."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from bvpo_kernels.grad_stats import GradStats
from bvpo_kernels.types import Unit
from train.alpha import AlphaSource
from train.config import RunConfig
from train.preferences.pairs import data_fingerprint

# Options that may differ between a checkpoint and the run that goes on from it. Prompts, samples
# and ranking have done their work: what they left is compared itself. The rest changes where a run
# writes and how it computes the same gradients (up to rounding), not what it minimises.
MAY_CHANGE = (
    "run_dir", "dry_run", "checkpoint", "profile", "prompts", "sample", "rank", "model.name",
    "model.gguf_file", "train.pairs", "train.check_tokenizer", "train.eval_every",
    "train.measure_head_memory", "train.head_workspace_mib", "train.head_impl",
    "train.tokens_per_micro_batch",
    "train.checkpoint_layers", "parallel.replicate", "parallel.reshard_after_forward",
    "parallel.cpu_offload", "parallel.sync_every_micro_batch",
)  # fmt: skip


def run_identity(
    cfg: RunConfig, train_units: Sequence[Unit], held_out: Sequence[Unit], weights: str
) -> dict[str, str]:
    """What must agree before a run goes on from a checkpoint, by name.

    Args:
        weights: digest of the weights that the run started from; it covers what is frozen, which
            checkpoints leave out.
    """
    options = dict(_flatten("", asdict(cfg)))
    fixed = {name: json.dumps(value) for name, value in options.items() if not _may_change(name)}
    return fixed | {
        "weights": weights,
        "training units": data_fingerprint(train_units),
        "held-out units": data_fingerprint(held_out),
    }


def _may_change(name: str) -> bool:
    return any(name == free or name.startswith(f"{free}.") for free in MAY_CHANGE)


def _flatten(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for name, item in value.items():
            yield from _flatten(f"{prefix}.{name}" if prefix else str(name), item)
    else:
        yield prefix, value


class TrainState:
    """The state of a run between two steps, as tensors and plain values by name.

    Frozen parameters are left out: they are those that the run started from. The parameters keep
    their names without the wrappers of sharding, compilation and activation checkpointing, and the
    optimizer's state goes by these names, so that it fits another number of ranks.
    """

    def __init__(
        self,
        policy: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler,
        alpha: AlphaSource,
        stats: GradStats | None,
    ) -> None:
        self.policy, self.optimizer, self.schedule = policy, optimizer, schedule
        self.alpha, self.stats = alpha, stats

    def state_dict(self) -> dict[str, Any]:
        """Tensors (DTensors where sharded) that share memory with the live ones, and values."""
        return {
            "model": model_tensors(self.policy),
            "optimizer": get_optimizer_state_dict(self.policy, self.optimizer),
            "schedule": self.schedule.state_dict(),
            "alpha": self.alpha.state_dict(),
            "stats": {} if self.stats is None else self.stats.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        load_model_tensors(self.policy, state["model"])
        optimizer = state["optimizer"]
        # JSON has no tuples; those of the live groups (betas) come back as such.
        for loaded, live in zip(
            optimizer["param_groups"], self.optimizer.param_groups, strict=True
        ):
            for name, value in live.items():
                if isinstance(value, tuple):
                    loaded[name] = tuple(loaded[name])
        set_optimizer_state_dict(self.policy, self.optimizer, optimizer)
        self.schedule.load_state_dict(state["schedule"])
        self.alpha.load_state_dict(state["alpha"])
        if self.stats is not None:
            self.stats.load_state_dict(state["stats"])


def model_tensors(policy: nn.Module) -> dict[str, Any]:
    """The trained parameters and the buffers of a model, each once, sharing its memory."""
    options = StateDictOptions(ignore_frozen_params=True)
    tensors = get_model_state_dict(policy, options=options)
    first = {id(param): name for name, param in policy.named_parameters()}
    named = policy.named_parameters(remove_duplicate=False)
    # A tied parameter is written once, under the first of its names.
    tied = {name for name, param in named if first[id(param)] != name}
    return {name: value for name, value in tensors.items() if name not in tied}


def load_model_tensors(policy: nn.Module, tensors: Mapping[str, Any]) -> None:
    """Set what `model_tensors` returned; the rest of the model stays."""
    # Not strict: frozen parameters and second names of tied ones are absent.
    set_model_state_dict(policy, dict(tensors), options=StateDictOptions(strict=False))


def rng_state(device: torch.device) -> dict[str, Any]:
    """State of this process's generators: Python's, NumPy's, and torch's for the CPU and CUDA."""
    version, internal, gauss = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=False)
    key = numpy_state["state"]["key"]
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {
        "python": [version, list(internal), gauss],
        "numpy": numpy_state | {"state": numpy_state["state"] | {"key": key.tolist()}},
        "torch": torch.get_rng_state().tolist(),
        "cuda": None if cuda is None else cuda.tolist(),
    }


def set_rng_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Set what `rng_state` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    inner = state["numpy"]["state"]
    key = np.asarray(inner["key"], dtype=np.uint32)
    np.random.set_state({**state["numpy"], "state": {**inner, "key": key}})
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(torch.tensor(state["cuda"], dtype=torch.uint8), device)


def seed_rng(*key: int) -> None:
    """Seed the generators of a rank that a checkpoint knows nothing of, from numbers alone."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    seed = int.from_bytes(digest[:4], "little")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
