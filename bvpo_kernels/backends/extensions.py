"""The compiled extensions of csrc: their operators, loaded if they were built, explained if not."""

from __future__ import annotations

import importlib
import os

import torch

# Schemas of what csrc implements; the adapters are `cpp.py` and `cuda.py`.
_HEAD = (
    "Tensor hidden, Tensor weight, Tensor target, Tensor? bias, {kept}float temperature, "
    "float? softcap, int ignore_index, int workspace_bytes, "
)
_FORWARD = _HEAD.format(kept="")
_BACKWARD = "Tensor dlogprobs, " + _HEAD.format(kept="Tensor logprobs, Tensor max, Tensor logsum, ")
_SPARSE_BACKWARD = "Tensor dlogprobs, " + _HEAD.format(
    kept="Tensor logprobs, Tensor max, Tensor logsum, Tensor tail, Tensor offsets, "
    "Tensor columns, Tensor entries, "
)
_NEED = "bool need_hidden, bool need_weight, bool need_bias"
LIB = torch.library.Library("bvpo", "FRAGMENT")
for _schema in (
    "cpu_path(ScalarType dtype) -> str",
    f"cpu_linear_logprobs_forward({_FORWARD}bool need_entropy, bool need_unit_grad) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
    f"cpu_linear_logprobs_backward({_BACKWARD}{_NEED}) -> (Tensor, Tensor, Tensor)",
    f"cpu_tail_logprobs_forward({_FORWARD}float tail_tolerance, int longest, int capacity, "
    "bool need_entropy) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    f"cpu_tail_logprobs_backward({_SPARSE_BACKWARD}float tail_tolerance, {_NEED}) -> "
    "(Tensor, Tensor, Tensor)",
    f"cpu_linear_logprobs_statistics({_BACKWARD}{_NEED}, Tensor? ranges, Tensor? kinds, "
    "int num_kinds, Tensor? rows, Tensor? left) -> (Tensor dhidden, Tensor dweight, "
    "Tensor dbias, Tensor gram, Tensor kinds, Tensor rows, Tensor sketched)",
    "cpu_pair_gradients(Tensor hidden, Tensor weight, Tensor target, Tensor? bias, Tensor factor, "
    "float temperature, float? softcap, int ignore_index, int chunk_tokens, Tensor(a!)? unit, "
    "Tensor(b!)? sums, Tensor(c!)? bias_sums) -> Tensor logprobs",
    "cpu_scratch(int[] sizes) -> Tensor",
    # fp32 and bf16.
    "cpu_pair_reduce(Tensor tiles, Tensor(a!) total, Tensor? weights=None, bool add=False) -> "
    "Tensor gram",
    "cpu_norm_sums(Tensor dy, Tensor x, Tensor ranges, float eps, bool centered, "
    "bool need_weight, bool need_bias) -> (Tensor, Tensor)",
    "cuda_pair_reduce(Tensor tiles, Tensor? weights, Tensor(a!) total, bool add, "
    "Tensor(b!) partials) -> ()",
):
    LIB.define(_schema)

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


_NAMES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# What the CPU kernels' products run on here, by dtype; none when the kernels are missing.
CPU_PATHS: dict[torch.dtype, str] = (
    {} if _reasons["cpu"] else {d: torch.ops.bvpo.cpu_path(d) for d in _NAMES.values()}
)


def cpu_detail() -> str:
    """Which products the CPU kernels run on here, by dtype; '' when they are missing."""
    return ", ".join(f"{n}: {CPU_PATHS[d]}" for n, d in _NAMES.items() if d in CPU_PATHS)
