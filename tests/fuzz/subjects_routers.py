"""Routers, functions that route by logits, balance losses, and expert layers beyond two matrices an expert."""

from __future__ import annotations

import torch
from draws import ids, loss, randn, size
from subjects_modules import layer_call, routing

from gossamer import nn

# Half precision would choose other experts for equal scores.
WIDE = (torch.float32, torch.float64)


def _softmax(rng, h, e, k):
    return nn.SoftmaxRouter(h, e, k)


ROUTERS = {
    nn.TopPRouter: lambda rng, e: {"top_p": rng.choice((0.3, 0.9)), "max_experts": rng.choice((None, 1))},
    nn.ThresholdRouter: lambda rng, e: {"threshold": 0.2, "max_experts": None, "null_experts": rng.choice((0, 1))},
    nn.ExpertChoiceRouter: lambda rng, e: {"capacity_factor": rng.choice((0.5, 1.0))},
    nn.PrototypeRouter: lambda rng, e: {"num_prototypes": rng.choice([p for p in (1, 2, 3) if e % p == 0])},
    nn.SigmoidRouter: lambda rng, e: {"top_k": rng.randint(1, e), "renormalize": rng.random() < 0.5},
    nn.SoftmaxRouter: lambda rng, e: {"top_k": rng.randint(1, e), "renormalize": rng.random() < 0.5, "scale": 2.0},
    nn.TopKSoftmaxRouter: lambda rng, e: {"top_k": rng.randint(1, e), "bias": rng.random() < 0.5},
    nn.ClusterRouter: lambda rng, e: {"num_clusters": 1, "dropout": 0.0, "projection_size": 4},
    nn.DSelectKRouter: lambda rng, e: {"num_selectors": size(rng, 1, 3), "gamma": 1.0},
    nn.TreeRouter: lambda rng, e: {"num_trees": size(rng, 1, 3), "gamma": 1.0},
}
AROUND = {
    nn.BroadcastUncertain: lambda rng: {"entropy": 0.5, "slots": rng.choice((None, 2))},
    nn.TokenRounding: lambda rng: {"tile": size(rng, 1, 8), "mode": rng.choice(("nearest", "up", "down"))},
}


def by_module(rng):
    """A layer with one of the routers, and one around it."""
    kind = rng.choice(sorted(ROUTERS, key=lambda kind: kind.__name__))
    around = rng.choice((None, None, *sorted(AROUND, key=lambda kind: kind.__name__)))
    h, e, t, dtype = size(rng, 1, 16), size(rng, 1, 6), size(rng, 0), rng.choice(WIDE)
    rounded = around is nn.TokenRounding and kind in (nn.DSelectKRouter, nn.TreeRouter)
    # Tokens that give all their weight to one expert have equal weights up to rounding; any of them may be left out.
    e = max(e, 2) if rounded else e
    args = {"hidden_size": h, "num_experts": e, "dtype": dtype, **ROUTERS[kind](rng, e)}
    args |= {"gamma": 50.0} if rounded else {}
    outer = {} if around is None else AROUND[around](rng)

    def make(hidden_size, num_experts, dtype, **options):
        own = {name: options.pop(name) for name in outer}
        router = kind(hidden_size, num_experts, dtype=dtype, **options)
        router = router if around is None else around(router, **own)
        return nn.MoE(hidden_size, 8, router=router, dtype=dtype)

    call = layer_call(make, ("x",))
    call.__qualname__ = kind.__name__ if around is None else f"{around.__name__}({kind.__name__})"
    call.signature = ["expert_ids", "weights", "logits"]
    return call, args | outer | {"x": randn(rng, t, h, dtype=dtype)}


def by_domain(rng):
    """A layer whose tokens go by domains, where these are given."""
    h, e, t, domains = size(rng, 1, 16), size(rng, 1, 6), size(rng, 0), size(rng, 1, 5)
    k = rng.randint(1, e)
    args = {"table": ids(rng, e, domains, k) if rng.random() < 0.7 else ids(rng, e, domains)}
    args |= {"router": nn.SoftmaxRouter(h, e, rng.randint(1, e)), "x": randn(rng, t, h)}
    args["token_ids"] = rng.choice((None, ids(rng, domains + 1, t) - 1))

    def make(table, router):
        return nn.MoE(h, 8, router=nn.DomainRouter(table, router))

    call = layer_call(make, ("x", "token_ids"))
    call.__qualname__ = "DomainRouter"
    call.signature = ["expert_ids", "weights", "logits"]
    return call, args


def permuted(rng):
    """A phase of a learned permutation, and the experts moved after it."""
    h, e, t = size(rng, 1, 16), size(rng, 2, 6), size(rng, 0)
    router = rng.choice((nn.SoftmaxRouter(h, e, 1), nn.TreeRouter(h, e, 2, 1.0), nn.DSelectKRouter(h, e, 2, 1.0)))
    args = {"router": router, "phase_steps": size(rng, 1, 4), "temperatures": rng.choice(((1e-3, 1e-7), [1.0, 0.1]))}
    args |= {"iterations": (size(rng, 1, 5), size(rng, 1, 5)), "noise": rng.choice((0.0, 0.3))}
    args |= {"per_part": not isinstance(router, nn.SoftmaxRouter) and rng.random() < 0.4, "x": randn(rng, t, h)}

    def call(x, **options):
        permutation = nn.LearnedPermutation(**options)
        layer = nn.MoE(h, 8, router=permutation)
        found = []
        for _ in range(5):
            y = layer(x)
            found.append(y.detach())
            if y.requires_grad and not y.is_meta:
                loss(y).backward()
            nn.step_routers(layer)
        if not permutation.per_part and not permutation.searching:
            layer.router = permutation.absorb(layer.experts)
        return *found, layer(x).detach()

    call.__qualname__ = "LearnedPermutation"
    call.signature = ["expert_ids", "weights", "logits"]
    return call, args


def by_logits(rng):
    t, e, kind = size(rng, 0), size(rng, 1, 6), rng.randrange(6)
    args = {"logits": randn(rng, t, e, dtype=rng.choice(WIDE))}
    if kind == 0:
        args |= {"top_p": rng.choice((0.3, 0.9)), "max_experts": rng.choice((None, 1))}
        return weights_of(nn.softmax_top_p), args
    if kind == 1:
        return weights_of(nn.softmax_threshold), args | {"threshold": 0.2, "max_experts": None, "null_experts": 0}
    if kind == 2:
        return weights_of(nn.expert_choice), args | {"capacity_factor": rng.choice((0.5, 1.0))}
    if kind == 3:
        return weights_of(nn.expert_choice_threshold), args | {"thresholds": randn(rng, e).sigmoid()}
    if kind == 4:
        return weights_of(nn.softmax_prototypes), args | {
            "num_prototypes": 1,
            "capacity_factor": rng.choice((None, 1.0)),
        }
    return rng.choice((nn.softmax_probabilities, nn.sigmoid_probabilities)), args


def weights_of(route):
    """What a function says of each token's experts together, whichever of equal ones it took first."""

    def call(**args):
        made = route(**args)
        return (made.expert_ids < made.num_experts).sum(1), made.weights.sum(1), made.probabilities

    call.__qualname__ = route.__name__
    call.signature = ["capacity", "num_experts"]
    return call


def balance(rng):
    t, e = size(rng, 0), size(rng, 1, 6)
    k, mask = rng.randint(1, e), rng.choice((None, ids(rng, 2, t).bool()))
    args = {"routing": routing(rng, t, e, k), "mask": mask}
    kinds = (nn.switch_balance_loss, nn.gshard_balance_loss, nn.slot_balance_loss, nn.importance_loss)
    kind = rng.randrange(8)
    if kind < 4:
        return kinds[kind], args | {"routing": nn.softmax_topk(randn(rng, t, e), k)}
    if kind == 4:
        return nn.routing_entropy_loss, args | {"routing": nn.softmax_topk(randn(rng, t, e), k)}
    if kind == 5:
        return nn.expert_counts, args
    if kind == 6:
        return nn.round_tokens, {"routing": nn.softmax_topk(randn(rng, t, e), k), "tile": 3, "mode": "nearest"}
    logits = randn(rng, t, e)
    args = {
        "logits": logits,
        "noisy_logits": logits + 0.1 * randn(rng, t, e),
        "noise_std": rng.choice((0.5, logits.abs() + 0.1)),
    }
    return nn.load_loss, args | {"top_k": k, "mask": mask}


def after_routing(rng):
    """A routing that is widened, and losses of it."""
    t, e, kind = size(rng, 0), size(rng, 2, 6), rng.randrange(3)
    args = {"routing": nn.softmax_topk(randn(rng, t, e), rng.randint(1, e))}
    if kind == 0:
        args |= {"entropy": rng.choice((0.0, 0.8)), "slots": rng.choice((None, 2)), "sequence_length": None}
        return weights_of(nn.broadcast_uncertain), args
    mask = rng.choice((None, ids(rng, 2, t).bool()))
    if kind == 1:
        args |= {"num_clusters": rng.choice([n for n in (1, 2, 3) if e % n == 0]), "survivors": None, "mask": mask}
        args |= {"variance_weight": 1.0, "form": rng.choice(("within", "all", "gap")), "mean": rng.random() < 0.5}
        return nn.cluster_variance_loss, args
    router = rng.choice((nn.TreeRouter(4, e, 2, 1.0), nn.DSelectKRouter(4, e, 2, 1.0)))
    args = {"routing": router(randn(rng, t, 4)), "mask": mask}
    return nn.router_losses, args


def gates(rng):
    t, kind = size(rng, 0), rng.randrange(3)
    if kind == 0:
        return nn.smooth_step, {"v": randn(rng, t, size(rng)), "gamma": 1.0}
    e, n = size(rng, 2, 6), size(rng, 1, 3)
    bits = (e - 1).bit_length()
    if kind == 1:
        args = {"codes": randn(rng, t, n, bits), "mixture": randn(rng, t, n)}
        return nn.selector_gates, args | {"num_experts": e, "gamma": 1.0}
    args = {"splits": randn(rng, t, n, e - 1), "leaves": randn(rng, t, n, e)}
    return nn.tree_gates, args | {"gamma": 1.0}


def expert_layers(rng):
    """Experts that share a space or bases, by a routing."""
    e, h, i, t = size(rng, 1, 6), size(rng, 1, 24), 16, size(rng, 0)
    args = {"num_experts": e, "hidden_size": h, "intermediate_size": i, "bias": rng.random() < 0.3}
    inputs = {"x": randn(rng, t, h), "routing": routing(rng, t, e, rng.randint(1, e))}
    args |= {"activation": rng.choice(("swiglu", "gelu")), "capacity_factor": rng.choice((None, 0.7))}
    if rng.random() < 0.5:
        args |= {"num_bases": size(rng, 1, 4), "rank": rng.choice((None, 2)), "nonlinearity": "silu"}
        return layer_call(nn.BasisExperts, ("x", "routing"), 2), args | inputs
    args |= {"latent_size": size(rng, 1, 12), "group_size": rng.choice((None, 1)), "shared_output": rng.random() < 0.5}
    args["separate_latents"] = rng.random() < 0.3
    return layer_call(nn.LatentExperts, ("x", "routing"), 2), args | inputs


def whole_layers(rng):
    """Layers that route by themselves, and attention and fast weights along a sequence."""
    h, t, kind = 4 * size(rng, 1, 6), size(rng, 0), rng.randrange(5)
    if kind == 0:
        args = {"hidden_size": h, "num_experts": rng.choice((1, 4, 9)), "num_heads": size(rng, 1, 3), "top_k": 1}
        args |= {"key_dim": 4, "query_norm": False, "activation": rng.choice(("gelu", "silu"))}
        call = layer_call(nn.ProductKeyExperts, ("x",))
        call.signature.append("scores1")  # of keys, which NaN in x makes NaN
        return call, args | {"x": randn(rng, t, h)}
    if kind == 1:
        args = {"hidden_size": h, "intermediate_size": 8, "num_experts": 4, "top_k": rng.randint(1, 4)}
        return layer_call(nn.CartesianMoE, ("x",)), args | {"x": randn(rng, t, h)}
    x = randn(rng, size(rng, 0, 3), size(rng, 1, 20), h)
    if kind == 2:
        e = size(rng, 1, 4)
        args = {"hidden_size": h, "num_experts": e, "top_k": rng.randint(1, e), "num_heads": size(rng, 1, 2)}
        call = layer_call(nn.MixtureOfAttention, ("x",))
        call.signature.append("logits")  # of the router, which NaN in x makes NaN
        return call, args | {"head_dim": 8, "causal": rng.random() < 0.5, "x": x}
    if kind == 3:
        args = {"hidden_size": h, "num_heads": rng.choice((1, 2, 4)), "rate_init": -1.0}
        return layer_call(nn.SelfReferentialLinear, ("x",)), args | {"input_softmax": rng.random() < 0.5, "x": x}
    args = {"hidden_size": h, "num_heads": size(rng, 1, 2), "head_dim": size(rng, 1, 8), "conv_size": size(rng, 2, 4)}
    layer = rng.choice((nn.DeltaNet, nn.GatedDeltaNet, nn.KimiDeltaAttention))
    return layer_call(layer, ("x",)), args | {"x": x}


def decoded(rng):
    """A delta-rule layer along a sequence, in one call, in two, and token by token."""
    kind = rng.choice((nn.DeltaNet, nn.GatedDeltaNet, nn.KimiDeltaAttention))
    b, t, h, heads = size(rng, 0, 3), size(rng, 1, 9), size(rng, 1, 12), rng.randint(1, 2)
    args = {"hidden_size": h, "num_heads": 2 * heads, "head_dim": size(rng, 1, 8), "num_key_heads": heads}
    args |= {"value_head_dim": rng.choice((None, 3)), "conv_size": size(rng, 2, 5), "norm_eps": 1e-5}
    args |= {"negative_eigenvalues": rng.random() < 0.5, "dtype": rng.choice(WIDE)}
    pack = rng.random() < 0.3
    args |= {"x": randn(rng, 1 if pack else b, t, h, dtype=args["dtype"]), "mask": None, "batch_size": b}
    args["cu_seqlens"] = torch.tensor([0, rng.randint(0, t), t]) if pack else None
    if not pack and rng.random() < 0.3:
        args["mask"] = ids(rng, 2, b, t).bool()
    at, stepped = rng.randint(0, t), rng.random() < 0.5

    def call(x, mask, cu_seqlens, batch_size, **options):
        layer = kind(**options)
        whole = layer(x, mask=mask, cu_seqlens=cu_seqlens)
        if cu_seqlens is not None or mask is not None:
            return whole.detach()
        state = layer.initial_state(batch_size)
        with torch.no_grad():
            cuts = [1] * x.shape[1] if stepped else [at, x.shape[1] - at]
            parts = [layer(part, state=state) for part in x.split(cuts, 1)]
            again = torch.cat(parts, 1)
            if not again.is_meta and again.isfinite().all() and not torch.allclose(whole, again, 1e-2, 1e-3):
                raise AssertionError("a sequence in parts gives another result")
        return whole.detach(), again, *state

    call.__qualname__ = kind.__name__
    # What the operators call their inputs.
    call.signature = ["q", "k", "v", "beta", "g", "state", "conv", "recurrent", "weight"]
    return call, args


def cached(rng):
    """Attention along sequences at once and in two calls, and a cache of keys and values by itself."""
    b, heads, d = size(rng, 1, 3), size(rng, 1, 2), 2 * size(rng, 1, 4)
    order = ids(rng, b, size(rng, 0, 4))
    if rng.random() < 0.5:
        args = {"keys": randn(rng, b, heads, size(rng, 0, 5), d), "values": None, "order": order}
        args["values"] = randn(rng, *args["keys"].shape)

        def append(keys, values, order):
            cache = nn.KeyValueCache()
            cache.append(torch.ones(b, heads, 2, d), torch.zeros(b, heads, 2, d))
            cache.append(keys, values)
            cache.reorder(order)
            return cache.append(torch.ones(len(order), heads, 1, d), torch.zeros(len(order), heads, 1, d))

        append.__qualname__ = "KeyValueCache"
        return append, args
    h, e, t = size(rng, 1, 8), size(rng, 1, 4), size(rng, 1, 9)
    layer, at = nn.MixtureOfAttention(h, e, rng.randint(1, e), num_heads=heads, head_dim=d), rng.randint(0, t)
    args = {"x": randn(rng, b, t, h), "position_ids": rng.choice((None, torch.arange(t).expand(b, t)))}
    args["attention_mask"] = rng.choice((None, torch.ones(b, t, dtype=torch.int64)))

    def call(x, position_ids, attention_mask):
        given = {"position_ids": position_ids, "attention_mask": attention_mask}
        whole, cache = layer(x, **given), nn.KeyValueCache()
        if attention_mask is not None or position_ids is not None:
            return whole.detach()
        with torch.no_grad():
            again = torch.cat([layer(part, cache=cache) for part in x.split([at, x.shape[1] - at], 1)], 1)
        if not again.is_meta and again.isfinite().all() and not torch.allclose(whole, again, 1e-2, 1e-3):
            raise AssertionError("a sequence in parts gives another result")
        return whole.detach(), again

    call.__qualname__ = "MixtureOfAttention"
    # Of the router and the cache, which NaN in x makes NaN.
    call.signature = ["logits", "keys", "values"]
    return call, args


SUBJECTS = (
    by_module,
    by_module,
    by_domain,
    permuted,
    by_logits,
    balance,
    after_routing,
    gates,
    expert_layers,
    whole_layers,
    decoded,
    cached,
)
