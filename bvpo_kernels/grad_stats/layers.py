"""Forwards of trained layers whose backwards also measure their groups' gradients.

What a layer measures is returned as the gradient of small leaf tensors, so that autograd sums it
over layers, wherever and however often a layer's forward runs: under checkpointing, in a compiled
graph, in another thread. A forward hook could not tell a recomputation from a second use.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bvpo_kernels import ops as _bvpo_ops  # noqa: F401  (defines the library)
from bvpo_kernels.eager.grad_stats import Plan
from bvpo_kernels.eager.logprobs import accumulate_dtype
from bvpo_kernels.grad_stats import ops  # noqa: F401  (registers the operators)
from bvpo_kernels.grad_stats.forms import Form, round_to


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
    static: tuple[int, bool, int, int] = field(init=False)

    def __post_init__(self) -> None:
        plan = self.plan
        self.static = (plan.num_layers, plan.exact, plan.sketch, plan.num_kinds)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.plan.ranges_G2, self.plan.kinds_G, self.plan.seed

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


def _kept(collection: Collection, index: int | None) -> Tensor | None:
    return None if index is None else collection.kept[index]


def linear(layer: Layer, collection: Collection, x: Tensor) -> Tensor:
    """x W^T + b."""
    axis = collection.token_axis(layer, x.shape[:-1])
    if axis:  # the rows of a token after those of the token before
        x = x.movedim(axis, 0)
    module: Any = layer.module
    x, weight, bias = autocast(x.device.type, x, module.weight, module.bias)  # type: ignore
    carrier = collection.carrier_GUD if layer.tied else None
    kept = _kept(collection, layer.weight)
    if layer.form.transposed:
        weight, kept = weight.mT, None if kept is None else kept.mT  # type: ignore[union-attr]
    y = _Linear.apply(
        x, weight, bias, collection.record, kept,
        _kept(collection, layer.bias), carrier, collection.rows_U, *collection.tensors(),
        (*collection.static, layer.index),
    )  # fmt: skip
    return y.movedim(0, axis) if axis else y


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x, weight, bias, record, kept_weight, kept_bias, carrier, rows, ranges, kinds, seed,
        static,
    ):  # fmt: skip
        ctx.save_for_backward(x, weight, rows, ranges, kinds, seed)
        ctx.static = static
        ctx.carried = carrier is not None
        ctx.kept = (kept_weight is not None, kept_bias is not None)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, dy):
        x, weight, rows, *tensors = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        dx = dy @ weight if need_x else None
        dweight, dbias, record, kept_weight, kept_bias, drows = (
            torch.ops.bvpo.grouped_linear_backward(
                dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1]), need_weight, need_bias,
                rows if ctx.carried else None, *tensors, *ctx.static,
            )
        )  # fmt: skip
        return (
            dx, dweight if need_weight else None, dbias if need_bias else None, record,
            kept_weight if ctx.kept[0] else None, kept_bias if ctx.kept[1] else None,
            drows if ctx.carried else None, *[None] * 5,
        )  # fmt: skip


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
    common = (collection.record, _kept(collection, layer.weight), *collection.tensors())
    static = (*collection.static, layer.index)
    if not (layer.tied and collection.plan.exact):
        return _Embedding.apply(ids, module.weight, padding, *common, static)
    y, collection.carrier_GUD = _CarryingEmbedding.apply(
        ids, module.weight, padding, collection.rows_U, *common, static
    )
    return y


def _embedding_backward(ctx, dy, rows, drows, ids, tensors):
    dweight, record, kept = torch.ops.bvpo.grouped_embedding_backward(
        dy.reshape(-1, dy.shape[-1]), ids.flatten(), rows, drows, ctx.vocab, ctx.padding,
        *tensors, *ctx.static,
    )  # fmt: skip
    return dweight, record, kept if ctx.kept else None


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ids, weight, padding, record, kept, ranges, kinds, seed, static):
        ctx.save_for_backward(ids, ranges, kinds, seed)
        ctx.static, ctx.vocab, ctx.padding = static, weight.shape[0], padding
        ctx.kept = kept is not None
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx, dy):
        ids, *tensors = ctx.saved_tensors
        dweight, record, kept = _embedding_backward(ctx, dy, None, None, ids, tensors)
        return None, dweight, None, record, kept, *[None] * 4


class _CarryingEmbedding(torch.autograd.Function):
    """The tied embedding: its second result's gradient is the head's share of the same rows."""

    @staticmethod
    def forward(ctx, ids, weight, padding, rows, record, kept, ranges, kinds, seed, static):
        ctx.save_for_backward(ids, rows, ranges, kinds, seed)
        ctx.static, ctx.vocab, ctx.padding = static, weight.shape[0], padding
        ctx.kept = kept is not None
        ctx.set_materialize_grads(False)
        zero = weight.new_zeros((), dtype=accumulate_dtype(weight.dtype))
        carrier = zero.expand(ranges.shape[0], rows.shape[0], weight.shape[1])
        return F.embedding(ids, weight), carrier

    @staticmethod
    def backward(ctx, dy, drows):
        ids, rows, *tensors = ctx.saved_tensors
        if dy is None:  # only the carrier was used, and it is zero
            return (None,) * 10
        dweight, record, kept = _embedding_backward(ctx, dy, rows, drows, ids, tensors)
        return None, dweight, None, None, record, kept, *[None] * 4


def norm(layer: Layer, collection: Collection, x: Tensor, y: Tensor) -> Tensor:
    """y, the module's own result: its own backward stays, the statistics come from dY and x."""
    axis = collection.token_axis(layer, x.shape[:-1])
    if axis:
        x, y = x.movedim(axis, 0), y.movedim(axis, 0)
    needs = (layer.weight is not None, layer.bias is not None)
    y = _Norm.apply(
        y, x.detach(), collection.record, _kept(collection, layer.weight),
        _kept(collection, layer.bias), *collection.tensors(),
        (layer.form.eps, layer.form.centered, *needs), (*collection.static, layer.index),
    )  # fmt: skip
    return y.movedim(0, axis) if axis else y


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, x, record, kept_weight, kept_bias, ranges, kinds, seed, options, static):
        ctx.save_for_backward(x, ranges, kinds, seed)
        ctx.options, ctx.static = options, static
        ctx.kept = (kept_weight is not None, kept_bias is not None)
        return y.view_as(y)

    @staticmethod
    def backward(ctx, dy):
        x, *tensors = ctx.saved_tensors
        size = x.shape[-1]
        record, kept_weight, kept_bias = torch.ops.bvpo.grouped_norm_statistics(
            dy.reshape(-1, size), x.reshape(-1, size), *ctx.options, *tensors, *ctx.static
        )
        return (
            dy, None, record, kept_weight if ctx.kept[0] else None,
            kept_bias if ctx.kept[1] else None, *[None] * 5,
        )  # fmt: skip


def head_logprobs(
    layer: Layer,
    collection: Collection,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    options: tuple[Any, ...],
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies; `options` as `linear_logprobs_forward` takes them, without
    `need_unit_grad`."""
    collection.token_axis(layer, hidden.shape[:-1])
    carrier = collection.carrier_GUD if layer.tied else None
    return _Head.apply(
        hidden, weight, target, bias, collection.record, _kept(collection, layer.weight),
        _kept(collection, layer.bias), carrier, collection.rows_U, *collection.tensors(), options,
        (*collection.static, layer.index),
    )  # fmt: skip


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden, weight, target, bias, record, kept_weight, kept_bias, carrier, rows, ranges,
        kinds, seed, options, static,
    ):  # fmt: skip
        *call, need_entropy, impl = options
        logprobs, max_T, logsum, entropy, _ = torch.ops.bvpo.linear_logprobs_forward(
            hidden, weight, target, bias, *call, need_entropy, False, impl
        )
        ctx.save_for_backward(
            hidden, weight, target, bias, logprobs, max_T, logsum, rows, ranges, kinds, seed
        )
        ctx.call, ctx.static = (*call, impl), static
        ctx.carried = carrier is not None
        ctx.kept = (kept_weight is not None, kept_bias is not None)
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, dlogprobs, _):
        *saved, rows, ranges, kinds, seed = ctx.saved_tensors
        need_hidden, need_weight, _, need_bias = ctx.needs_input_grad[:4]
        dhidden, dweight, dbias, record, kept_weight, kept_bias, drows = (
            torch.ops.bvpo.linear_logprobs_statistics(
                dlogprobs, *saved, *ctx.call, need_hidden, need_weight, need_bias,
                rows if ctx.carried else None, ranges, kinds, seed, *ctx.static,
            )
        )  # fmt: skip
        return (
            dhidden if need_hidden else None, dweight if need_weight else None, None,
            dbias if need_bias else None, record, kept_weight if ctx.kept[0] else None,
            kept_bias if ctx.kept[1] else None, drows if ctx.carried else None, *[None] * 6,
        )  # fmt: skip
