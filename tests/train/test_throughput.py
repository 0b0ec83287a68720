"""FLOPs of a step against a count of every product, and the peak that MFU is a share of."""

import pytest
import torch
from tiny_runs import SIZES, tiny_model
from torch.utils.flop_counter import FlopCounterMode

from bvpo_kernels.types import TokenPair, Unit
from train.sizing.throughput import StepFlops, peak_flops, utilization


def test_flops_are_those_that_torch_counts():
    """One segment, all of it scored: torch counts what runs, without attention here."""
    model = tiny_model(attention="eager")
    flops = StepFlops(model)
    length = 16
    tokens = torch.arange(3, 3 + length)[None]
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens, use_cache=False).logits.sum().backward()
    width = SIZES["num_attention_heads"] * SIZES["head_dim"]
    # torch computes both triangles: QK^T and PV, two FLOPs each, and twice that in the backward.
    attention = 3 * 2 * 2 * SIZES["num_hidden_layers"] * width * length**2
    linear = (flops.per_token + flops.per_scored) * length
    # Besides, it counts the angles of the rotary embedding.
    assert counter.get_total_flops() == pytest.approx(linear + attention, rel=1e-3)
    assert flops.per_square * length**2 == attention / 2


def test_a_frozen_weight_needs_no_gradient():
    model = tiny_model()
    whole = StepFlops(model)
    model.requires_grad_(False)
    frozen = StepFlops(model)
    assert frozen.per_token * 3 == whole.per_token * 2
    assert frozen.per_square == whole.per_square


def test_prompts_need_no_head():
    flops = StepFlops(tiny_model())
    unit = Unit("u", {"trace": [TokenPair(range(5), range(3), range(7))]})
    expected = flops.per_token * 20 + flops.per_scored * 10 + flops.per_square * (8**2 + 12**2)
    assert flops([unit]) == expected
    assert flops([unit, unit]) == 2 * expected


def test_peaks():
    before = torch.get_rng_state()
    peak = peak_flops(torch.device("cpu"), torch.float32)
    assert torch.equal(torch.get_rng_state(), before)
    assert 1e8 < peak < 1e14
    assert peak_flops(torch.device("cpu"), torch.float32) == peak  # measured once
    assert peak_flops(torch.device("meta"), torch.float32) is None
    assert utilization(3e9, 2.0, 1e10, 3) == {"mfu": pytest.approx(0.05)}
    assert utilization(3e9, 2.0, None, 3) == {}


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("Unknown 1", None),
    ],
)
def test_gpus_are_known_by_name(name, tflops, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    peak_flops.cache_clear()
    found = peak_flops(torch.device("cuda"), torch.bfloat16)
    peak_flops.cache_clear()
    assert found == (None if tflops is None else pytest.approx(1e12 * tflops))
