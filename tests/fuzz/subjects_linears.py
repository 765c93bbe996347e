"""Linear layers in few bits or few blocks, what moves the blocks, and quantised experts from the tensors of a file."""

from __future__ import annotations

import copy

import torch
from draws import FLOATS, randn, size
from subjects_modules import layer_call

import gossamer
from gossamer import nn
from gossamer.nn import SharedExpert

FORMATS = ("fp8", "fp8_block", "int8", "int4", "mxfp4")


def quantized_linear(rng):
    """A layer of codes, made by hand or of another layer."""
    n, c, dtype = size(rng), 32 * size(rng, 1, 3), rng.choice(FLOATS)
    bias = rng.choice((None, randn(rng, n, dtype=dtype)))
    x = randn(rng, *rng.choice(((size(rng, 0),), (2, 3), ())), c, dtype=dtype)
    if rng.random() < 0.5:
        weight = gossamer.QuantizedExpertWeight.quantize(randn(rng, 1, n, c), rng.choice(FORMATS))
        return layer_call(nn.QuantizedLinear, ("x",)), {"weight": weight, "bias": bias, "x": x}
    linear = torch.nn.Linear(c, n, bias is not None, dtype=dtype)

    def make(linear, format, group_size, back):
        made = nn.QuantizedLinear.from_linear(linear, format, group_size=group_size)
        made.to_linear(back)
        return made

    call = layer_call(make, ("x",))
    call.__qualname__ = "QuantizedLinear.from_linear"
    call.signature.append("dtype")
    return call, {"linear": linear, "format": rng.choice(FORMATS), "group_size": 32, "back": torch.float32, "x": x}


def regrown(rng):
    """Training steps of a block-sparse layer whose blocks move."""
    c, n = 16 * size(rng, 1, 4), 16 * size(rng, 1, 4)
    rule = rng.choice(("set", "rigl", "dsl"))
    schedule = nn.CosineSchedule(0.5, 0.0, 9)
    args = {"rule": rule, "every": size(rng, 1, 3), "until": size(rng, 1, 9), "fraction": rng.choice((None, 0.5))}
    args |= {
        "final_fraction": rng.choice((None, 0.2)),
        "anneal": rng.choice(("cosine", "constant", schedule)),
        "seed": 3,
    }
    if args["anneal"] is schedule:
        args |= {"fraction": None, "final_fraction": None}
    args |= {"density": rng.choice((0.3, 1.0)), "steps": size(rng, 0, 4), "momentum": rng.choice((0.0, 0.9))}
    x = randn(rng, size(rng), c)

    def call(density, steps, momentum, **options):
        layer = nn.BlockSparseLinear(c, n, density=density, block=16)
        own = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=momentum)
        moving = nn.PruneAndRegrow(options.pop("model", layer), options.pop("optimizer", own), **options)
        for _ in range(steps):
            own.zero_grad()
            layer(x).square().mean().backward()
            moving.step()
        moving.load_state_dict(moving.state_dict())
        return layer.values.detach(), torch.tensor(moving.steps)

    call.__qualname__ = "PruneAndRegrow"
    call.fixed = ("density", "steps", "momentum")
    if rng.random() < 0.2:
        args[rng.choice(("model", "optimizer"))] = rng.choice((None, 3, "text", torch.nn.Linear(2, 2)))
    return call, args


def loaded_experts(rng):
    """A model with the codes of another, and what it computes."""
    e, h = size(rng, 1, 4), 32 * size(rng, 1, 2)
    torch.manual_seed(1)
    source = nn.MoE(h, 32, e, 1)
    gossamer.quantize_experts(source, rng.choice(FORMATS))
    tensors = {key: tensor for key, tensor in source.state_dict().items() if key.startswith("experts")}
    args = {"model": nn.MoE(h, 32, e, 1), "tensors": tensors, "device": rng.choice((None, "cpu"))}
    args |= {"x": randn(rng, size(rng, 0, 9), h)}

    def call(model, tensors, device, x):
        model = copy.deepcopy(model)
        gossamer.load_quantized_experts(model, tensors, device=device)
        with torch.no_grad():
            return model.experts(
                x, nn.given_experts(torch.zeros(len(x), 1, dtype=torch.int64), e, torch.ones(len(x), 1))
            )

    call.__qualname__ = "load_quantized_experts"
    call.fixed = ("x",)
    call.signature = ["gate_up_proj", "down_proj", "data", "scale"]
    return call, args


def around_training(rng):
    """What changes gradients or groups parameters before an optimizer's step, and the shared expert."""
    c, n, kind = size(rng), size(rng), rng.randrange(3)
    if kind == 0:
        args = {"hidden_size": c, "intermediate_size": n, "activation": rng.choice(("swiglu", "gelu")), "bias": False}
        args |= {"dtype": rng.choice(FLOATS), "x": None}
        args["x"] = randn(rng, size(rng, 0, 5), c, dtype=args["dtype"])
        call = layer_call(SharedExpert, ("x",))
        call.__qualname__ = "SharedExpert"
        return call, args
    layer = nn.LowRankLinear(c, n, rank=1) if kind == 1 else nn.LoRALinear(c, n, 1)
    args = {"module": torch.nn.Sequential(torch.nn.Linear(2, c), layer)}
    if kind == 1:

        def decay(module, decay):
            parameters = list(module.parameters()) if isinstance(module, torch.nn.Module) else []
            for parameter in parameters:
                parameter.grad = torch.ones_like(parameter)
            nn.frobenius_decay_(module, decay)
            return [parameter.grad.clone() for parameter in parameters]

        decay.__qualname__ = "frobenius_decay_"
        return decay, args | {"decay": 0.1}

    def groups(**args):
        made = torch.optim.AdamW(nn.lora_plus_groups(**args))
        return torch.tensor([[float(group["lr"]), len(group["params"])] for group in made.param_groups])

    groups.__qualname__ = "lora_plus_groups"
    return groups, args | {"lr": 1e-3, "ratio": 16.0, "embedding_lr": 1e-6, "weight_decay": 0.1}


SUBJECTS = (quantized_linear, regrown, loaded_experts, around_training)
