"""The LM head of a model as tensors: weight, bias, and LoRA adapters of peft."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class Adapter(NamedTuple):
    """delta W = scale B A, with A [R, D] and B [V, R]; `dropout` is applied to what A reads."""

    a_RD: Tensor
    b_VR: Tensor
    scale: float
    dropout: Callable[[Tensor], Tensor]


class LinearHead(NamedTuple):
    """z = h (W + sum scale B A)^T + b."""

    weight_VD: Tensor
    bias_V: Tensor | None
    adapters: tuple[Adapter, ...] = ()

    def inputs(self, hidden_TD: Tensor) -> dict[str, Any]:
        """What `linear_logprobs` reads of the head for these rows, by its names."""
        if not torch.is_autocast_enabled(hidden_TD.device.type):
            hidden_TD = hidden_TD.to(self.weight_VD.dtype)
        lora = None
        if self.adapters:
            low_TR, b_VR = self._low_rank(hidden_TD)
            lora = (low_TR.to(hidden_TD), b_VR)
        return {"hidden": hidden_TD, "weight": self.weight_VD, "bias": self.bias_V, "lora": lora}

    def _low_rank(self, hidden_TD: Tensor) -> tuple[Tensor, Tensor]:
        """scale h A^T and B of all adapters, side by side."""
        low = [
            scale * (dropout(hidden_TD.to(a_RD.dtype)) @ a_RD.T)
            for a_RD, _, scale, dropout in self.adapters
        ]
        return torch.cat(low, 1), torch.cat([adapter.b_VR for adapter in self.adapters], 1)

    def first_rows(self, count: int | None) -> LinearHead:
        """The head of the first `count` tokens; None is all."""
        if count is None or count >= self.weight_VD.shape[0]:
            return self
        return LinearHead(
            self.weight_VD[:count],
            None if self.bias_V is None else self.bias_V[:count],
            tuple(adapter._replace(b_VR=adapter.b_VR[:count]) for adapter in self.adapters),
        )

    @torch.no_grad()
    def mean_logits(self, hidden_TD: Tensor) -> Tensor:
        """Mean over the vocabulary of h W^T + b, [T], fp32: linear, so W's mean is enough."""
        mean_D = self.weight_VD.mean(0, dtype=torch.float32)
        for a_RD, b_VR, scale, _ in self.adapters:
            mean_D = mean_D + scale * (b_VR.mean(0, dtype=torch.float32) @ a_RD.float())
        mean_T = hidden_TD.float() @ mean_D
        return mean_T if self.bias_V is None else mean_T + self.bias_V.float().mean()


def read_head(head: Any, model: str, *, materialised: bool = True) -> LinearHead:
    """Tensors of an output embedding, as its own forward would use them now.

    Args:
        head: nn.Linear, or what peft puts around one (LoRA, `modules_to_save`).
        model: the name of its model's class, for errors.
        materialised: refuse weights that are sharded now.

    Raises:
        TypeError, ValueError: naming the model and what about its head cannot be served.
    """
    head = _saved_copy(head)
    adapters: tuple[Adapter, ...] = ()
    if hasattr(head, "lora_A") and hasattr(head, "base_layer"):
        adapters = _adapters(head, model)
        head = head.base_layer
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        raise TypeError(f"model: expected an nn.Linear LM head, got {type(head)} in {model}")
    weight = head.weight
    if not weight.is_floating_point():
        raise TypeError(f"model: expected a floating-point LM head, got {weight.dtype} in {model}")
    if getattr(getattr(head, "_hf_hook", None), "offload", False):
        raise ValueError(f"model: expected an LM head in memory, that of {model} is offloaded")
    if materialised and isinstance(weight, DTensor):
        raise ValueError(
            f"model: the LM head of {model} is a DTensor in its forward: it is tensor-parallel, or "
            f"FSDP2 shards a module inside it; expected fully_shard on the head or above it"
        )
    if materialised and weight.ndim != 2:
        raise ValueError(
            f"model: expected an LM head of shape [V, D], got {list(weight.shape)} in {model} "
            f"(DeepSpeed ZeRO-3 and FSDP1 flatten weights; FSDP2 does not)"
        )
    return LinearHead(weight, head.bias, adapters)


def _saved_copy(head: Any) -> Any:
    """Which of the two modules of peft's `modules_to_save` wrapper is active."""
    if not (hasattr(head, "modules_to_save") and hasattr(head, "original_module")):
        return head
    active = [name for name in head.active_adapters if name in head.modules_to_save]
    if head.disable_adapters or not active:
        return head.original_module
    return head.modules_to_save[active[0]]


def _adapters(head: Any, model: str) -> tuple[Adapter, ...]:
    if head.merged:
        if head.disable_adapters:
            raise ValueError(f"model: the LoRA of {model}'s LM head is merged; unmerge it first")
        return ()
    if head.disable_adapters:
        return ()
    names = [name for name in head.active_adapters if name in head.lora_A]
    for name in names:
        if name in getattr(head, "lora_variant", {}):
            kind = type(head.lora_variant[name]).__name__
            raise ValueError(f"model: expected plain LoRA on the LM head of {model}, got {kind}")
        if head.lora_B[name].bias is not None:
            raise ValueError(f"model: expected LoRA without a bias on the LM head of {model}")
    return tuple(
        Adapter(
            head.lora_A[name].weight,
            head.lora_B[name].weight,
            float(head.scaling[name]),
            head.lora_dropout[name],
        )
        for name in names
    )


def call_with_hooks(head: Any, function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)` in the place of the head's forward, so that its hooks run.

    FSDP2 gathers the weight of a module in a hook before its forward, and frees it after. Without
    hooks there is nothing to run, and the call stays visible to torch.compile.
    """
    if not (head._forward_pre_hooks or head._forward_hooks):
        return function(*args)
    with replaced_forward(head, function):
        return head(*args)


@contextmanager
def replaced_forward(module: Any, function: Callable[..., Any]) -> Iterator[None]:
    """`function` in the place of the module's forward; its hooks run as before."""
    previous = module.__dict__.get("forward")
    module.forward = function
    try:
        yield
    finally:
        del module.forward
        if previous is not None:
            module.forward = previous
