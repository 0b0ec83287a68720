"""Functions run in processes of their own: alone or as ranks of a gloo group, killed or not; on the
CPU, also where a GPU is."""

import multiprocessing
import os
import pkgutil
import signal
import tempfile
from collections.abc import Callable
from multiprocessing.connection import wait
from unittest import mock

import torch
import torch.distributed as dist

KILLED = -signal.SIGKILL
# A server that has imported what takes seconds, so that its forks start in milliseconds. It has run
# no backward: a fork of a process that has cannot run one.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["train.trainer", "train.model.export"])


def run_processes(work: Callable[..., None], ranks: int, *args: object) -> list[int]:
    """Exit codes of `work(*args)` on so many ranks; one rank has no process group.

    When one dies, the others, which would wait for it, are killed as a launcher would.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            _CONTEXT.Process(target=_main, args=(work, rank, ranks, f"{folder}/store", args))
            for rank in range(ranks)
        ]
        # What they import would bring CUDA up in the server, and a fork of that has none.
        with mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES=""):
            for process in processes:
                process.start()
        waiting = {process.sentinel: process for process in processes}
        while waiting:
            for sentinel in wait(list(waiting)):
                process = waiting.pop(sentinel)
                process.join()
                if process.exitcode != 0:
                    for other in waiting.values():
                        other.kill()
        return [process.exitcode for process in processes]


def _main(work: Callable[..., None], rank: int, ranks: int, store: str, args: tuple) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    work(*args)
    if ranks > 1:
        dist.destroy_process_group()


def kill_at(target: str, call: int = 1) -> mock._patch:
    """Let this process die, by SIGKILL, in place of the n-th call of a function."""
    calls = iter(range(1, call + 1))
    original = pkgutil.resolve_name(target)

    def die(*args: object, **kwargs: object) -> object:
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    return mock.patch(target, die)
