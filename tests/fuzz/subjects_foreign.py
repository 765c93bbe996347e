"""Layers written for ScatterMoE and MegaBlocks."""

from __future__ import annotations

import torch
from draws import ids, randn, size
from subjects_modules import layer_call

from gossamer.integrations import megablocks, scattermoe
from gossamer.integrations.megablocks import ops
from gossamer.integrations.scattermoe.kernels import ops as products
from gossamer.integrations.scattermoe.kernels import single


def scattered(rng):
    """ScatterMoE's expert layers by given experts and gates, and one of their products."""
    t, c, n, e = size(rng, 0), size(rng, 1, 16), size(rng, 1, 16), size(rng, 1, 6)
    k, bias = rng.randint(1, min(2, e)), rng.random() < 0.4
    idxs = ids(rng, e, t, k)
    if rng.random() < 0.3:
        args = {"num_experts": e, "input_size": c, "output_size": n, "bias": bias, "inputs": randn(rng, t, c), "k": k}
        args |= {"gates": rng.choice((None, randn(rng, t, k)))}
        order = scattermoe.flatten_sort_count(idxs, num_experts=e)
        names = ("sorted_expert_idxs", "sorted_scattered_idxs", "expert_offsets")
        inputs = ("inputs", "k", *names, "gates")
        call = layer_call(scattermoe.ParallelExperts, inputs, 5)
        call.signature += ["x", "weight"]
        return call, args | dict(zip(names, order, strict=True))
    made = rng.choice((scattermoe.MLP, scattermoe.GLUMLP))
    args = {"input_size": c, "hidden_size": n, "num_experts": e, "top_k": k, "bias": bias}
    args["activation"] = rng.choice((None, torch.nn.SiLU(), torch.nn.Tanh()))
    call = layer_call(made, ("x", "expert_p", "expert_idxs"), 3)
    return call, args | {"x": randn(rng, t, c), "expert_p": randn(rng, t, k).softmax(-1), "expert_idxs": idxs}


def of_arguments(rng):
    """MegaBlocks' layers, and the losses that they leave behind."""
    e, kind = size(rng, 1, 5), rng.choice((megablocks.MoE, megablocks.dMoE))
    args = {"hidden_size": size(rng, 1, 16), "ffn_hidden_size": 16 * size(rng, 1, 2), "moe_num_experts": e}
    args |= {"moe_top_k": rng.randint(1, e), "moe_capacity_factor": rng.choice((0, 1, 1.5)), "fp16": False}
    args |= {"bias": rng.random() < 0.5, "return_bias": rng.random() < 0.5, "moe_loss_weight": rng.choice((0, 0.1))}
    args |= {"mlp_type": "mlp" if kind is megablocks.MoE else rng.choice(("mlp", "glu")), "moe_jitter_eps": None}
    args |= {"mlp_impl": rng.choice(("sparse", "grouped")), "moe_zloss_weight": rng.choice((0, 1e-3))}
    args |= {"moe_normalize_expert_weights": rng.choice((None, 1, 2)), "shared_expert": rng.random() < 0.3}
    args |= {"num_layers": 1, "device": "cpu", "uniform_expert_assignment": rng.random() < 0.2}
    x = randn(rng, size(rng, 0, 9), size(rng, 1, 3), args["hidden_size"])

    def call(x, **options):
        made = megablocks.Arguments(**options)
        layer = kind(made)
        y = layer(x)
        losses = [megablocks.batched_load_balancing_loss(made, layer)] if made.moe_loss_weight else []
        losses += [megablocks.batched_router_zloss(made, layer)] if made.moe_zloss_weight else []
        return [part.detach() for part in (*(y if isinstance(y, tuple) else (y,)), *losses) if part is not None]

    call.__qualname__ = kind.__name__
    # What the primitives behind the layers call their inputs.
    call.signature = ["expert_ids", "weights", "logits"]
    return call, args | {"x": x}


def kernels(rng):
    """What both libraries call their kernels: sorted products, and rows and counts around them."""
    t, c, n, e = size(rng, 0), size(rng, 1, 16), size(rng, 1, 16), size(rng, 1, 6)
    k, kind = rng.randint(1, min(2, e)), rng.randrange(8)
    experts, slots, offsets = scattermoe.flatten_sort_count(ids(rng, e, t, k), num_experts=e)
    if kind == 0:
        args = {"X": randn(rng, t, c), "W": randn(rng, e, c, n), "sorted_expert_idxs": experts, "k": k}
        args |= {"sorted_scattered_idxs": slots, "b": rng.choice((None, randn(rng, e, n))), "x_grouped": False}
        args |= {"y_grouped": rng.random() < 0.5, "out": rng.choice((None, torch.zeros(t * k, n)))}
        return named(products.scatter2scatter, ["x", "weight", "bias", "expert_offsets", "num_experts"]), args
    if kind == 1:
        args = {"A": randn(rng, t, c), "sorted_expert_idxs": slots, "fan_out": k}
        args |= {"coeff": rng.choice((None, randn(rng, t, k))), "out": rng.choice((None, torch.zeros(t * k, c)))}
        return named(products.group, ["weights"]), args
    if kind == 2:
        args = {"DY": randn(rng, t * k, n), "X": randn(rng, t * k, c), "expert_offsets": offsets, "E": e}
        return named(products.group_bwd_W, []), args | {"has_bias": rng.random() < 0.5}
    if kind == 3:
        args = {"X": randn(rng, rng.choice((1, k)), c), "W": randn(rng, e, c, n), "expert_idxs": ids(rng, e + 1, 1, k)}
        return named(single.single2scatter, ["x", "weight", "expert_ids", "num_experts"]), args
    x = ids(rng, e, t).int()
    if kind == 4:
        return ops.sort, {"x": x, "end_bit": rng.choice((None, 3, 31))}
    if kind == 5:
        return ops.histogram, {"x": rng.choice((x, x.unsqueeze(0))), "max_val": e}
    if kind == 6:
        pieces = (
            (ops.inclusive_cumsum, {"x": x, "dim": 0}),
            (ops.exclusive_cumsum, {"x": x, "dim": -1}),
            (ops.round_up, {"x": x, "value": 16}),
            (ops.repeat, {"x": x, "tiling": (2,)}),
            (ops.sum, {"x": randn(rng, t, c), "dim": 1}),
        )
        return rng.choice(pieces)
    bins = ops.inclusive_cumsum(ops.round_up(ops.histogram(x, e), 16), 0)
    if rng.random() < 0.5:
        return ops.replicate, {"x": randn(rng, 2, e), "bins": bins, "num_outputs": int(bins[-1])}
    rows = int(bins[-1]) // 16
    return ops.topology, {"padded_bins": bins, "block_size": 16, "output_block_rows": rows, "output_block_columns": 2}


def named(function, names):
    """``function``, whose errors may speak of what the product behind it calls its operands."""

    def call(**args):
        return function(**args)

    call.__qualname__, call.signature = function.__name__, names
    return call


SUBJECTS = (scattered, of_arguments, kernels)
