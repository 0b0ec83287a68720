import pytest
from tiny_chat import CHAT_TEMPLATE, QWEN3_TEMPLATE, R1_TEMPLATE, make_tokenizer

from train.config import ExampleConfig, ModelConfig, SampleConfig
from train.modes import NO_THINKING, THINKING, build_prompts, render_prompts
from train.prompts import Prompt

EMPTY = "<think>\n\n</think>\n\n"
PROMPT = Prompt("p", [{"role": "user", "content": "1+1?"}], {"name": "sums", "entry": {}})


def render(template, model=None, sample=None, prompt=PROMPT):
    tokenizer = make_tokenizer(template)
    return render_prompts(tokenizer, prompt, model or ModelConfig(), sample or SampleConfig())


def test_forced_marker_is_kept_for_thinking_and_replaced_for_no_thinking():
    texts = render(R1_TEMPLATE)
    assert texts == {
        THINKING: "<|user|>1+1?<|assistant|><think>\n",
        NO_THINKING: "<|user|>1+1?<|assistant|>" + EMPTY,
    }


def test_forced_marker_without_newline():
    texts = render(R1_TEMPLATE.replace("<think>\\n", "<think>").replace("<think>\n", "<think>"))
    assert texts[THINKING].endswith("<|assistant|><think>")
    assert texts[NO_THINKING].endswith("<|assistant|>" + EMPTY)


def test_enable_thinking_is_left_to_the_template():
    texts = render(QWEN3_TEMPLATE)
    question = "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
    assert texts == {THINKING: question, NO_THINKING: question + EMPTY}


@pytest.mark.parametrize("wrong", ["", "/no_think", "<think>\nnot empty</think>"])
def test_enable_thinking_must_write_an_empty_trace(wrong):
    template = QWEN3_TEMPLATE.replace("<think>\\n\\n</think>\\n\\n", wrong)
    template = template.replace(EMPTY, wrong)
    with pytest.raises(ValueError, match=r"trace_open.*expected .* to end in an empty trace"):
        render(template)


def test_a_model_without_traces_is_instructed_in_thinking_mode_only():
    texts = render(CHAT_TEMPLATE)
    question = "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
    system, rest = texts[THINKING].split("<|im_end|>\n", 1)
    assert system.startswith("<|im_start|>system\n")
    assert "<think>" in system
    assert "</think>" in system
    assert rest == question + "<think>\n"
    assert texts[NO_THINKING] == question + EMPTY


def test_a_model_with_traces_in_its_template_is_not_instructed():
    texts = render(CHAT_TEMPLATE + "{# strips what is before </think> #}")
    question = "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
    assert texts == {THINKING: question + "<think>\n", NO_THINKING: question + EMPTY}


def test_own_instruction_and_markers():
    model = ModelConfig(trace_open="[T]", trace_close="[/T]", empty_trace="[T][/T]\n")
    sample = SampleConfig(instruction="Use {open} and {close}, not {braces}.")
    texts = render(CHAT_TEMPLATE, model, sample)
    assert texts[THINKING].startswith(
        "<|im_start|>system\nUse [T] and [/T], not {braces}.<|im_end|>"
    )
    assert texts[THINKING].endswith("assistant\n[T]")
    assert texts[NO_THINKING].endswith("assistant\n[T][/T]\n")
    assert "system" not in render(CHAT_TEMPLATE, model, SampleConfig(instruction=""))[THINKING]


def test_examples_show_each_mode_its_own_form():
    examples = [
        ExampleConfig("2+2?", "two and two", "4"),
        ExampleConfig("other?", "not shown", "x", task="other"),
        ExampleConfig("3+3?", "three", "6", task="sums"),
    ]
    texts = render(CHAT_TEMPLATE, sample=SampleConfig(instruction="", examples=examples))
    answers = {THINKING: ["<think>\ntwo and two\n</think>\n\n4", "<think>\nthree\n</think>\n\n6"],
               NO_THINKING: [EMPTY + "4", EMPTY + "6"]}  # fmt: skip
    for mode, replies in answers.items():
        turns = [
            f"<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n{a}<|im_end|>\n"
            for q, a in zip(("2+2?", "3+3?"), replies, strict=True)
        ]
        assert texts[mode].startswith("".join(turns) + "<|im_start|>user\n1+1?")


def test_ids_are_those_of_the_text_without_added_tokens():
    tokenizer = make_tokenizer()
    ids = build_prompts(tokenizer, PROMPT, ModelConfig(), SampleConfig())
    texts = render(CHAT_TEMPLATE)
    assert {mode: tokenizer.decode(i) for mode, i in ids.items()} == texts
    assert ids[NO_THINKING][0] == tokenizer.convert_tokens_to_ids("<|im_start|>")


def test_a_tokenizer_without_chat_template_is_refused():
    with pytest.raises(ValueError, match=r"model\.name: expected a tokenizer with a chat template"):
        render(None)
