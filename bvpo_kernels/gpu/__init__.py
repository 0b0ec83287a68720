"""Schedules for GPUs: library GEMMs over tiles, and the kernels that run between them."""
