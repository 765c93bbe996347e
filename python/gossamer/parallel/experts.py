"""Expert layers whose experts are distributed over processes: tokens travel to the experts and back."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn.parallel import DistributedDataParallel

from gossamer._checks import check_flag, check_positive, check_sequence
from gossamer.nn.moe.experts.base import Columns, ExpertLayer
from gossamer.parallel.exchange import raise_together
from gossamer.parallel.sharded_experts import ShardedExperts, local_part, tensor_at
from gossamer.parallel.token_exchange import Level

EXCHANGES = ("exact", "static")
OVERFLOWS = ("drop", "raise")
GRADIENTS = ("mean", "sum")


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
    if not dims or not all(isinstance(name, str) for name in dims) or len(set(dims)) != len(dims):
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
    """Replace each stack by the part that this process keeps."""
    for name, stack in stacks.items():
        part = local_part(stack.shape[0], levels)
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
            fully_shard(block.moe.experts, mesh=mesh["data"])   # if ranks have equal parts and share no parameter
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
        names, old = layer.exchange.names, {key: tensor_at(layer, key) for key in layer.exchange.names}
        plain = layer.over({key: _whole(tensor, key, layer.exchange) for key, tensor in old.items()}, layer.num_experts)
        for key in names:
            owner, _, leaf = key.rpartition(".")
            held, tensor = layer.get_submodule(owner), tensor_at(plain, key)
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
