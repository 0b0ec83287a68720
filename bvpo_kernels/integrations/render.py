"""Rows of preferences as token ids: both kinds, and texts, messages and ids, by one piece of code.

A response is scored as it was given, behind the prompt that the model has when it samples. So a
chat template is asked for the prompt and for what ends an assistant's turn, not for the answer:
templates delete, move and reformat traces. Only where a template puts text of its own before an
answer (channels), or the answer is more than a text (tool calls, a trace in a field of its own), is
the answer the template's, and what is not in it is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from transformers import ProcessorMixin
from transformers.utils import logging

from bvpo_kernels.integrations.cells import (
    TEMPLATE_FIELDS,
    Message,
    bad_cell,
    fold,
    from_json,
    in_parts,
    missing_from,
    read_messages,
    short,
    texts_of,
    token_ids,
)
from bvpo_kernels.integrations.markers import TraceMarkers
from bvpo_kernels.types import EMPTY, KINDS, TRACE

logger = logging.get_logger(__name__)

FIELDS = ("prompt_ids", "chosen_ids", "rejected_ids")
PREFIX: Mapping[str, str] = {TRACE: "", EMPTY: "empty_"}
RESPONSES = ("chosen", "rejected")
_ANSWER = "@@answer@@"
_MAX_MARKER_TOKENS = 16


@dataclass(frozen=True)
class _Chat:
    """Messages of a prompt, and what the template gets beside them."""

    messages: list[Message]
    options: Mapping[str, Any]


@dataclass(frozen=True)
class _Prompt:
    """A prompt as the model gets it, as text or ids.

    rendered: the template's, before anything was put in or taken off. wrap: what the template
    writes between prompt and answer, white space or markup. end: what it writes after an answer.
    """

    column: str
    text: str = ""
    ids: Sequence[int] = ()
    chat: _Chat | None = None
    rendered: str = ""
    wrap: str = ""
    end: str = ""


@dataclass(frozen=True)
class _Response:
    """text: with the end of the turn; given: what of it must be among the ids."""

    text: str
    given: Sequence[str]


@dataclass
class RowEncoder:
    """A row -> {"prompt_ids", ..., "empty_rejected_ids"}: the token ids of both kinds.

    processing_class: tokenizer or processor. empty_trace: the literal of an empty trace. name: of
    the data, for errors.
    """

    processing_class: Any
    empty_trace: str
    name: str

    @cached_property
    def tokenizer(self) -> Any:
        return getattr(self.processing_class, "tokenizer", self.processing_class)

    @cached_property
    def markers(self) -> TraceMarkers:
        return TraceMarkers.of(self.empty_trace)

    def __call__(self, row: Mapping[str, Any], number: int) -> dict[str, list[int]]:
        """
        Raises:
            ValueError: naming row and column, for a cell that is missing or empty or of another
                form than its prompt, a template that refuses, and a response whose text is not in
                the ids that would be scored.
        """
        where = f"{self.name}, row {number}"
        prompts = {TRACE: self._prompt(where, row, "prompt")}
        if row.get("empty_prompt") is None:
            prompts[EMPTY] = self._emptied(where, prompts[TRACE])
        else:
            own = self._prompt(where, row, "empty_prompt")
            # Messages cannot end in the literal; texts and ids are taken as they are.
            prompts[EMPTY] = own if own.chat is None else self._emptied(where, own)
        found: dict[str, list[int]] = {}
        for kind in KINDS:
            encode = self._take_ids if prompts[kind].ids else self._encode
            found |= encode(where, row, prompts[kind], PREFIX[kind])
        return found

    # Prompts

    def _prompt(self, where: str, row: Mapping[str, Any], column: str) -> _Prompt:
        value = row.get(column)
        if isinstance(value, str) and value.strip():
            eos = self.tokenizer.eos_token
            if eos is None:
                raise ValueError("processing_class: expected an eos_token, got None")
            return _Prompt(column, value, end=eos)
        if isinstance(value, list) and value and not isinstance(value[0], Mapping):
            return _Prompt(column, ids=token_ids(where, column, value))
        if not isinstance(value, list) or not value:
            raise bad_cell(where, column, "a text, messages or token ids", short(value))
        messages = list(read_messages(where, column, value))
        blank = [m for m in messages if m["role"] == "user" and not m["content"].strip()]
        if blank or not any(message["content"].strip() for message in messages):
            raise bad_cell(where, column, "messages with a text in them", short(value))
        chat = _Chat(messages, self._options(where, row, column))
        return self._rendered(where, column, chat)

    def _options(self, where: str, row: Mapping[str, Any], column: str) -> dict[str, Any]:
        """What the template gets; an empty prompt has all that the trace's has, then its own."""
        prefixes = ("", "empty_") if column.startswith("empty_") else ("",)
        options: dict[str, Any] = {}
        for prefix in prefixes:
            name = f"{prefix}chat_template_kwargs"
            kwargs = from_json(where, name, row.get(name)) or {}
            if not isinstance(kwargs, Mapping):
                raise bad_cell(where, name, "an object", short(kwargs))
            # datasets writes None where a row lacks a key of another row.
            options |= {key: value for key, value in kwargs.items() if value is not None}
            name = f"{prefix}tools"
            tools = from_json(where, name, row.get(name))
            if tools:
                options["tools"] = tools
        return options

    def _rendered(self, where: str, column: str, chat: _Chat) -> _Prompt:
        """The prompt up to where the response begins, and the template's frame around an answer."""
        before = self._apply(where, column, chat, ())
        framed = self._apply(where, column, chat, [{"role": "assistant", "content": _ANSWER}])
        head, found, tail = framed.rpartition(_ANSWER)
        if not found:
            raise bad_cell(where, column, "a chat template that writes answers", short(framed))
        if self.markers.bare(before) == self.markers.bare(head):
            space = head[len(before) :] if head.startswith(before) else ""
            wrap = space if space.isspace() else ""
        elif before.rstrip().startswith(head.rstrip()):
            wrap = ""
        elif not head.startswith(before):
            got = f"{_end_of(before)} alone and {_end_of(head)} before an answer"
            raise bad_cell(where, column, "a chat template that writes one prompt for both", got)
        elif before == self._apply(where, column, chat, (), add_prompt=False):
            # A template that knows no generation prompt: its header belongs to the prompt.
            before, wrap = head, ""
        else:
            wrap = head[len(before) :]
        # The end of a turn as it is sampled: without white space after its last token.
        end = tail.rstrip() or self.tokenizer.eos_token or ""
        return _Prompt(column, before, chat=chat, rendered=before, wrap=wrap, end=end)

    def _apply(
        self,
        where: str,
        column: str,
        chat: _Chat,
        answers: Sequence[Message],
        add_prompt: bool = True,
    ) -> str:
        messages = [*chat.messages, *answers]
        continued = chat.messages[-1]["role"] == "assistant"
        if answers and continued:  # the first answer goes on with the prompt's last message
            last = {**chat.messages[-1], **answers[0]}
            last["content"] = chat.messages[-1]["content"] + answers[0].get("content", "")
            messages = [*chat.messages[:-1], last, *answers[1:]]
        if isinstance(self.processing_class, ProcessorMixin):
            messages = [in_parts(message) for message in messages]
        ends = {"add_generation_prompt": add_prompt and not answers}
        if continued and not answers:
            ends = {"continue_final_message": True}
        try:
            return self.processing_class.apply_chat_template(
                messages, tokenize=False, **ends, **chat.options
            )
        except Exception as error:  # a template may raise anything
            reason = " ".join(str(error).split())[:300]
            got = f"{type(error).__name__}: {reason}"
            raise bad_cell(where, column, "messages that the chat template takes", got) from error

    def _emptied(self, where: str, prompt: _Prompt) -> _Prompt:
        """The prompt of the empty kind: it ends in the literal of an empty trace."""
        if prompt.ids:
            return replace(prompt, ids=self._emptied_ids(where, prompt))
        text = self.markers.emptied(prompt.text)
        if prompt.wrap.strip() and not text.rstrip().endswith(prompt.wrap.rstrip()):
            raise ValueError(
                f"empty_trace: expected a literal that ends in {prompt.wrap!r}, which the chat"
                f" template writes before an answer, got {self.empty_trace!r}"
            )
        return replace(prompt, text=text)

    def _emptied_ids(self, where: str, prompt: _Prompt) -> list[int]:
        ids = list(prompt.ids)
        tail = self._decode(ids[-2 * _MAX_MARKER_TOKENS :])
        if self.markers.closed(tail):
            return ids
        if self.markers.opened(tail):
            for count in range(1, _MAX_MARKER_TOKENS + 1):
                if self._decode(ids[-count:]).strip() == self.markers.open:
                    ids = ids[:-count]
                    break
            else:
                expected = f"token ids of which some end where {self.markers.open!r} begins, or"
                raise bad_cell(where, prompt.column, f"{expected} empty_prompt", short(tail))
        return ids + self._ids(self.empty_trace)

    # Responses

    @staticmethod
    def _take_ids(
        where: str, row: Mapping[str, Any], prompt: _Prompt, prefix: str
    ) -> dict[str, list[int]]:
        found = {f"{prefix}prompt_ids": list(prompt.ids)}
        for name in RESPONSES:
            column = prefix + name
            value = row.get(column)
            if isinstance(value, str) or (value and isinstance(value[0], Mapping)):
                raise bad_cell(where, column, f"token ids, as {prompt.column} has", short(value))
            found[f"{column}_ids"] = token_ids(where, column, value)
        return found

    def _encode(
        self, where: str, row: Mapping[str, Any], prompt: _Prompt, prefix: str
    ) -> dict[str, list[int]]:
        columns = [prefix + name for name in RESPONSES]
        responses = [self._response(where, column, prompt, row.get(column)) for column in columns]
        ids = self._split(prompt, [response.text for response in responses])
        for column, response, scored in zip(columns, responses, ids[1:], strict=True):
            if not prefix:
                self._require_open(where, column, prompt, response)
            self._verify(where, column, response, scored)
        return dict(zip((f"{prefix}{name}" for name in FIELDS), ids, strict=True))

    def _response(self, where: str, column: str, prompt: _Prompt, value: Any) -> _Response:
        if isinstance(value, str):
            messages: list[Message] = [{"role": "assistant", "content": value}]
        elif not isinstance(value, list) or not value or not isinstance(value[0], Mapping):
            forms = "a text" if prompt.chat is None else "a text or messages"
            raise bad_cell(where, column, f"{forms}, as {prompt.column} has", short(value))
        elif prompt.chat is None:
            raise bad_cell(
                where,
                column,
                f"a text, as {prompt.column} has, or messages in both",
                f"messages: {short(value)}",
            )
        else:
            messages = list(read_messages(where, column, value))
        first = messages[0]
        if first["role"] != "assistant":
            got = f"a first message of {first['role']!r}"
            raise bad_cell(where, column, "the assistant's turn", got)
        if not any(texts_of(message) for message in messages):
            raise bad_cell(where, column, "a text with something in it", short(value))
        plain = len(messages) == 1 and not any(first.get(name) for name in TEMPLATE_FIELDS)
        if not plain or prompt.wrap.strip():
            return self._templated(where, column, prompt, messages)
        text = self.markers.unrepeated(prompt.text, first["content"])
        # White space is the template's behind its own prompt only, and once.
        own = prompt.text == prompt.rendered and not text[:1].isspace()
        return _ended((prompt.wrap if own else "") + text, [text], prompt.end)

    def _require_open(self, where: str, column: str, prompt: _Prompt, response: _Response) -> None:
        """A trace does not go behind a prompt in which the template has closed the trace."""
        if prompt.chat is None or not self.markers.closed(prompt.text):
            return
        if any(m and m in response.text for m in (self.markers.open, self.markers.close)):
            raise bad_cell(
                where,
                prompt.column,
                "a prompt that leaves the trace to the response (set the chat"
                " template's switch in the column chat_template_kwargs, such as"
                " {'enable_thinking': True} or {'thinking': True})",
                f"{_end_of(prompt.text)} before a trace in {column}",
            )

    def _templated(
        self, where: str, column: str, prompt: _Prompt, messages: list[Message]
    ) -> _Response:
        """What the template writes for the messages; all that they say must be in it."""
        assert prompt.chat is not None
        whole = self._apply(where, column, prompt.chat, messages)
        start = self.markers.before(prompt.rendered)
        given = [text for message in messages for text in texts_of(message)]
        rest = whole.removeprefix(start)
        text = self.markers.unrepeated(prompt.text, rest)
        if prompt.text != prompt.rendered and prompt.text.endswith(prompt.wrap):
            text = text.removeprefix(prompt.wrap)
        missing = missing_from(given, text)
        if rest == whole or missing:
            raise bad_cell(
                where,
                column,
                "an answer that the chat template writes behind the prompt as it is"
                " (a trace within the content, or texts or token ids in place of messages)",
                f"a render without {short((missing or given)[0])}: {_end_of(rest)}",
            )
        return _ended(text.rstrip(), given, prompt.end)

    # Ids

    def _split(self, prompt: _Prompt, responses: Sequence[str]) -> list[list[int]]:
        """Prompt, chosen, rejected. The responses begin where they part from the prompt alone, as
        in TRL: tokens may merge across the boundary."""
        bos = self.tokenizer.bos_token
        special = prompt.chat is None and not (bos and prompt.text.startswith(bos))
        alone = self._ids(prompt.text, special)
        whole = [self._ids(prompt.text + response, special) for response in responses]
        start = min(_common(alone, ids) for ids in whole)
        if start == 0:  # all of the prompt has merged with a response
            return [alone, *(self._ids(response) for response in responses)]
        if start < len(alone):
            logger.warning_once(
                f"{self.name}: the end of a prompt forms a token with a response, which begins with"
                f" {self._decode(alone[start:])!r} of the prompt; end prompts where tokens end"
            )
        return [alone[:start], *(ids[start:] for ids in whole)]

    def _ids(self, text: str, special: bool = False) -> list[int]:
        ids = self.tokenizer(text, add_special_tokens=special)["input_ids"]
        return ids[:-1] if special and self._appends_eos else ids

    @cached_property
    def _appends_eos(self) -> bool:
        """Whether the tokenizer ends texts by itself, which nothing here may end twice."""
        return self.tokenizer("a")["input_ids"][-1:] == [self.tokenizer.eos_token_id]

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    def _verify(self, where: str, column: str, response: _Response, ids: list[int]) -> None:
        """All that was given is among the ids that are scored, in its order."""
        scored = self._decode(ids)
        if not missing_from(response.given, scored) or self.tokenizer.unk_token_id in ids:
            return
        # Many tokenizers normalise.
        missing = missing_from([fold(text) for text in response.given], fold(scored))
        if missing:
            got = f"ids that say {short(scored)}, without {short(missing[0])}"
            raise bad_cell(where, column, "its text in the ids that are scored", got)


def _ended(text: str, given: Sequence[str], end: str) -> _Response:
    return _Response(text if text.endswith(end) else text + end, given)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    return next(
        (n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def _end_of(text: str) -> str:
    return repr(text[-60:])
