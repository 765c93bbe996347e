"""Layers: mixtures of experts and their routers, linear layers, each made, run and differentiated by one call."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from draws import FLOATS, PARAMETERS, ids, loss, places, randn, size

import gossamer
from gossamer import nn


def layer_call(make: Callable[..., torch.nn.Module], inputs: tuple[str, ...], positional: int = 1) -> Callable:
    """A function that makes a layer, runs it and its backward pass; it takes the arguments of both, flat.

    Args:
        make: the class, or a classmethod of it.
        inputs: the names of the forward pass's arguments, as the fuzzer's reports call them.
        positional: how many of them go by position.

    Returns:
        A function that returns the output and the gradients of inputs and parameters.
    """

    def call(**args):
        given = {name: args.pop(name) for name in inputs if name in args}
        layer = make(**args)
        values = list(given.items())
        y = layer(*[value for _, value in values[:positional]], **dict(values[positional:]))
        outputs = y[0] if isinstance(y, tuple) else y
        gradients = []
        # Gradients through infinities depend on the order of sums; at relu's kink, which sums in 16 bits may round to,
        # on the last bit.
        kinked = args.get("activation") in ("relu", "reglu") and args.get("dtype") in (torch.float16, torch.bfloat16)
        if outputs.requires_grad and (outputs.is_meta or (outputs.isfinite().all() and not kinked)):
            leaves = [p for p in layer.parameters() if p.requires_grad]
            leaves += [v for v in given.values() if isinstance(v, torch.Tensor) and v.requires_grad and v.is_leaf]
            gradients = torch.autograd.grad(loss(outputs), leaves, allow_unused=True)
        return outputs.detach(), *(g for g in gradients if g is not None)

    call.__qualname__ = getattr(make, "__qualname__", repr(make))
    # What the primitives behind the layers call their inputs.
    call.signature = [*inspect.signature(make).parameters, "expert_ids", "weights"]
    call.places = places(make)
    return call


def hidden(rng, dtype):
    """A hidden size; in 16 bits a layer of few columns may cancel to nothing but rounding errors."""
    return size(rng, 8 if dtype in (torch.float16, torch.bfloat16) else 1, 24)


def moe(rng):
    i, e, dtype = 16 * size(rng, 1, 2), size(rng, 1, 6), rng.choice(PARAMETERS)
    h, k = hidden(rng, dtype), rng.randint(1, e)
    router = rng.choice(("softmax_topk", "topk_softmax", "sigmoid_topk"))
    args = {"hidden_size": h, "intermediate_size": i, "num_experts": e, "top_k": k, "router": router, "dtype": dtype}
    args |= {"activation": rng.choice(("swiglu", "geglu", "relu")), "bias": rng.random() < 0.3}
    args |= {"transposed": rng.random() < 0.3, "form": rng.choice(("grouped", "grouped", "block_sparse"))}
    args |= {"shared_intermediate_size": rng.choice((None, 8)), "capacity_factor": rng.choice((None, None, 1.0))}
    if router == "softmax_topk":
        args["renormalize"] = rng.random() < 0.5
    x = randn(rng, *rng.choice(((size(rng, 0),), (2, size(rng, 0, 9)))), h, dtype=dtype)
    return layer_call(nn.MoE, ("x", "token_ids")), args | {"x": x}


def hashed(rng):
    vocabulary, e, h = size(rng), size(rng, 1, 6), size(rng, 1, 20)
    table = ids(rng, e, vocabulary, rng.randint(1, min(2, e)))

    def make(table, num_experts, hidden_size):
        return nn.MoE(hidden_size, 8, router=nn.HashRouter(table, num_experts))

    call, t = layer_call(make, ("x", "token_ids")), size(rng, 0)
    call.__qualname__ = "HashRouter"
    args = {"table": table, "num_experts": e, "hidden_size": h, "x": randn(rng, t, h)}
    return call, args | {"token_ids": ids(rng, vocabulary, t)}


def routing(rng, tokens, experts, top_k):
    """A routing as a router makes it, or one by given ids, absent slots among them."""
    if rng.random() < 0.5:
        return nn.softmax_topk(randn(rng, tokens, experts), top_k)
    made = nn.given_experts(ids(rng, experts + 1, tokens, top_k), experts, randn(rng, tokens, top_k).abs())
    return made.dispatched() if rng.random() < 0.5 else made


def experts(rng):
    e, i = size(rng, 1, 6), 16 * size(rng, 1, 2)
    t, dtype = size(rng, 0), rng.choice(PARAMETERS)
    h = hidden(rng, dtype)
    args = {"num_experts": e, "hidden_size": h, "intermediate_size": i, "dtype": dtype, "bias": rng.random() < 0.3}
    args |= {"transposed": rng.random() < 0.3, "activation": rng.choice(("swiglu", "relu", "reglu"))}
    inputs = {"x": randn(rng, t, h, dtype=dtype), "routing": routing(rng, t, e, rng.randint(1, e))}
    if rng.random() < 0.4:
        k = rng.randint(1, e)
        inputs |= {"routing": ids(rng, e + 1, t, k), "weights": randn(rng, t, k)}
    made = nn.Experts
    if rng.random() < 0.5:
        made = nn.LoRAExperts
        args |= {"rank": rng.randint(1, min(h, i)), "dora": rng.random() < 0.3, "rank_stabilized": rng.random() < 0.5}
        args["alpha"] = rng.choice((None, 2.0))
    else:
        args |= {"form": rng.choice(("grouped", "block_sparse")), "capacity_factor": rng.choice((None, 0.7))}
    return layer_call(made, ("x", "routing", "weights"), 3), args | inputs


def quantised_moe(rng):
    """A layer whose experts are held in few bits, as quantize_experts leaves them."""
    e, h, i = size(rng, 1, 5), 32 * size(rng, 1, 2), 32
    weight_format = rng.choice(("fp8", "fp8_block", "int8", "int4", "mxfp4"))

    def make(format):
        layer = nn.MoE(h, i, e, 1)
        gossamer.quantize_experts(layer, format)
        return layer

    call = layer_call(make, ("x", "routing"))
    call.__qualname__ = "quantize_experts"
    x = randn(rng, size(rng, 0), h, dtype=None)
    return call, {"format": weight_format, "x": x, "routing": routing(rng, x.shape[0], e, 1)}


def routers(rng):
    e, t = rng.choice((1, 4, 8, 12)), size(rng, 0)
    k, dtype = rng.randint(1, e), rng.choice(FLOATS)
    args = {"logits": randn(rng, t, e, dtype=dtype), "top_k": k}
    kind = rng.randrange(3)
    if kind == 0:
        return of_any_order(nn.topk_softmax), args
    groups = rng.choice([g for g in (1, 1, 2, 4) if e % g == 0])
    chosen = rng.randint(1, groups)
    args |= {"n_group": groups, "topk_group": chosen, "top_k": min(k, e // groups * chosen)}
    args |= {"renormalize": rng.random() < 0.5, "scale": rng.choice((1.0, 2.5))}
    if kind == 1:
        return of_any_order(nn.softmax_topk), args
    return of_any_order(nn.sigmoid_topk), args | {"correction_bias": rng.choice((None, randn(rng, e)))}


def of_any_order(choose):
    """What a router says of each token, whichever of equal experts it took first."""

    def call(**args):
        made = choose(**args)
        count = (made.expert_ids < made.num_experts).sum(1)
        scores = made.logits.sigmoid() + (0.0 if args.get("correction_bias") is None else args["correction_bias"])
        distinct = not scores.is_meta and scores.isfinite().all() and (scores.sort().values.diff() != 0).all()
        return (count, made.weights, made.probabilities) if distinct else (count,)

    call.__qualname__ = choose.__name__
    return call


def losses(rng):
    t, e = size(rng, 0), size(rng, 1, 6)
    k, kind = rng.randint(1, e), rng.randrange(5)
    made = nn.softmax_topk(randn(rng, t, e), k)
    if kind == 0:
        return nn.limit_capacity, {"routing": routing(rng, t, e, k), "capacity_factor": rng.choice((0.5, 1.0, 2))}
    if kind == 1:
        return nn.update_expert_bias, {"bias": randn(rng, e), "counts": ids(rng, 9, e), "rate": 0.1}
    mask = rng.choice((None, ids(rng, 2, t)))
    if kind == 2:
        return nn.sequence_balance_loss, {"routing": made, "batch_size": 1, "mask": mask}
    return (nn.load_balance_loss, nn.router_z_loss)[kind - 3], {"routing": made, "mask": mask}


def flat_factors(rng):
    e, r, n, c = size(rng, 1, 5), size(rng, 1, 4), size(rng), size(rng)
    if rng.random() < 0.5:
        return nn.flat_expert_factors, {"a": randn(rng, e, r, c), "b": randn(rng, e, n, r)}
    return nn.expert_factors, {"flat_a": randn(rng, e * r, c), "flat_b": randn(rng, n, r * e), "num_experts": e}


def linears(rng):
    c, n, dtype = size(rng), size(rng), rng.choice(PARAMETERS)
    args = {"in_features": c, "out_features": n, "bias": rng.random() < 0.5, "dtype": dtype}
    x = randn(rng, *rng.choice(((size(rng, 0),), (2, 3), ())), c, dtype=dtype)
    kind = rng.randrange(3)
    if kind == 0:
        args |= {"density": rng.choice((0.1, 0.5, 1.0)), "block": rng.choice((16, 32, (16, 64)))}
        return layer_call(nn.BlockSparseLinear, ("x",)), args | {"x": x}
    args["rank"] = rng.randint(1, min(c, n))
    if kind == 1:
        return layer_call(nn.LowRankLinear, ("x",)), args | {"x": x}
    args |= {"alpha": rng.choice((None, 3.0)), "dora": rng.random() < 0.3, "rank_stabilized": rng.random() < 0.3}
    args |= {"dropout": rng.choice((0.0, 0.3)), "init": rng.choice(("kaiming", "gaussian", "spectral"))}
    return layer_call(nn.LoRALinear, ("x",)), args | {"x": x}


def lora_embedding(rng):
    rows, dim = size(rng), size(rng)
    args = {"num_embeddings": rows, "embedding_dim": dim, "rank": rng.randint(1, min(rows, dim))}
    args |= {"dora": rng.random() < 0.3, "padding_idx": rng.choice((None, 0)), "dtype": rng.choice(PARAMETERS)}
    shape = rng.choice(((size(rng, 0),), (2, 3), ()))
    return layer_call(nn.LoRAEmbedding, ("ids",)), args | {"ids": ids(rng, rows, *shape)}


SUBJECTS = (
    moe,
    moe,
    hashed,
    experts,
    experts,
    quantised_moe,
    routers,
    losses,
    flat_factors,
    linears,
    linears,
    lora_embedding,
)
