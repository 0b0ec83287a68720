"""What differs between the settings of a command and those of what it found."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def differences(
    expected: Mapping[str, Any],
    found: Mapping[str, Any],
    whose: str,
    theirs: str,
    show: Callable[[Any], str] = repr,
) -> list[str]:
    """A text for each entry that differs, in order: "lr: expected 1 (whose), got 2 (theirs)"."""
    return [
        f"{name}: expected {show(expected.get(name))} ({whose}), "
        f"got {show(found.get(name))} ({theirs})"
        for name in sorted({*expected, *found})
        if expected.get(name) != found.get(name)
    ]
