"""Conversions of small models, code written for ScatterMoE and MegaBlocks, steps on tables, schedules and clusters."""

from __future__ import annotations

import torch
from draws import ids, randn, size
from subjects_modules import routing
from subjects_tables import bags, jagged, layout_of, optimizer

import gossamer
from gossamer import nn, testing
from gossamer.integrations import scattermoe
from gossamer.integrations.megablocks import ops


class Model(torch.nn.Module):
    """A table and two linear layers, one of them no multiple of a block."""

    def __init__(self, rows: int, hidden: int) -> None:
        super().__init__()
        self.table = torch.nn.EmbeddingBag(rows, hidden, mode="sum")
        self.up, self.down = torch.nn.Linear(hidden, 64), torch.nn.Linear(64, hidden)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """``(B, J)`` ids to ``(B, H)``."""
        x = self.table(ids)
        return x + self.down(torch.relu(self.up(x)))


def converted(rng):
    """A model sparsified or with compressed tables, and restored."""
    rows, hidden = size(rng, 8), 16 * size(rng, 1, 2)

    def call(convert, ids, **args):
        model = Model(rows, hidden)
        before = model(ids)
        made = convert(model, **args)
        with torch.no_grad():
            after = [model(ids)]
            if any(isinstance(module, gossamer.nn.BlockSparseLinear) for module in model.modules()):
                gossamer.restore(model)
            elif any(isinstance(module, gossamer.nn.Table) for module in model.modules()):
                gossamer.freeze_embeddings(model)
                after.append(model(ids))
        return before.detach(), *after, torch.tensor([made is not None])

    call.fixed = ("convert", "ids")
    args = {"ids": ids(rng, rows, size(rng, 1), size(rng, 1, 4))}
    if rng.random() < 0.5:
        call.__qualname__ = "sparsify"
        args |= {"convert": gossamer.sparsify, "density": rng.choice((0.3, 1.0)), "block": rng.choice((16, (16, 32)))}
        args |= {
            "include": rng.choice((None, "up")),
            "exclude": (),
            "criterion": "magnitude",
            "distribution": "uniform",
        }
        return call, args
    call.__qualname__ = "compress_embeddings"
    call.signature = ["nbytes"]
    args |= {
        "convert": gossamer.compress_embeddings,
        "method": rng.choice(("hash", "double_hash", "quotient_remainder")),
    }
    return call, args | {"budget": 0.5, "min_rows": 2, "keep_original": rng.random() < 0.5}


def parallel_linear(rng):
    t, c, n, e = size(rng, 0), size(rng), size(rng), size(rng, 1, 6)
    k = rng.randint(1, min(2, e))
    experts, slots, offsets = scattermoe.flatten_sort_count(ids(rng, e, t, k), num_experts=e)
    grouped_in, gates = rng.random() < 0.3, rng.choice((None, randn(rng, t, k)))
    args = {"inputs": randn(rng, t * k if grouped_in else t, c), "expert_weights": randn(rng, e, c, n), "k": k}
    args |= {"sorted_expert_idxs": experts, "sorted_scattered_idxs": slots, "expert_offsets": offsets}
    args |= {"expert_biases": rng.choice((None, randn(rng, e, n))), "gates": gates, "grouped_in": grouped_in}
    args["grouped_out"] = gates is None and rng.random() < 0.3

    def call(**args):
        return scattermoe.parallel_linear(**args)

    call.__qualname__ = "parallel_linear"
    call.signature = ["x", "weight"]  # what the product calls its operands
    return call, args


def megablocks(rng):
    """Rows gathered by expert and scattered back."""
    t, h, e = size(rng, 0), size(rng), size(rng, 1, 6)
    k = rng.randint(1, min(2, e))
    bin_ids, indices = ops.sort(ids(rng, e, t * k).int())
    bins = ops.inclusive_cumsum(ops.histogram(bin_ids, e), 0)
    padded = ops.inclusive_cumsum(ops.round_up(ops.histogram(bin_ids, e), 16), 0)
    args = {"x": randn(rng, t, h), "indices": indices, "bin_ids": bin_ids, "bins": bins, "top_k": k}
    kind = rng.randrange(6)
    weights = rng.choice((None, randn(rng, t * k)))
    if kind == 0:
        return ops.gather, args
    if kind == 1:
        return ops.scatter, args | {"x": randn(rng, t * k, h), "weights": weights}
    if kind == 2:
        return ops.padded_gather, args | {"padded_bins": padded}
    if kind == 3:
        args |= {"x": randn(rng, int(padded[-1]), h), "weights": weights, "padded_bins": padded}
        return ops.padded_scatter, args
    args.pop("bin_ids")
    if kind == 4:
        return ops.binned_gather, args | {"bin_size": max(t, 1)}
    return ops.binned_scatter, args | {"x": randn(rng, e, max(t, 1), h), "weights": weights}


def padded_places(rng):
    """The rows of a dispatch in a topology, either of them put together by hand."""
    t, e = size(rng, 0), size(rng, 1, 6)
    dispatch = gossamer.dispatch(ids(rng, e + 1, t, rng.randint(1, e)), e)
    topology = gossamer.BlockTopology.from_dispatch(dispatch, 16 * size(rng, 1, 2), 16)

    def call(topology, dispatch):
        return gossamer.BlockTopology.padded_places(topology, dispatch)

    call.__qualname__ = "padded_places"
    call.fixed = () if rng.random() < 0.5 else ("topology",)
    return call, {"topology": topology, "dispatch": dispatch}


def steps(rng):
    """A product or a pooling whose backward pass steps the table."""
    rows, dim, made = size(rng), size(rng), optimizer(rng)
    if rng.random() < 0.3:
        return table_steps(rng, made)
    lists, count = bags(rng, rows)
    args = {"table": randn(rng, rows, dim), **lists, "optimizer": made, "state": made.state(rows, dim)}
    args |= {"padding_idx": rng.choice((None, 0)), "bounds": rng.choice(("raise", "drop"))}
    dot = rng.random() < 0.5
    if dot:
        args["x"] = randn(rng, count, dim)

    def call(**args):
        handle = torch.ones((), requires_grad=True)
        y = (gossamer.gather_dot_step if dot else gossamer.gather_reduce_step)(**args, handle=handle)
        if y.numel():
            y.square().sum().backward()
        return y.detach(), args["table"], *args["state"].values()

    call.__qualname__ = "gather_dot_step" if dot else "gather_reduce_step"
    call.signature = ["weights"]  # of the step: the products' gradients, which may be NaN
    return call, args


def table_steps(rng, made):
    """A lookup in many tables whose backward pass steps them."""
    layout = layout_of(rng)
    index, offsets, _ = jagged(rng, layout)
    args = {"storage": randn(rng, layout.num_elements), "layout": layout, "index": index, "offsets": offsets}
    args |= {"weights": rng.choice((None, randn(rng, index.numel()))), "bounds": rng.choice(("raise", "drop"))}
    args |= {"handle": torch.ones((), requires_grad=True), "optimizer": made, "state": layout.state(made)}

    def call(**args):
        y = gossamer.gather_reduce_tables_step(**args)
        if y.numel() and y.requires_grad:
            y.square().sum().backward()
        return y.detach(), args["storage"].detach(), *args["state"].values()

    call.__qualname__ = "gather_reduce_tables_step"
    call.signature = ["weights"]  # of the step: the products' gradients, which may be NaN
    return call, args


def schedules(rng):
    kind = rng.randrange(7)
    if kind == 0:
        args = {"first": 0.3, "last": 0.0, "until": size(rng, 1, 50), "step": rng.randint(0, 60)}

        def call(step, **args):
            return torch.tensor(nn.CosineSchedule(**args).density(step))

        call.__qualname__ = "CosineSchedule"
        return call, args
    if kind == 1:
        count, users, items = size(rng, 1, 30), size(rng, 1, 9), size(rng, 1, 9)
        args = {"users": ids(rng, users, count), "items": ids(rng, items, count), "num_users": users}
        args |= {"num_items": items, "max_clusters": rng.choice((None, 2)), "seed": 1}
        return nn.graph_clusters, args
    if kind == 2:
        args = {"vectors": randn(rng, size(rng, 2), size(rng, 2, 12)), "embedding_dim": 2, "seed": 1}
        args |= {"select": rng.choice(("variance", "random")), "standardize": rng.random() < 0.5}
        return nn.init.from_text_embeddings, args
    if kind == 3:
        return semantic(rng)
    if kind == 4:
        return ids_of_experts(rng)
    if kind == 5:
        args = {"value": 0.5, "step": size(rng, 0, 9)}

        def constant(value, step):
            return torch.tensor(nn.ConstantSchedule(value).density(step))

        constant.__qualname__ = "ConstantSchedule"
        return constant, args
    t, e = size(rng, 0), size(rng, 1, 4)
    first, second = routing(rng, t, e, rng.randint(1, e)), routing(rng, t, 2, 1)
    return nn.product_routing, {"first": first, "second": second}


def semantic(rng):
    """Codes of vectors, and the vectors of codes."""
    dim, levels, codes = size(rng, 1, 6), size(rng, 1, 3), size(rng, 1, 5)
    args = {"dim": dim, "num_levels": levels, "num_codes": codes, "commitment": 0.25, "x": randn(rng, size(rng), dim)}
    args |= {"steps": size(rng, 1, 4), "seed": 2, "balanced": rng.random() < 0.5, "codes": ids(rng, codes, 3, levels)}

    def call(x, codes, steps, seed, balanced, **options):
        made = nn.ResidualQuantizer(**options)
        if not made.codebooks.is_meta:
            made.fit(x, steps=steps, seed=seed, balanced=balanced)
            made.reseed_dead_codes(x, seed=seed)
        found = made(x)
        return found.codes, found.values.detach(), found.loss.detach(), made.decode(codes).detach()

    call.__qualname__ = "ResidualQuantizer"
    return call, args


def ids_of_experts(rng):
    """Random routings for tests."""
    e = size(rng, 1, 6)
    args = {"num_tokens": size(rng, 0), "num_experts": e, "top_k": rng.randint(1, e), "seed": 1}
    args |= {"skew": rng.choice(("uniform", "zipf", "one", "few")), "dropped": rng.choice((0.0, 0.5))}
    return testing.random_expert_ids, args | {"popularity": rng.choice((None, torch.rand(e) + 0.1))}


SUBJECTS = (converted, parallel_linear, megablocks, padded_places, steps, schedules)
