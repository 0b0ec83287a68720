"""What a run is told about its pairs, and what it refuses before the first step."""

import json

import pytest
from tiny_chat import write_lines
from tiny_runs import VOCAB, inputs_of, lacking, make_cfg, make_units, record_of, tiny_model

from bvpo_kernels.mixing import MARGINAL
from bvpo_kernels.types import TokenPair, Unit
from train import inputs as module
from train.config import AlphaConfig, EstimateConfig
from train.inputs import check_measurable, load_inputs, plan_of
from train.preferences.pairs import meta_path


def write_units(path, units, meta=None):
    write_lines(path, [record_of(unit) for unit in units])
    if meta is not None:
        meta_path(path).write_text(json.dumps(meta))
    return path


def measured(cfg):
    cfg.alpha = AlphaConfig(estimate=EstimateConfig())
    return cfg


def test_the_default_is_what_rank_wrote(tmp_path):
    cfg = make_cfg(tmp_path / "run", holdout=0.25)
    message = r"train\.pairs: expected the output of `rank`, got .*pairs\.jsonl: no such file"
    with pytest.raises(FileNotFoundError, match=message):
        load_inputs(cfg)
    units = make_units(8)
    (tmp_path / "run").mkdir()
    write_units(tmp_path / "run" / "pairs.jsonl", units)
    write_units(tmp_path / "ranked.jsonl", units[:6])
    write_units(tmp_path / "named.jsonl", units[:5])
    found = load_inputs(cfg)
    assert [len(found.training), len(found.held_out)] == [6, 2]
    assert {u.unit_id for u in [*found.training, *found.held_out]} == {u.unit_id for u in units}
    cfg.rank.output = str(tmp_path / "ranked.jsonl")
    assert len(load_inputs(cfg).pairs.units) == 6
    cfg.train.pairs = str(tmp_path / "named.jsonl")
    assert len(load_inputs(cfg).pairs.units) == 5
    cfg.train.pairs = str(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"train\.pairs: expected a file of pairs"):
        load_inputs(cfg)


def test_the_run_says_what_it_takes(tmp_path):
    units = make_units(9)
    units[2] = lacking(units[2], "empty")
    extra = make_units(1, seed=4)[0].pairs["trace"]
    units[4] = Unit("traces", {**units[4].pairs, MARGINAL: extra * 3})
    path = write_units(tmp_path / "pairs.jsonl", units)
    cfg = make_cfg(tmp_path, holdout=0.0)
    found = load_inputs(cfg)
    first, *rest = found.describe(cfg).splitlines()
    tokens = sum(unit.num_tokens for unit in units) - 3 * extra[0].num_tokens
    assert first == (
        f"pairs: {path}: 9 units (9 trace, 8 empty pairs), {tokens} tokens; 9 units to train on, 0 "
        f"held out; dropped: 3 pairs of kind 'marginal', which nothing here reads"
    )
    assert rest == [
        "  1 of 9 sit out each epoch, others each time (train.units_per_step 4)",
        f"  1 of 9 lack a kind and are trained on: {path}:3 has no empty",
    ]
    said = load_inputs(measured(cfg)).describe(cfg)
    assert "1 of 9 lack a kind and are trained on, not measured: " in said
    whole = inputs_of(make_units(8)).describe(cfg)
    assert whole.endswith("8 units to train on, 0 held out; dropped: 0 pairs")


@pytest.mark.parametrize("token", [VOCAB, 2**70])
@pytest.mark.parametrize("place", ["prompt", "chosen", "rejected"])
@pytest.mark.parametrize("kind", ["empty", MARGINAL])
def test_an_id_beyond_the_vocabulary(tmp_path, token, place, kind):
    """Anywhere in the file, in what this run holds out or drops, too."""
    units = make_units(5)
    sides = {"prompt": (5,), "chosen": (6,), "rejected": (7,), place: (5, token)}
    units[3] = Unit("u", {**units[3].pairs, kind: (TokenPair(**sides),)})
    path = write_units(tmp_path / "pairs.jsonl", units)
    cfg = make_cfg(tmp_path)
    found, config = load_inputs(cfg), tiny_model().config
    message = rf"{path}:4: unit 'u', {kind} pair 0, {place}: expected .* below 97, .* got {token}"
    with pytest.raises(ValueError, match=message):
        found.check_model(config, None, cfg)
    config.vocab_size = 2**70 + 1
    found.check_model(config, None, cfg)


@pytest.fixture
def tokenizer(monkeypatch):
    """One whose fingerprint is its own text."""
    monkeypatch.setattr(module, "tokenizer_fingerprint", lambda text: text)
    return "the model's"


def with_meta(tmp_path, meta):
    write_units(tmp_path / "pairs.jsonl", make_units(5), meta)
    cfg = make_cfg(tmp_path)
    cfg.model.name = "ours"
    return cfg, load_inputs(cfg)


@pytest.mark.parametrize(
    "meta",
    [
        {},
        {"settings": {}},
        {"settings": {"tokenizer": None}},
        {"settings": {"tokenizer": "the model's"}},
    ],
)
def test_pairs_of_the_same_or_an_unknown_tokenizer(tmp_path, tokenizer, capsys, meta):
    cfg, found = with_meta(tmp_path, meta)
    found.check_model(tiny_model().config, tokenizer, cfg)
    assert not capsys.readouterr().out


@pytest.mark.parametrize("recorded", ["another", 7])
def test_pairs_of_another_tokenizer(tmp_path, tokenizer, recorded):
    meta = {"settings": {"tokenizer": recorded, "model.name": "theirs"}}
    cfg, found = with_meta(tmp_path, meta)
    message = r"pairs\.meta\.json: settings\.tokenizer: .*'theirs'.*'ours'.*check_tokenizer false"
    with pytest.raises(ValueError, match=message):
        found.check_model(tiny_model().config, tokenizer, cfg)
    cfg.train.check_tokenizer = False
    found.check_model(tiny_model().config, tokenizer, cfg)


def test_the_same_model_under_another_version_of_the_library(tmp_path, tokenizer, capsys):
    """The fingerprint hashes the library's own form, so it may change while no id does."""
    settings = {"tokenizer": "another", "model.name": "ours"}
    cfg, found = with_meta(tmp_path, {"settings": settings, "versions": {"tokenizers": "0.1"}})
    found.check_model(tiny_model().config, tokenizer, cfg)
    assert "tokenizers 0.1 then" in capsys.readouterr().out
    now = {name: module.importlib.metadata.version(name) for name in ("transformers", "tokenizers")}
    cfg, found = with_meta(tmp_path, {"settings": settings, "versions": now})
    with pytest.raises(ValueError, match=r"settings\.tokenizer"):
        found.check_model(tiny_model().config, tokenizer, cfg)


def test_a_unit_that_no_pack_holds(tmp_path):
    """Found with its line before a model is loaded, held out or not."""
    units = make_units(6)
    long = max(range(6), key=lambda index: units[index].num_tokens)
    path = write_units(tmp_path / "pairs.jsonl", units)
    for seed in range(6):  # it is held out for some
        cfg = make_cfg(tmp_path, tokens_per_micro_batch=units[long].num_tokens - 1, holdout=0.5)
        cfg.seed = seed
        message = rf"tokens_per_micro_batch: expected at least \d+, .* \({path}:{long + 1}\)"
        with pytest.raises(ValueError, match=message):
            load_inputs(cfg)


def test_a_measured_run_of_one_unit_per_step(tmp_path):
    cfg = make_cfg(tmp_path, units_per_step=1)
    check_measurable(plan_of(cfg, make_units(4)), cfg)
    measured(cfg)
    with pytest.raises(ValueError, match=r"units_per_step: expected at least 2 with alpha.estimat"):
        check_measurable(plan_of(cfg, make_units(4)), cfg)


@pytest.mark.parametrize("kind", ["trace", "empty"])
def test_a_measured_run_without_a_step_to_measure(tmp_path, kind):
    """Fewer than two complete units in every step; one such step is enough to go on."""
    units = [lacking(unit, kind) for unit in make_units(12)]
    cfg = measured(make_cfg(tmp_path, max_steps=None, epochs=4.0))
    message = rf"alpha\.estimate: .* none in 12 steps: 12 of 12 .* has no {kind}.* rank\.both_kinds"
    with pytest.raises(ValueError, match=message):
        check_measurable(plan_of(cfg, units), cfg)
    some = [*units[:9], *make_units(12)[9:]]
    plan = plan_of(cfg, some)
    counts = list(plan.complete_units())
    by_step = [[u.unit_id for u in plan[step].units] for step in range(plan.num_steps)]
    whole = {f"unit-{n}" for n in (9, 10, 11)}
    assert counts == [len(whole & set(names)) for names in by_step]
    assert max(counts) >= 2
    check_measurable(plan, cfg)
