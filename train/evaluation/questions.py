"""The questions of a benchmark as prompts, from a local file or a Hugging Face dataset."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from train.config import PromptsConfig
from train.evaluation.config import EvaluateConfig
from train.preferences.prompts import (
    Prompt,
    check_encodable,
    from_records,
    load_prompts,
    read_dataset,
    read_jsonl,
)


class Source(NamedTuple):
    """Where a benchmark's questions are by default, and the columns that hold them."""

    path: str | None
    split: str
    question: tuple[str, ...]
    answer: tuple[str, ...] = ()
    name: tuple[str, ...] = ()
    subset: str | None = None


# The first of the columns that a record has is taken: copies of these sets name them differently.
_QUESTION = ("problem", "question", "Problem", "prompt")
_ANSWER = ("answer", "final_answer", "Answer")
SOURCES: dict[str, Source] = {
    "alpaca_eval_2": Source(None, "eval", ("instruction",)),
    "arena_hard_v0.1": Source(None, "train", ("turns", "prompt"), (), ("question_id", "uid")),
    "arena_hard_v2": Source(None, "train", ("prompt", "turns"), (), ("uid", "question_id")),
    "aime_2024": Source("HuggingFaceH4/aime_2024", "train", _QUESTION, _ANSWER, ("id", "ID")),
    "aime_2025": Source("math-ai/aime25", "test", _QUESTION, _ANSWER, ("id",)),
    "amc_2023": Source("math-ai/amc23", "test", _QUESTION, _ANSWER, ("id",)),
    "minerva": Source("math-ai/minervamath", "test", _QUESTION, _ANSWER),
    "olympiad_bench": Source(
        "Hothan/OlympiadBench",
        "train",
        _QUESTION,
        ("final_answer", "answer"),
        ("id",),
        "OE_TO_maths_en_COMP",
    ),
    "math_500": Source("HuggingFaceH4/MATH-500", "test", _QUESTION, _ANSWER, ("unique_id",)),
    "math": Source(None, "test", _QUESTION, _ANSWER, ("id",)),
}
ANSWER_FILES = ("alpaca_eval_2", "arena_hard_v0.1", "arena_hard_v2")


def load_questions(cfg: EvaluateConfig) -> list[Prompt]:
    """At most `cfg.limit` prompts; the original record is kept in the task's metadata.

    Raises:
        ValueError: for a record without question or, in a math set, without answer, naming it.
        FileNotFoundError: for a file or dataset that is not there.
    """
    limit = 10**9 if cfg.limit is None else cfg.limit
    if cfg.benchmark == "reasoning_gym":
        size = 100 if cfg.limit is None else cfg.limit
        return load_prompts(PromptsConfig(tasks=cfg.tasks, size=size, seed=cfg.seed))
    source = SOURCES[cfg.benchmark]
    records = (
        (where, _prompt_record(cfg, source, record, where)) for where, record in _read(cfg, source)
    )
    return from_records(records, limit, f"data: {cfg.data or source.path}")


def _read(cfg: EvaluateConfig, source: Source) -> Iterator[tuple[str, dict[str, Any]]]:
    path = cfg.data or source.path
    if path is None:
        raise ValueError(
            f"data: expected the file of {cfg.benchmark}'s questions, got None (no dataset of the "
            f"hub holds them as plain records)"
        )
    if path.endswith(".jsonl"):
        yield from read_jsonl(Path(path))
    elif path.endswith(".json"):
        yield from _read_list(Path(path))
    else:
        subset, split = cfg.subset or source.subset, cfg.split or source.split
        yield from read_dataset("data: neither .json nor .jsonl", path, split, subset)


def _read_list(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if not path.is_file():
        raise FileNotFoundError(f"data: {path}: no such file")
    try:
        records = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, got {error}") from error
    if not isinstance(records, list):
        raise ValueError(f"{path}: expected a list of objects, got {type(records).__name__}")
    for number, record in enumerate(records):
        if not isinstance(record, dict):
            raise ValueError(f"{path}[{number}]: expected an object, got {record!r:.60}")
        check_encodable(record, f"{path}[{number}]")
        yield f"{path}[{number}]", record


def _first(record: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((record[name] for name in names if record.get(name) is not None), None)


def _given(record: Mapping[str, Any], names: tuple[str, ...]) -> str:
    """What a record holds under these names, or else its columns, for an error."""
    given = {name: record[name] for name in names if name in record}
    return str(given)[:80] if given else str(sorted(record))


def _prompt_record(
    cfg: EvaluateConfig, source: Source, record: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """A record as `train.preferences.prompts` reads them."""
    question, answer = _first(record, source.question), _first(record, source.answer)
    if isinstance(question, list):  # the turns of Arena-Hard v0.1: one
        turn = question[0] if len(question) == 1 else None
        question = turn.get("content") if isinstance(turn, dict) else None
    if not isinstance(question, str) or not question.strip():
        raise ValueError(
            f"{where}: expected a question in one of {source.question}, got "
            f"{_given(record, source.question)}"
        )
    if source.answer:
        if isinstance(answer, list):  # OlympiadBench: of several parts
            # A part of another type is refused as the whole would be.
            plain_parts = all(isinstance(part, (str, int, float)) for part in answer)
            answer = ", ".join(map(str, answer)) if plain_parts else answer
        if answer is None or not str(answer).strip():
            raise ValueError(
                f"{where}: expected an answer in one of {source.answer}, got "
                f"{_given(record, source.answer)}"
            )
        question = f"{question.strip()}\n\n{cfg.instruction}".strip()
    plain = json.loads(json.dumps(record, default=str))
    name = _first(record, source.name)
    made = {"prompt": question, "answer": answer, "metadata": plain}
    return made if name is None else made | {"id": name}
