"""MegaBlocks' layer with a capacity, the base of all its layers, and their balance loss."""

from __future__ import annotations

import torch
from torch import nn

from gossamer._checks import check_floating, check_shape
from gossamer.integrations.megablocks.layers import _records, sharedexpert_registry
from gossamer.integrations.megablocks.layers.arguments import Arguments, check_arguments
from gossamer.integrations.megablocks.layers.mlp import MLP
from gossamer.integrations.megablocks.layers.router import LearnedRouter
from gossamer.nn.moe.capacity import expert_capacity, limit_capacity
from gossamer.nn.moe.routing import Routing

# Records saved by callers, which belong to no layer; only clear_load_balancing_loss removes them.
_saved: list[tuple[torch.Tensor, torch.Tensor]] = []


class ParallelMLP(_records.Recording):
    """The experts of a :class:`MoE`, each serving no more slots than its capacity.

    Args:
        args: options.

    Attributes:
        mlp: parameters of the experts.
        bias: ``(d,)``, initially zero, or None.
    """

    def __init__(self, args: Arguments) -> None:
        super().__init__()
        check_arguments(args)
        self.args = args
        self.num_experts, self.top_k = args.moe_num_experts, args.moe_top_k
        self.mlp = self._make_experts(args)
        bias = nn.Parameter(torch.zeros(args.hidden_size, device=args.device, dtype=args.dtype))
        self.register_parameter("bias", bias if args.bias else None)

    def _make_experts(self, args: Arguments) -> nn.Module:
        if args.mlp_type != "mlp":
            raise ValueError(f"mlp_type must be 'mlp' for MoE, whose experts have no gate, got {args.mlp_type!r}")
        return MLP(args)

    def expert_capacity(self, tokens: int) -> int:
        """Number of slots that an expert serves for ``tokens``; 0 means no limit."""
        return expert_capacity(tokens, self.top_k, self.num_experts, self.args.moe_capacity_factor)

    def _limit(self, routing: Routing) -> Routing:
        factor = self.args.moe_capacity_factor
        return limit_capacity(routing, factor) if factor else routing

    def forward_once(
        self, x: torch.Tensor, expert_weights: torch.Tensor, top_experts: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The part of :meth:`forward` before the bias, which subclasses may override.

        Args:
            x: ``(..., d)``.
            expert_weights: ``(T, k)``, or flat.
            top_experts: ``(T, k)``, or flat.

        Returns:
            ``(T, d)``, and the slots ``(E,)`` that each expert was given, before any is dropped.
        """
        tokens = x.reshape(-1, self.args.hidden_size)
        weights, experts = (t.reshape(-1, self.top_k) for t in (expert_weights, top_experts))
        routing = Routing(experts, weights, self.num_experts).dispatched()
        return self.mlp(tokens, self._limit(routing).dispatch, weights), routing.counts

    def forward(
        self, x: torch.Tensor, scores: torch.Tensor, expert_weights: torch.Tensor, top_experts: torch.Tensor
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """The experts' outputs, weighted and summed.

        Args:
            x: ``(..., d)``; T is the product of the leading sizes.
            scores: ``(T, E)``, the router's, for the balance loss.
            expert_weights: ``(T, k)``.
            top_experts: ``(T, k)``.

        Returns:
            The shape of ``x``; with ``args.bias`` and ``args.return_bias`` the pair of it and the bias.
        """
        check_shape("x", x, (*x.shape[:-1], self.args.hidden_size), "(..., d)")
        y, tokens_per_expert = self.forward_once(x, expert_weights, top_experts)
        if self.training and self.args.moe_loss_weight > 0:
            self._record = (tokens_per_expert, scores)
        y = y.view(x.shape)
        if self.bias is None:
            return y
        return (y, self.bias) if self.args.return_bias else y + self.bias


class MoE(nn.Module):
    """MegaBlocks' mixture-of-experts layer with a capacity: slots past an expert's capacity are dropped.

    A token whose slots are all dropped gets zeros, or the bias. Slots are served in token order.

    >>> layer = MoE(Arguments(hidden_size=512, ffn_hidden_size=1024, moe_num_experts=8, moe_top_k=2))
    >>> y, bias = layer(x)

    Args:
        args: options.

    Attributes:
        router: with ``router.layer.weight (E, d)``.
        experts: with ``experts.mlp.w1 (E, d, f)``, ``experts.mlp.w2 (E, f, d)`` and ``experts.bias (d,)``.
        shared_expert: with ``up_proj`` and ``down_proj``, or None.

    Raises:
        ValueError: an option is not supported; the message names it.
    """

    def __init__(self, args: Arguments) -> None:
        super().__init__()
        check_arguments(args)
        self.router = LearnedRouter(args)
        self.experts = self._init_experts_mlp(args)
        self.shared_expert = None
        if args.shared_expert:
            self.shared_expert = sharedexpert_registry.get(args)

    def _init_experts_mlp(self, args: Arguments) -> ParallelMLP:
        return ParallelMLP(args)

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """The layer's output for ``x (..., d)``; with ``bias`` and ``return_bias`` the pair of it and the bias."""
        check_floating("x", x)
        x = _records.cast_if_autocast_enabled(x)
        scores, weights, indices = self.router(x)
        out = self.experts(x, scores, weights, indices)
        if self.shared_expert is None:
            return out
        y, *bias = out if isinstance(out, tuple) else (out,)
        y = self.shared_expert.add_experts_sharedexpert(self.shared_expert(x), y)
        return (y, *bias) if bias else y


def save_load_balancing_loss(loss: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Record ``(tokens_per_expert (E,), scores (T, E))`` of your own layer, until the next clear.

    Gossamer's layers record theirs automatically. A record that is never cleared stays in memory, with its graph.
    """
    _saved.append(loss)


def get_load_balancing_loss(model: nn.Module | None = None) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The records of the last calls in training: ``(tokens_per_expert (E,), scores (T, E))`` of each layer.

    Layers come in the order in which they were created, each with its last call since the last clear, followed by the
    records of :func:`save_load_balancing_loss`.

    Args:
        model: the layers inside it; None for all in the process, as in MegaBlocks.
    """
    return _records.records(ParallelMLP, model) + (list(_saved) if model is None else [])


def clear_load_balancing_loss(model: nn.Module | None = None) -> None:
    """Remove the records of the layers inside ``model``, or of all layers, with their graphs. Call it after every
    step.
    """
    _records.clear(ParallelMLP, model)
    if model is None:
        _saved.clear()


def batched_load_balancing_loss(args: Arguments, model: nn.Module | None = None) -> torch.Tensor | float:
    """The balance loss of all layers: ``λ·E/(L·T·k)·Σ_layers Σ_e c_e·mean_t p_te``, which is λ at perfect balance.

    ``c_e`` counts the slots given to expert e before any is dropped, p is the router's softmax. The counts have no
    gradient.

    Args:
        args: with ``moe_loss_weight`` λ, ``num_layers`` L, ``moe_num_experts`` E and ``moe_top_k`` k.
        model: the layers inside it; None for all in the process.

    Raises:
        ValueError: the number of layers called in training since the last clear differs from ``args``, or their sizes
            differ.
    """
    if args.moe_loss_weight == 0:
        return 0.0
    notes = get_load_balancing_loss(model)
    if len(notes) != args.layers_recorded:
        raise ValueError(
            f"batched_load_balancing_loss needs the records of {args.layers_recorded} layers (num_layers="
            f"{args.num_layers}, pipeline_model_parallel_size={args.pipeline_model_parallel_size}, "
            f"num_layers_per_virtual_pipeline_stage={args.num_layers_per_virtual_pipeline_stage}), got {len(notes)}: "
            "layers record theirs in training, and clear_load_balancing_loss removes them"
        )
    tokens = notes[0][1].shape[0]
    total = 0.0
    for counts, scores in notes:
        check_shape("tokens_per_expert", counts, (args.moe_num_experts,), "(E,)")
        check_shape("scores", scores, (tokens, args.moe_num_experts), "(T, E)")
        scores = scores.float() if args.moe_lbl_in_fp32 else scores
        total = total + torch.dot(counts.to(scores.dtype), scores.sum(dim=0) / max(tokens, 1))
    return args.moe_num_experts * args.moe_loss_weight / (args.num_layers * max(tokens, 1) * args.moe_top_k) * total
