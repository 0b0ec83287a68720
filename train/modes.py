"""The two ways of asking: with a trace (thinking) and with the trace fixed empty (no_thinking).

Both modes ask the same conversation; they differ in how the assistant's turn begins. Three families
of chat templates:

- `enable_thinking` in the template (Qwen3): the template writes both modes;
- a generation prompt that ends with the open marker (R1-Distill): thinking takes it as it is,
  NoThinking replaces the marker by the empty-trace literal;
- any other: thinking opens the trace after the generation prompt, NoThinking appends the literal.
  A template without the close marker belongs to a model that was never taught to think: in thinking
  mode it is told how, in a system message.

`sample.examples` are earlier turns, with traces in thinking mode and empty ones in NoThinking.
"""

from __future__ import annotations

from typing import Any

from bvpo_kernels.types import EMPTY, TRACE
from train.config import ModelConfig, SampleConfig
from train.prompts import Message, Prompt

THINKING = "thinking"
NO_THINKING = "no_thinking"
KIND_OF_MODE = {THINKING: TRACE, NO_THINKING: EMPTY}

DEFAULT_INSTRUCTION = (
    "Think step by step between {open} and {close}. After {close} write only the final answer."
)


def build_prompts(
    tokenizer: Any, prompt: Prompt, model: ModelConfig, sample: SampleConfig
) -> dict[str, list[int]]:
    """Prompt ids per mode, up to where the response begins.

    Raises:
        ValueError: for a tokenizer without a chat template, or one whose NoThinking prompt does not
            end in an empty trace.
    """
    texts = render_prompts(tokenizer, prompt, model, sample)
    # The template has written the special tokens already.
    return {
        mode: tokenizer(text, add_special_tokens=False).input_ids for mode, text in texts.items()
    }


def render_prompts(
    tokenizer: Any, prompt: Prompt, model: ModelConfig, sample: SampleConfig
) -> dict[str, str]:
    """`build_prompts` as text."""
    if not tokenizer.chat_template:
        raise ValueError(f"model.name: expected a tokenizer with a chat template, got {model.name}")
    template = tokenizer.get_chat_template()
    native = model.trace_close.strip() in template

    def render(mode: str, **options: Any) -> str:
        preamble = _preamble(model, sample, prompt.task["name"], mode, native)
        return tokenizer.apply_chat_template(
            [*preamble, *prompt.messages], tokenize=False, add_generation_prompt=True, **options
        )

    if "enable_thinking" in template:
        texts = {
            THINKING: render(THINKING, enable_thinking=True),
            NO_THINKING: render(NO_THINKING, enable_thinking=False),
        }
        _check_empty_trace(texts[NO_THINKING], model)
        return texts
    texts = {mode: render(mode) for mode in KIND_OF_MODE}
    marker = model.trace_open.strip()
    if texts[THINKING].rstrip().endswith(marker):  # the template has opened the trace
        texts[NO_THINKING] = texts[NO_THINKING].rstrip().removesuffix(marker)
    else:
        texts[THINKING] += model.trace_open
    texts[NO_THINKING] += model.empty_trace
    return texts


def _preamble(
    model: ModelConfig, sample: SampleConfig, task: str, mode: str, native: bool
) -> list[Message]:
    """Instruction (thinking only) and examples, each in the form that the mode asks for."""
    turns: list[Message] = []
    instruction = sample.instruction
    if instruction is None:
        instruction = "" if native else DEFAULT_INSTRUCTION
    if instruction and mode == THINKING:
        # Not str.format: an instruction of the user's own may contain braces.
        text = instruction.replace("{open}", model.trace_open.strip())
        turns.append({"role": "system", "content": text.replace("{close}", model.trace_close)})
    for example in sample.examples:
        if example.task in (None, task):
            trace = model.empty_trace
            if mode == THINKING:
                trace = f"{model.trace_open}{example.trace}\n{model.trace_close}\n\n"
            turns.append({"role": "user", "content": example.question})
            turns.append({"role": "assistant", "content": trace + example.answer})
    return turns


def _check_empty_trace(text: str, model: ModelConfig) -> None:
    before_close = text.rstrip().removesuffix(model.trace_close.strip())
    if before_close == text.rstrip() or not before_close.rstrip().endswith(
        model.trace_open.strip()
    ):
        raise ValueError(
            "model.trace_open, model.trace_close: expected the prompt of enable_thinking=False to "
            f"end in an empty trace {model.trace_open!r}{model.trace_close!r}, got {text[-60:]!r}"
        )
