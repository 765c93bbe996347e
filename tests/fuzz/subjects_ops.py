"""Primitives: products, dispatch, block-sparse products and topologies, quantisation, reductions over bags."""

from __future__ import annotations

from draws import FLOATS, ids, ragged, randn, size

import gossamer
from gossamer import BlockSparseTensor, BlockTopology


def low_rank(rng):
    m, n, c = size(rng, 0), size(rng), size(rng)
    r, dtype = rng.randint(1, min(n, c)), rng.choice(FLOATS)
    weight = randn(rng, n, c, dtype=dtype)
    kind = rng.choice((None, None, gossamer.NF4Weight, gossamer.Int8Weight, gossamer.Float8Weight))
    factor = rng.choice((dtype, None))
    args = {"x": randn(rng, m, c, dtype=dtype), "weight": weight if kind is None else kind.quantize(weight)}
    args |= {
        "a": randn(rng, r, c, dtype=factor),
        "b": randn(rng, n, r, dtype=factor),
        "scale": rng.choice((0.5, 1, -2.0)),
    }
    bias = randn(rng, n, dtype=dtype) if rng.random() < 0.5 else None
    return gossamer.low_rank_linear, args | {"bias": bias, "dropout": rng.choice((0.0, 0.3)), "seed": 5}


def multi_low_rank(rng):
    m, n, c, adapters = size(rng, 0), size(rng), size(rng), size(rng, 1, 5)
    r = rng.randint(1, min(n, c))
    args = {"x": randn(rng, m, c), "a": randn(rng, adapters, r, c), "b": randn(rng, adapters, n, r)}
    routing = ids(rng, adapters + 1, m) - 1
    args["adapter_ids"] = gossamer.adapter_dispatch(routing, adapters) if rng.random() < 0.5 else routing
    args["scale"] = rng.choice((1.0, randn(rng, adapters).abs()))
    args["ranks"] = rng.choice((None, ids(rng, r + 1, adapters)))
    if rng.random() < 0.5:
        return gossamer.multi_low_rank, args | {"out": rng.choice((None, randn(rng, m, n)))}
    return gossamer.multi_low_rank_linear, args | {
        "weight": randn(rng, n, c),
        "bias": rng.choice((None, randn(rng, n))),
    }


def dispatch(rng):
    experts = size(rng, 1, 9)
    expert_ids = ids(rng, experts + 1, size(rng, 0), rng.randint(1, experts))
    return gossamer.dispatch, {"expert_ids": expert_ids, "num_experts": experts, "max_rows": rng.choice((None, 1000))}


def expert_weight(rng, experts, n, c, dtype):
    """A stack of weights, half of the time in few bits; ``c`` must be a multiple of 32 for some formats."""
    weight = randn(rng, experts, n, c, dtype=dtype)
    if rng.random() < 0.6:
        return weight
    formats = ("fp8", "fp8_block", "int8") if c % 32 else ("fp8", "fp8_block", "int8", "int4", "mxfp4")
    return gossamer.QuantizedExpertWeight.quantize(weight.float(), rng.choice(formats))


def grouped_matmul(rng):
    t, n, c, experts = size(rng, 0), size(rng), rng.choice((size(rng), 32, 64)), size(rng, 1, 6)
    routing = gossamer.dispatch(ids(rng, experts + 1, t, rng.randint(1, experts)), experts)
    dtype = rng.choice(FLOATS)
    args = {"x": randn(rng, t, c, dtype=dtype), "weight": expert_weight(rng, experts, n, c, dtype), "dispatch": routing}
    args["y_grouped"] = rng.random() < 0.3
    if rng.random() < 0.2:
        args |= {"x": randn(rng, routing.num_rows, c, dtype=dtype), "x_grouped": True}
    return gossamer.grouped_matmul, args | {"bias": rng.choice((None, randn(rng, experts, n, dtype=dtype)))}


def expert_mlp(rng):
    t, h, i, experts = size(rng, 0), rng.choice((size(rng), 32)), rng.choice((size(rng, 1, 20), 32)), size(rng, 1, 6)
    k, dtype = rng.randint(1, experts), rng.choice(FLOATS)
    args = {"x": randn(rng, t, h, dtype=dtype), "gate_up": expert_weight(rng, experts, 2 * i, h, dtype)}
    args |= {"down": expert_weight(rng, experts, h, i, dtype), "weights": randn(rng, t, k, dtype=dtype)}
    args["dispatch"] = gossamer.dispatch(ids(rng, experts + 1, t, k), experts)
    if rng.random() < 0.3:
        args |= {"gate_up_bias": randn(rng, experts, 2 * i, dtype=dtype), "down_bias": randn(rng, experts, h)}
    if rng.random() < 0.3:
        r = rng.randint(1, min(h, i))
        args["gate_up_lora"] = randn(rng, experts, r, h, dtype=dtype), randn(rng, experts, 2 * i, r, dtype=dtype)
        args["lora_scale"] = 0.5
    args |= {"activation": rng.choice(("swiglu", "geglu")), "interleaved": rng.random() < 0.3}
    return gossamer.expert_mlp, args


def block_sparse(rng):
    bm, bn = rng.choice((16, 32)), rng.choice((16, 32))
    rows, cols = bm * rng.randint(0, 4), bn * rng.randint(0, 4)
    topology = BlockTopology.random((rows, cols), (bm, bn), rng.random())
    if rng.random() < 0.3:
        topology, (rows, cols) = topology.transposed(), (cols, rows)
    n, activation = size(rng, 0), rng.choice((None, None, "relu", "silu"))
    values = randn(rng, topology.nnz_blocks, *topology.block)
    kind = rng.randrange(3)
    if kind == 0:
        args = {"a": randn(rng, rows, n), "b": randn(rng, n, cols), "topology": topology}
        return gossamer.sdd, args | {"activation": activation}
    s = BlockSparseTensor(values, topology)
    dense = {"b": randn(rng, cols, n)} if kind == 1 else {"a": randn(rng, n, rows)}
    return (None, gossamer.dsd, gossamer.dds)[kind], {"s": s, **dense, "activation": activation}


def topologies(rng):
    bm, bn, rows, cols = rng.choice((16, 64)), rng.choice((16, 128)), rng.randint(0, 5), rng.randint(0, 5)
    mask = ids(rng, 2, rows, cols).bool()
    kind = rng.randrange(3)
    if kind == 0:
        return BlockTopology.from_mask, {"mask": mask, "block": (bm, bn), "nnz": rng.choice((None, rows * cols + 2))}
    if kind == 1:
        row, col = mask.nonzero().unbind(1)
        args = {"rows": row, "cols": col, "shape": (rows * bm, cols * bn), "block": (bm, bn)}
        return BlockTopology.from_indices, args | {"sort": rng.random() < 0.5}
    _, args = dispatch(rng)
    made = gossamer.dispatch(args["expert_ids"], args["num_experts"])
    return BlockTopology.from_dispatch, {"dispatch": made, "ffn_size": bn * rng.randint(1, 3), "block": (bm, bn)}


def quantised(rng):
    kind = rng.choice((gossamer.NF4Weight, gossamer.Int8Weight, gossamer.Float8Weight))
    options = (
        {"block_size": rng.choice((32, 64, 7)), "double": rng.random() < 0.5} if kind is gossamer.NF4Weight else {}
    )
    return kind.quantize, {"weight": randn(rng, size(rng), size(rng)), **options}


def quantised_experts(rng):
    weight = randn(rng, size(rng, 1, 4), size(rng), 32 * size(rng, 1, 4))
    args = {"weight": weight, "format": rng.choice(("fp8", "fp8_block", "int8", "int4", "mxfp4"))}
    return gossamer.QuantizedExpertWeight.quantize, args


def activate(rng):
    preact = randn(rng, size(rng, 0), 2 * size(rng), dtype=rng.choice(FLOATS))
    return gossamer.activate, {
        "preact": preact,
        "activation": rng.choice(("swiglu", "relu", "geglu", "clamped_swiglu")),
    }


def gather_reduce(rng):
    rows, bags = size(rng), size(rng, 0)
    table, mode = randn(rng, rows, size(rng), dtype=rng.choice(FLOATS)), rng.choice(("sum", "mean", "max"))
    if rng.random() < 0.5:
        args = {"index": ids(rng, rows, bags, size(rng, 1, 6)), "offsets": None}
    else:
        offsets = ragged(rng, bags, 5)
        args = {"index": ids(rng, rows, int(offsets[-1])), "offsets": offsets}
    weights = None if mode == "max" else rng.choice((None, randn(rng, *args["index"].shape)))
    args |= {"weights": weights, "mode": mode, "bounds": rng.choice(("raise", "raise", "clamp", "drop"))}
    return gossamer.gather_reduce, {"table": table, **args, "padding_idx": rng.choice((None, 0, -1))}


# Gradients too are compared.
DIFFERENTIABLE = True
SUBJECTS = (
    low_rank,
    low_rank,
    multi_low_rank,
    dispatch,
    grouped_matmul,
    expert_mlp,
    block_sparse,
    block_sparse,
    topologies,
    quantised,
    quantised_experts,
    activate,
    gather_reduce,
)
