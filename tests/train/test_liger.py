"""When Liger's layers are used, and that the statistics ask a patched norm before they trust it.

Liger's kernels need a GPU: here stand-ins are patched in as liger-kernel patches its own.
"""

import pytest
import torch
from tiny_runs import tiny_model
from transformers import GPT2Config, Qwen3Config

from bvpo_kernels.grad_stats import GradStats
from train.model import liger
from train.model.liger import apply_liger

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class LigerLikeNorm:
    """A forward bound to an instance of another class, with RMSNorm's mathematics or not."""

    def forward(self, hidden_states):
        scale = torch.rsqrt(hidden_states.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return (self.weight + self.offset) * (hidden_states * scale) * self.factor


def patch(module, factor=1.0, offset=0.0):
    module.factor, module.offset = factor, offset
    module.__dict__["forward"] = LigerLikeNorm.forward.__get__(module, type(module))


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_statistics_cover_a_patched_rms_norm(offset):
    """Gemma's weights are offsets from one; their gradient is the same."""
    model = tiny_model(Qwen3Config)
    for name, module in model.named_modules():
        if name.endswith("norm"):
            patch(module, offset=offset)
    assert GradStats(model).coverage.share == 1.0


def test_statistics_refuse_a_patch_that_is_no_rms_norm():
    model = tiny_model(Qwen3Config)
    patch(model.model.layers[1].self_attn.q_norm, factor=2.0)
    with pytest.raises(ValueError, match=r"cannot measure \['model.layers.1.self_attn.q_norm.w"):
        GradStats(model)


def test_statistics_refuse_a_closure():
    model = tiny_model(Qwen3Config)
    norm = model.model.norm
    original = norm.forward
    norm.forward = lambda x: 2 * original(x)
    with pytest.raises(ValueError, match=r"cannot measure \['model.norm.weight'\]"):
        GradStats(model)


def test_statistics_refuse_torch_norms_with_a_forward_of_their_own():
    for norm in (torch.nn.LayerNorm(4), torch.nn.RMSNorm(4)):
        norm.__dict__["forward"] = (lambda self, x: x * self.weight * 3).__get__(norm, type(norm))
        with pytest.raises(ValueError, match="cannot measure"):
            GradStats(torch.nn.Sequential(norm))


def test_statistics_refuse_ligers_norm_without_a_gpu():
    """Its Triton kernel cannot be asked on a CPU, so it is refused by name."""
    modules = pytest.importorskip("liger_kernel.transformers", reason="no liger-kernel")
    norm = modules.LigerRMSNorm(8)
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match=r"cannot measure \['0.weight'\]"):
        GradStats(torch.nn.Sequential(norm))


def test_off_without_a_gpu_and_refused_by_name_when_asked_for():
    model = tiny_model(Qwen3Config)
    assert not apply_liger(model, "auto", CPU)
    assert not apply_liger(model, "off", CPU)
    with pytest.raises(ValueError, match=r"train.liger: expected a CUDA device for 'on', got cpu"):
        apply_liger(model, "on", CPU)


def test_on_a_gpu_it_needs_the_package_and_a_known_model(monkeypatch):
    monkeypatch.setattr(liger.importlib.util, "find_spec", lambda name: None)
    assert not apply_liger(tiny_model(Qwen3Config), "auto", CUDA)
    with pytest.raises(ValueError, match=r"train.liger: expected liger-kernel to be installed"):
        apply_liger(tiny_model(Qwen3Config), "on", CUDA)


def test_layers_but_no_losses(monkeypatch):
    """The layers' forwards are patched, the model's own, where the losses would be, is not."""
    pytest.importorskip("liger_kernel", reason="no liger-kernel")
    from transformers.models.qwen3 import modeling_qwen3

    # Liger replaces these in the module of transformers: put them back.
    for name in ("apply_rotary_pos_emb", "Qwen3RMSNorm", "Qwen3MLP"):
        monkeypatch.setattr(modeling_qwen3, name, getattr(modeling_qwen3, name))
    model = tiny_model(Qwen3Config)
    rotary, forward = modeling_qwen3.apply_rotary_pos_emb, type(model).forward
    assert apply_liger(model, "on", CUDA)
    assert modeling_qwen3.apply_rotary_pos_emb is not rotary
    assert "forward" not in model.__dict__
    assert type(model).forward is forward
    layer = model.model.layers[0]
    for module in (layer.input_layernorm, layer.self_attn.q_norm, layer.mlp, model.model.norm):
        assert "liger_kernel" in module.forward.__func__.__module__
    other = tiny_model(GPT2Config, n_embd=32, n_head=4, n_layer=2, n_positions=64)
    assert not apply_liger(other, "auto", CUDA)
    with pytest.raises(ValueError, match=r"got the model type 'gpt2'"):
        apply_liger(other, "on", CUDA)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_liger_equals_transformers_and_is_covered_on_a_gpu():
    pytest.importorskip("liger_kernel", reason="no liger-kernel")
    ids_1L = torch.arange(3, 40, device="cuda")[None]
    plain, fused = tiny_model(Qwen3Config).to("cuda"), tiny_model(Qwen3Config).to("cuda")
    expected = plain(input_ids=ids_1L, use_cache=False).logits
    assert apply_liger(fused, "on", CUDA)
    found = fused(input_ids=ids_1L, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert GradStats(fused).coverage.share == 1.0
