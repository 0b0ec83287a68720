"""Benchmarks: groups of cases and rows, gated on correctness, timed against naive code."""
