"""Per-unit gradient statistics: see `GradStats`."""

from bvpo_kernels.grad_stats.collect import GradStats
from bvpo_kernels.grad_stats.coverage import Coverage, UncoveredError
from bvpo_kernels.grad_stats.scale import LossScale

__all__ = ["Coverage", "GradStats", "LossScale", "UncoveredError"]
