"""`python -m benchmarks.compare_runs RUN_DIR...`: training runs on one plot, and their end.

Writes NAME.png (loss by step; the other runs' distance to the first one) and NAME.csv (a line per
run: configuration that differs, last losses, held-out metrics, seconds per step).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pandas as pd
from tabulate import tabulate

from benchmarks import plot, records
from train.runtime.report import read_log

HELD_OUT = ("trace/loss", "trace/margin", "empty/loss", "empty/margin")


Log = dict[str, list[dict[str, Any]]]


def summary(name: str, log: Log) -> dict[str, Any]:
    """One run in one line."""
    train, held_out = pd.DataFrame(log["train"]), pd.DataFrame(log["eval"])
    # A checkpoint lies between two steps.
    seconds = train.filter(regex="^seconds/(?!checkpoint)").sum(axis=1)
    line: dict[str, Any] = {"run": name, "steps": len(train), "loss": train["loss"].iloc[-1]}
    line |= {f"held-out {key}": held_out[key].iloc[-1] for key in HELD_OUT if key in held_out}
    if "tail/dense_share" in train:
        line["dense share"] = train["tail/dense_share"].mean()
    line["backward s/step"] = train["seconds/backward"].median()
    return line | {"s/step": seconds.median()}


def draw(logs: dict[str, Log], path: Path) -> None:
    """Losses by step, and the distance of each run to the first."""
    with plot.drawing(path, (8, 3.2)) as figure:
        left, right = figure.subplots(1, 2)
        first = None
        for index, (name, log) in enumerate(logs.items()):
            train = pd.DataFrame(log["train"]).set_index("step")
            left.plot(train.index, train["loss"], marker="o", markersize=3, label=name,
                      linestyle="-" if index == 0 else "--")  # fmt: skip
            if first is None:
                first = train["loss"]
            else:
                right.plot(train.index, (train["loss"] - first).abs(), marker="o", label=name)
        left.set_ylabel("loss")
        right.set_ylabel("|loss - that of the first run|")
        for axes in (left, right):
            axes.set_xlabel("step")
            axes.legend(fontsize=7)


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.compare_runs", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="run directories; their names are shown")
    parser.add_argument("--out", type=Path, default=records.RESULTS / "tail-demo")
    arguments = parser.parse_args()
    logs = {run.name: read_log(run / "log.jsonl") for run in arguments.runs}
    table = pd.DataFrame([summary(name, log) for name, log in logs.items()])
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(arguments.out.with_suffix(".csv"), index=False)
    draw(logs, arguments.out.with_suffix(".png"))
    print(tabulate(table.to_dict("records"), headers="keys", floatfmt=".5g"))


if __name__ == "__main__":
    main()
