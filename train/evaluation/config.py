"""What is evaluated, and how."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from train.config import ModelConfig

Benchmark = Literal[
    "alpaca_eval_2", "arena_hard_v0.1", "arena_hard_v2", "aime_2024", "aime_2025", "amc_2023",
    "minerva", "olympiad_bench", "math_500", "math", "reasoning_gym",
]  # fmt: skip


@dataclass
class EvaluateConfig:
    """Options of `evaluate`; a rerun in the same folder goes on where the last one stopped.

    run_dir: the folder of responses and results. seed: of sampling. benchmark: what is asked and
    what is written or judged. data: a JSON list, a JSONL file or a Hugging Face dataset with the
    questions; None: the dataset that the benchmark is known by. split, subset: of a dataset. tasks:
    of reasoning-gym, name -> options. limit: questions at most. modes: with a trace ("thinking"),
    with an empty one ("no_thinking"), or both. engine: "auto" is vllm where it is installed and
    sees a GPU, else transformers. samples: responses per question, k of avg@k and pass@k.
    temperature: 0 takes the likeliest token. top_p, max_new_tokens: of sampling. batch: questions
    of one call of the engine. instruction: appended to every question of a math set. generator: the
    model's name in answer files; None: the last part of `model.name`.
    """

    run_dir: str = "runs/evaluate"
    seed: int = 0
    benchmark: Benchmark = "math_500"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: str | None = None
    split: str | None = None
    subset: str | None = None
    tasks: dict[str, dict[str, Any]] = field(default_factory=lambda: {"chain_sum": {}})
    limit: int | None = None
    modes: list[Literal["thinking", "no_thinking"]] = field(
        default_factory=lambda: ["thinking", "no_thinking"]
    )
    engine: Literal["auto", "transformers", "vllm"] = "auto"
    samples: int = 1
    temperature: float = 0.6
    top_p: float = 0.95
    max_new_tokens: int = 8192
    batch: int = 8
    instruction: str = "Please reason step by step, and put your final answer within \\boxed{}."
    generator: str | None = None
