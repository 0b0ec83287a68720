"""The small reasoning model: a Qwen3 transformer, its supervised training, and its samples."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from bvpo_kernels.types import IGNORE_INDEX
from train.study import task
from train.study.config import StudyConfig

GENERATION_ROWS = 1024  # sequences of one call of generate


def build(cfg: StudyConfig) -> Qwen3ForCausalLM:
    """Random weights, fp32, from torch's generator."""
    config = Qwen3Config(
        vocab_size=task.VOCAB, hidden_size=cfg.hidden, intermediate_size=cfg.intermediate,
        num_hidden_layers=cfg.layers, num_attention_heads=cfg.heads,
        num_key_value_heads=cfg.kv_heads, head_dim=32, max_position_embeddings=128,
        tie_word_embeddings=True, attention_dropout=0.0, pad_token_id=task.PAD,
        eos_token_id=task.EOS, bos_token_id=task.BOS,
    )  # fmt: skip
    return Qwen3ForCausalLM(config)


def pad_rows(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> list[Tensor]:
    """tokens and targets, [N, L] each, padded on the right: causal attention needs no mask."""
    width = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    tokens = torch.full((len(prompts), width), task.PAD)
    target = torch.full((len(prompts), width), IGNORE_INDEX)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        start, end = len(prompt), len(prompt) + len(response)
        tokens[row, :end] = torch.tensor([*prompt, *response])
        target[row, start - 1 : end - 1] = tokens[row, start:end]
    return [tokens, target]


def _sft_groups(
    digits_N5: np.ndarray, direct: int, teacher: task.Teacher, rng: np.random.Generator
) -> list[list[Tensor]]:
    """A step's examples, by length: direct answers, traces of one line, traces of two."""
    thinking = task.teach(digits_N5[direct:], True, teacher, rng)
    groups: dict[tuple[bool, int], tuple[list, list]] = {}
    for mode, digits, responses in (
        (False, digits_N5[:direct], task.teach(digits_N5[:direct], False, teacher, rng)),
        (True, digits_N5[direct:], thinking),
    ):
        for row, response in zip(digits, responses, strict=True):
            prompts, members = groups.setdefault((mode, len(response)), ([], []))
            prompts.append(task.prompt_ids(row, mode))
            members.append(response)
    return [pad_rows(*group) for group in groups.values()]


def train_sft(
    model: PreTrainedModel, digits_N5: np.ndarray, cfg: StudyConfig, seed: int
) -> dict[str, float]:
    """Supervised training on the teacher's responses in both modes; returns loss and seconds.

    The loss is the mean over all scored tokens of a step, so short direct answers weigh little and
    NoThinking stays the weaker mode, as it is in the models that the study stands for.
    """
    rng, teacher, start = np.random.default_rng(seed), task.Teacher(), time.perf_counter()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=cfg.sft_lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    warmup, value = max(1, cfg.sft_steps // 20), math.nan
    bar = tqdm(range(cfg.sft_steps), desc=f"seed {seed}: sft", unit="step", mininterval=2)
    model.train()
    for step in bar:
        decay = (1 + math.cos(math.pi * step / cfg.sft_steps)) / 2
        for group in optimizer.param_groups:
            group["lr"] = cfg.sft_lr * min(1.0, (step + 1) / warmup) * max(decay, 0.05)
        chosen = rng.integers(0, len(digits_N5), cfg.sft_batch + cfg.sft_direct)
        groups = _sft_groups(digits_N5[chosen], cfg.sft_direct, teacher, rng)
        scored = sum(int((target != IGNORE_INDEX).sum()) for _, target in groups)
        value = 0.0
        for tokens, target in groups:
            logits = model(input_ids=tokens, use_cache=False).logits
            loss = nn.functional.cross_entropy(
                logits.flatten(0, 1), target.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
            )
            (loss / scored).backward()
            value += loss.item() / scored
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        bar.set_postfix(loss=f"{value:.3f}", refresh=False)
    model.eval()
    return {"loss": value, "seconds": time.perf_counter() - start}


@torch.inference_mode()
def generate(
    model: Any, digits_N5: np.ndarray, thinking: bool, count: int,
    temperature: float, seed: int,
) -> list[list[list[int]]]:  # fmt: skip
    """[prompt][response] -> ids up to EOS, drawn with the KV cache; prompts need no padding.

    Unfinished responses end where the longest that the teacher writes would.
    """
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=temperature, top_k=0, top_p=1.0, num_return_sequences=count,
        max_new_tokens=task.LONGEST if thinking else 4, eos_token_id=task.EOS,
        pad_token_id=task.PAD,
    )  # fmt: skip
    prompts = torch.tensor([task.prompt_ids(row, thinking) for row in digits_N5])
    responses: list[list[int]] = []
    size = max(1, GENERATION_ROWS // count)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for start in range(0, len(prompts), size):
            part = prompts[start : start + size]
            output = model.generate(input_ids=part, attention_mask=torch.ones_like(part))
            for ids in output[:, part.shape[1] :].tolist():
                end = ids.index(task.EOS) + 1 if task.EOS in ids else len(ids)
                responses.append(ids[:end])
    return [responses[start : start + count] for start in range(0, len(responses), count)]
