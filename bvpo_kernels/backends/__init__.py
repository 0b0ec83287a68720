"""Which implementations exist, which are usable here, and why the others are not."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence

import torch

from bvpo_kernels.backends import extensions

# `impl="auto"` takes the first of these that can serve the call.
PREFERENCE = ("triton", "cpp", "eager")
# Triton's interpreter runs the kernels on CPU tensors, for tests: never chosen by "auto".
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _why_no_triton() -> str:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install bvpo_kernels[triton])"
    if not (torch.cuda.is_available() or INTERPRETED):
        return "no CUDA device (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)"
    return ""


# Backend -> why it cannot be used here, '' when it can; from slow to fast. Found once, at import:
# tracing a graph must not look for modules.
MISSING: dict[str, str] = {
    "reference": "",
    "eager": "",
    "cpp": extensions.why_missing("cpu"),
    "triton": _why_no_triton(),
    "cuda": extensions.why_missing("cuda") or _why_no_triton(),
}


def describe(name: str) -> str:
    """What a usable backend runs, in a few words."""
    return {
        "reference": "naive torch, any dtype, all logits in memory",
        "eager": "tiled torch, any device, bounded workspace",
        "cpp": f"C++ tiles on CPU tensors ({extensions.cpu_detail()})",
        "triton": "interpreted on CPU tensors" if INTERPRETED else "row kernels between GEMMs",
        "cuda": "pair_reduce alone, for two tiles",
    }[name]


def choose(
    impl: str, unsupported: Callable[[str], str], preference: Sequence[str] = PREFERENCE
) -> str:
    """The backend that will run; a named one that cannot serve the call raises.

    Args:
        impl: "auto" (the first of `preference` that can) or the name of a backend.
        unsupported: why a backend that is installed cannot serve this call, '' when it can.
        preference: from fast to slow.

    Raises:
        ValueError: naming what was asked for and which backends can.
    """
    reasons = {name: why or unsupported(name) for name, why in MISSING.items()}
    if impl == "auto":
        usable = (name for name in preference if not reasons[name])
        return next(name for name in usable if not (name == "triton" and INTERPRETED))
    if impl not in reasons:
        raise ValueError(f"impl: expected 'auto' or one of {list(reasons)}, got {impl!r}")
    if reasons[impl]:
        serving = [name for name, reason in reasons.items() if not reason]
        raise ValueError(
            f"impl: {impl!r} cannot serve this call: {reasons[impl]}; these can: {serving}"
        )
    return impl
