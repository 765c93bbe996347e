"""Low-rank updates of expert layers, stored as PEFT stores them: the adapters of all experts in two flat matrices."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from gossamer._activation import Activation
from gossamer._checks import check_flags, check_positive, check_sequence, check_shape, check_strided, check_tensor
from gossamer.nn.linear.lora_factors import (
    add_low_rank_,
    check_init,
    check_rank,
    checked_alpha,
    draw_factors_,
    lora_scale,
    row_norms,
    spectral_split_,
)
from gossamer.nn.moe.experts.grouped import Experts
from gossamer.nn.moe.routing import Routing
from gossamer.ops.activate import activate
from gossamer.ops.dispatch import Dispatch
from gossamer.ops.gather_reduce import combine_slots
from gossamer.ops.grouped_matmul import grouped_matmul


def expert_factors(flat_a: torch.Tensor, flat_b: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors of each expert, ``a (E, r, C)`` and ``b (E, N, r)``, from PEFT's flat layout; differentiable views.

    Row ``e·r + j`` of ``flat_a (E·r, C)`` is row j of expert e; column ``j·E + e`` of ``flat_b (N, r·E)`` is column j
    of expert e.

    Raises:
        TypeError: a factor is not a tensor, or ``num_experts`` is not an int.
        ValueError: the sizes do not fit each other or ``num_experts``, or that is below 1.
    """
    check_positive(num_experts=num_experts)
    for name, tensor in (("flat_a", flat_a), ("flat_b", flat_b)):
        check_tensor(name, tensor)
        check_strided(name, tensor)
    total = flat_a.shape[0] if flat_a.dim() else 0
    if flat_a.dim() != 2 or flat_b.dim() != 2 or flat_b.shape[1] != total or total % num_experts or not total:
        raise ValueError(
            f"flat_a and flat_b must have shapes (E*r, C) and (N, r*E) with E={num_experts}, got "
            f"{tuple(flat_a.shape)} and {tuple(flat_b.shape)}"
        )
    rank = total // num_experts
    return flat_a.view(num_experts, rank, -1), flat_b.view(-1, rank, num_experts).permute(2, 0, 1)


def flat_expert_factors(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse of :func:`expert_factors`: PEFT's ``flat_a (E·r, C)`` and ``flat_b (N, r·E)``.

    Raises:
        TypeError: a factor is not a tensor.
        ValueError: ``a`` and ``b`` are not of shapes ``(E, r, C)`` and ``(E, N, r)``.
    """
    check_shape("a", a, (None, None, None), "(E, r, C)")
    check_shape("b", b, (a.shape[0], None, a.shape[1]), "(E, N, r)")
    for name, tensor in (("a", a), ("b", b)):
        check_strided(name, tensor)
    num_experts, rank, columns = a.shape
    return a.reshape(num_experts * rank, columns), b.permute(1, 2, 0).reshape(b.shape[1], rank * num_experts)


class LoRAExperts(Experts):
    """:class:`Experts` with a low-rank update of each expert's matrices, never formed: ``(x·A_eᵀ)·B_eᵀ``.

    The update of gate_up comes before the activation, that of down after it. The factors are laid out as in PEFT's
    adapters of ``target_parameters``, under other names; see :func:`expert_factors`. The experts' own matrices and
    biases are frozen unless you set them to train. As in PEFT, there is no dropout.

    With ``dora`` every row of an expert's updated matrix gets a trained norm (DoRA, Liu et al., 2024), which PEFT does
    not support for experts. The layer then runs separate products and scales rows between them.

    Args:
        num_experts: E.
        hidden_size: H.
        intermediate_size: I.
        rank: r of each expert, at least 1 and at most the smaller side of every matrix with an update.
        alpha: α; ``rank`` when None.
        rank_stabilized: whether the scale is α/√r instead of α/r.
        dora: whether rows have trained magnitudes.
        init: ``"kaiming"`` or ``"gaussian"``: A is random and B zero; ``"spectral"``: both are the principal part of
            each expert's matrix, which keeps the residual.
        targets: the matrices to update, out of ``"gate_up_proj"`` (``"up_proj"`` with an ungated activation) and
            ``"down_proj"``.
        **options: ``activation``, ``bias``, ``interleaved``, ``transposed``, ``capacity_factor``, ``device``,
            ``dtype`` of :class:`Experts`.

    Attributes:
        gate_up_proj_lora_A: ``(E·r, H)``; of the other target ``down_proj_lora_A (E·r, I)``.
        gate_up_proj_lora_B: ``(2I, r·E)``; of the other target ``down_proj_lora_B (H, r·E)``.
        gate_up_proj_lora_magnitude: ``(E, 2I)`` with ``dora``, else None; ``down_proj_lora_magnitude`` is ``(E, H)``.

    Raises:
        TypeError: a size or the rank is not an int.
        ValueError: as :class:`Experts` does, a rank outside its range, an unknown init or target, or no target.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        rank: int,
        *,
        alpha: float | None = None,
        rank_stabilized: bool = False,
        dora: bool = False,
        init: str = "kaiming",
        targets: tuple[str, ...] | None = None,
        activation: str | Activation = "swiglu",
        **options: object,
    ) -> None:
        super().__init__(num_experts, hidden_size, intermediate_size, activation=activation, **options)
        self._setup(rank, alpha, rank_stabilized, dora, init, targets)

    @classmethod
    def from_experts(cls, experts: Experts, rank: int, **options: object) -> LoRAExperts:
        """A layer over the parameters of ``experts``, shared with it (a target's matrix not with ``init="spectral"``).

        Args:
            experts: :class:`Experts`; its parameters are frozen.
            rank: r of each expert.
            **options: ``alpha``, ``rank_stabilized``, ``dora``, ``init``, ``targets`` of the class.

        Raises:
            TypeError: ``experts`` is not a plain :class:`Experts`, or an option is unknown.
            ValueError: as the class does.
        """
        if type(experts) is not Experts:
            raise TypeError(f"experts must be a gossamer.nn.Experts, got {type(experts).__name__}")
        defaults = {"alpha": None, "rank_stabilized": False, "dora": False, "init": "kaiming", "targets": None}
        if unknown := options.keys() - defaults.keys():
            raise TypeError(f"options must be among {sorted(defaults)}, got {sorted(unknown)}")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        plain = (
            "activation",
            "num_experts",
            "hidden_size",
            "intermediate_size",
            "interleaved",
            "transposed",
            "capacity_factor",
            "form",
            "_up_name",
        )
        for name in plain:
            setattr(layer, name, getattr(experts, name))
        for name, parameter in experts._parameters.items():
            layer.register_parameter(name, parameter)
        layer._setup(rank, **(defaults | options))
        return layer

    def _setup(
        self,
        rank: int,
        alpha: float | None,
        rank_stabilized: bool,
        dora: bool,
        init: str,
        targets: tuple[str, ...] | None,
    ) -> None:
        if self.form != "grouped":
            raise ValueError(f"form must be 'grouped' for experts with low-rank updates, got {self.form!r}")
        known = (self._up_name, "down_proj")
        if targets is not None:
            check_sequence("targets", targets)
        targets = known if targets is None else tuple(targets)
        if not targets or set(targets) - set(known) or len(set(targets)) != len(targets):
            raise ValueError(f"targets must be one or both of {known}, got {targets}")
        check_init(init)
        check_flags(rank_stabilized=rank_stabilized, dora=dora)
        self.rank, self.alpha, self.rank_stabilized = rank, checked_alpha(alpha, rank), rank_stabilized
        self.init, self.targets = init, targets
        self._unmerged: dict[str, torch.Tensor] | None = None
        for name in targets:
            weight = self._matrix(name)
            check_rank(rank, *weight.shape[1:])
            if init == "spectral":
                setattr(self, name, nn.Parameter(getattr(self, name).detach().clone()))
            total = self.num_experts * rank
            self.register_parameter(f"{name}_lora_A", nn.Parameter(weight.new_empty(total, weight.shape[2])))
            self.register_parameter(f"{name}_lora_B", nn.Parameter(weight.new_empty(weight.shape[1], total)))
            magnitude = nn.Parameter(weight.new_empty(weight.shape[:2])) if dora else None
            self.register_parameter(f"{name}_lora_magnitude", magnitude)
        for name, parameter in self.named_parameters():
            if "_lora_" not in name:
                parameter.requires_grad_(False)
        self.reset_lora_parameters()

    def _matrix(self, name: str) -> torch.Tensor:
        """The stacked matrices ``(E, N, C)`` of a target."""
        weight = getattr(self, name)
        return weight.transpose(1, 2) if self.transposed else weight

    def lora_factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Factors ``a (E, r, C)`` and ``b (E, N, r)`` of the target ``name``, as views of its flat parameters."""
        return expert_factors(getattr(self, f"{name}_lora_A"), getattr(self, f"{name}_lora_B"), self.num_experts)

    @property
    def scale(self) -> float:
        """α/r, or α/√r when rank-stabilised."""
        return lora_scale(self.alpha, self.rank, self.rank_stabilized)

    @property
    def merged(self) -> bool:
        """Whether the matrices hold the update."""
        return self._unmerged is not None

    @torch.no_grad()
    def reset_lora_parameters(self) -> None:
        """Initialise the updates again; with ``init="spectral"`` each call moves the principal part out of each
        matrix.
        """
        for name in self.targets:
            a, b = self.lora_factors(name)
            if self.init == "spectral":
                spectral_split_(self._matrix(name), a, b, self.scale)
            else:
                draw_factors_(a, b, self.init)
            if (magnitude := getattr(self, f"{name}_lora_magnitude")) is not None:
                magnitude.copy_(self._norms(name))

    def _norms(self, name: str) -> torch.Tensor:
        """``‖W_e + scale·B_e·A_e‖`` by rows, ``(E, N)``."""
        weight, (a, b) = self._matrix(name), self.lora_factors(name)
        return torch.stack([row_norms(weight[e], a[e], b[e], self.scale) for e in range(self.num_experts)])

    def _gain(self, name: str) -> torch.Tensor | None:
        """``magnitude / norm (E, N)``, whose gradient is the magnitude's alone; None without DoRA."""
        magnitude = getattr(self, f"{name}_lora_magnitude", None)
        return None if magnitude is None else magnitude / self._norms(name)

    @torch.no_grad()
    def merge(self) -> None:
        """Fold the updates into the matrices, summed in float32 and rounded once; the old matrices are kept.

        Raises:
            ValueError: the layer is merged already.
        """
        if self._unmerged is not None:
            raise ValueError("merge needs an unmerged layer, got one that is merged already")
        before = {name: getattr(self, name).detach().clone() for name in self.targets}
        for name in self.targets:
            weight, (a, b), gain = self._matrix(name), self.lora_factors(name), self._gain(name)
            for e in range(self.num_experts):
                add_low_rank_(weight[e], a[e], b[e], self.scale, None if gain is None else gain[e])
        self._unmerged = before

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore the matrices from before :meth:`merge`.

        Raises:
            ValueError: the layer is not merged.
        """
        if self._unmerged is None:
            raise ValueError("unmerge needs a merged layer, got one that is not merged")
        for name, weight in self._unmerged.items():
            getattr(self, name).copy_(weight)
        self._unmerged = None

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, weight in (self._unmerged or {}).items():
            destination[prefix + name] = weight

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        if self._unmerged is not None:
            raise ValueError("load_state_dict needs an unmerged layer, got a merged one: call unmerge() first")
        super()._load_from_state_dict(*args, **kwargs)

    def stacks(self) -> dict[str, torch.Tensor]:
        """All tensors, the factors as :meth:`lora_factors` gives them: ``(E, r, C)`` and ``(E, N, r)``.

        Raises:
            ValueError: the layer is merged.
        """
        if self.merged:
            raise ValueError("stacks needs an unmerged layer, got a merged one: call unmerge() first")
        stacks = self._held()
        for name in self.targets:
            stacks[f"{name}_lora_A"], stacks[f"{name}_lora_B"] = self.lora_factors(name)
        return stacks

    def over(self, stacks: Mapping[str, torch.Tensor], num_experts: int) -> LoRAExperts:
        flat = dict(stacks)
        for name in self.targets:
            keys = f"{name}_lora_A", f"{name}_lora_B"
            flat |= zip(keys, flat_expert_factors(*(stacks[key] for key in keys)), strict=True)
        return super().over(flat, num_experts)

    def compute(self, tokens: torch.Tensor, routing: Routing, **updates: object) -> torch.Tensor:
        if self.merged:
            return super().compute(tokens, routing)
        if any(getattr(self, f"{name}_lora_magnitude") is not None for name in self.targets):
            return self._compute_scaled(tokens, routing)
        keys = {self._up_name: "gate_up_lora", "down_proj": "down_lora"}
        updates = {keys[name]: self.lora_factors(name) for name in self.targets}
        return super().compute(tokens, routing, lora_scale=self.scale, **updates)

    def _compute_scaled(self, tokens: torch.Tensor, routing: Routing) -> torch.Tensor:
        """The layer as products on its dispatch, with the rows of DoRA's targets scaled after each."""
        plan = routing.dispatch
        last = torch.arange(plan.buffer_rows, device=tokens.device)
        expert = torch.searchsorted(plan.offsets[1:].long(), last, right=True).clamp(max=self.num_experts - 1)
        rows = self._scaled_product(self._up_name, tokens, plan, expert, grouped=False)
        rows = activate(rows, self.activation, interleaved=self.interleaved)
        rows = self._scaled_product("down_proj", rows, plan, expert, grouped=True)
        return combine_slots(rows, plan, routing.weights)

    def _scaled_product(
        self, name: str, x: torch.Tensor, plan: Dispatch, expert: torch.Tensor, *, grouped: bool
    ) -> torch.Tensor:
        rows = grouped_matmul(x, self._matrix(name), plan, x_grouped=grouped, y_grouped=True)
        if name in self.targets:
            a, b = self.lora_factors(name)
            p = grouped_matmul(x, a, plan, x_grouped=grouped, y_grouped=True)
            rows = rows + self.scale * grouped_matmul(p, b, plan, x_grouped=True, y_grouped=True)
            rows = rows * self._gain(name).to(rows.dtype)[expert]
        bias = getattr(self, f"{name}_bias")
        return rows if bias is None else rows + bias.to(rows.dtype)[expert]

    def extra_repr(self) -> str:
        """Sizes and options."""
        return super().extra_repr() + f", rank={self.rank}, alpha={self.alpha:g}, targets={self.targets}"
