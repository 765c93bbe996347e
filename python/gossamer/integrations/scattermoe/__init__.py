"""A home for code written against ScatterMoE (Tan et al., 2024): its names and call shapes over gossamer's primitives.

``import gossamer.integrations.scattermoe as scattermoe`` takes the place of ``import scattermoe``; the submodules have
the same names. Parameters keep their names and layouts, so state dicts load.
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
