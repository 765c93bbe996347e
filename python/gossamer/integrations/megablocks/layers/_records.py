"""What layers note for the losses of a step: one note a layer, kept by the layer itself."""

from __future__ import annotations

import itertools
import weakref

import torch
from torch import nn

_order = itertools.count()
_layers: weakref.WeakSet[Recording] = weakref.WeakSet()


class Recording(nn.Module):
    """A layer whose last call leaves something for a loss.

    The note of a layer is replaced by its next call, gone with the layer, and gone when it is cleared: what is kept is
    bounded by one step, and nothing outlives the model. Copies of a layer start without one.
    """

    def __init__(self) -> None:
        super().__init__()
        self._record: object = None
        self._enlist()

    def _enlist(self) -> None:
        self._rank = next(_order)
        _layers.add(self)

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_record": None}

    def __setstate__(self, state: dict[str, object]) -> None:
        super().__setstate__(state)
        self._enlist()


def _found(kind: type[Recording], model: nn.Module | None) -> list[Recording]:
    if model is not None:
        return [layer for layer in model.modules() if isinstance(layer, kind)]
    return sorted((layer for layer in _layers if isinstance(layer, kind)), key=lambda layer: layer._rank)


def records(kind: type[Recording], model: nn.Module | None = None) -> list[object]:
    """The notes of all layers of a kind, or of those inside ``model``; in the order that the layers were made in."""
    return [layer._record for layer in _found(kind, model) if layer._record is not None]


def clear(kind: type[Recording], model: nn.Module | None = None) -> None:
    """Forget them."""
    for layer in _found(kind, model):
        layer._record = None


def cast_if_autocast_enabled(x: torch.Tensor) -> torch.Tensor:
    """``x`` in autocast's dtype where it is on: rows are moved in it, which saves bandwidth."""
    if torch.is_autocast_enabled(x.device.type):
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x
