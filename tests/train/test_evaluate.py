"""Held-out metrics against a naive loop; combination of micro-batches."""

import copy

import pytest
import torch
from tiny_runs import make_cfg, make_trainer, make_units, naive_kind_loss, naive_padded_scores

from bvpo_kernels.types import Unit
from train.objective import evaluate


@pytest.fixture
def moved(tmp_path):
    """A trainer whose policy has left the reference, and that reference."""
    trainer = make_trainer(make_cfg(tmp_path), make_units(6), make_units(5, seed=3))
    reference = copy.deepcopy(trainer.policy.model)
    with torch.no_grad():
        for param in trainer.policy.parameters():
            param.mul_(1.1)
    return trainer, reference


def test_metrics_equal_a_naive_loop(moved):
    trainer, reference = moved
    metrics = evaluate(trainer.objective, trainer.held_out, 0.3, 160)
    model = trainer.policy.model.eval()
    losses = {}
    for kind in ("trace", "empty"):
        with torch.no_grad():
            losses[kind] = naive_kind_loss(model, reference, trainer.held_out, kind, 0.1).item()
            margins = []
            for unit in trainer.held_out:
                (pair,) = unit.pairs[kind]
                chosen, rejected = naive_padded_scores(model, pair)
                ref_chosen, ref_rejected = naive_padded_scores(reference, pair)
                margins.append(0.1 * (chosen - ref_chosen - rejected + ref_rejected).item())
        assert metrics[f"{kind}/loss"] == pytest.approx(losses[kind], rel=1e-5)
        assert metrics[f"{kind}/rewards/margins"] == pytest.approx(
            sum(margins) / len(margins), rel=1e-4, abs=1e-5
        )
        accuracy = sum(margin > 0 for margin in margins) / len(margins)
        assert metrics[f"{kind}/rewards/accuracies"] == pytest.approx(accuracy)
    assert metrics["loss"] == pytest.approx(0.3 * losses["trace"] + 0.7 * losses["empty"])


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_metrics_do_not_depend_on_the_packs(moved, loss):
    """Unequal pair counts, and one kind missing in some packs."""
    trainer, _ = moved
    trainer.objective.cfg.name = loss
    trainer.objective.options = {}
    units = list(trainer.held_out)
    units[0] = Unit(units[0].unit_id, {"trace": units[0].pairs["trace"] * 3})
    units[1] = Unit(units[1].unit_id, {"empty": units[1].pairs["empty"]})
    small, large = (evaluate(trainer.objective, units, 0.3, size) for size in (120, 2000))
    assert small.keys() == large.keys()
    assert small == pytest.approx(large, rel=1e-5, abs=1e-6)
    assert "trace/loss" in small
    assert not [name for name in small if name.endswith("pairs") or name == "alpha"]


def test_evaluation_leaves_weights_and_gradients_alone(moved):
    trainer, _ = moved
    before = copy.deepcopy(trainer.policy.state_dict())
    evaluate(trainer.objective, trainer.held_out, 0.5, 160)
    assert all(torch.equal(before[k], v) for k, v in trainer.policy.state_dict().items())
    assert all(param.grad is None for param in trainer.policy.parameters())
