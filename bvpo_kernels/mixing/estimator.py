"""a* online: averages of the moments over steps, and from them the weight of the next step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bvpo_kernels import checks
from bvpo_kernels.mixing.moments import MIN_UNITS, Moments, StepStats, unbiased
from bvpo_kernels.mixing.optimum import MARGINAL, AlphaStar, Target, alpha_star
from bvpo_kernels.types import EMPTY, TRACE

# Effective steps above which their own spread gives the error bar instead of the jackknife: the
# least for which Student's t has a variance.
MIN_STEPS = 3.0
_STATE_VERSION = 1


class AlphaEstimator:
    """The weight of L_c = a L_t + (1 - a) L_e, from the gradients of the steps before.

    Each step's unbiased moments enter an exponential average with weights 2^(-age / halflife);
    numerator and denominator of a* are linear in the moments, so these are averages too. a* is
    their ratio. Clipped ratios are never averaged: the ratio of one small batch is noisy and
    skewed, and clipping would add a bias that no number of steps removes.

    The weight moves from `initial` towards a* as the data allow: initial + z (a* - initial), z the
    `credibility` of a*, clipped last. It stays at `initial` while the interval of a* is all of
    [0, 1] (`AlphaStar.determined`).

    The weight is lagged: `value` reads what `update` took in before, so it is independent of the
    units of the step it is used in, and a g_t + (1 - a) g_e has the mean that a fixed a gives it.

    Interval. With n = (sum w)^2 / sum w^2 effective steps, from n >= 10 on the standard error comes
    from the spread of the steps, var = sum w_s^2 r_s^2 / (sum w)^2 / (1 - 1 / n), r_s the residual
    numerator - a denominator of step s over the mean denominator, Student's t with n - 1 degrees.
    It is fair whatever the batch size and the ratio of noise to bias (simulated coverage of a 95 %
    interval: 93.6 to 95.7 % for B = 4..16 and ten steps or more), needs no `rows_BKK`, and contains
    the noise of sketches. Before that it is the jackknife's, the steps' covariances weighted by
    w_s^2: fair for a single batch (94.6 to 97.7 %) and, where steps are pooled, while tr S_d / B is
    below about a fifth of |Delta|^2 (95 to 97 %); elsewhere it is too wide (98 to 99.5 %), for the
    reason that `unbiased` gives. Without `rows_BKK`, or with two units, there is none: the spread
    then serves from n > 3 on, and nothing is known before.
    Both hold while the optimum moves little within n steps.

    Args:
        reference: the kind that is the truth, "trace" or "marginal" (`alpha_star`).
        target: "population" or "batch" (`mse_matrix`).
        ema_halflife: in steps, inf: the plain mean. Effective steps tend to 2.9 halflives.
        clip: bounds of the weight while it scales a loss; neither loss should vanish.
        warmup: steps of statistics before the first weight that is not `initial`.
        initial: the weight until then and where the moments determine none; it moves from there.
        confidence: of the interval.
    """

    def __init__(
        self,
        *,
        reference: str = TRACE,
        target: Target = "population",
        ema_halflife: float = 16.0,
        clip: tuple[float, float] = (0.02, 0.98),
        warmup: int = 8,
        initial: float = 0.5,
        confidence: float = 0.95,
    ) -> None:
        checks.number("ema_halflife", ema_halflife, lambda h: h > 0, "a number > 0")
        checks.number("initial", initial, lambda a: 0 <= a <= 1, "a number in [0, 1]")
        checks.number("confidence", confidence, lambda c: 0 < c < 1, "a number in (0, 1)")
        if len(clip) != 2 or not 0 <= clip[0] <= clip[1] <= 1:
            raise ValueError(f"clip: expected 0 <= low <= high <= 1, got {clip}")
        if isinstance(warmup, bool) or not isinstance(warmup, int) or warmup < 0:
            raise ValueError(f"warmup: expected an int >= 0, got {warmup!r}")
        if target not in ("population", "batch"):
            raise ValueError(f"target: expected 'population' or 'batch', got {target!r}")
        self.reference, self.target, self.confidence = reference, target, confidence
        self.clip, self.warmup, self.initial = clip, warmup, initial
        self._decay = 2.0 ** (-1.0 / ema_halflife)
        self._kinds: tuple[str, ...] = ()
        self._sums: dict[str, Tensor] = {}  # of w f, w^2 f, w^2 f f^T, w^2 (jackknife covariance)
        self._weights = (0.0, 0.0)  # sum w, sum w^2
        self._jackknife = True  # every step so far had one
        self._steps = self._num_units = self._units_skipped = self._steps_skipped = 0
        self._ess: float | None = None

    def value(self) -> float:
        """The weight of the next step."""
        if self._steps == 0 or self._steps < self.warmup:
            return self.initial
        return self._weight(self.estimate())

    def _weight(self, star: AlphaStar) -> float:
        """That of an estimate, after warm-up. `initial` may lie outside of the clip."""
        if not star.determined:
            return self.initial
        return min(self.clip[1], max(self.clip[0], star.weight))

    def update(self, stats: StepStats | Mapping[str, Any]) -> None:
        """Take in the statistics of the step that just ran (or their `StepStats.to_dict`).

        A step that the ESS gate left with fewer than two units is counted and not used.

        Raises:
            ValueError: fewer than two units otherwise, or kinds that changed between steps.
        """
        if not isinstance(stats, StepStats):
            stats = StepStats.from_dict(stats)
        self._units_skipped += stats.skipped
        if stats.skipped and stats.num_units < MIN_UNITS:
            self._steps_skipped += 1
            return
        moments = unbiased(stats)
        if self._steps == 0:
            self._start(moments)
        if moments.kinds != self._kinds or moments.values_XKK.numel() != self._sums["f"].numel():
            expected = f"{self._kinds} and the same fields at every step"
            raise ValueError(f"stats: expected kinds {expected}, got {moments.kinds}")
        moment_F, decay = moments.values_XKK.flatten(), self._decay
        added = {"f": moment_F, "f2": moment_F, "ff2": moment_F.outer(moment_F)}
        self._jackknife = self._jackknife and moments.covariance_FF is not None
        if moments.covariance_FF is not None:
            added["jackknife2"] = moments.covariance_FF
        for name, value in added.items():
            self._sums[name] = self._sums[name] * (decay if name == "f" else decay**2) + value
        self._weights = (self._weights[0] * decay + 1, self._weights[1] * decay**2 + 1)
        self._steps, self._num_units = self._steps + 1, moments.num_units
        self._ess = None if stats.ess_B is None else stats.ess_B.mean().item()

    def _start(self, moments: Moments) -> None:
        """Empty sums of the sizes that the first step has, with its checked kinds."""
        alpha_star(moments, reference=self.reference, target=self.target)
        size = moments.values_XKK.numel()
        vector, matrix = torch.zeros(size).double(), torch.zeros(size, size).double()
        self._kinds = moments.kinds
        self._sums = {"f": vector, "f2": vector, "ff2": matrix, "jackknife2": matrix}

    @property
    def effective_steps(self) -> float:
        """(sum w)^2 / sum w^2 of the steps taken in."""
        total, squares = self._weights
        return total**2 / squares if squares else 0.0

    def moments(self) -> Moments:
        """The averaged moments, at the batch size of the last step, with their covariance.

        Raises:
            ValueError: no step was taken in yet.
        """
        if self._steps == 0:
            raise ValueError("moments: expected at least one update before, got 0")
        (total, squares), n = self._weights, self.effective_steps
        mean_F = self._sums["f"] / total
        covariance_FF, freedom = None, 0.0
        if n > MIN_STEPS:
            cross_FF = self._sums["f2"].outer(mean_F)
            spread_FF = self._sums["ff2"] - cross_FF - cross_FF.T + squares * mean_F.outer(mean_F)
            covariance_FF, freedom = spread_FF / total**2 / (1 - 1 / n), n - 1
        elif self._jackknife:
            covariance_FF = self._sums["jackknife2"] / total**2
            freedom = n * (self._num_units - 1)
        kinds = len(self._kinds)
        values_XKK = mean_F.view(-1, kinds, kinds)
        return Moments(self._kinds, values_XKK, self._num_units, covariance_FF, freedom)

    def estimate(self, batch_size: float | None = None) -> AlphaStar:
        """`alpha_star` of the averaged moments, at the last step's batch size or another one."""
        return alpha_star(
            self.moments(),
            batch_size,
            reference=self.reference,
            target=self.target,
            confidence=self.confidence,
            fallback=self.initial,
        )

    def log(self) -> dict[str, float]:
        """Scalars of the estimate; those without a finite value (yet) are left out.

        alpha_star: a* clipped to [0, 1]. alpha_determined: 0 while the interval is all of it.
        alpha_next: the next step's weight (the loop logs that of the step that ran).
        alpha_credibility: the share of the way from `initial` to a*. alpha_units: units in the
        averages. alpha_units_needed: about how many more determine a*; left out where they do, and
        where `ema_halflife` never lets them. alpha_warmup_left: steps, while there are any.
        MSE(a) = mse_0 + mse_1 a + mse_2 a^2: a weight's regret is MSE(a) / MSE(alpha_star). With a
        marginal kind, bias_t_sq = |mu_t - mu_m|^2 tells how far the traces' own mean has drifted
        from it (0 in expectation while b_t = 0), bias_e_sq the same of the empties.
        """
        counts = {"units_skipped": self._units_skipped, "stats_skipped": self._steps_skipped}
        if self._steps == 0:
            return {name: float(count) for name, count in counts.items()}
        star = self.estimate()
        values = {
            "alpha_star": star.alpha,
            "alpha_raw": star.raw,
            "alpha_se": star.se,
            "alpha_lo": star.low,
            "alpha_hi": star.high,
            **self._progress(star),
            "numerator": star.numerator,
            "denominator": star.denominator,
            "q": star.q,
            "kappa": star.kappa,
            "B_mix": star.batch_mix,
            "delta_sq": star.delta_sq,
            "trS_t": star.tr_trace,
            "trS_e": star.tr_empty,
            "trS_te": star.tr_cross,
            "ess": math.nan if self._ess is None else self._ess,
            **{f"mse_{power}": value for power, value in enumerate(star.mse)},
            **counts,
        }
        if MARGINAL in self._kinds:
            moments = self.moments()
            values["bias_t_sq"] = moments.distance_sq(TRACE, MARGINAL)
            values["bias_e_sq"] = moments.distance_sq(EMPTY, MARGINAL)
        return {name: float(value) for name, value in values.items() if math.isfinite(value)}

    def _progress(self, star: AlphaStar) -> dict[str, float]:
        """How far the weight has come, and what it takes to go on; NaN: nothing to say."""
        steps, left = self.effective_steps, self.warmup - self._steps
        most = math.inf if self._decay == 1 else (1 + self._decay) / (1 - self._decay)
        needed = (star.data_needed - 1) * steps
        return {
            "alpha_determined": float(star.determined),
            "alpha_next": self.initial if left > 0 else self._weight(star),
            "alpha_credibility": star.credibility,
            "alpha_units": steps * self._num_units,
            "alpha_units_needed": (
                needed * self._num_units if 0 < needed <= most - steps else math.nan
            ),
            "alpha_warmup_left": left if left > 0 else math.nan,
        }

    def state_dict(self) -> dict[str, Any]:
        """Numbers, strings and lists of them (JSON keeps every bit of a float)."""
        return {
            "version": _STATE_VERSION,
            "kinds": list(self._kinds),
            "sums": {name: value.tolist() for name, value in self._sums.items()},
            "weights": list(self._weights),
            "jackknife": self._jackknife,
            "steps": self._steps,
            "num_units": self._num_units,
            "units_skipped": self._units_skipped,
            "steps_skipped": self._steps_skipped,
            "ess": self._ess,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned; the arguments are those of the constructor."""
        if set(state) != set(self.state_dict()) or state["version"] != _STATE_VERSION:
            expected = f"version {_STATE_VERSION} with keys {sorted(self.state_dict())}"
            got = f"version {state.get('version')} with keys {sorted(state)}"
            raise ValueError(f"state: expected {expected}, got {got}")
        self._kinds = tuple(state["kinds"])
        self._sums = {
            name: torch.tensor(value, dtype=torch.float64) for name, value in state["sums"].items()
        }
        total, squares = state["weights"]
        self._weights = (total, squares)
        self._jackknife, self._ess = state["jackknife"], state["ess"]
        self._steps, self._num_units = state["steps"], state["num_units"]
        self._units_skipped = state["units_skipped"]
        self._steps_skipped = state["steps_skipped"]
