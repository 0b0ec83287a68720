"""Which implementations exist, which are usable here, and why the others are not."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch

from bvpo_kernels import compiled

# `impl="auto"` takes the first of these that can serve the call.
PREFERENCE = ("cuda", "triton", "cpp", "eager")


@dataclass(frozen=True)
class BackendStatus:
    """`reason` is empty when the backend is usable; `detail` says what it will run."""

    name: str
    reason: str = ""
    detail: str = ""

    @property
    def usable(self) -> bool:
        return not self.reason


def _cpp() -> BackendStatus:
    return BackendStatus("cpp", reason=compiled.why_missing("cpu"), detail=compiled.cpu_detail())


def _triton() -> BackendStatus:
    if importlib.util.find_spec("triton") is None:
        return BackendStatus("triton", "triton is not installed (pip install bvpo_kernels[triton])")
    return BackendStatus("triton", "no Triton kernels in this version")


def _cuda() -> BackendStatus:
    return BackendStatus("cuda", compiled.why_missing("cuda"))


def statuses() -> list[BackendStatus]:
    """Every known backend, usable or not, in order of preference from slow to fast."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return [
        BackendStatus("reference", detail="naive torch, any dtype, all logits in memory"),
        BackendStatus("eager", detail=f"tiled torch, any device ({device}), bounded workspace"),
        _cpp(),
        _triton(),
        _cuda(),
    ]


# Found once, at import: tracing a graph must not look for modules.
MISSING: dict[str, str] = {status.name: status.reason for status in statuses()}


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
