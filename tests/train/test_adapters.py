"""LoRA runs: what is trained and measured, where the reference scores come from, what is saved."""

import copy
import math

import pytest
import torch
from tiny_runs import make_cfg, make_units, merged_weights, naive_score, tiny_model
from transformers import AutoModelForCausalLM, Qwen3Config

from bvpo_kernels.packing import pack, segment_sum
from bvpo_kernels.types import KINDS
from train.config import AdapterConfig, AlphaConfig, EstimateConfig
from train.model import adapters
from train.model.adapters import adapters_off, add_adapters, is_adapter
from train.model.head import FusedHeadLM, build_policy
from train.trainer import Trainer

peft = pytest.importorskip("peft", reason="peft is not installed")


def adapted(head=False, dtype=torch.float32, moved=False, **options):
    """A tiny Qwen3 with LoRA of rank 3; `moved`: as after some training."""
    model = add_adapters(
        tiny_model(Qwen3Config, dtype, tie_word_embeddings=False),
        AdapterConfig(rank=3, alpha=6.0, head=head, **options),
        seed=0,
    )
    if moved:
        torch.manual_seed(2)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".lora_B." in name:
                    parameter.normal_(std=0.1)
    return model.to(dtype)


def adapter_names(model):
    return sorted(name for name, p in model.named_parameters() if p.requires_grad)


def test_all_linear_layers_but_the_head():
    names = adapter_names(adapted())
    assert len(names) == 2 * 2 * 7  # A and B, two layers, q k v o gate up down
    assert all(is_adapter(name) for name in names)
    assert not any("lm_head" in name for name in names)
    with_head = adapter_names(adapted(head=True))
    added = sorted(set(with_head) - set(names))
    assert [name.rpartition("lm_head.")[2] for name in added] == [
        "lora_A.default.weight",
        "lora_B.default.weight",
    ]


def test_targets_by_name_and_what_is_refused():
    assert len(adapter_names(adapted(targets=["q_proj", "v_proj"]))) == 2 * 2 * 2
    one = adapter_names(adapted(targets="model.layers.1.mlp.up_proj", head=True))
    assert len(one) == 4
    for options, message in [
        ({"targets": ["q_proj", "none"]}, r"adapter.targets: .*'q_proj'.* got 'none'"),
        ({"targets": ["lm_head"]}, r"adapter.targets: .*got the LM head \['lm_head'\]"),
        ({"rank": 0}, r"adapter.rank: expected an integer >= 1, got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            add_adapters(tiny_model(), AdapterConfig(**options), seed=0)
    with pytest.raises(ValueError, match=r"adapter.head: expected false for Llama.*tied"):
        add_adapters(tiny_model(tie_word_embeddings=True), AdapterConfig(head=True), seed=0)


def test_a_new_adapter_changes_nothing_and_comes_from_the_seed_alone():
    base, units = tiny_model(Qwen3Config, tie_word_embeddings=False), make_units(3)
    model = adapted()
    again = add_adapters(copy.deepcopy(base), AdapterConfig(rank=3, alpha=6.0), seed=0)
    other = add_adapters(copy.deepcopy(base), AdapterConfig(rank=3, alpha=6.0), seed=1)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name))
        if ".lora_A." in name:
            assert not torch.equal(parameter, other.get_parameter(name))
            bound = 1 / math.sqrt(parameter.shape[1])
            assert 0.8 * bound < parameter.abs().max() <= bound
            assert abs(parameter.mean()) < 0.2 * bound
    batch = pack(units)
    with torch.no_grad():  # else the frozen head and the trained one take different schedules
        assert torch.equal(FusedHeadLM(model)(batch), FusedHeadLM(base)(batch))


def test_adding_leaves_the_generator_untouched():
    model = tiny_model()
    before = torch.get_rng_state()
    add_adapters(model, AdapterConfig(rank=3), seed=0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("head", [False, True])
def test_scores_and_gradients_equal_segments_alone(head):
    model, units = adapted(head, torch.float64, moved=True), make_units(3)
    policy, batch = FusedHeadLM(model), pack(make_units(3))
    policy.self_check()
    weights_S = torch.linspace(-1, 1, batch.num_segments, dtype=torch.float64)
    scores_S = segment_sum(policy(batch), batch.cu_seqlens)
    (scores_S @ weights_S).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    pairs = [pair for unit in units for kind in KINDS for pair in unit.pairs[kind]]
    naive_S = torch.stack(
        [naive_score(model, p.prompt, ids) for p in pairs for ids in (p.chosen, p.rejected)]
    )
    torch.testing.assert_close(scores_S, naive_S, rtol=1e-6, atol=1e-6)
    (naive_S @ weights_S).backward()
    assert sorted(found) == adapter_names(model)
    for name, gradient in found.items():
        expected = model.get_parameter(name).grad
        scale = expected.abs().max().item()
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6 * scale, msg=name)


def make_run(tmp_path, reference="cache", head=False, **options):
    """A trainer of a LoRA run, with a second model where the reference asks for one."""
    cfg = make_cfg(tmp_path, **options)
    cfg.model.name, cfg.reference = "tiny", reference
    cfg.adapter = AdapterConfig(rank=3, alpha=6.0, head=head)
    cfg.optim.lr = 0.03
    policy = FusedHeadLM(adapted(head))
    frozen = FusedHeadLM(adapted(head)) if reference == "frozen_copy" else None
    return cfg, policy, frozen


@pytest.mark.parametrize("loss", ["dpo", "kto"])
@pytest.mark.parametrize("head", [False, True])
def test_references_are_the_same(tmp_path, head, loss):
    """Three steps that move the weights far: equal lines and weights, and log 2 at the start."""
    results = {}
    for reference in ("cache", "frozen_copy", "adapter_off"):
        cfg, policy, frozen = make_run(tmp_path / reference, reference, head)
        cfg.loss.name = loss
        trainer = Trainer(cfg, policy, None, make_units(13), make_units(2, seed=5), frozen=frozen)
        generator = torch.get_rng_state()
        lines = [trainer.train_step(step) for step in range(3)]
        held_out = trainer.evaluate(_Silent(), 3)
        assert torch.equal(torch.get_rng_state(), generator)
        assert [p.requires_grad for p in policy.parameters()] == [
            is_adapter(name) for name, _ in policy.named_parameters()
        ]
        results[reference] = (lines, held_out, dict(policy.named_parameters()))
    expected_lines, expected_eval, weights = results["cache"]
    if loss == "dpo":
        assert expected_lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert abs(expected_lines[-1]["trace/rewards/margins"]) > 1e-3
    for reference in ("frozen_copy", "adapter_off"):
        lines, held_out, found = results[reference]
        assert lines[0]["loss"] == expected_lines[0]["loss"]
        for line, expected in zip(lines, expected_lines, strict=True):
            for name in ("loss", "grad_norm", "trace/rewards/margins", "empty/loss"):
                assert line[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-6), name
        assert held_out == pytest.approx(expected_eval, rel=1e-4, abs=1e-5)
        for name, parameter in weights.items():
            torch.testing.assert_close(found[name], parameter, rtol=1e-3, atol=1e-5, msg=name)


class _Silent:
    def write(self, event, step, metrics):
        pass


def test_a_frozen_copy_serves_runs_without_adapters(tmp_path):
    results = []
    for reference in ("cache", "frozen_copy"):
        cfg = make_cfg(tmp_path / reference)
        cfg.reference = reference
        frozen = FusedHeadLM(tiny_model()) if reference == "frozen_copy" else None
        policy = FusedHeadLM(tiny_model())
        trainer = Trainer(cfg, policy, None, make_units(9), [], frozen=frozen)
        results.append([trainer.train_step(step)["loss"] for step in range(2)])
        assert (cfg.reference == "cache") == (tmp_path / reference).exists()
        if frozen is not None:
            assert all(p.grad is None and not p.requires_grad for p in frozen.parameters())
    assert results[0] == pytest.approx(results[1], rel=1e-6)


@pytest.mark.parametrize("head", [False, True])
def test_off_is_the_base_model_and_comes_back(head):
    model = adapted(head, moved=True)
    policy, batch = FusedHeadLM(model), pack(make_units(3))
    base = FusedHeadLM(adapted(head))
    trained = adapter_names(model)
    with torch.no_grad():
        before = policy(batch)
        with adapters_off(model):
            # FSDP2 takes this flag from a parameter at its first use, whatever is done later.
            assert adapter_names(model) == trained
            assert torch.equal(policy(batch), base(batch))
        assert torch.equal(policy(batch), before)
        with pytest.raises(RuntimeError, match="stop"), adapters_off(model):
            raise RuntimeError("stop")
        assert torch.equal(policy(batch), before)
    assert adapter_names(model) == trained


@pytest.mark.parametrize("tokens", [160, 4000], ids=["several micro-batches", "one"])
@pytest.mark.parametrize("reference", ["cache", "adapter_off"])
def test_statistics_of_adapters_are_those_of_single_units(tmp_path, tokens, reference):
    """The loop's Gram matrix against a backward per unit and kind, each packed alone."""
    cfg, policy, _ = make_run(tmp_path, reference, tokens_per_micro_batch=tokens)
    cfg.alpha = AlphaConfig(estimate=EstimateConfig(warmup=2, cross="exact"))
    units = make_units(4)
    trainer = Trainer(cfg, policy, None, units, [])
    assert trainer.stats is not None
    assert trainer.stats.coverage.share == 1.0
    with torch.no_grad():  # at B = 0 the gradients of A are zero
        for name, parameter in policy.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.05)
    trained = [p for p in policy.parameters() if p.requires_grad]
    step = trainer.plan[0]
    gradients = []
    for unit in step.units:
        for kind in KINDS:
            batch = pack([unit])
            scores_S = segment_sum(policy(batch), batch.cu_seqlens)
            with torch.no_grad(), adapters_off(policy.model):
                reference_S = segment_sum(policy(batch), batch.cu_seqlens)
            margin_P = (scores_S - reference_S).view(-1, 2) @ torch.tensor([1.0, -1.0])
            mine = batch.pair_kind_P == batch.kinds.index(kind)
            loss = -torch.nn.functional.logsigmoid(cfg.loss.beta * margin_P[mine]).sum()
            grads = torch.autograd.grad(loss, trained)
            gradients.append(torch.cat([g.flatten().double() for g in grads]))
    grads_BKP = torch.stack(gradients).unflatten(0, (len(units), len(KINDS)))
    gram_BKK = torch.einsum("bkp,blp->bkl", grads_BKP, grads_BKP)
    seen = {}
    trainer.alpha.update = lambda stats: seen.update(stats=stats)
    trainer.train_step(0)
    order = [unit.unit_id for micro in step.micro_batches for unit in micro.units]
    index = [[unit.unit_id for unit in step.units].index(name) for name in order]
    expected = gram_BKK[index]
    scale = expected.diagonal(dim1=1, dim2=2).sqrt()
    close = 1e-3 * scale[:, :, None] * scale[:, None, :]
    assert ((seen["stats"].gram_BKK - expected).abs() <= close).all()
    assert (scale > 0).all()


def test_options_that_do_not_go_together_are_refused_before_a_model_is_loaded(tmp_path):
    cfg = make_cfg(tmp_path)
    cfg.model.name = "no such model"
    cfg.reference = "adapter_off"
    with pytest.raises(ValueError, match="reference: 'adapter_off' expects an adapter"):
        build_policy(cfg)
    cfg.adapter = AdapterConfig(head=True)
    cfg.train.tail_tolerance = 0.01
    with pytest.raises(ValueError, match=r"adapter.head: expected false with train.tail_tol"):
        build_policy(cfg)
    cfg.alpha.estimate = EstimateConfig()
    with pytest.raises(ValueError, match=r"adapter.head: expected false with alpha.estimate"):
        build_policy(cfg)


@pytest.mark.parametrize("head", [False, True])
def test_a_run_leaves_the_merged_model_and_the_adapter(tmp_path, head):
    cfg, policy, _ = make_run(tmp_path, "adapter_off", head)
    units = make_units(9)
    Trainer(cfg, policy, None, units, []).run()
    batch = pack(units)
    expected_T = policy(batch)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(FusedHeadLM(merged)(batch), expected_T, rtol=1e-4, atol=1e-4)
    base = tiny_model(Qwen3Config, tie_word_embeddings=False)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(FusedHeadLM(loaded)(batch), expected_T, rtol=1e-5, atol=1e-5)
    weights = merged_weights(policy.model)
    assert weights.keys() == merged.state_dict().keys()
    plain = tiny_model()
    assert merged_weights(plain).keys() == plain.state_dict().keys()


def test_missing_peft_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ImportError, match="adapter: expected peft to be installed"):
        adapters.add_adapters(tiny_model(), AdapterConfig(), seed=0)
