"""The training loop's own step."""

from __future__ import annotations

import copy
import tempfile
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.steps.inputs import StepInputs
from train import reference
from train.model.head import FusedHeadLM, workspace_bytes
from train.model.models import attention_of
from train.runtime import parallel
from train.trainer import Trainer


class LoopStep:
    """`Trainer.train_step` of the demo's configuration, its reference scores put into its cache."""

    def __init__(self, inputs: StepInputs, model: Any, *, checkpointing: bool) -> None:
        cfg = copy.deepcopy(inputs.cfg)
        self._folder = tempfile.TemporaryDirectory()
        cfg.run_dir = self._folder.name
        cfg.train.checkpoint_layers = 1 if checkpointing else None
        self.model = model
        model.set_attn_implementation(attention_of(cfg.model, packed=True))
        compute = inputs.case.torch_dtype
        world = parallel.ALONE
        if dist.is_initialized():
            world = parallel.make_world(cfg.parallel, torch.device("cpu"))
        policy = FusedHeadLM(
            # FSDP2 casts the weights as it gathers them, as `train.model.head.build_policy` has it.
            model,
            compute_dtype=compute if world.mesh is None else model.dtype,
            workspace_bytes=workspace_bytes(cfg),
        )
        if world.mesh is not None:
            policy.run_device = world.device
            parallel.shard(policy, cfg.parallel, world, compute)
        scores = torch.tensor(list(inputs.reference.values()))
        fingerprint = reference.fingerprint(policy, cfg.model)
        cache = reference.ReferenceCache(fingerprint, tuple(inputs.reference), scores)
        reference.save(cache, reference.cache_path(cfg))
        self.trainer = Trainer(cfg, policy, None, inputs.units, [], world)
        self.optimizer = self.trainer.optimizer

    def run(self) -> Tensor:
        return torch.tensor(self.trainer.train_step(0)["loss"])
