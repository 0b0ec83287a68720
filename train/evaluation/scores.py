"""Scores of answers: math-verify for the math sets, reasoning-gym's verifiers for its tasks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

from train.answers import MathVerify
from train.evaluation.config import EvaluateConfig
from train.judges import Judge, Verifier
from train.rank import answer_of


def build_judge(benchmark: str) -> Judge:
    """The benchmark's judge; ValueError if what it needs is not installed."""
    return Verifier() if benchmark == "reasoning_gym" else MathVerify("benchmark")


def score_responses(
    records: Sequence[Mapping[str, Any]], mode: str, judge: Judge, cfg: EvaluateConfig
) -> tuple[list[list[float]], Counter[str]]:
    """[question][sample] -> score, and counts of what could not be judged, which scores 0."""
    counts: Counter[str] = Counter()
    scores = []
    for record in tqdm(records, desc=f"judge {mode}", unit="question"):
        row = []
        for response in record["modes"][mode]["responses"]:
            reason, answer = answer_of(response, mode, cfg.model.trace_close, cfg.max_new_tokens)
            counts["responses"] += 1
            if reason is not None:
                counts[reason] += 1
            row.append(0.0 if reason is not None else judge(record, answer))
        scores.append(row)
    return scores, counts
