"""The reference cache: what it holds, when it is refused, and that building it leaves no trace."""

import json
import math
import random
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_runs import (
    inputs_of,
    make_cfg,
    make_trainer,
    make_units,
    naive_score,
    record_of,
    tiny_model,
)

from bvpo_kernels.mixing import MARGINAL
from bvpo_kernels.types import TokenPair, Unit
from train import reference
from train.model.head import FusedHeadLM
from train.preferences.pairs import write_pairs
from train.runtime.files import sha256
from train.steps import StepPlan

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
    assert f"({key}: expected {new!r} (this command), got {old!r} (the" in str(error.value)
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


@pytest.mark.parametrize(
    ("casts", "other", "how"),
    [
        ("fsdp", "autocast", "under torchrun"),
        ("autocast", "fsdp", "without torchrun"),
    ],
)
def test_the_advice_is_the_same_way_of_starting(casts, other, how):
    """Else cache-ref, followed once, would be advised again."""
    cache = reference.ReferenceCache({"casts": other}, (), torch.empty(0))
    with pytest.raises(ValueError, match=rf"casts: expected '{casts}' \(this .* command, {how}$"):
        cache.check_fingerprint({"casts": casts}, "file")


def test_weights_digest_sees_values_not_identity():
    first, second = tiny_model(), tiny_model()
    assert reference.weights_digest(first) == reference.weights_digest(second)
    assert reference.weights_digest(first) != reference.weights_digest(first.to(torch.bfloat16))


def test_what_is_missing_is_added(tmp_path):
    """Other pairs in a folder that has scores: new ones are scored, old ones keep theirs."""
    cfg, units = make_cfg(tmp_path), make_units(5)
    make_trainer(cfg, units)
    before = reference.load(reference.cache_path(cfg))
    (old,) = units[3].pairs["empty"]
    pair = TokenPair(old.prompt, (*old.chosen, 7), old.rejected)
    changed = Unit("unit-3", {**units[3].pairs, "empty": (pair,)})
    others = [*units[:3], changed, units[4]]
    trainer = make_trainer(cfg, others, make_units(2, seed=8))
    stored = reference.load(reference.cache_path(cfg))
    assert stored.keys[: len(before.keys)] == before.keys
    assert torch.equal(stored.scores_S[: len(before.keys)], before.scores_S)
    for cache in (stored, trainer.objective.reference):
        got = cache.scores([Unit("any", {"empty": (pair,)})])
        with torch.no_grad():
            naive = [
                naive_score(tiny_model(), pair.prompt, r) for r in (pair.chosen, pair.rejected)
            ]
        torch.testing.assert_close(got, torch.stack(naive), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("change", ["longer", "more epochs", "another seed", "no holdout"])
def test_another_run_over_the_same_pairs_is_served(tmp_path, change):
    """With the scores of a short run, whatever the next one reaches."""
    cfg, units = make_cfg(tmp_path, max_steps=1), make_units(11)
    make_trainer(cfg, units[:9], units[9:])
    if change == "longer":
        cfg.train.max_steps = 7
    elif change == "more epochs":
        cfg.train.max_steps, cfg.train.epochs = None, 3.0
    elif change == "another seed":
        cfg.seed = 5
    training = units if change == "no holdout" else units[:9]
    trainer = make_trainer(cfg, training, [] if change == "no holdout" else units[9:])
    for step in range(trainer.plan.num_steps):
        line = trainer.train_step(step)
        assert math.isfinite(line["loss"])


def cache_ref(cfg, monkeypatch):
    monkeypatch.setattr(
        reference, "build_policy", lambda cfg, world: (FusedHeadLM(tiny_model()), None)
    )
    reference.run(cfg)
    return reference.load(reference.cache_path(cfg))


def test_command_scores_every_pair_of_the_file(tmp_path, monkeypatch):
    """Held out, beyond the last step, of an epoch's remainder, and extra traces: each once."""
    units = make_units(11)
    extra = make_units(4, seed=7)[2].pairs["trace"] + make_units(4, seed=7)[3].pairs["trace"]
    units[5] = Unit("traces", {**units[5].pairs, MARGINAL: extra})
    write_pairs(tmp_path / "pairs.jsonl", [record_of(unit) for unit in units], {})
    cache = cache_ref(make_cfg(tmp_path, max_steps=1), monkeypatch)
    expected = {
        reference.response_key(pair.prompt, response)
        for unit in units
        for pairs in unit.pairs.values()
        for pair in pairs
        for response in (pair.chosen, pair.rejected)
    }
    assert set(cache.keys) == expected
    assert len(cache.keys) == len(expected)


def test_a_pair_beyond_the_packs_is_no_error_of_the_command(tmp_path, monkeypatch):
    """An extra trace that no run with these packs can measure."""
    units = make_units(5)
    long = TokenPair((5,), (7,) * 200, (8,) * 200)
    units[1] = Unit("long", {**units[1].pairs, MARGINAL: (long, long)})
    write_pairs(tmp_path / "pairs.jsonl", [record_of(unit) for unit in units], {})
    cache = cache_ref(make_cfg(tmp_path), monkeypatch)
    assert reference.response_key(long.prompt, long.chosen) not in cache.keys


DAMAGE = {
    "cut": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "no object": lambda text: "[1]",
    "null": lambda text: json.dumps({**json.loads(text), "keys": None}),
    "a key that is no text": lambda text: json.dumps({**json.loads(text), "keys": [3]}),
    "one key less": lambda text: json.dumps(
        {**json.loads(text), "keys": json.loads(text)["keys"][1:]}
    ),
    "no fingerprint": lambda text: json.dumps({**json.loads(text), "fingerprint": None}),
    "no digest": lambda text: json.dumps({"keys": [], "fingerprint": {}}),
    "deep": lambda text: "[" * 10**5,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_sidecar(tmp_path, damage):
    cfg, units = make_cfg(tmp_path), make_units(5)
    make_trainer(cfg, units)
    sidecar = tmp_path / "reference.safetensors.json"
    sidecar.write_text(DAMAGE[damage](sidecar.read_text()))
    with pytest.raises(ValueError, match=r"safetensors.json.*: rebuild them with cache-ref"):
        make_trainer(cfg, units)


def test_damaged_scores_that_their_sidecar_describes(tmp_path):
    cfg, units = make_cfg(tmp_path), make_units(5)
    make_trainer(cfg, units)
    path, sidecar = (tmp_path / f"reference.safetensors{end}" for end in ("", ".json"))
    path.write_bytes(b"version https://git-lfs")
    content = json.loads(sidecar.read_text()) | {"scores_sha256": sha256(path)}
    sidecar.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"damaged: rebuild them with cache-ref"):
        make_trainer(cfg, units)


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
    monkeypatch.setattr(reference, "load_inputs", lambda cfg: inputs_of(units, held_out))
    monkeypatch.setattr(
        reference, "build_policy", lambda cfg, world: (FusedHeadLM(tiny_model()), None)
    )
    make_trainer(cfg, make_units(5, seed=9), model=tiny_model(tie_word_embeddings=True))
    with pytest.raises(ValueError, match="rebuild them by cache-ref"):
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
    with pytest.raises(ValueError, match=r"their sidecar b\.safetensors\.json, got No such file"):
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
