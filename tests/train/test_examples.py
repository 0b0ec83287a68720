"""The examples run as they stand, and learn what they are shown."""

import math
import os
import runpy
import subprocess
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from train.cli import parse

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


def test_slurm(tmp_path):
    """The batch script, with stand-ins for SLURM's commands, calls torchrun as torchrun can be."""
    stubs = {"scontrol": "echo node-1; echo node-2", "srun": 'printf "%s\\n" "$@"'}
    for name, body in stubs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_NODELIST": "node-[1-2]",
        "SLURM_NNODES": "2",
        "SLURM_JOB_ID": "7",
    }
    demo = EXAMPLES.parent / "presets" / "demo.yaml"
    command = ["bash", EXAMPLES / "slurm.sbatch", demo, "--optim.lr", "1e-6"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    _, torchrun, *arguments = done.stdout.splitlines()
    assert torchrun == "torchrun"
    options = get_args_parser().parse_args(arguments)
    assert (options.nnodes, options.nproc_per_node) == ("2", "8")
    assert options.rdzv_endpoint == "node-1:29500"
    assert options.shutdown_timeout < 600  # what --signal leaves
    assert (options.module, options.training_script) == (True, "train")
    name, cfg = parse(options.training_script_args)
    assert (name, cfg.optim.lr) == ("train", 1e-6)
    missing = subprocess.run(command[:2], env=environment, capture_output=True, text=True)
    assert missing.returncode != 0
    assert "usage: sbatch" in missing.stderr
