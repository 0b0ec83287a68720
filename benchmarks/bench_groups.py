"""`pytest benchmarks --benchmark-only [--full] [-k GROUP]`: every row under pytest-benchmark."""

import pytest


# A row that is missing here is skipped before it is timed.
@pytest.mark.filterwarnings("ignore:Benchmark fixture was not used")
def test_row(timed_row):
    timed_row()
