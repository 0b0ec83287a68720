"""The examples run as they stand, and learn what they are shown."""

import math
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "train" / "examples"


def test_pytorch():
    losses = runpy.run_path(str(EXAMPLES / "pytorch.py"))["main"]()
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert losses[-1] < losses[0] - 0.05


def test_trainer():
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    log = runpy.run_path(str(EXAMPLES / "trainer.py"))["main"]()
    losses = [line["loss"] for line in log if "loss" in line]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-3)
    assert losses[-1] < losses[0] - 0.05
