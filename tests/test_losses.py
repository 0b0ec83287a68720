"""The mixture over kinds against sums done by hand, pair by pair."""

import itertools
import math

import pytest
import torch
from loss_cases import OPTIONS, ORACLES, fp64

from bvpo_kernels import TokenPair, Unit, bvpo_loss, losses, pack
from bvpo_kernels.losses import LOSSES
from bvpo_kernels.oracles import losses as reference
from bvpo_kernels.types import EMPTY, KINDS, TRACE


def make_unit(name, traces=1, empties=1):
    """Responses of lengths that all differ, from the name."""
    base = ord(name) - ord("a")
    pairs = {
        TRACE: [
            TokenPair((1, 2), tuple(range(3 + base + k)), tuple(range(2 + base)))
            for k in range(traces)
        ],
        EMPTY: [
            TokenPair((1, 2, 3), tuple(range(1 + base)), (7,) * (2 + k)) for k in range(empties)
        ],
    }
    return Unit(name, pairs)


def make_scores(units, dtype=torch.float32, requires_grad=True, seed=0):
    """Policy and reference scores that belong to a pair whatever the order of the units."""
    policy, ref = [], []
    for unit in units:
        for kind in KINDS:
            for k, _ in enumerate(unit.pairs[kind]):
                generator = torch.Generator().manual_seed(
                    seed + 1000 * ord(unit.unit_id) + 10 * k + KINDS.index(kind)
                )
                values = -8 * torch.rand(4, generator=generator, dtype=torch.float64)
                policy.append(values[:2])
                ref.append(values[2:])
    empty = [torch.zeros(0, dtype=torch.float64)]
    scores_S = torch.cat(policy or empty).to(dtype).requires_grad_(requires_grad)
    return scores_S, torch.cat(ref or empty).to(dtype)


def run(units, alpha=0.5, dtype=torch.float64, **options):
    """The result, and the gradient of the loss with respect to the scores."""
    scores_S, ref_S = make_scores(units, dtype)
    result = bvpo_loss(scores_S, ref_S, pack(units), alpha, **options)
    result.loss.backward()
    return result, scores_S.grad


def oracle(units, alpha, name, beta, **options):
    """The mixture by plain loops over pairs, in Python floats."""
    scores, ref = (x.tolist() for x in make_scores(units, torch.float64, requires_grad=False))
    scores, ref = iter(scores), iter(ref)
    inputs = {kind: [] for kind in KINDS}
    for unit in units:
        for kind in KINDS:
            for pair in unit.pairs[kind]:
                one = {"chosen": next(scores), "rejected": next(scores)}
                one |= {"ref_chosen": next(ref), "ref_rejected": next(ref)}
                one |= {"chosen_lengths": len(pair.chosen), "rejected_lengths": len(pair.rejected)}
                inputs[kind].append(one)
    spec = LOSSES[name]
    values = {}
    for kind, of_kind in inputs.items():
        ratios = [p[s] - p[f"ref_{s}"] for p in of_kind for s in ("chosen", "rejected")]
        kl = math.fsum(ratios) / max(len(ratios), 1)
        values[kind] = []
        for one in of_kind:
            unwanted = () if spec.reference else ("ref_chosen", "ref_rejected")
            unwanted += () if spec.lengths else ("chosen_lengths", "rejected_lengths")
            one = {key: value for key, value in one.items() if key not in unwanted}
            one |= {"kl": kl} if spec.kl else {}
            values[kind].append(ORACLES[name](**one, beta=beta, **options))
    weights = {TRACE: alpha, EMPTY: 1 - alpha}
    counts = {kind: max(len(of_kind), 1) for kind, of_kind in values.items()}
    return reference.bvpo_loss(values, weights, counts)


FOUR = [
    make_unit("a"),
    make_unit("b", traces=3),
    make_unit("c", traces=2, empties=2),
    make_unit("d"),
]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", LOSSES)
def test_mixture_against_the_oracle(name, alpha):
    options = OPTIONS.get(name, {})
    expected = oracle(
        FOUR, alpha, name, 0.2, **{"gamma": 0.5} | options if name == "simpo" else options
    )
    for weight in (
        alpha,
        torch.tensor(alpha, dtype=torch.float64),
        {TRACE: alpha, EMPTY: 1 - alpha},
    ):
        result, _ = run(FOUR, weight, loss=name, beta=0.2, **options)
        assert result.loss.item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("as_alpha", [float, torch.tensor, int])
@pytest.mark.parametrize("alpha", [0.0, 1.0])
@pytest.mark.parametrize("broken", [0.0, math.inf, -math.inf, math.nan])
def test_alpha_0_and_1_select_exactly(alpha, as_alpha, broken):
    """Bitwise the loss and gradient of one kind, even where the other kind's scores are broken."""
    kind, other = (TRACE, EMPTY) if alpha == 1 else (EMPTY, TRACE)
    batch = pack(FOUR)
    used_S = (batch.pair_kind_P == batch.kinds.index(kind)).repeat_interleave(2)
    scores_S, ref_S = make_scores(FOUR)
    with torch.no_grad():
        scores_S.copy_(torch.where(used_S, scores_S, broken))
    for name in LOSSES:
        result = bvpo_loss(scores_S, ref_S, batch, as_alpha(alpha), loss=name)
        alone = Unit("all", {kind: [pair for unit in FOUR for pair in unit.pairs[kind]]})
        alone_S = scores_S.detach()[used_S].requires_grad_()
        expected = bvpo_loss(alone_S, ref_S[used_S], pack([alone]), {TRACE: 1, EMPTY: 1}, loss=name)
        (grad,) = torch.autograd.grad(result.loss, scores_S, retain_graph=True)
        (grad_kind,) = torch.autograd.grad(result.kind_losses[kind], scores_S)
        (grad_alone,) = torch.autograd.grad(expected.kind_losses[kind], alone_S)
        assert torch.equal(result.loss, result.kind_losses[kind])
        assert torch.equal(result.loss, expected.kind_losses[kind])
        assert torch.equal(grad[used_S], grad_alone)
        assert torch.equal(grad, grad_kind)
        assert not grad[~used_S].any()
        if math.isnan(broken):
            assert result.kind_losses[other].isnan(), "what is left out must still be reported"


@pytest.mark.parametrize("name", LOSSES)
def test_splits_into_micro_batches_add_up(name):
    """[1, 3], [2, 2] and all permutations of four units: equal totals, equal gradients."""
    options = {"loss": name, "pair_counts": {TRACE: 7, EMPTY: torch.tensor(5)}}
    if name == "kto":
        options["kl"] = torch.tensor(0.3)
    whole, grad = run(FOUR, 0.3, torch.float32, **options)
    assert whole.loss.item() == pytest.approx(
        run(FOUR, 0.3, torch.float32, **options | {"pair_counts": None})[0].loss.item(), rel=1e-6
    )
    for split in ([1, 3], [2, 2], [3, 1], [1, 1, 1, 1]):
        parts = [FOUR[sum(split[:i]) : sum(split[: i + 1])] for i in range(len(split))]
        results = [run(part, 0.3, torch.float32, **options) for part in parts]
        assert math.fsum(r.loss.item() for r, _ in results) == pytest.approx(
            whole.loss.item(), rel=1e-6
        )
        assert torch.equal(torch.cat([g for _, g in results]), grad)


def test_unequal_packs_weigh_pairs_equally():
    """Without the global counts the mean of means differs: the test above can fail."""
    means = [run(part, 1.0)[0].loss.item() for part in (FOUR[:1], FOUR[1:])]
    assert sum(means) / 2 != pytest.approx(run(FOUR, 1.0)[0].loss.item(), rel=1e-3)


def test_permuting_units_permutes_gradients():
    result, grad = run(FOUR, 0.3)
    lengths = [2 * sum(map(len, unit.pairs.values())) for unit in FOUR]
    by_unit = dict(zip("abcd", grad.split(lengths), strict=True))
    for order in itertools.permutations(FOUR):
        other, other_grad = run(list(order), 0.3)
        assert other.loss.item() == pytest.approx(result.loss.item(), rel=1e-14)
        assert torch.equal(other_grad, torch.cat([by_unit[unit.unit_id] for unit in order]))


@pytest.mark.parametrize("alpha", [0.4, 1.0, torch.tensor(0.4), torch.tensor(1.0)])
@pytest.mark.parametrize("name", LOSSES)
def test_kinds_without_pairs_give_zero_and_a_graph(name, alpha):
    for traces, empties in ((2, 0), (0, 2), (0, 0)):
        units = [make_unit("b", traces, empties)]
        result, grad = run(units, alpha, loss=name)
        assert result.loss.isfinite()
        assert grad is not None
        assert grad.isfinite().all()
        for kind, pairs in ((TRACE, traces), (EMPTY, empties)):
            assert (result.kind_losses[kind].item() == 0) == (pairs == 0)
            assert result.kind_losses[kind].requires_grad
            assert any(key.startswith(f"{kind}/") for key in result.metrics) == (pairs > 0)


def test_weights_that_are_all_zero_leave_a_graph():
    """A step whose gradient is zero must still have one: ranks that skip a backward hang others."""
    units = [make_unit("b")]
    empties = [Unit("b", {EMPTY: units[0].pairs[EMPTY]})]
    for batch, alpha in (
        (pack(units), {TRACE: 0, EMPTY: 0.0}),
        (pack(empties, kinds=(EMPTY,)), 1.0),
        (pack(empties, kinds=(EMPTY,)), torch.tensor(1.0)),
    ):
        scores_S = torch.randn(batch.num_segments, requires_grad=True)
        result = bvpo_loss(scores_S, torch.zeros_like(scores_S), batch, alpha)
        result.loss.backward()
        assert result.loss == 0
        assert torch.equal(scores_S.grad, torch.zeros_like(scores_S))


def test_kind_losses_have_gradients_of_their_own():
    scores_S, ref_S = make_scores(FOUR, torch.float64)
    for alpha in (0.25, torch.tensor(0.25, dtype=torch.float64)):
        result = bvpo_loss(scores_S, ref_S, pack(FOUR), alpha)
        grads = [
            torch.autograd.grad(x, scores_S, retain_graph=True)[0]
            for x in (result.loss, result.trace_loss, result.empty_loss)
        ]
        torch.testing.assert_close(grads[0], 0.25 * grads[1] + 0.75 * grads[2])


def test_other_kinds_by_a_mapping():
    kinds = (TRACE, EMPTY, "marginal")
    units = [Unit("u", {kind: [TokenPair((1,), (2,), (3,))] for kind in kinds})]
    scores_S = torch.arange(6.0, requires_grad=True)
    batch = pack(units, kinds=kinds)
    weights = {"marginal": 0.5, TRACE: torch.tensor(2.0), EMPTY: 0}
    result = bvpo_loss(scores_S, torch.zeros(6), batch, weights)
    parts = [result.kind_losses[kind] for kind in kinds]
    torch.testing.assert_close(result.loss, 2 * parts[0] + 0.5 * parts[2])
    assert result.metrics["alpha"] == 2
    with pytest.raises(ValueError, match="alpha: expected a mapping kind -> weight"):
        bvpo_loss(scores_S, torch.zeros(6), batch, 0.5)


def test_metrics_by_hand():
    units = [
        Unit(
            "u",
            {
                TRACE: [TokenPair((1,), (2, 2), (3,)), TokenPair((1,), (2,), (3, 3, 3, 3))],
                EMPTY: [TokenPair((1,), (2,), (3,))],
            },
        )
    ]
    scores_S, ref_S = fp64(-3, -5, -6, -2, -1, -1), fp64(-4, -5, -6, -4, -1, -1)
    metrics = bvpo_loss(scores_S, ref_S, pack(units), 0.75, beta=0.5).metrics
    expected = {
        # rewards .5 * (1, 0) chosen and .5 * (0, 2) rejected
        "trace/rewards/chosen": 0.25,
        "trace/rewards/rejected": 0.5,
        "trace/rewards/accuracies": 0.5,
        "trace/rewards/margins": -0.25,
        "trace/logps/chosen": -4.5,
        "trace/logps/rejected": -3.5,
        "trace/pairs": 2,
        "trace/loss": (0.4740769841 + 1.3132616875) / 2,
        "empty/rewards/chosen": 0.0,
        "empty/rewards/rejected": 0.0,
        "empty/rewards/accuracies": 0.0,
        "empty/rewards/margins": 0.0,
        "empty/logps/chosen": -1.0,
        "empty/logps/rejected": -1.0,
        "empty/pairs": 1,
        "empty/loss": math.log(2),
        "loss": 0.75 * (0.4740769841 + 1.3132616875) / 2 + 0.25 * math.log(2),
        "alpha": 0.75,
    }
    assert {key: value.item() for key, value in metrics.items()} == pytest.approx(expected)
    assert all(v.ndim == 0 and not v.requires_grad for v in metrics.values())
    simpo = bvpo_loss(scores_S, None, pack(units), 0.75, loss="simpo", beta=2.0).metrics
    assert simpo["trace/rewards/chosen"].item() == pytest.approx((2 * -3 / 2 + 2 * -6 / 1) / 2)
    assert simpo["trace/rewards/rejected"].item() == pytest.approx((2 * -5 / 1 + 2 * -2 / 4) / 2)
    assert simpo["trace/logps/chosen"].item() == pytest.approx(-4.5)


def test_metrics_of_micro_batches_combine():
    whole = run(FOUR, 0.3)[0].metrics
    counts = {TRACE: 7, EMPTY: 5}
    parts = [run(part, 0.3, pair_counts=counts)[0].metrics for part in (FOUR[:1], FOUR[1:])]
    for key, value in whole.items():
        kind = key.split("/")[0]
        if key == "alpha":
            continue
        if key.endswith(("loss", "pairs")):
            combined = sum(part[key] for part in parts)
        else:
            weighted = sum(part[key] * part[f"{kind}/pairs"] for part in parts)
            combined = weighted / sum(part[f"{kind}/pairs"] for part in parts)
        assert combined.item() == pytest.approx(value.item(), rel=1e-12), key


def test_batch_estimate_of_kl_is_per_kind_clamped_and_constant():
    units = [make_unit("a"), make_unit("b")]
    batch = pack(units)
    ref_S = torch.zeros(8, dtype=torch.float64)
    # traces have a positive mean log-ratio, (1 + 3 + 2 + 0) / 4; empties a negative one
    scores_S = fp64(1, 3, -1, -1, 2, 0, -4, -2).requires_grad_()
    estimated = bvpo_loss(scores_S, ref_S, batch, 0.5, loss="kto")
    given = {TRACE: torch.tensor(1.5), EMPTY: torch.tensor(0.0)}
    explicit = bvpo_loss(scores_S, ref_S, batch, 0.5, loss="kto", kl=given)
    assert torch.equal(estimated.loss, explicit.loss)
    grads = [torch.autograd.grad(r.loss, scores_S)[0] for r in (estimated, explicit)]
    assert torch.equal(*grads)
    shared = bvpo_loss(scores_S, ref_S, batch, 0.5, loss="kto", kl=torch.tensor(1.5))
    assert torch.equal(shared.trace_loss, explicit.trace_loss)
    assert not torch.equal(shared.empty_loss, explicit.empty_loss)


def test_alpha_and_reference_are_constants():
    scores_S, ref_S = make_scores(FOUR)
    alpha = torch.tensor(0.4, requires_grad=True)
    ref_S.requires_grad_()
    bvpo_loss(scores_S, ref_S, pack(FOUR), alpha).loss.backward()
    assert alpha.grad is None
    assert ref_S.grad is None


def test_results_are_fp32_for_fp32_scores():
    for alpha in (0.4, torch.tensor(0.4, dtype=torch.float64), torch.tensor(0.5).bfloat16()):
        result, grad = run(FOUR, alpha, torch.float32)
        assert grad.dtype == result.loss.dtype == result.trace_loss.dtype == torch.float32
        assert all(
            value.dtype == torch.float32
            for key, value in result.metrics.items()
            if not key.endswith("pairs")
        )


@pytest.mark.parametrize("name", LOSSES)
def test_compiles_without_a_graph_break(name):
    batch = pack(FOUR)
    scores_S, ref_S = make_scores(FOUR)
    alpha = torch.tensor(0.4)

    def function(scores_S, ref_S, alpha):
        return bvpo_loss(scores_S, ref_S, batch, alpha, loss=name).loss

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = [f(scores_S, ref_S, alpha) for f in (compiled, function)]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*(torch.autograd.grad(r, scores_S)[0] for r in results))
    with pytest.raises(RuntimeError, match="alpha: expected a finite number in"):
        compiled(scores_S, ref_S, torch.tensor(1.5))


BAD_CALLS = [
    ({"alpha": 1.5}, ValueError, r"alpha: expected a finite number in \[0, 1\], got 1.5"),
    ({"alpha": math.nan}, ValueError, "alpha: expected a finite number"),
    ({"alpha": torch.tensor(-0.5)}, ValueError, r"alpha: expected .* in \[0, 1\], got -0.5"),
    ({"alpha": torch.tensor([0.5])}, TypeError, r"alpha: .*got torch.float32 of \[1\]"),
    ({"alpha": torch.tensor(1)}, TypeError, r"alpha: .*got torch.int64 of \[\]"),
    ({"alpha": torch.tensor(0.5, device="meta")}, ValueError, "alpha: expected device cpu"),
    ({"alpha": "half"}, TypeError, "alpha: expected a number, got str"),
    ({"alpha": {TRACE: 1.0}}, ValueError, r"alpha: expected the kinds \['trace', 'empty'\], got"),
    ({"alpha": {TRACE: 1.0, EMPTY: -1}}, ValueError, r"alpha\['empty'\]: expected .*got -1"),
    ({"alpha": {TRACE: 1.0, EMPTY: math.inf}}, ValueError, r"alpha\['empty'\]: .*got inf"),
    ({"loss": "ppo"}, ValueError, "loss: expected one of .*'dpo'.*got 'ppo'"),
    (
        {"gamma": 1.0},
        TypeError,
        r"loss_options: 'dpo' takes \['label_smoothing'\], got \['gamma'\]",
    ),
    ({"beta": 0}, ValueError, "beta: expected a finite number > 0, got 0"),
    ({"kl": torch.tensor(0.1)}, ValueError, "kl: expected None, 'dpo' has no KL term"),
    ({"kl": {TRACE: 1}, "loss": "kto"}, ValueError, "kl: expected the kinds"),
    ({"ref_scores_S": None}, ValueError, "ref_scores_S: 'dpo' expects"),
    (
        {"ref_scores_S": torch.zeros(3)},
        ValueError,
        r"ref_scores_S: expected shape \[24\], got \[3\]",
    ),
    ({"scores_S": torch.zeros(3)}, ValueError, r"scores_S: expected shape \[24\], got \[3\]"),
    ({"scores_S": torch.zeros(24).half()}, TypeError, "scores_S: expected one of .*float16"),
    ({"scores_S": torch.zeros(24, device="meta")}, ValueError, "scores_S: expected device cpu"),
    ({"pair_counts": {TRACE: 7}}, ValueError, "pair_counts: expected the kinds"),
    (
        {"pair_counts": {TRACE: 6, EMPTY: 5}},
        ValueError,
        r"\['trace'\]: .*got 6 for a batch with 7",
    ),
    ({"pair_counts": {TRACE: 7, EMPTY: 5.0}}, TypeError, r"\['empty'\]: expected an int or"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_CALLS)
def test_bad_calls(change, error, message):
    scores_S, ref_S = make_scores(FOUR)
    call = {"scores_S": scores_S, "ref_scores_S": ref_S, "batch": pack(FOUR), "alpha": 0.5} | change
    with pytest.raises(error, match=message):
        bvpo_loss(**call)


@pytest.mark.gpu
@pytest.mark.parametrize("name", LOSSES)
def test_gpu_agrees_without_waiting(name):
    scores_S, ref_S = make_scores(FOUR)
    expected = bvpo_loss(scores_S, ref_S, pack(FOUR), 0.3, loss=name)
    batch, alpha = pack(FOUR, device="cuda"), torch.tensor(0.3, device="cuda")
    scores_gpu = scores_S.detach().cuda().requires_grad_()
    ref_gpu = ref_S.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = bvpo_loss(scores_gpu, ref_gpu, batch, alpha, loss=name)
        result.loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(result.loss.cpu(), expected.loss)
    expected.loss.backward()
    torch.testing.assert_close(scores_gpu.grad.cpu(), scores_S.grad)
    for key, value in expected.metrics.items():
        torch.testing.assert_close(result.metrics[key].cpu(), value)


def test_the_module_exports_what_it_documents():
    assert all(hasattr(losses, name) for name in losses.__all__)
