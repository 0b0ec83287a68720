"""One rank, two ranks and two replicas do the same; what goes wrong on one stops all."""

import math
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import RANKS, Case, run, spawn
from test_marginal import traced_units
from tiny_runs import lacking, make_units, tiny_model

from train.config import ModelConfig, ParallelConfig
from train.model import loading
from train.model.head import FusedHeadLM
from train.runtime import parallel
from train.steps import StepPlan, deal
from train.trainer import NonFiniteError, Trainer

# 4 units make two packs of 160 tokens or three, so ranks differ in their number; 1 unit leaves the
# other rank none at all.
CASES = {
    "untied": Case(),
    "tied": Case(tied=True),
    "replicas": Case(tied=True, replicate=2),
    "one unit": Case(train={"units_per_step": 1}),
    "one pack": Case(train={"tokens_per_micro_batch": 4000}, estimate={"mode": "sketch"}),
    "estimated": Case(tied=True, estimate={}),
    "exact products": Case(estimate={"cross": "exact"}),
    "sketches": Case(estimate={"mode": "sketch"}, tied=True),
    "norms": Case(estimate={"mode": "norm"}),
    "replicas estimated": Case(estimate={}, replicate=2),
    "batch": Case(
        estimate={"target": "batch"}, units=lambda: doubled(9), train={"units_per_step": 3}
    ),
    "marginal": Case(
        estimate={"reference": "marginal"},
        units=lambda: traced_units(5),
        train={"tokens_per_micro_batch": 700},
    ),
    # In packs of their own, outside of the statistics; some steps have one such pack, some none.
    "lacking": Case(estimate={}, units=lambda: some_lacking(9), tied=True),
    "lacking, exact products": Case(
        estimate={"cross": "exact"},
        units=lambda: some_lacking(9),
        train={"tokens_per_micro_batch": 90},
    ),
    "lacking, sketches": Case(estimate={"mode": "sketch"}, units=lambda: some_lacking(9)),
    "kto": Case(loss="kto"),
    "simpo": Case(loss="simpo"),
    "recomputed": Case(train={"checkpoint_layers": 1}, sync_every_micro_batch=True, estimate={}),
    "half recomputed": Case(train={"checkpoint_layers": 2}, tied=True),
    "sparse": Case(train={"tail_tolerance": 2.0**-6}),
}
UNEQUAL = ("time", "seconds/", "tokens_per_second", "mfu", "micro_batches")


def doubled(count):
    """Units with two trace pairs each."""
    more = make_units(count, seed=8)
    return [
        type(unit)(unit.unit_id, {**unit.pairs, "trace": (*unit.pairs["trace"], *m.pairs["trace"])})
        for unit, m in zip(make_units(count), more, strict=True)
    ]


def some_lacking(count):
    """Every third unit without an empty pair, the one after it without a trace pair."""
    units = make_units(count)
    kinds = {0: "empty", 1: "trace"}
    return [lacking(u, kinds[n % 3]) if n % 3 in kinds else u for n, u in enumerate(units)]


def _run_all(rank: int, folder: Path) -> None:
    checks: dict = {
        name: lambda name=name, case=case: run(case, folder / name, sharded=True)
        for name, case in CASES.items()
    }
    checks |= {check.__name__: lambda check=check: check(folder) for check in OTHERS}
    for name, check in checks.items():
        try:
            result = check()
        except Exception:
            result = traceback.format_exc()
        torch.save(result, folder / f"{name}-{rank}.pt")


def nan(folder: Path) -> tuple[str, bool]:
    """A token that only a unit of one rank has is NaN: what each rank raises, if weights moved."""
    units = make_units(4)
    (pair,) = units[2].pairs["trace"]
    pair = type(pair)(pair.prompt, (*pair.chosen, 96), pair.rejected)
    units[2] = type(units[2])("culprit", {**units[2].pairs, "trace": (pair,)})
    units = [u for u in units if all(96 not in ids for ids in _ids(u)) or u.unit_id == "culprit"]
    size = len(units)
    case = Case(units=lambda: units, train={"units_per_step": size, "tokens_per_micro_batch": 90})
    trainer = case.trainer(folder / "nan", sharded=True)
    trainer.held_out = []
    with torch.no_grad():
        embedding = trainer.policy.model.get_input_embeddings().weight
        local = embedding.to_local()
        if dist.get_rank() == RANKS - 1:
            local[96 - 49] = math.nan  # rows 49 to 96 are on the second rank
    before = [p.to_local().clone() for p in trainer.policy.parameters()]
    try:
        trainer.train_step(0)
        said = ""
    except NonFiniteError as error:
        said = str(error)
    pairs = zip(before, trainer.policy.parameters(), strict=True)
    moved = any(not torch.equal(old, p.to_local()) for old, p in pairs if not old.isnan().any())
    return said, moved


def _ids(unit):
    pairs = [p for kind in unit.pairs.values() for p in kind]
    return [ids for p in pairs for ids in (p.prompt, p.chosen, p.rejected)]


def bfloat16(folder: Path) -> list[float]:
    """First losses with bf16 weights gathered from fp32 ones, the reference scored alike."""
    case = Case(estimate={}, tied=True)
    cfg = case.cfg(folder / "bfloat16")
    cfg.model.param_dtype, cfg.model.compute_dtype = "float32", "bfloat16"
    cfg.parallel.reduce_dtype = "float32"
    policy = FusedHeadLM(tiny_model(tie_word_embeddings=True))
    world = parallel.make_world(cfg.parallel, torch.device("cpu"))
    parallel.shard(policy, cfg.parallel, world, torch.bfloat16)
    trainer = Trainer(cfg, policy, None, make_units(9), [], world)
    lines = [trainer.train_step(step) for step in range(3)]
    assert all(p.dtype == torch.float32 for p in policy.parameters())
    return [line["loss"] for line in lines]


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    """The weights that each rank read, gathered; and the log-probabilities of a probe."""
    result = {}
    for tied in (False, True):
        cfg = ModelConfig(name=str(folder.parent / f"model-{tied}"), compute_dtype="float32")
        world = parallel.make_world(ParallelConfig(), torch.device("cpu"))
        loading.load_tokenizer = lambda cfg: None
        model, _, weights = loading.empty_model(cfg)
        assert all(parameter.is_meta for parameter in model.parameters())
        policy = FusedHeadLM(model)
        parallel.shard(policy, ParallelConfig(), world, torch.float32)
        loading.fill(model, weights, world.device)
        policy.self_check()
        parallel.reshard(policy)
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        for name, parameter in model.named_parameters():
            rows = parameter.to_local().shape[0]
            assert rows <= -(-parameter.shape[0] // RANKS), name
            result[f"{tied} {name}"] = parallel.whole(parameter).detach()
    return result


OTHERS = (nan, bfloat16, loaded)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each rank found, by name. One pair of processes for all: they take seconds."""
    folder = tmp_path_factory.mktemp("ranks")
    for tied in (False, True):
        model = tiny_model(tie_word_embeddings=tied)
        # Two files and an index where it is not tied.
        size = "1GB" if tied else "30KB"
        model.save_pretrained(folder / f"model-{tied}", max_shard_size=size)
    (folder / "run").mkdir()
    spawn(_run_all, folder / "run")

    def read(name):
        found = [torch.load(folder / "run" / f"{name}-{rank}.pt") for rank in range(RANKS)]
        assert not any(isinstance(result, str) for result in found), found
        return found

    return read


def _same(got: dict, expected: dict) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        if not name.startswith(UNEQUAL):
            assert got[name] == pytest.approx(value, rel=1e-6, abs=1e-9), name


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_do_what_one_does(results, name, tmp_path):
    alone = run(CASES[name], tmp_path, sharded=False)
    assert alone["lines"][-1]["grad_norm"] > 1e-3
    for got in results(name):
        for line, expected in zip(got["lines"], alone["lines"], strict=True):
            _same(line, expected)
        _same(got["held_out"], alone["held_out"])
        for parameter, value in alone["weights"].items():
            torch.testing.assert_close(
                got["weights"][parameter], value, rtol=1e-6, atol=1e-7, msg=parameter
            )


def test_nan_on_one_rank_stops_all(results):
    for said, moved in results("nan"):
        assert "'culprit'" in said
        assert not moved


def test_first_loss_in_bfloat16_is_log_2(results):
    for losses in results("bfloat16"):
        assert losses[0] == pytest.approx(math.log(2), abs=1e-7)
        assert losses[1] != losses[0]


def test_ranks_read_their_own_rows_of_a_checkpoint(results):
    for got in results("loaded"):
        for tied in (False, True):
            expected = dict(tiny_model(tie_word_embeddings=tied).named_parameters())
            found = {n.split()[1] for n in got if n.startswith(str(tied))}
            assert found == expected.keys()
            for name, value in expected.items():
                assert torch.equal(got[f"{tied} {name}"], value), name


def test_packs_are_dealt_evenly():
    assert deal([9, 8, 7, 3, 2, 1], 2) == [[0, 3, 4], [1, 2, 5]]
    assert deal([1, 5, 3], 2) == [[1], [2, 0]]
    assert deal([4], 3) == [[0], [], []]


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_packs_and_order_do_not_depend_on_the_ranks(num_ranks):
    cfg = Case().cfg(Path("unused")).train
    expected = StepPlan(make_units(9), cfg, 0)[0]
    parts = [StepPlan(make_units(9), cfg, 0, rank, num_ranks)[0] for rank in range(num_ranks)]
    packs = {micro.batch.unit_ids for micro in expected.micro_batches}
    dealt = [m.batch.unit_ids for part in parts for m in part.micro_batches if not m.is_filler]
    assert len(dealt) == len(packs)
    assert set(dealt) == packs
    assert len({len(part.micro_batches) for part in parts}) == 1
    for part in parts:
        assert (part.pair_counts, part.num_tokens) == (expected.pair_counts, expected.num_tokens)


def test_what_a_run_alone_cannot_have(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with (
        pytest.raises(ValueError, match=r"parallel: expected replicate 1 .* without torchrun"),
        parallel.start(ParallelConfig(replicate=2)),
    ):
        pass
