"""`score_batch` against the model's own logits, each response alone; and what it refuses."""

from itertools import pairwise

import grad_stats_cases as cases
import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Mamba2Config,
    Mamba2ForCausalLM,
)

from bvpo_kernels import GradStats, bvpo_loss, pack
from bvpo_kernels.integrations import scoring
from bvpo_kernels.integrations.scoring import loss_batch, score_batch
from bvpo_kernels.integrations.transformers import patch_model


def patched(**options):
    model = cases.model(**options)
    patch_model(model)
    return model


@torch.no_grad()
def own_scores(model, batch):
    """Sum of log-probabilities of the scored tokens of each segment, from its own logits."""
    scores = []
    for start, end in pairwise(batch.cu_seqlens.tolist()):
        tokens_1T, target_T = batch.tokens_T[None, start:end], batch.target_T[start:end]
        logp_TV = model(input_ids=tokens_1T, use_cache=False).logits[0].log_softmax(-1)
        logp_T = logp_TV.gather(1, target_T.clamp_min(0)[:, None])[:, 0]
        scores.append(logp_T.masked_fill(target_T < 0, 0).sum())
    return torch.stack(scores)


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_equals_the_models_own_logits(family, mode):
    model, batch = patched(family=family), pack(cases.units())
    getattr(model, mode)()
    scores_S = score_batch(model, batch)
    torch.testing.assert_close(scores_S.detach(), own_scores(model, batch), rtol=1e-6, atol=1e-6)
    assert scores_S.requires_grad
    assert model.training == (mode == "train")


@pytest.mark.parametrize("loss", ["dpo", "kto"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_loss_of_a_batch_is_that_of_its_scores(tied, loss):
    """Its gradients and statistics too, whether the head takes one pass or computes tiles again."""
    found = []
    for one_pass in (True, False):
        model, batch = patched(tied=tied), pack(cases.units(2))
        reference_S = score_batch(model, batch).detach() + 0.5
        stats = GradStats(model)
        with stats.collect(batch):
            if one_pass:
                result = loss_batch(model, batch, reference_S, 0.3, loss=loss, beta=0.7)
                assert result.one_pass == (loss == "dpo")
            else:
                scores_S = score_batch(model, batch)
                result = bvpo_loss(scores_S, reference_S, batch, 0.3, loss=loss, beta=0.7)
            result.loss.backward()
        gradients = [p.grad for p in model.parameters()]
        found.append([result.loss.detach(), stats.result().gram_BKK, *gradients])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-9)


def test_models_with_positions_of_their_own():
    config = GPT2Config(vocab_size=cases.VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    model, batch = GPT2LMHeadModel(config).double().eval(), pack(cases.units())
    patch_model(model)
    torch.testing.assert_close(
        score_batch(model, batch).detach(), own_scores(model, batch), rtol=1e-6, atol=1e-6
    )


class Wrapped(torch.nn.Module):
    """As DDP wraps a model."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def test_models_that_are_wrapped():
    model, batch = patched(), pack(cases.units())
    expected = score_batch(model, batch)
    assert torch.equal(score_batch(Wrapped(model), batch), expected)
    scores_S = loss_batch(Wrapped(model), batch, expected, 0.5).scores_S
    torch.testing.assert_close(scores_S, expected.detach())
    peft = pytest.importorskip("peft", reason="peft is not installed")
    lora = peft.get_peft_model(cases.model(), peft.LoraConfig(target_modules=["q_proj"]))
    patch_model(lora)
    torch.testing.assert_close(score_batch(lora.double(), batch), expected)


def test_inside_a_collection():
    """The first call of a model, and so the check, may be a measured one."""
    model, batch = patched(num_hidden_layers=1), pack(cases.units())
    stats = GradStats(model)
    with stats.collect(batch):
        scores_S = score_batch(model, batch)
        bvpo_loss(scores_S, 0.9 * scores_S.detach(), batch, 0.5).loss.backward()
    assert stats.result().gram_BKK.diagonal(dim1=1, dim2=2).gt(0).all()


def test_checked_once(monkeypatch):
    calls = []
    monkeypatch.setattr(scoring, "require_separate_segments", calls.append)
    model, batch = patched(num_hidden_layers=1), pack(cases.units())
    for _ in range(3):
        score_batch(model, batch)
    assert len(calls) == 1
    model.set_attn_implementation("eager")
    score_batch(model, batch)
    assert len(calls) == 2


def test_refuses_a_model_that_is_not_patched():
    batch = pack(cases.units(1))
    for model in (cases.model(num_hidden_layers=1), torch.nn.Linear(2, 2)):
        with pytest.raises(TypeError, match=r"after patch_model\(model\), got L"):
            score_batch(model, batch)
    with pytest.raises(ValueError, match=r"expected one on the model's device cpu, got meta"):
        score_batch(patched(num_hidden_layers=1), batch.to("meta"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_refuses_models_that_mix_segments(dtype):
    sizes = {"vocab_size": cases.VOCAB, "hidden_size": 32}
    models = [
        BloomForCausalLM(BloomConfig(**sizes, n_layer=1, n_head=4)),  # positions by ALiBi
        Mamba2ForCausalLM(
            Mamba2Config(
                **sizes,
                num_hidden_layers=1,
                num_heads=8,
                head_dim=8,
                state_size=8,
                n_groups=1,
                chunk_size=4,
            )
        ),
    ]
    for model in models:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        model.to(dtype).eval()
        patch_model(model)
        name = type(model).__name__
        with pytest.raises(ValueError, match=f"{name} mixes the segments"):
            score_batch(model, pack(cases.units(1)))
