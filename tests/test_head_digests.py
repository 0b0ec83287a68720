"""The head's calls keep their bits, where they were recorded for this processor and torch."""

import subprocess
import sys
from pathlib import Path

import head_digests
import pytest


def test_calls_are_as_recorded():
    if head_digests.path() not in head_digests.recorded():
        pytest.skip(f"no digests of {head_digests.path()!r}: python tests/head_digests.py record")
    script = str(Path(head_digests.__file__))
    # A process of its own: it joins a process group, and other tests set threads.
    done = subprocess.run([sys.executable, script, "compare"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
