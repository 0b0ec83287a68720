"""What `GradStats` refuses, what it reports, and that it leaves nothing behind."""

import grad_stats_cases as cases
import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from bvpo_kernels import Unit, linear_logprobs, pack, scope
from bvpo_kernels.grad_stats import GradStats
from bvpo_kernels.types import EMPTY, TRACE
from train.model.head import FusedHeadLM


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    cases.exact_norms(monkeypatch)


@pytest.fixture
def policy() -> FusedHeadLM:
    return FusedHeadLM(cases.model())


def forwards(model: nn.Module) -> list[object]:
    return [module.__dict__.get("forward") for module in model.modules()]


class Scaled(nn.Module):
    """A policy with a parameter of its own, which no layer can measure."""

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self.policy = policy
        self.gain = nn.Parameter(torch.ones(5, dtype=torch.float64))

    def forward(self, batch):
        return self.policy(batch) * self.gain.mean()


def test_strict_names_the_parameter(policy):
    with pytest.raises(ValueError, match="'gain'"):
        GradStats(Scaled(policy))
    scaled = Scaled(policy)
    stats = GradStats(scaled, strict=False)
    trained = sum(p.numel() for p in policy.parameters())
    assert stats.coverage.uncovered == ("gain",)
    assert (stats.coverage.covered, stats.coverage.trained) == (trained, trained + 5)
    result = cases.run_step(stats, scaled, [cases.units()])
    cases.assert_matches(result, cases.oracle_gram(policy, cases.units()), 1e-10)
    scaled.gain.requires_grad_(False)
    assert GradStats(scaled).coverage.share == 1.0


def test_parameter_of_two_layers():
    """Two linear layers with one weight would need their cross term."""
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model["b"].weight = model["a"].weight
    with pytest.raises(ValueError, match=r"a\.weight"):
        GradStats(model)


class OddNorm(LlamaRMSNorm):
    """Looks like an RMSNorm, but its weight enters squared."""

    def forward(self, x):
        return self.weight * super().forward(x)


@pytest.mark.parametrize(
    ("norm", "covered"),
    [
        (GemmaRMSNorm(8), True),
        (LlamaRMSNorm(8), True),
        (OddNorm(8), False),
        (nn.LayerNorm((2, 8)), False),
        (nn.GroupNorm(2, 8), False),
    ],
)
def test_which_norms(norm, covered):
    """A norm of transformers is recognised by what it computes; (1 + w) is as good as w."""
    state = torch.get_rng_state()
    assert GradStats(norm, strict=False).coverage.share == float(covered)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "module",
    [
        nn.Embedding(9, 4, sparse=True),
        nn.Embedding(9, 4, max_norm=1.0),
        nn.Embedding(9, 4, scale_grad_by_freq=True),
        nn.Conv1d(4, 4, 1),
        nn.Bilinear(2, 2, 2),
    ],
)
def test_uncovered_modules(module):
    with pytest.raises(ValueError, match="weight"):
        GradStats(module)


def test_leaves_nothing_behind(policy):
    before = forwards(policy)
    stats, batch = GradStats(policy), pack(cases.units())
    with stats.collect(batch):
        assert forwards(policy) != before
        cases.dpo(policy, batch).backward()
    assert forwards(policy) == before
    stats.reset()
    with pytest.raises(KeyError, match="mine"), stats.collect(batch):
        raise KeyError("mine")
    assert forwards(policy) == before
    assert scope.active is None


def test_misuse(policy):
    stats, units = GradStats(policy), cases.units()
    batch = pack(units)
    with pytest.raises(RuntimeError, match="at least one collection"):
        stats.result()
    with pytest.raises(RuntimeError, match="expected a backward inside"), stats.collect(batch):
        cases.dpo(policy, batch)
    with (
        pytest.raises(RuntimeError, match="another collection"),
        stats.collect(batch),
        stats.collect(batch),
    ):
        pass
    with stats.collect(batch):
        cases.dpo(policy, batch).backward()
    with pytest.raises(ValueError, match=r"each unit once.*u0"), stats.collect(batch):
        pass
    stats.reset()
    lacking = pack([units[0], Unit("u1", {TRACE: units[1].pairs[TRACE]})])
    with pytest.raises(ValueError, match="'u1' has no empty"), stats.collect(lacking):
        pass
    with pytest.raises(ValueError, match="at least one unit"), stats.collect(pack([])):
        pass
    other = pack(cases.units(seed=5))
    with pytest.raises(ValueError, match=r"leading axes are"), stats.collect(batch):
        cases.dpo(policy, other).backward()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"mode": "fast"}, ValueError),
        ({"cross": "all"}, ValueError),
        ({"sketch_size": 0}, ValueError),
        ({"sketch_size": 1.5}, ValueError),
    ],
)
def test_bad_options(policy, options, error):
    with pytest.raises(error, match=next(iter(options))):
        GradStats(policy, **options)
    with pytest.raises(TypeError, match="model"):
        GradStats(policy.parameters())


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_scale(policy, bad):
    """alpha = 0 or 1: a kind without a gradient is unknown, not zero."""
    batch = pack(cases.units())
    with (
        pytest.raises(ValueError, match=r"kind_scale\['empty'\]"),
        GradStats(policy).collect(batch, {TRACE: 1.0, EMPTY: bad}),
    ):
        pass
    with (
        pytest.raises(ValueError, match="kind_scale"),
        GradStats(policy).collect(batch, {TRACE: 1.0}),
    ):
        pass


def test_cross_none_is_for_one_micro_batch(policy):
    units = cases.units()
    with pytest.raises(RuntimeError, match="cross='none'"):
        cases.measure(policy, [units[:1], units[1:]], cross="none")
    one = cases.measure(policy, [units], cross="none")
    cases.assert_matches(one, cases.oracle_gram(policy, units), 1e-10)


def test_layer_used_twice(policy):
    stats, batch = GradStats(policy), pack(cases.units())
    with stats.collect(batch):
        (cases.dpo(policy, batch) + cases.dpo(policy, batch)).backward()
    with pytest.raises(RuntimeError, match="one use of the layer per collection, got 2"):
        stats.result()


def test_gradient_that_bypasses_its_layer(policy):
    """A weight read by something else than its own layer's forward."""
    stats, batch = GradStats(policy), pack(cases.units())
    projection = policy.model.model.layers[0].mlp.down_proj
    bypass = lambda x: x @ projection.weight.T  # noqa: E731
    with stats.collect(batch):
        projection.forward = bypass
        cases.dpo(policy, batch).backward()
    with pytest.raises(RuntimeError, match=r"layers\.0\.mlp\.down_proj\.weight"):
        stats.result()


def test_unknown_head(policy):
    stats, batch = GradStats(policy), pack(cases.units())
    weight = nn.Parameter(torch.randn(cases.VOCAB, 32, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"GradStats\(model, head=module"), stats.collect(batch):
        linear_logprobs(policy.hidden(batch), weight, batch.target_T)
    policy.impl = "reference"
    with pytest.raises(ValueError, match="'reference' cannot serve"), stats.collect(batch):
        policy(batch)


def test_reading_without_gradients(policy):
    """A reference pass inside `collect` is no use of a layer."""
    stats, units = GradStats(policy), cases.units()
    batch = pack(units)
    with stats.collect(batch, cases.SCALE):
        with torch.no_grad():
            policy(batch)
        cases.dpo(policy, batch).backward()
    cases.assert_matches(stats.result(), cases.oracle_gram(policy, units), 1e-10)


def test_norm_mode_is_a_labelled_proxy(policy):
    units = cases.units()
    stats = GradStats(policy, "norm")
    size = sum(p.numel() for n, p in policy.named_parameters() if "norm" in n)
    assert stats.coverage.covered == size
    result = cases.run_step(stats, policy, [units[:1], units[1:]])
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_("norm" in name)
    cases.assert_matches(result, cases.oracle_gram(policy, units), 1e-10)
