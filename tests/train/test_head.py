"""The fused head on packed rows against each segment alone through the model's own logits."""

import itertools

import pytest
import torch
from tiny_runs import SIZES, VOCAB, make_units, naive_score, tiny_model
from transformers import (
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GPTBigCodeConfig,
    GraniteConfig,
    HyperCLOVAXConfig,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    PhiConfig,
    PhimoeConfig,
    Qwen3Config,
    Starcoder2Config,
)

from bvpo_kernels.head import linear_logprobs
from bvpo_kernels.packing import pack, segment_sum
from bvpo_kernels.types import IGNORE_INDEX, KINDS, TokenPair, Unit
from train.model import head
from train.model.head import FusedHeadLM, logit_transform


def naive_scores(model, units):
    pairs = [pair for unit in units for kind in KINDS for pair in unit.pairs[kind]]
    return torch.stack(
        [naive_score(model, p.prompt, ids) for p in pairs for ids in (p.chosen, p.rejected)]
    )


def fused_scores(policy, units):
    batch = pack(units)
    return segment_sum(policy(batch), batch.cu_seqlens)


MODELS = {
    "llama-tied": (LlamaConfig, {"tie_word_embeddings": True}),
    "llama-untied": (LlamaConfig, {"tie_word_embeddings": False}),
    "qwen3-tied": (Qwen3Config, {"tie_word_embeddings": True}),
    "qwen3-untied": (Qwen3Config, {"tie_word_embeddings": False}),
    "gemma2-softcap": (
        Gemma2Config,
        {"final_logit_softcapping": 3.0, "sliding_window": 64, "attention": "eager"},
    ),
    "granite-divided": (GraniteConfig, {"logits_scaling": 4.0}),
    "cohere-multiplied": (CohereConfig, {"logit_scale": 0.25}),
    "hyperclovax-multiplied": (HyperCLOVAXConfig, {"logits_scaling": 0.3}),
    "llama4-prefix": (Llama4TextConfig, {"intermediate_size_mlp": 48, "num_local_experts": 2}),
    "phi-bias": (PhiConfig, {}),
    "llama-eager": (LlamaConfig, {"attention": "eager"}),
}


@pytest.mark.parametrize("name", MODELS)
def test_packed_scores_equal_segments_alone(name):
    config_class, options = MODELS[name]
    model = tiny_model(config_class, **options)
    if name == "phi-bias":
        torch.nn.init.normal_(model.lm_head.bias)
    policy, units = FusedHeadLM(model), make_units(3)
    policy.self_check()
    torch.testing.assert_close(
        fused_scores(policy, units), naive_scores(model, units), rtol=1e-5, atol=1e-5
    )


class CutLlama(LlamaForCausalLM):
    """Rows of the head beyond `unpadded_vocab_size` are padding, as in Inkling."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits[..., : self.config.unpadded_vocab_size]
        return out


def test_rows_beyond_the_vocabulary_have_no_part_in_the_scores():
    torch.manual_seed(1)
    config = LlamaConfig(**{**SIZES, "vocab_size": VOCAB + 6}, unpadded_vocab_size=VOCAB)
    model, units = CutLlama(config), make_units(3)
    policy = FusedHeadLM(model)
    policy.self_check()
    want_S, got_S = naive_scores(model, units), fused_scores(policy, units)
    torch.testing.assert_close(got_S, want_S, rtol=1e-5, atol=1e-5)
    weight = model.lm_head.weight
    (want,) = torch.autograd.grad(want_S.sum(), weight)
    (got,) = torch.autograd.grad(got_S.sum(), weight)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))
    assert not got[VOCAB:].any()


@pytest.mark.parametrize("name", ["llama-tied", "llama-untied", "gemma2-softcap"])
def test_gradients_equal_segments_alone(name):
    config_class, options = MODELS[name]
    model = tiny_model(config_class, **options)
    units = make_units(3)
    weights = torch.randn(4 * len(units))
    (fused_scores(FusedHeadLM(model), units) @ weights).backward()
    fused = {name: param.grad.clone() for name, param in model.named_parameters()}
    model.zero_grad()
    (naive_scores(model, units) @ weights).backward()
    for key, param in model.named_parameters():
        scale = param.grad.abs().max().item()
        torch.testing.assert_close(fused[key], param.grad, rtol=1e-4, atol=1e-5 * scale, msg=key)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_no_segment_sees_another(attention):
    """Changing every token of one segment leaves the bits of all other scores as they were."""
    policy, units = FusedHeadLM(tiny_model(attention=attention)), make_units(3)
    (changed,) = units[1].pairs["trace"]
    other = TokenPair(
        tuple((t + 5) % VOCAB for t in changed.prompt),
        tuple((t + 5) % VOCAB for t in changed.chosen),
        tuple((t + 5) % VOCAB for t in changed.rejected),
    )
    replaced = Unit(units[1].unit_id, {**units[1].pairs, "trace": (other,)})
    with torch.no_grad():
        before_S = fused_scores(policy, units)
        after_S = fused_scores(policy, [units[0], replaced, units[2]])
    same_S = before_S == after_S
    assert same_S.tolist() == [True] * 4 + [False] * 2 + [True] * 6


def test_fp64_scores():
    """transformers' RMSNorm and rotary tables are fp32, hence the tolerance."""
    model, units = tiny_model(dtype=torch.float64), make_units(2)
    scores_S = fused_scores(FusedHeadLM(model), units)
    assert scores_S.dtype == torch.float64
    torch.testing.assert_close(scores_S, naive_scores(model, units), rtol=1e-6, atol=1e-6)


def test_autocast_reaches_decoder_and_head():
    """bf16 compute on fp32 parameters: near the fp32 scores, not equal, gradients in fp32."""
    model, units = tiny_model(initializer_range=0.05), make_units(2)
    exact_S = fused_scores(FusedHeadLM(model), units)
    policy = FusedHeadLM(model, compute_dtype=torch.bfloat16)
    dtypes = {}
    model.model.layers[0].mlp.register_forward_hook(lambda m, i, out: dtypes.update(mlp=out.dtype))
    scores_S = fused_scores(policy, units)
    assert dtypes == {"mlp": torch.bfloat16}
    assert scores_S.dtype == torch.float32
    assert not torch.equal(scores_S, exact_S)
    torch.testing.assert_close(scores_S, exact_S, rtol=1e-2, atol=0.05)
    scores_S.sum().backward()
    assert {param.grad.dtype for param in model.parameters()} == {torch.float32}


def test_dropout_is_disabled():
    model = tiny_model(GPT2Config, n_embd=32, n_head=4, n_layer=2, n_positions=64)
    policy, units = FusedHeadLM(model).train(), make_units(2)
    assert torch.equal(fused_scores(policy, units), fused_scores(policy, units))


@pytest.mark.parametrize(
    ("config_class", "options"),
    [
        (Starcoder2Config, {"residual_dropout": 0.3, "embedding_dropout": 0.3}),
        (GPTBigCodeConfig, {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64}),
    ],
)
def test_functional_dropout_is_disabled(config_class, options):
    """A step's scores are those of the mode in which the reference is scored."""
    model = tiny_model(config_class, **options).eval()
    policy, units = FusedHeadLM(model), make_units(2)
    policy.self_check()
    assert not model.training
    expected_S = fused_scores(policy, units)
    assert torch.equal(fused_scores(policy.train(), units), expected_S)


def test_self_check_refuses_what_is_random_in_training_only():
    model = tiny_model().eval()
    policy = FusedHeadLM(model)

    def noise(module, inputs, output):
        return torch.nn.functional.dropout(output, 1e-3, training=module.training)

    model.model.layers[1].mlp.register_forward_hook(noise)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM in training .* random .* dropout"):
        policy.self_check()
    assert not model.training


def test_self_check_refuses_randomness_of_another_generator():
    """Layers that are left out at random, drawn by Python's generator."""
    policy, draws = FusedHeadLM(tiny_model()), itertools.count()

    def skip(module, inputs, output):
        return output if next(draws) % 2 else torch.zeros_like(output)

    policy.model.model.layers[1].mlp.register_forward_hook(skip)
    with pytest.raises(ValueError, match="draws random numbers"):
        policy.self_check()


def test_self_check_serves_a_draw_without_effect():
    policy = FusedHeadLM(tiny_model())
    policy.model.model.norm.register_forward_hook(lambda *_: torch.rand([]) and None)
    policy.self_check()


def test_self_check_names_sampled_experts():
    """PhiMoE draws which experts are used, in training mode."""
    model = tiny_model(PhimoeConfig, num_local_experts=4, attention="eager")
    with pytest.raises(ValueError, match="PhimoeForCausalLM in training mode"):
        FusedHeadLM(model).self_check()


def test_self_check_refuses_an_unknown_head_scale():
    model = tiny_model()
    policy = FusedHeadLM(model)
    model.lm_head.register_forward_hook(lambda module, inputs, logits: 1.5 * logits)
    with pytest.raises(ValueError, match="LlamaForCausalLM scores a packed row differently"):
        policy.self_check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_self_check_refuses_in_half_precision_what_it_refuses_in_full(dtype):
    """A scale of 1.05: a twentieth of a nat, of logits of which bf16 rounds as much away."""
    policy = FusedHeadLM(tiny_model(dtype=dtype))
    policy.self_check()
    policy.model.lm_head.register_forward_hook(lambda module, inputs, logits: 1.05 * logits)
    with pytest.raises(ValueError, match="LlamaForCausalLM scores"):
        policy.self_check()


def test_self_check_allows_for_the_rounding_of_large_logits():
    model = tiny_model(dtype=torch.bfloat16)
    with torch.no_grad():
        model.lm_head.weight.mul_(50)
    FusedHeadLM(model).self_check()


def test_self_check_refuses_a_state_space_model():
    """Its state runs on from one segment into the next."""
    model = tiny_model(MambaConfig, attention="eager", state_size=4, expand=2)
    with pytest.raises(ValueError, match="MambaForCausalLM"):
        FusedHeadLM(model).self_check()


def test_scale_with_softcap_is_refused():
    config = Gemma2Config(final_logit_softcapping=30.0, logit_scale=0.5)
    with pytest.raises(ValueError, match=r"got both \(0\.5, 30\.0\) in Gemma2Config"):
        logit_transform(config)


def test_every_option_reaches_the_head(monkeypatch):
    """Also those that change no number on a CPU: the rows that are scored, the workspace."""
    seen = []

    def spied(**options):
        seen.append(options)
        return linear_logprobs(**options)

    policy = FusedHeadLM(tiny_model(), impl="eager", workspace_bytes=2**20, tail_tolerance=2**-9)
    monkeypatch.setattr(head, "linear_logprobs", spied)
    batch = pack(make_units(3))
    policy(batch)
    (options,) = seen
    expected = {"impl": "eager", "workspace_bytes": 2**20, "tail_tolerance": 2**-9}
    assert expected.items() <= options.items()
    assert options["max_scored"] == int((batch.target_T != IGNORE_INDEX).sum())
