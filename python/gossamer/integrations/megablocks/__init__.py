"""MegaBlocks' layers, options and operators (Gale et al., 2023), implemented with gossamer.

``from gossamer.integrations.megablocks.layers.dmoe import dMoE`` replaces ``from megablocks.layers.dmoe import dMoE``,
and so on. Parameters keep their names and layouts, so checkpoints load.

A layer in training records what its balance loss needs. It keeps one record, which its next call replaces and which is
freed with the layer, so memory does not grow if a step forgets to clear. Within a step::

    output, bias = layer(x)
    loss = task_loss(output) + batched_load_balancing_loss(args)
    loss.backward()
    clear_load_balancing_loss()
"""

from gossamer.integrations.megablocks import layers, ops
from gossamer.integrations.megablocks.layers.arguments import Arguments, from_megatron
from gossamer.integrations.megablocks.layers.dmoe import ParallelDroplessMLP, dMoE
from gossamer.integrations.megablocks.layers.glu import GroupedGLU, SparseGLU
from gossamer.integrations.megablocks.layers.mlp import MLP, GroupedMLP, SparseMLP
from gossamer.integrations.megablocks.layers.moe import (
    MoE,
    ParallelMLP,
    batched_load_balancing_loss,
    clear_load_balancing_loss,
    get_load_balancing_loss,
    save_load_balancing_loss,
)
from gossamer.integrations.megablocks.layers.router import batched_router_zloss, clear_router_zloss

__all__ = [
    "MLP",
    "Arguments",
    "GroupedGLU",
    "GroupedMLP",
    "MoE",
    "ParallelDroplessMLP",
    "ParallelMLP",
    "SparseGLU",
    "SparseMLP",
    "batched_load_balancing_loss",
    "batched_router_zloss",
    "clear_load_balancing_loss",
    "clear_router_zloss",
    "dMoE",
    "from_megatron",
    "get_load_balancing_loss",
    "layers",
    "ops",
    "save_load_balancing_loss",
]
