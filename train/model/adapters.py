"""LoRA: which layers are adapted, the model with its adapters off, and with them merged."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from train.config import AdapterConfig, RunConfig
from train.runtime.files import replace_folder
from train.runtime.parallel import World, whole

ALL_LINEAR = "all-linear"
_NAME = "default"  # what peft calls a model's first adapter


def check(cfg: RunConfig) -> None:
    """Refuse options that cannot be combined, before a model is loaded.

    Raises:
        ValueError: naming the field.
    """
    if cfg.reference == "adapter_off" and cfg.adapter is None:
        raise ValueError(
            "reference: 'adapter_off' expects an adapter to turn off (--adapter.rank 16), got none"
        )
    if cfg.adapter is None or not cfg.adapter.head:
        return
    if cfg.alpha.estimate is not None:
        raise ValueError(
            "adapter.head: expected false with alpha.estimate, which cannot measure the gradient "
            "of LoRA on the LM head, got true"
        )
    if cfg.train.tail_tolerance > 0:
        raise ValueError(
            "adapter.head: expected false with train.tail_tolerance > 0 (LoRA on the LM head has "
            "the exact backward only), got true"
        )


def add_adapters(model: PreTrainedModel, cfg: AdapterConfig, seed: int) -> Any:
    """A peft model around `model`: base weights frozen, B = 0, A drawn from `seed`.

    Args:
        model: changed in place; its weights may still be on the meta device, the adapters' are not.
        cfg: what is adapted, without dropout: policy and reference differ in their weights only.
        seed: see `reset_adapters`.

    Raises:
        ImportError: peft is not installed.
        ValueError: naming adapter.rank or adapter.targets.
    """
    adapted = wrapped(model, cfg)
    for module in adapted.modules():
        # What peft made on the meta device, if the base weights are still there.
        if _is_lora(module) and module.weight.is_meta:
            parts: Any = (module.lora_A, module.lora_B)
            for part in parts:
                part.to_empty(device="cpu")
    reset_adapters(adapted, seed)
    return adapted


def wrapped(model: PreTrainedModel, cfg: AdapterConfig) -> Any:
    """`add_adapters` without values: the adapters' are undefined.

    On the meta device, with it as torch's default too, nothing has memory.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("adapter: expected peft to be installed (pip install peft)") from error
    if cfg.rank < 1:
        raise ValueError(f"adapter.rank: expected an integer >= 1, got {cfg.rank}")
    alpha: Any = cfg.alpha  # peft says int, and multiplies
    config = LoraConfig(
        r=cfg.rank,
        lora_alpha=alpha,
        lora_dropout=0.0,
        target_modules=_targets(model, cfg),
        task_type="CAUSAL_LM",
    )
    # peft would draw from the global generator, layer by layer: not the same on every rank, and
    # not what a meta tensor could take.
    with torch.random.fork_rng(devices=[]):
        adapted = get_peft_model(model, config)
    # fp32 if the base weights are half precision.
    dtype = torch.promote_types(model.dtype, torch.float32)
    for module in adapted.modules():
        if _is_lora(module):
            parts: Any = (module.lora_A, module.lora_B)
            for part in parts:
                part.to(dtype)
    return adapted


def _targets(model: PreTrainedModel, cfg: AdapterConfig) -> list[str]:
    """Names of the adapted layers, the output embedding among them if `cfg.head` says so."""
    head = model.get_output_embeddings()
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    named = [cfg.targets] if isinstance(cfg.targets, str) else list(cfg.targets)
    chosen: set[str] = set()
    for target in named:
        found = {
            name
            for name in linear
            if target == ALL_LINEAR or name == target or name.endswith(f".{target}")
        }
        if not found:
            last = sorted({name.rpartition(".")[2] for name in linear})
            raise ValueError(
                f"adapter.targets: expected {ALL_LINEAR!r} or names of linear layers of "
                f"{type(model).__name__}, among them {last}, got {target!r}"
            )
        chosen |= found
    heads = {name for name, module in linear.items() if module is head}
    if ALL_LINEAR not in named and chosen & heads:
        raise ValueError(
            f"adapter.targets: expected layers of the decoder, got the LM head {sorted(heads)}; "
            f"adapter.head adapts it"
        )
    if cfg.head and head.weight is model.get_input_embeddings().weight:
        raise ValueError(
            f"adapter.head: expected false for {type(model).__name__}, whose LM head is tied to "
            f"its embedding: no checkpoint of it could hold the two apart; got true"
        )
    return sorted(chosen | heads if cfg.head else chosen - heads)


@torch.no_grad()
def reset_adapters(model: nn.Module, seed: int) -> None:
    """A uniform in +-1/sqrt(in_features), as peft draws it; B = 0, so that nothing changes yet.

    Each A has a generator of its own, from (seed, name): whatever the order and the ranks, the
    values are the same, and no other generator moves.
    """
    for name, parameter in model.named_parameters():
        if not is_adapter(name):
            continue
        if ".lora_B." in name:
            parameter.zero_()
            continue
        digest = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        bound = 1 / math.sqrt(parameter.shape[1])
        parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name is LoRA's."""
    return ".lora_A." in name or ".lora_B." in name


def base_name(name: str) -> str:
    """The name that a parameter had before peft."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def _is_lora(module: nn.Module) -> bool:
    return hasattr(module, "lora_A") and hasattr(module, "base_layer")


@contextmanager
def adapters_off(model: Any) -> Iterator[None]:
    """The model as it was before its adapters; bitwise what B = 0 gives, the head included."""
    trained = [p for p in model.parameters() if p.requires_grad]
    with model.disable_adapter():
        # peft freezes what it disables, and FSDP2 keeps the flag that it sees in a first forward.
        for parameter in trained:
            parameter.requires_grad_(True)
        head = model.get_output_embeddings()
        if not _is_lora(head):
            yield
            return
        # An adapted head stays on the kernel of adapted heads, which may round differently.
        scaling = dict(head.scaling)
        head.enable_adapters(True)
        head.scaling.update(dict.fromkeys(scaling, 0.0))
        try:
            yield
        finally:
            head.scaling.update(scaling)
            head.enable_adapters(False)


def base_model(model: Any) -> PreTrainedModel:
    """The model of transformers, without what peft puts around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def merged(base: PreTrainedModel, name: str, tensor: Tensor) -> Tensor:
    """The whole of a tensor of `base.state_dict()`, scale B A added where its layer is adapted.

    The sum is formed in fp32 (fp64 for fp64) and rounded once; the model is left as it is. A
    collective for sharded models, or three.
    """
    owner, _, leaf = name.rpartition(".")
    tensor = whole(tensor)
    if not owner.endswith(".base_layer") or leaf != "weight":
        return tensor
    layer: Any = base.get_submodule(owner.removesuffix(".base_layer"))
    acc = torch.promote_types(tensor.dtype, torch.float32)
    a_RD, b_VR = (
        whole(part[_NAME].weight.detach()).to(acc) for part in (layer.lora_A, layer.lora_B)
    )
    return (tensor.to(acc) + layer.scaling[_NAME] * (b_VR @ a_RD)).to(tensor.dtype)


def save_adapter(model: Any, path: Path, world: World) -> None:
    """Write the adapter alone to the folder `path`, for `PeftModel.from_pretrained`.

    All ranks call; rank 0 writes. Nothing is written for a model without an adapter.
    """
    if base_model(model) is model:
        return
    state = {name: whole(p).cpu() for name, p in model.state_dict().items() if is_adapter(name)}
    if world.is_main:
        # "auto" would ask the hub whether the embedding was resized.
        options = {"state_dict": state, "save_embedding_layers": False}
        replace_folder(path, lambda folder: model.save_pretrained(folder, **options))
    world.barrier()
