"""One optimizer step on the same pairs, as a script, TRL and the training loop write it.

STEPS: name -> what builds a `Step` from the case's inputs and its model, in a process of its own.
"""

from collections.abc import Callable
from typing import Any

from benchmarks.steps.inputs import (
    Step,
    StepInputs,
    gradient_sample,
    make_inputs,
    oracle,
    prime,
)
from benchmarks.steps.loop import LoopStep
from benchmarks.steps.naive import NaiveStep
from benchmarks.steps.trl import TRLStep

STEPS: dict[str, Callable[[StepInputs, Any], Step]] = {
    "padded": lambda inputs, model: NaiveStep(inputs, model, by_kind=False),
    "padded by kind": lambda inputs, model: NaiveStep(inputs, model, by_kind=True),
    "TRL": TRLStep,
    "bvpo_kernels": lambda inputs, model: LoopStep(inputs, model, checkpointing=False),
    "bvpo_kernels checkpointed": lambda inputs, model: LoopStep(inputs, model, checkpointing=True),
}

__all__ = [
    "STEPS", "LoopStep", "NaiveStep", "Step", "StepInputs", "TRLStep", "gradient_sample",
    "make_inputs", "oracle", "prime",
]  # fmt: skip
