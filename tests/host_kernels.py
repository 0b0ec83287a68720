"""Where GPU kernels run in these tests, and CUDA's with the arguments of their Triton twins."""

import pytest
import torch

from bvpo_kernels import backends

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def cuda_kernels():
    """csrc/cuda on a GPU; without one, its kernels compiled for the host. Skips if neither is."""
    if backends.MISSING["triton"]:
        pytest.skip(backends.MISSING["triton"])
    if DEVICE == "cuda":
        if backends.MISSING["cuda"]:
            pytest.skip(backends.MISSING["cuda"])
        from bvpo_kernels.backends import cuda

        return cuda
    import cuda_on_host

    if cuda_on_host.COMPILER is None:
        pytest.skip("no g++ to compile csrc/cuda for the host with")
    return cuda_on_host
