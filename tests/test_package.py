"""The wheel, the report, and what an import may pull in."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
SOURCES = ["bvpo_kernels", "csrc", "setup.py", "pyproject.toml", "README.md", "LICENSE"]

USE_IT = """
import sys, torch
BLOCKED = ("triton", "transformers", "trl", "peft", "datasets", "matplotlib", "tqdm")
sys.modules.update(dict.fromkeys(BLOCKED))  # None: as if not installed
import bvpo_kernels
from bvpo_kernels import backends
hidden = torch.randn(5, 8, requires_grad=True)
logprobs = bvpo_kernels.linear_logprobs(hidden, torch.zeros(7, 8), torch.arange(5))
logprobs.sum().backward()
assert torch.allclose(logprobs, torch.full((5,), -torch.tensor(7.0).log().item()))
print(bvpo_kernels.__file__)
print("cpp:", backends.MISSING["cpp"] or "usable")
"""


def build_wheel(tmp_path: Path, **environment: str) -> tuple[Path, str]:
    """A wheel built from a copy of the sources, and what the build printed."""
    source = tmp_path / "source"
    source.mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    for stale in source.glob("bvpo_kernels/*.so"):
        stale.unlink()
    command = [sys.executable, "-m", "pip", "wheel", ".", "-v", "--no-deps", "--no-build-isolation"]
    result = subprocess.run(
        [*command, "-w", str(tmp_path)],
        cwd=source,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    return wheel, result.stdout + result.stderr


def use_wheel(wheel: Path, tmp_path: Path) -> str:
    """Unpack the wheel outside the checkout and run a program on it, with torch alone beside it."""
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("BVPO")}
    # -S: no .pth files, hence no finder of an editable install, which would lend its kernels.
    path = os.pathsep.join([str(site), str(Path(torch.__file__).parent.parent)])
    result = subprocess.run(
        [sys.executable, "-S", "-P", "-c", USE_IT],
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    imported, cpp = result.stdout.splitlines()
    assert Path(imported).is_relative_to(site)
    return cpp


@pytest.mark.slow
def test_wheel_with_kernels_works_outside_the_checkout(tmp_path):
    wheel, _ = build_wheel(tmp_path)
    assert use_wheel(wheel, tmp_path) == "cpp: usable"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "line"),
    [
        ({"BVPO_USE_CPP": "0"}, "BVPO_USE_CPP=0: the C++ kernels are not built"),
        ({"CXX": "/bin/false", "CC": "/bin/false"}, "the C++ kernels could not be built"),
    ],
    ids=["switched off", "no compiler"],
)
def test_wheel_without_kernels_says_so_and_works(tmp_path, environment, line):
    wheel, printed = build_wheel(tmp_path, **environment)
    assert sum(line in text for text in printed.splitlines()) == 1
    assert use_wheel(wheel, tmp_path).startswith("cpp: not built")


def test_switch_at_run_time():
    """BVPO_USE_CPP=0 also hides kernels that are there; the report names the reason."""
    command = [sys.executable, "-m", "bvpo_kernels"]
    environment = os.environ | {"BVPO_USE_CPP": "0"}
    report = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert report.returncode == 0, report.stderr
    lines = {line.split()[0]: line for line in report.stdout.splitlines()}
    assert "switched off by BVPO_USE_CPP=0" in lines["cpp"]
    assert "usable" in lines["eager"]
    assert "torch" in lines
