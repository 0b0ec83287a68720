"""csrc/cuda's kernels compiled for the host (tests/cuda_host), with their launchers' arguments."""

import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from bvpo_kernels.backends.triton.grad_stats import TILE, check_pair_reduce, gram_of_partials

ROOT = Path(__file__).parents[1]
COMPILER = shutil.which("g++")
GRID = 3  # fewer blocks than tiles: the grid is persistent


@functools.cache
def _library():
    folder = tempfile.mkdtemp()
    here = ROOT / "tests" / "cuda_host"
    library = f"{folder}/kernels.so"
    subprocess.run(
        [
            COMPILER,
            "-O2",
            "-std=c++20",
            "-pthread",
            "-shared",
            "-fPIC",
            "-Wno-unknown-pragmas",
            f"-I{here}",
            f"-I{ROOT / 'csrc' / 'cuda'}",
            "-o",
            library,
            str(here / "kernels.cpp"),
        ],
        check=True,
    )
    loaded = ctypes.CDLL(library)
    shutil.rmtree(folder)
    return loaded


def _convert(value):
    if value is None:
        return ctypes.c_void_p(None)
    if isinstance(value, torch.Tensor):
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_float(value) if isinstance(value, float) else ctypes.c_long(value)


def _call(name, *values):
    getattr(_library(), name)(*map(_convert, values))


def _half(tensor):
    assert tensor.dtype in (torch.float32, torch.bfloat16)
    return int(tensor.dtype == torch.bfloat16)


def pair_reduce(tiles_KRD, total_RD, weights_K=None, add=False):
    check_pair_reduce(tiles_KRD, total_RD, weights_K)
    partials = torch.empty(-(-total_RD.numel() // TILE), 3)
    trace, empty = tiles_KRD
    vector = all(t.data_ptr() % 16 == 0 for t in (trace, empty, total_RD))
    _call(
        "pair_reduce",
        trace,
        empty,
        weights_K,
        int(add),
        total_RD,
        _half(total_RD),
        partials,
        total_RD.numel(),
        int(vector),
        GRID,
    )
    return gram_of_partials(partials, 2)
