"""The model as a folder for `from_pretrained`, and `export`: that folder from a checkpoint."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import StateDictSplit, split_state_dict_into_shards_factory
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from train.checkpoint.checkpoint import checkpoints, find_defect, read_manifest
from train.checkpoint.state import load_model_tensors, model_tensors
from train.checkpoint.state_files import read_state
from train.config import ExportConfig
from train.model.adapters import base_model, base_name, is_adapter, merged
from train.model.head import build_policy
from train.reference import weights_digest
from train.runtime.files import replace_folder
from train.runtime.parallel import ALONE, World

SHARD_SIZE = "5GB"
_PATTERN = "model{suffix}.safetensors"


def save_model(
    model: Any,
    tokenizer: Any,
    path: Path,
    world: World = ALONE,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: str | int = SHARD_SIZE,
) -> None:
    """Write weights, configuration and tokenizer to the folder `path`, for `from_pretrained`.

    Adapters are merged into the weights. Every rank calls; the main one writes. A sharded parameter
    is gathered when its file's turn comes, so that no rank holds more than one file: but for models
    whose weights transformers stores in another form than it computes with (experts), which the
    main rank gathers on its host.

    Args:
        tokenizer: None saves none.
        dtype: of the floating-point weights in the files; None: the model's.
        max_shard_size: bytes, or such as "5GB", of one file of weights.
    """
    model = base_model(model)
    dtype = model.dtype if dtype is None else dtype
    live = _saved_names(model)
    tensors_by_place = model.state_dict()
    state = {name: tensors_by_place[place] for name, place in live.items()}
    # On the meta device: do the files hold these very tensors under these names?
    empty = {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in state.items()}
    stored = revert_weight_conversion(model, dict(empty))
    as_computed = stored.keys() == empty.keys() and all(stored[n] is t for n, t in empty.items())
    split = split_state_dict_into_shards_factory(
        {name: tensor.to(_file_dtype(tensor, dtype)) for name, tensor in empty.items()},
        get_storage_size=lambda tensor: tensor.numel() * tensor.element_size(),
        filename_pattern=_PATTERN,
        max_shard_size=max_shard_size if as_computed else "1000TB",
    )

    def write(folder: Path | None) -> None:
        for file, names in split.filename_to_tensors.items():
            tensors = {}
            for name in names:
                full = merged(model, live[name], state[name])
                if folder is not None:
                    to = _file_dtype(full, dtype)
                    tensors[name] = full.detach().to("cpu", to).contiguous()
                del full
            if folder is None:
                continue
            if as_computed:
                save_file(tensors, folder / file, metadata={"format": "pt"})
            else:
                model.save_pretrained(folder, state_dict=tensors, max_shard_size=max_shard_size)
        if folder is not None:
            if as_computed:
                _write_index(folder, split)
            _write_settings(model, tokenizer, folder, dtype)

    if world.is_main:
        replace_folder(path, write)
    else:
        write(None)
    world.barrier()


def _saved_names(model: PreTrainedModel) -> dict[str, str]:
    """What the files hold: parameters and persistent buffers, tied ones once, by the names of a
    model without adapters; and their names in this one."""
    tied = {
        name
        for name, source in model.all_tied_weights_keys.items()
        if model.get_parameter(name) is model.get_parameter(source)
    }
    ignored = model._keys_to_ignore_on_save or ()
    names = {base_name(name): name for name in model.state_dict() if not is_adapter(name)}
    return {n: place for n, place in names.items() if n not in tied and n not in ignored}


def _file_dtype(tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    return dtype if tensor.is_floating_point() else tensor.dtype


def _write_index(folder: Path, split: StateDictSplit) -> None:
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(text, encoding="utf-8")


def _write_settings(
    model: PreTrainedModel, tokenizer: Any, folder: Path, dtype: torch.dtype
) -> None:
    config: Any = copy.deepcopy(model.config)
    config.dtype = str(dtype).removeprefix("torch.")
    # FSDP2 puts its name before that of a class that it shards.
    config.architectures = [type(model).__name__.removeprefix("FSDP")]
    if model.is_remote_code():
        custom_object_save(model, str(folder), config=config)
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def run(cfg: ExportConfig) -> None:
    """`export`: a training checkpoint as a folder for `from_pretrained`, in one process.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        ValueError: if it is defective, or was made from other weights than the configuration's; if
            the output is there already.
    """
    path = _find(cfg)
    output = Path(cfg.output) if cfg.output is not None else Path(cfg.run_dir) / "export"
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ValueError(f"output: expected a new or an empty folder, got the filled {output}")
    if defect := find_defect(path):
        raise ValueError(f"{path}: checkpoint refused: {defect}")
    manifest: Mapping[str, Any] = read_manifest(path)
    policy, tokenizer = build_policy(cfg)
    # What was frozen is not in the checkpoint, and comes from these weights.
    expected, got = manifest["identity"].get("weights"), weights_digest(policy.model)
    if got != expected:
        raise ValueError(
            f"model.name: expected the weights that {path} started from ({expected}), got {got} "
            f"({cfg.model.name})"
        )
    load_model_tensors(policy, read_state(path, {"model": model_tensors(policy)})["model"])
    dtype = None if cfg.dtype is None else getattr(torch, cfg.dtype)
    save_model(policy.model, tokenizer, output, dtype=dtype, max_shard_size=cfg.max_shard_size)
    print(f"step {manifest['step']} of {path}: {output}")


def _find(cfg: ExportConfig) -> Path:
    if cfg.source is not None:
        if not Path(cfg.source).is_dir():
            raise FileNotFoundError(f"source: expected a checkpoint's folder, got {cfg.source}")
        return Path(cfg.source)
    folder = Path(cfg.run_dir) / "checkpoints"
    found = checkpoints(folder)
    if not found:
        raise FileNotFoundError(f"run_dir: expected checkpoints in {folder}, got none")
    return found[-1]
