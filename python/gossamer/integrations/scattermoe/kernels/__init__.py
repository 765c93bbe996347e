"""ScatterMoE's kernels by name."""

from gossamer.integrations.scattermoe.kernels import ops, single

__all__ = ["ops", "single"]
