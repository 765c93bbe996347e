"""Operators along sequences: the delta rule, its short convolution, and weights that modify themselves."""

from __future__ import annotations

import math

import torch
from draws import FLOATS, randn, size

import gossamer

DIFFERENTIABLE = True


def wide(dtype):
    return torch.promote_types(dtype, torch.float32)


def unit(rng, *shape, dtype):
    """Rows of length one: with longer keys the state may grow without bound."""
    return torch.nn.functional.normalize(randn(rng, *shape), dim=-1, eps=1e-3).to(dtype)


def bounds(rng, sequences, length):
    """``(sequences + 1,)`` offsets of sequences, empty ones among them, that end at ``length``."""
    inner = sorted(rng.randint(0, length) for _ in range(sequences - 1))
    return torch.tensor([0, *inner, length], dtype=rng.choice((torch.int32, torch.int64)))


def gates(rng, heads, channels, dtype, *shape):
    """A gate of each head or channel, log decays with a reset among them or raw ones with what they need."""
    by_channel = rng.random() < 0.5
    g = randn(rng, *shape, heads, *([channels] if by_channel else []))
    if rng.random() < 0.4:
        bias = rng.choice((None, randn(rng, *g.shape[len(shape) :])))
        return {"g": g, "A_log": randn(rng, heads), "dt_bias": bias, "lower_bound": rng.choice((None, -5.0))}
    g = -(g - 1).exp()
    if g.numel() and rng.random() < 0.3:
        g.view(-1)[rng.randrange(g.numel())] = -math.inf
    return {"g": g.to(rng.choice((dtype, wide(dtype))))}


def delta_rule(rng):
    pack = rng.random() < 0.4
    b, t, key_heads = 1 if pack else size(rng, 0, 3), size(rng, 0, 140), rng.randint(1, 2)
    heads, key_size, value_size = key_heads * rng.randint(1, 2), size(rng, 1, 80), size(rng, 1, 80)
    dtype = rng.choice(FLOATS)
    args = {"q": randn(rng, b, t, key_heads, key_size, dtype=dtype)}
    args |= {
        "k": unit(rng, b, t, key_heads, key_size, dtype=dtype),
        "v": randn(rng, b, t, heads, value_size, dtype=dtype),
    }
    args["beta"] = (2 * randn(rng, b, t, heads).sigmoid()).to(rng.choice((dtype, wide(dtype))))
    sequences = rng.randint(1, 4) if pack else b
    args["cu_seqlens"] = bounds(rng, sequences, t) if pack else None
    state = randn(rng, sequences, heads, key_size, value_size, dtype=wide(dtype))
    args |= {"initial_state": rng.choice((None, state)), "output_final_state": rng.random() < 0.5}
    # The normalised vector of one number is its sign, whose gradient is rounding and nothing else.
    args |= {"scale": rng.choice((None, 0.5)), "use_qk_l2norm": key_size > 1 and rng.random() < 0.5}
    if rng.random() < 0.7:
        args |= gates(rng, heads, key_size, dtype, b, t)
    return gossamer.delta_rule, args


def stepped(**args):
    """A step's output, and the state that it changed."""
    return gossamer.delta_rule_step(**args), args["state"]


def delta_rule_step(rng):
    b, key_heads, dtype = size(rng, 0, 4), rng.randint(1, 3), rng.choice(FLOATS)
    heads, key_size, value_size = key_heads * rng.randint(1, 2), size(rng, 1, 140), size(rng, 1, 140)
    args = {"q": randn(rng, b, key_heads, key_size, dtype=dtype), "k": unit(rng, b, key_heads, key_size, dtype=dtype)}
    args |= {
        "v": randn(rng, b, heads, value_size, dtype=dtype),
        "beta": 2 * randn(rng, b, heads, dtype=dtype).sigmoid(),
    }
    args |= {"state": randn(rng, b, heads, key_size, value_size, dtype=wide(dtype)), "use_qk_l2norm": True}
    if rng.random() < 0.7:
        args |= gates(rng, heads, key_size, dtype, b)
    return stepped, args


def causal_conv1d(rng):
    pack = rng.random() < 0.4
    b, t, c, taps = 1 if pack else size(rng, 0, 3), size(rng, 0, 80), size(rng, 0, 140), rng.randint(2, 8)
    dtype = rng.choice(FLOATS)
    weights = rng.choice((dtype, wide(dtype)))
    x = randn(rng, b, t, c, dtype=dtype)
    args = {"x": x if rng.random() < 0.5 else x.mT.contiguous().mT, "weight": randn(rng, c, taps, dtype=weights)}
    sequences = rng.randint(1, 4) if pack else b
    args["cu_seqlens"] = bounds(rng, sequences, t) if pack else None
    args["bias"] = rng.choice((None, randn(rng, c, dtype=weights)))
    args["activation"] = rng.choice((None, "silu"))
    state = randn(rng, sequences, c, taps - 1 + rng.randint(0, 2), dtype=dtype)
    return gossamer.causal_conv1d, args | {
        "initial_state": rng.choice((None, state)),
        "output_final_state": rng.random() < 0.5,
    }


def convolved(**args):
    """A step's output, and the inputs that it keeps."""
    return gossamer.causal_conv1d_step(**args), args["state"]


def causal_conv1d_step(rng):
    b, c, taps, dtype = size(rng, 0, 4), size(rng, 0, 140), rng.randint(2, 8), rng.choice(FLOATS)
    args = {"x": randn(rng, b, c, dtype=dtype), "state": randn(rng, b, c, taps - 1 + rng.randint(0, 2), dtype=dtype)}
    args |= {"weight": randn(rng, c, taps, dtype=dtype), "bias": rng.choice((None, randn(rng, c, dtype=dtype)))}
    return convolved, args | {"activation": rng.choice((None, "silu"))}


def self_referential(rng):
    b, t, heads, d = size(rng, 0, 3), size(rng, 0, 60), rng.randint(1, 3), size(rng, 1, 40)
    dtype = rng.choice(FLOATS)
    weight = randn(rng, heads, d, 3 * d + 4) * d**-0.5
    args = {"x": randn(rng, b, t, heads, d, dtype=dtype), "weight": weight.to(rng.choice((dtype, wide(dtype))))}
    shift = 0.1 * randn(rng, b, heads, d, 3 * d + 4, dtype=wide(dtype))
    return gossamer.self_referential, args | {
        "shift": rng.choice((None, shift)),
        "output_final_shift": rng.random() < 0.5,
    }


SUBJECTS = (delta_rule, delta_rule, delta_rule_step, causal_conv1d, causal_conv1d_step, self_referential)
