"""A byte-level chat tokenizer and tiny random models that understand it, made without downloads."""

import json
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from train.config import ModelConfig, PromptsConfig, RunConfig, SampleConfig

PAD, END, START = "<pad>", "<|im_end|>", "<|im_start|>"
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Deletes the traces of earlier turns and forces the open marker, as R1-Distill's does.
R1_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content.split('</think>')[-1] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
QWEN3_TEMPLATE = (
    CHAT_TEMPLATE + "{% if add_generation_prompt and enable_thinking is defined and "
    "not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
)


def make_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """Ids 0 to 2 are pad, end and start; then one id per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([PAD, END, START, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, special=True) for t in (PAD, END, START)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, pad_token=PAD)
    tokenizer.chat_template = chat_template
    return tokenizer


def tiny_config(**options) -> LlamaConfig:
    sizes = {
        "vocab_size": 259,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
    }
    return LlamaConfig(**{**sizes, **options})


def save_causal_lm(folder: Path, **options) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(**options))
    # Many end ids, so that random responses end; sampling defaults that must not be obeyed.
    model.generation_config.eos_token_id = [1, *range(40, 60)]
    model.generation_config.do_sample = True
    model.generation_config.top_k = 1
    model.generation_config.repetition_penalty = 5.0
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def save_reward_model(folder: Path, **options) -> Path:
    torch.manual_seed(1)
    config = tiny_config(**{"num_labels": 1, **options})
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def write_lines(path: Path, records) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def make_sample_cfg(model: Path, prompts: Path, run_dir: Path, **sample) -> RunConfig:
    options = {
        "num_responses": 3,
        "temperature": 0.8,
        "max_new_tokens": 12,
        "max_new_tokens_empty": 6,
        "prompts_per_batch": 2,
    }
    return RunConfig(
        run_dir=str(run_dir),
        model=ModelConfig(name=str(model), compute_dtype="float32"),
        prompts=PromptsConfig(source="jsonl", path=str(prompts)),
        sample=SampleConfig(**{**options, **sample}),
    )
