"""Whether what was measured in a collection is all that its backward did."""

from __future__ import annotations

from bvpo_kernels.grad_stats.combine import MicroBatchStats
from bvpo_kernels.grad_stats.coverage import Layout


def bypassing(micro: MicroBatchStats, layout: Layout) -> list[str]:
    """The covered parameters that got a gradient while none of their layers was used.

    Raises:
        RuntimeError: naming a layer that was used twice, or a tied weight of which one of two uses
            was measured: the Gram matrix lacks a part that cannot be named.
    """
    uses = micro.record[-layout.num_layers :].round().long().tolist()
    used: set[int | None] = set()
    tied: dict[int, set[str]] = {weight: set() for weight in layout.shared}
    for layer in (*layout.layers, *layout.heads):
        if uses[layer.index] > 1:
            raise RuntimeError(
                f"{layer.name}: expected one use of the layer per collection, got "
                f"{uses[layer.index]}: its gradients of different uses were not multiplied"
            )
        if uses[layer.index]:
            used |= {layer.weight, layer.bias}
            if layer.weight in tied:
                tied[layer.weight].add(layer.kind)
    halves = [layout.names[i] for i, kinds in tied.items() if i in micro.moved and len(kinds) == 1]
    if halves:
        raise RuntimeError(
            f"collect: expected both uses of the tied {halves} by their modules or "
            f"linear_logprobs, got one: the gradient of the other was not measured; name the head, "
            f"GradStats(model, head=module), or freeze the weight"
        )
    covered = {i for layer in layout.layers for i in (layer.weight, layer.bias)}
    return [layout.names[i] for i in micro.moved if i in covered and i not in used]
