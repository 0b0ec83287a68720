"""Prompts from reasoning-gym, a JSONL file or a Hugging Face dataset, with what judges them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.config import PromptsConfig

# role, content and whatever else a template reads, such as tool_calls.
Message = dict[str, Any]

# A task name that no verifier of reasoning-gym has: prompts that bring at most a gold answer.
FREE_TEXT = "free_text"


@dataclass(frozen=True)
class Prompt:
    """A conversation and its task: `{"name": ..., "entry": {"question", "answer", "metadata"}}`.

    The entry is what reasoning-gym's verifier of that name scores an answer with; under the name
    "free_text" it holds the gold answer, or None. tools: JSON schemas for the chat template.
    """

    prompt_id: str
    messages: list[Message]
    task: dict[str, Any]
    tools: list[dict[str, Any]] | None = None


def load_prompts(cfg: PromptsConfig) -> list[Prompt]:
    """The configured prompts, at most `cfg.size`; a larger size only appends.

    Raises:
        ValueError: for a malformed record (file and line), a duplicate id, an unknown task.
        FileNotFoundError: for a missing file or dataset.
    """
    if cfg.size < 1:
        raise ValueError(f"prompts.size: expected a positive number of prompts, got {cfg.size}")
    if cfg.source == "reasoning_gym":
        return _reasoning_gym(cfg)
    if cfg.path is None:
        raise ValueError(f"prompts.path: expected a path for source {cfg.source}, got None")
    records = (
        read_jsonl(Path(cfg.path))
        if cfg.source == "jsonl"
        else read_dataset("prompts.path", cfg.path, cfg.split)
    )
    return from_records(records, cfg.size, f"prompts.path: {cfg.path}")


def read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file:line", object) of each line that is not blank.

    Raises:
        ValueError: naming file and line, for what is not a JSON object.
        FileNotFoundError: for a missing file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{path}:{number}", parse_object(line, f"{path}:{number}")


def parse_object(line: bytes, where: str) -> dict[str, Any]:
    """A line of JSONL; ValueError, naming `where`, for anything but a JSON object."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: expected a JSON object, got {line[:60]!r} ({error})") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(record).__name__}")
    if b"\\ud" in line.lower():  # half of a surrogate pair can only come as an escape
        check_encodable(record, where)
    return record


def check_encodable(record: Mapping[str, Any], where: str) -> None:
    """ValueError naming the field with half of a surrogate pair, which no tokenizer takes."""
    for name, value in record.items():
        try:
            json.dumps([name, value], ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start]
            raise ValueError(
                f"{where}: {name!a}: expected Unicode text, got half of a surrogate pair, {half!a}"
            ) from error


def read_dataset(
    option: str, path: str, split: str, subset: str | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """("path[split][index]", row) of a dataset on disk or of a hub; errors name `option`."""
    import datasets

    try:
        if (Path(path) / "dataset_info.json").is_file():  # written by Dataset.save_to_disk
            rows = datasets.load_from_disk(path)
        else:
            rows = datasets.load_dataset(path, subset, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        part = f"split {split!r}" if subset is None else f"subset {subset!r}, split {split!r}"
        raise FileNotFoundError(
            f"{option}: expected a dataset that `datasets` can load, got {path!r} ({part}): "
            f"{' '.join(str(error).split())[:300]}"
        ) from error
    for index, row in enumerate(rows):
        yield f"{path}[{split}][{index}]", dict(row)


def _messages(record: Mapping[str, Any], where: str) -> list[Message]:
    messages = record.get("messages")
    if messages is None:
        prompt = record.get("prompt")
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(
                f"{where}: expected a text `prompt` or a list `messages`, got "
                + (f"prompt {prompt!r:.60}" if "prompt" in record else str(sorted(record)))
            )
        return [{"role": "user", "content": prompt}]
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        got = next((m for m in messages if not _is_message(m)), messages) if messages else messages
        raise ValueError(
            f"{where}: expected `messages` as a list of {{role, content}}, texts, got {got!r:.80}"
        )
    last = messages[-1]
    if last["role"] == "assistant" or not (last.get("content") or "").strip():
        raise ValueError(
            f"{where}: expected `messages` that end with a text before the assistant's turn, got "
            f"{last!r:.80}"
        )
    # Columns of a dataset hold None where a message has no such field.
    return [
        {key: value for key, value in message.items() if value is not None} for message in messages
    ]


def _is_message(message: Any) -> bool:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        return False
    content = message.get("content")
    return isinstance(content, str) or (content is None and bool(message.get("tool_calls")))


def _text_or_number(record: Mapping[str, Any], name: str, where: str) -> str | None:
    """A field as text; None if it is absent or null."""
    value = record.get(name)
    if value is None:
        return None
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not isinstance(value, str) and not (number and math.isfinite(value)):
        raise ValueError(f"{where}: {name}: expected a text or a number, got {value!r:.60}")
    if not str(value).strip():
        raise ValueError(f"{where}: {name}: expected a text, got {value!r}")
    return str(value)


def _tools(record: Mapping[str, Any], where: str) -> list[dict[str, Any]] | None:
    tools = record.get("tools")
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"{where}: tools: expected a list of JSON schemas, got {tools!r:.60}")
    return tools


def from_records(
    records: Iterable[tuple[str, dict[str, Any]]], size: int, source: str = "prompts.path"
) -> list[Prompt]:
    """The first `size` of ("file:line", record with `prompt` or `messages`, and optionally `id`,
    `answer`, `tools` and `metadata`).

    Args:
        source: the option, and file, that an error names when there is no record.

    Raises:
        ValueError: for a malformed record or a repeated id, naming it; for no record at all.
    """
    prompts: dict[str, Prompt] = {}
    for where, record in records:
        if len(prompts) == size:
            break
        messages, tools = _messages(record, where), _tools(record, where)
        content: Any = [messages, tools] if tools else messages
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        prompt_id = _text_or_number(record, "id", where) or digest[:16]
        if prompt_id in prompts:
            raise ValueError(f"{where}: expected a prompt of its own id, got {prompt_id!r} again")
        entry = {
            "question": messages[-1]["content"],
            "answer": _text_or_number(record, "answer", where),
            "metadata": record.get("metadata"),
        }
        task = {"name": FREE_TEXT, "entry": entry}
        prompts[prompt_id] = Prompt(prompt_id, messages, task, tools)
    if not prompts:
        raise ValueError(f"{source}: expected at least one prompt, got none")
    return list(prompts.values())


def _reasoning_gym(cfg: PromptsConfig) -> list[Prompt]:
    """Prompt i is entry i // n of task i % n, for n tasks."""
    import reasoning_gym

    if not cfg.tasks:
        raise ValueError("prompts.tasks: expected at least one task of reasoning-gym, got none")
    per_task = -(-cfg.size // len(cfg.tasks))
    sources = {}
    for name, options in cfg.tasks.items():
        try:
            sources[name] = reasoning_gym.create_dataset(
                name, **{"seed": cfg.seed, "size": per_task, **options}
            )
        except (ValueError, TypeError, AssertionError) as error:
            raise ValueError(
                f"prompts.tasks: expected tasks of reasoning-gym with its options, got {name!r}: "
                f"{options} ({error})"
            ) from error
    prompts = []
    for number in range(cfg.size):
        index, which = divmod(number, len(cfg.tasks))
        name = list(cfg.tasks)[which]
        entry = _plain_entry(sources[name], name, sources[name][index])
        messages = [{"role": "user", "content": entry["question"].strip()}]
        prompt_id = f"{name}-{cfg.seed}-{index}"
        prompts.append(Prompt(prompt_id, messages, {"name": name, "entry": entry}))
    return prompts


def _plain_entry(source: Any, name: str, entry: dict[str, Any]) -> dict[str, Any]:
    """The entry after a trip through JSON, which must not change what its verifier says."""
    try:
        plain = json.loads(json.dumps(entry))
        same = source.score_answer(entry["answer"], plain) == source.score_answer(
            entry["answer"], entry
        )
    except (TypeError, ValueError, KeyError):
        same = False
    if not same:
        raise ValueError(f"prompts.tasks: expected a task whose entries survive JSON, got {name!r}")
    return plain
