"""The two ways of asking: with a trace (thinking) and with the trace fixed empty (no_thinking).

Both modes ask the same conversation, system text, tools and examples included; they differ in how
the assistant's turn begins, and in what the template itself writes for a mode. Families of chat
templates:

- a switch (`enable_thinking` of Qwen3, `thinking` of DeepSeek-V3.1): the template writes both;
- a generation prompt that ends with the open marker (R1-Distill): thinking takes it as it is,
  NoThinking replaces the marker by the empty-trace literal;
- any other: thinking opens the trace after the generation prompt, NoThinking appends the literal.
  A template without the close marker belongs to a model that was never taught to think: it is told
  how, in the system text.

`sample.examples` are earlier turns, with traces in thinking mode and empty ones in NoThinking.
What was rendered is checked: all of the input is in it, and the assistant's turn begins with an
open trace (or before one) and with a closed, empty one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from bvpo_kernels.types import EMPTY, TRACE
from train.config import ModelConfig, SampleConfig
from train.preferences.prompts import Message, Prompt

THINKING = "thinking"
NO_THINKING = "no_thinking"
KIND_OF_MODE = {THINKING: TRACE, NO_THINKING: EMPTY}

DEFAULT_INSTRUCTION = (
    "Think step by step between {open} and {close}. After {close} write only the final answer."
)
# Variables by which templates are told whether to think; the first that a template reads is taken.
SWITCHES = ("enable_thinking", "thinking", "enable_reasoning", "reasoning")
# Signs of a template that writes traces, whatever their markers.
_TRACES = re.compile(
    r"reasoning_content|enable_thinking|thinking_budget|<think|\[THINK\]|<\|channel\|>|<seed:think>"
    r"|<reasoning>|<thought>"
)
_GENERATION_TAG = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")
_MARKERS = "model.trace_open, model.trace_close, model.empty_trace, model.thinking_switch"


def build_prompts(
    tokenizer: Any, prompt: Prompt, model: ModelConfig, sample: SampleConfig
) -> dict[str, list[int]]:
    """Prompt ids per mode, up to where the response begins.

    Raises:
        ValueError: as `render_prompts`.
    """
    texts = render_prompts(tokenizer, prompt, model, sample)
    # The template has written the special tokens already.
    return {
        mode: tokenizer(text, add_special_tokens=False).input_ids for mode, text in texts.items()
    }


def render_prompts(
    tokenizer: Any, prompt: Prompt, model: ModelConfig, sample: SampleConfig
) -> dict[str, str]:
    """`build_prompts` as text.

    Raises:
        ValueError: for a tokenizer without a chat template, one that refuses the conversation or
            leaves out a part of it, a thinking prompt that does not end in an open trace or before
            one, or a NoThinking prompt that does not end in a closed, empty one.
    """
    if not tokenizer.chat_template:
        raise ValueError(f"model.name: expected a tokenizer with a chat template, got {model.name}")
    if not model.trace_close.strip():
        raise ValueError(f"model.trace_close: expected a marker, got {model.trace_close!r}")
    template = tokenizer.get_chat_template(tools=prompt.tools)
    switch = find_switch(template, model)
    instruction = _instruction(template, switch, model, sample)
    texts, tails = {}, {}
    for mode in KIND_OF_MODE:
        options = {switch: mode == THINKING} if switch else {}
        parts = list(_parts(prompt, model, sample, instruction, mode))
        turns = _conversation(prompt, model, sample, instruction, mode)
        texts[mode] = _render(tokenizer, prompt, model, turns, options)
        _check_complete(texts[mode], parts, model)
        tails[mode] = _tail(texts[mode], str(prompt.messages[-1]["content"]))
    return _begin_turns(texts, tails, model, switch)


@lru_cache(maxsize=16)
def template_variables(template: str) -> frozenset[str]:
    """Names that a chat template reads from what it is called with."""
    import jinja2
    import jinja2.meta

    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        # A tag of transformers' own, which marks what the assistant wrote.
        tree = environment.parse(_GENERATION_TAG.sub("", template))
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"model.name: expected a chat template in Jinja, got {error}") from error
    return frozenset(jinja2.meta.find_undeclared_variables(tree))


def find_switch(template: str, model: ModelConfig) -> str | None:
    """The variable that tells a chat template whether to think: `model.thinking_switch`, or the
    first known one that it reads.

    Raises:
        ValueError: for a configured one that the template does not read.
    """
    variables = template_variables(template)
    if model.thinking_switch is None:
        return next((name for name in SWITCHES if name in variables), None)
    if model.thinking_switch and model.thinking_switch not in variables:
        raise ValueError(
            f"model.thinking_switch: expected a variable of the chat template of {model.name}, "
            f"which reads {sorted(variables)}, got {model.thinking_switch!r}"
        )
    return model.thinking_switch or None


def _instruction(
    template: str, switch: str | None, model: ModelConfig, sample: SampleConfig
) -> str:
    text = sample.instruction
    if text is None:
        markers = (model.trace_open.strip(), model.trace_close.strip())
        if switch or any(marker and marker in template for marker in markers):
            return ""  # taught to think: it needs no telling
        if signs := _TRACES.findall(template):
            raise ValueError(
                f"model.trace_open, model.trace_close: expected the markers of the chat template "
                f"of {model.name}, which writes traces ({signs[0]!r}) without "
                f"{model.trace_close!r}; or say in sample.instruction how it should think"
            )
        text = DEFAULT_INSTRUCTION
    # Not str.format: an instruction of the user's own may contain braces.
    text = text.replace("{open}", model.trace_open.strip())
    return text.replace("{close}", model.trace_close.strip())


def _conversation(
    prompt: Prompt, model: ModelConfig, sample: SampleConfig, instruction: str, mode: str
) -> list[Message]:
    """System text, examples in the form that the mode asks for, and the prompt's own turns."""
    messages = list(prompt.messages)
    system = [instruction] if instruction else []
    turns: list[Message] = []
    if messages[0]["role"] == "system":  # templates take one system text, at the beginning
        system.insert(0, messages.pop(0)["content"])
    if system:
        turns.append({"role": "system", "content": "\n\n".join(system)})
    for example in sample.examples:
        if example.task in (None, prompt.task["name"]):
            trace = model.empty_trace
            if mode == THINKING:
                trace = f"{model.trace_open}{example.trace}\n{model.trace_close}\n\n"
            turns.append({"role": "user", "content": example.question})
            turns.append({"role": "assistant", "content": trace + example.answer})
    return [*turns, *messages]


def _parts(
    prompt: Prompt, model: ModelConfig, sample: SampleConfig, instruction: str, mode: str
) -> Iterator[tuple[str, str]]:
    """(name, text) of all that a render must hold."""
    yield "sample.instruction", instruction
    for number, example in enumerate(sample.examples):
        if example.task in (None, prompt.task["name"]):
            names = (
                ("question", "answer") if mode == NO_THINKING else ("question", "trace", "answer")
            )
            for name in names:
                yield f"sample.examples[{number}].{name}", getattr(example, name)
    for number, message in enumerate(prompt.messages):
        text = str(message.get("content") or "")
        if message["role"] == "assistant":
            # Templates leave out the traces of earlier turns, as those who trained the model did.
            text = text.rpartition(model.trace_close)[2]
        if message["role"] in ("system", "user", "assistant"):  # others may be written as JSON
            yield f"prompt {prompt.prompt_id!r}: messages[{number}]", text


def _render(
    tokenizer: Any,
    prompt: Prompt,
    model: ModelConfig,
    turns: list[Message],
    options: dict[str, Any],
) -> str:
    from jinja2 import TemplateError

    def call(tools: list[dict[str, Any]] | None) -> str:
        return tokenizer.apply_chat_template(
            turns, tools=tools, tokenize=False, add_generation_prompt=True, **options
        )

    try:
        text = call(prompt.tools)
        ignored = prompt.tools and text == call(None)
    except (TemplateError, TypeError) as error:
        roles = [turn["role"] for turn in turns]
        raise ValueError(
            f"prompt {prompt.prompt_id!r}: expected a conversation that the chat template of "
            f"{model.name} takes, got the roles {roles}: {error}"
        ) from error
    if ignored:
        raise ValueError(
            f"prompt {prompt.prompt_id!r}: tools: expected a chat template that writes them, got "
            f"that of {model.name}"
        )
    return text


def _check_complete(text: str, parts: list[tuple[str, str]], model: ModelConfig) -> None:
    squeezed = "".join(text.split())
    for name, part in parts:
        if "".join(part.split()) not in squeezed:
            raise ValueError(
                f"{name}: expected a text that the chat template of {model.name} writes as it is, "
                f"got one that it changes or leaves out: {part.strip()[:60]!r}"
            )


def _tail(text: str, content: str) -> str:
    """What a template has written after the last message."""
    words = content.split()
    for end in (content.strip(), words[-1] if words else ""):
        if end in text:
            return text[text.rindex(end) + len(end) :]
    return text


def _state(text: str, tail: str, model: ModelConfig) -> str:
    """How a prompt leaves the trace: "open", "closed" and empty, "unopened" or "other"."""
    marker, close = model.trace_open.strip(), model.trace_close.strip()
    if marker and text.rstrip().endswith(marker):
        return "open"
    if text.rstrip().endswith(close):
        _, opened, trace = tail.rstrip().removesuffix(close).rpartition(marker or close)
        return "other" if opened and trace.strip() else "closed"
    return "other" if close in tail or (marker and marker in tail) else "unopened"


def _begin_turns(
    texts: dict[str, str], tails: dict[str, str], model: ModelConfig, switch: str | None
) -> dict[str, str]:
    """The prompts with an open and a closed trace, where the template has not written them."""
    marker = model.trace_open.strip()
    states = {mode: _state(texts[mode], tails[mode], model) for mode in texts}
    thinking, silent = texts[THINKING], texts[NO_THINKING]
    if states[THINKING] not in ("open", "unopened"):
        raise ValueError(
            f"{_MARKERS}: expected the thinking prompt of {_asked(model, switch, True)} to end in "
            f"an open trace {marker!r} or before one, got {tails[THINKING][-60:]!r}"
        )
    if states[NO_THINKING] == "open":
        silent = silent.rstrip().removesuffix(marker) + _empty_literal(model)
    elif states[NO_THINKING] == "unopened" and states[THINKING] == "open":
        # What the switch opens is closed again: the same prompt as the trace's.
        silent = thinking.rstrip().removesuffix(marker) + _empty_literal(model)
    elif states[NO_THINKING] == "unopened" and switch is None:
        silent += _empty_literal(model)
    elif states[NO_THINKING] != "closed":
        raise ValueError(
            f"{_MARKERS}: expected the prompt of {_asked(model, switch, False)} to end in an empty "
            f"trace {model.trace_open!r}{model.trace_close!r}, got {tails[NO_THINKING][-60:]!r}"
        )
    if states[THINKING] == "unopened" and switch is None:
        thinking += model.trace_open
    return {THINKING: thinking, NO_THINKING: silent}


def _asked(model: ModelConfig, switch: str | None, thinks: bool) -> str:
    return f"the chat template of {model.name}" + (f" with {switch}={thinks}" if switch else "")


def _empty_literal(model: ModelConfig) -> str:
    """`model.empty_trace`: the markers with white space between them, the second alone, or ""."""
    text, marker, close = (
        part.strip() for part in (model.empty_trace, model.trace_open, model.trace_close)
    )
    inner = text.removesuffix(close).removeprefix(marker)
    if text and (inner.strip() or not text.endswith(close)):
        raise ValueError(
            f"model.empty_trace: expected {marker!r}, white space and {close!r}, got "
            f"{model.empty_trace!r}"
        )
    return model.empty_trace
