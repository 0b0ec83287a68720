"""The reference cache: what it holds, when it is refused, and that building it leaves no trace."""

import json
import random
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_runs import make_cfg, make_trainer, make_units, naive_score, tiny_model

from bvpo_kernels.types import TokenPair, Unit
from train import reference
from train.data import StepPlan
from train.head import FusedHeadLM

CFG_KEYS = ["param_dtype", "compute_dtype", "trace_open", "trace_close", "empty_trace"]


def build(cfg, units, policy=None):
    policy = policy or FusedHeadLM(tiny_model())
    plan = StepPlan(units, cfg.train, cfg.seed)
    return reference.build(policy, reference.first_packs(plan, []), cfg.model)


def test_scores_are_those_of_each_response_alone(tmp_path):
    """Through a file, for units in another order and grouping than they were built in."""
    model, units = tiny_model(), make_units(7)
    cache = build(make_cfg(tmp_path), units, FusedHeadLM(model))
    reference.save(cache, tmp_path / "ref.safetensors")
    loaded = reference.load(tmp_path / "ref.safetensors")
    assert loaded.fingerprint == cache.fingerprint
    chosen = [units[5], units[0]]
    pairs = [unit.pairs[kind][0] for unit in chosen for kind in ("trace", "empty")]
    with torch.no_grad():
        naive = [naive_score(model, p.prompt, r) for p in pairs for r in (p.chosen, p.rejected)]
    torch.testing.assert_close(loaded.scores(chosen), torch.stack(naive), rtol=1e-5, atol=1e-5)


def test_key_separates_prompt_from_response():
    keys = {
        reference.response_key(prompt, response)
        for prompt, response in [((1, 2), (3,)), ((1,), (2, 3)), ((1, 2, 3), ()), ((1, 2), (4,))]
    }
    assert len(keys) == 4


def test_key_does_not_depend_on_the_sequence_type():
    assert reference.response_key([1, 2], (3,)) == reference.response_key((1, 2), [3])


@pytest.mark.parametrize("key", CFG_KEYS)
def test_cache_of_another_setting_is_refused(tmp_path, key):
    cfg, units = make_cfg(tmp_path), make_units(5)
    make_trainer(cfg, units)
    old = getattr(cfg.model, key)
    cfg.model = replace(cfg.model, **{key: "bfloat16" if key.endswith("dtype") else "other"})
    new = getattr(cfg.model, key)
    with pytest.raises(ValueError, match="belong to another run") as error:
        make_trainer(cfg, units)
    assert f"({key}: expected {new!r}, got {old!r})" in str(error.value)
    assert str(reference.cache_path(cfg)) in str(error.value)


@pytest.mark.parametrize("change", ["weights", "softcap", "temperature", "attention"])
def test_cache_of_another_model_is_refused(tmp_path, change):
    cfg, units = make_cfg(tmp_path), make_units(5)
    make_trainer(cfg, units)
    policy = FusedHeadLM(tiny_model())
    if change == "attention":  # what was chosen counts, not how it was asked for
        policy = FusedHeadLM(tiny_model(attention="eager"))
    elif change == "weights":
        with torch.no_grad():
            policy.model.model.layers[1].mlp.up_proj.weight[3, 4] += 1e-3
    else:
        policy.transform = policy.transform._replace(**{change: 2.0})
    plan = StepPlan(units, cfg.train, cfg.seed)
    with pytest.raises(ValueError, match=rf"another run \({change}: expected"):
        reference.load_or_build(policy, plan, [], cfg)


def test_weights_digest_sees_values_not_identity():
    first, second = tiny_model(), tiny_model()
    assert reference.weights_digest(first) == reference.weights_digest(second)
    assert reference.weights_digest(first) != reference.weights_digest(first.to(torch.bfloat16))


def test_missing_responses_are_named(tmp_path):
    cfg, units = make_cfg(tmp_path), make_units(5)
    make_trainer(cfg, units)
    (old,) = units[3].pairs["empty"]
    pair = TokenPair(old.prompt, (*old.chosen, 7), old.rejected)
    changed = Unit("unit-3", {**units[3].pairs, "empty": (pair,)})
    with pytest.raises(ValueError, match="missing for 1 responses") as error:
        make_trainer(cfg, [*units[:3], changed, units[4]])
    assert "unit 'unit-3', empty pair 0, chosen" in str(error.value)


def test_unchanged_cache_is_used_not_rebuilt(tmp_path):
    cfg, units = make_cfg(tmp_path), make_units(5)
    make_trainer(cfg, units)
    path = reference.cache_path(cfg)
    before = path.stat().st_mtime_ns
    trainer = make_trainer(cfg, units)
    assert path.stat().st_mtime_ns == before
    assert trainer.objective.reference is not None


def test_command_replaces_a_stale_cache_with_one_that_training_takes(tmp_path, monkeypatch):
    cfg, units, held_out = make_cfg(tmp_path), make_units(5), make_units(2, seed=5)
    monkeypatch.setattr(reference, "load_units", lambda cfg: (units, held_out))
    monkeypatch.setattr(
        reference, "build_policy", lambda cfg, world: (FusedHeadLM(tiny_model()), None)
    )
    make_trainer(cfg, make_units(5, seed=9), model=tiny_model(tie_word_embeddings=True))
    with pytest.raises(ValueError, match="rebuild them with cache-ref"):
        make_trainer(cfg, units, held_out)
    reference.run(cfg)
    make_trainer(cfg, units, held_out)


def test_halves_of_two_caches_are_refused(tmp_path):
    cfg = make_cfg(tmp_path)
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    reference.save(build(cfg, make_units(5)), first)
    reference.save(build(cfg, make_units(5, seed=1)), second)
    shutil.copy(f"{first}.json", f"{second}.json")
    with pytest.raises(ValueError, match="expected scores with sha256"):
        reference.load(second)
    (tmp_path / "b.safetensors.json").unlink()
    with pytest.raises(ValueError, match="expected its sidecar"):
        reference.load(second)


def test_no_temporary_files_remain(tmp_path):
    reference.save(build(make_cfg(tmp_path), make_units(5)), tmp_path / "ref.safetensors")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["ref.safetensors", "ref.safetensors.json"]
    sidecar = json.loads((tmp_path / "ref.safetensors.json").read_text())
    assert sorted(sidecar) == ["fingerprint", "keys", "scores_sha256"]


def test_building_leaves_every_generator_untouched(tmp_path):
    cfg, units, policy = make_cfg(tmp_path), make_units(5), FusedHeadLM(tiny_model())
    policy.train()
    plan = StepPlan(units, cfg.train, cfg.seed)
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    reference.load_or_build(policy, plan, units[:1], cfg)
    after = torch.get_rng_state(), np.random.get_state(), random.getstate()
    assert torch.equal(before[0], after[0])
    assert all(np.array_equal(a, b) for a, b in zip(before[1], after[1], strict=True))
    assert before[2] == after[2]


def test_non_finite_reference_names_the_units(tmp_path):
    cfg, units, model = make_cfg(tmp_path), make_units(5), tiny_model()
    (pair,) = units[2].pairs["trace"]
    rare = Unit("unit-2", {"trace": (TokenPair(pair.prompt, (96, 5), pair.rejected),)})
    others = [unit for unit in units if unit.unit_id != "unit-2"]
    clean = [unit for unit in others if not uses_token(unit, 96)]
    with torch.no_grad():
        model.model.embed_tokens.weight[96] = float("nan")
    with pytest.raises(FloatingPointError, match="unit-2"):
        build(make_cfg(tmp_path, units_per_step=1), [*clean, rare], FusedHeadLM(model))
    assert not reference.cache_path(cfg).exists()


def uses_token(unit, token):
    return any(
        token in (*pair.prompt, *pair.chosen, *pair.rejected)
        for pairs in unit.pairs.values()
        for pair in pairs
    )
