"""Which attention reads the packed rows: flash-attn, torch's own varlen kernel, or sdpa.

transformers gives sdpa a block-diagonal mask, and it works through all [T, T] entries. The others
are given `cu_seqlens` and cost half the sum of the squared segment lengths, so they are what long
rows need. flash-attn and the varlen kernel serve half precision on CUDA only, and their backwards
add in no fixed order: two runs on a GPU differ by rounding. On a CPU a loop over the segments calls
sdpa for each, causal and without a mask.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.utils import is_flash_attn_2_available

from bvpo_kernels.types import PackedBatch

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # a build of torch without it
    varlen_attn = None  # type: ignore[assignment]

AUTO = "auto"
SDPA = "sdpa"
FLASH = "flash_attention_2"
VARLEN = "torch_varlen"
SEGMENTS = "sdpa_segments"
PROBE = "bvpo_probe"  # of `attention_choice`; no "sdpa" or "flash", which transformers looks for
HALF_ONLY = (FLASH, VARLEN)
BY_SEGMENT = (*HALF_ONLY, SEGMENTS)
_HALF = (torch.bfloat16, torch.float16)


def candidates(
    name: str, device: torch.device, compute_dtype: torch.dtype, *, packed: bool = True
) -> tuple[str, ...]:
    """The attention implementations of transformers that `model.attention` may mean, best first.

    Args:
        name: "auto", or a name that transformers knows; `VARLEN` and `SEGMENTS` are registered
            here.
        device: where the model will run.
        compute_dtype: of queries, keys and values.
        packed: rows of several segments (training). Generation has padding and a cache, which
            torch's kernel and the loop are not given here: flash-attn or sdpa stand in.

    Returns:
        For "auto" those that this machine has, ending with sdpa, for which transformers takes
        eager where a model has no sdpa; else one name.

    Raises:
        ValueError: model.attention names an implementation that this device, dtype or torch lacks.
    """
    half = device.type == "cuda" and compute_dtype in _HALF
    flash = half and is_flash_attn_2_available()
    varlen = half and _torch_varlen_serves(device)
    if name == VARLEN and not varlen:
        raise ValueError(
            f"model.attention: {VARLEN!r} expects bfloat16 or float16 on a CUDA device of compute "
            f"capability 8.0 or newer, got {compute_dtype} on {device}"
        )
    # Elsewhere the loop would make the host wait for the lengths in every layer.
    loop = device.type == "cpu"
    serves = {FLASH: flash, VARLEN: varlen and packed, SEGMENTS: loop and packed, SDPA: True}
    found = tuple(known for known, present in serves.items() if present)
    if name == AUTO:
        return found
    if name in (VARLEN, SEGMENTS) and not packed:
        return found[:1] if name == VARLEN else (SDPA,)
    return (name,)


def resolve_attention(
    name: str, device: torch.device, compute_dtype: torch.dtype, *, packed: bool = True
) -> str:
    """The first of `candidates`."""
    return candidates(name, device, compute_dtype, packed=packed)[0]


def _torch_varlen_serves(device: torch.device) -> bool:
    known = varlen_attn is not None and "window_size" in _parameters(varlen_attn)
    return known and torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    """Releases differ: `window_size` came after `varlen_attn`, and `enable_gqa` later still."""
    return frozenset(inspect.signature(function).parameters)


def segment_options(model: PreTrainedModel, batch: PackedBatch) -> dict[str, Any]:
    """What a decoder is called with besides the row and its positions; nothing for sdpa.

    With it flash-attn need not find the segments from the positions again in every layer, which
    makes the host wait for the device.
    """
    if model.config._attn_implementation not in (*BY_SEGMENT, PROBE):
        return {}
    lengths = (batch.cu_seqlens, batch.max_seqlen)
    names = ("cu_seq_lens_q", "max_length_q", "cu_seq_lens_k", "max_length_k")
    return dict(zip(names, (*lengths, *lengths), strict=True))


def varlen_attention(
    module: nn.Module,
    query_BHTD: Tensor,
    key_BGTD: Tensor,
    value_BGTD: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention within segments by torch's `varlen_attn`, as transformers calls it.

    H query heads share G key heads. Without `cu_seq_lens_q` every row of the batch is a segment.
    The result is [B, T, H, D]. fp32 queries (norms of fp32 weights make them) are cast to the dtype
    of autocast, as sdpa's are.

    Raises:
        ValueError: for what the kernel does not compute: a softcap, sinks, a bias, dropout, a
            cache, attention that is not causal, half precision without autocast.
    """
    batch, heads, tokens, _ = query_BHTD.shape
    _refuse(VARLEN, module, options, attention_mask, dropout, key_BGTD.shape[2] == tokens)
    if cu_seq_lens_q is None or max_length_q is None:
        ends = torch.arange(batch + 1, dtype=torch.int32, device=query_BHTD.device)
        cu_seq_lens_q, max_length_q = ends * tokens, tokens
    # [B, heads, T, D] -> [B T, heads, D]: the rows of the batch one after another.
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query_BHTD, key_BGTD, value_BGTD))
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    gqa: dict[str, Any] = {}
    if k.shape[1] != heads:
        if "enable_gqa" in _parameters(varlen_attn):
            gqa = {"enable_gqa": True}
        else:
            k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
    # A window counts the token itself in transformers, and not in torch.
    window = (-1 if sliding_window is None else sliding_window - 1, 0)
    out: Any = varlen_attn(
        q, k, v, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q,
        scale=scaling, window_size=window, **gqa,
    )  # fmt: skip
    return out.unflatten(0, (batch, tokens)), None


def segments_attention(
    module: nn.Module,
    query_BHTD: Tensor,
    key_BGTD: Tensor,
    value_BGTD: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention of each segment alone by torch's sdpa, as transformers calls it.

    H query heads share G key heads. Without `cu_seq_lens_q` every row of the batch is a segment.
    The result is [B, T, H, D].

    Raises:
        ValueError: for what sdpa would leave out in silence, as in `varlen_attention`.
    """
    batch, heads, tokens, _ = query_BHTD.shape
    _refuse(SEGMENTS, module, options, attention_mask, dropout, key_BGTD.shape[2] == tokens)
    lengths = [tokens] * batch if cu_seq_lens_q is None else cu_seq_lens_q.diff().tolist()
    # Of each tensor one split, whose backward is one concatenation. Key heads are repeated: sdpa's
    # fused CPU kernel takes as many as there are query heads.
    parts = []
    for x in (query_BHTD, key_BGTD, value_BGTD):
        x_THD = x.transpose(1, 2).flatten(0, 1)
        if x.shape[1] != heads:
            x_THD = x_THD.repeat_interleave(heads // x.shape[1], dim=1)
        parts.append([part.transpose(0, 1)[None] for part in x_THD.split(lengths)])
    out = []
    for q, k, v in zip(*parts, strict=True):
        mask = _window_mask(q.shape[2], sliding_window, q.device)
        part = scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling
        )
        out.append(part[0].transpose(0, 1))
    return torch.cat(out).unflatten(0, (batch, tokens)), None


def _window_mask(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """[L, L], true for a token and the window - 1 before it; None where that is all of them."""
    if window is None or length <= window:
        return None
    position_L = torch.arange(length, device=device)
    distance_LL = position_L[:, None] - position_L
    return (distance_LL >= 0) & (distance_LL < window)


def unserved(
    module: nn.Module, options: dict[str, Any], attention_mask: Tensor | None, *, whole: bool
) -> list[str]:
    """What a layer asks of its attention that neither kernel nor loop computes, in words."""
    causal = options.get("is_causal")
    wrong = {
        "a softcap": options.get("softcap") is not None,
        "attention sinks": options.get("s_aux") is not None,
        "a position bias": options.get("position_bias") is not None,
        "a mask of its own": attention_mask is not None,
        "a cache": not whole,
        "attention that is not causal": not (
            getattr(module, "is_causal", True) if causal is None else causal
        ),
    }
    return [name for name, present in wrong.items() if present]


def _refuse(
    name: str,
    module: nn.Module,
    options: dict[str, Any],
    attention_mask: Tensor | None,
    dropout: float,
    whole: bool,
) -> None:
    found = unserved(module, options, attention_mask, whole=whole)
    found += ["dropout"] if dropout > 0 else []
    if found:
        raise ValueError(
            f"model.attention: {name!r} does not serve {', '.join(found)} of "
            f"{type(module).__name__}; choose 'sdpa' or 'eager'"
        )


def _no_mask(name: str, *_: Any, attention_mask: Tensor | None = None, **__: Any) -> None:
    """Segments come as `cu_seq_lens_q`, so there is no mask; padding would be attended to."""
    if attention_mask is not None and not bool(attention_mask.all()):
        raise ValueError(
            f"attention_mask: {name!r} expects rows without padding; model.attention 'sdpa' "
            f"serves it"
        )


for _name, _function in ((VARLEN, varlen_attention), (SEGMENTS, segments_attention)):
    AttentionInterface.register(_name, _function)
    AttentionMaskInterface.register(_name, partial(_no_mask, _name))
