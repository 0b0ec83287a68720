"""Group "train": one optimizer step of the loop, of a script, and of TRL, on the same pairs.

SmolLM2-135M with the demo's configuration and a = 1/2 (fixed), on the CPU; `units` per step, over
`ranks` processes. Mode "pairs" is the shipped pairs, whose prompt is most of a sequence; "long" has
their traces extended to 1024 tokens beside empty sequences of some 207; "tiny" is a random model,
to see that everything runs. Every row's reference scores are given. The script pads the four
sequences of each unit into one batch ("padded", the baseline) or the two of a kind; TRL gets the
pairs of both kinds in one batch. Rows have processes of their own (`benchmarks.step_workers`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from benchmarks import measure, plot, records
from benchmarks.registry import Call, Case, Gate, Group, Outputs, Row, why_not
from benchmarks.step_workers import CHECK, Inputs, inputs_of
from benchmarks.steps import STEPS, oracle

BASELINE = "padded"
# What a loss may be off by: rounding of scores of some hundred tokens to the compute dtype, times
# beta. The naive loss alone earns no tolerance: one number may happen to be exact.
LOSS_NOISE = {"bfloat16": 0.03, "float32": 1e-4}


def _make(name: str) -> Callable[[Case, Any], Call]:
    def make(case: Case, inputs: Inputs) -> Call:
        call = inputs.call(name)

        def step() -> Outputs:
            outputs = call()
            noise = torch.tensor(LOSS_NOISE[case.dtype])
            return outputs | {"bound:loss": noise}

        return step

    return make


def _facts(name: str) -> Callable[[Case, Any], dict[str, float]]:
    def facts(case: Case, inputs: Inputs) -> dict[str, float]:
        peak = inputs.peak_bytes(name) / measure.MIB
        return {"tokens": inputs.data.num_tokens, "peak_memory": peak}

    return facts


def _trl_missing(case: Case) -> str:
    if case.shape["ranks"] > 1:
        return "measured on one process"
    return why_not("trl", "trl.trainer.dpo_trainer")


def gate(case: Case, inputs: Inputs) -> Gate:
    """The first step: its loss, and its gradient as the optimizer gets it, against fp64."""
    checking = inputs._replace(command=CHECK)
    exact = oracle(inputs.data)
    measure.trim()  # what the fp64 model left: rows need the room
    return Gate(
        inputs=checking,
        select=lambda outputs: {name: outputs[name] for name in ("loss", "gradient")},
        oracle=exact,
        baseline=checking.call(BASELINE)(),
    )


def draw(frame: pd.DataFrame, path: Path) -> None:
    """Tokens per second and peak memory, a cluster of bars per case."""
    table = records.speeds(frame)
    cases, rows = list(table["case"].unique()), list(table["row"].unique())
    thickness = 0.8 / max(len(rows), 1)
    with plot.drawing(path, (10, 1.2 + 0.9 * len(cases))) as figure:
        panels: Any = figure.subplots(1, 2, sharey=True)
        for index, row in enumerate(rows):
            of_row = table[table["row"] == row]
            places = [cases.index(case) + index * thickness for case in of_row["case"]]
            for axes, column in zip(panels, ("tokens/s", "peak MiB"), strict=True):
                axes.barh(places, of_row[column], thickness, color=f"C{index}", label=row)
                axes.set_xlabel(column)
        ticks = [place + 0.4 - thickness / 2 for place in range(len(cases))]
        panels[0].set_yticks(ticks, cases, fontsize=7)
        panels[0].invert_yaxis()
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, fontsize=7, loc="outside lower center", ncols=len(rows))
        first = frame.iloc[0]
        figure.suptitle(f"train: {plot.machine(first)}", fontsize=9)


def _case(mode: str, dtype: str, ranks: int, units: int, rounds: int) -> Case:
    return Case({"units": units, "ranks": ranks}, dtype, mode, rounds=rounds)


DTYPES = ("float32", "bfloat16")
GROUP = Group(
    name="train",
    title="an optimizer step of the loop against a padded script and TRL's DPOTrainer",
    cases=(
        _case("pairs", "float32", 1, 2, 2),
        _case("pairs", "float32", 2, 2, 2),
        _case("long", "float32", 1, 1, 2),
        _case("pairs", "bfloat16", 1, 1, 2),
    ),
    quick=(_case("tiny", "float32", 1, 2, 2),),
    rows=tuple(
        Row(
            name,
            _make(name),
            facts=_facts(name),
            missing=_trl_missing if name == "TRL" else lambda _: "",
            package={"TRL": "trl"}.get(name, ""),
        )
        for name in STEPS
    ),
    make_inputs=inputs_of,
    gate=gate,
    tiny=lambda case: replace(case, mode="tiny"),
    memory=False,
    draw=draw,
)
