"""The library that the operators are defined in, and how they are.

The public functions validate and choose; an operator receives a choice (`impl`, which gradients
are needed) and runs it. Each allocates its outputs, is safe under fake tensors and, unless its
schema says otherwise, mutates nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

LIB = torch.library.Library("bvpo", "DEF")


def define(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define `name(...) -> ...` and return it. `run` serves every device, below autograd."""
    name = LIB.define(schema)
    LIB.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"bvpo::{name}", fake, lib=LIB)
    return getattr(torch.ops.bvpo, name)


def differentiate(name: str, backward: Callable[..., Any], setup: Callable[..., None]) -> None:
    torch.library.register_autograd(f"bvpo::{name}", backward, setup_context=setup, lib=LIB)
