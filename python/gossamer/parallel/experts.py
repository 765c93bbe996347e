"""Expert layers whose experts are distributed over processes: tokens travel to the experts and back."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn.parallel import DistributedDataParallel

from gossamer._autocast import autocast
from gossamer._checks import (
    check_flag,
    check_number,
    check_positive,
    check_same_device,
    check_sequence,
    check_tensor,
)
from gossamer.nn.moe.experts.base import Columns, ExpertLayer
from gossamer.nn.moe.routing import Routing
from gossamer.ops.gather_reduce import gather_reduce
from gossamer.parallel.exchange import RowExchange, raise_together

EXCHANGES = ("exact", "static")
OVERFLOWS = ("drop", "raise")
GRADIENTS = ("mean", "sum")


@dataclass(frozen=True)
class Level:
    """One hop of tokens: the ranks among which a block of experts is divided.

    Attributes:
        group: of the ranks; rank r has the r-th part.
        size: P.
        rank: of this process.
        label: of the traffic.
        capacity: rows per pair of ranks for the static exchange, or None for the exact one.
    """

    group: dist.ProcessGroup
    size: int
    rank: int
    label: str
    capacity: int | None = None


class _SumRows(torch.autograd.Function):
    """``y[b] = Σ rows[lists[b]]``; ``transposed`` lists, for each row, the sums that contain it.

    With the tokens of a plan's rows it copies tokens to the rows that travel, one per (token, rank) pair; with the
    positions of a token's rows it adds up the returned rows, in rank order.
    """

    @staticmethod
    def forward(ctx, rows, lists, transposed):
        ctx.save_for_backward(transposed)
        return gather_reduce(rows, lists, bounds="drop")

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return gather_reduce(gradient, ctx.saved_tensors[0], bounds="drop"), None, None


class _PickSlots(torch.autograd.Function):
    """``weights.flatten()[slots]``, 0 for slots beyond; no slot occurs twice, so gradients need no sum."""

    @staticmethod
    def forward(ctx, weights, slots):
        ctx.save_for_backward(slots)
        ctx.shape = weights.shape
        return F.pad(weights.flatten(), (0, 1))[slots]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        (slots,) = ctx.saved_tensors
        own = gradient.new_zeros(ctx.shape.numel() + 1)
        own[slots.flatten()] = gradient.flatten()
        return own[:-1].view(ctx.shape), None


class _Share(torch.autograd.Function):
    """The local part of a stack; its gradient is summed over replicas and scaled."""

    @staticmethod
    def forward(ctx, part, scale, replicas):
        ctx.scale, ctx.replicas = scale, replicas
        return part.view_as(part)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        gradient = gradient * ctx.scale
        for group in ctx.replicas:
            gradient = gradient.contiguous()
            dist.all_reduce(gradient, group=group)
        return gradient, None, None


def share(part: torch.Tensor, scale: float, replicas: Sequence[dist.ProcessGroup]) -> torch.Tensor:
    """``part``, whose gradient is multiplied by ``scale`` and then summed over each group of replicas."""
    return _Share.apply(part, scale, replicas) if part.requires_grad and (scale != 1.0 or replicas) else part


class _Copied(torch.autograd.Function):
    """A value that all ranks of a group share; every rank contributes to its gradient."""

    @staticmethod
    def forward(ctx, tensor, group):
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


class _Summed(torch.autograd.Function):
    """The sum over the ranks of a group, which all ranks then use in the same way."""

    @staticmethod
    def forward(ctx, part, group):
        total = part.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return gradient, None


@dataclass(frozen=True)
class Plan:
    """The rows of T tokens that travel to each of P ranks, and the slots of each row.

    Attributes:
        index: ``(N,)`` the token of each row, rank by rank, in token order within a rank; T where a row has none.
        places: ``(T, P)`` the row of each (token, rank) pair; N if there is none.
        slots: ``(N, S)`` flat slots of the routing that belong to a row; T·K for none.
        sizes: ``(P,)`` int64 rows for each rank.
        live: ``(P,)`` int64 slots with an expert that each rank gets.
        dropped: pairs beyond the capacity, a scalar tensor; None without one.
    """

    index: torch.Tensor
    places: torch.Tensor
    slots: torch.Tensor
    sizes: torch.Tensor
    live: torch.Tensor
    dropped: torch.Tensor | None


def plan_rows(
    owners: torch.Tensor, num_ranks: int, num_slots: int, capacity: int | None = None, stays: int | None = None
) -> Plan:
    """The rows of tokens whose slots belong to ``owners (T, K)``, ranks below ``num_ranks``; others have no expert.

    A token has one row for each rank that holds any of its experts. With a ``capacity`` there are exactly that many
    rows for each rank, filled with the first tokens, and nothing is read on the host.

    Args:
        owners: ``(T, K)`` int64.
        num_ranks: P.
        num_slots: S, the maximum number of slots of a token on one rank.
        capacity: number of rows for each rank, or None for the exact number.
        stays: a rank that gets no rows; its live slots are counted.
    """
    num_tokens, top_k = owners.shape
    device = owners.device
    hit = torch.zeros((num_tokens, num_ranks + 1), dtype=torch.bool, device=device)
    hit = hit.scatter_(1, owners.clamp(max=num_ranks), True)[:, :num_ranks].T
    if stays is not None:
        hit[stays] = False
    place = hit.long()
    if capacity is None:
        ranks, index = hit.nonzero(as_tuple=True)
        place = place.flatten().cumsum(0).view(num_ranks, num_tokens) - 1
        num_rows, dropped = index.numel(), None
        sizes = hit.sum(1)
    else:
        place = place.cumsum(1) - 1
        dropped = (hit & (place >= capacity)).sum()
        hit = hit & (place < capacity)
        order = torch.arange(num_ranks, device=device)
        sizes = torch.full_like(order, capacity) if stays is None else (order != stays).long() * capacity
        num_rows = capacity * (num_ranks - (stays is not None))
        place = place + (sizes.cumsum(0) - sizes).unsqueeze(1)
        index = torch.full((num_rows + 1,), num_tokens, dtype=torch.int64, device=device)
        tokens = torch.arange(num_tokens, device=device).expand(num_ranks, num_tokens)
        index = index.scatter_(0, place.masked_fill(~hit, num_rows).flatten(), tokens.flatten())[:-1]
        ranks = order.repeat_interleave(sizes, output_size=num_rows)
    places = place.masked_fill(~hit, num_rows).T.contiguous()
    own = F.pad(owners, (0, 0, 0, 1), value=num_ranks)[index] == ranks.unsqueeze(1)
    slots = index.unsqueeze(1) * top_k + torch.arange(top_k, device=device)
    slots = slots.masked_fill(~own, num_tokens * top_k)
    if num_slots < top_k:
        # Slots with an expert are below T·K, so they come first, in their order.
        slots = slots.sort(dim=1).values[:, :num_slots]
    kept = own.sum(1)
    live = torch.zeros(num_ranks, dtype=torch.int64, device=device).scatter_add_(0, ranks, kept)
    if stays is not None:
        live[stays] = (owners == stays).sum()
    return Plan(index, places, slots, sizes, live, dropped)


def _merge_repeated(ids: torch.Tensor, weights: torch.Tensor, absent: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The distinct ids of each token, with the sums of their weights."""
    first = (ids.unsqueeze(2) == ids.unsqueeze(1)).int().argmax(2)
    weights = torch.zeros_like(weights).scatter_add(1, first, weights)
    repeated = first != torch.arange(ids.shape[1], device=ids.device)
    return ids.masked_fill(repeated, absent), weights.masked_fill(repeated, 0.0)


def fit_slots(ids: torch.Tensor, weights: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and weights ``(T, S)`` in at most ``num_experts`` slots, as a dispatch requires."""
    if ids.shape[1] <= num_experts:
        return ids, weights
    ids, weights = _merge_repeated(ids, weights, num_experts)
    order = (ids >= num_experts).int().argsort(dim=1, stable=True)[:, :num_experts]
    return ids.gather(1, order), weights.gather(1, order)


Compute = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]


def exchange_tokens(
    tokens: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    num_experts: int,
    levels: Sequence[Level],
    compute: Compute,
    *,
    beside: Callable[[], Any] | None = None,
    overflow: torch.Tensor | None = None,
    overlap: bool = False,
) -> tuple[torch.Tensor, Any]:
    """``y[t] = Σ_k weights[t,k] · expert_{ids[t,k]}(tokens[t])``, the experts divided among the ranks of ``levels``.

    A token is sent once to each rank that has experts of it, with the ids and weights of its slots there, and comes
    back as the weighted sum over those experts; the ranks' sums are added in rank order. With several levels, such as
    node and device, it is sent once to each node, and within the node once to each device.

    Args:
        tokens: ``(T, H)``.
        ids: ``(T, K)``; ids of ``num_experts`` and above mean no expert.
        weights: ``(T, K)`` floating.
        num_experts: E; rank r of P of the first level has those from ``r·⌈E/P⌉`` on.
        levels: outermost first.
        compute: a function of rows ``(M, H)``, ids ``(M, S)`` int32 of this process's experts (``⌈E/P⌉`` and above mean
            no expert), weights ``(M, S)``, and an upper bound on the slots that have an expert.
        beside: called while rows travel.
        overflow: a scalar int64, to which rows beyond a capacity are added.
        overlap: whether tokens of local experts stay, and are computed while others travel; for the last level.
            ``compute`` is then called twice, first with all tokens.

    Returns:
        ``(T, H)``, and the result of ``beside``.
    """
    level, share = levels[0], -(-num_experts // levels[0].size)
    top_k = ids.shape[1]
    num_slots = min(top_k, share)
    ids = ids.long()
    if num_slots < top_k:
        ids, weights = _merge_repeated(ids, weights, num_experts)
    absent = (ids < 0) | (ids >= num_experts)
    owners = torch.div(ids, share, rounding_mode="floor").masked_fill(absent, level.size)
    stays = level.rank if overlap and len(levels) == 1 else None
    plan = plan_rows(owners, level.size, num_slots, level.capacity, stays)
    local = (ids % share).masked_fill(absent, share).int()
    rows = _SumRows.apply(tokens, plan.index, plan.places)
    factors = _PickSlots.apply(weights, plan.slots)
    parts = rows, factors, F.pad(local.flatten(), (0, 1), value=share)[plan.slots]
    label = f"{level.label} tokens"
    if level.capacity is None:
        exchange = RowExchange.of(plan.sizes, level.group, *parts, label=label, note=plan.live)
        live = list(exchange.received_notes)
    else:
        exchange = RowExchange.static(level.capacity, level.group, to_self=stays is None)
        live = [size * num_slots for size in exchange.received_sizes]
        if stays is not None:
            live[stays] = ids.numel()
        if overflow is not None:
            overflow += plan.dropped
    pending = exchange.start(*parts, label=label)
    y = other = None
    if stays is not None:
        elsewhere = owners != stays
        y = compute(tokens, local.masked_fill(elsewhere, share), weights.masked_fill(elsewhere, 0.0), live.pop(stays))
    elif beside is not None:
        other = beside()
    rows, factors, local = pending.wait()
    if len(levels) > 1:
        rows, _ = exchange_tokens(rows, local, factors, share, levels[1:], compute, overflow=overflow, overlap=overlap)
    else:
        rows = compute(rows, local.contiguous(), factors.contiguous(), sum(live))
    pending = exchange.reversed.start(rows, label=f"{level.label} outputs")
    if stays is not None and beside is not None:
        other = beside()
    collected = _SumRows.apply(pending.wait(), plan.places, plan.index)
    return (collected if y is None else y + collected), other


def _tensor_at(module: nn.Module, name: str) -> torch.Tensor:
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
        self.num_local_experts = len(_part(num_experts, levels))
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
            tokens, weights = (_Copied.apply(tensor, self.slices.group) for tensor in (tokens, weights))
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
            y = _Summed.apply(y, self.slices.group)
        y = layer.leave(y)
        return (y if x.dim() == 2 else y.view(x.shape)), other

    def _compute(
        self, layer: ExpertLayer, rows: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, max_rows: int
    ) -> torch.Tensor:
        stacks = {name: self._local(name, _tensor_at(layer, name)) for name in self.names}
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
            # Only the first rank adds it.
            local = _Copied.apply(local, self.slices.group)
            return local if self.slices.rank == 0 else local * 0
        return local if columns.merged is None else local.flatten(columns.merged, columns.merged + 1)


def _one_of_zeros(empty: torch.Tensor) -> torch.Tensor:
    """A stack with one part of zeros made from an empty stack, so that autograd connects the two."""
    zeros = empty.new_zeros((1, *empty.shape[1:]))
    return torch.cat([empty, zeros]) if empty.requires_grad else zeros


def _part(size: int, levels: Sequence[Level]) -> range:
    """The local part of ``size`` entries, divided at each level like ``torch.chunk``."""
    part = range(size)
    for level in levels:
        share = -(-len(part) // level.size)
        part = part[level.rank * share : (level.rank + 1) * share]
    return part


def _levels(mesh: DeviceMesh, dim: str | Sequence[str] | None) -> tuple[tuple[str, ...], DeviceMesh]:
    """The names of the dimensions over which experts are divided, and their sub-mesh."""
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh must be a torch.distributed.DeviceMesh, got {type(mesh).__name__}")
    names = mesh.mesh_dim_names
    if dim is None:
        if mesh.ndim != 1:
            raise ValueError(f"dim must name a dimension of a mesh of {mesh.ndim} dimensions {names}, got None")
        return (names[0] if names else "experts",), mesh
    if not isinstance(dim, str):
        check_sequence("dim", dim)
    dims = (dim,) if isinstance(dim, str) else tuple(dim)
    if not dims or len(set(dims)) != len(dims):
        raise ValueError(f"dim must be a name, or names that differ, got {dim!r}")
    for name in dims:
        if not names or name not in names:
            raise ValueError(f"dim must be among the mesh's dimensions {names}, got {name!r}")
    if list(dims) != [name for name in names if name in dims]:
        raise ValueError(f"dim must be in the order of the mesh's dimensions {names}, got {dim!r}")
    return dims, mesh[dims if len(dims) > 1 else dims[0]]


def expert_layers(module: nn.Module) -> list[tuple[str, ExpertLayer]]:
    """The expert layers inside ``module`` by name; those inside another expert layer are that layer's."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    found: list[tuple[str, ExpertLayer]] = []
    for name, child in module.named_modules():
        inside = any(name.startswith(f"{outer}.") if outer else name for outer, _ in found)
        if isinstance(child, ExpertLayer) and not inside:
            found.append((name, child))
    return found


def _sharded(module: nn.Module) -> list[tuple[str, ExpertLayer]]:
    layers = [(n, layer) for n, layer in expert_layers(module) if isinstance(layer.exchange, ShardedExperts)]
    if not layers:
        raise ValueError(f"module must hold experts that shard_experts divided, got none in {type(module).__name__}")
    return layers


def _stacks_of(layer: ExpertLayer, sizes: Sequence[int], device_type: str) -> dict[str, torch.Tensor]:
    """The tensors of a layer to divide, checked."""
    total, where = layer.num_experts, type(layer).__name__
    ranks = functools.reduce(lambda a, b: a * b, sizes)
    if layer.exchange is not None:
        raise ValueError(f"module must hold experts that are not divided yet, got {where}")
    if ranks > total:
        raise ValueError(f"mesh must have at most as many ranks as experts, {total} of {where}, got {ranks}")
    if len(sizes) > 1 and total % ranks:
        raise ValueError(f"num_experts must be a multiple of {ranks} over dimensions of sizes {sizes}, got {total}")
    try:
        stacks = layer.stacks()
    except NotImplementedError as error:
        raise ValueError(f"module must hold experts that can be divided: {error}") from None
    devices = {name: str(tensor.device) for name, tensor in stacks.items()}
    if len(set(devices.values())) > 1:
        raise ValueError(f"{where} must have all experts on one device, got {devices}")
    for name, tensor in stacks.items():
        parts = tensor.shape[0]
        if isinstance(tensor, DTensor):
            raise ValueError(f"{where}.{name} must be a plain tensor, divided before any other wrapper, got a DTensor")
        if tensor.device.type not in (device_type, "meta"):
            raise ValueError(f"{where}.{name} must be on the mesh's devices, {device_type}, got {tensor.device}")
        if parts != total and (parts % ranks or total % ranks):
            raise ValueError(
                f"{where}.{name} has {parts} parts for groups of experts, which {ranks} ranks must divide evenly"
            )
    return stacks


def _columns_of(layer: ExpertLayer, slices: Level | None) -> dict[str, Columns]:
    """The dimensions for dividing a layer along its intermediate size, checked; empty without ``slices``."""
    if slices is None:
        return {}
    try:
        columns = layer.columns()
    except NotImplementedError as error:
        raise ValueError(f"module must hold experts that can be divided along {slices.label!r}: {error}") from None
    for name, (shape, dim, _) in columns.items():
        if dim is not None and shape[dim] % slices.size:
            raise ValueError(
                f"intermediate_size must be a multiple of {slices.size}, the ranks of {slices.label!r}, got "
                f"{shape[dim]} of {name}"
            )
    return columns


def _divide(
    layer: ExpertLayer,
    stacks: dict[str, torch.Tensor],
    mesh: DeviceMesh,
    levels: tuple[Level, ...],
    slices: Level | None,
    columns: dict[str, Columns],
) -> None:
    """Put the part of each stack that is here in place of the whole."""
    for name, stack in stacks.items():
        part = _part(stack.shape[0], levels)
        whole = stack.detach()
        placements: list[Shard | Replicate] = [Shard(0)] * len(levels)
        local = whole[part.start : part.stop]
        if slices is not None:
            shape, dim, _ = columns[name]
            whole = whole.reshape(shape)
            local = whole[part.start : part.stop]
            across = Replicate() if dim is None else Shard(dim)
            placements = [across if name == slices.label else Shard(0) for name in mesh.mesh_dim_names]
            if dim is not None:
                local = local.chunk(slices.size, dim)[slices.rank]
        divided = DTensor.from_local(
            local.clone(memory_format=torch.contiguous_format),
            mesh,
            placements,
            run_check=False,
            shape=whole.shape,
            stride=torch.empty(whole.shape, device="meta").stride(),
        )
        owner, _, leaf = name.rpartition(".")
        module = layer.get_submodule(owner)
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(divided, requires_grad=module._parameters[leaf].requires_grad)
        else:
            module._buffers[leaf] = divided


def _check_capacity(
    exchange: str, capacity: int | Sequence[int] | None, overflow: str, levels: int
) -> tuple[int | None, ...]:
    """The capacity of each level."""
    if exchange not in EXCHANGES:
        raise ValueError(f"exchange must be one of {EXCHANGES}, got {exchange!r}")
    if overflow not in OVERFLOWS:
        raise ValueError(f"overflow must be one of {OVERFLOWS}, got {overflow!r}")
    if exchange == "exact":
        if capacity is not None:
            raise ValueError(f"capacity must be None for the exact exchange, got {capacity}")
        return (None,) * levels
    if capacity is None:
        raise ValueError("capacity must be given for the static exchange, got None")
    capacities = tuple(capacity) if isinstance(capacity, Sequence) else (capacity,) * levels
    check_positive(**{f"capacity[{level}]": size for level, size in enumerate(capacities)})
    if len(capacities) != levels:
        raise ValueError(f"capacity must be one int or {levels}, one for each of dim, got {capacity}")
    return capacities


def shard_experts(
    module: nn.Module,
    mesh: DeviceMesh,
    dim: str | Sequence[str] | None = None,
    *,
    tensor: str | None = None,
    replicate: str | None = None,
    exchange: str = "exact",
    capacity: int | Sequence[int] | None = None,
    overflow: str = "drop",
    overlap: bool = False,
    gradients: str = "mean",
) -> nn.Module:
    """Divide the experts of all expert layers inside ``module`` among the ranks of a mesh, in place.

    With E experts on P ranks, rank r keeps the experts from ``r·⌈E/P⌉`` on, like ``Shard(0)`` of a DTensor; the last
    ranks may have fewer, or none. Every rank calls the layer with its own tokens. A token travels once to each rank
    that holds any of its experts, with ids and weights, and comes back as the weighted sum over those experts::

        y[t] = Σ_r  Σ_{k: expert ids[t,k] on rank r}  weights[t,k] · expert_{ids[t,k]}(x[t])

    The inner sums are computed on the experts' ranks and rounded to the rows' dtype; the outer sum is in rank order. So
    results are reproducible bit for bit. They have the same bits as on one device if all experts of a token are on one
    rank; otherwise they differ by the rounding of at most P partial sums, as do the gradients of ``x``. Gradients of
    experts are sums over all received tokens, in rank order. With ``overlap`` the own rank's part comes first.

    >>> mesh = init_device_mesh("cpu", (2, 4), mesh_dim_names=("data", "expert"))
    >>> gossamer.parallel.shard_experts(model, mesh, "expert", replicate="data")
    >>> model = DistributedDataParallel(model)

    If all experts read the same latent of a token (:class:`LatentExperts` with one group), the latent travels, and the
    shared projections are computed on the token's rank.

    Dense parameters, including the router's, stay whole on every rank. Their gradients are averaged over all ranks by
    ``DistributedDataParallel``, which ignores the experts, or by ``fully_shard``. With ``gradients="mean"`` the experts
    also get the gradient of the mean of all ranks' losses. Parameters that all experts share, such as the bases of
    :class:`BasisExperts` and the shared projections, count as dense. For FSDP2, shard the experts separately over
    another dimension of the same mesh, and the rest over all ranks::

        shard_experts(model, mesh, "expert")
        for block in model.blocks:
            fully_shard(block.moe.experts, mesh=mesh["data"])   # as many experts on every rank, none shared
        fully_shard(model, mesh=mesh["data", "expert"]._flatten("all"))

    Ranks may have different numbers of tokens, including none. Every rank must call the layers in the same order, and
    take part in every backward pass.

    ``torch.compile`` does not trace the exchange: each expert layer is a graph break, and the code between layers is
    compiled.

    Args:
        module: an expert layer, or a model with some, whole on every rank; each rank reads only the experts that it
            keeps. For a module on the meta device nothing is read: divide it, then call ``to_empty`` and load a
            checkpoint.
        mesh: a DeviceMesh.
        dim: the mesh dimension over which experts are divided; None for the only one. Several, such as ``("node",
            "device")``, give an exchange in several hops: a token travels once to each node that holds any of its
            experts, and within the node once to each device; E must then be a multiple of the number of ranks.
        tensor: a mesh dimension along which the intermediate size of each expert is divided, as in tensor parallelism;
            its ranks have the same tokens and routing, and add up the results of their slices. Only for float
            :class:`Experts`, whose parameters then have I as a separate dimension: ``(E, 2, I, H)``.
        replicate: a mesh dimension along which experts are copied; their gradients are averaged over it in the backward
            pass. None without copies, or if FSDP2 shards the experts along it.
        exchange: ``"exact"`` exchanges the numbers of rows first, and sends exactly these rows. ``"static"`` sends
            ``capacity`` rows for each pair of ranks; nothing is read on the host, and two collectives per direction
            suffice.
        capacity: rows per pair of ranks in the static exchange, at most the tokens of a rank; one for each of ``dim``.
        overflow: in the static exchange, rows beyond the capacity, which belong to the last tokens, are counted and
            left out: such a token skips its experts on that rank. ``"drop"`` accepts it; with ``"raise"``
            :func:`check_overflow` raises.
        overlap: whether tokens whose experts are on their own rank are computed while the others travel, and added to
            the returned rows. Use it if the exchange takes long: each expert's matrices are then read twice per call,
            and their gradients are sums of two parts. A shared expert is computed during the exchange in any case.
        gradients: ``"mean"`` divides the experts' gradients by the number of ranks, as data parallelism does for other
            parameters; ``"sum"`` gives the gradient of the sum of all ranks' losses.

    Returns:
        ``module``.

    Raises:
        TypeError: ``module`` or ``mesh`` is something else, or ``capacity`` is not an int.
        ValueError: the mesh lacks the dimension, there are more ranks than experts, a layer has experts that cannot be
            divided (:class:`ProductKeyExperts`; uneven groups of :class:`LatentExperts`; merged adapters), a tensor is
            on another device, experts are divided already, or an option is unknown. Every rank raises the same.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    dims, part = _levels(mesh, dim)
    taken = list(dims)
    for option, name in (("tensor", tensor), ("replicate", replicate)):
        if name is None:
            continue
        if name in taken or name not in (mesh.mesh_dim_names or ()):
            others = f"{option} must be another of the mesh's dimensions {mesh.mesh_dim_names} than {tuple(taken)}"
            raise ValueError(f"{others}, got {name!r}")
        taken.append(name)
    capacities = _check_capacity(exchange, capacity, overflow, len(dims))
    check_flag("overlap", overlap)
    if gradients not in GRADIENTS:
        raise ValueError(f"gradients must be one of {GRADIENTS}, got {gradients!r}")
    groups = [part.get_group(axis) for axis in range(len(dims))]
    levels = tuple(
        Level(group, dist.get_world_size(group), dist.get_rank(group), name, size)
        for group, name, size in zip(groups, dims, capacities, strict=True)
    )
    sizes = tuple(level.size for level in levels)
    slices = None
    if tensor is not None:
        group = mesh[tensor].get_group()
        slices = Level(group, dist.get_world_size(group), dist.get_rank(group), tensor)
        groups.append(group)
        part = mesh[tuple(name for name in mesh.mesh_dim_names if name in (*dims, tensor))]
    found, error, description = [], None, ""
    try:
        layers = expert_layers(module)
        if not layers:
            raise ValueError(f"module must hold gossamer's expert layers, got none in {type(module).__name__}")
        found = [
            (name, layer, _stacks_of(layer, sizes, mesh.device_type), _columns_of(layer, slices))
            for name, layer in layers
        ]
        description = repr([(n, k, tuple(s.shape), s.dtype) for n, _, own, _ in found for k, s in own.items()])
    except ValueError as problem:
        error = problem
    if len(set(raise_together(error, *groups, description=description))) > 1:
        raise ValueError("module must have the same expert layers on every rank, got different ones")
    copies = None if replicate is None else mesh[replicate].get_group()
    ranks = functools.reduce(lambda a, b: a * b, sizes)
    if copies is not None:
        ranks *= dist.get_world_size(copies)
    ignored = list(getattr(module, "_ddp_params_and_buffers_to_ignore", ()))
    for name, layer, stacks, columns in found:
        _divide(layer, stacks, part, levels, slices, columns)
        layer.exchange = ShardedExperts(
            part,
            levels,
            layer.num_experts,
            tuple(stacks),
            overflow=overflow,
            overlap=overlap,
            scale=1 / ranks if gradients == "mean" else 1.0,
            replicas=copies,
            slices=slices,
            columns=columns,
        )
        ignored += [f"{name}.{stack}" if name else stack for stack in stacks]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, ignored)
    return module


@torch.no_grad()
def gather_experts(module: nn.Module) -> nn.Module:
    """Undo :func:`shard_experts`, in place: every rank holds all experts again.

    Every rank of the mesh must make the call.

    Raises:
        ValueError: no experts inside ``module`` are divided.
    """
    ignored = set(getattr(module, "_ddp_params_and_buffers_to_ignore", ()))
    for name, layer in _sharded(module):
        names, old = layer.exchange.names, {key: _tensor_at(layer, key) for key in layer.exchange.names}
        plain = layer.over({key: _whole(tensor, key, layer.exchange) for key, tensor in old.items()}, layer.num_experts)
        for key in names:
            owner, _, leaf = key.rpartition(".")
            held, tensor = layer.get_submodule(owner), _tensor_at(plain, key)
            if leaf in held._parameters:
                held._parameters[leaf] = nn.Parameter(tensor, requires_grad=old[key].requires_grad)
            else:
                held._buffers[leaf] = tensor
            ignored.discard(f"{name}.{key}" if name else key)
        layer.exchange = None
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, sorted(ignored))
    return module


def _whole(tensor: DTensor, name: str, exchange: ShardedExperts) -> torch.Tensor:
    """The whole tensor of a DTensor, on every rank; parts of experts travel as bytes, since not all dtypes support
    sums.
    """
    if exchange.slices is not None:
        merged, whole = exchange.columns[name].merged, tensor.full_tensor()
        return whole if merged is None else whole.flatten(merged, merged + 1)
    local = tensor.to_local()
    width = tensor.shape[1:].numel() * local.element_size()
    if local.shape[0] and width:
        bits = local.reshape(local.shape[0], -1).contiguous().view(torch.uint8)
    else:
        bits = local.new_empty((local.shape[0], width), dtype=torch.uint8)
    whole = DTensor.from_local(
        bits,
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=torch.Size((tensor.shape[0], width)),
        stride=(width, 1),
    )
    return whole.full_tensor().view(local.dtype).view(tensor.shape)


def overflow_counts(module: nn.Module) -> dict[str, int]:
    """The number of this rank's (token, rank) rows beyond the capacity so far, by layer; reads the device.

    Raises:
        ValueError: no experts inside ``module`` are divided.
    """
    counts = {name: layer.exchange.overflow_count for name, layer in _sharded(module)}
    return {name: 0 if count is None else int(count) for name, count in counts.items()}


def check_overflow(module: nn.Module) -> dict[str, int]:
    """Sum over the ranks the rows beyond the capacity of static exchanges since the last check.

    Every rank of the mesh must make the call, for example every few hundred steps; it waits for the device.

    Returns:
        The number of (token, rank) rows left out, over all ranks that exchange with this one, by layer.

    Raises:
        RuntimeError: rows were left out in a layer with ``overflow="raise"``; on every rank.
        ValueError: no experts inside ``module`` are divided.
    """
    found, strict = {}, {}
    for name, layer in _sharded(module):
        exchange = layer.exchange
        total = torch.zeros((), dtype=torch.int64, device=exchange.mesh.device_type)
        if exchange.overflow_count is not None:
            total += exchange.overflow_count
            exchange.overflow_count.zero_()
        for level in exchange.levels:
            dist.all_reduce(total, group=level.group)
        found[name] = int(total)
        if found[name] and exchange.overflow == "raise":
            strict[name] = found[name], tuple(level.capacity for level in exchange.levels)
    if strict:
        listed = "; ".join(f"{n or '(the layer itself)'}: {count} with {size}" for n, (count, size) in strict.items())
        raise RuntimeError(f"capacity must hold all rows of a static exchange; rows left out: {listed}")
    return found


@torch.no_grad()
def clip_grad_norm_(parameters: Iterable[torch.Tensor] | torch.Tensor, max_norm: float) -> torch.Tensor:
    """``torch.nn.utils.clip_grad_norm_`` with the 2-norm, for parameters that include divided experts.

    The norm is over all gradients, counting each expert once: ``‖g‖² = ‖dense‖² + Σ_ranks ‖own experts‖²``. Dense
    gradients must be the same on every rank, as after ``DistributedDataParallel``. Not for FSDP2, which has its own.

    Args:
        parameters: of the model.
        max_norm: the maximum norm, to which larger norms are scaled down.

    Returns:
        The norm before, a scalar, the same on every rank.

    Raises:
        TypeError: ``parameters`` holds something else than tensors, or ``max_norm`` is not a number.
        ValueError: ``max_norm`` is negative.
    """
    if not isinstance(parameters, Iterable):
        raise TypeError(f"parameters must be a tensor or an iterable of tensors, got {type(parameters).__name__}")
    parameters = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    for parameter in parameters:
        check_tensor("parameters", parameter)
    check_number("max_norm", max_norm, least=0)
    dense: list[torch.Tensor] = []
    divided: dict[tuple[DeviceMesh, tuple[int, ...]], list[torch.Tensor]] = {}
    for gradient in (parameter.grad for parameter in parameters):
        if isinstance(gradient, DTensor):
            axes = tuple(axis for axis, placement in enumerate(gradient.placements) if placement.is_shard())
            divided.setdefault((gradient.device_mesh, axes), []).append(gradient.to_local())
        elif gradient is not None:
            dense.append(gradient)
    every = [*dense, *(gradient for own in divided.values() for gradient in own)]
    if not every:
        return torch.zeros(())
    total = _squares(dense, every[0])
    for (mesh, axes), own in divided.items():
        squares = _squares(own, every[0])
        for axis in axes:
            dist.all_reduce(squares, group=mesh.get_group(axis))
        total = total + squares
    norm = total.sqrt()
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for gradient in every:
        gradient.mul_(factor.to(gradient.dtype))
    return norm


def _squares(gradients: list[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    """The sum of squares, in float32 or wider."""
    wide = [gradient.to(torch.promote_types(gradient.dtype, torch.float32)) for gradient in gradients]
    zero = torch.zeros((), dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
    return sum((gradient.square().sum() for gradient in wide), zero)
