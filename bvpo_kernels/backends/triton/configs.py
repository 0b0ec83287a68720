"""Launch shapes per architecture: a table, because an autotuner would run at the first call.

The interpreter (TRITON_INTERPRET=1) runs one program after the other in Python, so its shapes take
many rows at once; they stay small enough that the tests' shapes span several tiles.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class RowConfig(NamedTuple):
    """A row kernel: `rows` rows per program, read `block` columns at a time, of which the forward
    has `stages` in shared memory."""

    rows: int
    block: int
    num_warps: int
    stages: int = 3

    def lanes(self, itemsize: int) -> int:
        """Columns that all threads hold side by side: as many each as are 16 bytes of the smallest
        elements read or written. The compiler lays a block out so; others would be shuffled."""
        return min(self.block, 16 // itemsize * 32 * self.num_warps)


class GemmConfig(NamedTuple):
    """A matrix kernel: tile of tokens x vocabulary, `block_d` of the hidden size per step.

    `group_m` token tiles run through the vocabulary together, so that their hidden rows and one
    weight tile at a time stay in L2 (4096 rows of D = 4096 in bf16 are 32 MiB; an H100 has 50).
    `tma`: load through tensor descriptors.
    """

    block_m: int
    block_n: int
    block_d: int
    group_m: int
    num_warps: int
    num_stages: int
    tma: bool


class Config(NamedTuple):
    """`gemm_small` serves what leaves no registers beside a large tile: softcap or bias, and
    rows that tensor descriptors cannot follow.

    rows_twice: for the pass that reads a row again, to write p: few rows at a time, which L2 holds.
    fused_scores: the fused forward has been measured to be faster for scores only than cuBLAS and
    the row kernel (rows "triton" and "triton, unfused" of `python -m benchmarks.gpu`). Where this
    is False it serves calls whose workspace holds no tile.
    """

    rows: RowConfig
    rows_twice: RowConfig
    gemm: GemmConfig
    gemm_small: GemmConfig
    gemm_fp32: GemmConfig
    fused_scores: bool = False


# [8192, 24 576] logits on an H200: 3.3 TB/s forward, 4.0 backward, of 4.3 that a copy reaches. With
# p, blocks of 8192 on 16 warps reach 2.8 TB/s where 2048 on 4 reach 2.4.
_ROWS = RowConfig(rows=1, block=2048, num_warps=4)
_TWICE = RowConfig(rows=1, block=8192, num_warps=16)
# fp32 products run on the FMA units: tensor cores would round the inputs to TF32.
_SMALL = GemmConfig(128, 128, 32, 32, num_warps=8, num_stages=4, tma=False)
_FP32 = GemmConfig(64, 64, 16, 16, num_warps=4, num_stages=3, tma=False)
_SM90 = GemmConfig(128, 256, 64, 16, num_warps=8, num_stages=3, tma=True)
_INTERPRETED = GemmConfig(16, 128, 16, 2, num_warps=1, num_stages=1, tma=False)

CONFIGS: dict[str, Config] = {
    # 48 KiB of shared memory: also for the consumer chips of this generation and of sm_120.
    "sm_80": Config(_ROWS, _ROWS, _SMALL, _SMALL, _FP32),
    # T = 8192, D = 4096, V = 151 936 on an H200: 15.3 ms, as long as cuBLAS alone. 4 stages 15.5,
    # groups of 32 15.8, tiles of 256 x 128 16.1, of 128 x 128 17.4, without descriptors 19.0.
    "sm_90": Config(_ROWS, _TWICE, _SM90, _SMALL, _FP32, fused_scores=True),
    # 128 x 256 spills in the epilogue here.
    "sm_100": Config(_ROWS, _ROWS, GemmConfig(256, 128, 64, 16, 8, 4, tma=True), _SMALL, _FP32),
    "interpreter": Config(
        RowConfig(rows=64, block=256, num_warps=1),
        RowConfig(rows=64, block=256, num_warps=1),
        _INTERPRETED,
        _INTERPRETED,
        _INTERPRETED,
    ),
}


def config(device: torch.device) -> Config:
    """The launch shapes for `device`; a CPU device means the interpreter."""
    if device.type == "cpu":
        return CONFIGS["interpreter"]
    major, _ = torch.cuda.get_device_capability(device)
    return CONFIGS[{9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(major, "sm_80")]
