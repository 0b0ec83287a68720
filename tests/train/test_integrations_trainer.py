"""`patch_model` under a plain transformers.Trainer: the same training and evaluation, no logits."""

import numpy as np
import pytest
import torch
import transformers as hf
from causal_lms import make

from bvpo_kernels.integrations.transformers import patch_model


def rows(count, seed):
    """Of one length, as Trainer's default collator wants them; prompts are not scored."""
    ids = torch.randint(3, 97, (count, 12), generator=torch.Generator().manual_seed(seed))
    return [
        {"input_ids": row, "labels": torch.where(torch.arange(12) < 3 + n % 4, -100, row)}
        for n, row in enumerate(ids)
    ]


def trained(folder, prepare, **options):
    """(trainer, losses, evaluation) of four steps over the same four rows."""
    model = make(initializer_range=0.1).train()
    prepare(model)
    arguments = hf.TrainingArguments(
        folder,
        max_steps=4,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=3,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=3,
    )
    trainer = hf.Trainer(
        model, arguments, train_dataset=rows(4, 0), eval_dataset=rows(7, 1), **options
    )
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return trainer, losses, trainer.evaluate()


@pytest.fixture
def calls(monkeypatch):
    """How often the LM head's own forward, which makes the logits, ran."""
    seen = []
    forward = torch.nn.Linear.forward

    def counted(self, x):
        if self.out_features == 97:
            seen.append(x.shape)
        return forward(self, x)

    monkeypatch.setattr(torch.nn.Linear, "forward", counted)
    return seen


def test_always_trains_and_evaluates_as_the_model_itself_without_logits(tmp_path, calls):
    own, losses, found = trained(tmp_path, lambda model: None)
    assert len(calls) > 0
    fused, fused_losses, fused_found = trained(
        tmp_path, lambda model: (patch_model(model, always=True), calls.clear())
    )
    assert len(calls) == 0
    assert len(losses) == 4
    assert fused_losses == pytest.approx(losses, rel=1e-4)
    assert fused_losses[-1] < 0.9 * fused_losses[0]
    assert fused_found["eval_loss"] == pytest.approx(found["eval_loss"], rel=1e-4)
    for a, b in zip(fused.model.parameters(), own.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_without_always_a_trainer_finds_the_models_own_forward(tmp_path, calls):
    _, losses, found = trained(tmp_path, lambda model: None)
    own_calls = len(calls)
    _, same_losses, same_found = trained(
        tmp_path, lambda model: (patch_model(model), calls.clear())
    )
    assert len(calls) == own_calls
    assert same_losses == losses
    assert same_found["eval_loss"] == found["eval_loss"]


def test_metrics_are_given_log_probabilities(tmp_path):
    """What the docstring says that `compute_metrics` gets: of each label's token, and a mask."""
    seen = {}

    def metrics(result):
        (logp, mask), labels = result.predictions, result.label_ids
        assert logp.shape == mask.shape == labels[:, 1:].shape
        assert np.array_equal(mask, labels[:, 1:] != -100)
        seen["nll"] = -logp[mask].mean()
        return {"nll": seen["nll"]}

    _, _, found = trained(
        tmp_path, lambda model: patch_model(model, always=True), compute_metrics=metrics
    )
    assert found["eval_nll"] == seen["nll"]
    # Trainer's loss is a mean over batches of means; of equal counts here but for the last.
    assert found["eval_nll"] == pytest.approx(found["eval_loss"], rel=0.1)


def test_always_refuses_a_model_with_a_loss_of_its_own():
    """Bart's decoder does not shift the labels; scores by fused_lm_head=True are served."""
    config = hf.BartConfig(
        vocab_size=97,
        d_model=24,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=16,
        max_position_embeddings=64,
        init_std=0.3,
    )
    model = hf.BartForCausalLM(config).eval()
    with pytest.raises(ValueError, match=r"always: expected a model whose loss is the mean over"):
        patch_model(model, always=True)
    patch_model(model)
