"""The model as a folder for `from_pretrained`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from train.files import replace_folder
from train.parallel import ALONE, World, whole


def save_model(model: PreTrainedModel, tokenizer: Any, path: Path, world: World = ALONE) -> None:
    """Write weights, configuration and tokenizer to the folder `path`, for `from_pretrained`.

    Every rank calls; rank 0 writes.
    """
    state = {}
    for name, tensor in model.state_dict().items():
        full = whole(tensor)
        if world.is_main:
            state[name] = full.cpu()

    def write(folder: Path) -> None:
        model.save_pretrained(folder, state_dict=state)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)

    if world.is_main:
        replace_folder(path, write)
    world.barrier()
