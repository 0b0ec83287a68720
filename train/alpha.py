"""Where the mixing weight of L_c = a L_t + (1 - a) L_e comes from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import nn

from bvpo_kernels.grad_stats import GradStats
from bvpo_kernels.mixing import AlphaEstimator, StepStats
from train.config import AlphaConfig


class AlphaSource(Protocol):
    """A weight that is known before a step begins (lagged, so independent of the step's units).

    The loop calls `value` once per step, `update` after the step's backward, `log` when it writes
    the step's line; the state dict holds numbers, lists and dicts of them only.
    """

    def value(self) -> float:
        """The weight a in [0, 1] of the coming step."""

    def update(self, stats: StepStats) -> None:
        """Take in the statistics of the step that just ran."""

    def log(self) -> dict[str, float]:
        """Scalars for the step's log line; `alpha` itself is logged by the loop."""

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on from here."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""


class FixedAlpha:
    """a constant in [0, 1]; the paper trains with 0.5. It has no state and needs no statistics."""

    def __init__(self, weight: float) -> None:
        if not 0.0 <= weight <= 1.0:
            raise ValueError(f"alpha.fixed: expected a number in [0, 1], got {weight}")
        self.weight = weight

    def value(self) -> float:
        return self.weight

    def update(self, stats: StepStats) -> None:
        """Nothing: the weight does not depend on the gradients."""

    def log(self) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state:
            raise ValueError(f"state: expected none for a fixed alpha, got keys {sorted(state)}")


def build_alpha(cfg: AlphaConfig) -> AlphaSource:
    """The source that the configuration asks for.

    Raises:
        ValueError: a fixed weight outside of [0, 1], or an estimate whose weight may become 0 or
            1: a kind whose loss is left out has no gradient to measure.
    """
    estimate = cfg.estimate
    if estimate is None:
        return FixedAlpha(cfg.fixed)
    for name, values in (("clip", estimate.clip), ("initial", (estimate.initial,))):
        if not all(0.0 < value < 1.0 for value in values):
            raise ValueError(
                f"alpha.estimate.{name}: expected weights in (0, 1), so that both kinds have a "
                f"gradient to measure (alpha.fixed serves 0 and 1), got {values}"
            )
    return AlphaEstimator(
        reference=estimate.reference,
        target=estimate.target,
        ema_halflife=estimate.ema_halflife,
        clip=estimate.clip,
        warmup=estimate.warmup,
        initial=estimate.initial,
    )


def build_stats(
    cfg: AlphaConfig, policy: nn.Module, head: nn.Module, seed: int
) -> GradStats | None:
    """What measures the gradients of a step; None for a fixed weight, which needs none."""
    estimate = cfg.estimate
    if estimate is None:
        return None
    return GradStats(
        policy, estimate.mode, cross=estimate.cross, strict=estimate.strict,
        sketch_size=estimate.sketch_size, seed=seed, head=head, within=estimate.target == "batch",
    )  # fmt: skip


def describe(stats: GradStats | None) -> str:
    """Which mode measured, and over how much of what is trained; "" for a fixed weight."""
    if stats is None:
        return ""
    coverage = stats.coverage
    proxy = ", a proxy" if stats.mode == "norm" else ""
    return (
        f"measured in mode {stats.mode!r}{proxy}, over {coverage.covered} of {coverage.trained} "
        f"trained parameters ({100 * coverage.share:.3g} %)"
    )
