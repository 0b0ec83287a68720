"""Scores of answers: math-verify for the math sets, reasoning-gym's verifiers for its tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

from train.evaluation.config import EvaluateConfig
from train.preferences.answers import MathVerify
from train.preferences.judges import Judge, Verifier
from train.preferences.rank import answer_of, never_closed


def build_judge(benchmark: str) -> Judge:
    """The benchmark's judge; ValueError if what it needs is not installed."""
    return Verifier() if benchmark == "reasoning_gym" else MathVerify("benchmark")


def score_responses(
    records: Sequence[Mapping[str, Any]], mode: str, judge: Judge, cfg: EvaluateConfig
) -> tuple[list[list[float]], dict[str, int]]:
    """[question][sample] -> score, and counts of what could not be judged, which scores 0.

    Counts: "responses"; "unjudged" of them; of those, "missing_close" never closed their trace,
    "unfinished" were cut at `max_new_tokens` (many are both), "empty_answer" ended with the trace.
    """
    counts = dict.fromkeys(
        ("responses", "unjudged", "missing_close", "unfinished", "empty_answer"), 0
    )
    scores = []
    for record in tqdm(records, desc=f"judge {mode}", unit="question"):
        row = []
        for response in record["modes"][mode]["responses"]:
            reason, answer = answer_of(response, mode, cfg.model.trace_close, cfg.max_new_tokens)
            counts["responses"] += 1
            counts["unjudged"] += reason is not None
            counts["missing_close"] += never_closed(response, mode, cfg.model.trace_close)
            counts["unfinished"] += not response["finished"]
            counts["empty_answer"] += reason == "empty_answer"
            row.append(0.0 if reason is not None else judge(record, answer))
        scores.append(row)
    return scores, counts
