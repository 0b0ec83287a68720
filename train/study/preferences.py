"""Preference data sampled from the model itself, and further traces of the answers in it.

A pair is the first right and the first wrong of `samples` responses to a prompt, judged by the
answer after CLOSE alone; a unit has a pair of each mode. Given its answer, a trace is then a draw
from the sampler's posterior q(r | x, y), and so is every other trace that led to the same answer:
of `proposals` further responses, those with one of the pair's two answers are kept.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from bvpo_kernels.mixing import MARGINAL
from bvpo_kernels.types import EMPTY, IGNORE_INDEX, TRACE, TokenPair, Unit
from train.preferences.pairs import write_json
from train.study import task
from train.study.config import StudyConfig
from train.study.model import generate, pad_rows

SCORED_ROWS = 256
PORTION = 256  # prompts
LEAST_TRACES = 4  # of each answer of a unit, besides the pair's own


@dataclass(frozen=True)
class Preferences:
    """One seed's data.

    units: trained on; a trace pair, an empty pair, and under MARGINAL further pairs of traces with
    the same two answers. probe: the same, held out. extra: trace pairs of other prompts. counts:
    what became of the prompts.
    """

    units: list[Unit]
    probe: list[Unit]
    extra: list[Unit]
    counts: Mapping[str, float]


def choose(
    digits: np.ndarray, responses: Sequence[list[int]], thinking: bool
) -> tuple[list[int], list[int]] | None:
    """First right and first wrong answered response, if there are both."""
    right = [r for r in responses if task.is_correct(digits, r, thinking)]
    wrong = [
        r
        for r in responses
        if task.answer(r, thinking) is not None and not task.is_correct(digits, r, thinking)
    ]
    return (right[0], wrong[0]) if right and wrong else None


def _further(
    pair: tuple[list[int], list[int]], proposals: Sequence[list[int]], most: int
) -> list[tuple[list[int], list[int]]]:
    """Pairs of further traces with the two answers of `pair`, at most `most`."""
    answers = [task.answer(response, True) for response in pair]
    sides = [[r for r in proposals if task.answer(r, True) == wanted] for wanted in answers]
    return list(zip(*sides, strict=False))[:most]


def unit_record(
    name: str, digits: np.ndarray, pairs: Mapping[str, Sequence[tuple[list[int], list[int]]]]
) -> dict[str, Any]:
    prompts = {kind: task.prompt_ids(digits, kind != EMPTY) for kind in pairs}
    return {
        "unit_id": name,
        "pairs": {
            kind: [[prompts[kind], *pair] for pair in members] for kind, members in pairs.items()
        },
    }


class Sampler:
    """Draws prompts' responses in portions until there are enough units; counts what became of
    them. The draws of a portion depend on the seed and its place only."""

    def __init__(self, model: PreTrainedModel, cfg: StudyConfig, seed: int) -> None:
        self.model, self.cfg, self.seed = model, cfg, seed
        self.wanted = cfg.units + cfg.probe_units
        self.units: list[dict[str, Any]] = []
        self.extra: list[dict[str, Any]] = []
        self.counts: Counter[str] = Counter()

    def _draw(self, digits_N5: np.ndarray, thinking: bool, count: int, stream: int) -> list:
        seed = self.seed * 10**6 + stream
        return generate(self.model, digits_N5, thinking, count, self.cfg.temperature, seed)

    def portion(self, start: int, digits_N5: np.ndarray) -> None:
        """Take in the prompts from number `start` on."""
        chosen = {}
        for thinking in (True, False):
            drawn = self._draw(digits_N5, thinking, self.cfg.samples, start)
            rows = list(zip(digits_N5, drawn, strict=True))
            chosen[thinking] = [choose(*row, thinking) for row in rows]
            name = "trace_pair" if thinking else "empty_pair"
            self.counts[name] += sum(pair is not None for pair in chosen[thinking])
        self.counts["prompts"] += len(digits_N5)
        both = [i for i in range(len(digits_N5)) if chosen[True][i] and chosen[False][i]]
        proposals = {}
        if both and len(self.units) < self.wanted:
            drawn = self._draw(digits_N5[both], True, self.cfg.proposals, start + 1)
            proposals = dict(zip(both, drawn, strict=True))
        self.counts["both"] += len(proposals)
        for index, digits in enumerate(digits_N5):
            pair = chosen[True][index]
            if pair is not None:
                more = _further(pair, proposals.get(index, ()), self.cfg.pool_traces)
                self._keep(f"p{start + index}", digits, pair, chosen[False][index], more)

    def _keep(self, name: str, digits: np.ndarray, pair: Any, empty: Any, more: list) -> None:
        """A unit, where there is an empty pair and enough traces; else a trace pair."""
        if len(more) >= LEAST_TRACES and len(self.units) < self.wanted:
            pairs = {TRACE: [pair], EMPTY: [empty], MARGINAL: more}
            self.units.append(unit_record(name, digits, pairs))
        else:
            self.extra.append(unit_record(name, digits, {TRACE: [pair]}))


def sample(
    model: PreTrainedModel, prompts_N5: np.ndarray, cfg: StudyConfig, seed: int
) -> dict[str, Any]:
    """Units as plain lists, and counts, from as many of the prompts as are needed."""
    sampler = Sampler(model, cfg, seed)
    with tqdm(total=sampler.wanted, desc=f"seed {seed}: pairs", unit="unit", mininterval=2) as bar:
        for start in range(0, len(prompts_N5), PORTION):
            if len(sampler.units) >= sampler.wanted and len(sampler.extra) >= cfg.units:
                break
            sampler.portion(start, prompts_N5[start : start + PORTION])
            bar.update(len(sampler.units) - bar.n)
    if len(sampler.units) < sampler.wanted or len(sampler.extra) < cfg.units:
        raise ValueError(
            f"units: expected {sampler.wanted} and {cfg.units} further trace pairs from "
            f"{len(prompts_N5)} prompts, got {len(sampler.units)} and {len(sampler.extra)} "
            f"({dict(sampler.counts)})"
        )
    return {"units": sampler.units, "extra": sampler.extra[: cfg.units], "counts": sampler.counts}


def _unit(record: Mapping[str, Any]) -> Unit:
    pairs = {
        kind: tuple(TokenPair(*map(tuple, pair)) for pair in members)
        for kind, members in record["pairs"].items()
    }
    return Unit(record["unit_id"], pairs)


def load_or_sample(
    model: PreTrainedModel, prompts_N5: np.ndarray, cfg: StudyConfig, seed: int, path: Path
) -> Preferences:
    """The data of `path`, sampled and stored there if it is not yet."""
    if not path.is_file():
        write_json(path, sample(model, prompts_N5, cfg, seed))
    content = json.loads(path.read_text(encoding="utf-8"))
    units = [_unit(record) for record in content["units"]]
    extra = [_unit(record) for record in content["extra"]]
    counts = content["counts"]
    return Preferences(units[: cfg.units], units[cfg.units :], extra, counts)


def score_rows(
    model: PreTrainedModel,
    rows: Sequence[tuple[Sequence[int], Sequence[int]]],
    temperature: float = 1.0,
) -> Tensor:
    """log pi(response | prompt) at a temperature, [N], from the model's own padded logits."""
    tokens, target = pad_rows([row[0] for row in rows], [row[1] for row in rows])
    logits = model(input_ids=tokens, use_cache=False).logits / temperature
    logp = logits.log_softmax(-1).gather(2, target.clamp_min(0)[..., None])[..., 0]
    return (logp * (target != IGNORE_INDEX)).sum(1)


@torch.no_grad()
def score_all(
    model: PreTrainedModel,
    rows: Sequence[tuple[Sequence[int], Sequence[int]]],
    temperature: float = 1.0,
) -> Tensor:
    """`score_rows` without gradients, rows of similar length together."""
    order = sorted(range(len(rows)), key=lambda index: len(rows[index][1]))
    scores = torch.empty(len(rows))
    for start in range(0, len(rows), SCORED_ROWS):
        part = order[start : start + SCORED_ROWS]
        scores[part] = score_rows(model, [rows[index] for index in part], temperature)
    return scores
