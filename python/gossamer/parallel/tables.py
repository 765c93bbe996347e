"""Embedding tables over several processes: by rows, whole, by columns, or as replicas, with fused optimizers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from gossamer.nn import DynamicEmbedding, EmbeddingBag, TableBatchedEmbeddingBags
from gossamer.parallel.exchange import raise_together
from gossamer.parallel.placement import (
    KINDS,
    Lookups,
    TablePlan,
    assign_owners,
    check_lookups,
    join,
    named_tables,
    plan_tables,
    table_infos,
)
from gossamer.parallel.table_layers import (
    ShardedDynamicEmbedding,
    ShardedEmbedding,
    ShardedEmbeddingBag,
    ShardedTableBatchedEmbeddingBags,
)

GRADIENTS = ("mean", "sum")


def _check_mesh(mesh: DeviceMesh, dim: str | None) -> DeviceMesh:
    """The one-dimensional mesh of the ranks that share the tables."""
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh must be a torch.distributed.device_mesh.DeviceMesh, got {type(mesh).__name__}")
    names = mesh.mesh_dim_names or ()
    if dim is not None and not isinstance(dim, str):
        raise TypeError(f"dim must be a str or None, got {type(dim).__name__}")
    if dim is not None and dim not in names:
        raise ValueError(f"mesh must have the dimension {dim!r}, got the dimensions {tuple(names)}")
    if dim is None and mesh.ndim != 1:
        raise ValueError(f"dim must name one of the mesh's dimensions {tuple(names)}, as it has {mesh.ndim}, got None")
    if mesh.get_coordinate() is None:
        raise ValueError("mesh must hold this process")
    return mesh if mesh.ndim == 1 else mesh[dim]


def _plan(model: nn.Module, plan: object, world: int, lookups: Mapping[str, Lookups] | None) -> TablePlan:
    """The plan as a :class:`TablePlan` that names every table of the model."""
    if isinstance(plan, str):
        if plan != "auto":
            raise ValueError(f"plan must be 'auto', a dict of {KINDS} by table, or a TablePlan, got {plan!r}")
        return plan_tables(model, world, lookups=lookups)
    infos = table_infos(model, lookups)
    if isinstance(plan, TablePlan):
        if plan.world != world:
            raise ValueError(f"plan must be for the mesh's {world} ranks, got one for {plan.world}")
        kinds = plan.kinds
    elif isinstance(plan, Mapping):
        # The name of a batched module means all of its tables.
        batched = {
            name: [join(name, str(table)) for table in range(len(module.layout.specs))]
            for name, module in named_tables(model).items()
            if isinstance(module, TableBatchedEmbeddingBags)
        }
        kinds = {}
        for name, kind in plan.items():
            kinds |= dict.fromkeys(batched.get(name, [name]), kind)
    else:
        raise TypeError(f"plan must be a str, a dict or a TablePlan, got {type(plan).__name__}")
    if unknown := sorted(set(kinds) - set(infos)):
        raise ValueError(f"plan must name tables of the model, {sorted(infos)}, got {unknown}")
    if absent := sorted(set(infos) - set(kinds)):
        raise ValueError(f"plan must name every table of the model, got nothing for {absent}")
    for name, kind in kinds.items():
        if kind not in KINDS:
            raise ValueError(f"plan[{name!r}] must be one of {KINDS}, got {kind!r}")
        if kind not in infos[name].kinds:
            raise ValueError(f"plan[{name!r}] must be one of {infos[name].kinds} for this kind of table, got {kind!r}")
    if isinstance(plan, TablePlan):
        return TablePlan(world, dict(kinds), dict(plan.owners), infos)
    return assign_owners(infos, {name: kinds[name] for name in infos}, world)


def _checked_plan(
    model: nn.Module, mesh: DeviceMesh, plan: object, gradients: str, lookups: Mapping[str, Lookups] | None
) -> TablePlan:
    """The plan, after all checks that one rank can make alone."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if gradients not in GRADIENTS:
        raise ValueError(f"gradients must be one of {GRADIENTS}, got {gradients!r}")
    tables = named_tables(model)
    if not tables:
        raise ValueError("model must have a table that can be sharded, got none")
    found = _plan(model, plan, mesh.size(), lookups)
    devices = {name: _device(module) for name, module in tables.items()}
    if len(set(devices.values())) > 1 or any(
        device.type not in (mesh.device_type, "meta") for device in devices.values()
    ):
        kind, listed = mesh.device_type, {name: str(device) for name, device in devices.items()}
        raise ValueError(
            f"model must have all tables on one device of the mesh's type {mesh.device_type!r}, got {listed}"
        )
    for name in found.kinds:
        found.split(name).check(name)
    for name, module in tables.items():
        kind = found.kinds.get(name)
        if getattr(module, "max_norm", None) is not None and kind in ("column", "replicate"):
            raise ValueError(f"plan[{name!r}] must be 'row' or 'table' for a table with max_norm, got {kind!r}")
    return found


def _device(module: nn.Module) -> torch.device:
    if isinstance(module, DynamicEmbedding):
        return module.device
    return next(module.parameters()).device


def _shard(name: str, module: nn.Module, plan: TablePlan, mesh: DeviceMesh) -> nn.Module:
    """The sharded form of one table module."""
    if isinstance(module, DynamicEmbedding):
        return ShardedDynamicEmbedding(module, plan.split(name), mesh)
    if isinstance(module, TableBatchedEmbeddingBags):
        splits = [plan.split(join(name, str(table))) for table in range(len(module.layout.specs))]
        return ShardedTableBatchedEmbeddingBags(module, splits, mesh)
    shared = ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
    if isinstance(module, EmbeddingBag):
        made, shared = ShardedEmbeddingBag, (*shared, "mode", "include_last_offset")
    else:
        made = ShardedEmbedding
    options = {option: getattr(module, option) for option in shared}
    state = {}
    if module.optimizer is not None:
        state = {kind: getattr(module, f"optimizer_{kind}") for kind in ("step", *module.optimizer.state_kinds())}
    how = {"requires_grad": module.weight.requires_grad, "options": options}
    return made(module.weight, state, module.optimizer, plan.split(name), mesh, **how)


def shard_tables(
    model: nn.Module,
    mesh: DeviceMesh,
    plan: str | Mapping[str, str] | TablePlan = "auto",
    *,
    dim: str | None = None,
    gradients: str = "mean",
    lookups: Mapping[str, Lookups] | None = None,
) -> nn.Module:
    """Distribute the embedding tables of a model over the processes of a mesh; each process then looks up its own
    batch.

    Every :class:`gossamer.nn.Embedding`, ``EmbeddingBag``, ``TableBatchedEmbeddingBags`` and ``DynamicEmbedding`` is
    replaced by a layer that is called as before. Every process must make the same calls in the same order, backward
    passes included, with a batch of any size. The plan gives the distribution of each table:

    - ``"row"``: a block of rows on each rank (for a dynamic table, the ids whose hash gives the rank). Each distinct id
      travels once to the rank of its row, and the row back; bags are pooled on the requesting rank.
    - ``"table"``: the whole table on one rank, which pools. Ids travel there and one sum per bag comes back; without
      pooling, distinct ids and their rows, as for ``"row"``.
    - ``"column"``: a block of columns of all rows on each rank, which pools its columns of the bags of all ranks.
    - ``"replicate"``: the whole table on every rank. Only ids and gradients travel, in the backward pass.

    A call sends the numbers of ids, the ids, and the rows, and its backward pass the gradients: four collectives,
    however many tables a ``TableBatchedEmbeddingBags`` has, and for several modules that are looked up by
    :func:`lookup`. A bag's gradient travels once to each rank that holds one of its ids.

    **Bits.** Fused steps (``optimizer=``) use the joined batch: rank 0's examples, then rank 1's, and so on. Given the
    same gradients of the results, one step on P processes has the same bits as one process's step on the joined batch
    for ``"row"``, ``"table"`` and ``"replicate"``, since rows are pooled and gradients are summed in the order of a
    single process; results have the same bits too. ``"column"`` has the same bits for rules that work on single
    elements. For rules that read whole rows (row-wise states, ``clip_norm``, LAMB, stochastic rounding), sums of each
    rank's columns are added in rank order, with one or two more collectives per table, and the step agrees to rounding.
    Exceptions: stochastic rounding of ``"row"`` draws other numbers, as each rank counts its rows from 0; a full
    dynamic table evicts per rank; with ``gradients="mean"`` and a number of ranks that is not a power of two, the
    division rounds. The model's data-parallel wrapper averages the gradients of dense layers in its own order.

    Under ``torch.compile`` a lookup is a graph break.

    Create a model whose tables fit no single process under ``torch.device("meta")`` (a dynamic table with
    ``device="meta"``). Afterwards allocate and initialise its parts with ``model.to_empty(device=...)`` and each
    layer's ``reset_parameters()``; parts of dynamic tables are created immediately.

    Without an optimizer a table's part gets its gradient in ``weight.grad``, equal up to rounding. The parts are listed
    in the model's ``_ddp_params_and_buffers_to_ignore``, so that DistributedDataParallel ignores them; pass them to
    ``fully_shard`` as ``ignored_params``.

    The ``state_dict`` holds whole tables under their original names, as DTensors if ranks hold parts, and groups of ids
    for dynamic tables; torch.distributed.checkpoint saves and loads it for any number of processes and any plan.
    :func:`gossamer.parallel.save_checkpoint` and :class:`gossamer.parallel.ShardedEmbeddingFolder` make this safe if a
    process is killed.

    Args:
        model: the model, changed in place; it must have the same tables on all processes.
        mesh: of the processes.
        plan: ``"auto"`` for :func:`plan_tables`, one of the kinds above for each table by name (a batched module's name
            means all its tables, ``"name.0"`` one of them), or a :class:`TablePlan`.
        dim: the mesh dimension over which tables are distributed; required if there are several. Processes along the
            other dimensions hold copies, and must get the same batches.
        gradients: the gradients of rows: ``"mean"``, the mean over the ranks' losses, as in DistributedDataParallel, so
            that a mean loss per batch becomes a mean over the joined batch; or ``"sum"``.
        lookups: the counts of :func:`measure_lookups`, for ``"auto"`` and for the placement of whole tables; each rank
            passes its own, and the mean is used.

    Returns:
        The model; the sharded table where the model itself is one.

    Raises:
        TypeError: an argument has another type.
        ValueError: on every rank: the mesh lacks the dimension, the plan leaves out a table or names an unknown
            one, there are more ranks than rows or columns, devices are mixed, or the ranks' models or plans differ.
    """
    mesh = _check_mesh(mesh, dim)
    check_lookups(lookups)
    group, error, description = mesh.get_group(), None, ""
    lookups = _of_all_ranks(lookups, group)
    try:
        found = _checked_plan(model, mesh, plan, gradients, lookups)
        description = f"{gradients}, {found.kinds}, {found.owners}, {_describe(model)}"
    except (TypeError, ValueError) as problem:
        error = problem
    descriptions = raise_together(error, group, description=description)
    if different := [rank for rank, other in enumerate(descriptions) if other != descriptions[0]]:
        raise ValueError(
            f"model and plan must be the same on all ranks, got on rank 0: {descriptions[0]}; and on rank "
            f"{different[0]}: {descriptions[different[0]]}"
        )
    scale = 1 / mesh.size() if gradients == "mean" else 1.0
    replaced = {}
    for name, module in named_tables(model).items():
        replaced[id(module)] = _shard(name, module, found, mesh)
        replaced[id(module)].scale = scale
        replaced[id(module)].train(module.training)
    if id(model) in replaced:
        return replaced[id(model)]
    ignored = list(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
    for prefix, parent in list(model.named_modules(remove_duplicate=False)):
        for name, child in list(parent.named_children()):
            if id(child) in replaced:
                setattr(parent, name, replaced[id(child)])
                own = replaced[id(child)]
                ignored += [join(join(prefix, name), key) for key, _ in [*own.named_parameters(), *own.named_buffers()]]
    model._ddp_params_and_buffers_to_ignore = ignored
    return model


def _of_all_ranks(lookups: Mapping[str, Lookups] | None, group: dist.ProcessGroup) -> dict[str, Lookups] | None:
    """The mean of the ranks' counts; None if no rank has counts."""
    counted: list[Mapping[str, Lookups] | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(counted, lookups, group=group)
    found: dict[str, Lookups] = {}
    for name, each in ((name, each) for of_rank in counted for name, each in (of_rank or {}).items()):
        total = found.setdefault(name, Lookups())
        for field in ("calls", "lookups", "unique", "bags"):
            setattr(total, field, getattr(total, field) + getattr(each, field))
    return found or None


def _describe(model: nn.Module) -> str:
    """The description of the tables that ranks compare."""
    found = []
    for name, module in named_tables(model).items():
        optimizer = module.optimizer
        # A learning rate in a tensor has no fixed value.
        of = None if optimizer is None else (type(optimizer).__name__, optimizer.state_kinds())
        dtype = module.table.value_dtype if isinstance(module, DynamicEmbedding) else next(module.parameters()).dtype
        found.append((name, type(module).__name__, module.num_embeddings, module.embedding_dim, str(dtype), of))
    return repr(found)
