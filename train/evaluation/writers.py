"""Answer files as AlpacaEval 2 and Arena-Hard read them; only the text after the trace."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from train.runtime.files import replace_file

_CODE_BLOCK = re.compile(r"```[^`]*```")


class Answer(NamedTuple):
    """A question's original record, the final answer, and how many tokens that has."""

    record: Mapping[str, Any]
    text: str
    tokens: int


def alpaca_eval(answers: Sequence[Answer], generator: str) -> str:
    """A JSON list of {instruction, output, generator, dataset}: `alpaca_eval --model_outputs`."""
    rows = [
        {
            "instruction": answer.record["instruction"],
            "output": answer.text,
            "generator": generator,
            "dataset": answer.record.get("dataset", ""),
        }
        for answer in answers
    ]
    return json.dumps(rows, indent=1, ensure_ascii=False) + "\n"


def markdown_counts(text: str) -> dict[str, dict[str, int]]:
    """Headers, list items and bold spans outside code: what Arena-Hard's style control reads."""
    text = _CODE_BLOCK.sub("", text)

    def count(pattern: str) -> int:
        return len(re.findall(pattern, text, re.MULTILINE))

    return {
        "header_count": {f"h{n}": count(rf"^#{{{n}}}\s") for n in range(1, 7)},
        "list_count": {"ordered": count(r"^\s*\d+\.\s"), "unordered": count(r"^\s*[-*+]\s")},
        "bold_count": {"**": count(r"\*\*[^*\n]+\*\*"), "__": count(r"__[^_\n]+__")},
    }


def _metadata(answer: Answer) -> dict[str, Any]:
    # The length comes first: the reader takes the values by position. Tokens are the model's own.
    return {"token_len": answer.tokens, **markdown_counts(answer.text)}


def _answer_id(generator: str, name: str, text: str) -> str:
    """22 characters, as the original's; the same answer has the same id."""
    return hashlib.sha256(f"{generator}\0{name}\0{text}".encode()).hexdigest()[:22]


def _question_id(record: Mapping[str, Any], *names: str) -> str:
    name = next((record[key] for key in names if key in record), None)
    if name is None:
        raise ValueError(f"data: expected questions with one of {names}, got {sorted(record)}")
    return str(name)


_NAMES = {"arena_hard_v0.1": ("question_id", "uid"), "arena_hard_v2": ("uid", "question_id")}


def check_names(benchmark: str, records: Sequence[Mapping[str, Any]]) -> None:
    """ValueError for a question without the id that the benchmark's file names it by."""
    for record in records:
        if names := _NAMES.get(benchmark):
            _question_id(record, *names)


def arena_hard_v01(answers: Sequence[Answer], generator: str) -> str:
    """JSONL of {question_id, answer_id, model_id, choices, tstamp, conv_metadata}."""
    rows = []
    for answer in answers:
        name = _question_id(answer.record, *_NAMES["arena_hard_v0.1"])
        turns = [{"content": answer.text, "token_len": answer.tokens}]
        rows.append({
            "question_id": name, "answer_id": _answer_id(generator, name, answer.text),
            "model_id": generator, "choices": [{"index": 0, "turns": turns}], "tstamp": 0.0,
            "conv_metadata": _metadata(answer),
        })  # fmt: skip
    return _lines(rows)


def arena_hard_v2(answers: Sequence[Answer], generator: str) -> str:
    """JSONL of {uid, ans_id, model, messages, tstamp, metadata}."""
    rows = []
    for answer in answers:
        name = _question_id(answer.record, *_NAMES["arena_hard_v2"])
        messages = [
            {"role": "user", "content": answer.record.get("prompt", "")},
            {"role": "assistant", "content": {"answer": answer.text}},
        ]
        rows.append({
            "uid": name, "ans_id": _answer_id(generator, name, answer.text), "model": generator,
            "messages": messages, "tstamp": 0.0, "metadata": _metadata(answer),
        })  # fmt: skip
    return _lines(rows)


def _lines(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


class Format(NamedTuple):
    write: Callable[[Sequence[Answer], str], str]
    suffix: str


FORMATS: dict[str, Format] = {
    "alpaca_eval_2": Format(alpaca_eval, ".json"),
    "arena_hard_v0.1": Format(arena_hard_v01, ".jsonl"),
    "arena_hard_v2": Format(arena_hard_v2, ".jsonl"),
}


def write_answers(benchmark: str, answers: Sequence[Answer], generator: str, folder: Path) -> Path:
    """The benchmark's file, named after the generator, as its reader expects."""
    made = FORMATS[benchmark]
    path = folder / f"{generator}{made.suffix}"
    text = made.write(answers, generator)
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return path
