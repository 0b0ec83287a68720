"""`python tests/aot.py`: compile every kernel for sm_80, sm_90, sm_100, GPU or not.

Triton kernels go through Triton's own compiler and ptxas, csrc/cuda/*.cu through nvcc. Prints one
row per kernel and architecture: registers, spills, shared memory, and the matrix instruction found
in the machine code. Fails on a spill, on shared memory above the chip's limit, and on a matrix
kernel without tensor cores.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ARCHITECTURES = (80, 90, 100)
# Shared memory that one block may use, bytes (CUDA C++ Programming Guide, compute capabilities).
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
SOURCES = Path(__file__).parents[1] / "csrc" / "cuda"
_MMA = re.compile(r"\b(UTC\w*MMA|HGMMA|HMMA)\b")


class Case(NamedTuple):
    """One specialisation of a Triton kernel: argument types (i32 if not given) and constants."""

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, int]
    # Arguments that are multiples of 16 at run time, as the launcher would find out.
    aligned: tuple[str, ...] = ()
    matrix: bool = False


class Report(NamedTuple):
    kernel: str
    arch: int
    registers: int
    spills: int
    shared: int
    mma: str = ""
    matrix: bool = False

    def failures(self) -> list[str]:
        reasons = []
        if self.spills:
            reasons.append(f"{self.spills} bytes of spills")
        if self.shared > SHARED_LIMIT[self.arch]:
            reasons.append(f"shared memory above {SHARED_LIMIT[self.arch]} bytes")
        if self.matrix and not self.mma:
            reasons.append("no tensor-core instruction")
        return reasons


def _row_cases(arch: int) -> Iterator[Case]:
    from bvpo_kernels.backends.triton import logprobs
    from bvpo_kernels.backends.triton.configs import CONFIGS

    shapes = CONFIGS[f"sm_{arch}"]
    aligned = ("z_ptr", "z_stride", "p_ptr", "p_stride", "dz_ptr", "dz_stride", "columns")
    common = {
        "z_ptr": "*fp32",
        "bias_ptr": "*bf16",
        "target_ptr": "*i64",
        "count_ptr": "*i32",
        "softcap": "fp32",
        "inv_temperature": "fp32",
    }
    forward = common | {"state_ptr": "*fp32"}
    for name, dtype, options_on in (
        ("scores", "*fp32", ()),
        ("entropy", "*fp32", ("HAS_ENTROPY",)),
        ("frozen", "*bf16", ("HAS_P",)),
        ("frozen fp16", "*fp16", ("HAS_P",)),
        ("frozen all", "*fp32", ("HAS_P", "HAS_ENTROPY", "HAS_SOFTCAP", "HAS_BIAS")),
    ):
        flags = {f: f in options_on for f in ("HAS_BIAS", "HAS_SOFTCAP", "HAS_ENTROPY", "HAS_P")}
        shape = shapes.rows_twice if flags["HAS_P"] else shapes.rows
        blocks = {"ROWS": shape.rows, "BLOCK": shape.block}
        blocks |= {"LANES": shape.lanes(4 if dtype == "*fp32" else 2), "STAGES": shape.stages}
        yield Case(
            f"rows forward, {name}",
            logprobs._forward_kernel,
            forward | {"p_ptr": dtype},
            flags | blocks,
            {"num_warps": shape.num_warps},
            aligned,
        )
    blocks = {"ROWS": shapes.rows.rows, "BLOCK": shapes.rows.block}
    vectors = ("upstream_ptr", "coefficient_ptr", "max_ptr", "logsum_ptr")
    for name, dtype, on in (
        ("bf16", "*bf16", False),
        ("fp16", "*fp16", False),
        ("fp32, softcap, bias", "*fp32", True),
    ):
        types = common | {"dz_ptr": dtype} | dict.fromkeys(vectors, "*fp32")
        flags = {"HAS_BIAS": on, "HAS_SOFTCAP": on}
        yield Case(
            f"rows backward, {name}",
            logprobs._backward_kernel,
            types,
            flags | blocks,
            {"num_warps": shapes.rows.num_warps},
            aligned,
        )


def _fused_cases(arch: int) -> Iterator[Case]:
    from bvpo_kernels.backends.triton import logprobs_gemm
    from bvpo_kernels.backends.triton.configs import CONFIGS

    shapes = CONFIGS[f"sm_{arch}"]
    for name, dtype, shape, options_on in (
        ("bf16", "bf16", shapes.gemm, ()),
        ("fp16", "fp16", shapes.gemm, ()),
        ("bf16, entropy", "bf16", shapes.gemm, ("HAS_ENTROPY",)),
        ("bf16, all", "bf16", shapes.gemm_small, ("HAS_ENTROPY", "HAS_SOFTCAP", "HAS_BIAS")),
        ("bf16, odd D", "bf16", shapes.gemm_small, ("HAS_ENTROPY",)),
        ("fp32", "fp32", shapes.gemm_fp32, ()),
    ):
        tma = shape.tma
        blocks = {
            "hidden": (shape.block_m, shape.block_d),
            "weight": (shape.block_n, shape.block_d),
        }
        types = {
            n: f"tensordesc<{dtype}[{b[0]},{b[1]}]>" if tma else f"*{dtype}"
            for n, b in blocks.items()
        }
        types |= {
            "bias_ptr": "*bf16",
            "target_ptr": "*i64",
            "count_ptr": "*i32",
            "partial_ptr": "*fp32",
            "state_ptr": "*fp32",
            "softcap": "fp32",
            "inv_temperature": "fp32",
        }
        flags: dict[str, Any] = {
            f: f in options_on for f in ("HAS_BIAS", "HAS_SOFTCAP", "HAS_ENTROPY")
        }
        flags |= {"TMA": tma, "UPCAST": False, "PRECISION": "ieee", "GROUP_M": shape.group_m}
        flags |= {"BLOCK_M": shape.block_m, "BLOCK_N": shape.block_n, "BLOCK_D": shape.block_d}
        odd = "odd D" in name
        aligned: tuple[str, ...] = () if odd else ("dim", "hidden_stride", "weight_stride")
        aligned += () if tma or odd else ("hidden", "weight")
        yield Case(
            f"fused forward, {name}",
            logprobs_gemm._fused_forward_kernel,
            types,
            flags,
            {"num_warps": shape.num_warps, "num_stages": shape.num_stages},
            aligned,
            matrix=dtype != "fp32",
        )
    types = {"partial_ptr": "*fp32", "count_ptr": "*i32", "state_ptr": "*fp32"}
    constants = {"HAS_ENTROPY": True, "ROWS": logprobs_gemm.MERGE_ROWS}
    yield Case("fused merge", logprobs_gemm._merge_kernel, types, constants, {"num_warps": 4})


def _other_cases() -> Iterator[Case]:
    from bvpo_kernels.backends.triton import packing

    block = {"BLOCK": packing._BLOCK}
    default = {"num_warps": 4}
    for dtype in ("fp32", "bf16", "fp64"):
        wide = "fp64" if dtype == "fp64" else "fp32"
        types = {"values_ptr": f"*{dtype}", "bounds_ptr": "*i32", "sums_ptr": f"*{wide}"}
        yield Case(f"segment sum, {dtype}", packing._segment_sum_kernel, types, block, default)
        types = {"dsums_ptr": f"*{wide}", "bounds_ptr": "*i32", "dvalues_ptr": f"*{dtype}"}
        yield Case(
            f"segment spread, {dtype}", packing._segment_spread_kernel, types, block, default
        )
    types = {"scored_ptr": "*i8", "position_ptr": "*i32", "index_ptr": "*i32"}
    yield Case("compaction", packing._invert_kernel, types, block, default)
    for name, source in (("gather rows", "*bf16"), ("scatter rows", "*fp32")):
        types = {"source_ptr": source, "index_ptr": "*i32", "out_ptr": "*bf16"}
        constants = block | {"SCATTER": name == "scatter rows", "ROWS": 1}
        yield Case(
            name,
            packing._move_rows_kernel,
            types,
            constants,
            default,
            ("source_ptr", "out_ptr", "source_stride", "out_stride", "columns"),
        )


def _reduce_cases() -> Iterator[Case]:
    from bvpo_kernels.backends.triton import grad_stats

    floats = dict.fromkeys(("tiles_ptr", "weights_ptr", "partials_ptr"), "*fp32")
    warps = {"num_warps": grad_stats._THREADS // 32}
    aligned = ("tiles_ptr", "total_ptr", "numel")
    for dtype in ("*fp32", "*bf16"):
        types = floats | {"total_ptr": dtype}
        for name, mixed in (("", False), (", weights, added", True)):
            flags: dict[str, Any] = {"HAS_WEIGHTS": mixed, "ADD": mixed}
            suffix = f", dW {dtype[1:]}{name}"
            for count in range(1, grad_stats.FUSED + 1):
                yield Case(
                    f"pair_reduce of {count}{suffix}",
                    grad_stats._pair_reduce_kernel,
                    types,
                    flags | grad_stats.reduce_shape(count),
                    warps,
                    aligned,
                )
            block = {"BLOCK": grad_stats._SUM_BLOCK}
            kernel = grad_stats._sum_kernel
            yield Case(f"sum of tiles{suffix}", kernel, types, flags | block, warps, aligned)
    block = {"SIDE": grad_stats.FUSED, "TILE": grad_stats._SMALL_TILE}
    block |= {"BLOCK": grad_stats._GRAM_BLOCK}
    yield Case("gram block", grad_stats._gram_block_kernel, floats, block, warps, aligned)


def _tail_cases(arch: int) -> Iterator[Case]:
    from bvpo_kernels.backends.triton import lists
    from bvpo_kernels.backends.triton.configs import CONFIGS

    shapes = CONFIGS[f"sm_{arch}"]
    numbers = (
        "max_ptr",
        "sum_ptr",
        "rescale_ptr",
        "known_ptr",
        "list_z_ptr",
        "rest_ptr",
        "z_ptr",
        "factor_ptr",
        "own_factor_ptr",
        "c_ptr",
    )
    types = dict.fromkeys(numbers, "*fp32") | {
        "bias_ptr": "*bf16",
        "target_ptr": "*i64",
        "count_ptr": "*i32",
        "list_column_ptr": "*i32",
        "length_ptr": "*i32",
        "softcap": "fp32",
        "inv_temperature": "fp32",
        "floor": "fp32",
        "start_ptr": "*i64",
        "index_ptr": "*i32",
        "own_index_ptr": "*i64",
        "wanted_ptr": "*i8",
        "rows_ptr": "*bf16",
        "out_ptr": "*bf16",
    }
    blocks = {"ROWS": shapes.rows.rows, "BLOCK": shapes.rows.block}
    warps = {"num_warps": shapes.rows.num_warps}
    for name, on in (("plain", False), ("softcap, bias", True)):
        yield Case(
            f"list rows, {name}",
            lists._list_kernel,
            types,
            blocks | {"HAS_BIAS": on, "HAS_SOFTCAP": on},
            warps,
            ("z_ptr", "z_stride", "columns"),
        )
    for name, own, out in (("dH", True, "*bf16"), ("dW", False, "*fp32")):
        yield Case(
            f"sum rows, {name}",
            lists._sum_rows_kernel,
            types | {"out_ptr": out},
            {"HAS_OWN": own, "ADD": not own, "BLOCK": lists._BLOCK_D},
            warps,
            ("rows_ptr", "rows_stride", "out_ptr", "out_stride", "dim"),
        )
    for (name, rows, add), (dtype, shape) in itertools.product(
        (("z", True, False), ("dH", True, True), ("dW", False, True)),
        (("bf16", shapes.gemm_small), ("fp16", shapes.gemm_small), ("fp32", shapes.gemm_fp32)),
    ):
        constants = {
            "COUNT_ROWS": rows,
            "ADD": add,
            "UPCAST": False,
            "PRECISION": "ieee",
            "BLOCK_M": shape.block_m,
            "BLOCK_N": shape.block_n,
            "BLOCK_K": shape.block_d,
            "GROUP_M": shape.group_m,
        }
        yield Case(
            f"counted product, {name} {dtype}",
            lists._counted_mm_kernel,
            types | {"a_ptr": f"*{dtype}", "b_ptr": f"*{dtype}"},
            constants,
            {"num_warps": shape.num_warps, "num_stages": shape.num_stages},
            ("a_ptr", "b_ptr", "c_ptr", "a_m", "c_m", "N"),
            matrix=dtype != "fp32",
        )


def cases(arch: int) -> list[Case]:
    """Every Triton kernel of the package in every variant that is checked."""
    return [
        *_row_cases(arch),
        *_fused_cases(arch),
        *_other_cases(),
        *_reduce_cases(),
        *_tail_cases(arch),
    ]


def _tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _disassemble(cubin: Path) -> tuple[str, str]:
    usage, code = (
        subprocess.run(command, capture_output=True, text=True, check=True).stdout
        for command in (
            [_tool("cuobjdump"), "--dump-resource-usage", str(cubin)],
            [_tool("nvdisasm"), str(cubin)],
        )
    )
    return usage, code


def _spill_bytes(code: str) -> int:
    """Bytes that one thread stores to local memory: stores by their width, each counted once."""
    stores = re.findall(r"\bSTL(?:\.\w+)*", code)
    return sum(16 if ".128" in s else 8 if ".64" in s else 4 for s in stores)


def compile_triton(case: Case, arch: int) -> Report:
    """Compile one case and read its cubin."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    signature = {n: "constexpr" if n in case.constants else case.types.get(n, "i32") for n in names}
    constants = {(names.index(n),): value for n, value in case.constants.items()}
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in case.aligned if n in names}
    source = ASTSource(case.kernel, signature, constants, attributes)
    target = GPUTarget("cuda", arch, 32)
    compiled = triton.compile(source, target=target, options=case.options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage, code = _disassemble(cubin)
    registers = re.search(r"REG:(\d+)", usage)
    if registers is None:
        raise RuntimeError(f"{case.name}, sm_{arch}: no register count in {usage!r}")
    mma = _MMA.search(code)
    return Report(
        case.name,
        arch,
        int(registers[1]),
        _spill_bytes(code),
        compiled.metadata.shared,
        mma[1] if mma else "",
        case.matrix,
    )


_ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_(?P<arch>\d+)'.*?"
    r"(?P<stores>\d+) bytes spill stores.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def compile_cuda(source: Path, architectures: Sequence[int], nvcc: str) -> list[Report]:
    """Compile a .cu file, host code included; one report per kernel instance and architecture."""
    import torch

    include = Path(torch.__file__).parent / "include"
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in architectures]
    with tempfile.TemporaryDirectory() as folder:
        command = [
            nvcc,
            "-c",
            *targets,
            "-O3",
            "-std=c++20",
            "-Xptxas",
            "-v",
            "-isystem",
            str(include),
            "-o",
            f"{folder}/out.o",
            str(source),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{source.name}: nvcc failed:\n{done.stdout}{done.stderr}")
    output = done.stdout + done.stderr
    reports = []
    for entry in _ENTRY.finditer(output):
        shared = re.search(r"(\d+) bytes smem", entry["rest"])
        name, shared_bytes = _demangle(entry["name"]), int(shared[1]) if shared else 0
        registers, spills = int(entry["registers"]), int(entry["stores"])
        arch = int(entry["arch"])
        reports.append(Report(f"{source.name}: {name}", arch, registers, spills, shared_bytes))
    if {r.arch for r in reports} != set(architectures):
        raise RuntimeError(f"{source.name}: ptxas did not report every architecture:\n{output}")
    return reports


def _demangle(name: str) -> str:
    filt = shutil.which("c++filt")
    if filt is None:
        return name
    full = subprocess.run([filt, name], capture_output=True, text=True, check=True).stdout
    kernel = re.search(r"(\w+_kernel(<[^(]*>)?)\(", full)
    return kernel[1] if kernel else full.strip()


def publish(reports: Sequence[Report]) -> int:
    """Print the table and what fails in it; returns the exit status."""
    width = max(len(r.kernel) for r in reports)
    print(f"{'kernel':<{width}}  arch    regs  spill B  shared B  MMA")
    for r in sorted(reports, key=lambda r: (r.kernel, r.arch)):
        numbers = f"{r.registers:>4}  {r.spills:>7}  {r.shared:>8}"
        print(f"{r.kernel:<{width}}  sm_{r.arch:<4} {numbers}  {r.mma or '-'}")
    failures = [f"{r.kernel}, sm_{r.arch}: {why}" for r in reports for why in r.failures()]
    for failure in failures:
        print(f"FAILED {failure}", file=sys.stderr)
    return 1 if failures else 0


def main() -> int:
    parser = argparse.ArgumentParser("python tests/aot.py", description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: the interpreter compiles nothing")
    nvcc = shutil.which("nvcc")
    reports = []
    for arch in arguments.arch:
        wanted = [case for case in cases(arch) if arguments.only in case.name]
        reports += [compile_triton(case, arch) for case in wanted]
    for source in sorted(SOURCES.glob("*.cu")):
        if nvcc and arguments.only in source.name:
            reports += compile_cuda(source, arguments.arch, nvcc)
    if nvcc is None:
        print("nvcc is not on PATH: csrc/cuda is not compiled")
    return publish(reports)


if __name__ == "__main__":
    sys.exit(main())
