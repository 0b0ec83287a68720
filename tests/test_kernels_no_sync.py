"""What makes a host wait for a GPU is not in the GPU path, as far as that shows without a GPU.

The source has none of the calls that read a tensor's values, and a run on CPU tensors dispatches
none of the operators behind them. On a GPU `tests/test_kernels_gpu.py` lets CUDA itself say so.
"""

import ast
import functools
from pathlib import Path

import pytest
import torch
from logprob_cases import Case
from torch.utils._python_dispatch import TorchDispatchMode

import bvpo_kernels
from bvpo_kernels import backends

PACKAGE = Path(bvpo_kernels.__file__).parent
# Schedules, launchers, and what they call in every pass. aot.py is a command-line tool.
SOURCES = [
    *sorted((PACKAGE / "gpu").glob("*.py")),
    *sorted(path for path in (PACKAGE / "kernels").glob("*.py") if path.name != "aot.py"),
]
READING = {
    "item", "tolist", "cpu", "numpy", "nonzero", "argwhere", "masked_select", "unique",
    "unique_consecutive", "bincount", "equal", "allclose", "is_nonzero", "synchronize",
}  # fmt: skip
# Operators whose result, or its size, the host must know.
WAITING = {
    "aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero", "aten::argwhere",
    "aten::masked_select", "aten::_unique", "aten::_unique2", "aten::unique_dim",
    "aten::unique_consecutive", "aten::bincount", "aten::equal", "aten::allclose",
}  # fmt: skip


def reading_calls(source: str) -> list[str]:
    """Calls in `source` that read a tensor's values: by name, and `.to("cpu")`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        name = node.func.attr
        texts = [a.value for a in node.args if isinstance(a, ast.Constant)]
        if name in READING or (name == "to" and "cpu" in texts):
            found.append(f"line {node.lineno}: {name}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_no_call_reads_values(path):
    assert reading_calls(path.read_text()) == []


def test_the_search_finds_what_it_is_for():
    source = "a.item(); b[a.nonzero()]; c.to('cpu'); c.to(torch.int64); torch.equal(a, b)"
    found = sorted(line.rpartition(" ")[2] for line in reading_calls(source))
    assert found == ["equal", "item", "nonzero", "to"]


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
        lambda x: x.sum().item(), lambda x: bool(x.any()), lambda x: x[x > 0],
        lambda x: x.nonzero(), lambda x: torch.equal(x, x),
    ],
)  # fmt: skip
def test_the_mode_raises_on_what_waits(call):
    with NoWaiting(), pytest.raises(AssertionError, match="waits for the device"):
        call(torch.ones(3))


def _head(need_unit, weight_too, workspace, max_scored=None):
    from bvpo_kernels.gpu import logprobs as schedule
    from bvpo_kernels.kernels import logprobs as rows

    case = Case(30, 16, 1100, torch.bfloat16, bias=True).inputs()
    hidden, weight, target, bias = (case[k] for k in ("hidden", "weight", "target", "bias"))
    head = (hidden, weight, target, bias if weight_too else None)
    options = (1.3, 5.0 if weight_too else None, -100, workspace)
    kernels = schedule.RowKernels(rows.forward_rows, rows.backward_rows)
    with NoWaiting():
        logp, top, logsum, _, _ = schedule.forward(
            *head, *options, True, need_unit, kernels=kernels, max_scored=max_scored
        )
        if weight_too:
            schedule.backward(
                case["upstream"], *head, logp, top, logsum, *options, True, True, True,
                kernels=kernels, max_scored=max_scored,
            )  # fmt: skip


def _sparse():
    from bvpo_kernels.gpu import logprobs as schedule
    from bvpo_kernels.gpu import tail
    from bvpo_kernels.kernels import logprobs as rows

    case = Case(12, 16, 300, scale=6.0).inputs()
    head = (case["hidden"], case["weight"], case["target"], None)
    kernels = schedule.RowKernels(rows.forward_rows, rows.backward_rows)
    with NoWaiting():
        logp, top, logsum, _, *lists = tail.forward(
            *head, 1.0, None, -100, 1 << 16, 2**-5, 8, 64, False, kernels=kernels
        )
        tail.backward(
            case["upstream"], *head, logp, top, logsum, *lists, 1.0, None, -100, 1 << 16, 2**-5,
            True, True, False, kernels=kernels,
        )  # fmt: skip


def _sums():
    from bvpo_kernels.kernels import grad_stats, packing

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
    "sums": _sums,
}


@pytest.mark.skipif(not backends.INTERPRETED, reason="on a GPU tests/test_kernels_gpu.py asks CUDA")
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_no_operator_waits(call):
    call()
