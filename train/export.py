"""The model as a folder for `from_pretrained`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from train.adapters import base_model, merged_weights
from train.files import replace_folder
from train.parallel import ALONE, World


def save_model(model: PreTrainedModel, tokenizer: Any, path: Path, world: World = ALONE) -> None:
    """Write weights, configuration and tokenizer to the folder `path`, for `from_pretrained`.

    Adapters are merged into the weights. Every rank calls; rank 0 writes.
    """
    state = {}
    for name, full in merged_weights(model):
        if world.is_main:
            state[name] = full.cpu()

    def write(folder: Path) -> None:
        base_model(model).save_pretrained(folder, state_dict=state)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)

    if world.is_main:
        replace_folder(path, write)
    world.barrier()
