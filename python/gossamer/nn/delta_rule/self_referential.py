"""A layer whose weight matrix modifies itself."""

from __future__ import annotations

import torch
from torch import nn

from gossamer._checks import check_fits, check_flag, check_input, check_number, check_shape, check_widths
from gossamer._parameters import factory_of, new_parameter
from gossamer.ops.self_referential import self_referential


class SelfReferentialLinear(nn.Module):
    """A self-referential weight matrix in a residual block (Irie, Schlag, Csordás and Schmidhuber, 2022).

    ``y = LayerNorm(x + dropout(srwm(x)·Wᵀ))`` with :func:`gossamer.self_referential` over H heads of ``d = hidden/H``
    channels. Every sequence starts with its own copy of the trained matrix, which then changes itself; the state
    between calls is the shift from the trained matrix. The T steps depend on one another: use it where learning within
    a sequence matters more than throughput, and :class:`DeltaNet` where keys and values can be computed for all tokens
    at once.

    Args:
        hidden_size: of the inputs and outputs.
        num_heads: H, which divides it.
        rate_init: the mean of the rates' columns; −1 starts with slow learning, 0 is the few-shot setting's.
        input_softmax: whether each head's inputs pass a softmax first.
        dropout: of the projected output.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        weight: ``(H, d, 3d + 4)``, drawn from N(0, 1/d), the last four columns around ``rate_init``.
        out_proj: ``nn.Linear(hidden_size, hidden_size)`` without bias.
        norm: ``nn.LayerNorm(hidden_size)``.

    Raises:
        TypeError: a size is not an int.
        ValueError: a size is below 1, ``hidden_size`` is not a multiple of ``num_heads``, or ``rate_init`` does not fit
            the dtype.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        rate_init: float = -1.0,
        input_softmax: bool = False,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_widths(hidden_size=hidden_size, num_heads=num_heads)
        check_number("rate_init", rate_init, finite=True)
        check_number("dropout", dropout, least=0, most=1)
        check_flag("input_softmax", input_softmax)
        if hidden_size % num_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_heads, got hidden_size={hidden_size}, num_heads={num_heads}"
            )
        self.hidden_size, self.num_heads, self.head_dim = hidden_size, num_heads, hidden_size // num_heads
        self.rate_init, self.input_softmax = rate_init, input_softmax
        d = self.head_dim
        factory = factory_of(device, dtype)
        self.weight = new_parameter(num_heads, d, 3 * d + 4, **factory)
        check_fits("rate_init", rate_init, self.weight.dtype)
        self.out_proj = nn.Linear(hidden_size, hidden_size, bias=False, **factory)
        self.norm = nn.LayerNorm(hidden_size, **factory)
        self.dropout = nn.Dropout(dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise all parameters again."""
        nn.init.normal_(self.weight, std=self.head_dim**-0.5)
        with torch.no_grad():
            self.weight[:, :, -4:] += self.rate_init
        self.out_proj.reset_parameters()
        self.norm.reset_parameters()

    def initial_state(self, batch_size: int) -> torch.Tensor:
        """The zero shift ``(B, H, d, 3d + 4)`` to start ``batch_size`` sequences with."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        return torch.zeros(batch_size, *self.weight.shape, device=self.weight.device, dtype=wide)

    def forward(self, x: torch.Tensor, *, state: torch.Tensor | None = None) -> torch.Tensor:
        """The block's output for ``x (B, T, hidden)``.

        Args:
            x: ``(B, T, hidden)`` float.
            state: from :meth:`initial_state` or an earlier call; the sequences continue from it, and it is updated in
                place. No gradient flows through it.

        Raises:
            TypeError: ``x`` is not a tensor, or dtypes do not fit.
            ValueError: shapes do not fit.
        """
        check_shape("x", x, (None, None, self.hidden_size), "(B, T, hidden)")
        check_input(x, self.hidden_size, self.out_proj.weight)
        heads = x.unflatten(-1, (self.num_heads, self.head_dim))
        heads = heads.softmax(-1) if self.input_softmax else heads
        before = None if state is None else state.clone()
        y, last = self_referential(heads, self.weight, shift=before, output_final_shift=state is not None)
        if state is not None:
            state.copy_(last.detach())
        return self.norm(x + self.dropout(self.out_proj(y.flatten(-2))))

    def extra_repr(self) -> str:
        """Sizes."""
        return f"hidden_size={self.hidden_size}, num_heads={self.num_heads}, input_softmax={self.input_softmax}"
