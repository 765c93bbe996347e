"""Random tensors and sizes for the arguments of fuzzed calls."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# The dtypes of parameters, float32 more often than the others.
PARAMETERS = (None, None, torch.float32, torch.float16, torch.bfloat16, torch.float64)


def places(make: Callable) -> dict[str, object]:
    """What a constructor takes for the device and dtype of its parameters, at first."""
    parameters = inspect.signature(make).parameters
    return {name: parameters[name].default for name in ("device", "dtype") if name in parameters}


def generator(rng: random.Random) -> torch.Generator:
    """A CPU generator that follows from ``rng``."""
    return torch.Generator().manual_seed(rng.randrange(2**31))


def randn(rng: random.Random, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Standard normal numbers; ``dtype`` None is float32."""
    return torch.randn(shape, generator=generator(rng)).to(dtype or torch.float32)


def ids(rng: random.Random, high: int, *shape: int) -> torch.Tensor:
    """Integers in ``[0, high)``, int64."""
    return torch.randint(high, shape, generator=generator(rng))


def size(rng: random.Random, least: int = 1, most: int = 40) -> int:
    """A size, the smallest two as often as all others together."""
    return rng.choice([least, least + 1, rng.randint(least, most)])


def ragged(rng: random.Random, bags: int, most: int) -> torch.Tensor:
    """``(bags+1,)`` int64 offsets of lists of up to ``most`` ids."""
    lengths = [rng.randint(0, most) for _ in range(bags)]
    return torch.tensor([0, *lengths]).cumsum(0)


_nudges: torch.Generator | None = None


@contextmanager
def nudging(seed: int) -> Iterator[None]:
    """A call inside is one of slightly other numbers: :func:`nudged` changes them."""
    global _nudges
    _nudges = torch.Generator().manual_seed(seed)
    try:
        yield
    finally:
        _nudges = None


def nudged(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor``; inside :func:`nudging`, with the rounding errors of a few operations added."""
    if _nudges is None or tensor.dtype not in FLOATS or tensor.device.type != "cpu" or tensor.layout != torch.strided:
        return tensor
    noise = torch.randn(tensor.shape, generator=_nudges, dtype=torch.float64).to(tensor.dtype)
    return tensor * (1 + 4 * torch.finfo(tensor.dtype).eps * noise)


def loss(y: torch.Tensor) -> torch.Tensor:
    """The sum of squares in float64; its gradients take part in :func:`nudging`."""
    return nudged(y if y.dtype == torch.float64 else y.float()).double().square().sum()
