"""The forward pass of an expert layer whose experts are divided over processes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from gossamer._autocast import autocast
from gossamer._checks import check_same_device
from gossamer._layout import with_leading_sizes
from gossamer.nn.moe.experts.base import Columns, ExpertLayer
from gossamer.nn.moe.routing import Routing
from gossamer.parallel.exchange import RowExchange
from gossamer.parallel.gradients import copied, share, summed
from gossamer.parallel.token_exchange import Level, exchange_tokens, fit_slots


def tensor_at(module: nn.Module, name: str) -> torch.Tensor:
    """The parameter or buffer of a module by its dotted name."""
    owner, _, leaf = name.rpartition(".")
    return getattr(module.get_submodule(owner), leaf)


class ShardedExperts:
    """The division of a layer's experts, which :func:`shard_experts` sets as ``layer.exchange``.

    Attributes:
        mesh: the dimensions of the mesh that experts are divided over.
        num_local_experts: number of this process's experts.
        names: of the divided parameters and buffers.
        slices: the ranks among which the intermediate size is divided, or None.
        overflow_count: (token, rank) pairs beyond a capacity so far, a scalar int64 on the layer's device.
    """

    def __init__(
        self,
        mesh: DeviceMesh,
        levels: tuple[Level, ...],
        num_experts: int,
        names: tuple[str, ...],
        *,
        overflow: str,
        overlap: bool,
        scale: float,
        replicas: dist.ProcessGroup | None,
        slices: Level | None,
        columns: dict[str, Columns],
    ) -> None:
        self.mesh, self.levels, self.names = mesh, levels, names
        self.overflow, self.overlap, self.scale, self.replicas = overflow, overlap, scale, replicas
        self.slices, self.columns = slices, columns
        self.num_local_experts = len(local_part(num_experts, levels))
        self.overflow_count: torch.Tensor | None = None

    def __deepcopy__(self, memo: dict) -> ShardedExperts:
        # Process groups belong to the process and cannot be copied.
        copied = object.__new__(ShardedExperts)
        copied.__dict__.update(self.__dict__)
        if self.overflow_count is not None:
            copied.overflow_count = self.overflow_count.clone()
        return copied

    @torch.compiler.disable
    def __call__(
        self,
        layer: ExpertLayer,
        x: torch.Tensor,
        routing: Routing | torch.Tensor,
        weights: torch.Tensor | None = None,
        beside: Callable[[], Any] | None = None,
    ) -> tuple[torch.Tensor, Any]:
        """The layer's output for ``x``, and the result of ``beside``; see :func:`exchange_tokens`."""
        try:
            tokens, routing = layer.checked(x, routing, weights)
            if tokens.device.type != self.mesh.device_type:
                raise ValueError(f"x must be on the mesh's devices, {self.mesh.device_type}, got {tokens.device}")
            check_same_device(x=tokens, expert_ids=routing.expert_ids, weights=routing.weights)
        except (TypeError, ValueError) as error:
            if self.levels[0].capacity is None:
                # Sent instead of the sizes, so that the ranks that wait for them raise too.
                device = torch.empty(0, device=self.mesh.device_type)
                RowExchange.of([0] * self.levels[0].size, self.levels[0].group, device, error=error)
            raise
        # The products would cast too, but casting first makes the rows that travel narrower.
        (tokens,) = autocast(layer.enter(tokens))
        weights = routing.weights
        if self.slices is not None:
            tokens, weights = (copied(tensor, self.slices.group) for tensor in (tokens, weights))
        if self.levels[0].capacity is not None and self.overflow_count is None:
            self.overflow_count = torch.zeros((), dtype=torch.int64, device=tokens.device)
        y, other = exchange_tokens(
            tokens,
            routing.expert_ids,
            weights,
            layer.num_experts,
            self.levels,
            functools.partial(self._compute, layer),
            beside=beside,
            overflow=self.overflow_count,
            overlap=self.overlap,
        )
        if self.slices is not None:
            y = summed(y, self.slices.group)
        y = layer.leave(y)
        return with_leading_sizes(y, x), other

    def _compute(
        self, layer: ExpertLayer, rows: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, max_rows: int
    ) -> torch.Tensor:
        stacks = {name: self._local(name, tensor_at(layer, name)) for name in self.names}
        num_experts = self.num_local_experts
        if num_experts == 0:
            # An expert of zeros that no slot uses, because the backward passes of other ranks need this process to take
            # part.
            stacks, num_experts = {name: _one_of_zeros(stack) for name, stack in stacks.items()}, 1
            ids = torch.ones_like(ids)
        ids, weights = fit_slots(ids, weights, num_experts)
        routing = Routing(ids, weights, num_experts, max_rows=min(max_rows, ids.numel()))
        return layer.over(stacks, num_experts).between(rows, routing.dispatched())

    def _local(self, name: str, stack: torch.Tensor) -> torch.Tensor:
        """The local part of a stack, in the form of the layer."""
        local = stack.to_local() if isinstance(stack, DTensor) else stack
        local = share(local, self.scale, () if self.replicas is None else (self.replicas,))
        if self.slices is None:
            return local
        columns = self.columns[name]
        if columns.dim is None:
            # A tensor without a dimension of I is added once, by the first rank.
            local = copied(local, self.slices.group)
            return local if self.slices.rank == 0 else local * 0
        return local if columns.merged is None else local.flatten(columns.merged, columns.merged + 1)


def _one_of_zeros(empty: torch.Tensor) -> torch.Tensor:
    """A stack with one part of zeros made from an empty stack, so that autograd connects the two."""
    zeros = empty.new_zeros((1, *empty.shape[1:]))
    return torch.cat([empty, zeros]) if empty.requires_grad else zeros


def local_part(size: int, levels: Sequence[Level]) -> range:
    """The local part of ``size`` entries, divided at each level like ``torch.chunk``."""
    part = range(size)
    for level in levels:
        share = -(-len(part) // level.size)
        part = part[level.rank * share : (level.rank + 1) * share]
    return part
