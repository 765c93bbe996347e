"""Rows, adapters, and which row has which."""

import torch

# Odd, so that no block divides them; more rows than a chunk or a tile for some adapter.
M, A, R, C, N = 43, 5, 3, 97, 61
NAMES = ("x", "a", "b", "out")


def make_ids(m=M, num_adapters=A, *, none=0.2, device="cpu", seed=0):
    """Random adapters, some rows without one."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(num_adapters, (m,), generator=generator)
    return ids.masked_fill(torch.rand(m, generator=generator) < none, -1).to(device)


def make_inputs(device, dtype=torch.float32, *, m=M, num_adapters=A, r=R, c=C, n=N, out=True):
    inputs = {
        "x": torch.randn(m, c, device=device),
        "a": torch.randn(num_adapters, r, c, device=device) / c**0.5,
        "b": torch.randn(num_adapters, n, r, device=device) / r**0.5,
        "out": torch.randn(m, n, device=device),
    }
    return {k: v.to(dtype) for k, v in inputs.items() if out or k != "out"}
