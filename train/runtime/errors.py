"""What goes wrong outside of the code, in one line that a person can act on."""

from __future__ import annotations

import errno
import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

# Errors of the disk and of permissions, whatever was being read or written.
FULL = (errno.ENOSPC, errno.EDQUOT)
OF_THE_DISK = (*FULL, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
_ADVICE = {
    **dict.fromkeys(FULL, "the disk is full; free some space, or choose another folder"),
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.EACCES: "no permission; choose another folder, or change its permissions",
    errno.EPERM: "not permitted; choose another folder, or change its permissions",
    errno.EIO: "the disk failed to read or write",
}
# Writers of tensors have errors of their own; these words of theirs mean a full disk.
_FULL_WORDS = re.compile(r"No space left|os error 28|Disk quota exceeded")
# torch's writer of zip archives says no more than that it failed.
_WRITER_FAILED = re.compile(r"PytorchStreamWriter failed writing|file write failed")

USER_ERRORS = (
    ValueError, TypeError, OSError, ImportError, MemoryError, FloatingPointError,
)  # fmt: skip


def is_users(error: BaseException) -> bool:
    """Is this an error of what a command was given, rather than of the code?"""
    return isinstance(error, USER_ERRORS) or _disk_words(error) is not None


def one_line(error: BaseException, cfg: Any) -> str:
    """The message of an error; of one of the disk, with the file and the option that led there."""
    words = _disk_words(error)
    if words is not None:
        return f"{_where(None, cfg)}{words} ({' '.join(str(error).split())[:200]})"
    if isinstance(error, OSError) and error.errno is not None:
        name = error.filename if error.filename2 is None else error.filename2
        advice = _ADVICE.get(error.errno)
        said = f"{error.strerror} (errno {error.errno})"
        return _where(name, cfg) + (f"{advice} ({said})" if advice else said)
    return " ".join(str(error).split()) or type(error).__name__


def _disk_words(error: BaseException) -> str | None:
    if isinstance(error, OSError) and error.errno is not None:
        return None
    if _FULL_WORDS.search(str(error)):
        return _ADVICE[errno.ENOSPC]
    if _WRITER_FAILED.search(str(error)):
        return "a file could not be written; is the disk full?"
    return None


def _where(name: str | bytes | int | None, cfg: Any) -> str:
    """'option: file: ', as far as they are known; a write that fails names no file."""
    if not isinstance(name, str):
        return f"run_dir: {cfg.run_dir}: " if hasattr(cfg, "run_dir") else ""
    option = _option_of(Path(name), cfg)
    return f"{option}: {name}: " if option else f"{name}: "


def _option_of(path: Path, cfg: Any, prefix: str = "") -> str | None:
    """The option whose value is `path` or a folder above it; the longest such value."""
    found: list[tuple[int, str]] = []
    for name, value in _strings(cfg, prefix):
        option = Path(value).absolute()
        if option in (path.absolute(), *path.absolute().parents):
            found.append((len(option.parts), name))
    return max(found, default=(0, None))[1]


def _strings(cfg: Any, prefix: str) -> list[tuple[str, str]]:
    """Options of a configuration that hold a name of a file or folder, maybe."""
    found: list[tuple[str, str]] = []
    if not is_dataclass(cfg):
        return found
    for field in fields(cfg):
        value = getattr(cfg, field.name)
        if isinstance(value, str) and value:
            found.append((prefix + field.name, value))
        else:
            found += _strings(value, f"{prefix}{field.name}.")
    return found
