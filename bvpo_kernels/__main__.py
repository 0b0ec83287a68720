"""`python -m bvpo_kernels`: versions, devices, and which backends are usable here."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

from bvpo_kernels import backends


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def report() -> str:
    """The report as text."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    lines = [
        f"bvpo_kernels  {_version('bvpo_kernels')}",
        f"python        {platform.python_version()} on {platform.platform()}",
        f"torch         {torch.__version__} (CUDA {torch.version.cuda or 'none'})",
        *(f"{name:<13} {_version(name)}" for name in ("triton", "transformers", "trl", "peft")),
        f"CPU           {torch.backends.cpu.get_cpu_capability()}, "
        f"{torch.get_num_threads()} threads",
        f"GPU           {', '.join(gpus) or 'none'}",
        "backends      (impl=...)",
    ]
    for name, reason in backends.MISSING.items():
        state = "not usable" if reason else "usable"
        lines.append(f"  {name:<10}  {state:<10}  {reason or backends.describe(name)}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
