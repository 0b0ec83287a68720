"""Per-unit gradient statistics: see `GradStats`."""

from bvpo_kernels.grad_stats.collect import GradStats
from bvpo_kernels.grad_stats.coverage import Coverage, UncoveredError

__all__ = ["Coverage", "GradStats", "UncoveredError"]
