"""Layouts of quantised codes: row after row, or in panels of rows as the CPU's products of few rows read them."""

from __future__ import annotations

import sys

import torch
from torch._C import _are_functorch_transforms_active, _get_tracing_state, _len_torch_dispatch_stack
from torch.compiler import is_compiling

from gossamer import _backend

# Row after row; or in panels, which interleave the four-byte words of 16 rows.
ROWS, PANELS = LAYOUTS = ("rows", "panels")
_PANEL_ROWS, _WORD = 16, 4
# N must be a multiple of two panels, so that each half of a gated layer's first weight is made of whole panels.
_ROW_UNIT = 2 * _PANEL_ROWS


def check_layout(layout: str) -> None:
    """``layout`` must be one of :data:`LAYOUTS`."""
    if not isinstance(layout, str) or layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}")


def fits_panels(shape: tuple[int, ...]) -> bool:
    """Whether codes of a shape ``(E, N, bytes a row)`` can lie in panels."""
    _, n, row = shape
    return n % _ROW_UNIT == 0 and row % _WORD == 0 and n * row > 0


def arranged(codes: torch.Tensor, layout: str) -> torch.Tensor:
    """A copy of contiguous one-byte codes ``(E, N, ...)``, converted into ``layout`` from the other layout.

    In panels, word i of row r is word ``16·i + r % 16`` of the panel ``r // 16``.
    """
    e, n, _ = codes.shape
    out = torch.empty(codes.shape, dtype=codes.dtype, device=codes.device)
    native = layout == PANELS and not is_compiling() and type(out) is torch.Tensor and out.is_cpu
    if native := native and _backend.native_unavailable() is None:
        from gossamer.cpu_kernels.hash_table import advise_huge_pages, collapse_huge_pages

        advise_huge_pages(out)
    shapes = {ROWS: (e, n // _PANEL_ROWS, _PANEL_ROWS, -1), PANELS: (e, n // _PANEL_ROWS, -1, _PANEL_ROWS)}
    source = codes if codes.storage_offset() % _WORD == 0 else codes.clone()
    source = _words(source).view(shapes[ROWS if layout == PANELS else PANELS])
    _words(out).view(shapes[layout]).copy_(source.transpose(2, 3))
    if native:
        # The C library may have taken memory that was in use before, on small pages.
        collapse_huge_pages(out)
    return out


def gain_from_panels(buffers: dict[str, torch.Tensor | None], name: str) -> bool:
    """Whether products read the codes ``buffers[name]`` faster in panels, and nothing else refers to them.

    False in compiled or traced code, which would hold on to the rearranged copy.
    """
    if is_compiling() or (codes := buffers.get(name)) is None or type(codes) is not torch.Tensor:
        return False
    if not _backend.reads_panels(codes) or not fits_panels(codes.shape) or not codes.is_contiguous():
        return False
    if _len_torch_dispatch_stack() or _are_functorch_transforms_active() or _get_tracing_state() is not None:
        return False
    storage, count_users = codes.untyped_storage(), getattr(torch._C, "_storage_Use_Count", None)
    if storage.nbytes() != codes.nbytes or storage.is_shared() or count_users is None:
        return False
    # The tensor and ``storage`` refer to the storage; the buffer, ``codes`` and getrefcount's argument to the tensor.
    return count_users(storage._cdata) <= 2 and sys.getrefcount(codes) <= 3


def _words(codes: torch.Tensor) -> torch.Tensor:
    return codes.view(torch.uint8).view(torch.int32)
