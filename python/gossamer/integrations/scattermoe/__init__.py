"""ScatterMoE's functions and layers (Tan et al., 2024), implemented with gossamer's primitives.

``import gossamer.integrations.scattermoe as scattermoe`` replaces ``import scattermoe``; the submodules have the same
names. Parameters keep their names and layouts, so state dicts load.
"""

from gossamer.integrations.scattermoe import kernels, mlp, parallel_experts
from gossamer.integrations.scattermoe.mlp import GLUMLP, MLP
from gossamer.integrations.scattermoe.parallel_experts import (
    ParallelExperts,
    ParallelLinear,
    flatten_sort_count,
    parallel_linear,
)

__all__ = [
    "GLUMLP",
    "MLP",
    "ParallelExperts",
    "ParallelLinear",
    "flatten_sort_count",
    "kernels",
    "mlp",
    "parallel_experts",
    "parallel_linear",
]
