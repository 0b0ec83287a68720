"""SIGTERM and the first SIGINT end a run between two steps, with a checkpoint."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# torchrun takes any other code of a worker for a failure, and may start it again.
UNDER_TORCHRUN = "TORCHELASTIC_RUN_ID"


class Interruption:
    """Remembers a signal, so that the loop can finish its step; a second SIGINT interrupts at once.

    A context: handlers are those of before once it ends. Only a main thread can have any.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)

    @property
    def requested(self) -> bool:
        """Has this process been asked to stop?"""
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """0 under torchrun, else 128 and the signal's number, as a shell has it."""
        if UNDER_TORCHRUN in os.environ:
            return 0
        return 128 + (self.signal or signal.SIGTERM)
