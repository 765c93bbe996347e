"""Tables in less memory, by hashes, codes, cores or masks, and the functions that they are made with."""

from __future__ import annotations

import torch
from draws import FLOATS, ids, ragged, randn, size
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
    nn.MixedDimensionEmbedding: lambda rng, rows, dim: {"row_dim": size(rng, 1, dim)},
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
    rows, kind = size(rng, 2), rng.randrange(5)
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
    shapes = [(32 * size(rng), 32 * size(rng)) for _ in range(size(rng, 1, 3))]
    return tensors_from(nn.erk_densities), {"shapes": shapes, "density": rng.choice((0.1, 1.0))}


def tensors_from(function):
    """The function, whose list of numbers becomes a tensor."""

    def call(**args):
        return torch.tensor(function(**args))

    call.__qualname__ = function.__name__
    return call


SUBJECTS = (compressed, compressed, frozen, gather_dot, product_keys, mapped, choices)
