"""Tiny models and batches for the gradient statistics.

Two layers, so that autograd sums over layers; grouped-query attention with 4 and 2 heads; three
units of ragged lengths; V = 97 and D = 32, so that shapes cannot be confused.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from bvpo_kernels import TokenPair, Unit, bvpo_loss, pack, segment_sum
from bvpo_kernels.grad_stats import GradStats
from bvpo_kernels.mixing import StepStats
from bvpo_kernels.oracles import grad_stats as oracle
from bvpo_kernels.types import EMPTY, TRACE, PackedBatch

VOCAB = 97
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,
    "max_position_embeddings": 128,
}
MODELS = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}


def model(family: str = "llama", *, tied: bool = False, dtype=torch.float64, **options):
    """A causal LM of random weights, the norms' included."""
    torch.manual_seed(1)
    config, cls = MODELS[family]
    made = cls(config(**{**COMMON, **options}, tie_word_embeddings=tied, pad_token_id=None)).to(
        dtype
    )
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim == 1:
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
    return made


def exact_norms(monkeypatch) -> None:
    """transformers' RMSNorms compute in fp32 even in fp64 models; here in the input's dtype."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    def forward(self, x):
        normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * normed

    for cls in (LlamaRMSNorm, Qwen3RMSNorm):
        monkeypatch.setattr(cls, "forward", forward)


def units(count: int = 3, seed: int = 0, traces: int = 1) -> list[Unit]:
    """Trace responses are long, empty ones short, as in training."""
    generator = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> list[int]:
        size = int(torch.randint(low, high, (), generator=generator))
        return torch.randint(0, VOCAB, (size,), generator=generator).tolist()

    def pair(low: int, high: int) -> TokenPair:
        return TokenPair(ids(2, 6), ids(low, high), ids(low, high))

    return [
        Unit(f"u{n}", {TRACE: [pair(6, 14) for _ in range(traces)], EMPTY: [pair(1, 5)]})
        for n in range(count)
    ]


# Weight of each kind, pairs of each kind in the whole step, and what they come to.
ALPHA = {TRACE: 0.3, EMPTY: 0.7}
COUNTS = {TRACE: 8, EMPTY: 6}
SCALE = {kind: ALPHA[kind] / COUNTS[kind] for kind in ALPHA}


def dpo(policy: nn.Module, batch: PackedBatch, alpha=ALPHA, counts=COUNTS) -> Tensor:
    """The mixed loss of a batch; the reference scores follow from the segment alone."""
    scores_S = segment_sum(policy(batch), batch.cu_seqlens)
    ref_scores_S = 0.9 * scores_S.detach()
    return bvpo_loss(scores_S, ref_scores_S, batch, alpha, beta=0.7, pair_counts=counts).loss


def trained(policy: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in policy.parameters() if parameter.requires_grad]


def oracle_gram(policy: nn.Module, batch_units: Sequence[Unit], kinds=(TRACE, EMPTY)) -> Tensor:
    """[B, B, K, K] by a loop over units and kinds, each packed alone."""

    def loss(unit: Unit) -> Tensor:
        counts = {kind: len(unit.pairs.get(kind, ())) for kind in kinds}
        weights = {kind: float(max(count, 1)) for kind, count in counts.items()}
        return dpo(policy, pack([unit], kinds=kinds), weights, counts)

    gradients = oracle.group_gradients(batch_units, kinds, trained(policy), loss)
    return oracle.unit_gram(gradients)


def run_step(stats: GradStats, policy: nn.Module, split: Sequence[Sequence[Unit]]) -> StepStats:
    """One step of the given micro-batches, from gradients None."""
    policy.zero_grad()
    for part in split:
        batch = pack(part)
        with stats.collect(batch, SCALE):
            dpo(policy, batch).backward()
    return stats.result()


def measure(policy: nn.Module, split: Sequence[Sequence[Unit]], **options) -> StepStats:
    return run_step(GradStats(policy, **options), policy, split)


def assert_matches(stats: StepStats, gram_BBKK: Tensor, tolerance: float) -> None:
    """|measured <u, v> - <u, v>| <= tolerance |u| |v|."""
    own_BKK = gram_BBKK.diagonal().permute(2, 0, 1)
    norm_BK = own_BKK.diagonal(dim1=1, dim2=2).sqrt()
    sums_KK = gram_BBKK.sum((0, 1))
    sum_norm_K = sums_KK.diagonal().sqrt()
    pairs = [(stats.gram_BKK, own_BKK, norm_BK[:, :, None] * norm_BK[:, None])]
    pairs.append((stats.sums_KK, sums_KK, sum_norm_K[:, None] * sum_norm_K))
    if stats.rows_BKK is not None:
        pairs.append((stats.rows_BKK, gram_BBKK.sum(1), norm_BK[:, :, None] * sum_norm_K))
    for name, (got, expected, scale) in zip(("gram", "sums", "rows"), pairs, strict=False):
        error = ((got - expected).abs() - tolerance * scale).max().item()
        assert error <= 0, f"{name}: beyond the tolerance by {error}\n{got}\n{expected}"
