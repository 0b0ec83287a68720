"""Which attention a model gets by itself, and that it serves the model: the self-check passes."""

import re

import pytest
import torch
import transformers as hf
from tiny_chat import make_tokenizer
from tiny_runs import tiny_model

from train.config import AdapterConfig, ModelConfig
from train.model.adapters import add_adapters
from train.model.attention import AUTO, FLASH, SDPA, SEGMENTS, VARLEN
from train.model.attention_choice import Asked
from train.model.head import FusedHeadLM, _choose_attention
from train.model.models import load_model
from train.runtime.parallel import ALONE

EAGER = "eager"
MODELS = {
    "llama": (hf.LlamaConfig, {}, SEGMENTS, ""),
    "window": (hf.MistralConfig, {"sliding_window": 5}, SEGMENTS, ""),
    "mixed windows": (hf.Gemma3TextConfig, {"sliding_window": 5}, SEGMENTS, ""),
    "softcap": (hf.Gemma2Config, {"attn_logit_softcapping": 1.0}, EAGER, "a softcap"),
    "sinks": (hf.GraniteSWAConfig, {"sliding_window": 8}, EAGER, "attention sinks"),
    "no segments": (hf.NemotronConfig, {}, SDPA, "layers that pass no segments on"),
    "no segments, too": (hf.StableLmConfig, {}, SDPA, "layers that pass no segments on"),
    "chunks": (
        hf.Llama4TextConfig,
        {"intermediate_size_mlp": 48, "num_local_experts": 2, "attention_chunk_size": 8},
        SDPA,
        r"a window or chunk \(8 tokens\) that only the mask has",
    ),
    "own mask": (hf.DogeConfig, {}, SDPA, "a mask of its own"),
}


def policy_of(name):
    """With the attention that transformers takes by itself, as a model is loaded."""
    config_class, options, expected, reason = MODELS[name]
    default = EAGER if expected == EAGER else SDPA
    return FusedHeadLM(tiny_model(config_class, attention=default, **options)), expected, reason


@pytest.mark.parametrize("name", MODELS)
def test_auto_takes_what_serves_the_model(name, capsys):
    policy, expected, reason = policy_of(name)
    _choose_attention(policy, ModelConfig(attention=AUTO), False, ALONE)
    assert policy.model.config._attn_implementation == expected
    why = rf" \(sdpa_segments does not serve {reason}\)" if reason else ""
    printed = capsys.readouterr().out
    assert re.fullmatch(rf"attention: {expected}{why}; liger: off\n", printed), printed
    policy.self_check()


def test_layers_that_index_their_mask_keep_it():
    """DeepSeek V3.2's indexer reads the mask, and there is none."""
    policy = FusedHeadLM(tiny_model())

    def index(module, args, kwargs):
        assert kwargs["attention_mask"][0] is not None

    layer = policy.model.model.layers[1].self_attn
    layer.register_forward_pre_hook(index, with_kwargs=True)
    reason = policy.choose_attention((SEGMENTS, SDPA))
    assert "layers that fail with it (TypeError: 'NoneType' object is not subscriptable)" in reason
    assert policy.model.config._attn_implementation == SDPA


def test_a_model_without_attention_keeps_what_it_has():
    model = tiny_model(hf.MambaConfig, attention=EAGER, state_size=4, expand=2)
    reason = FusedHeadLM(model).choose_attention((SEGMENTS,))
    assert reason == "sdpa_segments does not serve layers that call no attention of transformers"
    assert model.config._attn_implementation == EAGER


@pytest.mark.parametrize("name", ["softcap", "no segments", "chunks"])
def test_a_name_that_does_not_serve_the_model_is_refused(name):
    policy, expected, reason = policy_of(name)
    message = rf"^model\.attention: sdpa_segments does not serve {reason} of \w+ForCausalLM; 'auto'"
    with pytest.raises(ValueError, match=rf"{message} takes '{expected}'$"):
        _choose_attention(policy, ModelConfig(attention=SEGMENTS), False, ALONE)


def test_adapters_are_no_obstacle():
    model = add_adapters(tiny_model(), AdapterConfig(rank=2), 0)
    policy = FusedHeadLM(model)
    assert policy.choose_attention((SEGMENTS,)) == ""
    assert model.config._attn_implementation == SEGMENTS
    policy.self_check()


def test_what_each_kernel_lacks():
    asked = Asked(
        calls=2, features=dict.fromkeys(["a softcap", "values of another size than keys"])
    )
    assert asked.obstacles(SEGMENTS) == ["a softcap"]
    assert asked.obstacles(FLASH) == ["values of another size than keys"]
    assert asked.obstacles(VARLEN) == ["a softcap", "values of another size than keys"]
    assert Asked(calls=2, windows={4, 8}, local={8, 4}).obstacles(SEGMENTS) == []
    (word,) = Asked(calls=2, windows={4}, local={4, 9}).obstacles(VARLEN)
    assert word == "a window or chunk (9 tokens) that only the mask has"


@pytest.mark.parametrize("packed", [True, False])
def test_a_model_without_sdpa_is_loaded(tmp_path, packed):
    tiny_model(hf.Gemma2Config, attention=EAGER).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    model, _ = load_model(ModelConfig(name=str(tmp_path)), packed=packed)
    assert model.config._attn_implementation == EAGER
    with pytest.raises(ValueError, match=r"^model\.attention: .*'sdpa'.*Gemma2ForCausalLM"):
        load_model(ModelConfig(name=str(tmp_path), attention=SDPA), packed=packed)


def test_the_probe_leaves_no_trace():
    """Scores before and after, and the generator."""
    policy = FusedHeadLM(tiny_model())
    ids_BL, state = torch.arange(3, 25)[None], torch.get_rng_state()
    before = policy.model(input_ids=ids_BL).logits
    policy.choose_attention((SEGMENTS,))
    policy.model.set_attn_implementation(SDPA)
    assert torch.equal(policy.model(input_ids=ids_BL).logits, before)
    assert torch.equal(torch.get_rng_state(), state)
