"""`pytest benchmarks --benchmark-only [--full] [-k GROUP]`: every row under pytest-benchmark."""


def test_row(timed_row):
    timed_row()
