"""What `BVPOTrainer` trains on: all of it, or a line that says what not, or a refusal."""

import re

import pytest

pytest.importorskip("trl", reason="trl is not installed")

import torch
from datasets import Dataset
from packing_checks import unpack
from test_integrations_trl import LITERAL, config, first_batch, model, rows, trainer
from tiny_chat import CHAT_TEMPLATE, QWEN3_TEMPLATE, make_tokenizer
from transformers import AutoModelForCausalLM, GPT2Config

from bvpo_kernels.integrations.render import RowEncoder
from bvpo_kernels.integrations.trl import BVPOConfig, BVPOTrainer
from bvpo_kernels.integrations.trl_data import ID_COLUMNS, BVPOCollator, check_fits, prepare

LONG = "step by step " * 100  # 1300 tokens


def prepared(data, max_length=None, template=CHAT_TEMPLATE, **options):
    data = data if isinstance(data, Dataset) else Dataset.from_list(data)
    encode = RowEncoder(make_tokenizer(template), LITERAL, "train")
    return prepare(data, encode, max_length, **options)


def changed(count, number, **cells):
    data = rows(count)
    data[number] |= cells
    return data


def as_messages(data):
    return [
        {
            name: [{"role": "user" if name == "prompt" else "assistant", "content": text}]
            for name, text in row.items()
        }
        for row in data
    ]


@pytest.fixture
def said(caplog):
    return lambda: [r.getMessage() for r in caplog.records if "bvpo_kernels" in r.name]


def test_nothing_is_cut_without_a_limit(tmp_path, said):
    assert BVPOConfig(str(tmp_path), use_cpu=True, bf16=False).max_length is None
    data = changed(2, 0, chosen=f"<think>{LONG}</think>17")
    made = trainer(tmp_path, Dataset.from_list(data), max_length=None, policy=model(0))
    batch = first_batch(made)
    tokenizer = make_tokenizer()
    for number, unit in enumerate(unpack(batch["packed"])):
        for kind, prefix in (("trace", ""), ("empty", "empty_")):
            (pair,) = unit.pairs[kind]
            for side in ("chosen", "rejected"):
                text = data[number][prefix + side] + "<|im_end|>"
                assert tokenizer.decode(getattr(pair, side)) == text
    assert batch["trace"]["input_ids"].shape[1] == batch["packed"].max_seqlen > 1300
    # Longer than the positions that the model was made for.
    (line,) = said()
    assert re.search(
        r"train: the longest row has 13\d\d tokens, Llama\w+ has 512 .*max_length", line
    )


@pytest.mark.parametrize("column", ["prompt", "chosen", "empty_rejected"])
def test_a_row_over_the_limit_goes_whole_and_is_counted(said, column):
    kept = prepared(changed(4, 2, **{column: "y" * 300}), 250)
    assert kept[:] == prepared(rows(4)).select([0, 1, 3])[:]
    (line,) = said()
    longest = r"the first is row 2, the longest has 3\d\d tokens"
    assert re.search(rf"train: dropped 1 of 4 rows longer than max_length 250 \({longest}", line)


def test_the_limit_is_that_of_the_longest_sequence(said):
    from bvpo_kernels.integrations.trl_data import row_lengths

    whole = prepared(rows(4))
    row = whole[1]
    lengths = [
        len(row[f"{p}prompt_ids"]) + len(row[f"{p}{side}_ids"])
        for p in ("", "empty_")
        for side in ("chosen", "rejected")
    ]
    assert row_lengths(whole)[1] == max(lengths)
    one = whole.select([1])
    assert len(prepared(one, max(lengths))) == 1
    assert said() == []
    with pytest.raises(
        ValueError, match=r"dropped 1 of 1 rows longer than max_length.*no rows are"
    ):
        prepared(one, max(lengths) - 1)


def test_evaluation_goes_the_same_way(tmp_path, said):
    long = Dataset.from_list(changed(3, 1, rejected=LONG))
    made = trainer(tmp_path, eval_dataset=long, max_length=256)
    assert len(made.eval_dataset) == 2
    assert any("eval: dropped 1 of 3 rows" in line for line in said())
    made.evaluate(Dataset.from_list(rows(2)))
    bad = Dataset.from_list(changed(3, 1, empty_chosen=None))
    with pytest.raises(ValueError, match="eval, row 1, empty_chosen: expected"):
        made.evaluate(bad)
    with pytest.raises(ValueError, match="easy, row 1, empty_chosen: expected"):
        trainer(tmp_path, eval_dataset={"hard": Dataset.from_list(rows(2)), "easy": bad})


def two(data, **columns):
    """Traces, and a dataset of the empty kind."""
    trace = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in data]
    empty = [
        {
            "prompt": row["prompt"],
            "chosen": row["empty_chosen"],
            "rejected": row["empty_rejected"],
            **columns,
        }
        for row in data
    ]
    return Dataset.from_list(trace), Dataset.from_list(empty)


def test_empty_datasets_go_with_the_datasets_of_their_names(tmp_path):
    trace, empty = two(as_messages(rows(2)), chat_template_kwargs={"enable_thinking": False})
    tokenizer = make_tokenizer(QWEN3_TEMPLATE)

    def make(evals, empties):
        return BVPOTrainer(
            model(),
            model(1),
            config(tmp_path),
            trace,
            evals,
            empty_dataset=empty,
            eval_empty_dataset=empties,
            processing_class=tokenizer,
        )

    made = make({"a": trace, "b": trace}, {"a": empty, "b": empty})
    want = prepared(as_messages(rows(2)), template=QWEN3_TEMPLATE)[:]
    assert made.train_dataset[:] == want
    assert [made.eval_dataset[name][:] for name in "ab"] == [want, want]
    assert make(trace, empty).eval_dataset[:] == want
    for evals, empties in ((None, empty), ({"a": trace}, empty), ({"a": trace}, {"b": empty})):
        with pytest.raises(ValueError, match="eval_empty_dataset: expected datasets for"):
            make(evals, empties)
    with pytest.raises(ValueError, match=r"empty_dataset: expected none where .*'empty_chosen'"):
        trainer(tmp_path, Dataset.from_list(rows(2)), empty_dataset=two(rows(2))[1])


def test_rows_are_numbered_and_told_apart_one_by_one():
    """Rows of more than one form, and several processes."""
    data = prepared(Dataset.from_list(rows(40)), num_proc=2)
    assert data[:] == prepared(rows(40))[:]
    with pytest.raises(ValueError, match="train, row 33, chosen: expected"):
        prepared(changed(40, 33, chosen=None))


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [
        ("chosen_ids", [], r"train, row 2, chosen_ids: .*got \[\]"),
        ("empty_prompt_ids", None, "train, row 2, empty_prompt_ids: .*got None"),
        ("rejected_ids", [4, -100], r"train, row 2, rejected_ids: .*got \[4, -100\]"),
        ("prompt_ids", [4, None], r"train, row 2, prompt_ids: .*got \[4, None\]"),
    ],
)
def test_ready_ids_are_checked(column, value, reason):
    ready = prepared(rows(4)).to_list()
    ready[2][column] = value
    with pytest.raises(ValueError, match=reason):
        prepared(ready)
    with pytest.raises(ValueError, match=f"train, {column}: expected lists of token ids, got"):
        prepared([row | {column: [1.5]} for row in ready])


def test_ready_ids_keep_the_limit_and_their_scores(said):
    ready = prepared(changed(4, 0, rejected=LONG)).add_column("ref_chosen_logps", [[1.0, 2.0]] * 4)
    kept = prepared(ready, 256)
    assert kept[:] == ready.select([1, 2, 3])[:]
    assert len(said()) == 1


def test_equal_pairs_are_counted(said):
    data = changed(4, 2, empty_chosen="x", empty_rejected="x")
    data[3]["rejected"] = data[3]["chosen"]
    assert len(prepared(data)) == 4
    (line,) = said()
    assert re.search(r"in 2 of 4 rows chosen and rejected are the same .*the first is row 2", line)


@pytest.mark.parametrize("precompute", [False, True])
def test_ids_outside_the_vocabulary_are_refused_before_training(tmp_path, precompute):
    ids = [{name: [5, 1] for name in row} for row in rows(3)]
    ids[2]["empty_rejected"] = [5, 259]
    options = {"precompute_ref_log_probs": True, "reference": None} if precompute else {}
    expected = r"train, row 2, empty_rejected_ids: .*vocabulary of 259, got 259"
    with pytest.raises(ValueError, match=expected):
        trainer(tmp_path, Dataset.from_list(ids), **options)


def test_rows_longer_than_learned_positions_are_refused():
    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 1, "vocab_size": 259, "n_positions": 64}
    gpt2 = AutoModelForCausalLM.from_config(GPT2Config(**sizes))
    with pytest.raises(
        ValueError, match=r"the longest row has \d+ tokens, GPT2LMHead\w+ has 64 pos"
    ):
        check_fits(prepared(rows(4)), "train", gpt2)
    check_fits(prepared(rows(4), 64), "train", gpt2)


def test_no_rows_are_refused(tmp_path):
    for data in (None, Dataset.from_list([])):
        with pytest.raises(ValueError, match="train_dataset: expected at least one row"):
            BVPOTrainer(model(), model(1), config(tmp_path), data)
    with pytest.raises(ValueError, match="eval: expected at least one row"):
        trainer(tmp_path, eval_dataset=Dataset.from_list(rows(1)).select([]))
    with pytest.raises(ValueError, match="max_length: expected None or a number > 1, got 0"):
        config(tmp_path, max_length=0)


def test_padded_and_packed_rows_hold_the_same_tokens():
    examples = prepared(changed(2, 0, rejected=LONG)).to_list()
    batch = BVPOCollator()(examples)
    packed = batch["packed"]
    for kind in ("trace", "empty"):
        mask = batch[kind]["completion_mask"].bool()
        scored = batch[kind]["input_ids"][mask]
        assert torch.equal(packed.target_T[batch[kind]["packed_index"]], scored)
    assert list(ID_COLUMNS) == list(examples[0])
