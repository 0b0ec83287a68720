"""What generates: transformers, or vLLM where it is installed, behind the same calls."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch

from train.config import RunConfig
from train.evaluation.config import EvaluateConfig
from train.model.models import load_tokenizer, resolve
from train.preferences.sample import Engine, load_sampler


class VLLMSampler:
    """vLLM's offline engine. A seed gives every prompt a generator of its own."""

    def __init__(self, cfg: RunConfig) -> None:
        import vllm

        path, gguf_file = resolve(cfg.model)
        if gguf_file is not None:
            raise ValueError(f"engine: vllm expects a folder or hub id, got a GGUF file: {path}")
        self.vllm, self.cfg = vllm, cfg.sample
        self.tokenizer = load_tokenizer(cfg.model)
        self.llm = vllm.LLM(
            model=path,
            dtype=cfg.model.compute_dtype,
            seed=cfg.seed % 2**31,
            trust_remote_code=cfg.model.trust_remote_code,
        )
        defaults = self.llm.get_default_sampling_params()
        own = getattr(defaults, "stop_token_ids", None) or []
        self.ends: Sequence[int] = sorted({self.tokenizer.eos_token_id, *own} - {None})

    def draw(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, seed: int
    ) -> list[list[list[int]]]:
        """As `train.preferences.sample.Sampler.draw`."""
        nucleus = {"top_p": self.cfg.top_p} if self.cfg.temperature > 0 else {}
        params = self.vllm.SamplingParams(
            n=self.cfg.num_responses, temperature=self.cfg.temperature, top_k=0,
            max_tokens=max_new_tokens, stop_token_ids=list(self.ends), seed=seed % 2**31,
            detokenize=False, **nucleus,
        )  # fmt: skip
        requests = [self.vllm.TokensPrompt(prompt_token_ids=list(ids)) for ids in prompts]
        outputs = self.llm.generate(requests, params, use_tqdm=False)
        return [[self._whole(response) for response in output.outputs] for output in outputs]

    def _whole(self, response: Any) -> list[int]:
        """Its ids; a stop id that vLLM kept to itself is put back."""
        ids = list(response.token_ids)
        if response.finish_reason == "stop" and (not ids or ids[-1] not in self.ends):
            stop = response.stop_reason
            ids.append(stop if isinstance(stop, int) else self.tokenizer.eos_token_id)
        return ids


def choose(engine: str) -> str:
    """The engine of `EvaluateConfig.engine`.

    Raises:
        ValueError: for vllm where it is not installed.
    """
    installed = importlib.util.find_spec("vllm") is not None
    if engine == "vllm" and not installed:
        raise ValueError("engine: expected an installed vllm, got none (pip install vllm)")
    if engine == "auto":
        return "vllm" if installed and torch.cuda.is_available() else "transformers"
    return engine


def loader(cfg: EvaluateConfig) -> Any:
    """What `train.preferences.sample.fill` loads the engine with."""

    def load(run: RunConfig) -> Engine:
        return VLLMSampler(run) if choose(cfg.engine) == "vllm" else load_sampler(run)

    return load
