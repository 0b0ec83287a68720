"""`BVPOTrainer` against TRL's own trainer, against a per-unit loop, and against itself resumed."""

import copy
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed")

from datasets import Dataset, IterableDataset
from tiny_chat import R1_TEMPLATE, make_tokenizer, save_causal_lm, write_lines
from tiny_trl import LITERAL, config, first_batch, loss_and_gradients, model, rows, trainer
from trl import DPOConfig, DPOTrainer

from bvpo_kernels.integrations.trl import BVPOTrainer

LOSSES = (
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
)


def as_trl(kind, count=4):
    """The pairs of one kind as rows of TRL's own trainer."""
    if kind == "trace":
        return [{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in rows(count)]
    return [
        {
            "prompt": row["prompt"] + LITERAL,
            "chosen": row["empty_chosen"],
            "rejected": row["empty_rejected"],
        }
        for row in rows(count)
    ]


@pytest.fixture(scope="module")
def trainers(tmp_path_factory):
    """Ours, and TRL's own on the pairs of each kind: padded, and with TRL's own head."""
    folder = tmp_path_factory.mktemp("trainers")
    theirs = {
        kind: DPOTrainer(
            model(),
            model(1),
            config(folder, DPOConfig),
            train_dataset=Dataset.from_list(as_trl(kind)),
            processing_class=make_tokenizer(),
        )
        for kind in ("trace", "empty")
    }
    return trainer(folder, alpha=0.25), theirs


def run(made, **options):
    """Loss, gradients and metrics of the first micro-batch, with other attributes of the loss."""
    kept = {name: getattr(made, name) for name in options}
    for name, value in options.items():
        setattr(made, name, value)
    loss, grads = loss_and_gradients(made, first_batch(made))
    metrics = {name: values[0] for name, values in made._metrics["train"].items()}
    made._metrics["train"].clear()
    for name, value in kept.items():
        setattr(made, name, value)
    return loss, grads, metrics


@pytest.mark.parametrize("loss_type", LOSSES)
def test_each_kind_is_trls_own_loss(trainers, loss_type):
    ours, theirs = trainers
    smoothing = 0.1 if loss_type in ("exo_pair", "robust") else 0.0
    options = {"loss_types": [loss_type], "label_smoothing": smoothing}
    loss, grads, metrics = run(ours, **options)
    weighted, expected = 0.0, dict.fromkeys(grads, 0.0)
    for kind, weight, prefix in (("trace", 0.25, ""), ("empty", 0.75, "empty/")):
        kind_loss, kind_grads, kind_metrics = run(theirs[kind], **options)
        weighted = weighted + weight * kind_loss
        expected = {name: expected[name] + weight * grad for name, grad in kind_grads.items()}
        for name in set(kind_metrics) - {"num_tokens", "mean_token_accuracy"}:
            assert metrics[prefix + name] == pytest.approx(kind_metrics[name], rel=2e-3, abs=2e-4)
        assert metrics[f"{kind}/loss"] == pytest.approx(kind_loss.item(), rel=1e-4)
    torch.testing.assert_close(loss, weighted, rtol=1e-4, atol=1e-5)
    assert metrics["alpha"] == 0.25
    for name, grad in expected.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-3, atol=1e-4, msg=name)


def test_ld_alpha_and_f_divergence_are_trls(trainers):
    ours, theirs = trainers
    options = {"ld_alpha": 0.5, "f_divergence_type": "js_divergence"}
    kinds = [run(theirs[kind], **options)[0] for kind in ("trace", "empty")]
    torch.testing.assert_close(run(ours, **options)[0], 0.25 * kinds[0] + 0.75 * kinds[1])


def test_two_datasets_ids_and_messages_give_the_same_pairs(tmp_path):
    texts = trainer(tmp_path).train_dataset
    second = trainer(
        tmp_path,
        Dataset.from_list(as_trl("trace")),
        empty_dataset=Dataset.from_list(as_trl("empty")),
    ).train_dataset
    assert second[:] == texts[:]
    tokenizer = make_tokenizer()
    ids = [
        {
            name: tokenizer(text)["input_ids"] + ([] if name == "prompt" else [1])
            for name, text in row.items()
        }
        for row in rows()
    ]
    assert trainer(tmp_path, Dataset.from_list(ids)).train_dataset[:] == texts[:]
    messages = [
        {
            name: [{"role": "user" if name == "prompt" else "assistant", "content": text}]
            for name, text in row.items()
        }
        for row in rows()
    ]
    tokenizer.chat_template = R1_TEMPLATE
    made = BVPOTrainer(
        model(),
        model(1),
        config(tmp_path),
        Dataset.from_list(messages),
        processing_class=tokenizer,
    )
    row = made.train_dataset[0]
    # The template's forced marker gives way to the literal; nothing stands before the answer.
    assert tokenizer.decode(row["empty_prompt_ids"]) == (
        f"<|user|>{rows()[0]['prompt']}<|assistant|>{LITERAL}"
    )
    assert tokenizer.decode(row["empty_chosen_ids"]) == rows()[0]["empty_chosen"] + "<|im_end|>"


def test_training_moves_logs_and_evaluates(tmp_path):
    made = trainer(tmp_path, eval_dataset=Dataset.from_list(rows(2)), max_steps=3, reference=0)
    before = made.evaluate()
    made.train()
    log = made.state.log_history
    first = next(line for line in log if "loss" in line)
    assert first["loss"] == pytest.approx(0.6931, abs=1e-3)  # policy and reference agree
    expected = {
        "rewards/chosen",
        "rewards/rejected",
        "rewards/accuracies",
        "rewards/margins",
        "logps/chosen",
        "logps/rejected",
        "entropy",
        "logits/chosen",
        "logits/rejected",
        "num_tokens",
        "empty/rewards/margins",
        "trace/loss",
        "empty/loss",
        "alpha",
    }
    assert expected <= set(first)
    assert before["eval_loss"] == pytest.approx(0.6931, abs=1e-3)
    assert made.evaluate()["eval_rewards/margins"] > before["eval_rewards/margins"]


@pytest.mark.parametrize("peft", [False, True])
def test_precomputed_reference_changes_nothing(tmp_path, peft):
    from peft import LoraConfig

    def build(precompute):
        options = {"precompute_ref_log_probs": precompute}
        if peft:
            options["peft_config"] = LoraConfig(
                r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False
            )
        return trainer(tmp_path, reference=None if peft or precompute else 0, **options)

    now, before = build(False), build(True)
    assert "ref_chosen_logps" in before.train_dataset.column_names
    want = loss_and_gradients(now, first_batch(now))
    got = loss_and_gradients(before, first_batch(before))
    torch.testing.assert_close(got[0], want[0])
    assert got[1].keys() == want[1].keys()
    assert all(("lora" in name) == peft for name in got[1])
    for name, grad in want[1].items():
        torch.testing.assert_close(got[1][name], grad, rtol=1e-4, atol=1e-6)
    before.train()


def test_estimated_alpha_is_that_of_a_loop(tmp_path):
    """Two micro-batches of two units; the statistics are undone of the weight and the division."""
    made = trainer(
        tmp_path,
        max_steps=1,
        gradient_accumulation_steps=2,
        estimate_alpha=True,
        alpha=0.3,
        alpha_warmup=0,
        stats_cross="exact",
        learning_rate=0.0,
    )
    seen = []
    update = made._alpha.update
    made._alpha.update = lambda stats: (seen.append(stats), update(stats))
    made.train()
    (stats,) = seen
    grams = []
    loop = trainer(tmp_path)
    for row in loop.train_dataset:
        inputs = loop.data_collator([row])
        flat = []
        for alpha in (1.0, 0.0):
            loop.args.alpha = alpha
            grads = loss_and_gradients(loop, copy.copy(inputs))[1]
            flat.append(torch.cat([grad.flatten() for grad in grads.values()]))
        flat_KP = torch.stack(flat).double()
        grams.append(flat_KP @ flat_KP.T)
    want, got = torch.stack(grams), stats.gram_BKK
    # The training loop shuffles: units are told apart by the norms of their gradients.
    order = [found.argsort(dim=0)[:, 0] for found in (got[:, 0, :1], want[:, 0, :1])]
    torch.testing.assert_close(got[order[0]], want[order[1]], rtol=1e-3, atol=1e-6)
    star = made._alpha.estimate()
    assert star.raw != 0.3
    assert made.alpha == (min(0.98, max(0.02, star.weight)) if star.determined else 0.3)
    assert "alpha_star" in made.state.log_history[0]


def test_resume_goes_on_as_if_nothing_had_happened(tmp_path):
    options = {
        "estimate_alpha": True,
        "alpha_warmup": 1,
        "max_steps": 4,
        "save_steps": 2,
        "save_strategy": "steps",
        "stats_cross": "exact",
    }
    whole = trainer(tmp_path / "whole", **options)
    whole.train()
    again = trainer(tmp_path / "again", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert again.alpha == whole.alpha
    for a, b in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)
    (tmp_path / "whole" / "checkpoint-2" / "alpha.json").unlink()
    with pytest.raises(ValueError, match=r"resume_from_checkpoint: expected alpha\.json"):
        trainer(tmp_path / "again", **options).train(
            resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2")
        )


def test_an_infinite_loss_of_the_kind_without_weight_is_left_out(tmp_path):
    made = trainer(tmp_path, alpha=0.0)
    inputs = first_batch(made)
    # What a reference without mass on a response gives.
    for kind in ("trace", "empty"):
        scores = torch.full((2,), -torch.inf if kind == "trace" else -50.0)
        inputs[kind] |= {"ref_chosen_logps": scores, "ref_rejected_logps": scores}
    assert loss_and_gradients(made, inputs)[0].isfinite()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"alpha": 1.5}, "alpha: expected a number in"),
        ({"use_weighting": True}, "use_weighting"),
        ({"truncation_mode": "keep_end"}, "truncation_mode"),
        ({"estimate_alpha": True, "loss_type": ["aot"]}, "loss_type"),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_config_refuses_by_name(tmp_path, options, match):
    with pytest.raises(ValueError, match=match):
        config(tmp_path, **options)


def test_trainer_refuses_by_name(tmp_path):
    with pytest.raises(TypeError, match="args: expected a BVPOConfig"):
        BVPOTrainer(model(), None, config(tmp_path, DPOConfig), Dataset.from_list(rows()))
    with pytest.raises(ValueError, match=r"expected the columns .* got none of \['empty_chosen'"):
        trainer(tmp_path, Dataset.from_list(as_trl("trace")))
    with pytest.raises(ValueError, match="empty_dataset: expected 4 rows, got 3"):
        trainer(
            tmp_path,
            Dataset.from_list(as_trl("trace")),
            empty_dataset=Dataset.from_list(as_trl("empty", 3)),
        )
    with pytest.raises(TypeError, match=r"dataset: expected a datasets\.Dataset"):
        trainer(tmp_path, IterableDataset.from_generator(lambda: iter(rows())))
    with pytest.raises(ValueError, match="compute_metrics: expected None"):
        BVPOTrainer(
            model(),
            model(1),
            config(tmp_path),
            Dataset.from_list(rows()),
            processing_class=make_tokenizer(),
            compute_metrics=lambda _: {},
        )


def test_readme_trains_as_it_stands(tmp_path, monkeypatch):
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (snippet,) = [
        block
        for block in re.findall(r"```python\n(.*?)```", readme, flags=re.S)
        if "BVPOTrainer" in block
    ]
    assert len(snippet.strip().splitlines()) <= 10
    save_causal_lm(tmp_path / "my-model")
    write_lines(tmp_path / "pairs.jsonl", rows())
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    # Without a GPU, TRL's default of bf16 asks for that word.
    exec(snippet.replace('("out", ', '("out", use_cpu=True, '), scope)
    assert scope["trainer"].state.global_step == 3
    assert scope["trainer"].ref_model is not None
    assert scope["trainer"]._alpha.effective_steps > 0
