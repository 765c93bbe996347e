"""Low-rank updates of an experts module's matrices, by one adapter or by one adapter per token."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from gossamer.ops.dispatch import Dispatch, dispatch
from gossamer.ops.gather_reduce import gather_reduce
from gossamer.ops.grouped_matmul import grouped_matmul


def adapter_slots(
    adapter_ids: torch.Tensor, top_k_index: torch.Tensor, num_adapters: int, num_experts: int
) -> Dispatch:
    """The slots ``(T, K)`` sorted by adapter and expert, group ``adapter·E + expert``.

    Tokens without an adapter (−1 in ``adapter_ids (T,)``) and ids of E and above are dropped.
    """
    groups, adapter = num_adapters * num_experts, adapter_ids.unsqueeze(1)
    slots = adapter * num_experts + top_k_index
    return dispatch(torch.where((adapter < 0) | (top_k_index >= num_experts), groups, slots), groups)


@dataclass(frozen=True)
class ExpertUpdate:
    """``(x·a_gᵀ)·b_gᵀ`` for the group g of a slot: its expert, or its token's adapter and its expert.

    Attributes:
        a: ``(G, r, C)``.
        b: ``(G, N, r)``, with the scale included.
        dispatch: the slots by group, or None if the groups are the experts.
    """

    a: torch.Tensor
    b: torch.Tensor
    dispatch: Dispatch | None = None

    @property
    def fusible(self) -> bool:
        """Whether :func:`gossamer.expert_mlp` can compute the update: one adapter whose rank does not exceed its
        matrix.
        """
        return self.dispatch is None and self.a.shape[1] <= min(self.a.shape[2], self.b.shape[1])

    def factors(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """The pair of factors that :func:`gossamer.expert_mlp` takes with an ``x`` of ``dtype``."""
        keep = self.a.dtype == self.b.dtype and self.a.dtype in (dtype, torch.float32)
        return (self.a, self.b) if keep else (self.a.to(dtype), self.b.to(dtype))

    def rows(self, x: torch.Tensor, routing: Dispatch, *, grouped: bool) -> torch.Tensor:
        """The update ``(R, N)`` of each row of ``routing``, in its expert-sorted order.

        Args:
            x: ``(T, C)``; ``(R, C)`` in that order when ``grouped``.
            routing: the layer's dispatch.
            grouped: see ``x``.
        """
        a, b = self.a.to(x.dtype), self.b.to(x.dtype)
        if self.dispatch is None:
            p = grouped_matmul(x, a, routing, x_grouped=grouped, y_grouped=True)
            return grouped_matmul(p, b, routing, x_grouped=True, y_grouped=True)
        slots = dataclasses.replace(self.dispatch, num_tokens=routing.slots.shape[0], top_k=1)
        if grouped:
            in_slot_order = gather_reduce(x, routing.rows, bounds="drop")
            p = grouped_matmul(in_slot_order, a, slots, y_grouped=True)
        else:
            p = grouped_matmul(x, a, self.dispatch, y_grouped=True)
        update = grouped_matmul(p, b, slots, x_grouped=True).flatten(0, 1)
        return update.index_select(0, routing.row_slots.long())
