"""`patch_model`: a causal LM of transformers that returns log-probabilities, never logits.

Source of the contract, `model(..., labels=labels, fused_lm_head=True).log_probs`: TRL's
`add_fused_lm_head` (1.15 and later).
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from bvpo_kernels.integrations.lm_head import LinearHead, call_with_hooks, read_head
from bvpo_kernels.types import IGNORE_INDEX

# Names under which configurations of transformers scale the logits, and how.
_MULTIPLIERS = ("logit_scale", "lm_head_multiplier")  # Cohere; Falcon-H1
_DIVISORS = ("logits_scaling",)  # Granite
_SOFTCAP = "final_logit_softcapping"  # Gemma 2 and later
OUTPUTS = ("log_probs", "entropy", "mean_logits")
_PROBE_TOKENS = 8


class LogitTransform(NamedTuple):
    """z = softcap tanh((h W^T + b) / softcap) / temperature; see `linear_logprobs`."""

    temperature: float = 1.0
    softcap: float | None = None


def logit_transform(config: Any) -> LogitTransform:
    """What a model's own forward does to its logits, read from its configuration.

    Raises:
        ValueError: for a scale together with a softcap: their order differs between models.
    """
    text = config.get_text_config()
    scale = 1.0
    for name in _MULTIPLIERS:
        scale *= getattr(text, name, None) or 1.0
    for name in _DIVISORS:
        scale /= getattr(text, name, None) or 1.0
    softcap = getattr(text, _SOFTCAP, None)
    if softcap is not None and scale != 1.0:
        raise ValueError(
            f"model: expected a logit scale or a softcap, got both ({scale}, {softcap}) in "
            f"{type(text).__name__}"
        )
    return LogitTransform(1.0 / scale, softcap)


@dataclass
class FusedHeadOutput(ModelOutput):
    """What a patched model returns. Values per token are 0 where the label is -100.

    loss: minus the sum of `log_probs`, divided by `num_items_in_batch` or by the number of scored
        tokens. log_probs, entropy, mean_logits: fp32, [B, L - 1], or [B, L] with `shift_labels`;
        the last two without a gradient and only if they were asked for. label_mask: where a label
        is not -100, same shape.
    """

    loss: Tensor | None = None
    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    mean_logits: Tensor | None = None
    label_mask: Tensor | None = None


class PatchedModel:
    """Handle of a patch: `remove()` brings the model's own forward back. A context manager, too."""

    def __init__(self, model: nn.Module, previous: Any, forward: Any) -> None:
        self.model, self._previous, self._forward = model, previous, forward

    def remove(self) -> None:
        """Undo the patch; nothing to do a second time.

        Raises:
            RuntimeError: somebody else replaced `forward` since; undo that first.
        """
        if self._forward is None:
            return
        if self.model.__dict__.get("forward") is not self._forward:
            raise RuntimeError(
                "remove: expected the forward of patch_model, got one that was put over it; undo "
                "patches in the opposite order"
            )
        del self.model.forward
        if self._previous is not None:
            self.model.forward = self._previous
        self._forward = None

    def __enter__(self) -> PatchedModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


class _Options(NamedTuple):
    transform: LogitTransform
    temperature: float
    outputs: tuple[str, ...]
    impl: str
    workspace_bytes: int | None
    max_scored: int | None = None  # of a call


def patch_model(
    model: nn.Module,
    *,
    temperature: float = 1.0,
    outputs: Sequence[str] = ("log_probs",),
    always: bool = False,
    check: bool = True,
    impl: str = "auto",
    workspace_bytes: int | None = None,
) -> PatchedModel:
    """Give `model` a head that scores labels without [tokens, vocab] logits.

        patch_model(model)
        logp = model(input_ids=ids, labels=labels, fused_lm_head=True).log_probs     # [B, L - 1]

    A call may say how many labels are scored at most, `max_scored` of `linear_logprobs`.

    Without `fused_lm_head=True` the model's own forward runs, so generation is as before. Head and
    backbone are looked up at every call: LoRA on the head (peft, `LinearHead`), weights that FSDP2
    shards, and a head that is replaced later are served. Patch before wrapping in DDP, FSDP2 or
    torch.compile; a model of peft may be patched before or after.

    Args:
        model: a causal LM of transformers, or a peft model around one.
        temperature: divides the logits, after what the model itself does to them.
        outputs: fields of `FusedHeadOutput` to compute, among "log_probs", "entropy" (a little more
            work per logit) and "mean_logits" (not with a softcap).
        always: fuse every call with labels: a plain `transformers.Trainer` then needs no change.
            Such a call returns no logits.
        check: compare eight tokens with the model's own logits, once, now. Skipped where the
            weights are not there yet (meta device, sharded).
        impl, workspace_bytes: of `linear_logprobs`.

    Raises:
        TypeError, ValueError: naming what cannot be served: a model that is no causal LM, a head
            that is not linear, logits scaled in a way not known here, quantized or offloaded heads,
            a tensor-parallel head, experts whose router loss is asked for.
    """
    wrapper: Any = model
    base = wrapper.get_base_model() if hasattr(wrapper, "get_base_model") else wrapper
    unknown = sorted(set(outputs) - set(OUTPUTS))
    if unknown:
        raise ValueError(f"outputs: expected names of {OUTPUTS}, got {unknown}")
    _require_servable(base)
    options = _Options(
        logit_transform(base.config), temperature, tuple(outputs), impl, workspace_bytes
    )
    if "mean_logits" in outputs and options.transform.softcap is not None:
        raise ValueError(f"outputs: mean_logits is not linear in {type(base).__name__}'s logits")
    previous, original = base.__dict__.get("forward"), base.forward
    forward = types.MethodType(_make_forward(base, original, options, always), base)
    base.forward = forward
    handle = PatchedModel(base, previous, forward)
    if check:
        try:
            _compare_with_own_logits(base, original, temperature)
        except BaseException:
            handle.remove()
            raise
    return handle


def _require_servable(model: nn.Module) -> None:
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: expected a PreTrainedModel of transformers, got {name}")
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"model: expected a decoder-only causal LM, got {name}")
    if model.base_model is model:
        raise ValueError(f"model: expected a model with a backbone under it, got {name}")
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"model: expected an LM head, got {name} without output embeddings")
    read_head(head, name, materialised=False)


def _make_forward(
    model: nn.Module, original: Callable[..., Any], options: _Options, always: bool
) -> Callable[..., Any]:
    # The signature of the model's own forward: `generate` and `Trainer` ask for it.
    @functools.wraps(type(model).forward)
    def forward(
        self: Any,
        *args: Any,
        fused_lm_head: bool | None = None,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Any = None,
        max_scored: int | None = None,
        **kwargs: Any,
    ) -> Any:
        labelled = labels is not None or shift_labels is not None
        if not (always and labelled if fused_lm_head is None else fused_lm_head):
            given = {
                "labels": labels,
                "shift_labels": shift_labels,
                "num_items_in_batch": num_items_in_batch,
            }
            kwargs |= {name: value for name, value in given.items() if value is not None}
            return original(*args, **kwargs)
        if not labelled:
            raise ValueError("labels: fused_lm_head=True expects labels or shift_labels, got none")
        if kwargs.get("output_router_logits") or _routes(self.config):
            raise ValueError(
                f"output_router_logits: the fused head of {type(self).__name__} computes no loss "
                f"of its router; set it to False"
            )
        kwargs["use_cache"] = False
        hidden = self.base_model(*args, **kwargs).last_hidden_state
        call = options._replace(max_scored=max_scored)
        return _score(self, hidden, labels, shift_labels, num_items_in_batch, call)

    return forward


def _routes(config: Any) -> bool:
    return bool(getattr(config.get_text_config(), "output_router_logits", False))


def _score(
    model: Any, hidden_BLD: Tensor, labels: Tensor | None, shift_labels: Tensor | None,
    num_items: Any, options: _Options,
) -> FusedHeadOutput:  # fmt: skip
    """The head on every row; rows without a label cost nothing on a CPU, and are 0."""
    if shift_labels is None:
        assert labels is not None
        # The last row predicts nothing: ignored, so that hidden states need not be copied.
        target_BL = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
        scored = slice(None, -1)
    else:
        target_BL, scored = shift_labels, slice(None)
    name = type(model).__name__

    def score(hidden_BLD: Tensor) -> dict[str, Tensor]:
        # Read here, under the head's own hooks: only now are sharded weights whole. One argument,
        # as the head's forward has: the hooks of a tensor-parallel head would drop a second.
        head = read_head(model.get_output_embeddings(), name)
        return _fields(head, hidden_BLD, target_BL, options)

    values = call_with_hooks(model.get_output_embeddings(), score, hidden_BLD)
    mask_BL = target_BL != IGNORE_INDEX
    count = mask_BL.sum().clamp(min=1) if num_items is None else num_items
    return FusedHeadOutput(
        loss=-values["log_probs"].sum() / count,
        label_mask=mask_BL[:, scored],
        **{field: value[:, scored] for field, value in values.items()},
    )


def _fields(
    head: LinearHead, hidden_BLD: Tensor, target_BL: Tensor, options: _Options
) -> dict[str, Tensor]:
    transform = options.transform
    hidden_TD, target_T = hidden_BLD.flatten(0, 1), target_BL.flatten().to(hidden_BLD.device)
    temperature = transform.temperature * options.temperature
    logprobs_T, entropy_T = head.logprobs(
        hidden_TD, target_T, temperature=temperature, softcap=transform.softcap,
        return_entropy="entropy" in options.outputs, impl=options.impl,
        workspace_bytes=options.workspace_bytes, max_scored=options.max_scored,
    )  # fmt: skip
    fields = {"log_probs": logprobs_T}
    if entropy_T is not None:
        fields["entropy"] = entropy_T
    if "mean_logits" in options.outputs:
        mean_T = head.mean_logits(hidden_TD) / temperature
        fields["mean_logits"] = mean_T.masked_fill(target_T == IGNORE_INDEX, 0)
    return {name: value_T.view(target_BL.shape) for name, value_T in fields.items()}


@torch.no_grad()
def _compare_with_own_logits(model: Any, original: Callable[..., Any], temperature: float) -> None:
    """A few tokens through both heads: the one check that an unknown scaling cannot pass.

    Raises:
        ValueError: naming the model's class and the difference found.
    """
    parameters = list(model.parameters())
    if any(p.is_meta or isinstance(p, DTensor) or p.numel() == 0 for p in parameters):
        return
    vocab = model.config.get_text_config().vocab_size
    ids_1L = torch.tensor([[(7919 * n + 11) % vocab for n in range(_PROBE_TOKENS)]])
    ids_1L = ids_1L.to(parameters[0].device)
    training = model.training
    model.eval()
    try:
        ours_T = model.forward(input_ids=ids_1L, labels=ids_1L, fused_lm_head=True).log_probs[0]
        logits_TV = original(input_ids=ids_1L, use_cache=False).logits[0, :-1]
    finally:
        model.train(training)
    logp_TV = (logits_TV.to(ours_T.dtype) / temperature).log_softmax(-1)
    wrong = (ours_T - logp_TV.gather(1, ids_1L[0, 1:, None])[:, 0]).abs().max()
    # bf16 rounds logits of 16 to 32 by up to 0.06 each way; an unknown scale is off by nats.
    half = model.get_output_embeddings().weight.dtype in (torch.bfloat16, torch.float16)
    tolerance = 0.5 if half else 1e-3
    if not bool(wrong <= tolerance):
        raise ValueError(
            f"model: {type(model).__name__} scores tokens differently from its own logits (by "
            f"{wrong.item():.3g} nats, expected <= {tolerance}): its head is not linear in a known "
            f"way"
        )
