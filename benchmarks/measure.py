"""Time, interleaved so that a noisy machine is noisy for every row, and peak memory per row."""

from __future__ import annotations

import ctypes
import gc
import math
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import torch

from benchmarks import registry
from benchmarks.registry import Call, Case, Outputs
from train.sizing.head_memory import status_bytes

MIB = 2**20
# A sample repeats a short call for this long; a call longer than LONG_CALL is not warmed up again
# after the gate has run it once.
MIN_SAMPLE_SECONDS = 0.05
LONG_CALL_SECONDS = 0.2
# What the processes that measure memory find imported. Not the main module: each of them runs that
# again, under another name.
_PRELOAD = ["benchmarks.measure", "benchmarks.plot", "benchmarks.verify", "jsonargparse"]
# Share of the available memory that a row may be predicted to need.
USABLE_MEMORY = 0.9
# glibc: M_TRIM_THRESHOLD, M_MMAP_THRESHOLD and M_ARENA_MAX of <malloc.h>. Blocks of 64 KiB and more
# come from mmap, so that freed memory leaves the process and is not mistaken for memory in use.
_MALLOPT = ((-1, 65536), (-3, 65536), (-8, 1))


@dataclass(frozen=True)
class Timing:
    """Seconds per call over the rounds; `ratio` is the median of time / baseline per round."""

    median: float
    low: float
    high: float
    ratio: float | None
    rounds: int


def synchronize(device: str) -> None:
    """Wait for queued work, so that a clock read now sees it."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def seconds(call: Call, device: str, repeats: int = 1) -> float:
    """Wall time of one call, averaged over `repeats`; outputs are dropped as they come."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronize(device)
    return (time.perf_counter() - start) / repeats


def interleave(
    calls: Mapping[str, Call],
    rounds: int,
    device: str = "cpu",
    gate_seconds: Mapping[str, float] | None = None,
    step: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds per call, one entry per round: rows take turns, and the first turn rotates.

    gate_seconds: how long each row took in the gate, which was its first call. step: called after
    each sample.
    """
    estimates = dict(gate_seconds or {})
    for name, call in calls.items():
        if estimates.get(name, 0.0) < LONG_CALL_SECONDS:
            estimates[name] = seconds(call, device)
    order = list(calls)
    times: dict[str, list[float]] = {name: [] for name in order}
    gc.collect()
    gc.disable()
    try:
        for index in range(rounds):
            first = index % max(len(order), 1)
            for name in order[first:] + order[:first]:
                repeats = max(1, math.ceil(MIN_SAMPLE_SECONDS / max(estimates[name], 1e-9)))
                times[name].append(seconds(calls[name], device, repeats))
                step()
    finally:
        gc.enable()
    return times


def summarize(times: Mapping[str, Sequence[float]], baseline: str) -> dict[str, Timing]:
    """Median and range of each row; ratios only where the baseline was timed."""
    base = times.get(baseline)
    return {
        name: Timing(
            statistics.median(row),
            min(row),
            max(row),
            statistics.median(t / b for t, b in zip(row, base, strict=True)) if base else None,
            len(row),
        )
        for name, row in times.items()
    }


class OtherLoad:
    """Share of this machine's CPU time that other processes took inside the `with` block.

    Threads that wait for each other in short parallel regions slow down out of all proportion once
    a core is shared, so a time without this number cannot be read.
    """

    percent = 0.0

    def __enter__(self) -> OtherLoad:
        self._process = psutil.Process()
        self._start = self._read()
        return self

    def __exit__(self, *_: object) -> None:
        total, busy, own = (after - b for after, b in zip(self._read(), self._start, strict=True))
        self.percent = max(0.0, 100 * (busy - own) / total) if total > 0 else 0.0

    def _read(self) -> tuple[float, float, float]:
        machine = psutil.cpu_times()
        # A row may run in processes of its own.
        ours = [self._process, *self._process.children(recursive=True)]
        own = sum(process.cpu_times().user + process.cpu_times().system for process in ours)
        waiting = machine.idle + getattr(machine, "iowait", 0.0)
        # Guests are already in user time.
        total = sum(machine) - getattr(machine, "guest", 0.0) - getattr(machine, "guest_nice", 0.0)
        return total, total - waiting, own


def refusal(predicted_bytes: int, device: str) -> str:
    """Why a row that needs so much memory is not started; '' when it fits."""
    if device.startswith("cuda"):
        available = torch.cuda.mem_get_info()[0]
    else:
        available = psutil.virtual_memory().available
    if predicted_bytes <= USABLE_MEMORY * available:
        return ""
    return f"needs {predicted_bytes / 2**30:.1f} GiB, {available / 2**30:.1f} GiB are free"


def _reset_peak() -> bool:
    """Set the peak of the resident set to its present size; False where that is not possible."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _peak_bytes(was_reset: bool) -> int:
    if was_reset:
        return status_bytes("VmHWM")
    # Without a reset the peak of the whole life of the process: an upper bound.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def trim() -> None:
    """Give freed memory back to the system."""
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def _return_freed_memory() -> None:
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        for parameter, value in _MALLOPT:
            libc.mallopt(parameter, value)
    trim()


class ResidentPeak:
    """The peak of this process's resident set since this object was made, above its size then."""

    def __init__(self) -> None:
        _return_freed_memory()
        self._was_reset = _reset_peak()
        self._before = status_bytes("VmRSS") if self._was_reset else _peak_bytes(False)

    def above(self) -> int:
        return _peak_bytes(self._was_reset) - self._before


def output_bytes(outputs: Outputs) -> int:
    """Bytes of the distinct storages of the outputs."""
    storages = [tensor.untyped_storage() for tensor in outputs.values()]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def peak_bytes(start: Callable[[], Outputs], device: str = "cpu") -> int:
    """Peak memory of `start()` above what is allocated now and above the outputs it returns.

    On the CPU that is the resident set, so anything the inputs need must have been touched before.
    Outputs are subtracted whole: a peak reached before they were written gives too little by at
    most their size, never too much, and at least 0.
    """
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        outputs = start()
        torch.cuda.synchronize()
        return max(torch.cuda.max_memory_allocated() - before - output_bytes(outputs), 0)
    resident = ResidentPeak()
    outputs = start()
    return max(resident.above() - output_bytes(outputs), 0)


def _child(group_name: str, case: Case, row_name: str, threads: int, answer: Connection) -> None:
    torch.set_num_threads(threads)
    _return_freed_memory()
    group = registry.load(group_name)
    row = group.row(row_name, case)
    small = group.tiny(case)
    row.make(small, group.make_inputs(small))()
    inputs = group.make_inputs(case)
    answer.send(peak_bytes(lambda: row.make(case, inputs)(), case.device))


def peak_in_subprocess(group_name: str, case: Case, row_name: str, threads: int) -> int:
    """`peak_bytes` of one row in a process of its own; RuntimeError when that process dies."""
    # A server that has imported everything and started no thread forks the processes: a second
    # less for each than starting Python.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(group_name, case, row_name, threads, sender))
    process.start()
    sender.close()
    try:
        return int(receiver.recv())
    except EOFError:
        process.join()
        raise RuntimeError(
            f"the process that measures memory ended with code {process.exitcode}"
        ) from None
    finally:
        process.join()
        receiver.close()
