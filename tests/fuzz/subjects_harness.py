"""The harness for a user's own layers: profiles, and replacements held against originals."""

from __future__ import annotations

from unittest import mock

import torch
from draws import randn, size

import gossamer
from gossamer import nn
from gossamer.bench.harness.ceilings import Ceilings

# Of no machine: to measure one takes seconds.
CEILINGS = Ceilings(dict.fromkeys(("fp32", "fp16", "bf16", "fp64"), 1e12), 1e11, 1e11)


def _layer(rng, hidden):
    kind = rng.randrange(3)
    if kind == 0:
        return torch.nn.Linear(hidden, size(rng))
    if kind == 1:
        return nn.MoE(hidden, 8, 2, 1)
    return torch.nn.Sequential(torch.nn.Linear(hidden, 8), torch.nn.Tanh(), nn.LoRALinear(8, 4, 2))


def profiled(rng):
    """A profile of few calls."""
    hidden = size(rng, 1, 9)
    layer = _layer(rng, hidden)
    args = {"module": layer, "x": randn(rng, size(rng, 1, 6), hidden)}
    args |= {"reference": rng.choice((None, _layer(rng, hidden))), "kwargs": rng.choice((None, {}))}
    args |= {"backward": rng.random() < 0.5, "memory": rng.random() < 0.3, "trace": None, "plot": None, "budget": 1e-3}

    def call(module, x, **options):
        with mock.patch("gossamer.bench.harness.profile.measure", lambda *_: CEILINGS):
            found = gossamer.profile(module, x, **options)
        return torch.tensor([len(found.rows) > 0, len(str(found)) > 0])

    call.__qualname__ = "profile"
    # What a layer says of its own inputs is not this function's.
    call.fixed = ("x",)
    return call, args


def checked(rng):
    """A layer and one with the same weights, or with others."""
    hidden = size(rng, 1, 9)
    torch.manual_seed(rng.randrange(99))
    layer = torch.nn.Linear(hidden, size(rng))
    other = torch.nn.Linear(layer.in_features, layer.out_features)
    args = {"module": layer, "replacement": rng.choice((layer, other, lambda layer: layer, lambda: other))}
    args |= {"x": randn(rng, size(rng, 1, 6), hidden), "kwargs": rng.choice((None, {})), "seed": 3}
    args |= {"backward": rng.random() < 0.5, "speed": False}

    def call(module, replacement, x, **options):
        found = gossamer.check(module, replacement, x, **options)
        return torch.tensor([found.ok, len(str(found)) > 0])

    call.__qualname__ = "check"
    call.fixed = ("x",)
    return call, args


def measured(rng):
    """One of both; profiles take seconds."""
    return (profiled if rng.random() < 0.03 else checked)(rng)


SUBJECTS = (measured,)
