"""Seconds and FLOPs of a step, and what share of the machine's peak it did them at (MFU)."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from bvpo_kernels.integrations.logit_transform import text_decoder
from bvpo_kernels.types import Unit

# Dense bf16, in TFLOP/s, by a part of the device's name; the first that fits. From the vendors'
# data sheets, as torchtitan lists them.
PEAK_TFLOPS = {
    "H100 NVL": 835.0, "H100 PCIe": 756.0, "H100": 989.0, "H200": 989.0, "B200": 2250.0,
    "A100": 312.0, "L40S": 362.0, "MI300X": 1300.0, "MI325X": 1300.0, "MI250X": 191.5,
}  # fmt: skip
# The GEMM that stands for a CPU's peak: large enough for its rate, milliseconds long.
CPU_GEMM, CPU_GEMM_REPEATS = 1024, 3


class StepFlops:
    """FLOPs of training on units: what the mathematics needs, so nothing that is recomputed.

    A product of t tokens with an [n, k] weight takes 2 t n k, its input's gradient as much again,
    its weight's too where that is trained. The LM head is needed for scored tokens only, attention
    (QK^T and PV) for the lower triangle of each segment.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        head = model.get_output_embeddings()
        linears = [m for m in text_decoder(model).modules() if isinstance(m, nn.Linear)]
        self.per_token = sum(map(_per_row, linears))
        self.per_scored = _per_row(head)
        config = model.config.get_text_config()
        width = (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        # 2 FLOPs, two products, half of len^2; forward and twice that in the backward.
        self.per_square = 6 * config.num_hidden_layers * config.num_attention_heads * width

    def __call__(self, units: Iterable[Unit]) -> int:
        """FLOPs of forward and backward of some units."""
        pairs = [pair for unit in units for some in unit.pairs.values() for pair in some]
        segments = [
            (len(pair.prompt) + len(response), len(response))
            for pair in pairs
            for response in (pair.chosen, pair.rejected)
        ]
        return sum(
            self.per_token * length + self.per_scored * scored + self.per_square * length**2
            for length, scored in segments
        )


def _per_row(linear: nn.Module) -> int:
    weight = linear.weight
    assert isinstance(weight, torch.Tensor)
    return (6 if weight.requires_grad else 4) * weight.numel()


@functools.cache
def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s that the device can do at most: a GPU's dense bf16 peak, None for one that is not
    listed; for a CPU the rate of a short matrix product in `dtype`, measured once."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return next((1e12 * peak for part, peak in PEAK_TFLOPS.items() if part in name), None)
    if device.type != "cpu":
        return None
    # empty and zeros, not randn: no generator of the run moves.
    left, right = torch.zeros(2, CPU_GEMM, CPU_GEMM, dtype=dtype)
    best = float("inf")
    for _ in range(CPU_GEMM_REPEATS):
        start = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - start)
    return 2 * CPU_GEMM**3 / best


def utilization(flops: float, seconds: float, peak: float | None, ranks: int) -> dict[str, float]:
    """`mfu` of a step of all ranks, for its log line; nothing where the peak is not known."""
    return {} if peak is None else {"mfu": flops / (seconds * peak * ranks)}


class Stopwatch:
    """Wall-clock seconds per stage of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start

    def log(self) -> dict[str, float]:
        return {f"seconds/{stage}": seconds for stage, seconds in self.seconds.items()}
