"""MegaBlocks' dropless layer."""

from __future__ import annotations

from torch import nn

from gossamer.integrations.megablocks.layers import dmlp_registry
from gossamer.integrations.megablocks.layers.arguments import Arguments
from gossamer.integrations.megablocks.layers.moe import MoE, ParallelMLP
from gossamer.nn.moe.routing import Routing


class ParallelDroplessMLP(ParallelMLP):
    """The experts of a :class:`dMoE`, which drop nothing.

    Attributes:
        mlp: parameters of the experts, by block-sparse products or grouped ones as ``args.mlp_impl`` says.
        bias: ``(d,)``, initially zero, or None.
    """

    def _make_experts(self, args: Arguments) -> nn.Module:
        return dmlp_registry.get(args)

    def _limit(self, routing: Routing) -> Routing:
        return routing


class dMoE(MoE):
    """MegaBlocks' dropless mixture-of-experts layer: every slot is served, whatever the load.

    Args:
        args: options; ``mlp_impl="sparse"`` and ``"grouped"`` compute the same from the same parameters.

    Attributes:
        router: with ``router.layer.weight (E, d)``.
        experts: with ``experts.mlp.w1``, ``v1`` (``mlp_type="glu"``) and ``w2``, each ``(E·f, d)``, and
            ``experts.bias (d,)``.
        shared_expert: with ``up_proj``, ``gate_proj`` (``mlp_type="glu"``) and ``down_proj``, or None.

    Raises:
        ValueError: an option is not supported (the message names it), or, with ``mlp_impl="sparse"``, f is not a
            multiple of 16.
    """

    def _init_experts_mlp(self, args: Arguments) -> ParallelDroplessMLP:
        return ParallelDroplessMLP(args)
