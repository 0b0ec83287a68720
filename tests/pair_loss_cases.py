"""Packs, heads and calls of `linear_bvpo_loss` for its tests."""

from dataclasses import dataclass, field
from typing import Any

import torch

from bvpo_kernels import TokenPair, Unit, linear_bvpo_loss, pack
from bvpo_kernels.losses import LOSSES
from bvpo_kernels.oracles.testing import assert_accurate, norm_error, ulp

KINDS = ("trace", "empty")


def units(vocab, count=3, pairs=1, seed=0, lengths=(37, 5)):
    """Of ragged lengths; one response of one token, and prompts, which are not scored."""
    draw = torch.Generator().manual_seed(seed)

    def ids(number):
        return torch.randint(0, vocab, (number,), generator=draw).tolist()

    def pair(length):
        low = max(length // 2, 1)
        sizes = torch.randint(low, length + 1, (2,), generator=draw).tolist()
        return TokenPair(ids(1 + length % 4), ids(sizes[0]), ids(sizes[1]))

    made = []
    for number in range(count):
        groups = {
            kind: [pair(length) for _ in range(pairs)]
            for kind, length in zip(KINDS, lengths, strict=True)
        }
        if number == 1:
            groups["empty"][0] = TokenPair(ids(2), ids(1), ids(3))
        made.append(Unit(f"u{number}", groups))
    return made


@dataclass(frozen=True)
class Case:
    """`scale`: of the weight; `trained`: which inputs need a gradient."""

    dtype: torch.dtype = torch.float32
    dim: int = 24
    vocab: int = 301
    rank: int = 0
    bias: bool = False
    scale: float = 0.5
    trained: tuple[str, ...] = ("hidden", "weight", "bias", "low", "lora_b")
    loss: str = "dpo"
    options: dict[str, Any] = field(default_factory=dict)
    batch: Any = None

    def pack(self):
        return pack(units(self.vocab)) if self.batch is None else self.batch

    def inputs(self):
        draw = torch.Generator().manual_seed(3)

        def new(*shape, scale=1.0):
            return (torch.randn(*shape, generator=draw) * scale).to(self.dtype)

        tokens = self.pack().num_tokens
        made = {
            "hidden": new(tokens, self.dim),
            "weight": new(self.vocab, self.dim, scale=self.scale),
        }
        if self.bias:
            made["bias"] = new(self.vocab)
        if self.rank:
            made["low"] = new(tokens, self.rank)
            made["lora_b"] = new(self.vocab, self.rank, scale=self.scale)
        return made

    def ref_scores(self):
        """About those of the model: slopes of both sides of saturation."""
        if not LOSSES[self.loss].reference:
            return None
        inputs = {name: tensor.double() for name, tensor in self.inputs().items()}
        scores_S = call(self, inputs, impl="reference").scores_S.detach()
        noise_S = torch.randn(len(scores_S), generator=torch.Generator().manual_seed(5))
        return scores_S + 5 * noise_S


def call(case, inputs, ref_scores_S=None, **options):
    batch = case.pack()
    if ref_scores_S is None and LOSSES[case.loss].reference:
        ref_scores_S = torch.zeros(batch.num_segments, dtype=torch.float64)
    acc = torch.promote_types(inputs["hidden"].dtype, torch.float32)
    lora = (inputs["low"], inputs["lora_b"]) if "low" in inputs else None
    asked = {"alpha": 0.3, "loss": case.loss, **case.options, **options}
    return linear_bvpo_loss(
        inputs["hidden"],
        inputs["weight"],
        batch,
        None if ref_scores_S is None else ref_scores_S.to(acc),
        bias=inputs.get("bias"),
        lora=lora,
        **asked,
    )


def run(case, dtype=None, upstream=1.0, **options):
    """Loss, scores and gradients of `case`, computed in another dtype from the same values."""
    ref_scores_S = case.ref_scores()
    inputs = {
        name: tensor.to(dtype or case.dtype).requires_grad_(name in case.trained)
        for name, tensor in case.inputs().items()
    }
    result = call(case, inputs, ref_scores_S, **options)
    (result.loss * upstream).backward()
    found = {"loss": result.loss.detach(), "scores": result.scores_S.detach()}
    return found | {f"d{n}": t.grad for n, t in inputs.items() if n in case.trained}, result


def compare(case, impl, **options):
    """One pass on a backend against naive code in fp64, as accurate as the less accurate one of
    naive code and of recomputed tiles in its dtype: scores of hundreds of nats are rounded before a
    saturated loss looks at them, which is luck. dH is rounded twice: an ulp more."""
    actual, result = run(case, one_pass=True, impl=impl, **options)
    assert result.one_pass
    upstream = {"upstream": options.get("upstream", 1.0)}
    plain, _ = run(case, impl="reference", **upstream)
    again, _ = run(case, impl="eager", one_pass=False, **upstream)
    oracle, _ = run(case, torch.float64, impl="reference", **upstream)
    for name, value in oracle.items():
        if case.dtype == torch.float64:  # the oracle's own
            torch.testing.assert_close(actual[name], value, rtol=1e-10, atol=1e-12)
            continue
        worse = max(plain[name], again[name], key=lambda found, of=value: norm_error(found, of))
        twice = name in ("dhidden", "dlow")
        more = ulp(float(value.norm()), case.dtype) if twice else 0.0
        assert_accurate(name, actual[name], worse, value, more)
    return actual
