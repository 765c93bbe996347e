"""The expert layer as a function of plain tensors, and its inputs."""

import torch
from helpers import make_dispatch

import gossamer
from gossamer.ops.expert_mlp import expert_mlp_reference

# Odd, so that no block divides them.
T, E, K, H, I = 13, 5, 3, 97, 47
# For tests that are not about the edges of tiles.
SMALL = {"t": 7, "e": 2, "k": 2, "h": 33, "i": 19}
NAMES = ("x", "gate_up", "down", "weights", "gate_up_bias", "down_bias")
# The operators' names of the gradients of arguments.
GRADIENT_OF = dict(zip(NAMES, ("x", "gate_up.data", "down.data", "weights", "gate_up.bias", "down.bias"), strict=True))


def functions(dispatch, *, backend, **form):
    """The function under test and its reference, closed over the dispatch and the form."""

    def function(x, gate_up, down, weights, **biases):
        with gossamer.backend(backend):
            return gossamer.expert_mlp(x, gate_up, down, dispatch, weights, **biases, **form)

    def reference(x, gate_up, down, weights, **biases):
        return expert_mlp_reference(x, gate_up, down, dispatch, weights, **biases, **form)

    return function, reference


def small_dispatch(device, **routing):
    return make_dispatch(SMALL["t"], SMALL["e"], SMALL["k"], device, **routing)


def make_inputs(device, dtype=torch.float32, *, t=T, e=E, k=K, h=H, o=None, i=I, halves=2, bias=True):
    """Inputs by name: x and pre-activations of unit size, routing weights that sum to about one; ``o`` is H if None."""
    o = h if o is None else o
    inputs = {
        "x": torch.randn(t, h, device=device),
        "gate_up": torch.randn(e, halves * i, h, device=device) / h**0.5,
        "down": torch.randn(e, o, i, device=device) / i**0.5,
        "weights": torch.rand(t, k, device=device) * 2 / k,
        "gate_up_bias": torch.randn(e, halves * i, device=device),
        "down_bias": torch.randn(e, o, device=device),
    }
    return {name: v.to(dtype) for name, v in inputs.items() if bias or not name.endswith("bias")}


def transposed(weight):
    return weight.transpose(1, 2).contiguous().transpose(1, 2)
