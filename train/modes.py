"""The two ways of asking: with a trace (thinking) and with the trace fixed empty (no_thinking).

Both modes render the same conversation x, so that both kinds estimate a gradient at the same x;
they differ in how the assistant's turn begins. Three families of chat templates:

- `enable_thinking` in the template (Qwen3): the template writes both modes;
- a generation prompt that ends with the open marker (R1-Distill): thinking takes it as it is,
  NoThinking replaces the marker by the empty-trace literal;
- any other: thinking opens the trace after the generation prompt, NoThinking appends the literal.
  A template without the close marker belongs to a model that was never taught to think: it gets
  `sample.instruction` as a system message and `sample.examples` as earlier turns.
"""

from __future__ import annotations

from typing import Any

from bvpo_kernels.types import EMPTY, TRACE
from train.config import ModelConfig, SampleConfig

THINKING = "thinking"
NO_THINKING = "no_thinking"
KIND_OF_MODE = {THINKING: TRACE, NO_THINKING: EMPTY}

DEFAULT_INSTRUCTION = (
    "Think step by step between {open} and {close}. After {close} write only the final answer."
)

Message = dict[str, str]


def build_prompts(
    tokenizer: Any, messages: list[Message], model: ModelConfig, sample: SampleConfig
) -> dict[str, list[int]]:
    """Prompt ids per mode, up to where the response begins.

    Raises:
        ValueError: for a tokenizer without a chat template, or one whose NoThinking prompt does not
            end in an empty trace.
    """
    texts = render_prompts(tokenizer, messages, model, sample)
    # The template has written the special tokens already.
    return {
        mode: tokenizer(text, add_special_tokens=False).input_ids for mode, text in texts.items()
    }


def render_prompts(
    tokenizer: Any, messages: list[Message], model: ModelConfig, sample: SampleConfig
) -> dict[str, str]:
    """`build_prompts` as text."""
    if not tokenizer.chat_template:
        raise ValueError(f"model.name: expected a tokenizer with a chat template, got {model.name}")
    template = tokenizer.get_chat_template()
    native = model.trace_close.strip() in template
    context = [*_preamble(model, sample, native), *messages]

    def render(**options: Any) -> str:
        return tokenizer.apply_chat_template(
            context, tokenize=False, add_generation_prompt=True, **options
        )

    if "enable_thinking" in template:
        texts = {
            THINKING: render(enable_thinking=True),
            NO_THINKING: render(enable_thinking=False),
        }
        _check_empty_trace(texts[NO_THINKING], model)
        return texts
    text = render()
    before = text.rstrip().removesuffix(model.trace_open.strip())
    if before != text.rstrip():  # the template has opened the trace
        return {THINKING: text, NO_THINKING: before + model.empty_trace}
    return {THINKING: text + model.trace_open, NO_THINKING: text + model.empty_trace}


def _preamble(model: ModelConfig, sample: SampleConfig, native: bool) -> list[Message]:
    """Instruction and examples as configured, or the built-in instruction where it is needed."""
    instruction = sample.instruction
    if instruction is None:
        instruction = "" if native else DEFAULT_INSTRUCTION
    turns: list[Message] = []
    if instruction:
        # Not str.format: an instruction of the user's own may contain braces.
        text = instruction.replace("{open}", model.trace_open.strip())
        turns.append({"role": "system", "content": text.replace("{close}", model.trace_close)})
    for example in sample.examples:
        turns.append({"role": "user", "content": example.question})
        reply = f"{model.trace_open}{example.trace}\n{model.trace_close}\n\n{example.answer}"
        turns.append({"role": "assistant", "content": reply})
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
