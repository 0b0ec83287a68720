"""`python -m benchmarks.proxies`: how well sketches and norm weights predict the exact statistics.

The demo's model and pairs, policy = reference as at its first step: per unit |t|^2, |e|^2 and
<t, e> from "sketch" and "norm" beside "exact", and the a* that each gives. "norm" sees a part of
the parameters, so its numbers are compared up to a common factor.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
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
from benchmarks.plot import save
from bvpo_kernels import Unit, bvpo_loss, pack, segment_sum
from bvpo_kernels.grad_stats import GradStats
from bvpo_kernels.mixing import AlphaEstimator, StepStats
from bvpo_kernels.types import EMPTY, TRACE
from train.config import RunConfig
from train.model.devices import with_compute_dtype
from train.model.head import FusedHeadLM, build_policy
from train.preferences.pairs import load_pairs
from train.runtime.files import replace_file

PAIRS = records.ROOT / "train" / "data" / "smollm2_pairs.jsonl"
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
            yield {
                "mode": mode,
                "unit": f"{step}.{unit}",
                "quantity": name,
                "value": gram_KK[k, m].item(),
            }


def _known(path: Path, dtype: str, units: int) -> list[dict[str, object]]:
    """Lines of the modes that the file holds for as many units, computed in `dtype`."""
    if not path.exists():
        return []
    frame = pd.read_csv(path)
    known = (
        frame[frame["compute_dtype"] == dtype]
        .groupby("mode")
        .filter(lambda of_mode: (of_mode["quantity"] == "|t|^2").sum() == units)
    )
    return known.to_dict("records")


def measure(
    steps: int, units_per_step: int, units_per_micro_batch: int, mode: str | None, path: Path
) -> pd.DataFrame:
    """One line per mode, unit and product, and per mode a* with its interval; written after each
    mode. Modes that `path` holds for as many units are not measured again."""
    cfg = RunConfig()
    cfg.model = with_compute_dtype(replace(cfg.model, compute_dtype="auto"))
    dtype = cfg.model.compute_dtype
    policy, _ = build_policy(cfg)
    policy.train()
    where = {"compute_dtype": dtype, **records.environment(torch.get_num_threads())}
    every = load_pairs(PAIRS).units
    chosen = [unit for unit in every if {TRACE, EMPTY} <= set(unit.pairs)]
    chosen = chosen[: steps * units_per_step]
    done = {line["mode"] for line in _known(path, dtype, len(chosen))}
    left = [name for name in MODES if name not in done and mode in (None, name)]
    bar = tqdm(total=steps * len(left), unit="step")
    for name in left:
        stats = GradStats(policy, **MODES[name])  # type: ignore[arg-type]
        measured: list[dict[str, object]] = []
        alpha = AlphaEstimator(ema_halflife=float("inf"))
        for step in range(steps):
            units = chosen[step * units_per_step : (step + 1) * units_per_step]
            result = _step(policy, stats, units, units_per_micro_batch)
            alpha.update(result)
            measured += _values(name, step, result)
            bar.update()
        star = alpha.estimate()
        for quantity, value in (
            ("a*", star.raw),
            ("a* low", star.low),
            ("a* high", star.high),
            ("kappa", star.kappa),
        ):
            measured.append({"mode": name, "unit": "all", "quantity": quantity, "value": value})
        lines = _known(path, dtype, len(chosen)) + [{**line, **where} for line in measured]
        replace_file(path, functools.partial(pd.DataFrame(lines).to_csv, index=False))
    return read(path)


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


def markdown(frame: pd.DataFrame) -> str:
    """Correlation with exact, and the error beside the spread of the units, per product; a*."""
    headers = ["mode", *(f"{name}: r, error" for name in PRODUCTS), "a* and its 95 % interval"]
    lines = [
        [row["mode"], *(f"{row[f'{name}: r']:.3f}, {row[f'{name}: error / spread']:.2f}"
                        for name in PRODUCTS),
         f"{row['a*']:.3f} [{row['a* low']:.3f}, {row['a* high']:.3f}]"]
        for row in summarise(frame).to_dict("records")
    ]  # fmt: skip
    first = frame.iloc[0]
    units = frame.loc[frame["unit"] != "all", "unit"].nunique()
    where = (
        f"SmolLM2-135M, {units} units of the demo, computed in {first['compute_dtype']}. r: "
        f"correlation with exact over the units; error: what is left after the best common factor, "
        f"over the units' standard deviation. {first['cpu']} ({first['isa']}), torch "
        f"{first['torch']}, commit {first['commit']}, {first['date']}."
    )
    table = tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True)
    return f"{table}\n\n{where}"


def read(path: Path) -> pd.DataFrame:
    """A file of `measure`."""
    return pd.read_csv(path).astype({"unit": str})


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
    save(figure, path)


def main(
    steps: int = 3,
    units_per_step: int = 4,
    units_per_micro_batch: int = 2,
    mode: str | None = None,
    out: Path = records.RESULTS,
) -> None:
    """Measure, then write proxies.csv and, when it is complete, proxies.png; print the table.

    Args:
        steps: batches that a* is averaged over.
        units_per_step: batch size that a* is for.
        units_per_micro_batch: units of one pack.
        mode: measure this one only; None: those that the file lacks.
        out: folder of the results.
    """
    if mode not in (None, *MODES):
        raise ValueError(f"mode: expected one of {list(MODES)}, got {mode!r}")
    torch.manual_seed(0)
    out.mkdir(parents=True, exist_ok=True)
    frame = measure(steps, units_per_step, units_per_micro_batch, mode, out / "proxies.csv")
    if set(frame["mode"]) != set(MODES):
        return
    table = summarise(frame)
    plot(frame, out / "proxies.png")
    print(tabulate(table, headers="keys", tablefmt="github", showindex=False, floatfmt=".3f"))


if __name__ == "__main__":
    auto_cli(main)
