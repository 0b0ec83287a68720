"""Scales, caps and cut vocabularies between an LM head and the logits: served, or refused by name,
in every dtype alike."""

import pytest
import torch
import transformers as hf
from causal_lms import IDS, LABELS, SIZES, make, own_logprobs
from torch import nn

from bvpo_kernels.integrations.logit_transform import backbone, logit_transform, probe_ids
from bvpo_kernels.integrations.transformers import patch_model

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
MOE = {
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 6,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LATENT = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 4,
    "num_key_value_heads": 4,
    "head_dim": None,
}
SERVED = {
    "divided": ("Granite", {"logits_scaling": 0.3}),
    "multiplied by what others divide by": ("HyperCLOVAX", {"logits_scaling": 0.3}),
    "multiplied": ("Cohere", {"logit_scale": 0.25}),
    "hidden states divided": ("MiniCPM3", {"dim_model_base": 8, **LATENT}),
    "capped": ("Gemma2", {"final_logit_softcapping": 2.0, "query_pre_attn_scalar": 6}),
    "capped, another name": (
        "RecurrentGemma",
        {
            "logits_soft_cap": 2.0,
            "lru_width": 24,
            "attention_window_size": 16,
            "num_hidden_layers": 3,
        },
    ),
    "cut, and hidden states divided": (
        "Inkling",
        {"unpadded_vocab_size": 91, "logits_mup_width_multiplier": 3.0, **MOE},
    ),
    "cut and capped": (
        "Inkling2",
        {"unpadded_vocab_size": 91, "final_logit_softcapping": 2.0, **MOE},
    ),
    "a backbone under another prefix": (
        "Llama4",
        {"intermediate_size_mlp": 16, "num_local_experts": 2},
    ),
    "a backbone under a third prefix": (
        "Mllama",
        {
            "cross_attention_layers": [],
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    "a decoder inside the backbone": ("OPT", {"ffn_dim": 16, "word_embed_proj_dim": 16}),
}
TEXT = ("Inkling", "Inkling2", "Llama4", "Mllama")  # whose configuration of text is another class


def model_of(name, options):
    torch.manual_seed(0)
    sizes = {key: value for key, value in (SIZES | options).items() if value is not None}
    kind = f"{name}TextConfig" if name in TEXT else f"{name}Config"
    model = getattr(hf, f"{name}ForCausalLM")(getattr(hf, kind)(**sizes)).eval()
    with torch.no_grad():  # of some the initial weights are too small for a cap to show
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
    return model


@pytest.mark.parametrize("case", SERVED)
def test_served_as_the_model_itself_scores(case):
    name, options = SERVED[case]
    model = model_of(name, options)
    ids = IDS % 90
    labels = ids.masked_fill(LABELS == -100, -100)
    logp = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
    target = labels[:, 1:]
    own = logp.gather(2, target.clamp(min=0)[..., None])[..., 0].masked_fill(target == -100, 0)
    upstream = torch.linspace(-1, 2, own.numel()).view_as(own)
    trained = list(model.parameters())
    want = torch.autograd.grad(own, trained, upstream, allow_unused=True)
    with patch_model(model):
        got = model(input_ids=ids, labels=labels, fused_lm_head=True).log_probs
        torch.testing.assert_close(got, own, rtol=1e-4, atol=1e-4)
        found = torch.autograd.grad(got, trained, upstream, allow_unused=True)
    for a, b in zip(found, want, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max() + 1))
    if name != "Inkling2":  # whose router is fp32 in any model
        patch_model(model.bfloat16())


@torch.no_grad()
def test_a_cap_under_a_third_name():
    """Of a model whose layers have no backward at these lengths."""
    options = {"num_heads": 4, "num_blocks": 2, "chunk_size": 4, "head_dim": None}
    model = model_of("xLSTM", {"output_logit_soft_cap": 2.0, "hidden_size": 32, **options})
    ids = torch.tensor([[5, 9, 12, 40, 7, 88, 3, 21]])
    logp = model(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
    patch_model(model)
    got = model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs[0]
    torch.testing.assert_close(got, logp.gather(1, ids[0, 1:, None])[:, 0], rtol=1e-4, atol=1e-4)


class Wrapped(hf.LlamaForCausalLM):
    """Does to its logits what no field of its configuration says."""

    change = staticmethod(lambda logits: logits)

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = self.change(out.logits)
        return out


CHANGES = {
    "cut": (
        lambda z: z[..., :91],
        r"has 91 logits per token, expected the vocabulary of its LM head",
    ),
    "cut by one": (lambda z: z[..., :96], "has 96 logits per token"),
    "masked": (lambda z: torch.cat([z[..., :91], z[..., 91:] * 0 - 1e4], -1), "nats"),
    "scaled": (lambda z: 1.02 * z, "nats"),
    "capped": (lambda z: 30 * torch.tanh(z / 30), "nats"),
    "shifted by token": (lambda z: z + torch.linspace(0, 0.1, 97, dtype=z.dtype), "nats"),
}


def wrapped(change, dtype, std=0.3):
    torch.manual_seed(0)
    sizes = {**SIZES, "initializer_range": std}
    model = Wrapped(hf.LlamaConfig(**sizes)).eval().to(dtype)
    model.change = change
    return model


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("change", CHANGES)
def test_an_unknown_change_of_the_logits_is_refused_in_every_dtype(change, dtype):
    """Whatever the weights: with those of .01 logits are so small that a cap changes nothing."""
    function, text = CHANGES[change]
    for std in (0.01, 0.3):
        model = wrapped(function, dtype, std)
        with pytest.raises(ValueError, match=rf"model: Wrapped .*{text}"):
            patch_model(model)
        assert type(model) is Wrapped


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_right_model_is_not_refused_for_the_rounding_of_its_logits(dtype):
    """Logits in the hundreds round by more than half a nat in half precision."""
    model = make().to(dtype)
    with torch.no_grad():
        model.lm_head.weight.mul_(50)
    assert own_logprobs(model).min() < -200
    patch_model(model)


def test_a_forward_that_rounds_its_own_logits_is_served():
    model = wrapped(lambda z: z.to(torch.bfloat16), torch.bfloat16)
    patch_model(model)


def test_the_head_between_norm_and_logits_is_what_is_tried():
    """A projection of its own before the head, whose weights have the model's dtype."""

    class Projected(hf.LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            self.dense = nn.Linear(24, 24)

        def forward(self, input_ids, **kwargs):
            hidden = self.model(input_ids=input_ids, use_cache=False).last_hidden_state
            logits = self.lm_head(self.dense(hidden))
            return hf.modeling_outputs.CausalLMOutputWithPast(logits=logits)

    for dtype in DTYPES:
        with pytest.raises(ValueError, match=r"not linear in a known way"):
            patch_model(Projected(hf.LlamaConfig(**SIZES)).eval().to(dtype))


def test_a_head_that_is_not_called_as_a_module_is_refused():
    class Functional(hf.LlamaForCausalLM):
        def forward(self, input_ids, **kwargs):
            hidden = self.model(input_ids=input_ids, use_cache=False).last_hidden_state
            logits = nn.functional.linear(hidden, self.lm_head.weight)
            return hf.modeling_outputs.CausalLMOutputWithPast(logits=logits)

    with pytest.raises(ValueError, match="as modules; LM head not seen"):
        patch_model(Functional(hf.LlamaConfig(**SIZES)).eval())


def test_a_scale_under_a_cap():
    """Muse: c tanh(s z / c) is a scale over another cap."""
    config = hf.Gemma2Config(final_logit_softcapping=2.0)
    config.output_multiplier = 0.5
    transform, z = logit_transform(config), torch.linspace(-40, 40, 97, dtype=torch.float64)
    torch.testing.assert_close(transform(z), 2 * torch.tanh(0.5 * z / 2))


def test_modes_of_modules_are_kept():
    model = make().train()
    model.model.layers[0].eval()
    patch_model(model)
    assert model.training
    assert not model.model.layers[0].training
    assert not model.model.layers[0].mlp.training
    assert model.model.layers[1].mlp.training


def test_backbone_is_the_one_model_below():
    model = model_of(*SERVED["a backbone under another prefix"])
    assert model.base_model is model
    assert backbone(model) is model.model
    assert backbone(model.model) is model.model


def test_probe_ids_are_rows_of_the_embedding():
    """The default of `unpadded_vocab_size` may be above the rows that a model has."""
    config = hf.CONFIG_MAPPING["inkling2_text"](**SIZES)
    assert config.unpadded_vocab_size > SIZES["vocab_size"]
    assert max(probe_ids(config, 200)) < SIZES["vocab_size"]
