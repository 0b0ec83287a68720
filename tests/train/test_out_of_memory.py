"""An allocation that fails becomes advice that fits the configuration."""

from pathlib import Path

import pytest
import torch
from tiny_runs import make_cfg, make_trainer, make_units

from train.sizing.out_of_memory import StepDoesNotFit, advice, explained


def test_the_cpus_allocator_is_recognised(tmp_path):
    expected = r"rank 1 is out of memory: .*DefaultCPUAllocator"
    with (
        pytest.raises(StepDoesNotFit, match=expected) as e,
        explained(make_cfg(tmp_path), 2, 1),
    ):
        torch.empty(2**60, dtype=torch.uint8)
    assert "train.checkpoint_layers 1" in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("error", [MemoryError("no"), torch.OutOfMemoryError("CUDA out of memory")])
def test_other_allocators_too(error, tmp_path):
    with pytest.raises(StepDoesNotFit, match=str(error)), explained(make_cfg(tmp_path), 1, 0):
        raise error


def test_other_errors_pass(tmp_path):
    with pytest.raises(RuntimeError, match=r"^shapes$"), explained(make_cfg(tmp_path), 1, 0):
        raise RuntimeError("shapes")


def test_a_gpu_leaves_its_snapshot(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda.memory, "_dump_snapshot", lambda name: Path(name).write_text("blocks")
    )
    with (
        pytest.raises(StepDoesNotFit, match=r"out_of_memory-rank-0\.pickle"),
        explained(make_cfg(tmp_path), 1, 0),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert (tmp_path / "out_of_memory-rank-0.pickle").read_text() == "blocks"


def test_advice_is_judged_from_the_configuration(tmp_path):
    cfg = make_cfg(tmp_path, tokens_per_micro_batch=4096)
    first, *rest = advice(cfg, 1)
    assert first.startswith("train.checkpoint_layers 1")
    assert any("train.tokens_per_micro_batch below 4096" in text for text in rest)
    assert any("train.head_workspace_mib 128: " in text for text in rest)
    assert any("more ranks" in text for text in rest)
    assert not any("parallel." in text for text in rest)
    cfg.train.checkpoint_layers, cfg.train.head_workspace_mib = 1, 32
    cfg.parallel.reshard_after_forward, cfg.parallel.replicate = False, 2
    text = "; ".join(advice(cfg, 4))
    assert "checkpoint_layers" not in text
    assert "head_workspace_mib" not in text
    assert "parallel.reshard_after_forward true" in text
    assert "parallel.replicate 1" in text
    assert "more ranks" not in text


def test_a_run_ends_with_advice(tmp_path):
    trainer = make_trainer(make_cfg(tmp_path), make_units(4))

    def loss(*_):
        torch.empty(2**60, dtype=torch.uint8)

    trainer.objective.loss = loss
    with pytest.raises(StepDoesNotFit, match=r"train\.tokens_per_micro_batch below 160"):
        trainer.run()
