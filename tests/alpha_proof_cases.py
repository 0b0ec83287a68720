"""A language model whose traces can be enumerated, and everything a* depends on, exactly.

A prompt is one of four tokens and OPEN. The model writes a trace, one or two of three letters, then
CLOSE, then one of three answers. What does not have that form counts as unfinished and is dropped,
so pi(y | x) is the sum over the twelve traces of pi(r, y | x).

Population of units: x uniform; two samples of the reference model, kept if their answers differ and
ranked by a fixed order of the answers. Given its answer y, the trace of a sample is distributed as
the reference model's posterior q(r | x, y). Kinds: the DPO gradient on (r+, y+) against (r-, y-);
the one with the trace empty; the one on log pi(y+ | x) against log pi(y- | x), the truth.

A further estimator, "short", has traces cut after their first letter.

Suffixes: X prompts, R traces, Y answers, C cells (a prompt and a pair of answers), N trained
parameters, D coordinates, K kinds, B units, S batches.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from transformers import LlamaConfig, LlamaForCausalLM

from bvpo_kernels import TokenPair, Unit, bvpo_loss, pack, segment_sum
from bvpo_kernels.grad_stats import GradStats
from bvpo_kernels.mixing import MARGINAL, Moments, StepStats
from bvpo_kernels.types import EMPTY, TRACE, PackedBatch
from train.model.head import FusedHeadLM

KINDS = (TRACE, EMPTY, MARGINAL)
SHORT = "short"
PROMPTS, OPEN, CLOSE, LETTERS, ANSWERS = (0, 1, 2, 3), 4, 5, (6, 7, 8), (9, 10, 11)
TRACES = [*itertools.product(LETTERS), *itertools.product(LETTERS, repeat=2)]
CUT = [TRACES.index(trace[:1]) for trace in TRACES]
# Cells (prompt, better answer, worse answer), answers as indices: the order is turned by x.
CELLS = [
    (x, better, worse)
    for x in PROMPTS
    for better, worse in itertools.permutations(range(3), 2)
    if (better + x) % 3 < (worse + x) % 3
]
BETA = 0.5


def model(seed: int = 3, spread: float = 0.3) -> LlamaForCausalLM:
    """Two layers in fp64, far from uniform."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=12,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=16,
        initializer_range=spread,
        pad_token_id=None,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).double()


def log_joint(lm: nn.Module, x: int) -> Tensor:
    """log pi(r, y | x), [R, Y], from the model's own logits without packing or fused head."""
    parts = []
    for _, group in itertools.groupby(TRACES, key=len):
        tokens = torch.tensor([[x, OPEN, *trace, CLOSE] for trace in group])
        logp = lm(input_ids=tokens, use_cache=False).logits.log_softmax(-1)
        written = logp[:, 1:-1].gather(2, tokens[:, 2:, None]).sum((1, 2))
        parts.append(written[:, None] + logp[:, -1, list(ANSWERS)])
    return torch.cat(parts)


def log_empty(lm: nn.Module, x: int) -> Tensor:
    """log pi(y | x, empty trace), [Y]."""
    tokens = torch.tensor([[x, OPEN, CLOSE]])
    return lm(input_ids=tokens, use_cache=False).logits[0, -1].log_softmax(-1)[list(ANSWERS)]


def dpo(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor) -> Tensor:
    return -logsigmoid(BETA * (chosen - ref_chosen - rejected + ref_rejected))


def gradient(value: Tensor, lm: nn.Module) -> Tensor:
    """[N], over all parameters."""
    parts = torch.autograd.grad(value, list(lm.parameters()), retain_graph=True)
    return torch.cat([part.flatten() for part in parts])


@dataclass(frozen=True)
class Population:
    """What units are drawn from, with the gradients of every unit that can occur.

    The gradients are given in D orthonormal coordinates of the space that they span, found by a QR
    decomposition; inner products, hence all that is asked, are those in parameter space.
    """

    rotation_ND: Tensor
    probability_CRR: Tensor  # of a cell and its two traces
    trace_CRRD: Tensor
    empty_CD: Tensor
    marginal_CD: Tensor

    def gradients(self) -> Tensor:
        """[units that can occur, K, D]."""
        shape = self.trace_CRRD.shape
        fixed = [part[:, None, None].expand(shape) for part in (self.empty_CD, self.marginal_CD)]
        return torch.stack([self.trace_CRRD, *fixed], dim=3).flatten(0, 2)

    def shortened(self) -> Tensor:
        """[units that can occur, D], of the kind "short"."""
        return self.trace_CRRD[:, CUT][:, :, CUT].flatten(0, 2)

    def error_matrix(self, gradients_UKD: Tensor, batch_size: int) -> Tensor:
        """M of E |sum_k w_k k_bar - mu_m|^2 = w^T M w, for w that sum to one, over all units."""
        weight_U, marginal_UD = self.probability_CRR.flatten(), self.gradients()[:, 2]
        mean_KD = torch.einsum("u,ukd->kd", weight_U, gradients_UKD)
        centred, bias_KD = gradients_UKD - mean_KD, mean_KD - weight_U @ marginal_UD
        noise_KK = torch.einsum("u,ukd,uld->kl", weight_U, centred, centred)
        return bias_KD @ bias_KD.T + noise_KK / batch_size

    def moments(self, units: int) -> Moments:
        """<mu_k, mu_l>, tr S_kl and its part within a cell, by summing over all units."""
        weight_U, gradients_UKD = self.probability_CRR.flatten(), self.gradients()
        mean_KD = torch.einsum("u,ukd->kd", weight_U, gradients_UKD)
        centred = gradients_UKD - mean_KD
        total = torch.einsum("u,ukd,uld->kl", weight_U, centred, centred)
        cell_C = self.probability_CRR.sum((1, 2))
        given_CU = weight_U.view(len(CELLS), -1) / cell_C[:, None]
        by_cell = centred.view(len(CELLS), -1, *centred.shape[1:])
        inner = by_cell - torch.einsum("cu,cukd->ckd", given_CU, by_cell)[:, None]
        within = torch.einsum("cu,cukd,culd->kl", given_CU * cell_C[:, None], inner, inner)
        return Moments(KINDS, torch.stack([total, mean_KD @ mean_KD.T, within]), units)

    def error(self, a: float, batch_size: int) -> float:
        """MSE(a) = |a mu_t + (1 - a) mu_e - mu_m|^2 + tr Cov(a g_t + (1 - a) g_e) / B, exactly."""
        weight_U, (t, e, m) = self.probability_CRR.flatten(), self.gradients().unbind(1)
        mixed = a * t + (1 - a) * e
        mean = weight_U @ mixed
        variance = weight_U @ (mixed - mean).square().sum(1)
        return ((mean - weight_U @ m).square().sum() + variance / batch_size).item()

    def batch_error(self, a: float, batch_size: int) -> float:
        """The same against the marginal gradient of the batch's own units, mean_i m_i."""
        weight_U, (t, e, m) = self.probability_CRR.flatten(), self.gradients().unbind(1)
        wrong = a * t + (1 - a) * e - m
        mean = weight_U @ wrong
        variance = weight_U @ (wrong - mean).square().sum(1)
        return (mean.square().sum() + variance / batch_size).item()

    def draw(self, *shape: int) -> Tensor:
        """Indices of independent units, into the rows of `gradients`."""
        count = torch.Size(shape).numel()
        return self.probability_CRR.flatten().multinomial(count, replacement=True).view(shape)


def population(policy: nn.Module, reference: nn.Module) -> Population:
    """By enumeration: one backward for each (x, r, y) and two for each cell."""
    score, empty, marginal, ratio, probability = [], [], [], [], []
    for x in PROMPTS:
        joint_RY, empty_Y = log_joint(policy, x), log_empty(policy, x)
        with torch.no_grad():
            ref_RY, ref_empty_Y = log_joint(reference, x), log_empty(reference, x)
        answer_Y, ref_answer_Y = joint_RY.logsumexp(0), ref_RY.logsumexp(0)
        sides = [[better, worse] for prompt, better, worse in CELLS if prompt == x]
        score.append(torch.stack([gradient(one, policy) for one in joint_RY.flatten()]))
        empty += [gradient(dpo(*empty_Y[pair], *ref_empty_Y[pair]), policy) for pair in sides]
        marginal += [gradient(dpo(*answer_Y[pair], *ref_answer_Y[pair]), policy) for pair in sides]
        ratio.append((joint_RY - ref_RY).detach())
        # A pair of samples, answers and traces together: pi(r+, y+ | x) pi(r-, y- | x).
        both = [ref_RY[:, None, better].exp() * ref_RY[:, worse].exp() for better, worse in sides]
        probability.append(torch.stack(both) / torch.stack(both).sum() / len(PROMPTS))
    # Coordinates: an orthonormal basis of everything that a unit's gradient is made of.
    basis_DN = torch.cat([*score, torch.stack(empty), torch.stack(marginal)])
    rotation_ND = torch.linalg.qr(basis_DN.T).Q
    trace = []
    for x, better, worse in CELLS:
        margin_RR = BETA * (ratio[x][:, None, better] - ratio[x][:, worse])
        slope_RR1 = -BETA * torch.sigmoid(-margin_RR)[..., None]
        score_RYD = (score[x] @ rotation_ND).view(len(TRACES), len(ANSWERS), -1)
        trace.append(slope_RR1 * (score_RYD[:, None, better] - score_RYD[:, worse]))
    return Population(
        rotation_ND,
        torch.cat(probability),
        torch.stack(trace),
        torch.stack(empty) @ rotation_ND,
        torch.stack(marginal) @ rotation_ND,
    )


def unit(index: int, name: str, kinds: Sequence[str] = KINDS[:2]) -> Unit:
    """The unit of a row of `Population.gradients`, as tokens.

    Its marginal has the twelve traces of both answers as segments: `step` takes their logsumexp.
    """
    cell, one, other = torch.unravel_index(
        torch.tensor(index), (len(CELLS), len(TRACES), len(TRACES))
    )
    x, better, worse = CELLS[cell]

    def traced(chosen: int, rejected: int) -> TokenPair:
        sides = ((chosen, better), (rejected, worse))
        return TokenPair([x, OPEN], *([*TRACES[r], CLOSE, ANSWERS[y]] for r, y in sides))

    pairs = {
        TRACE: [traced(int(one), int(other))],
        EMPTY: [TokenPair([x, OPEN, CLOSE], [ANSWERS[better]], [ANSWERS[worse]])],
        SHORT: [traced(CUT[one], CUT[other])],
        MARGINAL: [traced(r, r) for r in range(len(TRACES))],
    }
    return Unit(name, {kind: pairs[kind] for kind in kinds})


def units(index_B: Tensor, kinds: Sequence[str] = KINDS[:2]) -> list[Unit]:
    """Drawn with replacement, so they are named by their place."""
    return [unit(index, f"u{place}", kinds) for place, index in enumerate(index_B.tolist())]


def scores(policy: FusedHeadLM, batch: PackedBatch) -> Tensor:
    return segment_sum(policy(batch), batch.cu_seqlens)


def backward(
    policy: FusedHeadLM, reference: FusedHeadLM, batch: PackedBatch, alpha: float | dict[str, float]
) -> None:
    """One step's backward, as the training loop has it."""
    with torch.no_grad():
        ref_S = scores(reference, batch)
    bvpo_loss(scores(policy, batch), ref_S, batch, alpha, beta=BETA).loss.backward()


def step_gradient(
    policy: FusedHeadLM, reference: FusedHeadLM, index_B: Tensor, alpha: float
) -> Tensor:
    """What the optimizer would get, [N]."""
    policy.zero_grad()
    backward(policy, reference, pack(units(index_B)), alpha)
    return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])


def measure(
    stats: GradStats, policy: FusedHeadLM, reference: FusedHeadLM, index_B: Tensor, alpha: float
) -> StepStats:
    """What `GradStats` sees of one step."""
    batch = pack(units(index_B))
    with stats.collect(batch):
        backward(policy, reference, batch, alpha)
    return stats.result()


def measure_mixture(
    stats: GradStats,
    policy: FusedHeadLM,
    reference: FusedHeadLM,
    index_B: Tensor,
    weights: dict[str, float],
) -> StepStats:
    """What `GradStats` sees of a step along a mixture of any kinds."""
    kinds = tuple(weights)
    batch = pack(units(index_B, kinds), kinds=kinds)
    policy.zero_grad()
    with stats.collect(batch):
        backward(policy, reference, batch, weights)
    return stats.result()


def measure_marginal(
    stats: GradStats, policy: FusedHeadLM, reference: FusedHeadLM, index_B: Tensor
) -> StepStats:
    """The three kinds, the marginal's loss taken over all traces; every loss has weight 1."""
    batch = pack(units(index_B, KINDS), kinds=KINDS)
    counts = {kind: float(len(index_B)) for kind in KINDS[:2]}
    with stats.collect(batch) as scale:
        scale.scale({MARGINAL: 1.0})
        scores_S = scores(policy, batch)
        with torch.no_grad():
            ref_S = scores(reference, batch)
        weights = {**counts, MARGINAL: 0.0}
        loss = bvpo_loss(scores_S, ref_S, batch, weights, beta=BETA).loss
        of_marginal_S = (batch.pair_kind_P == KINDS.index(MARGINAL)).repeat_interleave(2)
        shape = (len(index_B), len(TRACES), 2)
        answers = [s[of_marginal_S].view(shape).logsumexp(1).unbind(1) for s in (scores_S, ref_S)]
        (loss + dpo(*answers[0], *answers[1]).sum()).backward()
    return stats.result()


def train(policy: FusedHeadLM, reference: FusedHeadLM, batches_SB: Tensor, lr: float) -> None:
    """DPO steps on the mixture with a = 0.5."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, weight_decay=0.0)
    for index_B in batches_SB:
        backward(policy, reference, pack(units(index_B)), 0.5)
        optimizer.step()
        optimizer.zero_grad()
