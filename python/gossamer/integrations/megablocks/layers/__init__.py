"""MegaBlocks' layers by module."""

from gossamer.integrations.megablocks.layers import arguments, dmoe, glu, mlp, moe, router

__all__ = ["arguments", "dmoe", "glu", "mlp", "moe", "router"]
