"""Options of `estimate`: a run, and what it is planned for."""

from __future__ import annotations

from dataclasses import dataclass

from train.config import RunConfig


@dataclass
class EstimationConfig(RunConfig):
    """A run and the GPUs that it is planned for. No weights are read.

    gpus: ranks of the run; one is a run without torchrun, which shards nothing. gpu_memory: GiB of
    each. tflops: what each sustains, in 1e12 FLOP/s. peak_tflops: what the MFU is a share of (989:
    H100 SXM, bf16 without sparsity). segments: sequences of equal length that fill a micro-batch; a
    unit with one pair of each kind has four.
    """

    gpus: int = 8
    gpu_memory: float = 80.0
    tflops: float = 400.0
    peak_tflops: float = 989.0
    segments: int = 4
