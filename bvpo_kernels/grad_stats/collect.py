"""`GradStats`: inner products of per-unit gradients, measured during the ordinary backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bvpo_kernels import scope
from bvpo_kernels.call import Call, Inputs, Need, Pairs, Plan, accumulate_dtype
from bvpo_kernels.grad_stats import layers as grouped
from bvpo_kernels.grad_stats.combine import MicroBatchStats, combine
from bvpo_kernels.grad_stats.coverage import Coverage, UncoveredError, lay_out
from bvpo_kernels.grad_stats.layers import Collection, Layer
from bvpo_kernels.grad_stats.probe import replaced_forwards
from bvpo_kernels.grad_stats.scale import LossReport, LossScale, Scale
from bvpo_kernels.grad_stats.uses import bypassing
from bvpo_kernels.mixing import StepStats
from bvpo_kernels.types import PackedBatch

Mode = Literal["exact", "sketch", "norm"]
Cross = Literal["sketch", "exact", "none"]

_MODES = ("exact", "sketch", "norm")
_CROSS = ("sketch", "exact", "none")


class GradStats:
    """<g_k,i, g_l,j> of the gradients of the units i and kinds k of a step.

        stats = GradStats(model)
        for micro in micro_batches:
            with stats.collect(micro.batch):
                bvpo_loss(score(model, micro), ...).loss.backward()
        step_stats = stats.result()          # what AlphaEstimator.update takes

    g_k,i is the gradient, over the covered trained parameters, of the mean of the losses of the
    pairs of kind k in unit i, as `bvpo_loss` weighs them. `.grad` receives what it would receive
    without the statistics. Both the forward and the backward of a micro-batch belong inside
    `collect`: layers run instrumented forwards there. No hooks are used; activation checkpointing
    must be non-reentrant. What a layer can measure is judged now, in a forward of a few tokens
    (where the weights are on the meta device or sharded: by its shapes in the first collection).

    | mode, cross | within a unit | units of one micro-batch | of different ones, and ranks |
    |---|---|---|---|
    | exact, sketch | exact | exact | sketched, calibrated by the exact self terms |
    | exact, exact | exact | exact | their sum exact, `rows_BKK` unknown |
    | exact, none | exact | exact | none: one micro-batch on one rank per step |
    | sketch | sketched | sketched | sketched |
    | norm | exact, over norm weights alone: a proxy | exact | exact |

    "exact" costs no further matrix product: group-wise weight gradients have the FLOPs of their
    sum. cross="exact" keeps a copy of the gradient per kind until `result`, in fp32. Sketches are
    S(G) = L G R^T with signs / sqrt(k), the same on all ranks, drawn anew each step; one costs
    2 T k (P + D) FLOPs per [P, D] weight and k^2 numbers per unit and kind.

    Args:
        model: its trained parameters (`requires_grad`) are found now and whenever that changed.
        mode, cross: see the table. `cross` is not used by the modes "sketch" and "norm".
        strict: raise ValueError for trained parameters that no layer here can measure; else they
            are left out, and `coverage` says how many. Mode "norm" leaves out by design.
        sketch_size: k; a layer's sketched product has a standard deviation between |G| |H| / k
            (flat spectra) and 2 |G| |H| / sqrt(k) (rank one), independent of other layers'.
        seed: of the sketches; the same on all ranks.
        head: module whose weight `linear_logprobs` is given; default: the output embeddings of
            transformers' models.
        within: also measure `StepStats.within_BKK`, in mode "exact": the pairs of one unit and
            kind are taken as replicates, independent given the prompt; a kind of one pair as fixed
            given the prompt. The Gram matrix is then one of pairs.
    """

    def __init__(
        self,
        model: nn.Module,
        mode: Mode = "exact",
        *,
        cross: Cross = "sketch",
        strict: bool = True,
        sketch_size: int = 32,
        seed: int = 0,
        head: nn.Module | None = None,
        within: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
        for name, value, allowed in (("mode", mode, _MODES), ("cross", cross, _CROSS)):
            if value not in allowed:
                raise ValueError(f"{name}: expected one of {allowed}, got {value!r}")
        if isinstance(sketch_size, bool) or not isinstance(sketch_size, int) or sketch_size < 1:
            raise ValueError(f"sketch_size: expected an int >= 1, got {sketch_size!r}")
        if within and mode != "exact":
            raise ValueError(f"within: expected False in mode {mode!r}, which forms no Gram matrix")
        self.model, self.mode, self.strict, self.head = model, mode, strict, head
        self.within = within
        self.cross: Cross = cross if mode == "exact" else "sketch"
        self.sketch_size = sketch_size if self.cross == "sketch" else 0
        self.seed, self._step = seed, 0
        self._micro_batches: list[MicroBatchStats] = []
        self._kind_sums: list[Tensor | None] | None = None
        self._kind_scales: tuple[float, ...] = ()  # the losses' factors within them
        self._arrange()

    @property
    def coverage(self) -> Coverage:
        """How many of the trained parameters are measured, and the names of the others."""
        return self._layout.without(self._bypassed)

    def _arrange(self) -> None:
        self._layout = lay_out(self.model, self.mode, self.head)
        if self._layout.coverage.uncovered and self.strict and self.mode != "norm":
            raise UncoveredError(self._layout.coverage)
        self._bypassed: set[str] = set()
        # Made once: a compiled model guards on the identity of a replaced forward.
        self._forwards = [self._instrumented(layer) for layer in self._layout.layers]

    def _instrumented(self, layer: Layer) -> Callable[..., Any]:
        original = layer.module.forward
        run = {"linear": grouped.linear, "embedding": grouped.embedding}.get(layer.kind)

        def forward(*args: Any, **kwargs: Any) -> Tensor:
            if not torch.is_grad_enabled():  # a reference's pass, a check: nothing to measure
                return original(*args, **kwargs)
            x, *more = *args, *kwargs.values()
            if more:
                raise ValueError(
                    f"{layer.name}: expected one input, got {1 + len(more)}; freeze its parameters"
                )
            if run is None:
                return grouped.norm(layer, _running(), x, original(x))
            return run(layer, _running(), x)

        return forward

    def _changed(self) -> bool:
        trained = [p for p in self.model.parameters() if p.requires_grad]
        known = self._layout.parameters
        return len(trained) != len(known) or any(
            a is not b for a, b in zip(trained, known, strict=True)
        )

    @contextmanager
    def collect(
        self,
        batch: PackedBatch,
        kind_scale: Scale | None = None,
        *,
        counted: bool = True,
    ) -> Iterator[LossScale]:
        """Measure the backward that runs inside; forward and backward of one micro-batch.

        Args:
            batch: what the model is run on, as one row of tokens.
            counted: False runs the layers as ever but leaves the units out of the step: for a rank
                that has fewer micro-batches than another, and calls the model all the same.
            kind_scale: kind -> factor of a unit's gradient of that kind in the gradient of the loss
                that is differentiated, weight / units of the step for a mean over pairs; it is
                divided out, also where the micro-batches of a step differ in it. None: what
                `bvpo_loss` says inside (`BVPOLoss.kind_scale`); 1 without one. Where both are
                said their proportions must agree; weight / pairs of the step, which makes g_k,i a
                sum over pairs, is served, too. A kind of factor 0 has no gradient to measure: clip
                alpha, to [.02, .98] say, or give the kind that should not move the weights a
                factor far below rounding.

        Yields:
            LossScale: its `scale(kind_scale)` says the factors of single kinds whose losses are
            added to `bvpo_loss`'s, before the backward.

        Raises:
            ValueError: naming the argument: a unit without a kind, or already in this step; a
                factor that is not a finite number > 0, or not `bvpo_loss`'s; trained parameters
                that cannot be measured.
            RuntimeError: another collection runs; no backward ran; a layer was used twice in a
                forward (its products with itself would be missing), naming it; a gradient that
                bypassed the layers, naming the parameter.
        """
        if scope.active is not None:
            raise RuntimeError("collect: another collection of gradient statistics is running")
        if self._changed():
            if self._micro_batches:
                raise RuntimeError("collect: expected the same trained parameters within a step")
            self._arrange()
        scale = LossScale(batch, kind_scale, self._expect if self.cross == "exact" else None)
        self._check_batch(batch, counted)
        collection = self._open(batch)
        before = self._gradient_versions()
        self.collection, self._scale, scope.active = collection, scale, self
        modules = [layer.module for layer in self._layout.layers]
        try:
            with replaced_forwards(modules, self._forwards):
                yield scale
        finally:
            scope.active = None
            del self.collection, self._scale
        self._close(batch, collection, scale, before, counted)

    def report_loss(
        self, by_unit: Mapping[str, Tensor], by_pair: Mapping[str, Tensor], exact: bool
    ) -> None:
        """For `bvpo_loss`: the factors of the loss that it returns."""
        self._scale.report(LossReport(by_unit, by_pair, exact))

    def head_logprobs(
        self, inputs: Inputs, call: Call, owner: tuple[Any, Any]
    ) -> tuple[Tensor, Tensor] | None:
        """For `linear_logprobs`: log-probabilities and entropies with statistics in the backward.

        None in mode "norm". `owner`: weight and bias before casts.

        Raises:
            ValueError: the weight is none that this model's head is known to have.
        """
        layer = self._head_of(owner)
        if layer is None:
            return None
        if call.impl == "reference":
            raise ValueError("impl: 'reference' cannot serve this call: it measures no gradients")
        return grouped.head_logprobs(layer, _running(), inputs, call)

    def head_pair_loss(
        self, inputs: Inputs, call: Call, pairs: Pairs, need: Need, owner: tuple[Any, Any]
    ) -> tuple[Tensor, Tensor] | None:
        """For `linear_bvpo_loss`: a 0 that has the loss's gradient, with statistics in its
        backward, and the scores. The rest as `head_logprobs`."""
        layer = self._head_of(owner)
        if layer is None:
            return None
        return grouped.head_pair_loss(layer, _running(), inputs, call, pairs, need)

    @property
    def keeps_groups_apart(self) -> bool:
        """Whether the head's gradients of all groups are needed at once."""
        return self.mode == "exact"

    def no_pair_loss(self, batch: PackedBatch) -> str:
        """Why the pairs of a batch are not the groups that are measured; '' where they are."""
        if self.mode == "norm" or self.within or batch.num_pairs == len(batch.group_kind_G):
            return ""
        return "gradient statistics are collected of groups with several pairs"

    def _head_of(self, owner: tuple[Any, Any]) -> Layer | None:
        """The layer whose weight and bias these are; None where it is not measured.

        Raises:
            ValueError: the weight is none that this model's head is known to have.
        """
        if self.mode == "norm":
            return None
        for layer in self._layout.heads:
            module: Any = layer.module
            if module.weight is owner[0] and (owner[1] is None or module.bias is owner[1]):
                return layer
        if not self.strict:
            return None
        raise ValueError(
            "weight: linear_logprobs got a trained weight that is not the model's output "
            "embedding; name its module: GradStats(model, head=module)"
        )

    def result(
        self, process_group: Any = None, *, ess: Mapping[str, float] | None = None
    ) -> StepStats:
        """The statistics of the micro-batches since the last `result`; starts the next step.

        Args:
            process_group: of torch.distributed; every rank calls, and all get the statistics of
                the units of all ranks, in the order of the ranks. None: of this rank alone.
            ess: unit id -> effective sample size of its traces (`importance_weights`), of every
                unit collected on this rank. Units below 2 are left out of all products and counted.

        Raises:
            ValueError: `ess` lacks a unit.
            RuntimeError: nothing was collected; cross="none" and more than one micro-batch or rank;
                what `collect` could not see before: a layer used twice, a gradient that bypassed
                its layers.
        """
        if not self._micro_batches:
            raise RuntimeError("result: expected at least one collection, got none")
        micro_batches, kind_sums = self._micro_batches, self._kind_sums
        self._rescale((1.0,) * len(micro_batches[0].kinds))
        self.reset()
        self._step += 1
        for micro in micro_batches:
            bypassed = bypassing(micro, self._layout)
            if bypassed and self.strict:
                raise RuntimeError(
                    f"collect: expected gradients of {bypassed} from their layers' own forwards; "
                    f"something else used the parameters"
                )
            self._bypassed.update(bypassed)
            missing = [name for name in micro.unit_ids if ess is not None and name not in ess]
            if missing and micro.counted:
                raise ValueError(
                    f"ess: expected every unit of the step, got none for {missing[:3]}"
                )
        sums = [leaf.grad for leaf in kind_sums or () if leaf is not None]
        return combine(micro_batches, self.mode, self.cross, sums, process_group, ess, self.within)

    def state_dict(self) -> dict[str, int]:
        """The number of steps measured so far, from which the coming sketches are drawn."""
        return {"step": self._step}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on with the sketches of the step after those that `state_dict` had seen."""
        self._step = int(state["step"])

    def reset(self) -> None:
        """Forget what was collected since the last `result`, for a step that is given up."""
        self._micro_batches, self._kind_sums, self._kind_scales = [], None, ()

    def _check_batch(self, batch: PackedBatch, counted: bool) -> None:
        """Every unit once in the step and with every kind; kinds as before."""
        units, kinds = len(batch.unit_ids), len(batch.kinds)
        place = torch.full((units, kinds), -1)
        unit_G, kind_G = batch.group_unit_G.cpu(), batch.group_kind_G.cpu()
        place[unit_G, kind_G] = torch.arange(unit_G.shape[0])
        for unit, name in enumerate(batch.unit_ids):
            if bool((place[unit] < 0).any()):
                kind = batch.kinds[int(place[unit].argmin())]
                raise ValueError(
                    f"batch: expected every kind in every unit, {name!r} has no {kind}"
                )
        seen = {name for m in self._micro_batches if m.counted and counted for name in m.unit_ids}
        again = sorted(seen & set(batch.unit_ids))
        if again or len(set(batch.unit_ids)) != units:
            raise ValueError(f"batch: expected each unit once in a step, got again {again[:3]}")
        if not units:
            raise ValueError("batch: expected at least one unit, got none")
        first = self._micro_batches[0] if self._micro_batches else None
        if first is not None and first.kinds != batch.kinds:
            raise ValueError(f"batch: expected the kinds {first.kinds}, got {batch.kinds}")

    def _resolved(self, scale: LossScale) -> tuple[float, ...]:
        scales = scale.resolve()
        if self._kind_scales == ():
            self._kind_scales = scales
        if self.cross == "exact" and scales != self._kind_scales:
            raise ValueError(
                f"kind_scale: expected {self._kind_scales} as before, where nothing is said, got "
                f"{scales}"
            )
        return scales

    def _expect(self, scales: tuple[float, ...]) -> None:
        """The factors of the backward to come are known."""
        running: Any = self.__dict__.get("collection")
        if running is not None and running.record.grad is not None and scales != self._kind_scales:
            self.reset()
            raise RuntimeError("kind_scale: expected before the backward, got it after")
        self._rescale(scales)

    def _rescale(self, scales: tuple[float, ...]) -> None:
        """Bring the kind sums so far to other factors of the losses: micro-batches may differ in
        theirs, as where each loss is the mean over a number of pairs of its own."""
        old, self._kind_scales = self._kind_scales, scales
        # Without factors so far there were fillers at most, whose sums are 0.
        if self._kind_sums is None or old in ((), scales):
            return
        for leaf in self._kind_sums:
            if leaf is not None and leaf.grad is not None:
                ratio_K = leaf.grad.new_tensor([b / a for a, b in zip(old, scales, strict=True)])
                leaf.grad.mul_(ratio_K.view(-1, *[1] * (leaf.ndim - 1)))

    def _groups(self, batch: PackedBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Token range, kind and owner (`MicroBatchStats`) of what is measured apart: the groups of
        the batch, or its pairs."""
        ranges_G2, kind_G, unit_G = (batch.group_ranges_G2, batch.group_kind_G, batch.group_unit_G)
        if self.within:
            ranges_G2 = torch.stack([batch.cu_seqlens[:-1:2], batch.cu_seqlens[2::2]], 1).long()
            kind_G, unit_G = kind_G[batch.pair_group_P], unit_G[batch.pair_group_P]
        return ranges_G2.cpu(), kind_G, (unit_G * len(batch.kinds) + kind_G).cpu()

    def _open(self, batch: PackedBatch) -> Collection:
        device, layout = batch.tokens_T.device, self._layout
        # Kind sums have one factor each (`_rescale`), hence are kept per kind and not per group.
        ranges_G2, kinds_G, _ = self._groups(batch)
        plan = Plan(
            ranges_G2=ranges_G2,
            kinds_G=kinds_G,
            seed=torch.tensor(self.seed * 1_000_003 + self._step),
            scored_G=_scored(batch, ranges_G2),
            num_layers=layout.num_layers,
            exact=self.mode == "exact",
            sketch=self.sketch_size,
            num_kinds=len(batch.kinds) if self.cross == "exact" else 0,
        )
        covered = {i for layer in layout.layers for i in (layer.weight, layer.bias)}
        kept = self._kind_sums
        if kept is None:
            kept = [
                _leaf(plan, parameter, device) if index in covered else None
                for index, parameter in enumerate(layout.parameters)
            ]
        if plan.num_kinds:
            self._kind_sums = kept
        record_size = plan.ranges_G2.shape[0] ** 2 + plan.num_layers
        return Collection(
            plan=plan,
            tokens_T=batch.tokens_T,
            record=torch.zeros(record_size, dtype=torch.float64, device=device, requires_grad=True),
            kept=kept,
            rows_U=torch.unique(batch.tokens_T),
        )

    def _gradient_versions(self) -> list[tuple[int, int]]:
        return [
            (0, 0) if p.grad is None else (id(p.grad), p.grad._version)
            for p in self._layout.parameters
        ]

    def _close(
        self,
        batch: PackedBatch,
        collection: Collection,
        scale: LossScale,
        before: list[tuple[int, int]],
        counted: bool,
    ) -> None:
        if collection.record.grad is None:
            raise RuntimeError("collect: expected a backward inside, none reached a trained layer")
        try:
            scales = self._resolved(scale) if counted else (1.0,) * len(batch.kinds)
        except ValueError:
            self.reset()  # the kind sums hold a part of unknown factors
            raise
        after = self._gradient_versions()
        sketches = None
        if collection.plan.sketch:
            groups = collection.plan.ranges_G2.shape[0]
            parts = [
                (leaf.new_zeros(leaf.shape) if leaf.grad is None else leaf.grad).reshape(groups, -1)
                for leaf in collection.kept
                if leaf is not None
            ]
            sketches = torch.cat(parts, dim=1)
        self._micro_batches.append(
            MicroBatchStats(
                unit_ids=batch.unit_ids,
                kinds=batch.kinds,
                scales=scales,
                owner_G=self._groups(batch)[2],
                record=collection.record.grad,
                sketch_GF=sketches,
                moved=tuple(
                    i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b
                ),
                counted=counted,
            )
        )


def _running() -> Collection:
    """By the global and not by the closure of a forward: the compiler takes the sizes of tensors
    that hang on a module for constants."""
    assert scope.active is not None, "instrumented forwards run inside collect only"
    return scope.active.collection


def _leaf(plan: Plan, parameter: Tensor, device: torch.device) -> Tensor | None:
    """A zero of the shape of what is kept of `parameter`, without memory; it receives gradients."""
    if not (plan.sketch or plan.num_kinds):
        return None
    zero = torch.zeros((), dtype=accumulate_dtype(parameter.dtype), device=device)
    return zero.expand(plan.kept_shape(tuple(parameter.shape))).requires_grad_()


def _scored(batch: PackedBatch, ranges_G2: Tensor) -> Tensor:
    """Scored rows of each group."""
    ends_S = batch.cu_seqlens[1:].cpu().long()
    before_S = torch.cat([ends_S.new_zeros(1), batch.scored_lengths_S.cpu().cumsum(0)])
    first_G2 = torch.searchsorted(ends_S, ranges_G2, right=True)
    return before_S[first_G2[:, 1]] - before_S[first_G2[:, 0]]
