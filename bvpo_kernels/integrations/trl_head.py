"""The fused head under TRL's trainer: where it is put, and the pass that TRL takes for its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import trl
from torch import Tensor
from trl.trainer import dpo_trainer

from bvpo_kernels.integrations import trl_data
from bvpo_kernels.types import PackedBatch


@contextmanager
def in_place_of_trls(patch: Callable[..., None]) -> Iterator[None]:
    """While a DPOTrainer is made, `patch(model)` runs where TRL adds its own fused head.

    There the models exist and nothing is around them yet (autocast, DeepSpeed, FSDP,
    torch.compile), so that policy and reference get the same head under the same wrappers.

    Raises:
        ImportError: this version of TRL has no such place.
    """
    original = getattr(dpo_trainer, "add_fused_lm_head", None)
    if original is None:
        raise ImportError(f"trl: expected version 1.15 or 1.16, got {trl.__version__}")
    dpo_trainer.add_fused_lm_head = patch
    try:
        yield
    finally:
        dpo_trainer.add_fused_lm_head = original


class PackedPass:
    """One pass of a model over a packed batch, handed to TRL kind by kind in its own layout.

    autocast: that of the trainer. Wrapped in it or not yet, policy and reference run under it.
    """

    def __init__(
        self,
        model: Any,
        inputs: Mapping[str, Any],
        autocast: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.model, self.inputs, self.autocast = model, inputs, autocast
        self.fields: dict[str, Tensor] = {}

    def __call__(self, kind: str, **_: Any) -> SimpleNamespace:
        """What TRL gets for `model(**padded, fused_lm_head=True)`: the padded ids are not used."""
        if not self.fields:
            batch: PackedBatch = self.inputs["packed"]
            # No mask and no cache: only then does attention keep segments apart by position.
            with self.autocast():
                out = self.model(
                    input_ids=batch.tokens_T[None],
                    position_ids=batch.position_ids_T[None],
                    attention_mask=None,
                    use_cache=False,
                    shift_labels=batch.target_T[None],
                    fused_lm_head=True,
                    max_scored=batch.num_scored,
                )
            names = ("log_probs", "entropy", "mean_logits")
            self.fields = {name: out[name][0] for name in names if name in out}
        padded = self.inputs[kind]
        out = {name: trl_data.to_padded(v, padded) for name, v in self.fields.items()}
        out.setdefault("mean_logits", torch.zeros_like(out["log_probs"]))
        is_top1 = torch.zeros_like(out["log_probs"], dtype=torch.bool)
        return SimpleNamespace(**out, is_top1=is_top1, aux_loss=None)
