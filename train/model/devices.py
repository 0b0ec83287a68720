"""What this machine computes fast."""

from __future__ import annotations

from dataclasses import replace

import torch

from train.config import ModelConfig


def multiplies_bf16() -> bool:
    """Whether this CPU has instructions for bf16 products."""
    return torch.cpu._is_avx512_bf16_supported()


def with_compute_dtype(cfg: ModelConfig) -> ModelConfig:
    """The same with "auto" replaced by what this machine computes fast.

    A CPU without bf16 instructions emulates them: torch's GEMM was 4 to 5 times slower in bf16 than
    in fp32 on two cores with AVX2 alone (8 against 45 GFLOP/s, [1024, 576] x [576, 1536]).
    """
    if cfg.compute_dtype != "auto":
        return cfg
    fast = torch.cuda.is_available() or multiplies_bf16()
    return replace(cfg, compute_dtype="bfloat16" if fast else "float32")
