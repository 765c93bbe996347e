"""Experts in a latent space that a group of them shares (MoLE)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from gossamer._activation import Activation
from gossamer._checks import check_flags, check_input
from gossamer._parameters import factory_of, new_parameter
from gossamer.nn.moe.experts.factored import FactoredExperts, sizes_and_options
from gossamer.nn.moe.experts.grouped import Experts, float_weights
from gossamer.nn.moe.experts.quantized_stack import expert_weight
from gossamer.nn.moe.experts.split import split_mlp
from gossamer.nn.moe.routing import Routing
from gossamer.ops.dispatch import Dispatch, dispatch
from gossamer.ops.expert_mlp import expert_mlp
from gossamer.ops.gather_reduce import gather_reduce
from gossamer.ops.grouped_matmul import grouped_matmul


@dataclass(frozen=True)
class TokenGroups:
    """The groups of experts that each token meets; a group counts once however many of its experts are chosen.

    Attributes:
        pairs: the (token, group) pairs sorted by group; J per token.
        experts: the experts of each pair; its tokens are the rows of ``pairs``.
        weights: ``(P, K)`` routing weights of a pair's experts.
    """

    pairs: Dispatch
    experts: Dispatch
    weights: torch.Tensor

    @staticmethod
    def of(routing: Routing, group_size: int) -> TokenGroups:
        """For groups of ``group_size`` neighbouring experts."""
        num_tokens, top_k = routing.expert_ids.shape
        num_experts, num_groups = routing.num_experts, routing.num_experts // group_size
        most, num_slots = min(top_k, num_groups), num_tokens * top_k
        ids = routing.expert_ids.long()
        absent = (ids < 0) | (ids >= num_experts)
        groups = torch.where(absent, num_groups, torch.div(ids, group_size, rounding_mode="floor"))
        groups, order = groups.sort(dim=1, stable=True)
        # The index of each slot's group among the distinct groups of its token; slots without an expert come last.
        place = F.pad(groups[:, 1:] != groups[:, :-1], (1, 0)).cumsum(1)
        of_pair = groups.new_full((num_tokens, top_k + 1), num_groups).scatter(1, place, groups)[:, :most]
        pairs = dispatch(of_pair, num_groups, max_rows=num_tokens * most)
        slots = order + torch.arange(0, num_slots, top_k, device=ids.device).unsqueeze(1)
        # A slot past the last one means "no group".
        mine = slots.new_full((num_tokens, top_k + 1, top_k), num_slots)
        mine = mine.scatter(1, place.unsqueeze(1), slots.unsqueeze(1))[:, :most].reshape(-1, top_k)
        mine = mine[pairs.row_slots.long()]
        experts = F.pad(ids.reshape(-1), (0, 1), value=num_experts)[mine]
        weights = F.pad(routing.weights.reshape(-1), (0, 1))[mine]
        return TokenGroups(pairs, dispatch(experts, num_experts, max_rows=routing.dispatch.buffer_rows), weights)


class LatentExperts(FactoredExperts):
    """Experts that work in a latent space; the experts of a group share the projection into it (MoLE).

    Expert e of group g computes ``W2_e·act(W1_e·z)`` with ``z = B_g·x``, where W1_e is ``(2I, L)`` instead of ``(2I,
    H)``. The projection runs once for each token and each of its groups, however many experts of the group the token
    has. With ``shared_output`` the outputs of experts are in the latent space too: W2_e is ``(L, I)``, and ``C_g (H,
    L)`` is applied once to the weighted sum of a group's experts. After Mixture of Latent Experts (Liu et al., 2025);
    one group over all experts with both projections is the latent layer of Nemotron-H models.

    With ``separate_latents`` the gate and the up half each have their own latent, as in the paper: ``W_gate = A_g·B_g``
    and ``W_up = A_u·B_u``. It is computed as one latent of 2L columns with zeros in the weights.

    Use it if H is much larger than L: an expert then has L/H of a plain one's parameters and FLOPs, and each group adds
    ``(1 or 2)·L·H``. With small groups, or few experts of a group per token, the projections cost as much as the
    experts save.

    Args:
        num_experts: E.
        hidden_size: H.
        intermediate_size: I.
        latent_size: L.
        group_size: κ, neighbouring experts that share projections; divides E. None for all of them.
        shared_output: whether experts' outputs are in the latent space, followed by a shared projection out of it.
        separate_latents: whether gate and up have separate latents; only with a gated activation.
        activation: a name of :class:`gossamer.Activation`, or one with its constants.
        bias: whether the experts' own products have biases.
        capacity_factor: see :func:`limit_capacity`, which drops slots beyond an expert's capacity; None drops nothing.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        in_proj: ``(E/κ, L, H)``, or ``(E/κ, 2L, H)`` with separate latents, the gate's rows first.
        gate_up_proj: ``(E, 2I, L)``; with an ungated activation ``up_proj (E, I, L)``; with separate latents
            ``gate_proj`` and ``up_proj``, ``(E, I, L)`` each.
        down_proj: ``(E, H, I)``, or ``(E, L, I)`` with a shared output.
        out_proj: ``(E/κ, H, L)`` or None.
        up_bias: ``(E, 2I)``, or ``(E, I)`` with an ungated activation; or None.
        down_bias: ``(E, H)`` or ``(E, L)``, or None.

    Raises:
        TypeError: a size is not an int, ``activation`` is neither a str nor an Activation, or ``capacity_factor`` is
            not a number.
        ValueError: a size is below 1, ``group_size`` does not divide E, the activation is unknown, separate latents of
            an ungated activation, or a ``capacity_factor`` that is not positive.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        latent_size: int,
        *,
        group_size: int | None = None,
        shared_output: bool = True,
        separate_latents: bool = False,
        activation: str | Activation = "swiglu",
        bias: bool = False,
        capacity_factor: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_flags(bias=bias, shared_output=shared_output, separate_latents=separate_latents)
        sizes = {"num_experts": num_experts, "hidden_size": hidden_size, "intermediate_size": intermediate_size}
        group_size = num_experts if group_size is None else group_size
        self._set_sizes(sizes | {"latent_size": latent_size, "group_size": group_size}, activation, capacity_factor)
        if num_experts % group_size:
            raise ValueError(
                f"group_size must divide num_experts, got group_size={group_size}, num_experts={num_experts}"
            )
        self.one_group = group_size == num_experts
        if separate_latents and not self.activation.gated:
            raise ValueError(f"separate_latents needs a gated activation, got {self.activation.name!r}")
        self.separate_latents = separate_latents
        groups, halves = num_experts // group_size, self.activation.halves

        factory = factory_of(device, dtype)
        self.in_proj = new_parameter(groups, (1 + separate_latents) * latent_size, hidden_size, **factory)
        if separate_latents:
            self._up_names: tuple[str, ...] = ("gate_proj", "up_proj")
        else:
            self._up_names = ("gate_up_proj",) if self.activation.gated else ("up_proj",)
        for name in self._up_names:
            rows = halves * intermediate_size // len(self._up_names)
            self.register_parameter(name, new_parameter(num_experts, rows, latent_size, **factory))
        width = latent_size if shared_output else hidden_size
        self.down_proj = new_parameter(num_experts, width, intermediate_size, **factory)
        out_proj = new_parameter(groups, hidden_size, latent_size, **factory) if shared_output else None
        self.register_parameter("out_proj", out_proj)
        self._add_biases(bias, self.down_proj)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Redraw all parameters, each matrix as ``nn.Linear`` does: uniform in ±1/√(inputs)."""
        inputs = {
            "in_proj": self.hidden_size,
            **dict.fromkeys((*self._up_names, "up_bias", "out_proj"), self.latent_size),
            **dict.fromkeys(("down_proj", "down_bias"), self.intermediate_size),
        }
        for name, parameter in self.named_parameters(recurse=False):
            nn.init.uniform_(parameter, -(inputs[name] ** -0.5), inputs[name] ** -0.5)

    @property
    def weight_stacks(self) -> tuple[str, ...]:
        last = () if self.out_proj is None else ("out_proj",)
        return ("in_proj", *self._up_names, "down_proj", *last)

    def stacks(self) -> dict[str, torch.Tensor]:
        """All tensors, where projections have one part per group; without the projections if one group holds all
        experts.
        """
        held = self._held()
        if not self.one_group:
            return held
        return {name: tensor for name, tensor in held.items() if name.split(".")[0] not in ("in_proj", "out_proj")}

    def over(self, stacks: Mapping[str, torch.Tensor], num_experts: int) -> LatentExperts:
        view = super().over(stacks, num_experts)
        if self.one_group:
            view.group_size = num_experts
        return view

    @property
    def _latents_enter(self) -> bool:
        """Whether each token has a single latent, whatever its experts."""
        return self.one_group and isinstance(self.in_proj, torch.Tensor)

    def compute(self, tokens: torch.Tensor, routing: Routing) -> torch.Tensor:
        return self.leave(self.between(self.enter(tokens), routing))

    def enter(self, tokens: torch.Tensor) -> torch.Tensor:
        if not self._latents_enter:
            return tokens
        check_input(tokens, self.hidden_size, self.in_proj)
        return F.linear(tokens, self.in_proj[0])

    def leave(self, rows: torch.Tensor) -> torch.Tensor:
        return F.linear(rows, self.out_proj[0]) if self._latents_enter and self.out_proj is not None else rows

    def between(self, rows: torch.Tensor, routing: Routing) -> torch.Tensor:
        if self._latents_enter:
            return self._experts(rows, routing.dispatch, routing.weights)
        groups = TokenGroups.of(routing, self.group_size)
        pairs = groups.pairs
        z = grouped_matmul(rows, expert_weight(self.in_proj, False), pairs, y_grouped=True)
        y = self._experts(z, groups.experts, groups.weights)
        if self.out_proj is not None:
            y = grouped_matmul(y, expert_weight(self.out_proj, False), pairs, x_grouped=True, y_grouped=True)
        return gather_reduce(y, pairs.rows.view(pairs.num_tokens, pairs.top_k), bounds="drop")

    def _experts(self, z: torch.Tensor, plan: Dispatch, weights: torch.Tensor) -> torch.Tensor:
        """The experts' weighted sum for the rows of ``z``."""
        ups = tuple(expert_weight(getattr(self, name), False) for name in self._up_names)
        down = expert_weight(self.down_proj, False)
        if len(ups) == 2:
            if not all(isinstance(stack, torch.Tensor) for stack in (*ups, down)):
                biases = {"up_bias": self.up_bias, "down_bias": self.down_bias}
                return split_mlp(z, ups, down, plan, weights, activation=self.activation, **biases)
            # One product with zeros next to each half takes less time and memory than two products whose results are
            # joined.
            gate, up = ups
            ups = (torch.cat([F.pad(gate, (0, self.latent_size)), F.pad(up, (self.latent_size, 0))], 1),)
        biases = {"gate_up_bias": self.up_bias, "down_bias": self.down_bias}
        return expert_mlp(z, ups[0], down, plan, weights, activation=self.activation, **biases)

    @classmethod
    def from_experts(
        cls,
        experts: Experts,
        latent_size: int,
        *,
        group_size: int | None = None,
        shared_output: bool = True,
        separate_latents: bool = False,
    ) -> LatentExperts:
        """The layer of that size nearest to trained experts: per group the smallest squared error of the weights.

        A group's input matrices, stacked into ``(κ·2I, H)`` (gate and up separately with separate latents), have the
        singular value decomposition ``U·S·Vᵀ``; B is the first L rows of Vᵀ, and the experts' own factors are the
        blocks of the first L columns of ``U·S``. For a shared output, C is the left singular vectors of the matrices
        side by side, ``(H, κ·I)``. By the Eckart–Young theorem no other factors have a smaller ``Σ_e ‖W_e − A_e·B‖²``;
        they are exact where the stacked matrix has rank L or less. The decomposition is in float32 (float64 of
        float64).

        Args:
            experts: whose weights to approximate; they are not changed.
            latent_size: L, at most H and at most the rows of the stacked matrices.
            group_size: as in the class, like the remaining arguments.
            shared_output: as in the class.
            separate_latents: as in the class.

        Returns:
            A layer of the dtype and on the device of ``experts``, with its activation, biases and capacity factor.

        Raises:
            TypeError: ``experts`` is not a plain :class:`Experts`.
            ValueError: its weights are quantised, the latent is larger than the matrix it approximates,
                ``shared_output`` with experts that have down biases, or as in the class.
        """
        up, down, up_bias, down_bias = float_weights(experts)
        if shared_output and down_bias is not None:
            raise ValueError("shared_output must be False for experts with biases, whose outputs have no latent")
        sizes, options = sizes_and_options(experts, up)
        options |= {"group_size": group_size, "shared_output": shared_output, "separate_latents": separate_latents}
        layer = cls(*sizes, latent_size, **options)
        groups, kappa = layer.in_proj.shape[0], layer.group_size
        least = min(experts.hidden_size, kappa * up.shape[1] // len(layer._up_names))
        if shared_output:
            least = min(least, kappa * experts.intermediate_size)
        if latent_size > least:
            raise ValueError(f"latent_size must be at most {least} for groups of {kappa} experts, got {latent_size}")
        with torch.no_grad():
            projections = []
            for name, part in zip(layer._up_names, up.chunk(len(layer._up_names), 1), strict=True):
                left, right = _factors(part.reshape(groups, kappa * part.shape[1], -1), latent_size)
                getattr(layer, name).copy_(left.reshape(layer.num_experts, part.shape[1], latent_size))
                projections.append(right)
            layer.in_proj.copy_(torch.cat(projections, 1))
            if shared_output:
                side_by_side = down.unflatten(0, (groups, kappa)).transpose(1, 2).flatten(2)
                right, left = _factors(side_by_side.mT, latent_size)
                layer.out_proj.copy_(left.mT)
                layer.down_proj.copy_(right.unflatten(1, (kappa, -1)).flatten(0, 1).mT)
            else:
                layer.down_proj.copy_(down)
            layer._copy_biases(up_bias, down_bias)
        return layer

    @torch.no_grad()
    def to_experts(self) -> Experts:
        """Plain experts that compute the same, with the factors multiplied out: ``W1_e = A_e·B_g`` and ``W2_e =
        C_g·D_e``.

        Raises:
            ValueError: the weights are quantised.
        """
        if not all(isinstance(getattr(self, name), torch.Tensor) for name in self.weight_stacks):
            raise ValueError("to_experts needs float weights, got quantised ones")
        parts = self.in_proj.chunk(len(self._up_names), 1)
        ups = [
            getattr(self, name) @ part.repeat_interleave(self.group_size, 0)
            for name, part in zip(self._up_names, parts, strict=True)
        ]
        out, bias = self.down_proj, self.down_bias
        if self.out_proj is not None:
            last = self.out_proj.repeat_interleave(self.group_size, 0)
            out, bias = last @ out, None if bias is None else (last @ bias.unsqueeze(2)).squeeze(2)
        return self._plain(torch.cat(ups, 1), out, bias)

    def extra_repr(self) -> str:
        """Sizes and options."""
        return (
            f"num_experts={self.num_experts}, hidden_size={self.hidden_size}, "
            f"intermediate_size={self.intermediate_size}, latent_size={self.latent_size}, "
            f"group_size={self.group_size}, shared_output={self.out_proj is not None}, "
            f"separate_latents={self.separate_latents}, activation={self.activation.name!r}"
        )


def _factors(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``U·S`` and ``Vᵀ`` of the largest ``rank`` singular values of each matrix ``(G, M, N)``."""
    wide = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    u, s, vh = torch.linalg.svd(wide, full_matrices=False)
    return u[..., :rank] * s[:, None, :rank], vh[:, :rank]
