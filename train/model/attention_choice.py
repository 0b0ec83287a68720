"""Which attention serves a model: its layers run once, and what they ask for is heard.

An attention that is given segments leaves out what it is not given: a window or a chunk that a
model puts into its mask only, segments that a layer does not pass on. No error says so, and a probe
shorter than the window shows nothing. So the layers are called with an attention that computes
nothing and notes what it was called with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from train.model.attention import BY_SEGMENT, FLASH, PROBE, SEGMENTS, unserved

_SOFTCAP = "a softcap"  # flash-attn has one
_VALUE_SIZE = "values of another size than keys"  # sdpa takes them


@dataclass
class Asked:
    """What the layers of a model gave their attention.

    calls: how many layers called it. failure: the error that ended the run. features: what sdpa has
    no argument for, in words. windows: the sizes that layers passed on; local: those that masks
    were made with.
    """

    calls: int = 0
    failure: str | None = None
    features: dict[str, None] = field(default_factory=dict)
    windows: set[int] = field(default_factory=set)
    local: set[int] = field(default_factory=set)

    def obstacles(self, name: str) -> list[str]:
        """Why the attention `name` does not serve these layers, in words; none: it does."""
        if self.failure is not None:
            return [f"layers that fail with it ({self.failure})"]
        if self.calls == 0:
            return ["layers that call no attention of transformers"]
        words = [f for f in self.features if not (name == FLASH and f == _SOFTCAP)]
        if name == SEGMENTS:
            words = [f for f in words if f != _VALUE_SIZE]
        masked = sorted(self.local - self.windows)
        return words + [f"a window or chunk ({n} tokens) that only the mask has" for n in masked]


_heard: list[Asked] = []


def _note(
    module: nn.Module,
    query_BHTD: Tensor,
    key_BGTD: Tensor,
    value_BGTD: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Stands in for an attention: keeps what it was called with, returns zeros [B, T, H, D]."""
    asked = _heard[-1]
    asked.calls += 1
    words = unserved(module, options, attention_mask, whole=True)
    if cu_seq_lens_q is None:
        words.append("layers that pass no segments on")
    if value_BGTD.shape[-1] != key_BGTD.shape[-1]:
        words.append(_VALUE_SIZE)
    asked.features |= dict.fromkeys(words)
    if sliding_window is not None:
        asked.windows.add(sliding_window)
    batch, heads, tokens, _ = query_BHTD.shape
    return value_BGTD.new_zeros(batch, tokens, heads, value_BGTD.shape[-1]), None


def _note_mask(*_: Any, local_size: int | None = None, use_vmap: bool = False, **__: Any) -> None:
    if local_size:
        _heard[-1].local.add(local_size)
    if use_vmap:  # transformers was given a mask function beside the causal one
        _heard[-1].features["a mask of its own"] = None


AttentionInterface.register(PROBE, _note)
AttentionMaskInterface.register(PROBE, _note_mask)


@torch.no_grad()
def listen(model: PreTrainedModel, run: Callable[[], object]) -> Asked:
    """What the layers of `model` ask for in `run`, which calls its decoder on a packed row."""
    before, asked = model.config._attn_implementation, Asked()
    _heard.append(asked)
    try:
        if model._can_set_attn_implementation():
            model.set_attn_implementation(PROBE)
            run()
    except (
        Exception
    ) as error:  # code of any model: an index into a mask that is not there, a refusal
        asked.failure = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    finally:
        _heard.pop()
        model.set_attn_implementation(before)
    return asked


def choose(model: PreTrainedModel, names: Sequence[str], run: Callable[[], object]) -> str:
    """Set the first of `names` that serves the model; where none does, the model keeps its own.

    Args:
        model: with the attention that transformers gives it by default.
        names: see `attention.candidates`.
        run: see `listen`.

    Returns:
        Why names were passed over, in words; "" where the first one serves.
    """
    names = [name for name in names if name in BY_SEGMENT]
    if not names:
        return ""
    asked, reasons = listen(model, run), []
    for name in names:
        obstacles = asked.obstacles(name)
        if not obstacles:
            try:
                model.set_attn_implementation(name)
            except (ValueError, ImportError) as error:
                obstacles = [f"a model that transformers refuses it ({str(error).split('.')[0]})"]
            else:
                break
        reasons.append(f"{name} does not serve {', '.join(obstacles)}")
    return "; ".join(reasons)
