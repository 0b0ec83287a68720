import pytest
from tiny_chat import CHAT_TEMPLATE, QWEN3_TEMPLATE, R1_TEMPLATE, make_tokenizer

from train.config import ExampleConfig, ModelConfig, SampleConfig
from train.preferences.modes import NO_THINKING, THINKING, build_prompts, render_prompts
from train.preferences.prompts import Prompt

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


def test_a_model_without_traces_is_instructed_in_both_modes():
    """The empty trace answers the same prompt: x of pi(y | x, r) must not depend on r."""
    texts = render(CHAT_TEMPLATE)
    question = "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
    system, rest = texts[THINKING].split("<|im_end|>\n", 1)
    assert system.startswith("<|im_start|>system\n")
    assert "<think>" in system
    assert "</think>" in system
    assert rest == question + "<think>\n"
    assert texts[NO_THINKING] == f"{system}<|im_end|>\n{question}{EMPTY}"


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
    answers = {
        THINKING: ["<think>\ntwo and two\n</think>\n\n4", "<think>\nthree\n</think>\n\n6"],
        NO_THINKING: [EMPTY + "4", EMPTY + "6"],
    }
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


TURNS = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
BEGIN = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
V31 = (
    "{% if not thinking is defined %}{% set thinking = false %}{% endif %}"
    + TURNS
    + BEGIN
    + "{% if thinking %}<think>{% else %}</think>{% endif %}"
)
CLOSED = TURNS + BEGIN + "{% if thinking is defined and not thinking %}<think></think>{% else %}"
QUESTION = "<|user|>1+1?<|assistant|>"
SMOLLM3 = (
    "{% set think = enable_thinking | default(true) %}{% if messages[0].role == 'system' and "
    "'/no_think' in messages[0].content %}{% set think = false %}{% endif %}<|system|>Mode: "
    "{{ '/think' if think else '/no_think' }}"
    + TURNS
    + BEGIN
    + "{% if not think %}<think>\n\n</think>\n{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "thinking", "no_thinking"),
    [
        (V31, "<think>", "</think>"),  # DeepSeek-V3.1: closed by default, and alone
        (CLOSED + "<think>{% endif %}", "<think>", "<think></think>"),  # Kimi-K2.5
        (TURNS + BEGIN + "{% if reasoning %}<think>\n{% endif %}", "<think>\n", EMPTY),
        (TURNS + BEGIN + "{% if not enable_reasoning %}</think>{% endif %}", "", "</think>"),
        # It reads the switch and writes the same for both.
        (R1_TEMPLATE + "{% if thinking %}{% endif %}", "<think>\n", EMPTY),
        # A variable of its own of that name is no switch.
        ("{% set thinking = 1 %}" + TURNS + BEGIN + "{# </think> #}", "<think>\n", EMPTY),
        ("{# <think> #}" + TURNS + BEGIN, "<think>\n", EMPTY),
        ("{% generation %}{% endgeneration %}{# </think> #}" + TURNS + BEGIN, "<think>\n", EMPTY),
    ],
)
def test_families_of_templates(template, thinking, no_thinking):
    assert render(template) == {
        THINKING: QUESTION + thinking,
        NO_THINKING: QUESTION + no_thinking,
    }


def test_the_switch_may_be_named_or_left_out():
    template = TURNS + BEGIN + "{% if mode2 is defined and not mode2 %}</think>{% endif %}"
    assert render(template, ModelConfig(thinking_switch="mode2")) == {
        THINKING: QUESTION,
        NO_THINKING: QUESTION + "</think>",
    }
    assert render(QWEN3_TEMPLATE, ModelConfig(thinking_switch=""))[THINKING].endswith("<think>\n")
    message = r"model\.thinking_switch: expected a variable of .*'mode2'.*, got 'mode3'"
    with pytest.raises(ValueError, match=message):
        render(template, ModelConfig(thinking_switch="mode3"))


def test_a_system_text_that_turns_thinking_off_is_refused():
    assert render(SMOLLM3)[THINKING].endswith(QUESTION)
    assert render(SMOLLM3)[NO_THINKING].endswith(QUESTION + "<think>\n\n</think>\n")
    turns = [{"role": "system", "content": "Be brief. /no_think"}, *PROMPT.messages]
    prompt = Prompt("p", turns, PROMPT.task)
    message = (
        r"model\.trace_open, model\.trace_close, model\.empty_trace, model\.thinking_switch: "
        r"expected the thinking prompt of the chat template of .* with enable_thinking=True to end "
        r"in an open trace '<think>' or before one, got .*</think>"
    )
    with pytest.raises(ValueError, match=message):
        render(SMOLLM3, prompt=prompt)


@pytest.mark.parametrize(
    "end",
    ["</think>", "<think></think>", "<think>\nHm", "{% if thinking %}<think>a</think>{% endif %}"],
)
def test_a_thinking_prompt_is_not_closed(end):
    with pytest.raises(ValueError, match=r"model\.trace_open.*expected the thinking prompt"):
        render(TURNS + BEGIN + end)


def test_markers_in_the_question_are_no_trace():
    prompt = Prompt("p", [{"role": "user", "content": "What is <think>a</think>?"}], PROMPT.task)
    for template in (V31, QWEN3_TEMPLATE, TURNS + BEGIN + "{# </think> #}"):
        texts = render(template, prompt=prompt)
        assert texts[THINKING] != texts[NO_THINKING]
        assert texts[NO_THINKING].rstrip().endswith("</think>")
    with pytest.raises(ValueError, match=r"prompt 'p': messages\[0\]: .* leaves out: 'What is"):
        render(R1_TEMPLATE, prompt=prompt)


def test_a_template_with_other_traces_is_not_told_how_to_think():
    template = TURNS + BEGIN + "{# m.reasoning_content: <seed:think> #}"
    with pytest.raises(ValueError, match=r"model\.trace_open, .* traces \('reasoning_content"):
        render(template)
    model = ModelConfig(trace_open="<seed:think>", trace_close="</seed:think>", empty_trace="")
    texts = render(template + "{# </seed:think> #}", model)
    assert texts == {THINKING: QUESTION + "<seed:think>", NO_THINKING: QUESTION}


@pytest.mark.parametrize("literal", ["<think>", "<think>Hm</think>", "[T][/T]"])
def test_the_empty_trace_is_empty(literal):
    with pytest.raises(ValueError, match=r"model\.empty_trace: expected '<think>', white space"):
        render(R1_TEMPLATE, ModelConfig(empty_trace=literal))
    with pytest.raises(ValueError, match=r"model\.trace_close: expected a marker, got ' '"):
        render(R1_TEMPLATE, ModelConfig(trace_close=" "))


def test_both_modes_have_the_system_text_the_tools_and_the_examples():
    """One system text, at the beginning, whoever asks for it."""
    template = "{{ tools | tojson if tools else '' }}" + CHAT_TEMPLATE
    turns = [{"role": "system", "content": "Be brief."}, *PROMPT.messages]
    prompt = Prompt("p", turns, PROMPT.task, tools=[{"type": "function", "name": "add"}])
    sample = SampleConfig(instruction="Use {open}.", examples=[ExampleConfig("2?", "two", "2!")])
    texts = render(template, sample=sample, prompt=prompt)
    for mode, text in texts.items():
        assert text.startswith('[{"type": "function", "name": "add"}]<|im_start|>system\n'), mode
        assert text.count("<|im_start|>system\nBe brief.\n\nUse <think>.<|im_end|>") == 1
        assert text.count("system") == 1
        assert text.index("Use <think>.") < text.index("2?") < text.index("2!") < text.index("1+1?")
    with pytest.raises(ValueError, match=r"prompt 'p': tools: expected a chat template that"):
        render(CHAT_TEMPLATE, sample=sample, prompt=prompt)


def test_what_a_template_leaves_out_is_named():
    no_system = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}" + BEGIN
    with pytest.raises(ValueError, match=r"sample\.instruction: .* leaves out: 'Think step by"):
        render(no_system)
    examples = [ExampleConfig("2+2?", "two and two", "4")]
    with pytest.raises(ValueError, match=r"sample\.examples\[0\]\.trace: .* leaves out: 'two and"):
        render(R1_TEMPLATE, sample=SampleConfig(examples=examples))
    refuses = "{{ raise_exception('System role not supported') }}"
    message = r"prompt 'p': .* the roles \['system', 'user'\]: System role not supported"
    with pytest.raises(ValueError, match=message):
        render(refuses)
    with pytest.raises(ValueError, match=r"model\.name: expected a chat template in Jinja"):
        render("{% if %}")


def test_traces_of_earlier_turns_are_left_to_the_template():
    turns = [
        {"role": "user", "content": "0+1?"},
        {"role": "assistant", "content": "<think>Hm.</think>One."},
        *PROMPT.messages,
    ]
    texts = render(R1_TEMPLATE, prompt=Prompt("p", turns, PROMPT.task))
    assert texts[THINKING] == "<|user|>0+1?<|assistant|>One.<|user|>1+1?<|assistant|><think>\n"
    assert texts[NO_THINKING] == texts[THINKING].removesuffix("<think>\n") + EMPTY
