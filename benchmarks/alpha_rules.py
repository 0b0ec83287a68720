"""`python -m benchmarks.alpha_rules`: which weight to train with while a* is only estimated.

Regret is MSE(weight) / MSE(a*), the weight known after S steps of B simulated units and the errors
those of step S + 1. Rules move from `INITIAL` towards the estimate; what they see is what
`AlphaEstimator` sees. CPU, a minute, the same numbers every time (to the rounding of the CPU). The
tables stand in bvpo_kernels/mixing/README.md.

Suffixes: R repetitions, B units, K the kinds trace and empty, D parameters.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import torch
from jsonargparse import auto_cli
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

from benchmarks import records
from bvpo_kernels.mixing.estimator import MIN_STEPS
from bvpo_kernels.mixing.moments import COVARIANCES, MEANS, moment_values
from bvpo_kernels.mixing.optimum import t_quantile
from bvpo_kernels.mixing.shrinkage import PRIOR_SD, credibility

INITIAL, CLIP, HALFLIFE = 0.5, (0.02, 0.98), 16.0
UNITS = (2, 4, 8, 16, 32, 64)
STEPS = (1, 2, 4, 8, 16, 32, 100)
FILE = "alpha_rules.csv"


@dataclass(frozen=True)
class Truth:
    """Units whose trace has variance 1, and whose a* is `optimum` at the simulated batch size.

    last: a* at the end where it moves, evenly over the steps. empty: tr S_e. correlation: of t and
    e. rank: dimensions of the noise, isotropic in them, one along Delta. tail: degrees of Student's
    t of a unit's norm, inf: Gaussian.
    """

    name: str
    optimum: float
    last: float | None = None
    empty: float = 0.2
    correlation: float = 0.3
    rank: int = 16
    tail: float = math.inf

    @property
    def cross(self) -> float:
        return self.correlation * math.sqrt(self.empty)

    def delta_sq(self, units: int, progress: float) -> float:
        """|Delta|^2, from a* = 1 - q / (B |Delta|^2 + tr S_d)."""
        last = self.optimum if self.last is None else self.last
        optimum = self.optimum + (last - self.optimum) * progress
        tr_d = 1 + self.empty - 2 * self.cross
        return max(0.0, (1 - self.cross) / (1 - optimum) - tr_d) / units

    def curve(self, units: int, progress: float) -> tuple[float, float, float]:
        """c of MSE(a) = c0 - 2 c1 a + c2 a^2."""
        delta_sq = self.delta_sq(units, progress)
        denominator = delta_sq + (1 + self.empty - 2 * self.cross) / units
        return delta_sq + self.empty / units, denominator - (1 - self.cross) / units, denominator

    def draw(self, repetitions: int, units: int, progress: float, seed: torch.Generator) -> Tensor:
        """[R, B, K, D]."""
        shape = (repetitions, units, 2, self.rank)
        noise = torch.randn(shape, generator=seed, dtype=torch.float64)
        if self.tail < math.inf:
            normal = torch.randn((*shape[:2], int(self.tail)), generator=seed, dtype=torch.float64)
            noise *= ((self.tail - 2) / normal.square().sum(-1)).sqrt()[..., None, None]
        covariance_KK = torch.tensor([[1, self.cross], [self.cross, self.empty]]).double()
        noise = torch.linalg.cholesky(covariance_KK / self.rank) @ noise
        noise[:, :, 0, 0] += math.sqrt(self.delta_sq(units, progress))
        return noise


TRUTHS = (
    *(Truth(f"a* = {a}", a) for a in (0.08, 0.25, 0.5, 0.75, 0.95)),
    *(Truth(f"a* = {a}, rank 3", a, rank=3) for a in (0.08, 0.5, 0.9)),
    *(Truth(f"a* = {a}, rank 48", a, rank=48) for a in (0.08, 0.8)),
    *(Truth(f"a* = {a}, heavy tails", a, tail=3) for a in (0.08, 0.5, 0.9)),
    *(Truth(f"a* = {a}, empties as noisy", a, empty=1.0) for a in (0.5, 0.9)),
    *(Truth(f"a* = {a}, empties quiet", a, empty=0.02, correlation=0.0) for a in (0.15, 0.8)),
    Truth("a* from .8 to .2", 0.8, last=0.2),
    Truth("a* from .2 to .8", 0.2, last=0.8),
)


@dataclass(frozen=True)
class Estimates:
    """Of all repetitions: numerator and denominator of a*, and the covariance of their errors."""

    numerator_R: Tensor
    denominator_R: Tensor
    covariance_R22: Tensor | None
    freedom: float
    steps: float

    @property
    def raw_R(self) -> Tensor:
        return self.numerator_R / self.denominator_R

    def variance(self, a: Tensor | float) -> Tensor:
        """Of numerator - a denominator; a number or [R]."""
        assert self.covariance_R22 is not None
        nn, nd, dd = (self.covariance_R22[:, i, j] for i, j in ((0, 0), (0, 1), (1, 1)))
        return (nn - 2 * a * nd + a * a * dd).clamp(min=0)

    def error(self, a: Tensor | float | None = None) -> Tensor:
        """Standard error of a*, of its own residual or of that at a weight, with t's spread."""
        at = self.raw_R if a is None else a
        wide = t_quantile(0.975, self.freedom) / t_quantile(0.975, 1e9)
        return self.variance(at).sqrt() / self.denominator_R * wide

    @property
    def determined_R(self) -> Tensor:
        half_R = t_quantile(0.975, 1e9) * self.error()
        return (self.raw_R - half_R > 0) | (self.raw_R + half_R < 1)


def _step(gradients_RBKD: Tensor) -> tuple[Tensor, Tensor]:
    """Numerator and denominator of a* of a step, [R, 2], and their jackknife covariance."""
    units, sums_RKD = gradients_RBKD.shape[1], gradients_RBKD.sum(1)
    own_RBKK = gradients_RBKD @ gradients_RBKD.mT
    rows_RBKK = gradients_RBKD @ sums_RKD[:, None].mT
    sums_RKK, total_RKK = sums_RKD @ sums_RKD.mT, own_RBKK.sum(1)
    whole_R2 = _quadratic(moment_values(total_RKK, sums_RKK, units), units)
    if units == 2:
        return whole_R2, torch.zeros(*whole_R2.shape, 2).double()
    left_out = (
        total_RKK[:, None] - own_RBKK,
        sums_RKK[:, None] - rows_RBKK - rows_RBKK.mT + own_RBKK,
    )
    values_RB2 = _quadratic(moment_values(*left_out, units - 1), units)
    deviation_RB2 = values_RB2 - values_RB2.mean(1, keepdim=True)
    return whole_R2, (units - 1) / units * deviation_RB2.mT @ deviation_RB2


def _quadratic(values_XKK: Tensor, units: int) -> Tensor:
    """Numerator and denominator of a* against the traces, [..., 2]."""
    covariance, means = values_XKK[..., COVARIANCES, :, :], values_XKK[..., MEANS, :, :]
    product = means + covariance / units
    denominator = product[..., 0, 0] - 2 * product[..., 0, 1] + product[..., 1, 1]
    q = covariance[..., 0, 0] - covariance[..., 0, 1]
    return torch.stack([denominator - q / units, denominator], -1)


def simulate(
    truth: Truth, units: int, marks: tuple[int, ...], repetitions: int, seed: torch.Generator
) -> Iterator[tuple[int, Estimates]]:
    """What is known after each number of steps in `marks`, averaged as `AlphaEstimator` does."""
    decay, last = 2 ** (-1 / HALFLIFE), max(marks)
    total, squares = 0.0, 0.0
    sums: dict[str, Tensor] = {}
    for step in range(1, last + 1):
        drawn = truth.draw(repetitions, units, (step - 1) / last, seed)
        value_R2, jackknife_R22 = _step(drawn)
        products_R22 = value_R2[:, :, None] * value_R2[:, None]
        total, squares = total * decay + 1, squares * decay**2 + 1
        added = {"f": value_R2, "f2": value_R2, "ff2": products_R22, "jackknife2": jackknife_R22}
        for name, value in added.items():
            factor = decay if name == "f" else decay**2
            sums[name] = value if step == 1 else sums[name] * factor + value
        if step in marks:
            yield step, _averaged(sums, total, squares, units)


def _averaged(sums: dict[str, Tensor], total: float, squares: float, units: int) -> Estimates:
    mean_R2, n = sums["f"] / total, total**2 / squares
    known = Estimates(mean_R2[:, 0], mean_R2[:, 1], None, 0.0, n)
    if n > MIN_STEPS:
        cross = sums["f2"][:, :, None] * mean_R2[:, None]
        spread = sums["ff2"] - cross - cross.mT + squares * mean_R2[:, :, None] * mean_R2[:, None]
        return replace(known, covariance_R22=spread / total**2 / (1 - 1 / n), freedom=n - 1)
    if units == 2:
        return known
    covariance = sums["jackknife2"] / total**2
    return replace(known, covariance_R22=covariance, freedom=n * (units - 1))


def _moved(known: Estimates, share: Tensor | float) -> Tensor:
    """The share of the way from INITIAL to a*."""
    return INITIAL + share * (known.raw_R - INITIAL)


def _signal(known: Estimates) -> Tensor:
    """(a* - INITIAL)^2 in units of its error."""
    return ((known.raw_R - INITIAL) / known.error().clamp(min=1e-150)).square()


def _nearest(known: Estimates, errors: float, at: float | None) -> Tensor:
    """The point of raw -+ errors se that is nearest to INITIAL."""
    half_R = errors * known.error(at)
    initial = torch.full_like(half_R, INITIAL)
    return initial.clamp(known.raw_R - half_R, known.raw_R + half_R)


def _middle(known: Estimates) -> Tensor:
    half_R = known.error()
    return ((known.raw_R - half_R).clamp(0, 1) + (known.raw_R + half_R).clamp(0, 1)) / 2


def _truncated(known: Estimates) -> Tensor:
    """Mean of N(raw, se^2) within [0, 1]: the posterior mean under a uniform prior."""
    raw_R, error_R = known.raw_R, known.error(INITIAL).clamp(min=1e-150)
    low_R, high_R = -raw_R / error_R, (1 - raw_R) / error_R
    normal = torch.distributions.Normal(torch.zeros(()).double(), torch.ones(()).double())
    mass_R = normal.cdf(high_R) - normal.cdf(low_R)
    shift_R = (normal.log_prob(low_R).exp() - normal.log_prob(high_R).exp()) / mass_R
    return torch.where(mass_R < 1e-9, raw_R, raw_R + error_R * shift_R).clamp(0, 1)


def _posterior(known: Estimates) -> Tensor:
    share = credibility(known.denominator_R, known.variance(INITIAL), known.freedom)
    return _moved(known, share)


def used(known: Estimates) -> Tensor:
    """What `AlphaEstimator` does, before it clips."""
    initial_R = torch.full_like(known.raw_R, INITIAL)
    return torch.where(known.determined_R, _posterior(known), initial_R)


Rule = Callable[[Estimates], Tensor]
# They know nothing of errors, so they move from the first step on.
WITHOUT_ERROR: dict[str, Rule] = {
    "initial": lambda known: torch.full_like(known.raw_R, INITIAL),
    "a* itself": lambda known: known.raw_R,
    "pseudo-count, 4 steps": lambda known: _moved(known, known.steps / (known.steps + 4)),
    "pseudo-count, 16 steps": lambda known: _moved(known, known.steps / (known.steps + 16)),
}
WITH_ERROR: dict[str, Rule] = {
    "nearest end of the 95 % interval": lambda known: _nearest(known, 1.96, None),
    "nearest end of the 68 % interval": lambda known: _nearest(known, 1.0, None),
    "least upper bound of the MSE, 95 %": lambda known: _nearest(known, 1.96, INITIAL),
    "least upper bound of the MSE, 68 %": lambda known: _nearest(known, 1.0, INITIAL),
    "middle of the 68 % interval": _middle,
    "James-Stein, positive part": lambda known: _moved(
        known, (1 - 1 / _signal(known).clamp(min=1e-300)).clamp(min=0)
    ),
    "signal^2 / (signal^2 + error^2)": lambda known: _moved(
        known, _signal(known) / (1 + _signal(known))
    ),
    "posterior mean, uniform prior": _truncated,
    "posterior mean, error at a*": lambda known: _moved(
        known, PRIOR_SD**2 / (PRIOR_SD**2 + known.error().square())
    ),
    "posterior mean": _posterior,
    "a* itself once determined": lambda known: torch.where(
        known.determined_R, known.raw_R, torch.full_like(known.raw_R, INITIAL)
    ),
    "posterior mean once determined (used)": used,
}
RULES = WITHOUT_ERROR | WITH_ERROR
USED = "posterior mean once determined (used)"


def weight(rule: str, known: Estimates) -> Tensor:
    """Of the next step, [R], clipped last."""
    if rule == "initial" or (rule in WITH_ERROR and known.covariance_R22 is None):
        return WITHOUT_ERROR["initial"](known)
    return RULES[rule](known).clamp(*CLIP)


def measure(
    repetitions: int, truths: Sequence[Truth] = TRUTHS, sizes: Sequence[int] = UNITS
) -> pd.DataFrame:
    """A line per truth, batch size, number of steps, rule and repetition: its regret."""
    frames = []
    cases = list(itertools.product(truths, sizes))
    for number, (truth, units) in enumerate(tqdm(cases, unit="case", leave=False)):
        seed = torch.Generator().manual_seed(number)
        for steps, known in simulate(truth, units, STEPS, repetitions, seed):
            c0, c1, c2 = truth.curve(units, steps / max(STEPS))
            optimum = min(CLIP[1], max(CLIP[0], c1 / c2))
            least = c0 - 2 * c1 * optimum + c2 * optimum**2
            for rule in RULES:
                a_R = weight(rule, known)
                regret_R = (c0 - 2 * c1 * a_R + c2 * a_R.square()) / least
                frames.append(pd.DataFrame({
                    "rule": rule, "truth": truth.name, "units": units, "steps": steps,
                    "regret": regret_R.numpy(),
                }))  # fmt: skip
    return pd.concat(frames, ignore_index=True)


def summarise(frame: pd.DataFrame) -> pd.DataFrame:
    """Per rule, batch size and number of steps, over truths and repetitions: median, mean and 95th
    percentile of the regret; and of the truths' mean errors the largest against "initial"."""
    by = ["rule", "units", "steps"]
    regret = frame.groupby(by, sort=False)["regret"]
    columns = {"median": regret.median(), "mean": regret.mean(), "p95": regret.quantile(0.95)}
    mean = frame.groupby([*by, "truth"], sort=False)["regret"].mean()
    against = mean / mean["initial"].reindex(mean.index.droplevel("rule")).to_numpy()
    columns["worst_against_initial"] = against.groupby(by, sort=False).max()
    return pd.DataFrame(columns).reset_index()


def rules_table(table: pd.DataFrame) -> str:
    """All rules: mean regret over truths, batch sizes and numbers of steps, and the worst case."""
    few = table["steps"] <= 4
    means = [
        part.groupby("rule", sort=False)["mean"].mean() for part in (table[few], table[~few], table)
    ]
    worst = table.groupby("rule", sort=False)["worst_against_initial"].max()
    rows = [[rule, *(f"{values[rule]:.3f}" for values in (*means, worst))] for rule in RULES]
    headers = ["weight", "1 to 4 steps", "8 to 100 steps", "all", "worst, initial = 1"]
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def steps_table(table: pd.DataFrame, rule: str) -> str:
    """Median and 95th percentile of a rule's regret, by units per step and steps."""
    chosen = table[table["rule"] == rule].set_index(["units", "steps"])
    shown = chosen["median"].map("{:.2f}, ".format) + chosen["p95"].map("{:.2f}".format)
    rows = [[units, *(shown[(units, steps)] for steps in STEPS)] for units in UNITS]
    headers = ["units per step", "1 step", *(str(steps) for steps in STEPS[1:])]
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def main(repetitions: int = 64, out: Path = records.RESULTS) -> None:
    """Simulate, write alpha_rules.csv and print the tables of bvpo_kernels/mixing/README.md.

    Args:
        repetitions: of each truth and batch size.
        out: folder of the results.
    """
    table = summarise(measure(repetitions)).round(4)
    out.mkdir(parents=True, exist_ok=True)
    table.to_csv(out / FILE, index=False)
    print(rules_table(table))
    for rule in ("a* itself", USED):
        print(f"\n{rule}:\n\n{steps_table(table, rule)}")


if __name__ == "__main__":
    auto_cli(main)
