"""The factor of each kind's gradients in the gradient of the loss, which the statistics divide out.

`bvpo_loss` knows it and tells the running collection; whoever multiplies a loss of another maker
says it. What is said twice must agree, since a wrong factor gives a wrong a* without a word.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from torch import Tensor

from bvpo_kernels.types import PackedBatch

Scale = Mapping[str, float | Tensor]
# alpha may have been an fp32 Tensor in one place and a float in another.
_TOLERANCE = 1e-5


@dataclass(frozen=True)
class LossReport:
    """What a call of `bvpo_loss` was: by unit, the weight over the units of the step; by pair,
    over its pairs. exact: both hold also where units have different numbers of pairs."""

    by_unit: Scale
    by_pair: Scale
    exact: bool


class LossScale:
    """What is known of the factors of one collection; `GradStats.collect` yields it."""

    def __init__(
        self,
        batch: PackedBatch,
        given: Scale | None,
        known: Callable[[tuple[float, ...]], None] | None = None,
    ) -> None:
        self._batch, self._known = batch, known
        self._given: dict[str, float] = {}
        self._reports: list[LossReport] = []
        if given is not None:
            if set(given) != set(batch.kinds):
                raise ValueError(f"kind_scale: expected {batch.kinds}, got {tuple(given)}")
            self._given = _checked(given)
            self._announce()

    def scale(self, kind_scale: Scale) -> None:
        """Say the factors of kinds whose losses are not `bvpo_loss`'s, before the backward.

        Raises:
            ValueError: a kind that the batch has not; a factor that is not a finite number > 0.
        """
        unknown = sorted(set(kind_scale) - set(self._batch.kinds))
        if unknown:
            raise ValueError(f"kind_scale: expected kinds of {self._batch.kinds}, got {unknown}")
        self._given |= _checked(kind_scale)
        self._announce()

    def report(self, report: LossReport) -> None:
        """For `bvpo_loss`: a loss of this collection was formed."""
        self._reports.append(report)
        self._announce()

    def _announce(self) -> None:
        """Pass on what is known so far, where it is a factor for every kind."""
        if self._known is not None:
            factors = {**(self._by_unit() or {}), **self._given}
            if all(factors.get(kind, 0) > 0 for kind in self._batch.kinds):
                self._known(tuple(factors[kind] for kind in self._batch.kinds))

    def _by_unit(self) -> dict[str, float] | None:
        if not self._reports:
            return None
        last = self._reports[-1].by_unit
        return {kind: float(value) for kind, value in last.items()}

    def resolve(self) -> tuple[float, ...]:
        """The factors, kind by kind; 1 if nobody said anything.

        Raises:
            ValueError: naming what disagrees, or cannot be known.
        """
        kinds = self._batch.kinds
        if not self._reports:
            if self._given and set(self._given) != set(kinds):
                raise ValueError(f"kind_scale: expected {kinds}, got {tuple(self._given)}")
            return tuple(self._given.get(kind, 1.0) for kind in kinds)
        for report in self._reports:
            self._compare(report)
        factors = _checked({**(self._by_unit() or {}), **self._given})
        return tuple(factors[kind] for kind in kinds)

    def _compare(self, report: LossReport) -> None:
        """One report against what was given, or against the last report and the batch."""
        kinds = self._batch.kinds
        by_unit, by_pair = (
            {kind: float(value) for kind, value in scale.items()}
            for scale in (report.by_unit, report.by_pair)
        )
        judged = [kind for kind in self._given if by_unit.get(kind, 0) > 0]
        known = report.exact or self._evenly_paired(judged)
        if (
            judged
            and known
            and not any(_proportional(self._given, scale, judged) for scale in (by_unit, by_pair))
        ):
            raise ValueError(
                f"kind_scale: expected factors in the proportion of bvpo_loss's, "
                f"{ {kind: by_unit[kind] for kind in judged} }, got "
                f"{ {kind: self._given[kind] for kind in judged} }; without kind_scale its own "
                f"(BVPOLoss.kind_scale) are taken"
            )
        if set(self._given) == set(kinds):
            return
        if set(by_unit) != set(kinds):
            raise ValueError(
                f"kind_scale: expected bvpo_loss of the collected batch, of the kinds {kinds}, got "
                f"one of {tuple(by_unit)}"
            )
        last = self._by_unit() or {}
        if any(not math.isclose(by_unit[k], last[k], rel_tol=_TOLERANCE) for k in kinds):
            raise ValueError(
                f"kind_scale: expected one, for the several losses of this collection, whose "
                f"factors differ: {by_unit} and {last}"
            )
        if not report.exact and not self._evenly_paired(set(kinds) - set(self._given)):
            raise ValueError(
                "unit_counts: bvpo_loss expects the units of the whole step besides pair_counts "
                "while gradients are measured: the units have different numbers of pairs"
            )

    def _evenly_paired(self, kinds: Collection[str]) -> bool:
        """Whether all units have as many pairs of a kind, for each of `kinds`."""
        counts_G = self._batch.pair_group_P.cpu().bincount().tolist()
        names = [self._batch.kinds[index] for index in self._batch.group_kind_G.tolist()]
        found = {each for each in zip(names, counts_G, strict=True) if each[0] in kinds}
        return len(found) == len({name for name, _ in found})


def _proportional(given: Scale, scale: Mapping[str, float], kinds: list[str]) -> bool:
    """Up to a factor that is common to the kinds, as where a loss is divided once more."""
    ratios = [given[kind] / scale[kind] for kind in kinds]
    return all(math.isclose(float(ratio), float(ratios[0]), rel_tol=_TOLERANCE) for ratio in ratios)


def _checked(kind_scale: Scale) -> dict[str, float]:
    factors = {kind: float(value) for kind, value in kind_scale.items()}
    for kind, factor in factors.items():
        if not math.isfinite(factor) or not factor > 0:
            raise ValueError(
                f"kind_scale[{kind!r}]: expected a finite number > 0 (a kind without a gradient "
                f"cannot be measured), got {factor}"
            )
    return factors
