"""`python -m benchmarks.gpu --out DIR`: everything that needs a GPU, in one command.

Builds csrc/cuda, runs the tests marked `gpu`, measures what this GPU can do at most (copy
bandwidth, bf16 matmul), then pair_reduce, the head's row kernels, a pair's loss through the trained
head in one pass, the certified sparse backward, a step of SmolLM2-135M (random weights) with
gradient statistics, and the LM head at T = 8192 and 32 768, V = 151 936, D = 4096, 3584 and 1536
(scores only, frozen, trained), beside the peers that are installed. Takes at most `--minutes`:
cases that are not begun by then are named, and left out. Writes a CSV and a figure of each group
(gpu-pair-reduce, gpu-rows, gpu-head-pairs, gpu-tail, gpu-stats, gpu-logprobs), ceilings.csv,
rates.csv and on an H100 or H200 lines.csv into DIR. Rows that are not installed, or do not fit in
memory, are named in the tables; a row whose results differ from fp64 by more than naive code's is
not timed.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
import torch
from jsonargparse import ArgumentParser
from tabulate import tabulate

ROOT = Path(__file__).parents[1]
COPY_BYTES = 2**31
MATMUL_SIZE = 8192
CEILING_SECONDS = 0.5
# A case that has begun is finished: what the longest may take.
CASE_SECONDS = 45
# What was promised for an H100, in bf16 at the first T and D: milliseconds, and bytes beside. An
# H200 has the same multiprocessors, which the milliseconds depend on, and faster memory.
LINE_CHIPS = ("H100", "H200")
LINES_MS = {"scores": 18, "frozen": 36, "trained": 70}
LINE_EXTRA_MIB = 1024
LINE_COPY_SHARE = 0.85
COLUMNS = ["case", "row", "ms", "rate", "unit", "share_of_ceiling", "extra_mib", "error"]


def why_no_gpu() -> str:
    """Why nothing here can run; '' when it can."""
    if torch.cuda.is_available():
        return ""
    built = f"torch {torch.__version__} is built for CUDA {torch.version.cuda or '(none)'}"
    return f"no CUDA device is usable: {built}; run this on a machine with a GPU"


def _best_seconds(call: Callable[[], object]) -> float:
    """Fastest of repeated calls on the device clock; ceilings are what the chip can do."""
    call()
    best, deadline = float("inf"), time.monotonic() + CEILING_SECONDS
    while time.monotonic() < deadline:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) / 1e3)
    return best


def measure_ceilings() -> dict[str, float]:
    """Copy bandwidth in byte/s (read plus write) and the rate of a bf16 matmul in FLOP/s."""
    source, target = torch.empty(2, COPY_BYTES, dtype=torch.uint8, device="cuda")
    copy = 2 * COPY_BYTES / _best_seconds(lambda: target.copy_(source))
    left, right = torch.randn(2, MATMUL_SIZE, MATMUL_SIZE, device="cuda", dtype=torch.bfloat16)
    matmul = 2 * MATMUL_SIZE**3 / _best_seconds(lambda: left @ right)
    return {"copy": copy, "matmul": matmul}


def rates(frame: pd.DataFrame, ceilings: dict[str, float]) -> pd.DataFrame:
    """Per timed case and row: milliseconds, rate, share of the measured ceiling, peak memory above
    inputs and results (which no schedule can avoid), and the largest relative error against fp64.
    """
    from benchmarks import gpu_groups, gpu_rows, records
    from benchmarks.registry import Case

    moved = dict.fromkeys(gpu_rows.BYTES, gpu_rows.rows_bytes)
    moved["pair_reduce"] = gpu_groups.pair_reduce_bytes
    lines = []
    for (case, row), part in frame.groupby(["case", "row"], sort=False):
        metrics, first = records.values(part), part.iloc[0]
        shape, mode = records.shape_of(first["shape"]), first["mode"]
        if "time" not in metrics or mode not in (*gpu_groups.NEEDED_FLOPS, *moved):
            continue
        if mode in moved:
            work = moved[mode](Case(shape, first["dtype"], mode))
            ceiling, unit = ceilings["copy"], "GB/s"
        else:
            work = gpu_groups.NEEDED_FLOPS[mode] * shape["T"] * shape["V"] * shape["D"]
            ceiling, unit = ceilings["matmul"], "TFLOP/s"
        rate = work / metrics["time"]
        lines.append({
            "case": case, "row": row, "ms": 1e3 * metrics["time"],
            "rate": rate / (1e9 if unit == "GB/s" else 1e12), "unit": unit,
            "share_of_ceiling": rate / ceiling, "extra_mib": metrics.get("peak_memory"),
            "error": max((v for k, v in metrics.items() if k.startswith("relative_error:")),
                         default=None),
        })  # fmt: skip
    return pd.DataFrame(lines, columns=COLUMNS)


def lines(table: pd.DataFrame) -> pd.DataFrame:
    """What was promised for an H100, and whether it holds.

    Args:
        table: of `rates`. A line whose rows were not timed is left out.
    """
    from benchmarks import gpu_groups

    rows = []
    for mode, limit in LINES_MS.items():
        name = gpu_groups.headline(mode).name
        part = table[table["case"] == name].set_index("row")
        ours = part[part.index.isin(gpu_groups.OURS)]
        if ours.empty:
            continue
        best = ours.sort_values("ms").iloc[0]
        rows.append((f"{mode}: ms", f"<= {limit}", best["ms"], best["ms"] <= limit))
        extra = best["extra_mib"]
        rows.append((f"{mode}: extra MiB", f"<= {LINE_EXTRA_MIB}", extra, extra <= LINE_EXTRA_MIB))
        for peer in ("Liger", "TRL chunked"):
            if peer in part.index:
                theirs = part.loc[peer, "ms"]
                rows.append(
                    (f"{mode}: ms, {peer}", f"<= {theirs:.3g}", best["ms"], best["ms"] <= theirs)
                )
    rows += _pair_lines(table)
    shares = table[(table["unit"] == "GB/s") & table["row"].isin(gpu_groups.REDUCING)]
    for case, share in shares.groupby("case", sort=False)["share_of_ceiling"].max().items():
        rows.append(
            (f"{case}: share of copy", f">= {LINE_COPY_SHARE}", share, share >= LINE_COPY_SHARE)
        )
    return pd.DataFrame(rows, columns=["line", "limit", "measured", "holds"])


def _pair_lines(table: pd.DataFrame) -> list[tuple[str, str, float, bool]]:
    from benchmarks import gpu_pairs

    found = []
    for case, line in gpu_pairs.LINES.items():
        for _, row in table[(table["case"] == case) & (table["row"] == line.row)].iterrows():
            for name, limit in (("ms", line.most_ms), ("extra_mib", line.most_mib)):
                if limit is not None and math.isfinite(limit):
                    label = f"{case} {line.row}: {name.replace('extra_mib', 'extra MiB')}"
                    found.append((label, f"<= {limit:.4g}", row[name], row[name] <= limit))
    return found


def _run(*command: str, **environment: str) -> int:
    settings = {**os.environ, **environment}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=settings).returncode


def gpu_tests() -> list[str]:
    """The files with tests marked `gpu`: the others may want packages that are not needed here."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(path) for path in files if "mark.gpu" in path.read_text(encoding="utf-8")]


def prepare(build: bool, tests: bool) -> None:
    """Build the extensions and run the GPU tests, in processes of their own.

    Raises:
        RuntimeError: when either fails. A kernel that is wrong is not timed.
    """
    # Only csrc/cuda: nothing here runs on the CPU kernels, and a build of theirs takes minutes.
    if build and _run("setup.py", "build_ext", "--inplace", BVPO_USE_CPP="0"):
        raise RuntimeError("the extensions could not be built; --build false goes on without")
    if tests and _run("-m", "pytest", "-q", "-n", "4", "-m", "gpu", *gpu_tests()):
        raise RuntimeError("tests marked gpu fail; --tests false measures all the same")


def measure(out: Path, quick: bool, until: float, only: str = "") -> None:
    """Time the groups whose name matches `only`, write CSV and PNG, and print rates and lines; no
    case but a group's first begins at `until`."""
    # Imported here: the backends are looked for at import, after the build.
    from benchmarks import gpu_groups, gpu_pairs, gpu_rows, records, run

    ceilings = measure_ceilings()
    out.mkdir(parents=True, exist_ok=True)
    where = records.environment(torch.get_num_threads())
    pd.DataFrame([{**ceilings, **where}]).to_csv(out / "ceilings.csv", index=False)
    print(
        f"copy {ceilings['copy'] / 1e9:.0f} GB/s, bf16 matmul "
        f"{ceilings['matmul'] / 1e12:.0f} TFLOP/s on {where['gpu']}"
    )
    tokens = gpu_groups.TOKENS[:1] if quick else gpu_groups.TOKENS
    sizes = gpu_groups.HIDDEN_SIZES[:1] if quick else gpu_groups.HIDDEN_SIZES
    groups = (
        gpu_groups.pair_reduce_group("cuda"),
        gpu_rows.rows_group("cuda"),
        gpu_pairs.pairs_group("cuda"),
        gpu_groups.tail_group("cuda"),
        gpu_groups.stats_group("cuda"),
        gpu_groups.head_group("cuda", tokens, sizes),
    )
    chosen = [group for group in groups if re.search(only, group.name)]
    if not chosen:
        raise ValueError(f"only: {only!r} matches none of {[group.name for group in groups]}")
    frames = []
    for group in chosen:
        frames.append(records.read_csv(run.run_group(group, out=out, until=until)))
        gpu_groups.release_inputs()
        gpu_rows.release_inputs()
    tables = {"rates": pd.concat([rates(frame, ceilings) for frame in frames])}
    if any(chip in where["gpu"] for chip in LINE_CHIPS):
        tables["lines"] = lines(tables["rates"])
    for name, table in tables.items():
        table.to_csv(out / f"{name}.csv", index=False)
        print(tabulate(table, headers="keys", showindex=False, floatfmt=".3g"))


def main(args: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    begin = time.monotonic()
    parser = ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--quick", action="store_true", help="T = 8192, D = 4096 only")
    parser.add_argument("--only", default="", help="regular expression on the groups' names")
    parser.add_argument("--minutes", type=float, default=8, help="the whole command's time")
    parser.add_argument("--build", type=bool, default=True, help="build the extensions first")
    parser.add_argument("--tests", type=bool, default=True, help="run the GPU tests first")
    options = parser.parse_args(args)
    if reason := why_no_gpu():
        print(f"benchmarks.gpu: {reason}", file=sys.stderr)
        return 2
    prepare(options.build, options.tests)
    measure(options.out, options.quick, begin + 60 * options.minutes - CASE_SECONDS, options.only)
    return 0


if __name__ == "__main__":
    sys.exit(main())
