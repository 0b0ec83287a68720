"""Forwards of trained layers whose backwards also measure their groups' gradients.

What a layer measures is returned as the gradient of small leaf tensors, so that autograd sums it
over layers, wherever and however often a layer's forward runs: under checkpointing, in a compiled
graph, in another thread. A forward hook could not tell a recomputation from a second use.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bvpo_kernels import ops
from bvpo_kernels.call import Call, Inputs, Kept, Need, Pairs, Plan, accumulate_dtype, cut
from bvpo_kernels.grad_stats.forms import Form, round_to
from bvpo_kernels.ops.derivatives import once
from bvpo_kernels.ops.pair_loss import gradients, shapes_of


@dataclass
class Collection:
    """The leaves and the constants of one collection; read by every layer that runs inside it.

    kept: leaf of each trained parameter, by its index; None where nothing is kept. rows_U: the
    token ids of the batch, ascending. carrier_GUD: what takes the head's rows to the tied
    embedding: zeros that the embedding returns and the head reads, so that autograd hands the
    head's share of those rows to the embedding's backward.
    """

    plan: Plan
    tokens_T: Tensor
    record: Tensor
    kept: list[Tensor | None]
    rows_U: Tensor
    carrier_GUD: Tensor | None = None

    def token_axis(self, layer: Layer, leading: torch.Size) -> int:
        """The axis of the batch's tokens that is to be brought to the front; 0 if none need be.

        That of the probe; without one the first, or the second or third after one of size 1.
        """
        # A size and not a number: a number would be a constant of a compiled graph.
        tokens = self.tokens_T.shape[0]
        axis = layer.axis
        if axis is None or axis >= len(leading):
            ambiguous = leading[1:3] == (tokens, tokens)
            if leading[:1] == (tokens,) or (leading[:2] == (1, tokens) and not ambiguous):
                return 0
            axis = 2 if leading[:1] == (1,) and not ambiguous else None
        if axis is None or leading[axis : axis + 1] != (tokens,):
            expected = (
                f"an input whose leading axes are [1, {tokens}], [{tokens}] or [1, H, {tokens}]"
            )
            raise ValueError(
                f"{layer.name}: expected {expected}, got {list(leading)}; freeze its parameters"
            )
        return axis if any(size != 1 for size in leading[:axis]) else 0


@dataclass(frozen=True)
class Layer:
    """A module with trained parameters of its own, and where it stands in the statistics.

    index: its place in the record. weight, bias: indices of the trained parameters, None for
    frozen or absent ones. tied: its weight is the input embedding and the head's at once. axis: of
    the tokens in its input, None where it was not seen before.
    """

    name: str
    module: nn.Module
    form: Form
    index: int
    weight: int | None
    bias: int | None
    tied: bool = False
    axis: int | None = None

    @property
    def kind(self) -> str:
        return self.form.kind


def autocast(device: str, *tensors: Tensor | None) -> list[Tensor | None]:
    """The casts that torch's own linear layer makes under autocast, outside of the Function."""
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors]


class _Leaves(NamedTuple):
    """What a layer's statistics become the gradients of; None where nothing is kept."""

    record: Tensor
    weight: Tensor | None
    bias: Tensor | None

    @classmethod
    def of(cls, layer: Layer, collection: Collection) -> _Leaves:
        kept = [None if i is None else collection.kept[i] for i in (layer.weight, layer.bias)]
        return cls(collection.record, *kept)

    def present(self) -> tuple[bool, bool]:
        return self.weight is not None, self.bias is not None


def _given(ctx: Any, record: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple:
    """The statistics as gradients of the leaves that are there."""
    weighs, biased = ctx.kept
    return record, weight if weighs else None, bias if biased else None


def linear(layer: Layer, collection: Collection, x: Tensor) -> Tensor:
    """x W^T + b."""
    axis = collection.token_axis(layer, x.shape[:-1])
    if axis:  # the rows of a token after those of the token before
        x = x.movedim(axis, 0)
    module: Any = layer.module
    x, weight, bias = autocast(x.device.type, x, module.weight, module.bias)  # type: ignore
    carrier = collection.carrier_GUD if layer.tied else None
    leaves = _Leaves.of(layer, collection)
    if layer.form.transposed:
        kept = None if leaves.weight is None else leaves.weight.mT
        weight, leaves = weight.mT, leaves._replace(weight=kept)  # type: ignore[union-attr]
    y = _Linear.apply(
        x, weight, bias, *leaves, carrier, collection.rows_U, *collection.plan, layer.index
    )
    return y.movedim(0, axis) if axis else y


def _split(plan_and_layer: tuple) -> tuple[list[Tensor], list[Any]]:
    """The tensors of a plan, which autograd saves, and the rest, with the layer's index."""
    return list(plan_and_layer[:4]), list(plan_and_layer[4:])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        x, weight, bias, leaves, carrier, rows, *plan = cut(
            args, Tensor, Tensor, Tensor, _Leaves, Tensor, Tensor, Plan, int
        )
        tensors, ctx.static = _split((*plan[0], plan[1]))
        ctx.save_for_backward(x, weight, rows, *tensors)
        ctx.carried, ctx.kept = carrier is not None, leaves.present()
        return F.linear(x, weight, bias)

    @staticmethod
    @once
    def backward(ctx, dy):
        x, weight, rows, *tensors = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        dx = dy @ weight if need_x else None
        dweight, dbias, record, kept_weight, kept_bias, drows = ops.grouped_linear_backward(
            dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1]), need_weight, need_bias,
            rows if ctx.carried else None, *tensors, *ctx.static,
        )  # fmt: skip
        return (
            dx,
            dweight if need_weight else None,
            dbias if need_bias else None,
            *_given(ctx, record, kept_weight, kept_bias),
            drows if ctx.carried else None,
            *[None] * (len(ctx.needs_input_grad) - 7),
        )


def embedding(layer: Layer, collection: Collection, ids: Tensor) -> Tensor:
    """Rows of the weight, by its scale."""
    if collection.token_axis(layer, ids.shape):
        raise ValueError(f"{layer.name}: expected ids whose first axes are the tokens")
    rows = _rows(layer, collection, ids)
    if layer.form.scale == 1:
        return rows
    scale, rounded = layer.form.scale, layer.form.scale_rounded
    return rows * (round_to(scale, rows.dtype) if rounded else scale)


def _rows(layer: Layer, collection: Collection, ids: Tensor) -> Tensor:
    module: Any = layer.module
    padding = -1 if module.padding_idx is None else module.padding_idx
    carries = layer.tied and collection.plan.exact
    y, carrier = _Embedding.apply(
        ids, module.weight, padding, *_Leaves.of(layer, collection), carries, collection.rows_U,
        *collection.plan, layer.index,
    )  # fmt: skip
    if carries:
        collection.carrier_GUD = carrier
    return y


class _Embedding(torch.autograd.Function):
    """The second result's gradient is the tied head's share of the same rows, where it `carries`
    any; without elements where not."""

    @staticmethod
    def forward(ctx, *args):
        ids, weight, padding, leaves, carries, rows, *plan = cut(
            args, Tensor, Tensor, int, _Leaves, bool, Tensor, Plan, int
        )
        tensors, ctx.static = _split((*plan[0], plan[1]))
        ctx.save_for_backward(ids, rows, *tensors)
        ctx.size, ctx.carries, ctx.kept = (weight.shape[0], padding), carries, leaves.present()
        ctx.set_materialize_grads(False)
        zero = weight.new_zeros((), dtype=accumulate_dtype(weight.dtype))
        groups = plan[0].ranges_G2.shape[0]
        shape = (groups, rows.shape[0], weight.shape[1]) if carries else (0,)
        return F.embedding(ids, weight), zero.expand(shape)

    @staticmethod
    @once
    def backward(ctx, dy, drows):
        ids, rows, *tensors = ctx.saved_tensors
        nothing = [None] * len(ctx.needs_input_grad)
        if dy is None:  # only the carrier was used, and it is zero
            return tuple(nothing)
        tied = (rows, drows) if ctx.carries else (None, None)
        dweight, record, kept = ops.grouped_embedding_backward(
            dy.reshape(-1, dy.shape[-1]), ids.flatten(), *tied, *ctx.size, *tensors, *ctx.static
        )
        return (None, dweight, None, *_given(ctx, record, kept), *nothing[6:])


def norm(layer: Layer, collection: Collection, x: Tensor, y: Tensor) -> Tensor:
    """y, the module's own result: its own backward stays, the statistics come from dY and x."""
    axis = collection.token_axis(layer, x.shape[:-1])
    if axis:
        x, y = x.movedim(axis, 0), y.movedim(axis, 0)
    trained = (layer.weight is not None, layer.bias is not None)
    y = _Norm.apply(
        y,
        x.detach(),
        (layer.form.eps, layer.form.centered, *trained),
        *_Leaves.of(layer, collection),
        *collection.plan,
        layer.index,
    )
    return y.movedim(0, axis) if axis else y


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        y, x, ctx.form, leaves, *plan = cut(args, Tensor, Tensor, object, _Leaves, Plan, int)
        tensors, ctx.static = _split((*plan[0], plan[1]))
        ctx.save_for_backward(x, *tensors)
        ctx.kept = leaves.present()
        return y.view_as(y)

    @staticmethod
    @once
    def backward(ctx, dy):
        x, *tensors = ctx.saved_tensors
        size = x.shape[-1]
        found = ops.grouped_norm_statistics(
            dy.reshape(-1, size), x.reshape(-1, size), *ctx.form, *tensors, *ctx.static
        )
        given = _given(ctx, *found)
        return (dy, None, None, *given, *[None] * (len(ctx.needs_input_grad) - 6))


def head_logprobs(
    layer: Layer, collection: Collection, inputs: Inputs, call: Call
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies."""
    collection.token_axis(layer, inputs.hidden_TD.shape[:-1])
    carrier = collection.carrier_GUD if layer.tied else None
    return _Head.apply(
        *inputs, *_Leaves.of(layer, collection), carrier, collection.rows_U, call,
        *collection.plan, layer.index,
    )  # fmt: skip


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        inputs, leaves, carrier, rows, ctx.call, *plan = cut(
            args, Inputs, _Leaves, Tensor, Tensor, object, Plan, int
        )
        logprobs, *rest = ops.linear_logprobs_forward(*inputs, *ctx.call, False)
        tensors, ctx.static = _split((*plan[0], plan[1]))
        kept = (logprobs, *rest[: len(Kept._fields) - 1])
        ctx.save_for_backward(*inputs, *kept, rows, *tensors)
        ctx.carried, ctx.kept = carrier is not None, leaves.present()
        entropy = rest[-2]
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once
    def backward(ctx, dlogprobs, _):
        inputs, kept, rows, *tensors = cut(
            ctx.saved_tensors, Inputs, Kept, Tensor, Tensor, Tensor, Tensor, Tensor
        )
        need_hidden, need_weight, _, need_bias = ctx.needs_input_grad[:4]
        dhidden, dweight, dbias, record, kept_weight, kept_bias, drows = (
            ops.linear_logprobs_statistics(
                dlogprobs, *inputs, *kept, *ctx.call, need_hidden, need_weight, need_bias,
                rows if ctx.carried else None, *tensors, *ctx.static,
            )
        )  # fmt: skip
        return (
            dhidden if need_hidden else None, dweight if need_weight else None, None,
            dbias if need_bias else None, None, None,
            *_given(ctx, record, kept_weight, kept_bias), drows if ctx.carried else None,
            *[None] * (len(ctx.needs_input_grad) - 10),
        )  # fmt: skip


def head_pair_loss(
    layer: Layer, collection: Collection, inputs: Inputs, call: Call, pairs: Pairs, need: Need
) -> tuple[Tensor, Tensor]:
    """A 0 that has the loss's gradient, and scores."""
    collection.token_axis(layer, inputs.hidden_TD.shape[:-1])
    carrier = collection.carrier_GUD if layer.tied else None
    return _PairLoss.apply(
        *inputs,
        *_Leaves.of(layer, collection),
        carrier,
        collection.rows_U,
        call,
        *pairs,
        *need,
        *collection.plan,
        layer.index,
    )


class _PairLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        inputs, leaves, carrier, rows, call, pairs, ctx.need, plan, ctx.layer = cut(
            args, Inputs, _Leaves, Tensor, Tensor, object, Pairs, Need, Plan, int
        )
        ctx.carried, ctx.kept = carrier is not None, leaves.present()
        loss, scores, *formed = ops.linear_pair_loss_statistics(
            *inputs, *call, *pairs, *ctx.need, rows if ctx.carried else None, *plan, ctx.layer
        )
        ctx.save_for_backward(pairs.cu_seqlens, *formed)
        ctx.like, ctx.num_layers, ctx.exact = shapes_of(inputs), plan.num_layers, plan.exact
        ctx.mark_non_differentiable(scores)
        return loss, scores

    @staticmethod
    @once
    def backward(ctx, dloss, _):
        cu_seqlens, *formed = ctx.saved_tensors
        gram_GG, kept_weight, kept_bias, drows = formed[4:]
        given = gradients(dloss, cu_seqlens, tuple(formed[:4]), ctx.like, ctx.need)
        products = (gram_GG * dloss.double().square()).flatten() * ctx.exact
        mark = torch.zeros(ctx.num_layers, dtype=torch.float64, device=gram_GG.device)
        mark[ctx.layer] = 1
        return (
            *given,
            *_given(ctx, torch.cat([products, mark]), kept_weight * dloss, kept_bias * dloss),
            drows * dloss if ctx.carried else None,
            *[None] * (len(ctx.needs_input_grad) - 10),
        )
