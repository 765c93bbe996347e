"""Experts whose input matrices are mixtures of a few basis matrices (MoBE)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from gossamer import _backend
from gossamer._activation import Activation
from gossamer._checks import check_flag, check_number, check_positive
from gossamer._parameters import factory_of, new_parameter
from gossamer.nn.moe.experts.factored import FactoredExperts, sizes_and_options
from gossamer.nn.moe.experts.grouped import Experts, float_weights
from gossamer.nn.moe.experts.split import split_mlp
from gossamer.nn.moe.routing import Routing
from gossamer.ops.dispatch import Dispatch
from gossamer.ops.expert_mlp import expert_mlp
from gossamer.ops.grouped_matmul import grouped_matmul

NONLINEARITIES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": nn.functional.silu,
    "tanh": torch.tanh,
    "identity": lambda matrix: matrix,
}


class BasisExperts(FactoredExperts):
    """Experts whose gate and up matrices are ``W_e = A_e·ψ(Σ_j α_ej·B_j)`` over M basis matrices (MoBE).

    ``α_e = softmax(mix_e)`` over the bases, ``A_e (I, R)`` is the expert's own, and the bases ``B_j (R, H)`` are the
    layer's; ψ acts on each element of the mixed matrix. Gate and up have separate bases. The down matrices are plain.
    After Mixture of Basis Experts (Chen et al., 2025).

    With R = I, as in the paper, a matrix has ``I·R + M·R·H/E + M`` parameters instead of the ``I·H`` of a plain one:
    fewer if ``I/H + M/E < 1``. Use the layer to save parameters; it saves no FLOPs. Each call computes the matrices of
    the experts that have tokens. A matrix costs ``2·M·R·H`` FLOPs, and as many bytes as a plain expert's until the call
    ends (or the step, if gradients are needed). If most experts have tokens in every call and memory allows it, call
    :meth:`expand` once.

    Args:
        num_experts: E.
        hidden_size: H.
        intermediate_size: I.
        num_bases: M.
        rank: R, rows of a basis; I if None.
        nonlinearity: ψ: ``"silu"``, ``"tanh"`` or ``"identity"``.
        activation: activation of the experts; a name of :class:`gossamer.Activation`, or one with its constants.
        bias: whether the experts' products have biases.
        capacity_factor: see :func:`limit_capacity`, which drops slots beyond an expert's capacity; None drops nothing.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        bases: ``(2, M, R, H)``, the gate's first; with an ungated activation ``(1, M, R, H)``.
        mix: ``(E, 2, M)`` logits of α.
        factor: A, ``(E, 2, I, R)``.
        down_proj: ``(E, H, I)``.
        up_bias: ``(E, 2I)`` or None.
        down_bias: ``(E, H)`` or None.

    Raises:
        TypeError: a size is not an int, ``activation`` is neither a str nor an Activation, or ``capacity_factor`` is
            not a number.
        ValueError: a size is below 1, ``nonlinearity`` or activation is unknown, or a ``capacity_factor`` that is not
            positive.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        num_bases: int,
        *,
        rank: int | None = None,
        nonlinearity: str = "silu",
        activation: str | Activation = "swiglu",
        bias: bool = False,
        capacity_factor: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {"num_experts": num_experts, "hidden_size": hidden_size, "intermediate_size": intermediate_size}
        rank = intermediate_size if rank is None else rank
        self._set_sizes(sizes | {"num_bases": num_bases, "rank": rank}, activation, capacity_factor)
        check_flag("bias", bias)
        if not isinstance(nonlinearity, str) or nonlinearity not in NONLINEARITIES:
            raise ValueError(f"nonlinearity must be one of {tuple(NONLINEARITIES)}, got {nonlinearity!r}")
        self.nonlinearity = nonlinearity
        halves = self.activation.halves

        factory = factory_of(device, dtype)
        self.bases = new_parameter(halves, num_bases, rank, hidden_size, **factory)
        self.mix = new_parameter(num_experts, halves, num_bases, **factory)
        self.factor = new_parameter(num_experts, halves, intermediate_size, rank, **factory)
        self.down_proj = new_parameter(num_experts, hidden_size, intermediate_size, **factory)
        self._add_biases(bias, self.down_proj)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Redraw all parameters, so that the matrices have the size that ``nn.Linear`` gives its own.

        Each expert starts near one basis: its logits give that basis a weight of a half.
        """
        for name, inputs in (
            ("bases", self.hidden_size),
            ("up_bias", self.hidden_size),
            ("down_proj", self.intermediate_size),
            ("down_bias", self.intermediate_size),
        ):
            if (parameter := getattr(self, name)) is not None:
                nn.init.uniform_(parameter, -(inputs**-0.5), inputs**-0.5)
        nn.init.normal_(self.mix, std=0.1)
        chosen = torch.arange(self.num_experts, device=self.mix.device) * self.num_bases // self.num_experts
        self.mix.scatter_add_(
            2,
            chosen.view(-1, 1, 1).expand(-1, self.mix.shape[1], 1),
            self.mix.new_full((self.num_experts, self.mix.shape[1], 1), math.log(max(self.num_bases - 1, 1))),
        )
        # With a random factor of variance v, the product has R·v times the variance of ψ(mixture), which is measured
        # here.
        for half in range(self.factor.shape[1]):
            sample = NONLINEARITIES[self.nonlinearity](self._mixtures(self.mix[:1, half : half + 1], half))
            wanted = (3 * self.hidden_size) ** -0.5
            size = wanted / (self.rank * sample.float().square().mean().clamp(min=1e-12)).sqrt()
            self.factor[:, half].normal_().mul_(size.to(self.factor.dtype))

    def _mixtures(self, mix: torch.Tensor, half: int) -> torch.Tensor:
        """``Σ_j α_ej·B_j (E', R, H)`` of one half, for logits ``(E', 1, M)``."""
        wide = torch.promote_types(mix.dtype, torch.float32)
        alpha = mix.squeeze(1).to(wide).softmax(-1).to(mix.dtype)
        return (alpha @ self.bases[half].flatten(1)).unflatten(1, self.bases.shape[2:])

    def _mixed(self, experts: torch.Tensor | None) -> list[torch.Tensor]:
        """``ψ(Σ_j α_ej·B_j) (E', R, H)`` of each half, for all experts or the given ones."""
        mix = self.mix if experts is None else self.mix[experts]
        psi = NONLINEARITIES[self.nonlinearity]
        return [psi(self._mixtures(mix[:, half : half + 1], half)) for half in range(mix.shape[1])]

    def up_weight(self, experts: torch.Tensor | None = None) -> torch.Tensor:
        """The gate and up matrices ``(E', 2I, H)`` of all experts, or of those with the given ids."""
        factor = self.factor if experts is None else self.factor[experts]
        return torch.cat([factor[:, half] @ mixed for half, mixed in enumerate(self._mixed(experts))], 1)

    def stacks(self) -> dict[str, torch.Tensor]:
        """All tensors except the bases, which all experts share."""
        return {name: parameter for name, parameter in self.named_parameters() if name != "bases"}

    def compute(self, tokens: torch.Tensor, routing: Routing) -> torch.Tensor:
        plan, experts = _busy(routing.dispatch)
        down, up_bias, down_bias = (
            held if held is None or experts is None else held[experts]
            for held in (self.down_proj, self.up_bias, self.down_bias)
        )
        count = self.num_experts if experts is None else experts.numel()
        # Both ways cost 2·R·H FLOPs per row and half. One of them costs another 2·I·R per row, the other 2·I·R·H per
        # expert.
        few = plan.buffer_rows * (self.rank + self.intermediate_size * self.rank / self.hidden_size) < (
            plan.buffer_rows * self.intermediate_size + count * self.intermediate_size * self.rank
        )
        if few and not self._trains(tokens, routing):
            inner = grouped_matmul(tokens, torch.cat(self._mixed(experts), 1), plan, y_grouped=True)
            factor = self.factor if experts is None else self.factor[experts]
            return split_mlp(
                inner,
                factor.unbind(1),
                down,
                plan,
                routing.weights,
                activation=self.activation,
                up_bias=up_bias,
                down_bias=down_bias,
                x_grouped=True,
            )
        return expert_mlp(
            tokens,
            self.up_weight(experts),
            down,
            plan,
            routing.weights,
            activation=self.activation,
            gate_up_bias=up_bias,
            down_bias=down_bias,
        )

    def _trains(self, tokens: torch.Tensor, routing: Routing) -> bool:
        """Whether a gradient is needed; then expert_mlp saves less memory for the backward pass than separate products
        do.
        """
        parts = (tokens, routing.weights, *self.parameters())
        return torch.is_grad_enabled() and any(part.requires_grad for part in parts)

    @torch.no_grad()
    def expand(self) -> Experts:
        """Plain experts with the matrices computed once, for inference or as the start of further training."""
        return self._plain(self.up_weight(), self.down_proj, self.down_bias)

    @classmethod
    def from_experts(
        cls,
        experts: Experts,
        num_bases: int,
        *,
        rank: int | None = None,
        nonlinearity: str = "silu",
        steps: int = 2000,
        lr: float = 0.07,
        check_every: int = 200,
        progress: Callable[[int, float], None] | None = None,
    ) -> BasisExperts:
        """Fit the bases to trained experts; their down matrices and biases are copied.

        All of A, B and α are trained by Adam at a constant rate on the mean squared error to ``W/σ``, where σ is the
        root mean square deviation of the stacked matrices, separately for gate and up. Every ``check_every`` steps the
        error is computed; the layer gets the best state, with σ folded into A. The fit starts from M groups of
        neighbouring experts: a basis holds the first R right singular vectors of a group's stacked matrices, A the
        expert's part of the left ones, and an expert's logit for its group's basis is 1.

        Args:
            experts: experts to approximate; they are not changed.
            num_bases: M, at most E.
            rank: R; I if None.
            nonlinearity: ψ.
            steps: number of Adam steps. The paper uses 10,000 to 30,000.
            lr: learning rate of Adam.
            check_every: steps between two computations of the error.
            progress: called at each computation of the error with the step and the error relative to the weights' norm.

        Returns:
            A layer of the dtype and on the device of ``experts``.

        Raises:
            TypeError: ``experts`` is not a plain :class:`Experts`, or a number is not an int.
            ValueError: its weights are quantised; M > E; R beyond H or the rows of a group's stacked matrices; ``lr``
                not positive; or as the class does.
        """
        up, down, up_bias, down_bias = float_weights(experts)
        check_positive(steps=steps, check_every=check_every)
        check_number("lr", lr, above=0, finite=True)
        sizes, options = sizes_and_options(experts, up)
        options["dtype"] = torch.promote_types(up.dtype, torch.float32)
        layer = cls(*sizes, num_bases, rank=rank, nonlinearity=nonlinearity, **options)
        if num_bases > layer.num_experts:
            raise ValueError(f"num_bases must be at most E = {layer.num_experts}, got {num_bases}")
        least = min(layer.hidden_size, layer.num_experts // num_bases * layer.intermediate_size)
        if layer.rank > least:
            raise ValueError(f"rank must be at most {least}, the rank of a group of stacked matrices, got {layer.rank}")
        target = up.unflatten(1, (-1, layer.intermediate_size)).to(layer.bases.dtype)
        with torch.no_grad():
            sigma = target.std(dim=(0, 2, 3), correction=0).clamp(min=torch.finfo(target.dtype).tiny)
            target = target / sigma[:, None, None]
            layer._start_at_groups(target)
        with torch.enable_grad():
            layer._fit(target, steps, lr, check_every, progress)
        with torch.no_grad():
            layer.factor.mul_(sigma[:, None, None])
            layer.down_proj.copy_(down)
            layer._copy_biases(up_bias, down_bias)
        return layer.to(up.dtype)

    def _start_at_groups(self, target: torch.Tensor) -> None:
        """Bases, factors and logits from the singular vectors of neighbouring experts' matrices ``(E, 2, I, H)``."""
        groups = torch.arange(self.num_experts) * self.num_bases // self.num_experts
        self.mix.zero_()
        for basis in range(self.num_bases):
            mine = (groups == basis).nonzero().flatten().to(target.device)
            self.mix[mine, :, basis] = 1.0
            for half in range(target.shape[1]):
                u, s, vh = torch.linalg.svd(target[mine, half].flatten(0, 1), full_matrices=False)
                self.bases[half, basis] = vh[: self.rank]
                left = u[:, : self.rank] * s[: self.rank]
                self.factor[mine, half] = left.unflatten(0, (len(mine), -1))

    def _fit(
        self,
        target: torch.Tensor,
        steps: int,
        lr: float,
        check_every: int,
        progress: Callable[[int, float], None] | None,
    ) -> None:
        """Train A, B and α on the mean squared error to ``target (E, 2, I, H)``, and keep the best state found."""
        trained = [self.bases, self.mix, self.factor]
        optimizer = torch.optim.Adam(trained, lr=lr)
        wanted, size = target.flatten(1, 2), target.square().mean()
        best, kept = math.inf, None
        for step in range(steps + 1):
            error = (self.up_weight() - wanted).square().mean()
            if step % check_every == 0 or step == steps:
                now = float(error.detach() / size)
                if progress is not None:
                    progress(step, now)
                if now < best:
                    best, kept = now, [parameter.detach().clone() for parameter in trained]
            if step < steps:
                gradients = torch.autograd.grad(error, trained)
                for parameter, gradient in zip(trained, gradients, strict=True):
                    parameter.grad = gradient
                optimizer.step()
        with torch.no_grad():
            for parameter, value in zip(trained, kept or (), strict=True):
                parameter.copy_(value)
                parameter.grad = None

    def extra_repr(self) -> str:
        """Sizes and options."""
        return (
            f"num_experts={self.num_experts}, hidden_size={self.hidden_size}, "
            f"intermediate_size={self.intermediate_size}, num_bases={self.num_bases}, rank={self.rank}, "
            f"nonlinearity={self.nonlinearity!r}, activation={self.activation.name!r}"
        )


def _busy(plan: Dispatch) -> tuple[Dispatch, torch.Tensor | None]:
    """The dispatch over the experts that have rows, and their ids; the given dispatch and None if the host cannot know
    them.
    """
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing() or _backend.transformed()
    if plan.offsets.device.type != "cpu" or traced:
        return plan, None
    experts = plan.counts.nonzero().flatten()
    if experts.numel() in (0, plan.num_experts):
        return plan, None
    offsets = torch.cat([plan.offsets[experts], plan.offsets[-1:]])
    return replace(plan, offsets=offsets, num_experts=experts.numel()), experts
