"""Routing by token id."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from gossamer._checks import check_index
from gossamer.nn.moe.routers.base import Router
from gossamer.nn.moe.routing import Routing, check_selection, given_experts


class HashRouter(Router):
    """Experts by token id, from a fixed table (hash layers, Roller et al., 2021); every slot weighs 1/K.

    Args:
        table: ``(V,)`` or ``(V, K)`` int32 or int64, the experts of each of V token ids; saved with the state.
        num_experts: E.

    Raises:
        TypeError: ``table`` does not hold int32 or int64.
        ValueError: ``table`` has another rank, or ids outside ``0 ... E-1``, or K > E.
    """

    def __init__(self, table: torch.Tensor, num_experts: int) -> None:
        super().__init__()
        check_index("table", table)
        if table.dim() not in (1, 2):
            raise ValueError(f"table must have shape (V,) or (V, K), got {tuple(table.shape)}")
        table = table.detach().clone().reshape(table.shape[0], -1)
        check_selection(num_experts, table.shape[1])
        if (
            table.device.type != "meta"
            and table.numel()
            and not (0 <= int(table.min()) <= int(table.max()) < num_experts)
        ):
            raise ValueError(
                f"table must hold ids from 0 to num_experts - 1 = {num_experts - 1}, "
                f"got {int(table.min())} to {int(table.max())}"
            )
        self.num_experts = num_experts
        self.top_k = table.shape[1]
        self.register_buffer("table", table)

    def forward(self, x: torch.Tensor | None = None, *, token_ids: torch.Tensor | None = None) -> Routing:
        """The routing of ``token_ids (...)``, each in ``0 ... V-1`` (checked on the CPU); T is their number.

        Args:
            x: hidden states, which are not read; or the token ids themselves, where ``token_ids`` is None.
            token_ids: int32 or int64.

        Raises:
            TypeError: there are no token ids, or they are not int32 or int64.
            IndexError: on the CPU, a token id outside ``0 ... V-1``.
        """
        if token_ids is None:
            if x is None or (isinstance(x, torch.Tensor) and x.is_floating_point()):
                raise TypeError("token_ids must be given to a router that goes by them, got None")
            token_ids = x
        check_index("token_ids", token_ids)
        if not torch.compiler.is_compiling() and token_ids.device.type == "cpu" and token_ids.numel():
            low, high = (int(value) for value in token_ids.aminmax())
            if low < 0 or high >= self.table.shape[0]:
                raise IndexError(f"token_ids must be from 0 to V - 1 = {self.table.shape[0] - 1}, got {low} to {high}")
        return given_experts(F.embedding(token_ids.reshape(-1), self.table), self.num_experts)

    def extra_repr(self) -> str:
        """Sizes."""
        return f"vocabulary={self.table.shape[0]}, num_experts={self.num_experts}, top_k={self.top_k}"
