"""ScatterMoE's kernels by name."""

from gossamer.integrations.scattermoe.kernels import ops

__all__ = ["ops"]
