"""Ranks and what they share: the process group, the sharded model, and agreement between them.

Started by torchrun, a run is one of `World.size` ranks. FSDP2 spreads parameters, gradients and
optimizer states over them; units are dealt to ranks as whole packs (`train.steps`). Every rank
calls the model equally often, whatever it was dealt: each call gathers weights from all ranks.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from bvpo_kernels.integrations.logit_transform import text_decoder
from train.config import ParallelConfig

SHARD, REPLICATE = "shard", "replicate"
# Names of the norm before the LM head in transformers' decoders.
_FINAL_NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f")


@dataclass(frozen=True)
class World:
    """This process among the others. `mesh` and `group` are None in a run without torchrun."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None = None
    group: Any = None

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and prints."""
        return self.rank == 0

    def gather_objects(self, value: Any) -> list[Any]:
        """The values of all ranks, in the order of the ranks."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's value."""
        if self.group is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.group)
        return values[0]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        if self.group is None:
            return flag
        count = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(count, dist.ReduceOp.MAX, group=self.group)
        return bool(count)

    def barrier(self) -> None:
        if self.group is not None:
            dist.barrier(group=self.group)


# A run of one process, whatever its device: nothing is exchanged.
ALONE = World(0, 1, torch.device("cpu"))


def _device(local_rank: int = 0) -> torch.device:
    return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")


@contextmanager
def start(cfg: ParallelConfig) -> Iterator[World]:
    """The world of this process: torchrun's, or this process alone.

    Raises:
        ValueError: naming the field that this machine or number of ranks cannot serve.
    """
    if "RANK" not in os.environ:
        if cfg.replicate != 1 or cfg.cpu_offload:
            raise ValueError(
                f"parallel: expected replicate 1 and cpu_offload false without torchrun, got "
                f"{cfg.replicate} and {cfg.cpu_offload}"
            )
        yield World(0, 1, _device())
        return
    device = _device(int(os.environ.get("LOCAL_RANK", "0")))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # gloo beside nccl carries objects and tensors that are on the host.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield make_world(cfg, device)
    finally:
        dist.destroy_process_group()


def make_world(cfg: ParallelConfig, device: torch.device) -> World:
    """The world of an initialised process group."""
    size = dist.get_world_size()
    if cfg.replicate < 1 or size % cfg.replicate:
        raise ValueError(
            f"parallel.replicate: expected a divisor of the number of ranks, {size}, got "
            f"{cfg.replicate}"
        )
    if cfg.cpu_offload and device.type == "cpu":
        raise ValueError("parallel.cpu_offload: expected false on the CPU, got true")
    shape, names = (size,), (SHARD,)
    if cfg.replicate > 1:
        shape, names = (cfg.replicate, size // cfg.replicate), (REPLICATE, SHARD)  # type: ignore
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    return World(dist.get_rank(), size, device, mesh, dist.group.WORLD)


def checkpoint_activations(model: PreTrainedModel, every: int | None) -> None:
    """Recompute every n-th decoder layer in the backward, from the first on.

    Raises:
        ValueError: for n < 1, or a model that transformers cannot do it for.
    """
    if every is None:
        return
    if every < 1:
        raise ValueError(f"train.checkpoint_layers: expected a number >= 1 or null, got {every}")
    # The newer name of the two; transformers 5.17 has the older one only. GradStats, which counts
    # the uses of a layer in the backward, needs the non-reentrant form.
    name = "activation_checkpointing_enable"
    enable = getattr(model, name, model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    for index, layer in enumerate(decoder_layers(model)):
        layer.gradient_checkpointing = index % every == 0  # type: ignore[assignment]


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The stack of equal blocks between embedding and final norm.

    Raises:
        ValueError: naming a model that has none.
    """
    stacks = [m for m in text_decoder(model).children() if isinstance(m, nn.ModuleList)]
    if not stacks:
        raise ValueError(
            f"model: expected a decoder with a list of layers, got {type(model).__name__}"
        )
    return max(stacks, key=len)


def shard(policy: nn.Module, cfg: ParallelConfig, world: World, compute: torch.dtype) -> None:
    """Spread the parameters of a `FusedHeadLM` over the ranks, in place.

    Groups: each decoder layer; embedding, final norm and head together where the head is tied, else
    the embedding alone and norm with head. (A group is gathered by the first of its modules that
    runs and freed by the last, so the head must be called as a module: `FusedHeadLM` does.)
    Gradients are sums over ranks: losses are divided by the pairs of the whole step already.

    Args:
        compute: dtype of gathered weights, forward and backward.
    """
    model: PreTrainedModel = policy.model  # type: ignore[assignment]
    options: dict[str, Any] = {
        "mesh": world.mesh,
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=None if compute == model.dtype else compute,
            reduce_dtype=getattr(torch, cfg.reduce_dtype),
        ),
        "offload_policy": CPUOffloadPolicy() if cfg.cpu_offload else OffloadPolicy(),
        "reshard_after_forward": cfg.reshard_after_forward,
    }
    decoder, layers = text_decoder(model), decoder_layers(model)
    for layer in layers:
        fully_shard(layer, **options)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    norm = next((getattr(decoder, n) for n in _FINAL_NORMS if hasattr(decoder, n)), None)
    last = [module for module in (norm, head) if module is not None]
    if embedding.weight is head.weight:
        last = [embedding, *last]
    else:
        fully_shard(embedding, **options)
    # Freed after the forward, it would be gathered again at once: the backward begins with it.
    fully_shard(last, **{**options, "reshard_after_forward": False})
    fully_shard(policy, **options)
    # Called instead of `forward`, they need the hooks around that as well.
    for name in ("choose_attention", "self_check"):
        register_fsdp_forward_method(policy, name)
    for module in sharded_modules(policy):
        module.set_gradient_divide_factor(1.0)
        if world.device.type == "cpu":  # gloo divides by the number of ranks otherwise
            module.set_force_sum_reduction_for_comms(True)
    for layer, following in pairwise(layers):
        layer.set_modules_to_forward_prefetch([following])  # type: ignore[operator]


def sharded_modules(policy: nn.Module) -> list[FSDPModule]:
    return [module for module in policy.modules() if isinstance(module, FSDPModule)]


def reshard(policy: nn.Module) -> None:
    """Free what forwards without a backward left gathered. No effect without FSDP2.

    Until then `parameters()` are the gathered ones: an optimizer made of them would move copies.
    """
    for module in sharded_modules(policy):
        module.reshard()


def synchronise(policy: nn.Module, active: bool) -> None:
    """Whether the coming backward adds the gradients of the ranks. No effect without FSDP2."""
    if isinstance(policy, FSDPModule):
        policy.set_requires_gradient_sync(active)


def whole(tensor: Tensor) -> Tensor:
    """A DTensor's full value, by a collective that every rank calls; a plain tensor as it is."""
    if not isinstance(tensor, DTensor):
        return tensor
    here: Any = tensor.to(tensor.device_mesh.device_type)  # from the host, if it was offloaded
    return here.full_tensor()
