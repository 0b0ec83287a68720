"""From inner products of per-unit gradients to unbiased means and covariances, with their error.

Suffixes: B units, K kinds, X the families of moments, F = X K K all moments in a row. Every tensor
is fp64. "tr S_uv" is the trace of the covariance of the gradients of kinds u and v over units, and
<mu_u, mu_v> the inner product of their means: all that the mean squared error of a mixture needs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MIN_UNITS = 2
MIN_ESS = 2.0
COVARIANCES, MEANS, WITHIN = range(3)  # families of moments, the index X


def _check_tensor(name: str, tensor: object, shape: Sequence[int]) -> None:
    """An fp64 Tensor of `shape` (-1: any size) with finite values."""
    if not isinstance(tensor, Tensor) or tensor.dtype != torch.float64:
        got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name}: expected a float64 Tensor, got {got}")
    fits = tensor.ndim == len(shape)
    if not fits or any(n not in (-1, m) for n, m in zip(shape, tensor.shape, strict=True)):
        expected = str(list(shape)).replace("-1", "B")
        raise ValueError(f"{name}: expected shape {expected}, got {list(tensor.shape)}")
    if not bool(tensor.isfinite().all()):
        raise ValueError(f"{name}: expected finite values, got {tensor[~tensor.isfinite()][0]}")


def _check_kinds(kinds: object) -> None:
    if not isinstance(kinds, tuple) or not all(isinstance(kind, str) for kind in kinds):
        raise TypeError(f"kinds: expected a tuple of str, got {kinds!r}")
    if not kinds or len(set(kinds)) != len(kinds):
        raise ValueError(f"kinds: expected distinct names, at least one, got {kinds}")


@dataclass(frozen=True)
class StepStats:
    """Inner products of the per-unit gradients of one whole step: what `GradStats` measures.

    g_k,i is the gradient, over all trained parameters, of the loss of kind k of unit i alone, and
    G_k = sum_i g_k,i. The mean over the B units is the gradient of L_k; divisions by B, by ranks
    and by accumulation steps, and the mixing weight, are undone. (A factor common to all kinds and
    units cancels in every mixing weight, but not in the logged moments.)

    Additivity. All three Gram tensors add over disjoint parameters (layers, shards) for the same
    units in the same order. Over micro-batches and ranks only `gram_BKK`, `within_BKK` and `ess_B`
    concatenate: `sums_KK` and `rows_BKK` hold products across them, so the G_k must be summed
    first (exactly, or as sketches). Over steps nothing here adds; `unbiased` moments average.

    Attributes:
        kinds: names, in the order of the axes K, for instance ("trace", "empty").
        gram_BKK: <g_k,i, g_l,i>.
        sums_KK: <G_k, G_l>.
        rows_BKK: <g_k,i, G_l>, first axis K from the unit; its sum over B is `sums_KK`. None: no
            standard error from this step alone (`AlphaEstimator` has one from several steps).
        within_BKK: an unbiased estimate, per unit, of tr Cov(g_k,i, g_l,i | prompt), the noise of
            sampling with the prompt held fixed (`within_unit`); for target="batch". None: unknown.
        ess_B: effective sample size of a unit's traces (`importance_weights`), all >= `MIN_ESS`.
        skipped: units that were left out of the step's statistics for a smaller one.
    """

    kinds: tuple[str, ...]
    gram_BKK: Tensor
    sums_KK: Tensor
    rows_BKK: Tensor | None = None
    within_BKK: Tensor | None = None
    ess_B: Tensor | None = None
    skipped: int = 0

    def __post_init__(self) -> None:
        _check_kinds(self.kinds)
        kinds = len(self.kinds)
        _check_tensor("gram_BKK", self.gram_BKK, (-1, kinds, kinds))
        units = self.num_units
        _check_tensor("sums_KK", self.sums_KK, (kinds, kinds))
        for name in ("rows_BKK", "within_BKK"):
            if getattr(self, name) is not None:
                _check_tensor(name, getattr(self, name), (units, kinds, kinds))
        if self.ess_B is not None:
            _check_tensor("ess_B", self.ess_B, (units,))
            if bool((self.ess_B < MIN_ESS).any()):
                expected = f"at least {MIN_ESS} in every unit (leave the others out)"
                raise ValueError(f"ess_B: expected {expected}, got {self.ess_B.min().item()}")
        if bool((self.gram_BKK.diagonal(dim1=1, dim2=2) < 0).any()):
            least = self.gram_BKK.diagonal(dim1=1, dim2=2).min().item()
            raise ValueError(f"gram_BKK: expected squared norms >= 0 on the diagonal, got {least}")
        if isinstance(self.skipped, bool) or not isinstance(self.skipped, int) or self.skipped < 0:
            raise ValueError(f"skipped: expected an int >= 0, got {self.skipped!r}")

    @property
    def num_units(self) -> int:
        return self.gram_BKK.shape[0]

    @classmethod
    def from_unit_gram(
        cls,
        kinds: tuple[str, ...],
        gram_BBKK: Tensor,
        *,
        within_BKK: Tensor | None = None,
        ess_B: Tensor | None = None,
    ) -> StepStats:
        """From all products gram[i, j, k, l] = <g_k,i, g_l,j>; units of ESS < 2 are left out."""
        _check_kinds(kinds)
        units = gram_BBKK.shape[0] if isinstance(gram_BBKK, Tensor) and gram_BBKK.ndim else 0
        _check_tensor("gram_BBKK", gram_BBKK, (units, units, len(kinds), len(kinds)))
        if ess_B is not None:
            _check_tensor("ess_B", ess_B, (units,))
            kept_B = ess_B >= MIN_ESS
            gram_BBKK, ess_B = gram_BBKK[kept_B][:, kept_B], ess_B[kept_B]
            within_BKK = None if within_BKK is None else within_BKK[kept_B]
        return cls(
            kinds=kinds,
            gram_BKK=gram_BBKK.diagonal().permute(2, 0, 1),
            sums_KK=gram_BBKK.sum((0, 1)),
            rows_BKK=gram_BBKK.sum(1),
            within_BKK=within_BKK,
            ess_B=ess_B,
            skipped=units - gram_BBKK.shape[0],
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields that are not None: tensors, and `kinds` and `skipped`."""
        return {name: value for name, value in vars(self).items() if value is not None}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> StepStats:
        """From what `to_dict` returned."""
        unknown = sorted(set(state) - set(cls.__dataclass_fields__))
        missing = sorted({"kinds", "gram_BKK", "sums_KK"} - set(state))
        if unknown or missing:
            raise ValueError(f"state: expected the fields of StepStats, got {sorted(state)}")
        return cls(**{**state, "kinds": tuple(state["kinds"])})


@dataclass(frozen=True)
class Moments:
    """Unbiased estimates of tr S_uv and <mu_u, mu_v>, of one step or averaged over steps.

    values_XKK: [tr S, <mu, mu>] and, where known, the part of tr S within prompts. num_units: the
    batch size B that a question without one is about. covariance_FF: of the estimation errors of
    `values_XKK.flatten()`, with `freedom` degrees; None: unknown.
    """

    kinds: tuple[str, ...]
    values_XKK: Tensor
    num_units: int
    covariance_FF: Tensor | None = None
    freedom: float = 0.0

    def index(self, argument: str, kind: str) -> int:
        """Position of a kind, or a ValueError that names the argument."""
        if kind not in self.kinds:
            raise ValueError(f"{argument}: expected one of the kinds {self.kinds}, got {kind!r}")
        return self.kinds.index(kind)

    def covariance(self, first: str, second: str) -> float:
        """tr S of two kinds; tr S_k itself when they are the same."""
        u, v = self.index("first", first), self.index("second", second)
        return self.values_XKK[COVARIANCES, u, v].item()

    def mean_product(self, first: str, second: str) -> float:
        """<mu, mu> of two kinds; it is unbiased, so |mu|^2 may come out negative."""
        u, v = self.index("first", first), self.index("second", second)
        return self.values_XKK[MEANS, u, v].item()

    def distance_sq(self, first: str, second: str) -> float:
        """|mu_u - mu_v|^2, unbiased."""
        cross = self.mean_product(first, second)
        return self.mean_product(first, first) - 2 * cross + self.mean_product(second, second)


def moment_values(
    total_KK: Tensor, sums_KK: Tensor, units: int, within_KK: Tensor | None = None
) -> Tensor:
    """values_XKK from total = sum_i <u_i, v_i> and sums = <U, V>; leading axes broadcast."""
    covariance = (total_KK - sums_KK / units) / (units - 1)
    means = (sums_KK - total_KK) / (units * (units - 1))
    families = [covariance, means] if within_KK is None else [covariance, means, within_KK]
    return torch.stack(families, dim=-3)


def unbiased(stats: StepStats) -> Moments:
    """tr S_uv = [sum <u_i, v_i> - <U, V> / B] / (B - 1),
    <mu_u, mu_v> = [<U, V> - sum <u_i, v_i>] / (B (B - 1)), for all pairs of kinds.

    The covariance of the estimates is the leave-one-unit-out jackknife's, (B - 1) / B times the sum
    of squares of the B leave-one-out estimates around their mean, where `rows_BKK` is given and
    B > 2. Both estimates are U-statistics of degree two: the jackknife counts their degenerate part
    (products of the noise of two units) about twice, so it errs on the side of a wide interval
    where tr S / B is not small against |mu|^2.

    Returns:
        Moments, on the CPU.

    Raises:
        ValueError: fewer than two units.
    """
    units = stats.num_units
    if units < MIN_UNITS:
        raise ValueError(f"stats: expected at least {MIN_UNITS} units, got {units}")
    gram_BKK, sums_KK = stats.gram_BKK.cpu(), stats.sums_KK.cpu()
    total_KK = gram_BKK.sum(0)
    within_BKK = None if stats.within_BKK is None else stats.within_BKK.cpu()
    within_KK = None if within_BKK is None else within_BKK.mean(0)
    values_XKK = moment_values(total_KK, sums_KK, units, within_KK)
    if stats.rows_BKK is None or units == MIN_UNITS:
        return Moments(stats.kinds, values_XKK, units)
    rows_BKK = stats.rows_BKK.cpu()
    if within_BKK is not None:
        within_BKK = (within_BKK.sum(0) - within_BKK) / (units - 1)
    left_out_BF = moment_values(
        total_KK - gram_BKK, sums_KK - rows_BKK - rows_BKK.mT + gram_BKK, units - 1, within_BKK
    ).flatten(1)
    deviation_BF = left_out_BF - left_out_BF.mean(0)
    covariance_FF = (units - 1) / units * deviation_BF.T @ deviation_BF
    return Moments(stats.kinds, values_XKK, units, covariance_FF, units - 1.0)
