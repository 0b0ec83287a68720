"""Files of a model that are not what their names say: cut short, empty, or Git LFS pointers."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open

_POINTER = b"version https://git-lfs"
_SUFFIXES = (".safetensors", ".bin", ".gguf", ".json", ".model")


def damaged_file(name: str, file: str | None = None) -> str | None:
    """The first file of a model that cannot be read, and what is wrong with it; None: none is.

    Args:
        name: a folder, or a hub id whose files are here.
        file: look at this one alone.
    """
    folder = Path(name)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(name, local_files_only=True))
        except Exception:  # whatever the hub's client raises: there is nothing here to look at
            return None
    paths = sorted(folder.iterdir()) if file is None else [folder / file]
    for path in paths:
        if path.suffix in _SUFFIXES and path.is_file():
            wrong = _what_is_wrong(path)
            if wrong is not None:
                return f"{path.name} {wrong}"
    return None


def _what_is_wrong(path: Path) -> str | None:
    size = path.stat().st_size
    with open(path, "rb") as opened:
        if opened.read(len(_POINTER)) == _POINTER:
            return f"is a Git LFS pointer of {size} bytes, not the file (`git lfs pull` fetches it)"
    if size == 0:
        return "is empty"
    try:
        _read(path)
    except ImportError:
        return None
    except Exception as error:  # each reader has errors of its own
        reason = " ".join(str(error).split()) or type(error).__name__
        return f"is cut short or damaged, {size} bytes ({reason[:120]})"
    return None


def _read(path: Path) -> None:
    """As much of a file as shows that it is whole; no tensor is kept."""
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt"):
            pass
    elif path.suffix == ".bin":
        torch.load(path, map_location="meta", weights_only=True)
    elif path.suffix == ".gguf":
        from gguf import GGUFReader

        GGUFReader(path)
    elif path.suffix == ".json":
        json.loads(path.read_text(encoding="utf-8"))
