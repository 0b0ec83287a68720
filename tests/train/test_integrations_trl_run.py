"""`BVPOTrainer` in training: precision, resuming, and what stands in the way of an estimate."""

import json
import os
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed")

from datasets import Dataset
from ranks import RANKS, spawn
from tiny_chat import make_tokenizer, save_causal_lm, tiny_config
from tiny_trl import config, first_batch, loss_and_gradients, model, rows, trainer
from transformers import AutoModelForCausalLM, Starcoder2Config

from bvpo_kernels.integrations import transformers as patched
from bvpo_kernels.integrations import trl_checks, trl_head
from bvpo_kernels.integrations.trl import BVPOTrainer

LN2 = 0.69315


def lora():
    from peft import LoraConfig

    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"])


def logged(made, name):
    return {line["step"]: line[name] for line in made.state.log_history if name in line}


def is_start(metrics, prefix=""):
    """ln 2 and rewards of 0: the same weights, scored by the same arithmetic (a frozen head is
    summed in another order in a step; bf16 against fp32 is off by 1e-2)."""
    assert metrics[f"{prefix}loss"] == pytest.approx(LN2, abs=1e-4)
    rewards = [v for k, v in metrics.items() if k.endswith(("rewards/chosen", "rewards/rejected"))]
    assert rewards == pytest.approx([0.0] * 4, abs=1e-5)


@pytest.mark.parametrize("estimate_alpha", [False, True])
@pytest.mark.parametrize("reference", ["given", "by TRL", "kept", "adapters off", "own adapter"])
def test_the_default_precision_starts_at_ln_2(tmp_path, reference, estimate_alpha):
    """bf16 autocast over fp32 weights; before the policy is wrapped in it, and after."""
    options = {"reference": None, "policy": model(0)}
    if reference == "given":
        options["reference"] = 0
    elif reference == "by TRL":
        options["policy"] = str(save_causal_lm(tmp_path / "model"))
    elif reference == "kept":
        options["precompute_ref_log_probs"] = True
    elif reference == "adapters off":
        options["peft_config"] = lora()
    else:
        import peft

        options["policy"] = peft.get_peft_model(model(0), lora())
    made = trainer(
        tmp_path,
        bf16=True,
        max_steps=1,
        estimate_alpha=estimate_alpha,
        eval_dataset=Dataset.from_list(rows(2)),
        **options,
    )
    is_start(made.evaluate(), "eval_")
    made.train()
    is_start(made.state.log_history[0])


def test_a_reference_that_trl_makes_computes_as_the_policy_does(tmp_path):
    """An instance does not come from `model_init_kwargs`, but TRL's reference does."""
    save_causal_lm(tmp_path / "model")
    policy = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.bfloat16, attn_implementation="eager"
    )
    made = trainer(
        tmp_path,
        policy=policy,
        reference=None,
        max_steps=1,
        model_init_kwargs={"dtype": "float32", "attn_implementation": "sdpa"},
    )
    assert made.ref_model.dtype == torch.bfloat16
    assert made.ref_model.config._attn_implementation == "eager"
    made.train()
    is_start(made.state.log_history[0])


def test_a_given_reference_that_computes_otherwise_is_named():
    other = model(1).to(torch.bfloat16)
    with pytest.warns(
        UserWarning, match=r"ref_model: expected the dtype .*float32, got .*bfloat16"
    ):
        trl_checks.align_reference(model(0), other, given=True)
    assert other.dtype == torch.bfloat16


def test_kept_scores_are_those_of_their_precision(tmp_path):
    """TRL's cache goes by rows and weights: the second run would find the first one's."""
    prepared = trainer(tmp_path).train_dataset
    names = ("ref_chosen_logps", "ref_rejected_logps")
    for bf16 in (False, True):
        made = trainer(tmp_path, prepared, model(0), None, bf16=bf16, precompute_ref_log_probs=True)
        batch = first_batch(made)
        kept = [torch.stack([batch[kind][n] for kind in ("trace", "empty")], 1) for n in names]
        for got, want in zip(kept, made.compute_ref_log_probs(made.model, batch), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-4)


def test_a_sharded_reference_scores_the_same(tmp_path):
    """FSDP2 goes around the patched model, as TRL's `prepare_fsdp` has it."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    made = trainer(tmp_path)
    batch = first_batch(made)
    want = made.compute_ref_log_probs(made.ref_model, batch)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(made.ref_model, mesh=dist.init_device_mesh("cpu", (1,)))
        got = made.compute_ref_log_probs(made.ref_model, batch)
    finally:
        dist.destroy_process_group()
    assert all(map(torch.equal, got, want))


def test_attention_for_half_precision_serves_the_default_precision(tmp_path, monkeypatch):
    """fp32 weights under autocast: what probes them before cannot use such an attention."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel

    def half_only(module, query, *args, **options):
        if query.dtype == torch.float32 and not torch.is_autocast_enabled("cpu"):
            raise RuntimeError("only fp16 and bf16 are supported")
        return sdpa_attention_forward(module, query, *args, **options)

    name = "flash_like"
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, name, half_only)
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, name, sdpa_mask)
    # Else transformers looks for a package of that name.
    monkeypatch.setattr(
        PreTrainedModel, "_check_and_adjust_attn_implementation", lambda _, name, **__: name
    )
    models = model(0), model(0)
    for made in models:
        made.config._attn_implementation_internal = name
        made.train()
    made = BVPOTrainer(
        models[0],
        models[1],
        config(tmp_path, bf16=True, max_steps=1),
        Dataset.from_list(rows()),
        processing_class=make_tokenizer(),
    )
    assert {m.config._attn_implementation for m in models} == {name}
    made.train()
    is_start(made.state.log_history[0])


def test_a_reference_of_another_architecture_is_checked(tmp_path):
    other = AutoModelForCausalLM.from_config(tiny_config(num_hidden_layers=1))
    other.model.layers[0].mlp.register_forward_hook(lambda _, __, y: y + y.mean(1, keepdim=True))
    with pytest.raises(ValueError, match="mixes the segments"):
        BVPOTrainer(
            model(),
            other,
            config(tmp_path),
            Dataset.from_list(rows()),
            processing_class=make_tokenizer(),
        )


def test_another_trl_is_refused_by_its_version(monkeypatch):
    monkeypatch.delattr(trl_head.dpo_trainer, "add_fused_lm_head")
    with (
        pytest.raises(ImportError, match=r"trl: expected version 1\.15 or 1\.16, got"),
        trl_head.in_place_of_trls(lambda model: None),
    ):
        pass


@pytest.mark.parametrize(
    ("mode", "cross", "accumulate"),
    [
        ("exact", "sketch", 2),
        ("exact", "exact", 2),
        ("exact", "none", 1),
        ("sketch", "sketch", 2),
        ("norm", "sketch", 2),
    ],
)
def test_a_resumed_run_measures_what_an_uninterrupted_one_does(tmp_path, mode, cross, accumulate):
    options = {
        "estimate_alpha": True,
        "alpha_warmup": 1,
        "stats_mode": mode,
        "stats_cross": cross,
        "gradient_accumulation_steps": accumulate,
        "max_steps": 4,
        "save_steps": 2,
        "save_strategy": "steps",
        "seed": 5,
        "sketch_size": 4,
        "learning_rate": 1e-4,
    }
    whole = trainer(tmp_path / "whole", **options)
    whole.train()
    again = trainer(tmp_path / "again", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for name in ("alpha", "alpha_raw"):
        want = logged(whole, name)
        assert set(want) == {1, 2, 3, 4}
        assert logged(again, name) == want
    assert again._stats.state_dict() == whole._stats.state_dict()


def test_a_checkpoint_without_the_step_of_the_sketches_is_named(tmp_path):
    options = {"estimate_alpha": True, "save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    trainer(tmp_path, **options).train()
    path = tmp_path / "checkpoint-1" / "alpha.json"
    state = json.loads(path.read_text())
    del state["stats"]
    path.write_text(json.dumps(state))
    with pytest.warns(UserWarning, match="left out the step of the sketches"):
        trainer(tmp_path, **{**options, "max_steps": 2}).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"alpha": 0.0}, r"^alpha: expected a number in \(0, 1\)"),
        ({"alpha": 1.0}, r"^alpha: expected a number in \(0, 1\)"),
        ({"alpha_low": 0.0}, r"^alpha_low: expected a number in \(0, 1\)"),
        ({"alpha_high": 1.0}, r"^alpha_high: expected a number in \(0, 1\)"),
        ({"alpha_high": float("nan")}, r"^alpha_high: expected a number in \(0, 1\)"),
        ({"alpha_low": 0.9, "alpha_high": 0.8}, "^alpha_low: expected at most alpha_high = 0.8"),
        ({"alpha_halflife": 0}, "^alpha_halflife: expected a number of steps > 0"),
        ({"alpha_warmup": -1}, "^alpha_warmup: expected an int >= 0, got -1"),
        ({"sketch_size": 0}, "^sketch_size: expected an int >= 1, got 0"),
        ({"stats_mode": "fast"}, "^stats_mode: expected one of .*'norm'.* got 'fast'"),
        ({"stats_cross": "all"}, "^stats_cross: expected one of .*'none'.* got 'all'"),
        ({"stats_cross": "none", "gradient_accumulation_steps": 2}, "^stats_cross: 'none'"),
        ({"per_device_train_batch_size": 1}, "^per_device_train_batch_size: expected at least 2"),
        ({"disable_dropout": False}, "^disable_dropout: False cannot be served"),
    ],
)
def test_what_makes_an_estimate_impossible_is_refused_with_the_options(tmp_path, options, match):
    with pytest.raises(ValueError, match=match):
        config(tmp_path, estimate_alpha=True, **options)


def test_ranks_that_share_units_are_refused_with_an_estimate(tmp_path):
    made = config(tmp_path, estimate_alpha=True)
    trl_checks.check_estimate(made)
    made.parallelism_config = SimpleNamespace(tp_size=1, cp_size=2)
    with pytest.raises(ValueError, match=r"parallelism_config: expected sizes of 1 .*'cp_size': 2"):
        trl_checks.check_estimate(made)


def test_without_an_estimate_these_are_served(tmp_path):
    options = {"alpha_low": 0.0, "per_device_train_batch_size": 1, "stats_cross": "none"}
    for alpha in (0.0, 1.0):
        config(tmp_path, alpha=alpha, gradient_accumulation_steps=2, **options)
    # Units of a step, not of a micro-batch.
    config(
        tmp_path, estimate_alpha=True, per_device_train_batch_size=1, gradient_accumulation_steps=2
    )


def test_too_few_rows_are_refused_before_anything_is_scored(tmp_path, monkeypatch):
    def score(*_):
        raise AssertionError("scored")

    monkeypatch.setattr("bvpo_kernels.integrations.trl.BVPOTrainer.compute_ref_log_probs", score)
    with pytest.raises(ValueError, match="train_dataset: expected at least 2 rows"):
        trainer(
            tmp_path,
            Dataset.from_list(rows(1)),
            reference=None,
            estimate_alpha=True,
            precompute_ref_log_probs=True,
        )


def test_a_batch_size_that_was_found_is_checked_as_well(tmp_path):
    made = trainer(tmp_path, estimate_alpha=True)
    made.get_train_dataloader()
    made._train_batch_size = 1  # what `auto_find_batch_size` does
    with pytest.raises(ValueError, match=r"per_device_train_batch_size: .* got 1 x 1"):
        made.get_train_dataloader()


def collected(made):
    """The statistics that the estimator takes in."""
    seen, update = [], made._alpha.update
    made._alpha.update = lambda stats: (seen.append(stats), update(stats))
    return seen


@pytest.mark.parametrize("cross", ["exact", "sketch"])
def test_an_uneven_last_micro_batch_gives_what_one_batch_gives(tmp_path, cross):
    """Three rows as 2 and 1: TRL's mean weights the last unit twice, the statistics do not."""
    options = {
        "estimate_alpha": True,
        "stats_cross": cross,
        "sketch_size": 300,
        "max_steps": -1,
        "num_train_epochs": 1,
    }
    found = []
    for batch_size, accumulate in ((2, 2), (3, 1)):
        made = trainer(
            tmp_path,
            Dataset.from_list(rows(3)),
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulate,
            **options,
        )
        seen = collected(made)
        made.train()
        assert made.state.global_step == len(seen) == 1
        found.append(seen[0])
    parts, whole = found
    torch.testing.assert_close(parts.gram_BKK, whole.gram_BKK, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(parts.sums_KK, whole.sums_KK, rtol=1e-4, atol=1e-6)


def test_an_uneven_epoch_trains_as_without_an_estimate(tmp_path):
    """Seven rows as 2 + 2 and 2 + 1; the weight stays that of the warm-up."""
    options = {
        "gradient_accumulation_steps": 2,
        "max_steps": -1,
        "num_train_epochs": 1,
        "optim": "sgd",
        "learning_rate": 0.1,
        "max_grad_norm": 0.0,
    }
    weights = []
    for estimate_alpha in (False, True):
        made = trainer(
            tmp_path,
            Dataset.from_list(rows(7)),
            estimate_alpha=estimate_alpha,
            stats_cross="exact",
            **options,
        )
        made.train()
        assert made.state.global_step == 2
        weights.append(torch.cat([p.detach().flatten() for p in made.model.parameters()]))
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-4, atol=1e-5)


def test_a_last_step_of_one_unit_is_trained_and_not_measured(tmp_path):
    made = trainer(
        tmp_path, Dataset.from_list(rows(3)), estimate_alpha=True, max_steps=-1, num_train_epochs=2
    )
    seen = collected(made)
    made.train()
    assert made.state.global_step == 4
    assert [stats.num_units for stats in seen] == [2, 2]


def test_repeated_rows_in_every_step_are_refused():
    args = SimpleNamespace(
        world_size=2,
        gradient_accumulation_steps=2,
        stats_mode="exact",
        stats_cross="exact",
        dataloader_drop_last=False,
    )
    for served in (4, 8, 9, 12):
        trl_checks.check_units(args, 2, served)
    for refused in (2, 5, 7):
        with pytest.raises(ValueError, match="train_dataset: expected a multiple of 4 rows, or"):
            trl_checks.check_units(args, 2, refused)


def measure_on_a_rank(rank, folder):
    """Ten rows in steps of eight: the second one repeats two."""
    os.environ["LOCAL_RANK"], os.environ["MASTER_PORT"] = str(rank), "0"
    made = trainer(
        folder,
        Dataset.from_list(rows(10)),
        reference=0,
        bf16=True,
        estimate_alpha=True,
        stats_cross="exact",
        gradient_accumulation_steps=2,
        max_steps=-1,
        num_train_epochs=1,
    )
    assert made.accelerator.num_processes == RANKS
    seen = collected(made)
    made.train()
    assert made.state.global_step == 2
    assert [stats.num_units for stats in seen] == [8]
    if rank == 0:
        is_start(made.state.log_history[0])
    (folder / f"{rank}.json").write_text(json.dumps([made.alpha, seen[0].sums_KK.tolist()]))


@pytest.mark.slow
def test_two_ranks_measure_the_same_and_no_repeated_rows(tmp_path):
    spawn(measure_on_a_rank, tmp_path)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(RANKS))
    assert first == second


def test_a_step_that_was_given_up_leaves_nothing_behind(tmp_path, monkeypatch):
    made = trainer(
        tmp_path, estimate_alpha=True, gradient_accumulation_steps=2, max_steps=1, seed=3
    )
    fresh = trainer(
        tmp_path, estimate_alpha=True, gradient_accumulation_steps=2, max_steps=1, seed=3
    )
    compute, calls = made.compute_loss, []

    def fails_once(*args, **kwargs):
        calls.append(None)
        if len(calls) == 2:
            raise MemoryError
        return compute(*args, **kwargs)

    monkeypatch.setattr(made, "compute_loss", fails_once)
    with pytest.raises(MemoryError):
        made.train()
    made.model.zero_grad()
    seen, want = collected(made), collected(fresh)
    made.train()
    fresh.train()
    assert torch.equal(seen[0].sums_KK, want[0].sums_KK)


def test_dropout_that_is_a_number_is_off_in_a_step(tmp_path):
    sizes = {name: value for name, value in model().config.to_dict().items() if "size" in name}
    options = Starcoder2Config(
        **sizes,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        residual_dropout=0.3,
        embedding_dropout=0.3,
        attention_dropout=0.3,
        pad_token_id=0,
    )
    made_of = []
    for _ in range(2):
        torch.manual_seed(0)
        made_of.append(AutoModelForCausalLM.from_config(options))
    made = trainer(tmp_path, policy=made_of[0], reference=None, precompute_ref_log_probs=True)
    made.model.train()
    first, second = (loss_and_gradients(made, first_batch(made))[0] for _ in range(2))
    assert first == second == pytest.approx(LN2, abs=1e-4)


def test_a_model_that_is_random_in_training_is_refused(tmp_path):
    policy = model()
    policy.model.layers[0].mlp.register_forward_hook(
        lambda module, _, out: out + 0.1 * torch.randn_like(out) if module.training else out
    )
    with pytest.raises(ValueError, match="LlamaForCausalLM draws random numbers in training"):
        trainer(tmp_path, policy=policy)


def test_segments_are_checked_in_the_mode_that_trains(tmp_path):
    policy = model().eval()
    policy.model.layers[0].mlp.register_forward_hook(
        lambda module, _, out: out + out.mean(1, keepdim=True) if module.training else out
    )
    with pytest.raises(ValueError, match="LlamaForCausalLM mixes the segments of a packed row"):
        trainer(tmp_path, policy=policy)
    assert not policy.training


@pytest.mark.parametrize("estimate_alpha", [False, True])
def test_the_head_is_told_how_many_rows_are_scored(tmp_path, monkeypatch, estimate_alpha):
    made = trainer(tmp_path, max_steps=1, estimate_alpha=estimate_alpha)
    bounds, score = [], patched.linear_logprobs

    def spy(hidden, weight, target, **options):
        bounds.append((options["max_scored"], int((target != -100).sum())))
        return score(hidden, weight, target, **options)

    monkeypatch.setattr(patched, "linear_logprobs", spy)
    made.train()
    assert len(bounds) == 2  # reference and policy
    assert all(bound == scored > 0 for bound, scored in bounds)


def test_parameters_that_cannot_be_measured_are_left_out_when_asked(tmp_path):
    def with_scale():
        policy = model()
        policy.extra = torch.nn.Parameter(torch.ones(3))
        return policy

    with pytest.raises(ValueError, match=r"cannot measure \['extra'\]"):
        trainer(tmp_path, policy=with_scale(), estimate_alpha=True)
    with pytest.warns(UserWarning, match=r"stats_strict: a\* is measured over .* \['extra'\]"):
        trainer(tmp_path, policy=with_scale(), estimate_alpha=True, stats_strict=False)
