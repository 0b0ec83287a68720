"""Liger's RMSNorm, RoPE and SwiGLU in the decoder, where there is a GPU to run them."""

from __future__ import annotations

import importlib.util
from typing import Literal

import torch
from transformers import PreTrainedModel

Liger = Literal["auto", "off", "on"]


def apply_liger(model: PreTrainedModel, option: Liger, device: torch.device) -> bool:
    """Replace the layers of `model` that liger-kernel has fused, in place; True if it was done.

    Its losses stay off: the LM head and the loss are this package's. RoPE is replaced in the
    module of transformers that defines the model, hence for all models of the family.

    Args:
        model: with its weights loaded, and no adapters yet.
        option: `train.liger`; "auto" is "on" where a GPU, liger-kernel and its kernels for this
            model exist.
        device: where the model will run.

    Raises:
        ValueError: "on", and one of the three is missing.
    """
    if option == "off":
        return False
    reason = _missing(model, device)
    if reason is None:
        from liger_kernel.transformers import monkey_patch

        # The public entry points take models that are not loaded yet, or have losses only.
        monkey_patch._apply_liger_kernel_to_instance(
            model, rope=True, rms_norm=True, swiglu=True, geglu=True, cross_entropy=False,
            fused_linear_cross_entropy=False,
        )  # fmt: skip
        return True
    if option == "on":
        raise ValueError(f"train.liger: expected {reason}; 'auto' and 'off' go on without")
    return False


def _missing(model: PreTrainedModel, device: torch.device) -> str | None:
    """What Liger's layers lack here, with what there is instead."""
    if device.type != "cuda":
        return f"a CUDA device for 'on', got {device}"
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel to be installed for 'on' (pip install liger-kernel), got none"
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    kind = model.config.model_type
    if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        return f"a model that liger-kernel has layers for, got the model type {kind!r}"
    return None
