"""Rows as token ids under the templates that people have, against what a reader would write."""

import json
from types import SimpleNamespace

import pytest
from tiny_chat import CHAT_TEMPLATE, END, PAD, QWEN3_TEMPLATE, R1_TEMPLATE, START, make_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast, ProcessorMixin

from bvpo_kernels.integrations.markers import TraceMarkers
from bvpo_kernels.integrations.render import RowEncoder

EMPTY = "<think>\n\n</think>\n\n"
# Qwen3's: an answer without a trace gets an empty one, earlier turns lose theirs.
QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role != 'assistant' %}{{ m.content }}"
    "{% else %}{% set rest = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{% set trace = m.reasoning_content or m.content[:-(rest | length)] %}"
    "{% if loop.last %}<think>\n{{ trace.replace('<think>', '').replace('</think>', '').strip() }}"
    "\n</think>\n\n{% endif %}{{ rest }}"
    "{% if m.tool_calls %}<tool_call>{{ m.tool_calls[0].function.name }}</tool_call>{% endif %}"
    "{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)
# DeepSeek-V3.1's: the switch is `thinking`, and a close marker alone is an empty trace.
DEEPSEEK = (
    "{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}"
    "{% else %}<|Assistant|></think>{{ m.content.split('</think>')[-1] }}<|im_end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|Assistant|>"
    "{% if thinking %}<think>{% else %}</think>{% endif %}{% endif %}"
)
# SmolLM3's: a system message that says which mode it is in.
SMOLLM3 = (
    "<|im_start|>system\n{% if enable_thinking is defined and not enable_thinking %}/no_think"
    "{% else %}/think{% endif %}<|im_end|>\n" + QWEN3_TEMPLATE
)
# gpt-oss's: channels, and the trace in a field of its own.
CHANNELS = (
    "{% for m in messages %}<|start|>{{ m.role }}{% if m.role == 'assistant' %}"
    "{% if '<|channel|>' in m.content %}{{ raise_exception('channels in content') }}{% endif %}"
    "{% if m.thinking and loop.last %}<|channel|>analysis<|message|>{{ m.thinking }}<|end|>"
    "<|start|>assistant{% endif %}<|channel|>final{% endif %}<|message|>{{ m.content }}"
    "{% if m.role == 'assistant' and loop.last %}<|return|>{% else %}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
# Mistral's: a space before the answer; no generation prompt.
MISTRAL = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}<|im_end|>{% endif %}{% endfor %}"
)
# Headers, but no generation prompt.
HEADERS = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|im_end|>{% endfor %}"
TOOLS = "{% if tools %}<|tools|>{{ tools | tojson }}<|im_end|>{% endif %}"

ASK = "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
# template, kwargs of the template, what the trace's response begins behind, the same of the empty
SERVED = {
    "chatml": (CHAT_TEMPLATE, {}, ASK, ASK + EMPTY),
    "qwen3": (QWEN3, {}, ASK, ASK + EMPTY),
    "qwen3 on": (QWEN3, {"enable_thinking": True}, ASK, ASK + EMPTY),
    "r1": (
        R1_TEMPLATE,
        {},
        "<|user|>1+1?<|assistant|><think>\n",
        "<|user|>1+1?<|assistant|>" + EMPTY,
    ),
    "deepseek": (
        DEEPSEEK,
        {"thinking": True},
        "<|User|>1+1?<|Assistant|><think>",
        "<|User|>1+1?<|Assistant|>" + EMPTY,
    ),
    "smollm3": (
        SMOLLM3,
        {},
        "<|im_start|>system\n/think<|im_end|>\n" + ASK,
        "<|im_start|>system\n/think<|im_end|>\n" + ASK + EMPTY,
    ),
    "mistral": (MISTRAL, {}, "[INST] 1+1? [/INST]", "[INST] 1+1? [/INST]" + EMPTY),
    "headers": (
        HEADERS,
        {},
        "<|user|>1+1?<|im_end|><|assistant|>",
        "<|user|>1+1?<|im_end|><|assistant|>" + EMPTY,
    ),
}
TRACE = "<think>\none and one\n</think>\n\n2"


def msg(role, content, **fields):
    return [{"role": role, "content": content, **fields}]


def row(**changes):
    """Messages."""
    cells = {
        "prompt": msg("user", "1+1?"),
        "chosen": msg("assistant", TRACE),
        "rejected": msg("assistant", "<think>no idea</think>3"),
        "empty_chosen": msg("assistant", "2"),
        "empty_rejected": msg("assistant", "3"),
    }
    return cells | changes


def encode(template, cells, literal=EMPTY, tokenizer=None):
    tokenizer = make_tokenizer(template) if tokenizer is None else tokenizer
    return RowEncoder(tokenizer, literal, "train")(cells, 7)


def read(template, cells, literal=EMPTY):
    """The six texts that would be scored, in the order of the columns."""
    tokenizer = make_tokenizer(template)
    return [tokenizer.decode(ids) for ids in encode(template, cells, literal, tokenizer).values()]


@pytest.mark.parametrize("name", SERVED)
def test_the_trace_is_scored_behind_one_open_prompt(name):
    template, kwargs, trace, empty = SERVED[name]
    prompt, chosen, rejected, *empties = read(template, row(chat_template_kwargs=kwargs))
    assert prompt == trace
    space = " " if name == "mistral" else ""
    if trace.rstrip().endswith("<think>"):  # the template's marker is the only one
        rest = "\none and one" if name == "deepseek" else "one and one"
        assert chosen == rest + "\n</think>\n\n2" + END
        assert rejected == "no idea</think>3" + END
    else:
        assert chosen == space + TRACE + END
        assert rejected == f"{space}<think>no idea</think>3{END}"
    assert empties == [empty, "2" + END, "3" + END]


@pytest.mark.parametrize("name", SERVED)
def test_texts_messages_and_ids_of_a_row_give_the_same_ids(name):
    template, kwargs, trace, empty = SERVED[name]
    tokenizer = make_tokenizer(template)
    messages = encode(template, row(chat_template_kwargs=kwargs), tokenizer=tokenizer)
    space = " " if name == "mistral" else ""
    texts = {
        "prompt": trace,
        "chosen": space + TRACE,
        "rejected": space + "<think>no idea</think>3",
        "empty_chosen": "2",
        "empty_rejected": "3",
    }
    assert encode(template, texts, tokenizer=tokenizer) == messages
    assert encode(template, texts | {"empty_prompt": empty}, tokenizer=tokenizer) == messages
    ids = {
        name: messages[f"{name}_ids"]
        for name in ("prompt", "chosen", "rejected", "empty_chosen", "empty_rejected")
    }
    assert encode(template, ids, tokenizer=tokenizer) == messages
    # Empty answers as texts beside messages.
    mixed = row(chat_template_kwargs=kwargs, empty_chosen="2", empty_rejected="3")
    assert encode(template, mixed, tokenizer=tokenizer) == messages


def test_a_forced_marker_is_not_said_twice_and_none_is_added():
    sampled = row(chosen=msg("assistant", "one and one\n</think>\n\n2"))
    assert encode(R1_TEMPLATE, sampled) == encode(R1_TEMPLATE, row())


@pytest.mark.parametrize("answer", ["2", EMPTY + "2", "<think></think>2", "</think>\n\n2"])
def test_an_empty_answer_does_not_repeat_the_literal(answer):
    cells = row(empty_chosen=msg("assistant", answer))
    texts = {name: cell[0]["content"] for name, cell in cells.items()}
    assert read(CHAT_TEMPLATE, cells)[3:5] == [ASK + EMPTY, "2" + END]
    assert read(CHAT_TEMPLATE, texts)[3:5] == ["1+1?" + EMPTY, "2" + END]


def test_other_traces_of_an_empty_answer_stay():
    cells = row(empty_chosen=msg("assistant", "<think>one</think>2"))
    assert read(CHAT_TEMPLATE, cells)[4] == "<think>one</think>2" + END


@pytest.mark.parametrize("name", ["tools", "tools as JSON", "kwargs", "kwargs as JSON", "system"])
def test_what_reaches_the_prompt_reaches_the_empty_prompt(name):
    template = TOOLS + "{{ greeting }}" + CHAT_TEMPLATE
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    cells, said = {
        "tools": (row(tools=tools), '"add"'),
        "tools as JSON": (row(tools=json.dumps(tools)), '"add"'),
        "kwargs": (row(chat_template_kwargs={"greeting": "Hey.", "other": None}), "Hey."),
        "kwargs as JSON": (row(chat_template_kwargs='{"greeting": "Hey."}'), "Hey."),
        "system": (row(prompt=[*msg("system", "Be brief."), *msg("user", "1+1?")]), "Be brief."),
    }[name]
    prompt, _, _, empty, *_ = read(template, cells)
    assert said in prompt
    assert empty == prompt + EMPTY
    # A prompt of its own, too, unless it has another.
    own = cells | {"empty_prompt": cells["prompt"]}
    assert read(template, own)[3] == prompt + EMPTY
    if name == "kwargs":
        own["empty_chat_template_kwargs"] = {"greeting": "Hi."}
        assert read(template, own)[3] == prompt.replace("Hey.", "Hi.") + EMPTY


def test_a_template_that_closes_the_trace_itself_gets_no_second_literal():
    cells = row(empty_prompt=msg("user", "1+1?"))
    cells["empty_chat_template_kwargs"] = {"enable_thinking": False, "thinking": False}
    assert read(QWEN3, cells)[3] == ASK + EMPTY
    cells["chat_template_kwargs"] = {"thinking": True}
    assert read(DEEPSEEK, cells)[3:5] == ["<|User|>1+1?<|Assistant|></think>", "2" + END]


def test_earlier_turns_are_the_templates_and_the_same_in_both_kinds():
    turns = [*msg("user", "2+2?"), *msg("assistant", "<think>two</think>4"), *msg("user", "1+1?")]
    prompt, chosen, _, empty, *_ = read(QWEN3, row(prompt=turns))
    assert "two" not in prompt
    assert empty == prompt + EMPTY
    assert chosen == TRACE + END


def test_the_last_message_of_a_prompt_is_continued_if_it_is_the_assistants():
    begun = [*msg("user", "1+1?"), *msg("assistant", "Sure: ")]
    assert read(CHAT_TEMPLATE, row(prompt=begun))[:2] == [ASK + "Sure: ", TRACE + END]


def test_traces_in_a_field_of_their_own_are_the_templates():
    cells = row(chosen=msg("assistant", "2", reasoning_content="one and one"))
    assert read(QWEN3, cells) == read(QWEN3, row())
    for lost, template in (("reasoning_content", R1_TEMPLATE), ("thinking", CHAT_TEMPLATE)):
        cells = row(chosen=msg("assistant", "2", **{lost: "one and one"}))
        expected = r"^train, row 7, chosen: .*a trace within the content.*without 'one and one'"
        with pytest.raises(ValueError, match=expected):
            encode(template, cells)


def test_channels_are_the_templates():
    cells = row(
        chosen=msg("assistant", "2", thinking="one and one"),
        rejected=msg("assistant", "3", thinking="no idea"),
    )
    final = "<|channel|>final<|message|>"
    empty = "<|channel|>analysis<|message|><|end|><|start|>assistant" + final
    ask = "<|start|>user<|message|>1+1?<|end|><|start|>assistant"
    assert read(CHANNELS, cells, empty) == [
        ask,
        f"<|channel|>analysis<|message|>one and one<|end|><|start|>assistant{final}2<|return|>",
        f"<|channel|>analysis<|message|>no idea<|end|><|start|>assistant{final}3<|return|>",
        ask + empty,
        "2<|return|>",
        "3<|return|>",
    ]
    with pytest.raises(ValueError, match=r"^empty_trace: expected a literal that ends in '<\|chan"):
        encode(CHANNELS, cells)
    with pytest.raises(ValueError, match=r"^train, row 7, chosen: .*channels in content"):
        encode(CHANNELS, row(chosen=msg("assistant", empty + "2")), empty)


def test_tool_calls_are_the_templates():
    call = {"type": "function", "function": {"name": "add", "arguments": {}}}
    cells = row(chosen=msg("assistant", None, tool_calls=[call]))
    assert read(QWEN3, cells)[1] == f"{EMPTY}<tool_call>add</tool_call>{END}"
    with pytest.raises(ValueError, match=r"^train, row 7, chosen: .*without 'add'"):
        encode(CHAT_TEMPLATE, cells)


@pytest.mark.parametrize(
    ("template", "kwargs"), [(QWEN3, {"enable_thinking": False}), (DEEPSEEK, {})]
)
def test_a_trace_behind_a_closed_prompt_is_refused_and_an_answer_is_not(template, kwargs):
    with pytest.raises(ValueError, match=r"^train, row 7, prompt: .*chat_template_kwargs.*chosen"):
        encode(template, row(chat_template_kwargs=kwargs))
    short = row(chat_template_kwargs=kwargs, chosen="2", rejected="3")
    found = read(template, short)
    assert found[:3] == found[3:]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('no system role') }}", "prompt: .*no system role"),
        ("{{ messages[0].nothing.content }}", "prompt: .*UndefinedError"),
        (None, "prompt: .*chat_template is not set"),
        ("{{ messages[0].content }}", "prompt: .*a chat template that writes answers"),
        ("{{ messages | length }}" + CHAT_TEMPLATE, "prompt: .*one prompt for both"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused(template, reason):
    with pytest.raises(ValueError, match=f"^train, row 7, {reason}"):
        encode(template, row())


TEXTS = {
    "prompt": "1+1?",
    "chosen": TRACE,
    "rejected": "3",
    "empty_chosen": "2",
    "empty_rejected": "3",
}
IDS = {name: [5, 1] for name in TEXTS}
BAD = [
    (row(), name, value)
    for name in TEXTS
    for value in (None, "", [], msg("user", " "), msg("user", None), [5, None], 3, ["x"])
]
BAD += [(TEXTS, name, value) for name in TEXTS for value in (None, "", " \n", [])]
BAD += [(IDS, name, value) for name in TEXTS for value in (None, [], [5, -100], [5.0], [True])]
BAD += [
    (row(), "chosen", msg("user", "1+1?") + msg("assistant", "2")),
    (row(), "chosen", [{"content": "2"}]),
    (row(), "chosen", [{"role": "assistant", "content": [{"type": "image", "image": "x"}]}]),
    (row(), "prompt", [*msg("system", "Be brief."), *msg("user", "")]),
    (row(), "empty_prompt", msg("user", "")),
    (row(), "tools", "[{"),
    (row(), "chat_template_kwargs", [1]),
    (TEXTS, "chosen", msg("assistant", "2")),
    (TEXTS, "chosen", [5, 6]),
    (IDS, "rejected", "3"),
    (IDS, "rejected", msg("assistant", "3")),
]


@pytest.mark.parametrize(("cells", "column", "value"), BAD)
def test_bad_cells_are_refused_by_row_and_column(cells, column, value):
    with pytest.raises(ValueError, match=rf"^train, row 7, {column}(\[0\]|\[1\])?: expected ") as e:
        encode(CHAT_TEMPLATE, cells | {column: value})
    assert len(str(e.value)) < 400


def test_parts_of_text_are_a_text():
    parts = [{"type": "text", "text": "2", "image": None}]
    cells = row(empty_chosen=[{"role": "assistant", "content": parts, "name": None}])
    assert encode(CHAT_TEMPLATE, cells) == encode(CHAT_TEMPLATE, row())


def test_a_processor_gets_contents_in_parts():
    class Processor(ProcessorMixin):
        def __init__(self, tokenizer=None, **options):
            super().__init__(tokenizer, **options)

    template = CHAT_TEMPLATE.replace("m.content", "m.content[0].text")
    processor = Processor(make_tokenizer(None), chat_template=template)
    assert encode(None, row(), tokenizer=processor) == encode(CHAT_TEMPLATE, row())


def merging_tokenizer(merges, normalizer=None, **options):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [PAD, END, START, *alphabet, *("".join(pair) for pair in merges)]
    backend = Tokenizer(models.BPE(vocab={t: n for n, t in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.add_special_tokens([AddedToken(t, special=True) for t in (PAD, END, START)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=END, pad_token=PAD, chat_template=HEADERS, **options
    )


def trls(tokenizer, rows):
    """The ids that TRL's own trainer would train on."""
    trl = pytest.importorskip("trl", reason="trl is not installed")
    from accelerate import PartialState
    from datasets import Dataset

    PartialState()  # TRL's logger asks for it
    trainer = SimpleNamespace(_tokenizer=tokenizer)
    args = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    data = Dataset.from_list(rows)
    return trl.DPOTrainer._prepare_dataset(trainer, data, tokenizer, args, "train").to_list()


@pytest.mark.parametrize("line_break", ["", "\n"])
def test_messages_are_trls_where_the_template_writes_them_as_they_are(line_break):
    """But for what follows the end of the turn."""
    tokenizer = make_tokenizer(TOOLS + CHAT_TEMPLATE.replace("<|im_end|>\n", END + line_break))
    cells = row(tools=json.dumps([{"name": "add"}]), chat_template_kwargs={"unused": 1})
    names = ("prompt", "chosen", "rejected", "tools", "chat_template_kwargs")
    (want,) = trls(tokenizer, [{name: cells[name] for name in names}])
    got = encode(None, cells, tokenizer=tokenizer)
    assert got["prompt_ids"] == want["prompt_ids"]
    for name in ("chosen_ids", "rejected_ids"):
        assert got[name] + tokenizer(line_break)["input_ids"] == want[name]


def test_tokens_that_merge_across_the_boundary_are_trls():
    """All of prompt and response is there, parted where TRL parts them."""
    tokenizer = merging_tokenizer([("?", "<"), ("Ċ", "2"), ("4", "2"), ("1", "4")])
    texts = [
        TEXTS,
        TEXTS | {"rejected": "<think>no</think>3"},
        TEXTS | {"prompt": "say 4", "chosen": "2", "rejected": "12"},
    ]

    def theirs(rows):
        return trls(tokenizer, rows)

    names = ("prompt", "chosen", "rejected")
    want = theirs([{name: cells[name] for name in names} for cells in texts])
    want_empty = theirs(
        [
            {
                "prompt": cells["prompt"] + EMPTY,
                "chosen": cells["empty_chosen"],
                "rejected": cells["empty_rejected"],
            }
            for cells in texts
        ]
    )
    for cells, trace, empty in zip(texts, want, want_empty, strict=True):
        got = encode(None, cells, tokenizer=tokenizer)
        for name in names:
            assert got[f"{name}_ids"] == trace[f"{name}_ids"]
            assert got[f"empty_{name}_ids"] == empty[f"{name}_ids"]
        whole = tokenizer.decode(got["prompt_ids"] + got["chosen_ids"])
        assert whole == cells["prompt"] + cells["chosen"] + END
    assert tokenizer.decode(want[0]["prompt_ids"]) == "1+1"  # they do merge


def test_a_prompt_that_merges_whole_keeps_an_id():
    tokenizer = merging_tokenizer([("4", "2")])
    got = encode(None, TEXTS | {"prompt": "4", "chosen": "2"}, tokenizer=tokenizer)
    assert tokenizer.decode(got["prompt_ids"]) == "4"
    assert tokenizer.decode(got["chosen_ids"]) == "2" + END


def test_one_bos_before_a_text_and_one_eos_after_it():
    from tokenizers.processors import TemplateProcessing

    tokenizer = merging_tokenizer([], bos_token=START)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(START, 2), (END, 1)]
    )
    plain = encode(None, TEXTS, tokenizer=tokenizer)
    assert tokenizer.decode(plain["prompt_ids"] + plain["chosen_ids"]) == f"{START}1+1?{TRACE}{END}"
    assert encode(None, TEXTS | {"prompt": START + "1+1?"}, tokenizer=tokenizer) == plain


def test_ids_that_do_not_say_the_text_are_refused(monkeypatch):
    """A tokenizer that deletes a trace, or cuts; one that only normalises is served."""
    losing = merging_tokenizer([], normalizers.Replace("one and one", ""))
    for cells in (TEXTS, row()):
        with pytest.raises(
            ValueError, match=r"^train, row 7, chosen: expected its text in the ids"
        ):
            encode(None, cells, tokenizer=losing)
    cutting = merging_tokenizer([])
    monkeypatch.setattr(
        type(cutting),
        "__call__",
        lambda self, text, **_: {"input_ids": self.encode(text, add_special_tokens=False)[:20]},
    )
    with pytest.raises(ValueError, match=r"^train, row 7, chosen: expected its text in the ids"):
        encode(None, TEXTS, tokenizer=cutting)
    monkeypatch.undo()
    folding = merging_tokenizer(
        [], normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    )
    cells = TEXTS | {"chosen": "<think>Cafe\u0301</think>\ufb01"}
    ids = encode(None, cells, tokenizer=folding)["chosen_ids"]
    assert folding.decode(ids) == "<think>caf\u00e9</think>\ufb01" + END


def test_a_text_with_unknown_characters_is_served():
    vocab = {token: n for n, token in enumerate(["?", END, *"1+2345"])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.model.unk_token = "?"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, unk_token="?")
    texts = {"prompt": "1+1", "chosen": "2x", "rejected": "3", "empty_chosen": "2"}
    got = encode(None, texts | {"empty_rejected": "3"}, "", tokenizer)
    assert got["chosen_ids"] == [4, 0, 1]


def test_an_id_prompt_whose_marker_shares_a_token_is_refused():
    tokenizer = merging_tokenizer([("?", "<")])
    prompt = tokenizer("1+1?<think>")["input_ids"]
    with pytest.raises(ValueError, match=r"^train, row 7, prompt: .*empty_prompt"):
        encode(None, IDS | {"prompt": prompt}, tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("literal", "open_", "close"),
    [
        (EMPTY, "<think>", "</think>"),
        ("<think></think>", "<think>", "</think>"),
        ("<think>\nOkay, I am done.\n</think>\n\n", "<think>", "</think>"),
        ("</think>", "<think>", "</think>"),
        ("[THINK][/THINK]", "[THINK]", "[/THINK]"),
        ("<|begin|>\n\n<|end|>\n", "<|begin|>", "<|end|>"),
        ("Answer at once: ", "", ""),
        ("", "", ""),
    ],
)
def test_markers_of_a_literal(literal, open_, close):
    markers = TraceMarkers.of(literal)
    assert (markers.open, markers.close) == (open_, close)
    assert markers.emptied("x\n") == "x\n" + literal
    assert markers.emptied(markers.emptied("x\n")) == markers.emptied("x\n") or not literal
    if open_:
        assert markers.emptied(f"x\n{open_}\n") == "x\n" + literal
        assert markers.unrepeated(f"x{open_}\n", f"{open_}\ny") == "y"
    assert markers.unrepeated("x", f"{literal}y") == f"{literal}y"
