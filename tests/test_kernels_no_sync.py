"""What makes a host wait for a GPU is not in the GPU path, as far as that shows without a GPU.

A run on CPU tensors dispatches none of the operators that read a tensor's values. On a GPU
`tests/test_kernels_gpu.py` lets CUDA itself say so.
"""

import functools
from unittest.mock import patch

import pytest
import torch
from logprob_cases import Case
from pair_loss_cases import Case as PairCase
from pair_loss_cases import call as pair_call
from torch.utils._python_dispatch import TorchDispatchMode

from bvpo_kernels import backends, checks, ops
from bvpo_kernels.call import Call, Inputs, Kept, Need, Pairs, cut
from bvpo_kernels.ops import pair_loss
from bvpo_kernels.ops.head import SERVING

# Operators whose result, or its size, the host must know.
WAITING = {
    "aten::_local_scalar_dense",
    "aten::is_nonzero",
    "aten::nonzero",
    "aten::argwhere",
    "aten::masked_select",
    "aten::_unique",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
    "aten::bincount",
    "aten::equal",
    "aten::allclose",
}


class NoWaiting(TorchDispatchMode):
    """Raises where an operator would make the host wait for a device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        del types
        name, _, overload = function.name().partition(".")
        masks = []
        if name in ("aten::index", "aten::index_put_", "aten::index_put"):
            masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
        sizeless = name == "aten::repeat_interleave" and not (kwargs or {}).get("output_size")
        if name in WAITING or masks or sizeless:
            raise AssertionError(f"{name}.{overload} waits for the device")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "call",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: torch.equal(x, x),
    ],
)
def test_the_mode_raises_on_what_waits(call):
    with NoWaiting(), pytest.raises(AssertionError, match="waits for the device"):
        call(torch.ones(3))


def _run(case, call, unit, need):
    """Below the operators, inside of which a mode sees nothing."""
    serving = SERVING["triton"]
    inputs = Inputs(*(case.get(name) for name in ("hidden", "weight", "target", "bias")))
    with NoWaiting():
        *kept, _, _ = serving.forward(inputs, call, unit)
        if any(need):
            serving.backward(case["upstream"], inputs, Kept(*kept), call, Need(*need))


def _head(unit, weight_too, workspace, max_scored=None):
    case = Case(30, 16, 1100, torch.bfloat16, bias=weight_too).inputs()
    softcap = 5.0 if weight_too else None
    call = Call(1.3, softcap, -100, workspace, max_scored, need_entropy=True, impl="triton")
    _run(case, call, unit, (weight_too,) * 3)


def _sparse():
    case = Case(12, 16, 300, scale=6.0).inputs()
    call = Call(workspace_bytes=1 << 16, tail_tolerance=2**-5, impl="triton")
    _run(case, call, False, (True, True, False))


def _one_pass():
    """Forward with statistics' tiles and the backward's scaling; checks are assertions there."""
    case = PairCase(torch.bfloat16, bias=True, rank=2)
    asked = []
    run = ops.linear_pair_loss
    with patch.object(ops, "linear_pair_loss", lambda *args: asked.append(args) or run(*args)):
        inputs = {name: t.requires_grad_() for name, t in case.inputs().items()}
        pair_call(case, inputs, case.ref_scores(), one_pass=True, impl="triton")
    given, _, pairs, need = cut(asked[0], Inputs, Call, Pairs, Need)
    with patch.object(checks, "require"), torch.no_grad(), NoWaiting():
        _, _, *formed = pair_loss.run_pairs(*asked[0])
        gradients = pair_loss.gradients(
            torch.ones(()), pairs.cu_seqlens, tuple(formed), pair_loss.shapes_of(given), need
        )
    assert sum(gradient is not None for gradient in gradients) == 5


def _sums():
    from bvpo_kernels.backends.triton import grad_stats, packing

    bounds = torch.tensor([0, 3, 3, 9], dtype=torch.int32)
    with NoWaiting():
        packing.segment_sum(torch.randn(9), bounds)
        packing.segment_spread(torch.randn(3), bounds, 9, torch.float32)
        for count in (2, 3):
            grad_stats.pair_reduce(torch.randn(count, 4, 5), torch.zeros(4, 5))


CALLS = {
    "fused scores": functools.partial(_head, False, False, 1 << 14),
    "scores": functools.partial(_head, False, False, 1 << 24),
    "frozen": functools.partial(_head, True, False, 1 << 16),
    "trained": functools.partial(_head, False, True, 1 << 16),
    "trained, bounded": functools.partial(_head, False, True, 1 << 24, 28),
    "sparse": _sparse,
    "one pass": _one_pass,
    "sums": _sums,
}


@pytest.mark.skipif(not backends.INTERPRETED, reason="on a GPU tests/test_kernels_gpu.py asks CUDA")
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_no_operator_waits(call):
    call()
