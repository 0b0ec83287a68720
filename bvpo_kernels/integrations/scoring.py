"""`score_batch`: log pi(y | x) of every response of a packed batch, under a patched model;
`loss_batch`: their BVPO loss."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from bvpo_kernels.grad_stats.modules import in_mode
from bvpo_kernels.head import linear_bvpo_loss
from bvpo_kernels.packing import segment_sum
from bvpo_kernels.types import BVPOLoss, PackedBatch

# Models that were seen to keep segments apart, and the attention that did.
_checked: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()
_SHORT, _PROBE_TOKENS = 4, 9


def score_batch(model: nn.Module, batch: PackedBatch) -> Tensor:
    """score_s = sum of log pi(y_t | x, y_<t) over the scored tokens t of segment s, [S], in nats.

        patch_model(model)
        result = bvpo_loss(score_batch(model, batch), reference_S, batch, alpha)

    One pass over the row, in fp32 (fp64 for fp64 models), with a gradient unless those are off. The
    model is called with position ids that restart in each segment, without a mask and without a
    cache: only then does attention keep the segments apart. That it does is tried at the first call
    of a model, with two short segments.

    Args:
        model: patched by `patch_model`; DDP, FSDP2, peft or torch.compile may be around it.
        batch: of `pack`, on the model's device.

    Raises:
        TypeError: a model that is not patched.
        ValueError: naming the model's class: it mixes segments (state-space layers, absolute
            positions), or the batch is on another device.
    """
    _require(model, batch)
    target_1T = batch.target_T[None]
    out = _call(model, batch.tokens_T, batch.position_ids_T, shift_labels=target_1T)
    return segment_sum(out.log_probs[0], batch.cu_seqlens)


def loss_batch(
    model: nn.Module,
    batch: PackedBatch,
    ref_scores_S: Tensor | None,
    alpha: float | Tensor | Mapping[str, float | Tensor],
    **mixture: Any,
) -> BVPOLoss:
    """bvpo_loss(score_batch(model, batch), ref_scores_S, batch, alpha, ...), the gradients of a
    trained head being formed with the scores where that serves (`linear_bvpo_loss`).

    Args:
        model, batch: as in `score_batch`.
        ref_scores_S, alpha, mixture: of `linear_bvpo_loss`, but what concerns the head.

    Raises:
        TypeError, ValueError: as `score_batch` and `linear_bvpo_loss`.
    """
    _require(model, batch)
    loss = functools.partial(
        linear_bvpo_loss, batch=batch, ref_scores_S=ref_scores_S, alpha=alpha, **mixture
    )
    return _call(model, batch.tokens_T, batch.position_ids_T, pair_loss=loss).pair_loss


def _require(model: nn.Module, batch: PackedBatch) -> None:
    """A model that keeps the segments of a batch apart, on the batch's device."""
    bare = _unwrapped(model)
    weight, device = next(bare.parameters()), batch.tokens_T.device
    # Sharded and offloaded weights may rest elsewhere than they are used.
    if weight.device != device and not weight.is_meta and not isinstance(weight, DTensor):
        raise ValueError(
            f"batch: expected one on the model's device {weight.device}, got {device}; "
            f"batch.to(device) moves it"
        )
    attention = getattr(bare.config, "_attn_implementation", None)
    if bare not in _checked or _checked[bare] != attention:
        require_separate_segments(bare)
        _checked[bare] = attention


def _unwrapped(model: nn.Module) -> Any:
    """The model of transformers inside of DDP, torch.compile or peft."""
    inner: Any = model
    while True:
        if isinstance(getattr(inner, "module", None), nn.Module):
            inner = inner.module
        elif isinstance(getattr(inner, "_orig_mod", None), nn.Module):
            inner = inner._orig_mod
        elif hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
        else:
            break
    if not hasattr(inner, "config") or not hasattr(inner, "get_output_embeddings"):
        raise _not_patched(inner)
    return inner


def _not_patched(model: nn.Module) -> TypeError:
    return TypeError(
        f"model: expected a causal LM after patch_model(model), got {type(model).__name__}, whose "
        f"forward returns no log_probs"
    )


def _call(model: Any, tokens_T: Tensor, position_ids_T: Tensor, **asked: Any) -> Any:
    """The output of the patched head; `asked`: labels, or a loss."""
    try:
        out = model(
            input_ids=tokens_T[None],
            position_ids=position_ids_T[None],
            attention_mask=None,
            use_cache=False,
            fused_lm_head=True,
            **asked,
        )
    except TypeError as error:
        if "fused_lm_head" in str(error) or "pair_loss" in str(error):
            raise _not_patched(model) from error
        raise
    if getattr(out, "log_probs", None) is None and getattr(out, "pair_loss", None) is None:
        raise _not_patched(model)
    return out


@torch.no_grad()
def require_separate_segments(model: Any, training: bool = False) -> None:
    """Two segments in one row must score as each does alone, and one must not see the other.

    Asked in evaluation mode, or in that of training. Skipped where the weights are not there yet
    (meta device, sharded).

    Raises:
        TypeError: the model is not patched.
        ValueError: naming the model's class (state-space layers, absolute positions...).
    """
    parameters = list(model.parameters())
    if any(p.is_meta or isinstance(p, DTensor) or not p.numel() for p in parameters):
        return
    vocab, device = model.config.get_text_config().vocab_size, parameters[0].device
    ids_T = torch.tensor([(7919 * n + 11) % vocab for n in range(_PROBE_TOKENS)], device=device)
    positions_T = torch.arange(_PROBE_TOKENS, device=device)
    positions_T[_SHORT:] -= _SHORT
    other_T = ids_T.clone()
    other_T[:_SHORT] = ids_T[:_SHORT].flip(0)
    first, second = slice(0, _SHORT), slice(_SHORT, None)

    def score(tokens_T: Tensor, rows: slice) -> Tensor:
        out = _call(model, tokens_T[rows], positions_T[rows], shift_labels=ids_T[rows][None])
        return out.log_probs[0]

    with in_mode(model, training):
        packed_T, seen_T = score(ids_T, slice(None)), score(other_T, slice(None))
        alone_T = torch.cat([score(ids_T, first), score(ids_T, second)])
    full = packed_T.dtype == torch.float64 or parameters[0].dtype == torch.float32
    # A row alone runs other GEMMs, whose rounding in half precision moves logits of 16 to 32 by
    # .1; another first segment leaves the second one's as they are.
    for difference_T, tolerance in (
        (packed_T - alone_T, 1e-3 if full else 0.5),
        ((packed_T - seen_T)[second], 1e-3 if full else 0.05),
    ):
        difference = difference_T.abs().max().item()
        if not difference <= tolerance:
            raise ValueError(
                f"model: {type(model).__name__} mixes the segments of a packed row (by "
                f"{difference:.3g} nats, expected <= {tolerance})"
            )
