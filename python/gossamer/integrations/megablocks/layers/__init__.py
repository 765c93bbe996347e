"""MegaBlocks' layers by module."""

from gossamer.integrations.megablocks.layers import (
    arguments,
    dmlp_registry,
    dmoe,
    glu,
    mlp,
    moe,
    router,
    sharedexpert_registry,
)
from gossamer.integrations.megablocks.layers.dmoe import dMoE
from gossamer.integrations.megablocks.layers.moe import MoE

__all__ = [
    "MoE",
    "arguments",
    "dMoE",
    "dmlp_registry",
    "dmoe",
    "glu",
    "mlp",
    "moe",
    "router",
    "sharedexpert_registry",
]
