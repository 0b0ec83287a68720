"""`python -m benchmarks.proxies`: how well sketches and norm weights predict the exact statistics.

The demo's model and pairs, policy = reference as at its first step: per unit |t|^2, |e|^2 and
<t, e> from "sketch" and "norm" beside "exact", and the a* that each gives. "norm" sees a part of
the parameters, so its numbers are compared up to a common factor.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pandas as pd
import torch
from jsonargparse import auto_cli
from tabulate import tabulate
from tqdm import tqdm

from benchmarks import records
from bvpo_kernels import Unit, bvpo_loss, pack, segment_sum
from bvpo_kernels.grad_stats import GradStats
from bvpo_kernels.mixing import AlphaEstimator, StepStats
from bvpo_kernels.types import EMPTY, TRACE
from train.config import RunConfig
from train.head import FusedHeadLM, build_policy
from train.pairs import load_pairs

MODES = {
    "exact": {"cross": "exact"},
    "exact, cross products sketched": {"cross": "sketch"},
    "sketch": {"mode": "sketch"},
    "norm": {"mode": "norm"},
}
PRODUCTS = {"|t|^2": (0, 0), "|e|^2": (1, 1), "<t, e>": (0, 1)}


def _step(policy: FusedHeadLM, stats: GradStats, units: list[Unit], size: int) -> StepStats:
    """One step of micro-batches of `size` units, at a = 1/2."""
    scale = {TRACE: 0.5 / len(units), EMPTY: 0.5 / len(units)}
    counts = {TRACE: len(units), EMPTY: len(units)}
    policy.zero_grad()
    for first in range(0, len(units), size):
        batch = pack(units[first : first + size])
        with stats.collect(batch, scale):
            scores_S = segment_sum(policy(batch), batch.cu_seqlens)
            loss = bvpo_loss(scores_S, scores_S.detach(), batch, 0.5, pair_counts=counts)
            loss.loss.backward()
    return stats.result()


def _values(mode: str, step: int, stats: StepStats) -> Iterator[dict[str, object]]:
    for unit, gram_KK in enumerate(stats.gram_BKK):
        for name, (k, m) in PRODUCTS.items():
            yield {"mode": mode, "unit": f"{step}.{unit}", "quantity": name,
                   "value": gram_KK[k, m].item()}  # fmt: skip


def measure(
    steps: int, units_per_step: int, units_per_micro_batch: int, path: Path
) -> pd.DataFrame:
    """One line per mode, unit and product, and per mode a* with its interval; written after each
    mode. Modes that `path` holds for as many units are not measured again."""
    policy, _ = build_policy(RunConfig())
    policy.train()
    every = load_pairs(RunConfig().train.pairs).units
    chosen = [unit for unit in every if {TRACE, EMPTY} <= set(unit.pairs)]
    chosen = chosen[: steps * units_per_step]
    lines: list[dict[str, object]] = []
    if path.exists():
        known = (
            pd.read_csv(path)
            .groupby("mode")
            .filter(lambda of_mode: (of_mode["quantity"] == "|t|^2").sum() == len(chosen))
        )
        lines = known.to_dict("records")
    left = [mode for mode in MODES if mode not in {line["mode"] for line in lines}]
    bar = tqdm(total=steps * len(left), unit="step")
    for mode in left:
        options = MODES[mode]
        stats = GradStats(policy, **options)  # type: ignore[arg-type]
        alpha = AlphaEstimator(ema_halflife=float("inf"))
        for step in range(steps):
            units = chosen[step * units_per_step : (step + 1) * units_per_step]
            result = _step(policy, stats, units, units_per_micro_batch)
            alpha.update(result)
            lines += _values(mode, step, result)
            bar.update()
        star = alpha.estimate()
        for name, value in (("a*", star.raw), ("a* low", star.low), ("a* high", star.high),
                            ("kappa", star.kappa)):  # fmt: skip
            lines.append({"mode": mode, "unit": "all", "quantity": name, "value": value})
        _write(pd.DataFrame(lines), path)
    return pd.DataFrame(lines).astype({"unit": str})


def _write(frame: pd.DataFrame, path: Path) -> None:
    part = path.with_name(path.name + ".part")
    frame.to_csv(part, index=False)
    os.replace(part, path)


def summarise(frame: pd.DataFrame) -> pd.DataFrame:
    """Per mode: correlation with exact over the units, and error after the best common factor."""
    wide = frame.pivot(index=["quantity", "unit"], columns="mode", values="value")
    rows = []
    for mode in MODES:
        row: dict[str, object] = {"mode": mode}
        for name in PRODUCTS:
            exact, other = wide.loc[name, "exact"], wide.loc[name, mode]
            factor = (exact @ other) / (other @ other)
            error = (factor * other - exact).std() / exact.std()
            row[f"{name}: r"] = exact.corr(other)
            row[f"{name}: factor"] = factor
            row[f"{name}: error / spread"] = error
        for name in ("a*", "a* low", "a* high", "kappa"):
            row[name] = wide.loc[(name, "all"), mode]
        rows.append(row)
    return pd.DataFrame(rows)


def plot(frame: pd.DataFrame, path: Path) -> None:
    """Each product against its exact value, scaled by the best common factor; a* beside."""
    wide = frame.pivot(index=["quantity", "unit"], columns="mode", values="value")
    figure, panels = plt.subplots(1, 4, figsize=(15, 4), layout="constrained")
    for axes, name in zip(panels, PRODUCTS, strict=False):
        exact = wide.loc[name, "exact"]
        for index, mode in enumerate(("sketch", "norm")):
            other = wide.loc[name, mode]
            factor = (exact @ other) / (other @ other)
            label = f"{mode} (x {factor:.3g}), r = {exact.corr(other):.3f}"
            axes.scatter(exact, factor * other, s=18, color=f"C{index}", label=label)
        ends = [exact.min(), exact.max()]
        axes.plot(ends, ends, color="0.5", linewidth=0.8)
        axes.set_title(f"{name} per unit", fontsize=10)
        axes.set_xlabel("exact")
        axes.legend(fontsize=7)
    for index, mode in enumerate(MODES):
        star, low, high = (wide.loc[(name, "all"), mode] for name in ("a*", "a* low", "a* high"))
        panels[3].plot([low, high], [index, index], color="0.4")
        panels[3].plot([star], [index], "o", color="#b3262e")
    panels[3].set_yticks(range(len(MODES)), [mode.replace(", ", ",\n") for mode in MODES])
    panels[3].invert_yaxis()
    panels[3].set_xlim(-0.02, 1.02)
    panels[3].set_title("a* and its 95 % interval", fontsize=10)
    part = path.with_name(path.name + ".part")
    figure.savefig(part, dpi=120, format="png")
    plt.close(figure)
    os.replace(part, path)


def main(
    steps: int = 3,
    units_per_step: int = 4,
    units_per_micro_batch: int = 2,
    out: Path = records.RESULTS,
) -> None:
    """Measure, then write proxies.csv and proxies.png, and print the table.

    Args:
        steps: batches that a* is averaged over.
        units_per_step: batch size that a* is for.
        units_per_micro_batch: units of one pack.
        out: folder of the results.
    """
    torch.manual_seed(0)
    out.mkdir(parents=True, exist_ok=True)
    frame = measure(steps, units_per_step, units_per_micro_batch, out / "proxies.csv")
    table = summarise(frame)
    plot(frame, out / "proxies.png")
    print(tabulate(table, headers="keys", tablefmt="github", showindex=False, floatfmt=".3f"))


if __name__ == "__main__":
    auto_cli(main)
