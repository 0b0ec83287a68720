"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path


def _temporary(path: Path) -> Path:
    """A name in the same folder, hence on the same file system, where a rename is atomic."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file, then rename it to `path`."""
    temporary = _temporary(path)
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def replace_folder(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary folder, then rename it to `path`; an older one is removed."""
    temporary = _temporary(path)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        write(temporary)
        if path.exists():
            # A folder cannot be renamed over a filled one: the old one steps aside first.
            outgoing = path.with_name(f".{path.name}.{os.getpid()}.old")
            os.replace(path, outgoing)
            os.replace(temporary, path)
            shutil.rmtree(outgoing)
        else:
            os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sha256(path: Path) -> str:
    """Digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_synced(path: Path, text: str) -> None:
    """Write a file that is on the disk when this returns; its name is once its folder is synced."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Put the names in a folder, as they are now, on the disk."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
