"""`make aot`: which kernels it compiles, what it prints, and that its gates close."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bvpo_kernels import backends

if backends.MISSING["triton"]:
    pytest.skip(backends.MISSING["triton"], allow_module_level=True)

import aot

from bvpo_kernels.backends.triton import (
    configs,
    grad_stats,
    lists,
    logprobs,
    logprobs_gemm,
    packing,
)

MODULES = (grad_stats, logprobs, logprobs_gemm, packing, lists)
GOOD = aot.Report("kernel", 90, 64, 0, 1024, "HGMMA", matrix=True)


@pytest.mark.parametrize("arch", aot.ARCHITECTURES)
def test_every_kernel_is_compiled_in_every_configuration(arch):
    cases = aot.cases(arch)
    assert len({case.name for case in cases}) == len(cases)
    compiled = {id(case.kernel) for case in cases}
    for module in MODULES:
        kernels = [name for name in vars(module) if name.endswith("_kernel")]
        assert kernels, module
        for name in kernels:
            assert id(getattr(module, name)) in compiled, f"{module.__name__}.{name}"
    tiles = {
        (c["BLOCK_M"], c["BLOCK_N"], c.get("BLOCK_D", c.get("BLOCK_K")))
        for c in (case.constants for case in cases)
        if "BLOCK_M" in c
    }
    shapes = configs.CONFIGS[f"sm_{arch}"]
    for shape in (shapes.gemm, shapes.gemm_small, shapes.gemm_fp32):
        assert (shape.block_m, shape.block_n, shape.block_d) in tiles


def test_the_table_and_its_gates(capsys):
    assert aot.publish([GOOD, GOOD._replace(arch=80, mma="HMMA")]) == 0
    table = capsys.readouterr().out
    assert table.splitlines()[0].split() == [
        "kernel",
        "arch",
        "regs",
        "spill",
        "B",
        "shared",
        "B",
        "MMA",
    ]
    assert "sm_90" in table
    assert "HGMMA" in table
    for bad, why in (
        (GOOD._replace(spills=4), "4 bytes of spills"),
        (GOOD._replace(shared=228 * 1024), "shared memory above 232448 bytes"),
        (GOOD._replace(arch=80, shared=164 * 1024), "shared memory above 166912 bytes"),
        (GOOD._replace(mma=""), "no tensor-core instruction"),
    ):
        assert aot.publish([GOOD, bad]) == 1
        assert capsys.readouterr().err == f"FAILED kernel, sm_{bad.arch}: {why}\n"
    assert aot.publish([GOOD._replace(mma="", matrix=False)]) == 0


BROKEN = """
import json
import aot

cases = {case.name: case for case in aot.cases(80)}
rows = cases["rows backward, bf16"]
wide = rows.constants | {"BLOCK": 8192}
tried = {
    "good": cases["fused forward, bf16, odd D"],
    "spills": rows._replace(constants=wide, options={"num_warps": 1}),
    "no tensor core": cases["counted product, z fp32"]._replace(matrix=True),
}
reports = {name: aot.compile_triton(case, 80) for name, case in tried.items()}
print(json.dumps({name: [report.mma, *report.failures()] for name, report in reports.items()}))
"""


@pytest.mark.slow
def test_what_the_compilers_say_closes_the_gates():
    """Real kernels: a good one, one that spills, and one that multiplies without tensor cores."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(aot.__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", BROKEN], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["good"] == ["HMMA"]
    assert "bytes of spills" in found["spills"][1]
    assert found["no tensor core"] == ["", "no tensor-core instruction"]
