"""The model as a folder for `from_pretrained`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from train.files import replace_folder


def save_model(model: PreTrainedModel, tokenizer: Any, path: Path) -> None:
    """Write weights, configuration and tokenizer to the folder `path`, for `from_pretrained`."""

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)

    replace_folder(path, write)
