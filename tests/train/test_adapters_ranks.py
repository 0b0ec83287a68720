"""LoRA runs on two ranks: what one rank does, from weights that each rank reads for itself."""

from pathlib import Path

import pytest
import torch
from ranks import RANKS, spawn
from tiny_runs import make_cfg, make_units, merged_weights, tiny_model
from transformers import AutoModelForCausalLM

from train.config import AdapterConfig, AlphaConfig, EstimateConfig
from train.model import loading, models
from train.model.adapters import is_adapter
from train.model.head import build_policy
from train.runtime import parallel
from train.trainer import Trainer

pytest.importorskip("peft", reason="peft is not installed")

# (reference, LoRA on the head)
CASES = [("adapter_off", False), ("adapter_off", True), ("frozen_copy", False), ("cache", False)]


def run(reference: str, head_too: bool, folder: Path, world: parallel.World) -> dict:
    """Log lines, final adapters and merged weights of three steps in fp64."""
    models.load_tokenizer = loading.load_tokenizer = lambda cfg: None  # the model has none
    cfg = make_cfg(folder / f"{reference}-{head_too}-{world.size}")
    cfg.model.name, cfg.reference = str(folder / "model"), reference
    cfg.model.param_dtype = cfg.model.compute_dtype = "float64"  # type: ignore[assignment]
    cfg.parallel.reduce_dtype = "float64"  # type: ignore[assignment]
    cfg.adapter = AdapterConfig(rank=3, alpha=6.0, head=head_too)
    if not head_too and reference != "cache":
        cfg.alpha = AlphaConfig(estimate=EstimateConfig(warmup=1))
    cfg.optim.lr = 0.03
    policy = build_policy(cfg, world)[0]
    frozen = build_policy(cfg, world)[0] if reference == "frozen_copy" else None
    # One unit per step leaves a rank with a filler; four have more packs than ranks.
    cfg.train.units_per_step = 1 if reference == "cache" else 4
    held_out = make_units(3, seed=5)
    trainer = Trainer(cfg, policy, None, make_units(9), held_out, world, frozen)
    lines = [trainer.train_step(step) for step in range(3)]
    trained = {
        name: parallel.whole(p).detach()
        for name, p in policy.named_parameters()
        if is_adapter(name)
    }
    merged = merged_weights(policy.model)
    return {"lines": lines, "adapters": trained, "merged": merged}


def _worker(rank: int, folder: Path) -> None:
    cfg = make_cfg(folder).parallel
    world = parallel.make_world(cfg, torch.device("cpu"))
    for number, (reference, head_too) in enumerate(CASES):
        torch.save(run(reference, head_too, folder, world), folder / f"{number}-{rank}.pt")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    tiny_model(tie_word_embeddings=False).save_pretrained(folder / "model")
    spawn(_worker, folder)
    return folder


@pytest.mark.parametrize("number", range(len(CASES)), ids=[f"{r}-{h}" for r, h in CASES])
def test_two_ranks_do_what_one_does(results, number, monkeypatch):
    for module in (models, loading):
        monkeypatch.setattr(module, "load_tokenizer", module.load_tokenizer)
    alone = run(*CASES[number], results, parallel.ALONE)
    assert alone["lines"][-1]["grad_norm"] > 1e-3
    base = AutoModelForCausalLM.from_pretrained(results / "model", dtype=torch.float64).state_dict()
    moved = [name for name, value in alone["merged"].items() if not torch.equal(value, base[name])]
    assert moved
    for rank in range(RANKS):
        got = torch.load(results / f"{number}-{rank}.pt")
        for line, expected in zip(got["lines"], alone["lines"], strict=True):
            for name in ("loss", "grad_norm", "trace/rewards/margins", "empty/loss", "alpha"):
                assert line[name] == pytest.approx(expected[name], rel=1e-6, abs=1e-9), name
        for part in ("adapters", "merged"):
            assert got[part].keys() == alone[part].keys()
            for name, value in alone[part].items():
                torch.testing.assert_close(got[part][name], value, rtol=1e-6, atol=1e-7, msg=name)
