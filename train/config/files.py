"""Where in the files of `--config` an option is set, for errors."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml
from jsonargparse import ArgumentParser

_KEY = re.compile(r"(?:[Kk]ey \"|option ')([\w.]+)|^([\w.]+): expected")


class Parser(ArgumentParser):
    """Adds file and line to an error about an option that a file sets."""

    config_files: Sequence[str] = ()

    def error(self, message: str, ex: Exception | None = None) -> None:  # type: ignore[override]
        super().error(message + location(message, self.config_files), ex)


def named_files(arguments: Sequence[str]) -> list[str]:
    """The values of `--config` on a command line."""
    following = [*arguments, ""][1:]
    return [
        value if name == "--config" else name.partition("=")[2]
        for name, value in zip(arguments, following, strict=True)
        if name == "--config" or name.startswith("--config=")
    ]


def location(message: str, files: Sequence[str]) -> str:
    """' (FILE:LINE)' of the option that an error names; '' where no file sets it."""
    found = _KEY.search(message)
    if found is None:
        return f" ({', '.join(files)})" if files and "onfig:" in message else ""
    key = (found[1] or found[2]).split(".")
    for file in reversed(files):  # the last one counts
        try:
            node = yaml.compose(Path(file).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            continue
        lines = list(_lines(node, key))
        if len(lines) == len(key):
            return f" ({file}:{lines[-1]})"
    return ""


def _lines(node: yaml.Node | None, key: Sequence[str]) -> Iterator[int]:
    """Line of each part of a dotted key, as far as the file has them."""
    for part in key:
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        found = next(((name, value) for name, value in pairs if name.value == part), None)
        if found is None:
            return
        yield found[0].start_mark.line + 1
        node = found[1]
