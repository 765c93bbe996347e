"""MegaBlocks' gated experts: ``act(x·w1)·(x·v1)``."""

from __future__ import annotations

import torch

from gossamer.integrations.megablocks.layers.arguments import Arguments
from gossamer.integrations.megablocks.layers.mlp import GroupedMLP, SharedMLP, SparseMLP, _parameter
from gossamer.nn.moe.experts.block_sparse import PaddedExperts
from gossamer.ops.block_sparse import sdd
from gossamer.ops.dispatch import Dispatch
from gossamer.ops.gather_reduce import combine_slots
from gossamer.ops.grouped_matmul import grouped_matmul


def _add_gate(layer: GroupedMLP, args: Arguments) -> None:
    layer.v1 = _parameter(args, *layer.w1.shape)
    args.init_method(layer.v1)


class GroupedGLU(GroupedMLP):
    """Gated experts as dMoE stores them, by grouped products.

    Attributes:
        w1: ``(E·f, d)``.
        v1: ``(E·f, d)``.
        w2: ``(E·f, d)``.
    """

    def __init__(self, args: Arguments) -> None:
        super().__init__(args)
        _add_gate(self, args)

    def forward(
        self, x: torch.Tensor, dispatch: Dispatch | torch.Tensor, weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``y[t] = Σ_k weights[t,k]·(act(x[t]·w1ᵀ)·(x[t]·v1ᵀ))·w2``.

        With ``tokens_per_expert (E,)`` in place of ``dispatch``: as for :class:`GroupedMLP`.
        """
        if isinstance(dispatch, torch.Tensor):
            return super().forward(x, dispatch)
        return combine_slots(self._rows(x, dispatch, x_grouped=False), dispatch, weights)

    def sorted_rows(self, x: torch.Tensor, dispatch: Dispatch) -> torch.Tensor:
        """As for :class:`GroupedMLP`."""
        return self._rows(x, dispatch, x_grouped=True)

    def _rows(self, x: torch.Tensor, dispatch: Dispatch, x_grouped: bool) -> torch.Tensor:
        # Two products: one of both matrices side by side would copy them in every call.
        gate, up = (
            grouped_matmul(x, self.stacked(w), dispatch, x_grouped=x_grouped, y_grouped=True)
            for w in (self.w1, self.v1)
        )
        down = self.stacked(self.w2).transpose(1, 2)
        return grouped_matmul(self.args.activation_fn(gate) * up, down, dispatch, x_grouped=True, y_grouped=True)


class SparseGLU(SparseMLP):
    """The same by block-sparse products.

    Attributes:
        w1: ``(E·f, d)``.
        v1: ``(E·f, d)``.
        w2: ``(E·f, d)``.
    """

    def __init__(self, args: Arguments) -> None:
        super().__init__(args)
        _add_gate(self, args)

    def hidden(self, padded: PaddedExperts, x: torch.Tensor) -> torch.Tensor:
        """Values of the gated activation for the padded rows ``x``."""
        return super().hidden(padded, x) * sdd(x, self.v1.t(), padded.topology).values


class SharedGLU(SharedMLP):
    """The gated dense network that every token meets.

    Attributes:
        up_proj: as in :class:`SharedMLP`.
        gate_proj: like it.
        down_proj: back.
    """

    def __init__(self, args: Arguments) -> None:
        super().__init__(args)
        self.gate_proj = args.fc_cls(args.hidden_size, args.shared_expert_hidden_size, **self.fc_kwargs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``down_proj(act(gate_proj(x))·up_proj(x))``."""
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))
