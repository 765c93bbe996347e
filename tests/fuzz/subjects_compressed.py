"""Tables in less memory, by hashes, codes, cores or masks, and the functions that they are made with."""

from __future__ import annotations

import torch
from draws import FLOATS, ids, loss, ragged, randn, size
from subjects_tables import bags, optimizer, trained

import gossamer
from gossamer import nn

TABLES = {
    nn.HashEmbedding: lambda rng, rows, dim: {"num_rows": size(rng, 1, 9)},
    nn.DoubleHashEmbedding: lambda rng, rows, dim: {"num_rows": size(rng, 1, 9), "seed": 3},
    nn.CompositionalEmbedding: lambda rng, rows, dim: {
        "moduli": rng.choice((None, [size(rng, 2, 9), rows])),
        "partition": rng.choice(("quotient_remainder", "mixed_radix", "path")),
        "operation": rng.choice((None, None, "add", "mul")),
    },
    nn.FrequencyEmbedding: lambda rng, rows, dim: {"num_rows": size(rng, 1, rows), "frequencies": ids(rng, 50, rows)},
    nn.ClusteredEmbedding: lambda rng, rows, dim: {"clusters": ids(rng, 5, rows), "double": rng.random() < 0.5},
    nn.RandomBlockEmbedding: lambda rng, rows, dim: {
        "num_weights": dim * size(rng, 1, 9),
        "block_size": dim,
        "wrap": rng.random() < 0.5,
    },
    nn.DeduplicatedEmbedding: lambda rng, rows, dim: {"stored": ids(rng, 1, -(-rows // 4)), "block_rows": 4},
    nn.SemanticIdEmbedding: lambda rng, rows, dim: {
        "codes": ids(rng, 4, rows, size(rng, 1, 3)),
        "num_codes": 4,
        "prefixes": rng.random() < 0.5,
    },
    nn.MixedDimensionEmbedding: lambda rng, rows, dim: {
        "row_dim": size(rng, 1, dim),
        "wide_rows": rng.choice((0, size(rng, 1, rows))),
    },
    nn.TensorTrainEmbedding: lambda rng, rows, dim: {"ranks": (size(rng, 1, 4), size(rng, 1, 4))},
    nn.MaskedEmbedding: lambda rng, rows, dim: {"width": rng.choice((None, size(rng, 1, dim)))},
    nn.PrunedEmbedding: lambda rng, rows, dim: {
        "density": rng.choice((1.0, 0.3)),
        "criterion": rng.choice(("magnitude", "thresholds")),
        "initial_threshold": -3.0,
    },
    nn.ProductQuantizedEmbedding: lambda rng, rows, dim: {
        "num_codes": size(rng, 2, 5),
        "num_parts": rng.choice([p for p in (1, 2, 4) if dim % p == 0]),
        "variant": rng.choice(("vq", "sx")),
    },
    nn.SearchedDimensionEmbedding: lambda rng, rows, dim: {"candidates": sorted({1, dim}), "noise": False},
    nn.DeepHashEmbedding: lambda rng, rows, dim: {"hidden_size": 5, "num_hashes": size(rng, 1, 9), "num_layers": 2},
}


def compressed(rng):
    """Two training steps and a lookup of one table."""
    kind, rows, dim = rng.choice(sorted(TABLES, key=lambda kind: kind.__name__)), size(rng, 2), size(rng, 1, 12)
    lists, count = bags(rng, rows)
    lists = {"ids": lists["index"], "offsets": None if lists["offsets"] is None else lists["offsets"][:-1]}
    args = {"num_embeddings": rows, "embedding_dim": dim, **TABLES[kind](rng, rows, dim)}
    args |= {"mode": rng.choice(("sum", "mean")), "dtype": rng.choice((None, torch.float64))}
    if kind is nn.DeepHashEmbedding:
        args["norm"] = "layer"
    else:
        args["optimizer"] = rng.choice((None, optimizer(rng)))
    if args["mode"] == "sum" and count and rng.random() < 0.3:
        lists["per_sample_weights"] = randn(rng, *lists["ids"].shape, dtype=args["dtype"])
    return trained(kind, ("ids", "offsets", "per_sample_weights")), args | lists


def frozen(rng):
    """What a table looks up once it is frozen, by ids that it was not trained with."""
    kind, rows, dim = rng.choice(sorted(TABLES, key=lambda kind: kind.__name__)), size(rng, 2), size(rng, 1, 12)

    def call(ids, **args):
        table = kind(**args).eval()
        table.freeze()
        with torch.no_grad():
            return table.lookup(ids), torch.tensor(table.inference_nbytes())

    call.__qualname__ = f"{kind.__name__}.freeze"
    call.signature = ["index", "weight"]
    args = {"num_embeddings": rows, "embedding_dim": dim, **TABLES[kind](rng, rows, dim)}
    return call, args | {"ids": ids(rng, rows, *rng.choice(((size(rng, 0),), (2, 3), ())))}


def gather_dot(rng):
    rows, dim, count, dtype = size(rng), size(rng), size(rng, 0), rng.choice(FLOATS)
    args = {"table": randn(rng, rows, dim, dtype=dtype), "x": randn(rng, count, dim, dtype=dtype)}
    if rng.random() < 0.5:
        args |= {"index": ids(rng, rows, count, size(rng, 1, 6)), "offsets": None}
    else:
        args["offsets"] = ragged(rng, count, 5)
        args["index"] = ids(rng, rows, int(args["offsets"][-1]))
    args |= {"padding_idx": rng.choice((None, 0, -1)), "bounds": rng.choice(("raise", "clamp", "drop"))}
    return gossamer.gather_dot, args


def product_keys(rng):
    keys = size(rng)
    args = {"scores1": randn(rng, size(rng, 0), keys, dtype=rng.choice((torch.float32, torch.float64)))}
    args["scores2"] = randn(rng, *args["scores1"].shape, dtype=args["scores1"].dtype)
    return gossamer.product_key_topk, args | {"top_k": rng.randint(1, min(keys**2, 9))}


def mapped(rng):
    count = size(rng, 1, 4)
    args = {name: [rng.randint(1, 60) for _ in range(count)] for name in ("moduli", "divisors", "multipliers")}
    args |= {name: [rng.randint(0, 60) for _ in range(count)] for name in ("bases", "addends")}
    args |= {"prime": rng.choice((61, 2**31 - 1, 2**61 - 1)), "mixed": rng.random() < 0.3}
    args["limit"] = 0 if args["mixed"] else 200
    args |= {"ids": ids(rng, 200, size(rng, 0)).to(rng.choice((torch.int32, torch.int64)))}

    def call(ids, **maps):
        return gossamer.map_ids(ids, gossamer.IdMaps(**maps))

    call.__qualname__ = "map_ids"
    return call, args


def choices(rng):
    """Functions that tables and routers are made with."""
    rows, kind = size(rng, 2), rng.randrange(7)
    if kind == 0:
        codes = rng.randint(1, rows)
        return nn.balanced_kmeans, {"x": randn(rng, rows, size(rng)), "num_codes": codes, "steps": 3, "seed": 1}
    if kind == 1:
        args = {"num_embeddings": [size(rng) for _ in range(size(rng, 1, 4))], "base_dim": 8.0, "alpha": 0.3}
        return tensors_from(nn.mixed_dimensions), args | {"most": rng.choice((None, 4)), "powers": rng.random() < 0.5}
    if kind == 2:
        experts = size(rng, 1, 6)
        args = {"frequencies": ids(rng, 50, rows), "num_experts": experts, "top_k": rng.randint(1, min(2, experts))}
        return nn.frequency_table, args | {"seed": 2}
    if kind == 3:
        return nn.unique_codes, {"codes": ids(rng, 4, rows, size(rng, 1, 3))}
    if kind == 4:
        return nn.resize_clusters, {"clusters": ids(rng, 9, rows), "count": rng.randint(1, rows)}
    if kind == 5:
        return widths, {"nbytes": rng.randint(600, 3000), "num_embeddings": rows, "embedding_dim": size(rng, 1, 9)}
    shapes = [(32 * size(rng), 32 * size(rng)) for _ in range(size(rng, 1, 3))]
    return tensors_from(nn.erk_densities), {"shapes": shapes, "density": rng.choice((0.1, 1.0))}


def widths(nbytes, num_embeddings, embedding_dim):
    """The widths of two tables that search."""
    tables = [nn.SearchedDimensionEmbedding.from_budget(num_embeddings, embedding_dim, nbytes) for _ in range(2)]
    return torch.tensor(nn.choose_widths(tables, nbytes))


# What the tables call their sizes.
widths.signature = ["num_embeddings", "embedding_dim"]
widths.fixed = ("rows",)


def searched_widths(rng):
    """Tables of widths that evolution finds."""
    rows, dim = size(rng, 2), size(rng, 1, 9)
    torch.manual_seed(2)
    tables = [nn.MaskedEmbedding(rows, dim) for _ in range(size(rng, 1, 3))]
    args = {"tables": tables, "rounds": size(rng, 1, 3), "keep": size(rng, 1, 3), "mutations": size(rng, 1, 3)}
    args |= {"crossovers": size(rng, 1, 3), "mutation_probability": 0.3, "seed": 3}
    args |= {"nbytes": rng.choice((None, 4 * rows * dim * len(tables))), "score": lambda: -sum(t.width for t in tables)}

    def call(**args):
        before = [table.width for table in tables]
        try:
            return torch.tensor(nn.search_widths(**args))
        except ValueError:
            if [table.width for table in tables] != before:
                raise AssertionError("an error left the tables changed") from None
            raise

    call.__qualname__ = "search_widths"
    # Many generations are many, whatever they cost.
    call.fixed = ("rounds", "keep", "mutations", "crossovers")
    return call, args


def _parts(rng, ids_known, dim, count, limit_rows):
    """Maps of ids to rows of one table or of a part each, or codes, as :class:`gossamer.Parts`; and the rows needed."""
    moduli = [rng.randint(1, limit_rows) for _ in range(count)]
    bases = [sum(moduli[:part]) for part in range(count)]
    divisors = [rng.randint(1, 3) for _ in range(count)]
    maps = gossamer.IdMaps.of(moduli, divisors=divisors, bases=bases, limit=ids_known)
    more = {}
    if rng.random() < 0.4:
        coded = count
        codes = torch.stack([ids(rng, modulus, ids_known) for modulus in moduli], 1).int()
        more = {"coded": coded, "codes": codes, "bits": [32]}
    return maps, more, sum(moduli)


def _lists(rng, known):
    """Lists of ids below ``known``, behind offsets or not, with weights or without."""
    lists, _ = bags(rng, known)
    found = {"ids": lists["index"], "offsets": lists["offsets"], "mode": rng.choice(("sum", "mean"))}
    return found | {"weights": rng.choice((None, randn(rng, *lists["index"].shape)))}


def _composed(make, operation):
    """A call that takes the fields of the parts one by one."""

    def call(dim, operation, maps, coded, codes, rare, bits, block, wrap, **args):
        parts = gossamer.Parts(dim, operation, maps, coded, codes, rare, bits, block, wrap)
        return make(parts=parts, **args)

    call.__qualname__ = operation
    # Of the step: what products of factors and gradients are checked as.
    call.signature = ["parts", "index"]
    return call


def _fields(parts):
    return dict(zip(parts._fields, parts, strict=True))


def gather_compose(rng):
    """Vectors of several rows, pooled; or a step on the rows."""
    known, columns, count, dtype = size(rng, 2), size(rng, 1, 9), rng.randint(1, 3), rng.choice(FLOATS)
    operation = rng.choice(("add", "mul", "concat"))
    maps, more, rows = _parts(rng, known, columns, count, 8)
    dim = columns * count if operation == "concat" else columns
    args = {"table": randn(rng, rows, columns, dtype=dtype), **_lists(rng, known)}
    args |= _fields(gossamer.Parts.of(dim, operation, maps, **more))
    args["out_dtype"] = rng.choice((None, torch.float32))
    if rng.random() < 0.5:
        return differentiated(_composed(gossamer.gather_compose, "gather_compose")), args
    made = optimizer(rng)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    args |= {"optimizer": made, "state": made.state(rows, columns, dtype=wide)}
    step = _composed(gossamer.gather_compose_step, "gather_compose_step")

    def call(**args):
        handle = torch.ones((), requires_grad=True)
        y = step(**args, handle=handle)
        if y.requires_grad and y.numel() and not y.is_meta:
            loss(y).backward()
        return y.detach(), args["table"], *args["state"].values()

    call.__qualname__ = "gather_compose_step"
    call.signature = [*step.signature, "weights", "table"]
    return call, args


def gather_matmul(rng):
    """Products of two matrices of each id, pooled."""
    known, dtype = size(rng, 2), rng.choice(FLOATS)
    m, inner, n = rng.randint(1, 4), rng.randint(1, 5), rng.randint(1, 6)
    maps, more, _ = _parts(rng, known, 1, 2, 6)
    moduli = list(maps.moduli)
    maps = gossamer.IdMaps.of(moduli, divisors=list(maps.divisors), limit=known)
    args = {
        "left": randn(rng, moduli[0], m * inner, dtype=dtype),
        "right": randn(rng, moduli[1], inner * n, dtype=dtype),
    }
    args |= {"inner": inner, **_lists(rng, known), **_fields(gossamer.Parts.of(m * n, "matmul", maps, **more))}
    return differentiated(_composed(gossamer.gather_matmul, "gather_matmul")), args


def differentiated(call):
    """The call's result and its gradients in all floating tensors, some of which are strided or expanded."""

    def both(**args):
        given = {}
        for name, value in args.items():
            wanted = isinstance(value, torch.Tensor) and value.is_floating_point() and value.layout is torch.strided
            given[name] = value.detach().requires_grad_() if wanted else value
        y = call(**given)
        leaves = [value for value in given.values() if isinstance(value, torch.Tensor) and value.requires_grad]
        if not y.requires_grad or y.is_meta or not y.isfinite().all():
            return (y.detach(),)
        gradients = torch.autograd.grad(loss(y), leaves, allow_unused=True)
        return y.detach(), *(g for g in gradients if g is not None)

    both.__qualname__ = call.__qualname__
    both.signature = call.signature
    return both


def tensors_from(function):
    """The function, whose list of numbers becomes a tensor."""

    def call(**args):
        return torch.tensor(function(**args))

    call.__qualname__ = function.__name__
    return call


SUBJECTS = (
    compressed,
    compressed,
    frozen,
    gather_compose,
    gather_compose,
    gather_matmul,
    gather_dot,
    product_keys,
    mapped,
    searched_widths,
    choices,
)
