"""The compiled extensions of csrc: loaded if they were built, explained if they were not."""

from __future__ import annotations

import importlib
import os

import torch

_MODULES = {"cpu": "bvpo_kernels._cpu", "cuda": "bvpo_kernels._cuda"}
_SWITCHES = {"cpu": "BVPO_USE_CPP", "cuda": "BVPO_USE_CUDA"}


def _load(name: str) -> str:
    """Import the extension, which registers its kernels; return why that failed, or ''."""
    if os.environ.get(_SWITCHES[name]) == "0":
        return f"switched off by {_SWITCHES[name]}=0"
    try:
        importlib.import_module(_MODULES[name])
    except ModuleNotFoundError:
        return f"not built (csrc/{name}); reinstall with a compiler"
    except ImportError as error:
        return f"built, but does not load: {error}"
    return ""


_reasons = {name: _load(name) for name in _MODULES}


def why_missing(name: str) -> str:
    """Why extension `name` ("cpu" or "cuda") cannot be used; '' when it can."""
    return _reasons[name]


def cpu_detail() -> str:
    """Which products the CPU kernels run on here, by dtype; '' when they are missing."""
    if why_missing("cpu"):
        return ""
    names = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    return ", ".join(f"{name}: {torch.ops.bvpo.cpu_path(dtype)}" for name, dtype in names.items())
