"""Scores of answers: math-verify for the math sets, reasoning-gym's verifiers for its tasks."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

from train.evaluation.config import EvaluateConfig
from train.judges import Judge, Verifier
from train.rank import answer_of

_EXPONENT = re.compile(r"(\d)[eE]([+-]?\d+)")


class MathVerify:
    """1 where the answer is mathematically the gold one, else 0: math-verify's parse and verify.

    The gold answer is LaTeX or plain text; of an answer the last \\boxed{} counts, else the last
    expression that parses.
    """

    def __init__(self) -> None:
        try:
            import math_verify
        except ImportError as error:
            raise ValueError(
                "benchmark: a math set expects the package math-verify (pip install "
                "'math-verify[antlr4_13_2]', or the extra 'eval'), got none"
            ) from error
        self.library = math_verify

    def __call__(self, record: Mapping[str, Any], answer: str) -> float:
        gold = str(record["task"]["entry"]["answer"]).strip().strip("$")
        # 2.88e16, as in Minerva, would parse as 2.88 times Euler's number times 16.
        gold = _EXPONENT.sub(r"\1 \\times 10^{\2}", gold)
        # Without dollars or a box only plain numbers and words parse.
        expected = self.library.parse(f"${gold}$") or self.library.parse(gold)
        return float(self.library.verify(expected, self.library.parse(answer)))


def build_judge(benchmark: str) -> Judge:
    return Verifier() if benchmark == "reasoning_gym" else MathVerify()


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
