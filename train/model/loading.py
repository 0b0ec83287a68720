"""A sharded model from a checkpoint, without any rank ever holding the whole of it.

Parameters are made on the meta device, spread over the ranks (`parallel.shard`), and then each rank
reads its own rows of each safetensors entry from the files. A GGUF model, which is one compressed
file, is unpacked whole on every rank first.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from train.config import ModelConfig
from train.model.adapters import base_name, is_adapter
from train.model.models import (
    initial_attention,
    load_model,
    load_tokenizer,
    readable_errors,
    resolve,
)

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


@dataclass(frozen=True)
class Weights:
    """Where each tensor of a checkpoint is: name -> file."""

    folder: str
    files: Mapping[str, Path]

    @contextmanager
    def open(self) -> Iterator[Any]:
        """name -> its slice, as safetensors reads it: bytes are read when rows are taken."""
        handles: dict[Path, Any] = {}
        try:

            def take(name: str) -> Any:
                path = self.files[name]
                if path not in handles:
                    with readable_errors("model.name", self.folder):
                        handles[path] = safe_open(path, framework="pt").__enter__()
                return handles[path].get_slice(name)

            yield take
        finally:
            for handle in handles.values():
                handle.__exit__(None, None, None)


def find_weights(path: str) -> Weights | None:
    """The safetensors of a folder or hub id; None where there are none."""
    folder = Path(path)
    if not folder.is_dir():
        folder = Path(snapshot_download(path, allow_patterns=["*.safetensors", "*.json"]))
    if (folder / _INDEX).is_file():
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"]
        return Weights(path, {name: folder / file for name, file in index.items()})
    if (folder / _SINGLE).is_file():
        with safe_open(folder / _SINGLE, framework="pt") as file:
            return Weights(path, dict.fromkeys(file.keys(), folder / _SINGLE))
    return None


def empty_model(cfg: ModelConfig) -> tuple[PreTrainedModel, Any, Weights | None]:
    """Model in eval mode, tokenizer, and the weights to `fill` it with once it is sharded.

    None in the place of the weights: the model has them (GGUF; a checkpoint without safetensors).

    Raises:
        FileNotFoundError, ValueError: if it cannot be loaded; the message names model.name.
    """
    path, gguf_file = resolve(cfg)
    weights = None
    if gguf_file is None:
        with readable_errors("model.name", cfg.name):
            weights = find_weights(path)
    if weights is None:
        return *load_model(cfg, packed=True), None
    from accelerate import init_empty_weights

    attention = initial_attention(cfg, packed=True)
    with readable_errors("model.name", cfg.name, attention=attention):
        options = {"trust_remote_code": cfg.trust_remote_code}
        config = AutoConfig.from_pretrained(path, **options)
        # Buffers stay: rotary tables are computed, not loaded.
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(
                config,
                dtype=getattr(torch, cfg.param_dtype),
                attn_implementation=attention,
                **options,
            )
    model.tie_weights()
    if (Path(path) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path)
    missing = sorted(name for name, names in _names(model).items() if not names & {*weights.files})
    if missing:
        raise ValueError(
            f"model.name: expected a complete checkpoint under the names of {type(model).__name__} "
            f"(from_pretrained and save_pretrained write it), got {cfg.name!r} without "
            f"{len(missing)} weights: {missing[:3]}"
        )
    return model.eval(), load_tokenizer(cfg), weights


def _names(model: nn.Module) -> dict[str, set[str]]:
    """Names of each saved tensor, by the first of them; tied ones have several."""
    names: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    return {group[0]: set(group) for group in names.values()}


@torch.no_grad()
def fill(model: nn.Module, weights: Weights, device: torch.device) -> None:
    """Read this rank's rows of every parameter from the files; tied ones stay tied.

    Adapters, which no checkpoint of a base model has, keep their values.

    Args:
        model: parameters are DTensors on the meta device, Shard(0) or replicated besides.
        device: where the parameters go.

    Raises:
        ValueError: naming a tensor whose shape is another one in the checkpoint.
    """
    modules = dict(model.named_modules())
    with weights.open() as take:
        for first, names in _names(model).items():
            if is_adapter(first):
                continue
            stored = take(min({base_name(name) for name in names} & {*weights.files}))
            old: Any = model.get_parameter(first) if _is_parameter(model, first) else None
            tensor = model.get_buffer(first) if old is None else old
            if tuple(stored.get_shape()) != tuple(tensor.shape):
                raise ValueError(
                    f"model.name: expected {first} of shape {tuple(tensor.shape)}, got "
                    f"{tuple(stored.get_shape())} in {weights.folder}"
                )
            if old is None:
                tensor.copy_(stored[:])
                continue
            new = nn.Parameter(_local_rows(stored, old, device), old.requires_grad)
            for name in names:
                module, _, attribute = name.rpartition(".")
                modules[module]._parameters[attribute] = new


def _is_parameter(model: nn.Module, name: str) -> bool:
    module, _, attribute = name.rpartition(".")
    return attribute in model.get_submodule(module)._parameters


def _local_rows(stored: Any, param: Tensor, device: torch.device) -> DTensor:
    """A DTensor like `param` whose local part holds its rows of `stored`."""
    assert isinstance(param, DTensor), "a sharded model has DTensors only"
    mesh = param.device_mesh
    axis = next(i for i, placement in enumerate(param.placements) if placement == Shard(0))
    rows = -(-param.shape[0] // mesh.size(axis))  # as torch.chunk divides, and FSDP2 with it
    start = min(mesh.get_local_rank(axis) * rows, param.shape[0])
    local = stored[start : start + param.to_local().shape[0]]
    return DTensor.from_local(
        local.to(device, param.dtype),
        mesh,
        param.placements,
        run_check=False,
        shape=param.shape,
        stride=param.stride(),
    )
