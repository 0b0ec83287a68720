"""Processes that run a training step on command: one per rank, with torchrun's environment.

A step owns a model, its gradients and an optimizer's state, so every row has processes of its own:
their memory is the row's alone, and rows can take turns though all of them are loaded.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import weakref
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

import torch

from benchmarks import measure
from benchmarks.registry import Case, Outputs
from benchmarks.steps import STEPS, StepInputs, gradient_sample, make_inputs, prime

# What the server that forks the workers has imported.
_PRELOAD = ["benchmarks.step_workers", "transformers.models.llama.modeling_llama"]
_EXIT_SECONDS = 20.0
STEP, CHECK, PEAK = "step", "check", "peak"


class _Worker:
    """What runs inside a process: the step, and the answers to commands."""

    def __init__(self, name: str, inputs: StepInputs, memory: bool) -> None:
        model = inputs.load()
        # Returning freed memory to the system costs time: only where memory is asked for.
        self.resident = measure.ResidentPeak() if memory else None
        self.step = STEPS[name](inputs, model)
        prime(self.step.optimizer)

    def answer(self, command: str) -> Outputs:
        if command == PEAK:
            assert self.resident is not None
            return {"peak": torch.tensor([self.resident.above()])}
        sample: Outputs = {}
        if command == CHECK:
            handle = self.step.optimizer.register_step_pre_hook(
                lambda *_: sample.update(gradient=gradient_sample(self.step.model))
            )
        loss = self.step.run()
        if command == CHECK:
            handle.remove()
        return {"loss": loss.double().reshape(1), **sample}

    def rest(self) -> None:
        """Keep no more than the model and the optimizer while other rows have their turns."""
        self.step.optimizer.zero_grad(set_to_none=True)
        measure.trim()


def _serve(
    name: str,
    inputs: StepInputs,
    memory: bool,
    threads: int,
    environment: dict[str, str],
    pipe: Connection,
) -> None:
    """Answer commands until the pipe closes."""
    torch.set_num_threads(threads)
    os.environ.update(environment)
    ranks = int(environment.get("WORLD_SIZE", "1"))
    if ranks > 1:
        torch.distributed.init_process_group("gloo")
    worker = _Worker(name, inputs, memory)
    try:
        while True:
            # Plain arrays: tensors would be shared with a process that may end.
            answer = worker.answer(pipe.recv())
            pipe.send({name: tensor.numpy() for name, tensor in answer.items()})
            worker.rest()
    except EOFError:
        pass


def _environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What torchrun would set; nothing for a single process."""
    if ranks == 1:
        return {}
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Crew:
    """The processes of one row in one case; they end with this object.

    Raises:
        RuntimeError: where a process dies, from `ask`.
    """

    def __init__(self, name: str, inputs: StepInputs, memory: bool = False) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOAD)
        ranks, port = inputs.case.shape["ranks"], _free_port()
        threads = max(torch.get_num_threads() // ranks, 1)
        self.pipes: list[Connection] = []
        self.processes: list[BaseProcess] = []
        for rank in range(ranks):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve,
                daemon=True,
                args=(name, inputs, memory, threads, _environment(rank, ranks, port), theirs),
            )
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)
        self.close = weakref.finalize(self, _end, self.pipes, self.processes)

    def ask(self, command: str) -> list[Outputs]:
        """Every rank's answer."""
        try:
            for pipe in self.pipes:
                pipe.send(command)
            answers = [pipe.recv() for pipe in self.pipes]
        except (EOFError, OSError):
            self.close()
            codes = [process.exitcode for process in self.processes]
            raise RuntimeError(f"a process of the step ended, codes {codes}") from None
        return [
            {name: torch.from_numpy(array) for name, array in answer.items()} for answer in answers
        ]


def _end(pipes: list[Connection], processes: list[BaseProcess]) -> None:
    for pipe in pipes:
        pipe.close()
    for process in processes:
        process.join(_EXIT_SECONDS)
        if process.exitcode is None:
            process.kill()
            process.join()


class Inputs(NamedTuple):
    """What rows are bound to: the case's crews, by row, and the command that a call sends."""

    data: StepInputs
    crews: dict[str, Crew]
    command: str = STEP

    def call(self, name: str) -> Callable[[], Outputs]:
        """A call that runs the row's step once; the row's processes start now, or are there."""
        if name not in self.crews:
            self.crews[name] = Crew(name, self.data)
        crew = self.crews[name]
        return lambda: crew.ask(self.command)[0]

    def peak_bytes(self, name: str) -> float:
        """Peak memory of a step above the loaded model, of the rank that needs most.

        The crews that were timed end first: their models would take the room.
        """
        for crew in self.crews.values():
            crew.close()
        self.crews.clear()
        crew = Crew(name, self.data, memory=True)
        crew.ask(STEP)
        peak = max(float(answer["peak"]) for answer in crew.ask(PEAK))
        crew.close()
        return peak


def inputs_of(case: Case) -> Any:
    """`Inputs` without any process yet."""
    return Inputs(make_inputs(case), {})
