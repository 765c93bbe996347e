"""Launcher of the native maps of ids to rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from gossamer import _C

if TYPE_CHECKING:
    from gossamer.ops.map_ids import IdMaps, MapIds


def native_maps(maps: IdMaps) -> _C.IdMaps:
    """The maps in the form that ``_C`` takes."""
    return _C.IdMaps(maps.numbers(), maps.prime, maps.limit, maps.mixed)


def map_ids(args: MapIds) -> torch.Tensor:
    """The rows ``(*ids.shape, H)``.

    Raises:
        IndexError: an id is outside the limit.
    """
    ids, maps = args.ids.contiguous(), args.maps
    rows = torch.empty((*ids.shape, maps.count), dtype=maps.dtype)
    outside = _C.map_ids(
        ids.data_ptr(),
        ids.dtype == torch.int64,
        ids.numel(),
        native_maps(maps),
        rows.data_ptr(),
        rows.dtype == torch.int64,
        torch.get_num_threads(),
    )
    if outside >= 0:
        found = int(ids.reshape(-1)[outside])
        raise IndexError(f"ids must be in [0, N) with N={maps.limit}, got {found} at position {outside}")
    return rows
