"""`rank`: score the answers of `sample` and keep each prompt's best and worst, per mode.

Only the answer is judged, the text after the last close marker: traces are not rewarded.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from train.config import RankConfig, RunConfig
from train.preferences.judges import Judge, build_judge
from train.preferences.modes import KIND_OF_MODE, THINKING
from train.preferences.pairs import meta_path, output_path, provenance, write_pairs
from train.preferences.prompts import parse_object
from train.preferences.responses import read_responses, responses_path

# Why a response is not scored, in the order of the checks; why a prompt gives no pair.
DROPS = ("unfinished", "too_long", "missing_close", "empty_answer")
NO_PAIR = ("fewer_than_two", "ties")
# A verifier's full mark; some give partial credit.
CORRECT = 1.0 - 1e-9


def never_closed(response: Mapping[str, Any], mode: str, trace_close: str) -> bool:
    """Whether a trace has no end; in NoThinking the prompt has closed it."""
    return mode == THINKING and trace_close not in response["text"]


def answer_of(
    response: Mapping[str, Any], mode: str, trace_close: str, max_tokens: int
) -> tuple[str | None, str]:
    """(reason to drop the response or None, its answer).

    The answer is the text after the last close marker; in NoThinking the prompt has closed the
    trace, so a response without a marker is an answer from its beginning.
    """
    answer = response["text"].rpartition(trace_close)[2].strip()
    if not response["finished"]:
        return "unfinished", answer
    if len(response["ids"]) > max_tokens:
        return "too_long", answer
    if never_closed(response, mode, trace_close):
        return "missing_close", answer
    return (None, answer) if answer else ("empty_answer", answer)


def choose_pair(
    part: Mapping[str, Any], scored: list[tuple[int, float]], min_margin: float
) -> dict[str, Any] | str:
    """The pair of best and worst of `scored` (response index, score), or why there is none.

    Among equal scores the first response counts.
    """
    if len(scored) < 2:
        return "fewer_than_two"
    best = max(scored, key=lambda item: item[1])
    worst = min(scored, key=lambda item: item[1])
    if best[1] - worst[1] < min_margin or best[1] == worst[1]:
        return "ties"
    responses = part["responses"]
    return {
        "prompt_ids": part["prompt_ids"],
        "chosen_ids": responses[best[0]]["ids"],
        "rejected_ids": responses[worst[0]]["ids"],
        "chosen_reward": best[1],
        "rejected_reward": worst[1],
    }


class Counts:
    """What happened to the responses and prompts of one mode."""

    def __init__(self) -> None:
        self.events: Counter[str] = Counter()
        self.score_sum = 0.0

    def as_dict(self, verified: bool) -> dict[str, float]:
        """All counts; mean score over the scored; accuracy over all responses, dropped included."""
        names = ("prompts", "responses", *DROPS, "scored", *NO_PAIR, "pairs")
        table: dict[str, float] = {name: self.events[name] for name in names}
        table["mean_score"] = round(self.score_sum / max(self.events["scored"], 1), 4)
        if verified:
            table["accuracy"] = round(self.events["correct"] / max(self.events["responses"], 1), 4)
        return table


def rank_part(
    record: Mapping[str, Any],
    mode: str,
    judge: Judge,
    trace_close: str,
    cfg: RankConfig,
    counts: Counts,
) -> dict[str, Any] | None:
    """The pair of one prompt in one mode, if there is one; every outcome is counted."""
    part = record["modes"][mode]
    scored = []
    counts.events["prompts"] += 1
    for index, response in enumerate(part["responses"]):
        counts.events["responses"] += 1
        reason, answer = answer_of(response, mode, trace_close, cfg.max_response_tokens)
        if reason is not None:
            counts.events[reason] += 1
            continue
        score = judge(record, answer)
        if not math.isfinite(score):
            raise ValueError(
                f"rank.judge: expected finite scores, got {score} for prompt {record['prompt_id']}"
            )
        scored.append((index, score))
        counts.events["scored"] += 1
        counts.events["correct"] += score >= CORRECT
        counts.score_sum += score
    pair = choose_pair(part, scored, cfg.min_margin)
    if isinstance(pair, str):
        counts.events[pair] += 1
        return None
    counts.events["pairs"] += 1
    return pair


def run(cfg: RunConfig) -> None:
    """`rank`: pairs of the responses in `run_dir`.

    Raises:
        ValueError: for malformed responses (file and line), or if no prompt gave a pair.
    """
    path = responses_path(cfg)
    records = list(read_responses(path))
    if not records:
        raise ValueError(f"{path}: expected at least one prompt with responses, got none")
    sampled, trace_close = _sidecar(path)
    for where, record in records:
        if set(record["modes"]) != set(KIND_OF_MODE):
            raise ValueError(
                f"{where}: modes: expected {list(KIND_OF_MODE)}, got {list(record['modes'])}"
            )
    judge = build_judge(cfg.rank)
    counts = {mode: Counts() for mode in KIND_OF_MODE}
    units = []
    for _, record in tqdm(records, unit="prompt", desc="rank"):
        pairs = {
            kind: [pair]
            for mode, kind in KIND_OF_MODE.items()
            if (pair := rank_part(record, mode, judge, trace_close, cfg.rank, counts[mode]))
        }
        if len(pairs) >= (len(KIND_OF_MODE) if cfg.rank.both_kinds else 1):
            prompt_id = record["prompt_id"]
            units.append({"unit_id": prompt_id, "prompt_id": prompt_id, "pairs": pairs})
    tables = {mode: count.as_dict(cfg.rank.judge == "verifier") for mode, count in counts.items()}
    both = sum(len(unit["pairs"]) == len(KIND_OF_MODE) for unit in units)
    print(format_table(tables))
    print(f"units {len(units)}, of them with both kinds {both}")
    if not units:
        raise ValueError(f"{path}: no prompt gave a pair: {_why_no_pair(tables)}")
    meta = {
        "settings": sampled["settings"],
        "rank": {
            "judge": cfg.rank.judge,
            "reward_model": cfg.rank.reward_model,
            "min_margin": cfg.rank.min_margin,
            "both_kinds": cfg.rank.both_kinds,
            "max_response_tokens": cfg.rank.max_response_tokens,
        },
        "counts": {**tables, "units": len(units), "units_with_both_kinds": both},
        "sample_command": sampled.get("command"),
        **provenance(),
    }
    output = output_path(cfg)
    write_pairs(output, units, meta)
    print(f"pairs: {output}")


def _sidecar(path: Path) -> tuple[dict[str, Any], str]:
    """The sidecar of the responses, and the marker that ends their traces."""
    sidecar = meta_path(path)
    if not sidecar.is_file():
        raise FileNotFoundError(f"{path}: expected its sidecar {sidecar.name} beside it, got none")
    sampled = parse_object(sidecar.read_bytes(), str(sidecar))
    settings = sampled.get("settings")
    trace_close = settings.get("model.trace_close") if isinstance(settings, dict) else None
    if not isinstance(trace_close, str) or not trace_close:
        raise ValueError(
            f"{sidecar}: settings: expected model.trace_close, a text, got {trace_close!r}"
        )
    return sampled, trace_close


# What helps against each reason.
_HELP = {
    "unfinished": "raise sample.max_new_tokens",
    "too_long": "raise rank.max_response_tokens",
    "missing_close": "are model.trace_open and model.trace_close those of the model?",
    "ties": "all answers of a prompt score the same: more or easier prompts, or more responses",
}


def _why_no_pair(tables: Mapping[str, Mapping[str, float]]) -> str:
    """The counts that are not 0, per mode, and what helps against the largest."""
    parts, totals = [], Counter[str]()
    for mode, table in tables.items():
        found = {name: int(table[name]) for name in (*DROPS, *NO_PAIR) if table[name]}
        totals.update(found)
        parts.append(f"{mode} " + (", ".join(f"{n} {name}" for name, n in found.items()) or "-"))
    largest = next((name for name, _ in totals.most_common() if name in _HELP), None)
    return "; ".join(parts) + (f" ({largest}: {_HELP[largest]})" if largest else "")


def format_table(tables: Mapping[str, Mapping[str, float]]) -> str:
    """One row per count, one column per mode."""
    modes = list(tables)
    rows = [["", *modes]]
    for name in tables[modes[0]]:
        rows.append([name, *(f"{tables[mode][name]:g}" for mode in modes)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(modes) + 1)]
    return "\n".join(
        row[0].ljust(widths[0])
        + "".join("  " + cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in rows
    )
