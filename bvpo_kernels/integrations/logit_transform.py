"""What lies between a causal LM's hidden states and its logits: read by name, tried in fp32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bvpo_kernels.integrations.lm_head import read_head, replaced_forward

# Names under which configurations of transformers scale, cap and cut the logits.
_MULTIPLIERS = ("logit_scale", "lm_head_multiplier")  # Cohere; Falcon-H1
_DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")  # Granite, MiniCPM3; Inkling
_MULTIPLIERS_UNDER_CAP = ("output_multiplier",)  # Muse
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_VOCABS = ("unpadded_vocab_size",)  # Inkling
_INVERTED = {("hyperclovax", "logits_scaling")}  # multiplies by what Granite divides by

# Nats by which two fp32 computations of the probe's log-probabilities may differ.
TOLERANCE = 1e-3
_HALF = (torch.bfloat16, torch.float16)


class LogitTransform(NamedTuple):
    """z = softcap tanh((h W^T + b) / softcap) / temperature over W's first `vocab` rows.

    A `softcap` or `vocab` of None is none; see `linear_logprobs`.
    """

    temperature: float = 1.0
    softcap: float | None = None
    vocab: int | None = None

    def __call__(self, product: Tensor) -> Tensor:
        """Logits [..., vocab] of h W^T + b, [..., V]: the definition, for comparisons."""
        logits = product[..., : self.vocab]
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits / self.temperature


def logit_transform(config: Any) -> LogitTransform:
    """What a model's own forward does to h W^T + b, read from its configuration.

    Raises:
        ValueError: for a scale together with a softcap, where their order is not known.
    """
    text = config.get_text_config()
    scale, model_type = 1.0, getattr(text, "model_type", None)
    for name in (*_MULTIPLIERS, *_DIVISORS):
        value = getattr(text, name, None) or 1.0
        multiplies = (name in _MULTIPLIERS) != ((model_type, name) in _INVERTED)
        scale *= value if multiplies else 1 / value
    softcap = _first(text, _SOFTCAPS)
    if softcap is not None and scale != 1.0:
        raise ValueError(
            f"model: expected a logit scale or a softcap, got both ({scale}, {softcap}) in "
            f"{type(text).__name__}"
        )
    # c tanh(s z / c) = s (c/s) tanh(z / (c/s)): a scale under a cap is one over another cap.
    inner = _first(text, _MULTIPLIERS_UNDER_CAP)
    if inner is not None:
        scale *= inner
        softcap = None if softcap is None else softcap / inner
    return LogitTransform(1.0 / scale, softcap, _first(text, _VOCABS))


def _first(config: Any, names: tuple[str, ...]) -> Any:
    return next((value for name in names if (value := getattr(config, name, None))), None)


def backbone(model: PreTrainedModel) -> nn.Module:
    """The module whose last hidden states the LM head reads; `model` itself if there is none.

    `base_model` goes by a prefix that some classes set for another class around them (Llama 4,
    Mllama): those have one transformers model below them, and it is that.
    """
    if model.base_model is not model:
        return model.base_model
    below = [child for child in model.children() if isinstance(child, PreTrainedModel)]
    return below[0] if len(below) == 1 else model


def text_decoder(model: Any) -> nn.Module:
    """The layers between input embedding and LM head, without what a multimodal backbone has more.

    Args:
        model: a causal LM of transformers, or a peft model around one.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    found = base.get_decoder()
    # Some say otherwise: Llama 4's text model returns itself, ModernBERT's decoder a linear layer.
    served = isinstance(found, PreTrainedModel) and found is not base
    return found if served else backbone(base)


class _Probe:
    """A backbone's result and a head that tell what happens around them, exact in any dtype.

    Hidden states h_t = s_t u, and for W the matrix of rank one c u^T / |u|^2: h W^T is s_t c, up to
    32 either way. Weights have no part in it: that a tiny logit hides a cap, or a rounded one a
    scale, cannot happen. s and u hold few bits, so that a cast to bf16 changes nothing.
    """

    def __init__(self, rows: int, dim: int, biased: bool) -> None:
        index_D, index_V = torch.arange(dim), torch.arange(rows)
        self.direction_D = (index_D * 7 % 5) - 2.0 + (index_D == 0)
        steps_T = torch.tensor([1.0, -0.5, 2.0, 0.25, -2.0, -1.0, 0.5, -0.25])
        self.hidden_1TD = steps_T[None, :, None] * self.direction_D
        self.column_V = 16.0 * torch.sin(index_V * 2.4 + 1)  # in no order
        # A bias shows whether hidden states or logits were scaled.
        self.bias_V = torch.cos(index_V * 1.7) if biased else torch.zeros(rows)
        self.missing = {"backbone", "LM head"}
        self.rounded: torch.dtype | None = None  # of the hidden states that the head was given

    def logits(self, hidden_1TD: Tensor) -> Tensor:
        """h W^T + b, fp32."""
        u_D, c_V, b_V = (
            x.to(hidden_1TD.device) for x in (self.direction_D, self.column_V, self.bias_V)
        )
        step_1T = (hidden_1TD.float() * u_D).sum(-1) / u_D.square().sum()
        return step_1T[..., None] * c_V + b_V

    def head(self, hidden_1TD: Tensor) -> Tensor:
        """A forward. FSDP2 may cast what it is given, which rounds only what was scaled before."""
        self.missing.discard("LM head")
        if not torch.equal(hidden_1TD.float().cpu(), self.hidden_1TD):
            self.rounded = hidden_1TD.dtype
        return self.logits(hidden_1TD)

    def backbone(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        """A forward hook. fp32: whatever the model does before its head is not rounded, either."""
        if hasattr(output, "last_hidden_state"):
            self.missing.discard("backbone")
            output.last_hidden_state = self.hidden_1TD.to(output.last_hidden_state.device)
        return output


def probe_ids(config: Any, count: int = 8) -> list[int]:
    """Tokens spread over the vocabulary that the model can predict."""
    rows = config.get_text_config().vocab_size
    vocab = min(logit_transform(config).vocab or rows, rows)
    return [(7919 * n + 11) % vocab for n in range(count)]


@torch.no_grad()
def check_logits(
    model: PreTrainedModel,
    transform: LogitTransform,
    device: torch.device,
    forward: Callable[..., Any] | None = None,
) -> None:
    """Try `transform` on the model's own forward, from its backbone's result to its logits.

    In fp32, with hidden states and a head made for it: the same in every dtype of the weights.

    Args:
        device: of the input ids.
        forward: the model's own; `model` where it is None.

    Raises:
        ValueError: naming the class of the model and the difference found.
    """
    name, head = type(model).__name__, model.get_output_embeddings()
    linear = read_head(head, name, materialised=False)
    rows, dim = linear.weight_VD.shape
    probe = _Probe(rows, dim, linear.bias_V is not None)
    ids_1T = torch.tensor([probe_ids(model.config)], device=device)
    # Some forwards call the decoder inside the backbone (OPT, Bart); the two return the same.
    bodies = {backbone(model), text_decoder(model)} - {model}
    hooks = [body.register_forward_hook(probe.backbone) for body in bodies]
    try:
        with replaced_forward(head, probe.head), evaluation(model):
            own_TV = (forward or model)(input_ids=ids_1T, use_cache=False).logits[0]
    except RuntimeError as error:
        if "backbone" in probe.missing:  # nor would it without the probe
            raise
        # Most likely weights between backbone and head, which are in half precision.
        raise ValueError(
            f"model: the head of {name} is not linear in a known way: {error}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    if probe.missing:
        raise ValueError(
            f"model: expected a forward of {name} that calls its backbone, for last_hidden_state, "
            f"and its LM head as modules; {' and '.join(sorted(probe.missing))} not seen"
        )
    want_TV = transform(probe.logits(probe.hidden_1TD.to(own_TV.device)))[0]
    _compare(name, own_TV, want_TV, rounding(own_TV, probe.rounded))


def _compare(name: str, own_TV: Tensor, want_TV: Tensor, tolerance: float) -> None:
    if own_TV.shape != want_TV.shape:
        raise ValueError(
            f"model: {name} has {own_TV.shape[-1]} logits per token, expected the vocabulary of "
            f"its LM head, {want_TV.shape[-1]} rows; its configuration names no other"
        )
    wrong = (own_TV.float().log_softmax(-1) - want_TV.log_softmax(-1)).abs().max()
    if not bool(wrong <= tolerance):
        raise ValueError(
            f"model: {name} scores tokens differently from a linear head with the scale and cap of "
            f"its configuration (by {wrong.item():.3g} nats, expected <= {tolerance:.2g}): its "
            f"head is not linear in a known way"
        )


def rounding(logits: Tensor, dtype: torch.dtype | None = None) -> float:
    """Nats by which log-probabilities of right `logits` may be off.

    In half precision each of a few operations rounds by half an eps of the logits' size.

    Args:
        dtype: that they were computed in, where it is not their own.
    """
    for kind in (dtype, logits.dtype):
        if kind in _HALF:
            return TOLERANCE + 4 * torch.finfo(kind).eps * float(logits.abs().max())
    return TOLERANCE


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """`model.eval()`, and each module's own mode again afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
