"""Factorised layers: weights that are a product of two thin matrices, trained as such."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from gossamer._checks import check_flag, check_input, check_number, check_widths
from gossamer._parameters import factory_of
from gossamer.nn.linear.lora_factors import check_rank, spectral_factors


class LowRankLinear(nn.Module):
    """A linear layer whose weight has rank r: ``y = (x·Vᵀ)·Uᵀ + bias``, with ``W = U·V`` never formed.

    It costs ``r·(I + O)/(I·O)`` of a dense layer's arithmetic and memory, so it pays for r below ``I·O/(I + O)``. The
    factors start as the spectral approximation of a dense initial weight (Khodak et al., 2021), or with
    ``init="spectral_ones"`` as its singular directions with all values 1 (Kamalakara et al., 2022).

    Args:
        in_features: I.
        out_features: O.
        rank: r, in ``[1, min(I, O)]``.
        bias: whether there is a bias.
        init: ``"spectral"`` or ``"spectral_ones"``.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        u: ``(O, r)``.
        v: ``(r, I)``.
        bias: ``(O,)`` or None.

    Raises:
        TypeError: a size or the rank is not an int.
        ValueError: a size below 1, a rank outside its range, or an unknown init.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        bias: bool = True,
        init: str = "spectral",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_widths(in_features=in_features, out_features=out_features)
        check_flag("bias", bias)
        self._setup(nn.Linear(in_features, out_features, bias, **factory_of(device, dtype)), rank, init)

    @classmethod
    def from_linear(cls, linear: nn.Linear, rank: int, *, init: str = "spectral") -> LowRankLinear:
        """The layer of rank r nearest to ``linear`` in the Frobenius norm (or its directions), with a copy of its bias.

        Raises:
            TypeError: ``linear`` is not an ``nn.Linear`` with a floating-point weight.
            ValueError: as the class does.
        """
        if not isinstance(linear, nn.Linear) or not linear.weight.is_floating_point():
            raise TypeError(f"linear must be a torch.nn.Linear with a float weight, got {type(linear).__name__}")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._setup(linear, rank, init)
        return layer

    @torch.no_grad()
    def _setup(self, dense: nn.Linear, rank: int, init: str) -> None:
        check_rank(rank, dense.out_features, dense.in_features)
        if init not in ("spectral", "spectral_ones"):
            raise ValueError(f"init must be 'spectral' or 'spectral_ones', got {init!r}")
        self.in_features, self.out_features, self.rank = dense.in_features, dense.out_features, rank
        v, u = spectral_factors(dense.weight, rank, ones=init == "spectral_ones")
        dtype = dense.weight.dtype
        self.u, self.v = nn.Parameter(u.to(dtype).contiguous()), nn.Parameter(v.to(dtype).contiguous())
        bias = dense.bias
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach().clone()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's output ``(..., O)`` for ``x (..., I)``."""
        check_input(x, self.in_features, self.v)
        return F.linear(F.linear(x, self.v), self.u, self.bias)

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """A dense ``nn.Linear`` with the weight ``U·V``."""
        linear = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, device=self.u.device, dtype=self.u.dtype
        )
        linear.weight.copy_(self.u @ self.v)
        if self.bias is not None:
            linear.bias.copy_(self.bias)
        return linear

    def frobenius_norm_squared(self) -> torch.Tensor:
        """``‖U·V‖²_F = tr((UᵀU)(VVᵀ))``, without the product; differentiable."""
        return ((self.u.T @ self.u) * (self.v @ self.v.T)).sum()

    def extra_repr(self) -> str:
        """Sizes."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"bias={self.bias is not None}"
        )


@torch.no_grad()
def frobenius_decay_(module: nn.Module, decay: float) -> None:
    """Add the gradient of ``decay/2·‖U·V‖²_F`` of every :class:`LowRankLinear` in ``module`` to its factors' gradients.

    It decays the weight itself, where ordinary decay of the factors would shrink its nuclear norm (Khodak et al.,
    2021): ``dU += decay·U(VVᵀ)`` and ``dV += decay·(UᵀU)V``. Call it between the backward pass and the optimizer's
    step, with no decay of the factors there. Frozen factors, and those without a gradient, are left alone.

    Args:
        module: holds the layers.
        decay: λ, at least 0.

    Raises:
        TypeError: ``module`` is not a ``torch.nn.Module``.
        ValueError: a negative ``decay``, or no such layer inside.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    check_number("decay", decay, least=0)
    layers = [m for m in module.modules() if isinstance(m, LowRankLinear)]
    if not layers:
        raise ValueError(f"module must hold a LowRankLinear, got none in {type(module).__name__}")
    for layer in layers:
        u, v = layer.u, layer.v
        if u.grad is not None:
            u.grad.addmm_(u, (v @ v.T) * decay)
        if v.grad is not None:
            v.grad.addmm_((u.T @ u) * decay, v)
