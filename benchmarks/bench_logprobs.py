"""Group "logprobs" under pytest-benchmark."""

from benchmarks import registry

GROUP = registry.load("logprobs")


def test_logprobs(timed_row):
    timed_row()
