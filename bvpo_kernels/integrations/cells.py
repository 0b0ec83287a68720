"""Cells of a row of preferences: what may stand in them, and what is said of those that may not."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

# Fields of an answer that only the template can write.
_TRACE_FIELDS = ("reasoning_content", "reasoning", "thinking")
TEMPLATE_FIELDS = (*_TRACE_FIELDS, "tool_calls")

Message = dict[str, Any]


def bad_cell(where: str, column: str, expected: str, got: str) -> ValueError:
    return ValueError(f"{where}, {column}: expected {expected}, got {got}")


def token_ids(where: str, column: str, value: Any) -> list[int]:
    """A cell of token ids.

    Raises:
        ValueError: naming row and column, for anything but a list of ids >= 0, or an empty one.
    """
    # type(), not isinstance(): True is an int.
    if isinstance(value, list) and value and all(type(i) is int and i >= 0 for i in value):
        return value
    raise bad_cell(where, column, "at least one token id >= 0", short(value))


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def from_json(where: str, column: str, value: Any) -> Any:
    """Columns whose rows differ in their keys are often kept as JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise bad_cell(where, column, "JSON", f"{short(value)} ({error})") from None


def read_messages(where: str, column: str, value: Sequence[Any]) -> Iterator[Message]:
    """Messages with texts for contents, without the None that datasets fills fields with."""
    for number, given in enumerate(value):
        name = f"{column}[{number}]"
        if not isinstance(given, Mapping) or not isinstance(given.get("role"), str):
            raise bad_cell(where, name, "a message with a role and a content", short(given))
        message = {key: item for key, item in given.items() if item is not None}
        content = message.get("content")
        if isinstance(content, list):
            parts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
            texts = [part for part in parts if isinstance(part, str)]
            if len(texts) < len(parts):
                raise bad_cell(where, name, "a content of texts", short(content))
            message["content"] = content = "".join(texts)
        if content is None and any(message.get(field) for field in TEMPLATE_FIELDS):
            message["content"] = content = ""
        if not isinstance(content, str):
            raise bad_cell(where, name, "a text as content", short(content))
        yield message


def in_parts(message: Message) -> Message:
    """The form of a content that the templates of processors read."""
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


def texts_of(message: Message) -> list[str]:
    """The texts of a message that must not be lost."""
    texts = [message[name] for name in (*_TRACE_FIELDS, "content") if name in message]
    for call in message.get("tool_calls") or ():
        texts.append((call.get("function") or call).get("name", ""))
    return [text for text in texts if isinstance(text, str) and text.strip()]


def missing_from(given: Sequence[str], text: str) -> list[str]:
    """What of `given` is not in the text in that order, white space aside."""
    rest, missing = "".join(text.split()), []
    for part in given:
        if not part.strip():
            continue
        _, found, after = rest.partition("".join(part.split()))
        if found:
            rest = after
        else:
            missing.append(part)
    return missing


def fold(text: str) -> str:
    """A text but for case, compatible forms and characters that cannot be seen."""
    folded = unicodedata.normalize("NFKC", text.casefold())
    return "".join(char for char in folded if unicodedata.category(char) not in ("Cc", "Cf"))
