"""The task: add five digits, with a trace that writes the running sums in any order, or without.

Prompt: BOS d1 .. d5 ASK. Thinking: THINK is the prompt's last token; the response is the running
sum over the digits in some order, `3 + 8 = 11 + 1 = 12 ...`, at times CHECK and the same in another
order, then CLOSE, the total and EOS. NoThinking: the prompt ends in THINK CLOSE, the empty trace,
and the response is the total and EOS.

The teacher's traces are stochastic on purpose: all orders are equally likely, some traces check
themselves (so lengths vary twofold), and a written sum is off by one now and then. The answer is
what the last line of the trace says, right or wrong. Suffixes: N examples, L tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

PAD, EOS, BOS, THINK, CLOSE, PLUS, EQUALS, CHECK, ASK = range(9)
NUMBER = 9  # the token of the number n is NUMBER + n
DIGITS = 5
LARGEST = 60  # 5 * 9, and what slips can add to it
VOCAB = NUMBER + LARGEST + 1
LINE = 4 * DIGITS - 3  # tokens of a line of the trace
LONGEST = 2 * LINE + 4  # of a response: two lines, CHECK, CLOSE, total, EOS

Digits = Sequence[int] | np.ndarray


@dataclass(frozen=True)
class Teacher:
    """slip: probability that a written sum is off by one; check: that a trace has two lines."""

    slip: float = 0.06
    check: float = 0.35


def split_prompts(seed: int, sizes: Sequence[int]) -> list[np.ndarray]:
    """Disjoint random sets of prompts, [N, 5] digits each, from the 10^5 that there are."""
    every = 10**DIGITS
    if sum(sizes) > every:
        raise ValueError(f"sizes: expected at most {every} prompts in all, got {sum(sizes)}")
    numbers = np.random.default_rng(seed).permutation(every)[: sum(sizes)]
    digits = numbers[:, None] // 10 ** np.arange(DIGITS) % 10
    return np.split(digits, np.cumsum(sizes)[:-1])


def prompt_ids(digits: Digits, thinking: bool) -> list[int]:
    """Up to where the response begins."""
    start = [BOS, *(NUMBER + int(d) for d in digits), ASK, THINK]
    return start if thinking else [*start, CLOSE]


def answer(response: Sequence[int], thinking: bool) -> int | None:
    """The total after the last CLOSE, if the response is finished and is a single number."""
    ids = list(response)
    if not ids or ids[-1] != EOS:
        return None
    if CLOSE in ids:
        ids = ids[len(ids) - ids[::-1].index(CLOSE) :]
    elif thinking:
        return None
    return ids[0] - NUMBER if len(ids) == 2 and ids[0] >= NUMBER else None


def is_correct(digits: Digits, response: Sequence[int], thinking: bool) -> bool:
    return answer(response, thinking) == int(np.sum(digits))


def _lines(digits_N5: np.ndarray, slip: float, rng: np.random.Generator) -> np.ndarray:
    """One line of running sums per prompt, [N, LINE]."""
    count = len(digits_N5)
    ordered = np.take_along_axis(digits_N5, rng.random(digits_N5.shape).argsort(1), 1)
    line = np.empty((count, LINE), dtype=np.int64)
    line[:, 0] = total = ordered[:, 0]
    for step in range(1, DIGITS):
        off = np.where(rng.random(count) < slip, rng.choice([-1, 1], count), 0)
        total = np.maximum(total + ordered[:, step] + off, 0)
        at = 4 * step - 3
        line[:, at : at + 4 : 2] = PLUS - NUMBER, EQUALS - NUMBER
        line[:, at + 1], line[:, at + 3] = ordered[:, step], total
    return line + NUMBER


def teach(
    digits_N5: np.ndarray, thinking: bool, teacher: Teacher, rng: np.random.Generator
) -> list[list[int]]:
    """The teacher's responses; without a trace the total is always right."""
    if not thinking:
        return [[NUMBER + int(total), EOS] for total in digits_N5.sum(1)]
    first, second = (_lines(digits_N5, teacher.slip, rng).tolist() for _ in range(2))
    twice = (rng.random(len(digits_N5)) < teacher.check).tolist()
    responses = []
    for one, two, both in zip(first, second, twice, strict=True):
        trace = [*one, CHECK, *two] if both else one
        responses.append([*trace, CLOSE, trace[-1], EOS])
    return responses
