"""Tables: hash tables, bags over one or many tables, fused optimizer steps, embedding layers."""

from __future__ import annotations

import torch
from draws import FLOATS, ids, loss, places, ragged, randn, size

import gossamer
from gossamer import nn, optim

OPTIMIZERS = (
    optim.SGD,
    optim.Adagrad,
    optim.RowwiseAdagrad,
    optim.Adam,
    optim.AdamW,
    optim.LAMB,
    optim.PartialRowwiseAdam,
    optim.FTRL,
)
TABLE_FLOATS = (torch.float32, torch.float32, torch.float16, torch.bfloat16)


def optimizer(rng, lr=0.1):
    """One of gossamer.optim, with options that all of them have."""
    kind = rng.choice(OPTIMIZERS)
    decay = 0.0 if kind is optim.FTRL else rng.choice((0.0, 0.1))
    return kind(lr=lr, weight_decay=decay, clip_norm=rng.choice((None, 0.5)))


def optimizers(rng):
    """The constructors themselves, whose numbers are the arguments."""
    kind = rng.choice(OPTIMIZERS)
    args = {"lr": rng.choice((0.1, torch.tensor([0.1]))), "clip_value": 1.0, "clip_norm": None}
    args["weight_decay"] = 0.0 if kind is optim.FTRL else 0.1
    args |= {"stochastic_rounding": rng.random() < 0.5, "seed": 3}
    if hasattr(kind, "betas") or kind in (optim.Adam, optim.AdamW, optim.LAMB):
        args["betas"] = (0.9, 0.99)
    if kind is optim.SGD:
        args |= {"momentum": rng.choice((0.0, 0.9)), "nesterov": False}

    def call(**args):
        made, table = kind(**args), torch.ones(4, 3)
        state = made.state(4, 3)
        gossamer.sparse_update_(table, torch.tensor([[1], [2]]), torch.ones(2, 3), optimizer=made, state=state)
        return table, *state.values()

    call.__qualname__ = kind.__name__
    return call, args


def unchanged_on_error(update, written):
    """A call of an update in place that returns what it wrote, and holds that an error leaves all of it as it was."""

    def call(**args):
        tensors = [t for t in written(args) if isinstance(t, torch.Tensor) and not t.is_meta and not t.is_sparse]
        before = [t.detach().clone() for t in tensors]
        try:
            update(**args)
        except (TypeError, ValueError, IndexError):
            for tensor, old in zip(tensors, before, strict=True):
                if not torch.equal(tensor.detach().nan_to_num(), old.nan_to_num()):
                    raise AssertionError("an error left its arguments changed") from None
            raise
        return tuple(tensors)

    call.__qualname__ = update.__name__
    return call


def _state_tensors(args, table):
    state = args["state"]
    return [args[table], *(state.values() if isinstance(state, dict) else ())]


def bags(rng, rows):
    """Lists of ids, as rectangles or behind offsets."""
    count = size(rng, 0)
    if rng.random() < 0.5:
        return {"index": ids(rng, rows, count, size(rng, 1, 5)), "offsets": None}, count
    offsets = ragged(rng, count, 4)
    return {"index": ids(rng, rows, int(offsets[-1])), "offsets": offsets}, count


def sparse_update(rng):
    rows, dim, made = size(rng), size(rng), optimizer(rng)
    dtype, mode = rng.choice(FLOATS), rng.choice(("sum", "mean", "max"))
    lists, count = bags(rng, rows)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    args = {"table": randn(rng, rows, dim, dtype=dtype), **lists, "dout": randn(rng, count, dim, dtype=wide)}
    args |= {"weights": rng.choice((None, randn(rng, *lists["index"].shape))) if mode != "max" else None, "mode": mode}
    args |= {"optimizer": made, "state": made.state(rows, dim, dtype=wide), "bounds": rng.choice(("raise", "drop"))}
    args["padding_idx"] = rng.choice((None, 0))
    return unchanged_on_error(gossamer.sparse_update_, lambda args: _state_tensors(args, "table")), args


def row_codes(rng):
    """Lookups in tables of codes, and steps on them."""
    rows, dim, codes = size(rng), size(rng), rng.choice((torch.int8, torch.int16))
    lists, count = bags(rng, rows)
    learned = rng.random() < 0.5
    args = {"table": ids(rng, 200, rows, dim).to(codes), "scale": randn(rng, rows if learned else 1).abs() + 0.1}
    args |= lists | {
        "weights": rng.choice((None, randn(rng, *lists["index"].shape))),
        "mode": rng.choice(("sum", "mean")),
    }
    args |= {"padding_idx": rng.choice((None, 0)), "bounds": rng.choice(("raise", "drop"))}
    if rng.random() < 0.5:
        return gossamer.gather_reduce, args | {"out_dtype": rng.choice((None, torch.float16))}
    # LAMB multiplies a row of one column by 1 - lr, which must not put codes halfway between two.
    made = optimizer(rng, 0.0937)
    args |= {"dout": randn(rng, count, dim), "optimizer": made, "state": made.state(rows, dim)}
    args["scale_lr"] = 0.1 if learned else 0.0

    def written(args):
        return [args["scale"], *_state_tensors(args, "table")]

    return unchanged_on_error(gossamer.sparse_update_, written), args


def quantized_embedding(rng):
    rows, dim = size(rng), size(rng)
    args = {"num_embeddings": rows, "embedding_dim": dim, "bits": rng.choice((8, 16))}
    args |= {
        "mode": rng.choice(("sum", "mean", "max")),
        "step": rng.choice(("fixed", "learned")),
        "step_size": rng.choice((None, 0.1)),
        "step_lr": 1e-6,
    }
    args |= {"rounding": rng.choice(("stochastic", "nearest")), "optimizer": rng.choice((None, optimizer(rng)))}
    args |= {"dtype": rng.choice((None, torch.float16, torch.bfloat16)), "include_last_offset": rng.random() < 0.5}
    offsets = ragged(rng, size(rng, 0), 4)
    inputs = {"ids": ids(rng, rows, int(offsets[-1]))}
    inputs["offsets"] = offsets if args["include_last_offset"] else offsets[:-1]
    if rng.random() < 0.4:
        inputs = {"ids": ids(rng, rows, size(rng, 0), size(rng, 1, 4)), "offsets": None}
    if args["mode"] == "sum" and rng.random() < 0.5:
        inputs["per_sample_weights"] = randn(rng, *inputs["ids"].shape)
    call = trained(nn.QuantizedEmbedding, ("ids", "offsets", "per_sample_weights"))
    # Gigabytes of bytes are a table like any other.
    call.fixed = ("num_embeddings", "embedding_dim")
    return call, args | inputs


def layout_of(rng):
    specs = [(size(rng, 0 if i else 1, 12), size(rng, 1, 9)) for i in range(rng.randint(1, 3))]
    features = rng.choice((None, [rng.randrange(len(specs)) for _ in range(rng.randint(1, 3))]))
    return gossamer.TableLayout(specs, features, rng.choice(("sum", "mean")))


def jagged(rng, layout):
    """Ids, offsets and the batch size over the features of a layout; features of empty tables get no ids."""
    batch = size(rng, 0, 6)
    lengths, found = [], []
    for table in layout.feature_table_map:
        rows = layout.specs[table][0]
        for _ in range(batch):
            lengths.append(rng.randint(0, 3) if rows else 0)
            found += [rng.randrange(rows) for _ in range(lengths[-1])]
    return torch.tensor(found, dtype=torch.int64), torch.tensor([0, *lengths]).cumsum(0), batch


def table_layouts(rng):
    def call(specs, feature_table_map, pooling, flat):
        layout = gossamer.TableLayout(specs, feature_table_map, pooling)
        return layout.views(flat)

    layout = layout_of(rng)
    call.__qualname__ = "TableLayout"
    args = {"specs": list(layout.specs), "feature_table_map": rng.choice((None, list(layout.feature_table_map)))}
    return call, args | {"pooling": list(layout.pooling), "flat": randn(rng, layout.num_elements)}


def many_tables(rng):
    layout, dtype = layout_of(rng), rng.choice(FLOATS)
    index, offsets, batch = jagged(rng, layout)
    args = {"storage": randn(rng, layout.num_elements, dtype=dtype), "layout": layout, "index": index}
    args |= {"offsets": offsets, "weights": rng.choice((None, randn(rng, index.numel())))}
    args["bounds"] = rng.choice(("raise", "clamp", "drop"))
    if rng.random() < 0.5:
        return gossamer.gather_reduce_tables, args
    made, wide = optimizer(rng), torch.float64 if dtype == torch.float64 else torch.float32
    args |= {"dout": randn(rng, batch, layout.total_dim, dtype=wide), "optimizer": made}
    args["state"] = layout.state(made, dtype=wide)
    return unchanged_on_error(gossamer.sparse_update_tables_, lambda args: _state_tensors(args, "storage")), args


def embedding_layers(rng):
    """Layers with and without a fused step, two training steps each."""
    rows, dim = size(rng), size(rng)
    made = rng.choice((None, optimizer(rng)))
    args = {"num_embeddings": rows, "embedding_dim": dim, "padding_idx": rng.choice((None, 0)), "optimizer": made}
    args["dtype"] = rng.choice((None, torch.float16, torch.bfloat16, torch.float64))
    args["sparse"] = made is None and rng.random() < 0.3
    if rng.random() < 0.3:
        return trained(nn.Embedding, ("input",)), args | {"input": ids(rng, rows, *rng.choice(((5,), (2, 3), (0,))))}
    mode = rng.choice(("sum", "mean", "max"))
    args |= {"mode": mode, "include_last_offset": rng.random() < 0.5, "sparse": args["sparse"] and mode != "max"}
    count = size(rng, 0)
    offsets = ragged(rng, count, 4)
    inputs = {"input": ids(rng, rows, int(offsets[-1]))}
    inputs["offsets"] = offsets if args["include_last_offset"] else offsets[:-1]
    if rng.random() < 0.4:
        inputs = {"input": ids(rng, rows, count, size(rng, 1, 4)), "offsets": None}
    if mode == "sum" and rng.random() < 0.5:
        inputs["per_sample_weights"] = randn(rng, *inputs["input"].shape, dtype=args["dtype"])
    return trained(nn.EmbeddingBag, ("input", "offsets", "per_sample_weights")), args | inputs


def batched_tables(rng):
    layout, made = layout_of(rng), rng.choice((None, optimizer(rng)))
    index, offsets, _ = jagged(rng, layout)
    args = {"specs": list(layout.specs), "feature_table_map": list(layout.feature_table_map)}
    args |= {"pooling": list(layout.pooling), "optimizer": made, "bounds": rng.choice(("raise", "clamp", "drop"))}
    args |= {"weights_dtype": rng.choice(TABLE_FLOATS), "output_dtype": rng.choice((None, torch.float32))}
    inputs = {"indices": index, "offsets": offsets, "per_sample_weights": rng.choice((None, randn(rng, index.numel())))}
    return trained(nn.TableBatchedEmbeddingBags, tuple(inputs)), args | inputs


def dynamic_embedding(rng):
    made = rng.choice((None, optimizer(rng)))
    args = {"dim": size(rng), "capacity": size(rng, 1, 60), "pooling": rng.choice(("sum", "mean", "max", None))}
    args |= {"optimizer": made, "evict": rng.choice(("lru", "lfu", None)), "dtype": rng.choice(TABLE_FLOATS)}
    args |= {"expire_after": rng.choice((None, 2)), "key_dtype": torch.int64, "seed": 3}
    args["admission"] = rng.choice(
        (None, nn.FrequencyAdmission(2), nn.FrequencyAdmission(2, 64, True), nn.ProbabilisticAdmission(3))
    )
    lists = {"ids": ids(rng, 50, size(rng, 0), 2) - 20}
    if args["pooling"] and rng.random() < 0.5:
        offsets = ragged(rng, size(rng, 0), 3)
        lists = {"ids": ids(rng, 50, int(offsets[-1])) - 20, "offsets": offsets}
    if args["pooling"] in ("sum", "mean") and rng.random() < 0.5:
        lists["weights"] = randn(rng, *lists["ids"].shape)
    return trained(nn.DynamicEmbedding, ("ids", "offsets", "weights")), args | lists


def trained(make, inputs):
    """Two training steps and a lookup of one layer, and what its tables hold afterwards."""

    def call(**args):
        given = {name: args.pop(name) for name in inputs if name in args}
        layer = make(**args)
        outputs = []
        for _ in range(2):
            y = layer(**given)
            outputs.append(y.detach())
            layer.zero_grad()
            if y.requires_grad:
                loss(y).backward()
        layer.eval()
        with torch.no_grad():
            outputs.append(layer(**given))
        kept = [t.detach() for t in layer.parameters() if t.numel()]
        kept += [p.grad.to_dense() for p in layer.parameters() if p.grad is not None and p.numel()]
        if isinstance(layer, nn.DynamicEmbedding):
            keys, values, scores = layer.table.export()
            order = keys.argsort()
            kept += [keys[order], values[order], scores[order]]
        return *outputs, *kept

    call.__qualname__ = make.__name__
    # What the primitives behind the layers call their inputs.
    call.signature = ["index", "table", "weights", "per_sample_weights", "capacity"]
    # As torch's own layers, whose constructors they are.
    call.places = places(make)
    call.errors = (AssertionError,) if issubclass(make, torch.nn.Embedding | torch.nn.EmbeddingBag) else ()
    return call


def hash_table(rng):
    """A sequence of operations on one table, and everything that they return."""
    policy = rng.choice(("lru", "lfu", "epoch_lru", "epoch_lfu", "score", None))
    capacity, dim, count = size(rng, 1, 300), size(rng, 1, 9), size(rng, 0, 80)
    key_dtype = rng.choice((torch.int64, torch.int32))
    scores = ids(rng, 100, count) if policy in ("score", "lfu", "epoch_lfu") else None
    value_dtype = rng.choice(TABLE_FLOATS)
    args = {"dim": dim, "capacity": capacity, "key_dtype": key_dtype, "value_dtype": value_dtype, "evict": policy}
    args |= {"keys": (ids(rng, 200, count) - 100).to(key_dtype), "scores": scores, "more": capacity + 7}
    args |= {"values": randn(rng, count, dim, dtype=value_dtype), "marks": None, "mark": 3}
    operations = [rng.choice(_HASH_OPERATIONS) for _ in range(rng.randint(1, 4))]

    def call(keys, values, scores, more, marks, mark, **made):
        table = gossamer.HashTable(**made)
        results = []
        for operation in operations:
            results.append(operation(table, keys, values, scores, more, marks, mark))
        return *results, *table.export(), torch.tensor(len(table))

    call.__qualname__ = "HashTable"
    call.signature = ["capacity", "rows", "array", "device", "evict"]
    return call, args


_HASH_OPERATIONS = (
    lambda table, keys, values, scores, more, marks, mark: table.insert_or_assign(keys, values, scores),
    lambda table, keys, values, scores, more, marks, mark: table.insert_or_assign(keys, values, scores),
    lambda table, keys, values, scores, more, marks, mark: table.accum_or_assign(keys, values, scores),
    lambda table, keys, values, scores, more, marks, mark: table.find_or_insert(keys, values, scores),
    lambda table, keys, values, scores, more, marks, mark: table.insert_and_evict(keys, values, scores),
    lambda table, keys, values, scores, more, marks, mark: table.insert_rows(keys, scores, marks=marks, mark=mark).rows,
    lambda table, keys, values, scores, more, marks, mark: table.rows(keys),
    lambda table, keys, values, scores, more, marks, mark: table.find(keys),
    lambda table, keys, values, scores, more, marks, mark: table.contains(keys),
    lambda table, keys, values, scores, more, marks, mark: table.erase(keys),
    lambda table, keys, values, scores, more, marks, mark: table.import_(keys, values, scores),
    lambda table, keys, values, scores, more, marks, mark: table.reserve(more),
    lambda table, keys, values, scores, more, marks, mark: table.clear(),
    lambda table, keys, values, scores, more, marks, mark: _written(table, keys),
)


def _written(table, keys):
    """Rows written to by their numbers, which the keys stand for."""
    rows = table.rows(keys)
    table.start_uniform(rows[rows >= 0], keys[rows >= 0], 3, 0.5)
    table.mark_rows(torch.zeros(table.values.shape[0], dtype=torch.int64), keys.long(), 1)
    return rows


SUBJECTS = (
    optimizers,
    sparse_update,
    table_layouts,
    many_tables,
    row_codes,
    embedding_layers,
    embedding_layers,
    quantized_embedding,
    batched_tables,
    dynamic_embedding,
    hash_table,
    hash_table,
)
