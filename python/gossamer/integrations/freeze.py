"""Freeze every table of a model."""

from __future__ import annotations

from torch import nn

from gossamer.integrations import surgery
from gossamer.integrations.compressed_layers import InPlace
from gossamer.nn import Table


def freeze_embeddings(model: nn.Module) -> dict[str, int]:
    """Convert every table of a model, in place, to the form that is served, by its :meth:`gossamer.nn.Table.freeze`.

    Tables are what :func:`gossamer.compress_embeddings` placed, and every other :class:`gossamer.nn.Table`. Layers of
    torch, such as small fields that stayed dense, remain as they are.

    Args:
        model: any module.

    Returns:
        Bytes that each table holds now, by its path in the model; tables that were frozen before are included.

    Raises:
        TypeError: ``model`` is not a ``torch.nn.Module``.
        ValueError: ``model`` holds no table.
    """
    surgery.check_model(model)
    tables, inner = {}, set()
    for name, module in model.named_modules():
        if isinstance(module, (Table, InPlace)) and module not in inner:
            tables[name] = module
            inner.update(module.modules())
    if not tables:
        raise ValueError(f"model must hold tables of gossamer.nn, got none in {type(model).__name__}")
    for table in tables.values():
        table.freeze()
    return {name: table.nbytes() for name, table in tables.items()}
