"""Experts and tables divided over a mesh, which here is of one process."""

from __future__ import annotations

import contextlib
import copy
import tempfile
from pathlib import Path

import torch
from draws import ids, loss, ragged, randn, size
from subjects_modules import routing
from subjects_tables import optimizer
from torch import distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh

from gossamer import nn, parallel


@contextlib.contextmanager
def alone():
    """A mesh of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,), mesh_dim_names=("all",))
    finally:
        dist.destroy_process_group()


def divided_experts(rng):
    """A layer's result and gradients, divided and whole again."""
    e, h, t = size(rng, 1, 6), size(rng, 1, 16), size(rng, 0)
    layer = nn.Experts(e, h, 8, bias=rng.random() < 0.5)
    args = {"module": layer, "dim": rng.choice((None, "all")), "exchange": rng.choice(("exact", "static"))}
    args |= {"tensor": None, "replicate": None, "overflow": rng.choice(("drop", "raise")), "gradients": "mean"}
    args |= {"capacity": None if args["exchange"] == "exact" else rng.choice((t + 1, [t + 1]))}
    args |= {"overlap": rng.random() < 0.3, "x": randn(rng, t, h), "routing": routing(rng, t, e, rng.randint(1, e))}

    def call(module, x, routing, **options):
        module = copy.deepcopy(module)
        with alone() as mesh:
            parallel.shard_experts(module, mesh, **options)
            try:
                y = module(x, routing)
                gradients = []
                if y.requires_grad and not y.is_meta:
                    loss(y).backward()
                    gradients = [p.grad.full_tensor() for p in module.parameters() if p.grad is not None]
                counts = torch.tensor(list(parallel.check_overflow(module).values()))
            except RuntimeError as error:
                if "capacity must hold all rows" not in str(error):
                    raise
                raise ValueError(str(error)) from None  # what overflow="raise" asks for
            finally:
                module.zero_grad()
                parallel.gather_experts(module)
            again = module(x, routing)
            # Zero times an infinity is no part of an exchange, which leaves absent slots out.
            # A dispatch that is there already may be of other ids.
            if (
                not counts.any()
                and routing.dispatch is None
                and y.isfinite().all()
                and again.isfinite().all()
                and not torch.allclose(y, again, 1e-3, 1e-4)
            ):
                raise AssertionError("experts that were divided give another result")
        return y.detach(), counts, *gradients

    call.__qualname__ = "shard_experts"
    call.signature = ["expert_ids", "weights", "mesh"]
    return call, args


class Model(torch.nn.Module):
    """A bag and a table."""

    def __init__(self, rows: int, dim: int, mode: str, step: object) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(rows, dim, mode=mode, optimizer=step)
        self.table = nn.Embedding(rows, dim, optimizer=step)


def divided_tables(rng):
    """A lookup of two tables and a step, divided."""
    rows, dim = size(rng, 1, 20), size(rng, 1, 9)
    kinds = ("row", "table", "column", "replicate")
    model = Model(rows, dim, rng.choice(("sum", "mean")), rng.choice((None, optimizer(rng))))
    plan = rng.choice(("auto", {"bag": rng.choice(kinds), "table": rng.choice(kinds)}))
    args = {"model": model, "plan": plan, "dim": rng.choice((None, "all")), "gradients": rng.choice(("mean", "sum"))}
    offsets, together = ragged(rng, size(rng, 0, 4), 3), rng.random() < 0.5
    args |= {"lookups": None, "offsets": offsets[:-1], "ids": ids(rng, rows, int(offsets[-1]))}

    def call(model, ids, offsets, **options):
        model = copy.deepcopy(model)
        with alone() as mesh:
            parallel.shard_tables(model, mesh, **options)
            found = (
                parallel.lookup(dict(model.named_children()), {"bag": (ids, offsets), "table": ids})
                if together
                else None
            )
            y = [model.bag(ids, offsets), model.table(ids)] if found is None else list(found.values())
            if any(part.requires_grad and part.numel() for part in y):
                sum(loss(part) for part in y if part.requires_grad).backward()
            return tuple(part.detach() for part in y)

    call.__qualname__ = "shard_tables"
    call.signature = ["input", "index", "weights", "mesh"]
    return call, args


def planned(rng):
    """Where tables would go."""
    rows, dim = size(rng, 1, 20), size(rng, 1, 9)
    lookups = {"bag": parallel.Lookups(2, 40, 30, 8), "table": parallel.Lookups(1, 9, 3, 9)}
    args = {"model": Model(rows, dim, "sum", None), "world": size(rng, 1, 9), "lookups": rng.choice((None, lookups))}

    def call(**args):
        plan = parallel.plan_tables(**args)
        return torch.tensor(plan.rank_nbytes()), torch.tensor(len(str(plan)) > 0)

    call.__qualname__ = "plan_tables"
    return call, args


def checkpoints(rng):
    """What a checkpoint holds, loaded into another layer."""
    h = size(rng, 1, 9)
    args = {"state": {"layer": torch.nn.Linear(h, h), "beside": randn(rng, 3)}, "info": rng.choice((None, {"step": 4}))}
    args |= {"keep": size(rng, 1, 3), "older": 0, "times": rng.randint(0, 2)}

    def call(state, info, keep, older, times):
        with alone(), tempfile.TemporaryDirectory() as root:
            try:
                for _ in range(times):
                    parallel.save_checkpoint(state, Path(root, "run"), info=info, keep=keep)
                found = parallel.load_checkpoint(state, Path(root, "run"), older=older)
            except CheckpointException as error:
                raise ValueError(f"state: {error}") from None  # torch's own, of what cannot be written
        return torch.tensor(found is None)

    call.__qualname__ = "save_checkpoint"
    call.fixed = ("times",)
    return call, args


def folders(rng):
    """Checkpoints and deltas of one process of several."""
    layer = nn.DynamicEmbedding(3, capacity=16, pooling=None)
    args = {
        "keep": size(rng, 1, 3),
        "older": 0,
        "ids": ids(rng, 50, size(rng, 0, 8)),
        "info": rng.choice((None, {"a": 1})),
    }

    def call(keep, older, ids, info):
        with alone() as mesh, tempfile.TemporaryDirectory() as root:
            holder = torch.nn.ModuleDict({"users": copy.deepcopy(layer)})
            parallel.shard_tables(holder, mesh)
            folder = parallel.ShardedEmbeddingFolder(Path(root, "run"), dict(holder.items()), keep=keep)
            for table in holder.values():
                table(ids)
            folder.save(None, info)
            folder.load(older=older)
            return torch.tensor(folder.export_delta())

    call.__qualname__ = "ShardedEmbeddingFolder"
    call.signature = ["model"]
    return call, args


def counted(rng):
    """Norms of gradients, and counts of lookups and of rows beyond a capacity."""
    rows, dim, kind = size(rng, 1, 20), size(rng, 1, 9), rng.randrange(3)
    if kind == 0:
        args = {"parameters": [randn(rng, dim), randn(rng, rows, dim)], "max_norm": rng.choice((0.5, 100.0))}

        def clip(parameters, max_norm):
            given = parameters if isinstance(parameters, list) else [parameters]
            given = [parameter for parameter in given if isinstance(parameter, torch.Tensor)]
            for parameter in given:
                parameter.grad = parameter.detach().clone()
            norm = parallel.clip_grad_norm_(parameters, max_norm)
            return norm, *(parameter.grad for parameter in given)

        clip.__qualname__ = "clip_grad_norm_"
        return clip, args
    if kind == 1:
        lists = ids(rng, rows, size(rng, 0, 4), size(rng, 1, 3))

        def measure(model):
            with parallel.measure_lookups(model) as found:
                model.bag(lists)
            return torch.tensor(found["bag"].calls)

        measure.__qualname__ = "measure_lookups"
        return measure, {"model": Model(rows, dim, "sum", None)}

    def overflow(module):
        with alone() as mesh:
            if isinstance(module, nn.Experts):
                module = copy.deepcopy(module)
                parallel.shard_experts(module, mesh)
            return torch.tensor(list(parallel.overflow_counts(module).values()))

    overflow.__qualname__ = "overflow_counts"
    return overflow, {"module": nn.Experts(2, 4, 8)}


SUBJECTS = (divided_experts, divided_tables, planned, checkpoints, folders, counted)
