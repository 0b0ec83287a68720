"""No probability of dropout survives, wherever a model keeps it; nothing else changes."""

import functools
from types import SimpleNamespace

import pytest
import torch
import transformers as hf
from torch import nn

from bvpo_kernels.integrations.dropout import disable_dropout, dropout_fields

SIZES = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}
GPT = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
CONFIGS = {
    "starcoder2": (
        hf.Starcoder2Config,
        {"residual_dropout": 0.3, "embedding_dropout": 0.3, "attention_dropout": 0.3},
    ),
    "gpt_bigcode": (
        hf.GPTBigCodeConfig,
        {**GPT, "attn_pdrop": 0.3, "resid_pdrop": 0.3, "embd_pdrop": 0.3},
    ),
    "gpt2": (hf.GPT2Config, {**GPT, "attn_pdrop": 0.3, "resid_pdrop": 0.3, "embd_pdrop": 0.3}),
    "llama": (hf.LlamaConfig, {"attention_dropout": 0.3}),
    "bloom": (hf.BloomConfig, {"n_head": 2, "hidden_dropout": 0.3, "attention_dropout": 0.3}),
    "opt": (
        hf.OPTConfig,
        {
            "ffn_dim": 24,
            "word_embed_proj_dim": 16,
            "max_position_embeddings": 16,
            "dropout": 0.3,
            "attention_dropout": 0.3,
            "layerdrop": 0.3,
        },
    ),
    "mixtral": (hf.MixtralConfig, {"num_local_experts": 2, "router_jitter_noise": 0.9}),
}


def tiny(name, attention):
    config_class, options = CONFIGS[name]
    config = config_class(**{**SIZES, **options}, use_cache=False)
    torch.manual_seed(0)
    attention = "eager" if name == "bloom" else attention  # it has no other
    model = hf.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return model.train()


def logits(model, seed):
    torch.manual_seed(seed)
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 15)[None]).logits


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", CONFIGS)
def test_training_mode_scores_as_evaluation_does(name, attention):
    model = tiny(name, attention)
    want = logits(model.eval(), 0)
    model.train()
    assert not torch.equal(logits(model, 0), want)
    disable_dropout(model)
    assert torch.equal(logits(model, 0), want)
    assert torch.equal(logits(model, 1), want)


def test_the_configuration_that_is_saved_stays():
    model = tiny("gpt2", "sdpa")
    before = model.config.to_dict()
    disable_dropout(model)
    assert model.config.to_dict() == before
    assert dropout_fields(model.config) == {
        "attn_pdrop": 0.3,
        "embd_pdrop": 0.3,
        "resid_pdrop": 0.3,
        "summary_first_dropout": 0.1,
    }


class ReadsConfig(nn.Module):
    """As ProphetNet and models with code of their own do: the field is read at each forward."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(dropout=0.5, other_dropout=0.5, dropout_layers=True)
        self.depth = self.config.other_dropout

    def forward(self, x):
        return nn.functional.dropout(x, self.config.dropout, self.training)


def _decorated(function):
    @functools.wraps(function)
    def wrapper(*args):
        return function(*args)

    return wrapper


class Decorated(ReadsConfig):
    forward = _decorated(ReadsConfig.forward)


@pytest.mark.parametrize("kind", [ReadsConfig, Decorated])
def test_a_field_read_by_a_forward_is_zeroed_and_no_other(kind):
    module = kind()
    disable_dropout(nn.Sequential(module))
    assert vars(module.config) == {"dropout": 0.0, "other_dropout": 0.5, "dropout_layers": True}
    assert torch.equal(module(torch.ones(99)), torch.ones(99))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Dropout(0.5),
        nn.Dropout1d(0.5),
        nn.Dropout2d(0.5),
        nn.Dropout3d(0.5),
        nn.AlphaDropout(0.5),
        nn.FeatureAlphaDropout(0.5),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_layers_of_torch(layer):
    x = torch.ones(4, 8, 3, 3, 3) if "3d" in type(layer).__name__ else torch.ones(4, 8, 3, 3)
    x = x[..., 0] if "1d" in type(layer).__name__ else x
    disable_dropout(nn.Sequential(layer))
    assert torch.equal(layer.train()(x), x)


def test_numbers_that_are_no_probability_stay():
    module = nn.Module()
    kept = {
        "token_dropout": True,
        "dropout_impl": "fused",
        "backdrop": 0.5,
        "eps": 1e-5,
        "p": 0.5,
        "router_jitter_noise": 0.01,
        "drop": None,
    }
    zeroed = {
        "attn_drop": 0.1,
        "drop_path_rate": 0.2,
        "drop_prob": 1,
        "moe_jitter_eps": 0.1,
        "layer_drop": 0.5,
        "attention_probs_dropout_prob": 0.1,
    }
    for name, value in {**kept, **zeroed}.items():
        setattr(module, name, value)
    disable_dropout(module)
    assert {name: getattr(module, name) for name in kept} == kept
    assert {name: getattr(module, name) for name in zeroed} == dict.fromkeys(zeroed, 0.0)
