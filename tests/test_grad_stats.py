"""Exact mode against a loop over units, and identities that hold whatever the model is."""

import grad_stats_cases as cases
import pytest
import torch
from torch import nn

from bvpo_kernels import IGNORE_INDEX, Unit, linear_logprobs, pack
from bvpo_kernels.grad_stats import GradStats
from bvpo_kernels.types import EMPTY, TRACE, PackedBatch
from train.model.head import FusedHeadLM


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    cases.exact_norms(monkeypatch)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def gradients(policy: nn.Module) -> list[torch.Tensor]:
    return [p.grad.clone() for p in cases.trained(policy)]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_matches_loop(family, tied):
    policy, units = FusedHeadLM(cases.model(family, tied=tied)), cases.units()
    cases.dpo(policy, pack(units)).backward()
    plain = gradients(policy)
    stats = cases.measure(policy, [units])
    cases.assert_matches(stats, cases.oracle_gram(policy, units), 1e-10)
    for ours, expected in zip(gradients(policy), plain, strict=True):
        assert (ours - expected).norm() <= 1e-12 * expected.norm()


@pytest.mark.parametrize("tied", [False, True])
def test_matches_loop_fp32(tied):
    """The oracle is the fp64 model with the same weights."""
    policy, units = FusedHeadLM(cases.model(tied=tied, dtype=torch.float32)), cases.units()
    stats = cases.measure(policy, [units])
    gram = cases.oracle_gram(policy.double(), units)
    cases.assert_matches(stats, gram, 1e-5)


def test_autocast():
    """bf16 rounds the layers' inputs: gradients err as without statistics, those as a loop does."""
    model = cases.model("qwen3", tied=True, dtype=torch.float32)
    policy, units = FusedHeadLM(model, compute_dtype=torch.bfloat16), cases.units()
    cases.dpo(policy, pack(units)).backward()
    plain = gradients(policy)
    stats = cases.measure(policy, [units])
    ours, loop_gram = gradients(policy), cases.oracle_gram(policy, units)
    oracle = FusedHeadLM(model.double())
    oracle.zero_grad()
    cases.dpo(oracle, pack(units)).backward()
    for got, eager, expected in zip(ours, plain, gradients(oracle), strict=True):
        assert (got - expected).norm() <= 1.5 * (eager - expected).norm()
    gram = cases.oracle_gram(oracle, units)
    norms = gram.diagonal().permute(2, 0, 1).diagonal(dim1=1, dim2=2).sqrt()
    scale = norms[:, :, None] * norms[:, None]
    error, loop_error = (
        ((own - gram.diagonal().permute(2, 0, 1)).abs() / scale).max()
        for own in (stats.gram_BKK, loop_gram.diagonal().permute(2, 0, 1))
    )
    assert error <= 1.5 * loop_error


def test_parallelogram():
    """|t + e|^2 = |t|^2 + |e|^2 + 2 <t, e>, the left side with both pairs in one group."""
    policy, units = FusedHeadLM(cases.model(tied=True)), cases.units()
    gram = cases.measure(policy, [units]).gram_BKK
    joint = [Unit(u.unit_id, {"both": [*u.pairs[TRACE], *u.pairs[EMPTY]]}) for u in units]
    batch = pack(joint, kinds=("both",))
    stats = GradStats(policy)
    with stats.collect(batch, {"both": 1.0}):
        cases.dpo(policy, batch, {"both": 2.0 * len(units)}, {"both": 2 * len(units)}).backward()
    torch.testing.assert_close(
        stats.result().gram_BKK[:, 0, 0], gram.sum((1, 2)), rtol=1e-10, atol=0
    )


def test_permuted_units():
    policy, units = FusedHeadLM(cases.model(tied=True)), cases.units()
    stats, turned = cases.measure(policy, [units]), cases.measure(policy, [units[::-1]])
    torch.testing.assert_close(turned.gram_BKK.flip(0), stats.gram_BKK, rtol=1e-10, atol=0)
    torch.testing.assert_close(turned.rows_BKK.flip(0), stats.rows_BKK, rtol=1e-10, atol=0)


@pytest.mark.parametrize("tied", [False, True])
def test_accumulation(tied):
    """1 x 4 against 4 x 1 and an uneven split: with kind sums, nothing is estimated."""
    policy, units = FusedHeadLM(cases.model(tied=tied)), cases.units(4)
    gram = cases.oracle_gram(policy, units)
    for split in ([units], [units[:1], units[1:]], [[unit] for unit in units]):
        stats = cases.measure(policy, split, cross="exact")
        assert (stats.rows_BKK is None) == (len(split) > 1)
        cases.assert_matches(stats, gram, 1e-10)


@pytest.mark.parametrize("cross", ["exact", "sketch"])
def test_micro_batches_may_differ_in_their_factors(cross):
    """A mean over each micro-batch's own pairs, as trainers with an uneven last one take it."""
    policy, units = FusedHeadLM(cases.model(tied=True)), cases.units(4)
    gram = cases.oracle_gram(policy, units)
    stats = GradStats(policy, cross=cross, sketch_size=128)  # beyond every side: no error
    for _ in range(2):  # nothing of a step's factors is left for the next one
        policy.zero_grad()
        for part, weight in ((units[:2], 0.3), (units[2:3], 0.9), (units[3:], 0.02)):
            batch = pack(part)
            alpha = {TRACE: weight, EMPTY: 1 - weight}
            counts = dict.fromkeys(alpha, 7 * len(part))
            with stats.collect(batch, {kind: alpha[kind] / counts[kind] for kind in alpha}):
                cases.dpo(policy, batch, alpha, counts).backward()
        cases.assert_matches(stats.result(), gram, 1e-10)


def test_steps_do_not_mix():
    policy, units = FusedHeadLM(cases.model()), cases.units(4)
    stats = GradStats(policy, cross="exact")
    cases.run_step(stats, policy, [units[:2], units[2:3]])
    cases.run_step(stats, policy, [units[3:]])
    stats.reset()
    second = cases.run_step(stats, policy, [units[2:]])
    cases.assert_matches(second, cases.oracle_gram(policy, units[2:]), 1e-10)


@pytest.mark.parametrize("tied", [False, True])
def test_checkpointing(tied):
    policy, units = FusedHeadLM(cases.model(tied=tied)), cases.units()
    plain = cases.measure(policy, [units])
    policy.train()
    policy.model.gradient_checkpointing_enable({"use_reentrant": False})
    stats = cases.measure(policy, [units])
    assert torch.equal(stats.gram_BKK, plain.gram_BKK)
    assert torch.equal(stats.rows_BKK, plain.rows_BKK)


def test_masked_group():
    """A kind of one unit without a scored token has gradient 0, and changes nothing else."""
    policy, units = FusedHeadLM(cases.model(tied=True)), cases.units()
    batch = pack(units)
    start, end = batch.group_ranges_G2[3].tolist()  # unit 1, empty
    batch.target_T[start:end] = IGNORE_INDEX
    stats = GradStats(policy)
    with stats.collect(batch, cases.SCALE):
        cases.dpo(policy, batch).backward()
    result, gram = stats.result(), cases.oracle_gram(policy, units)
    gram[1, :, 1] = gram[:, 1, :, 1] = 0
    cases.assert_matches(result, gram, 1e-10)
    assert result.gram_BKK[1, 1].eq(0).all()


def test_one_unit():
    policy, units = FusedHeadLM(cases.model()), cases.units(1)
    stats = cases.measure(policy, [units])
    cases.assert_matches(stats, cases.oracle_gram(policy, units), 1e-10)
    torch.testing.assert_close(stats.rows_BKK, stats.gram_BKK, rtol=1e-12, atol=0)


def test_three_kinds_and_two_traces():
    policy, kinds = FusedHeadLM(cases.model(tied=True)), (TRACE, "short", EMPTY)
    units = [
        Unit(u.unit_id, {**u.pairs, "short": s.pairs[EMPTY]})
        for u, s in zip(cases.units(2, traces=2), cases.units(2, seed=9), strict=True)
    ]
    batch, stats = pack(units, kinds=kinds), GradStats(policy)
    alpha, counts = {TRACE: 0.2, "short": 0.3, EMPTY: 0.5}, {TRACE: 4, "short": 2, EMPTY: 2}
    with stats.collect(batch, {kind: alpha[kind] / counts[kind] for kind in kinds}):
        cases.dpo(policy, batch, alpha, counts).backward()
    result = stats.result()
    assert result.kinds == kinds
    cases.assert_matches(result, cases.oracle_gram(policy, units, kinds), 1e-10)


@pytest.mark.parametrize("frozen", ["embed", "norm", "proj", "lm_head", "layers.0"])
@pytest.mark.parametrize("tied", [False, True])
def test_frozen(frozen, tied):
    """What is frozen after the statistics were made is neither measured nor trained."""
    policy, units = FusedHeadLM(cases.model("qwen3", tied=tied)), cases.units(2)
    stats = GradStats(policy)
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_(frozen not in name)
    result = cases.run_step(stats, policy, [units])
    cases.assert_matches(result, cases.oracle_gram(policy, units), 1e-10)


class Toy(nn.Module):
    """Token by token: what the transformers do not use. `use` is how the head gets its weight."""

    def __init__(self, use: str, bias: bool = True) -> None:
        super().__init__()
        self.use = use
        self.tokens = nn.Embedding(cases.VOCAB, 16, padding_idx=3)
        self.positions = nn.Embedding(64, 16)
        self.first = nn.Linear(16, 24)
        self.norms = nn.ModuleList([nn.LayerNorm(24), nn.RMSNorm(24, eps=1e-5), nn.RMSNorm(6)])
        self.second = nn.Linear(24, 16, bias=False)
        self.head = nn.Linear(16, cases.VOCAB, bias=bias)
        self.head.weight = self.tokens.weight
        self.double()

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        x = self.tokens(batch.tokens_T[None]) + self.positions(batch.position_ids_T[None])
        x = self.norms[1](self.norms[0](self.first(x).tanh()).sin())
        x = self.norms[2](x.unflatten(-1, (4, 6))).flatten(-2)
        h = self.second(x)[0]
        if self.use == "linear_logprobs":
            return linear_logprobs(
                h, self.head.weight, batch.target_T, bias=self.head.bias, workspace_bytes=4096
            )
        scored_T = batch.target_T != IGNORE_INDEX
        index_T1 = batch.target_T.clamp_min(0)[:, None]
        return self.head(h).log_softmax(-1).gather(1, index_T1)[:, 0] * scored_T


@pytest.mark.parametrize("use", ["linear_logprobs", "logits"])
@pytest.mark.parametrize("cross", ["sketch", "exact"])
def test_other_layers(use, cross):
    """Biases, LayerNorm, torch's RMSNorm over heads, positions, padding, the tied weight."""
    torch.manual_seed(2)
    policy, units = Toy(use), cases.units()
    stats = GradStats(policy, cross=cross, head=policy.head)
    assert stats.coverage.share == 1.0
    result = cases.run_step(stats, policy, [units])
    cases.assert_matches(result, cases.oracle_gram(policy, units), 1e-10)
    policy.tokens.weight.requires_grad_(False)  # of the head, the bias alone is left
    result = cases.run_step(stats, policy, [units])
    cases.assert_matches(result, cases.oracle_gram(policy, units), 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["exact", "sketch"])
def test_compile(mode):
    """One graph for the model and its head, and the same graph for units of other lengths.

    A transformer for "exact", whose embedding also carries the head's rows; for "sketch", whose
    layers differ by a flag and by that embedding, a model that is traced in a tenth of the time.
    """
    torch._dynamo.reset()
    torch.manual_seed(2)
    policy = Toy("linear_logprobs")
    if mode == "exact":
        policy = FusedHeadLM(cases.model("qwen3", tied=True, num_hidden_layers=1))
    head = policy.head if mode == "sketch" else None
    compiled = torch.compile(policy, backend="aot_eager", fullgraph=True, dynamic=True)
    stats = GradStats(policy, mode, head=head)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for seed in range(3):
        units = cases.units(seed=seed)
        plain = cases.run_step(GradStats(policy, mode, head=head), policy, [units])
        stats._step = 0  # the sketches of both are drawn alike
        traced = cases.run_step(stats, compiled, [units])
        torch.testing.assert_close(traced.gram_BKK, plain.gram_BKK, rtol=1e-10, atol=0)
        torch.testing.assert_close(traced.rows_BKK, plain.rows_BKK, rtol=1e-10, atol=1e-14)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1
    torch._dynamo.reset()


def test_small_tiles(monkeypatch):
    """Row tiles, column tiles and vocabulary tiles smaller than every layer."""
    from bvpo_kernels.backends.eager import engine, grad_stats

    monkeypatch.setattr(grad_stats, "TILE_BYTES", 2000)
    monkeypatch.setattr(grad_stats, "MIN_TILE_ROWS", 5)
    monkeypatch.setattr(grad_stats, "PARTIAL_SUM", 7)
    monkeypatch.setattr(engine, "TOKENS_PER_TILE", 9)
    policy = FusedHeadLM(cases.model(tied=True), workspace_bytes=20_000)
    units = cases.units()
    cases.assert_matches(cases.measure(policy, [units]), cases.oracle_gram(policy, units), 1e-10)
