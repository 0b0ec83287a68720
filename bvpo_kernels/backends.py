"""Which implementations exist, which are usable here, and why the others are not."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

from bvpo_kernels import compiled

# `impl="auto"` takes the first of these that can serve the call.
PREFERENCE = ("cuda", "triton", "cpp", "eager")


def _why_no_triton() -> str:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install bvpo_kernels[triton])"
    return "no Triton kernels in this version"


# Backend -> why it cannot be used here, '' when it can; from slow to fast. Found once, at import:
# tracing a graph must not look for modules.
MISSING: dict[str, str] = {
    "reference": "",
    "eager": "",
    "cpp": compiled.why_missing("cpu"),
    "triton": _why_no_triton(),
    "cuda": compiled.why_missing("cuda"),
}


def describe(name: str) -> str:
    """What a usable backend runs, in a few words."""
    return {
        "reference": "naive torch, any dtype, all logits in memory",
        "eager": "tiled torch, any device, bounded workspace",
        "cpp": f"C++ tiles on CPU tensors ({compiled.cpu_detail()})",
    }[name]


def choose(impl: str, unsupported: Callable[[str], str]) -> str:
    """The backend that will run; a named one that cannot serve the call raises.

    Args:
        impl: "auto" (the first of `PREFERENCE` that can) or the name of a backend.
        unsupported: why a backend that is installed cannot serve this call, '' when it can.

    Raises:
        ValueError: naming what was asked for and which backends can.
    """
    reasons = {name: why or unsupported(name) for name, why in MISSING.items()}
    if impl == "auto":
        return next(name for name in PREFERENCE if not reasons[name])
    if impl not in reasons:
        raise ValueError(f"impl: expected 'auto' or one of {list(reasons)}, got {impl!r}")
    if reasons[impl]:
        serving = [name for name, reason in reasons.items() if not reason]
        raise ValueError(
            f"impl: {impl!r} cannot serve this call: {reasons[impl]}; these can: {serving}"
        )
    return impl
