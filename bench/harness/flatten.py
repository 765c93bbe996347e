"""Finds the tensors in the arguments and results of modules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch


def tensors(value: object, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """(path, tensor) for every tensor in nested tuples, lists and mappings, in order; other objects are skipped."""
    if isinstance(value, torch.Tensor):
        yield path or "0", value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from tensors(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, (tuple, list)):
        for i, item in enumerate(value):
            yield from tensors(item, f"{path}.{i}" if path else str(i))


def floats(value: object) -> dict[str, torch.Tensor]:
    """Those of :func:`tensors` that hold floating-point numbers, by path."""
    return {path: tensor for path, tensor in tensors(value) if tensor.is_floating_point()}


def synchronise(device: torch.device) -> None:
    """Wait until all work queued on ``device`` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
