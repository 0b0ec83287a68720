"""The file of responses: one JSONL line per prompt, as `train.preferences.sample` describes it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from train.config import RunConfig
from train.preferences.modes import KIND_OF_MODE
from train.preferences.prompts import FREE_TEXT, Prompt, parse_object

_IDS = "a list of token ids"


def responses_path(cfg: RunConfig) -> Path:
    return Path(cfg.run_dir) / "responses.jsonl"


def check_record(record: Mapping[str, Any], where: str) -> None:
    """ValueError, naming `where` and the field, for what `sample` does not write."""
    if not {"prompt_id", "messages", "task", "modes"} <= record.keys():
        raise ValueError(f"{where}: expected a line of responses, got {sorted(record)}")

    def expect(name: str, value: Any, good: bool, form: str) -> None:
        if not good:
            raise ValueError(f"{where}: {name}: expected {form}, got {value!r:.60}")

    prompt_id, task, modes = record["prompt_id"], record["task"], record["modes"]
    expect("prompt_id", prompt_id, isinstance(prompt_id, str) and bool(prompt_id), "a text")
    expect("messages", record["messages"], isinstance(record["messages"], list), "a list")
    task_ok = isinstance(task, dict) and isinstance(task.get("name"), str)
    expect("task", task, task_ok and isinstance(task.get("entry"), dict), "a name and an entry")
    gold, free = task["entry"].get("answer"), task["name"] == FREE_TEXT
    gold_ok = gold is None or isinstance(gold, str) or not free
    expect("task.entry.answer", gold, gold_ok, "a text or null")
    modes_ok = isinstance(modes, dict) and bool(modes) and set(modes) <= set(KIND_OF_MODE)
    expect("modes", modes, modes_ok, f"an object with {list(KIND_OF_MODE)}")
    for mode, part in modes.items():
        name = f"modes.{mode}"
        part_ok = isinstance(part, dict) and isinstance(part.get("responses"), list)
        expect(name, part, part_ok, "an object with prompt_ids and a list of responses")
        expect(f"{name}.prompt_ids", part.get("prompt_ids"), _are_ids(part.get("prompt_ids")), _IDS)
        for number, response in enumerate(part["responses"]):
            one = f"{name}.responses[{number}]"
            expect(one, response, isinstance(response, dict), "an object")
            text, finished = response.get("text"), response.get("finished")
            ids = response.get("ids")  # an engine may give up on a response: none, then
            expect(f"{one}.ids", ids, _are_ids(ids) or (ids == [] and not finished), _IDS)
            expect(f"{one}.text", text, isinstance(text, str), "a text")
            expect(f"{one}.finished", finished, isinstance(finished, bool), "true or false")


def _are_ids(value: Any) -> bool:
    # type(), not isinstance(): True is an int.
    return isinstance(value, list) and all(type(i) is int and i >= 0 for i in value) and value != []


def read_responses(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """("file:line", record) of each complete line.

    The last line may lack its end, when the writer was killed: it is left out, with a message.

    Raises:
        ValueError: naming file and line, for any other malformed line or a repeated prompt.
        FileNotFoundError: for a missing file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; run `sample` first")
    seen: set[str] = set()
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}:{number}"
            if not line.endswith(b"\n"):
                tqdm.write(f"{where}: this last line is incomplete and left out")
                return
            if not line.strip():
                continue
            record = parse_object(line, where)
            check_record(record, where)
            if record["prompt_id"] in seen:
                raise ValueError(
                    f"{where}: expected a new prompt, got {record['prompt_id']!r} again"
                )
            seen.add(record["prompt_id"])
            yield where, record


def drop_unfinished_line(path: Path) -> None:
    """Cut off a last line that lacks its end: its prompt is sampled again."""
    content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    if end < len(content):
        tqdm.write(f"{path}: its last line is incomplete and is sampled again")
        with path.open("r+b") as file:
            file.truncate(end)


def finished_prompts(path: Path, prompts: Iterable[Prompt]) -> set[str]:
    """Ids of the prompts that the file holds.

    Raises:
        ValueError: if a stored prompt has the id of a configured one and another text.
    """
    wanted = {prompt.prompt_id: (prompt.messages, prompt.tools) for prompt in prompts}
    done = set()
    for where, record in read_responses(path):
        prompt_id = record["prompt_id"]
        stored = (record["messages"], record.get("tools"))
        if prompt_id in wanted and stored != wanted[prompt_id]:
            raise ValueError(
                f"{where}: expected the messages and tools of prompt {prompt_id!r}, got others"
            )
        done.add(prompt_id)
    return done
