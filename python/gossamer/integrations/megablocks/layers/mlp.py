"""MegaBlocks' experts without a gate, and its shared expert, with MegaBlocks' parameter names and layouts."""

from __future__ import annotations

import torch
from torch import nn

from gossamer._checks import check_index, check_same_device, check_shape
from gossamer.integrations._activations import activation_name
from gossamer.integrations.megablocks.layers.arguments import Arguments
from gossamer.nn.moe.experts.block_sparse import PaddedExperts, best_block
from gossamer.ops.block_sparse import dsd, sdd
from gossamer.ops.dispatch import Dispatch
from gossamer.ops.dispatch import dispatch as sort_by_expert
from gossamer.ops.expert_mlp import expert_mlp
from gossamer.ops.gather_reduce import combine_slots
from gossamer.ops.grouped_matmul import grouped_matmul


def _parameter(args: Arguments, *shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, device=args.device, dtype=args.dtype))


def _sorted_dispatch(x: torch.Tensor, tokens_per_expert: torch.Tensor, args: Arguments) -> Dispatch:
    """The dispatch of rows that are already sorted by expert."""
    check_index("tokens_per_expert", tokens_per_expert)
    check_shape("tokens_per_expert", tokens_per_expert, (args.moe_num_experts,), "(E,)")
    check_shape("x", x, (None, args.hidden_size), "(R, d)")
    check_same_device(x=x, tokens_per_expert=tokens_per_expert)
    # Rows after the last expert's rows belong to no expert.
    ends = tokens_per_expert.cumsum(0)
    ids = torch.searchsorted(ends, torch.arange(x.shape[0], device=x.device), right=True)
    return sort_by_expert(ids.unsqueeze(1), args.moe_num_experts)


class MLP(nn.Module):
    """Experts with an up and a down matrix, as :class:`~gossamer.integrations.megablocks.layers.moe.MoE` stores them.

    Args:
        args: options.

    Attributes:
        w1: ``(E, d, f)``.
        w2: ``(E, f, d)``.
    """

    def __init__(self, args: Arguments) -> None:
        super().__init__()
        self.args = args
        e, d, f = args.moe_num_experts, args.hidden_size, args.ffn_hidden_size
        self.w1, self.w2 = _parameter(args, e, d, f), _parameter(args, e, f, d)
        args.init_method(self.w1)
        args.output_layer_init_method(self.w2)

    def matrices(self) -> tuple[torch.Tensor, torch.Tensor]:
        """``(E, f, d)`` and ``(E, d, f)``: both in the layout of :func:`gossamer.expert_mlp`, without a copy."""
        return self.w1.transpose(1, 2), self.w2.transpose(1, 2)

    def forward(
        self, x: torch.Tensor, dispatch: Dispatch | None = None, weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``y[t] = Σ_k weights[t,k]·act(x[t]·w1)·w2`` for ``x (T, d)`` and ``weights (T, k)``.

        Without ``dispatch``, as MegaBlocks calls it: ``x (E, C, d)`` has C rows of each expert, and so has the result.
        """
        if dispatch is None:
            check_shape("x", x, (self.args.moe_num_experts, None, self.args.hidden_size), "(E, C, d)")
            return torch.bmm(self.args.activation_fn(torch.bmm(x, self.w1)), self.w2)
        up, down = self.matrices()
        name = activation_name(self.args.activation_fn)
        if name is not None:
            return expert_mlp(x, up, down, dispatch, weights, activation=name)
        hidden = self.args.activation_fn(grouped_matmul(x, up, dispatch, y_grouped=True))
        rows = grouped_matmul(hidden, down, dispatch, x_grouped=True, y_grouped=True)
        return combine_slots(rows, dispatch, weights)


class GroupedMLP(MLP):
    """Experts with an up and a down matrix, as dMoE stores them, computed by grouped products.

    Attributes:
        w1: ``(E·f, d)``.
        w2: ``(E·f, d)``.
    """

    def __init__(self, args: Arguments) -> None:
        nn.Module.__init__(self)
        self.args = args
        rows = args.moe_num_experts * args.ffn_hidden_size
        self.w1, self.w2 = _parameter(args, rows, args.hidden_size), _parameter(args, rows, args.hidden_size)
        args.init_method(self.w1)
        args.output_layer_init_method(self.w2)

    def stacked(self, weight: torch.Tensor) -> torch.Tensor:
        """``(E·f, d)`` as ``(E, f, d)``."""
        return weight.view(self.args.moe_num_experts, self.args.ffn_hidden_size, self.args.hidden_size)

    def matrices(self) -> tuple[torch.Tensor, torch.Tensor]:
        """As for :class:`MLP`."""
        return self.stacked(self.w1), self.stacked(self.w2).transpose(1, 2)

    def forward(
        self, x: torch.Tensor, dispatch: Dispatch | torch.Tensor, weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As for :class:`MLP` with a dispatch.

        With ``tokens_per_expert (E,)`` in its place, as MegaBlocks calls it: the rows of ``x (R, d)`` are sorted by
        expert, and so are the result's.

        Raises:
            TypeError: ``tokens_per_expert`` is of another dtype than int32 and int64.
            ValueError: shapes or devices do not fit.
        """
        if isinstance(dispatch, torch.Tensor):
            return self.sorted_rows(x, _sorted_dispatch(x, dispatch, self.args))
        return super().forward(x, dispatch, weights)

    def sorted_rows(self, x: torch.Tensor, dispatch: Dispatch) -> torch.Tensor:
        """The experts' outputs for rows that are sorted by expert."""
        up, down = self.matrices()
        hidden = self.args.activation_fn(grouped_matmul(x, up, dispatch, x_grouped=True, y_grouped=True))
        return grouped_matmul(hidden, down, dispatch, x_grouped=True, y_grouped=True)


class SparseMLP(GroupedMLP):
    """The same by block-sparse products: the hidden activation is one matrix ``(padded rows, E·f)``, mostly absent."""

    def __init__(self, args: Arguments) -> None:
        best_block("ffn_hidden_size", args.ffn_hidden_size)
        super().__init__(args)

    def hidden(self, padded: PaddedExperts, x: torch.Tensor) -> torch.Tensor:
        """Values of the activation for the padded rows ``x``."""
        name = activation_name(self.args.activation_fn)
        values = sdd(x, self.w1.t(), padded.topology, activation=name).values
        return values if name is not None else self.args.activation_fn(values)

    def forward(self, x: torch.Tensor, dispatch: Dispatch, weights: torch.Tensor) -> torch.Tensor:
        """As for :class:`MLP` with a dispatch."""
        padded = PaddedExperts.of(dispatch, self.args.ffn_hidden_size)
        hidden = padded.matrix(self.hidden(padded, padded.spread(x)))
        return padded.collect(dsd(hidden, self.w2), weights)


class SharedMLP(nn.Module):
    """The dense network that every token uses.

    Args:
        args: options.

    Attributes:
        up_proj: of the class ``args.fc_cls``, from d to ``args.shared_expert_hidden_size``.
        down_proj: back.
    """

    def __init__(self, args: Arguments) -> None:
        super().__init__()
        self.args = args
        self.fc_kwargs = {"bias": args.bias, "device": args.device} | args.fc_kwargs
        self.up_proj = args.fc_cls(args.hidden_size, args.shared_expert_hidden_size, **self.fc_kwargs)
        self.act = args.activation_fn
        self.down_proj = args.fc_cls(args.shared_expert_hidden_size, args.hidden_size, **self.fc_kwargs)

    def add_experts_sharedexpert(self, shared_expert_out: torch.Tensor, expert_out: torch.Tensor) -> torch.Tensor:
        """Their sum; or, with ``shared_expert_weighted_sum``, the mean over k + 1 experts."""
        if not self.args.shared_expert_weighted_sum:
            return shared_expert_out + expert_out
        experts = self.args.moe_top_k + 1
        return shared_expert_out / experts + expert_out * (self.args.moe_top_k / experts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``down_proj(act(up_proj(x)))``."""
        return self.down_proj(self.act(self.up_proj(x)))
