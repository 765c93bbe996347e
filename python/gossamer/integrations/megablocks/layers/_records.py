"""The records that layers keep for the losses of a step: one record per layer, stored in the layer."""

from __future__ import annotations

import itertools
import weakref

import torch
from torch import nn

from gossamer._autocast import is_autocast

_order = itertools.count()
_layers: weakref.WeakSet[Recording] = weakref.WeakSet()


class Recording(nn.Module):
    """A layer whose last call stores a record for a loss.

    A layer's record is replaced by its next call, and removed when it is cleared or the layer is deleted: the records
    never exceed one step, and none outlives the model. Copies of a layer start without a record.
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
    """The records of all layers of a kind, or of those inside ``model``, in the order in which the layers were
    created.
    """
    return [layer._record for layer in _found(kind, model) if layer._record is not None]


def clear(kind: type[Recording], model: nn.Module | None = None) -> None:
    """Remove these records."""
    for layer in _found(kind, model):
        layer._record = None


def cast_if_autocast_enabled(x: torch.Tensor) -> torch.Tensor:
    """``x`` in autocast's dtype if autocast is on: moving rows in it saves bandwidth."""
    if is_autocast(x):
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x
