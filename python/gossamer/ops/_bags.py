"""Lists of ids as the primitives over tables take them: checks, bounds modes, and plain-torch views of them."""

from __future__ import annotations

import torch

from gossamer._checks import check_float, check_index, check_same_device, check_shape, check_tensor

MODES = ("sum", "mean", "max")
BOUNDS = ("raise", "clamp", "drop")


def bags_of(index: torch.Tensor, offsets: torch.Tensor | None) -> torch.Tensor:
    """The bag of each flat position of ``index``; for CSR, B for positions outside every bag."""
    positions = torch.arange(index.numel(), device=index.device)
    if offsets is None:
        return positions // max(index.shape[1], 1)
    bag = torch.searchsorted(offsets.contiguous(), positions, right=True) - 1
    return torch.where(bag < 0, offsets.numel() - 1, bag)


def live_ids(
    flat: torch.Tensor, num_rows: int | torch.Tensor, limit: torch.Tensor | None, padding_idx: int
) -> torch.Tensor:
    """Which flat ids contribute: inside the table, below ``limit``, and not the padding row."""
    live = (flat >= 0) & (flat < num_rows) & (flat != padding_idx)
    return live if limit is None else live & (flat < limit)


def num_bags_of(index: torch.Tensor, offsets: torch.Tensor | None) -> int:
    """B."""
    return index.shape[0] if offsets is None else offsets.shape[0] - 1


def bag_begins(index: torch.Tensor, offsets: torch.Tensor | None) -> torch.Tensor:
    """The first position of each bag, int64."""
    if offsets is not None:
        return offsets[:-1].long()
    return torch.arange(index.shape[0], device=index.device) * index.shape[1]


def check_ids(index: torch.Tensor, inside: torch.Tensor, num_rows: int) -> None:
    """Every id that is inside a bag must lie in ``[0, num_rows)``; reads values, so it is for the CPU."""
    bad = (((index < 0) | (index >= num_rows)).reshape(-1) & inside).nonzero()
    if bad.numel():
        position = int(bad[0])
        value = int(index.reshape(-1)[position])
        raise IndexError(f"index must be in [0, N) with N={num_rows}, got {value} at flat position {position}")


def check_offsets(index: torch.Tensor, offsets: torch.Tensor) -> None:
    """Offsets must ascend within ``[0, L]``; reads values, so it is for the CPU."""
    total = index.shape[0]
    before = torch.cat([offsets.new_zeros(1), offsets[:-1]])
    bad = ((offsets < before) | (offsets > total)).nonzero()
    if bad.numel():
        position = int(bad[0])
        raise ValueError(
            f"offsets must ascend within [0, L] with L={total}, got {int(offsets[position])} at position {position}"
        )


def check_weights_values(weights: torch.Tensor, live: torch.Tensor) -> None:
    """Weights of ids that contribute must not be NaN; reads values, so it is for the CPU."""
    bad = (weights.reshape(-1).isnan() & live).nonzero()
    if bad.numel():
        raise ValueError(f"weights must not be NaN, got nan at flat position {int(bad[0])}")


def check_bags(
    table: torch.Tensor,
    index: torch.Tensor,
    offsets: torch.Tensor | None,
    weights: torch.Tensor | None,
    backend: str,
    *,
    mode: str,
    padding_idx: int | None,
    include_last_offset: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, int]:
    """Check the arguments that the primitives over one table share, by everything but their values.

    Returns:
        ``index`` (B, J) or (L,), ``offsets`` with its last element, ``weights`` shaped like ``index``, and
        ``padding_idx`` with −1 for none.
    """
    check_float("table", table, backend)
    check_shape("table", table, (None, None), "(N, D)")
    check_index("index", index)
    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, got {mode!r}")
    if offsets is None:
        if index.dim() not in (1, 2):
            raise ValueError(f"index must have shape (B, J) or (L,) when offsets is None, got {tuple(index.shape)}")
    else:
        check_shape("index", index, (None,), "(L,) when offsets is given")
        offsets = _whole_offsets(index, offsets, include_last_offset)
    check_weights(index, weights, backend)
    if weights is not None and mode == "max":
        raise ValueError("weights cannot be given with mode='max'")
    check_same_device(table=table, index=index, offsets=offsets, weights=weights)
    n = table.shape[0]
    if padding_idx is not None and not -n <= padding_idx < n:
        raise ValueError(f"padding_idx must be in [-N, N) with N={n}, got {padding_idx}")
    padding = -1 if padding_idx is None else padding_idx % n
    if offsets is None and index.dim() == 1:
        index = index.unsqueeze(1)
        weights = None if weights is None else weights.unsqueeze(1)
    return index, offsets, weights, padding


def _whole_offsets(index, offsets, include_last_offset):
    check_index("offsets", offsets)
    check_shape("offsets", offsets, (None,), "(B+1,)" if include_last_offset else "(B,)")
    if not include_last_offset:
        offsets = torch.cat([offsets, offsets.new_full((1,), index.shape[0])])
    if offsets.shape[0] < 1:
        raise ValueError("offsets must have shape (B+1,) with at least one element, got (0,)")
    return offsets


def check_weights(index: torch.Tensor, weights: torch.Tensor | None, backend: str) -> None:
    """Per-sample weights are floating and shaped like ``index``."""
    if weights is not None:
        check_tensor("weights", weights)
        check_float("weights", weights, backend)
        check_shape("weights", weights, tuple(index.shape), "that of index")


def check_bounds(bounds: str, bounds_count: torch.Tensor | None, device: torch.device) -> None:
    """The mode must be known, the counter an int64 tensor of one element on ``device``."""
    if bounds not in BOUNDS:
        raise ValueError(f"bounds must be one of {BOUNDS}, got {bounds!r}")
    if bounds_count is not None:
        check_tensor("bounds_count", bounds_count)
        if bounds_count.dtype != torch.int64 or bounds_count.numel() != 1:
            raise TypeError(
                f"bounds_count must be int64 with one element, got {bounds_count.dtype} {tuple(bounds_count.shape)}"
            )
        if bounds_count.device != device:
            raise ValueError(f"bounds_count must be on the device of index, {device}, got {bounds_count.device}")


def raises(index: torch.Tensor, backend: str) -> bool:
    """Whether ``bounds="raise"`` raises here: where values can be read without stalling a stream."""
    return index.device.type == "cpu" and backend in ("reference", "native")


def apply_bounds(
    index: torch.Tensor,
    offsets: torch.Tensor | None,
    num_rows: int | torch.Tensor,
    bounds: str,
    bounds_count: torch.Tensor | None,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Repair lists as the mode says, and count what was wrong; no value is read on the host.

    Args:
        index: ``(B, J)`` or ``(L,)``.
        offsets: ``(B+1,)`` or None.
        num_rows: N, or one N for each id.
        bounds: ``"clamp"`` brings ids into ``[0, N−1]``; ``"drop"`` and ``"raise"`` leave them to the kernels. All but
            ``"raise"`` clamp offsets into ``[0, L]`` and make them ascend.
        bounds_count: incremented by the ids outside ``[0, N)`` and the offsets that changed.
        backend: which kernels follow.

    Returns:
        ``index`` and ``offsets``.
    """
    if bounds == "raise" and raises(index, backend):
        return index, offsets
    if bounds_count is not None:
        wrong = ((index < 0) | (index >= num_rows)).sum()
    if offsets is not None and bounds != "raise":
        repaired = offsets.clamp(0, index.shape[0]).cummax(0).values
        if bounds_count is not None:
            wrong = wrong + (repaired != offsets).sum()
        offsets = repaired
    if bounds_count is not None:
        bounds_count.add_(wrong.view(bounds_count.shape))
    if bounds == "clamp":
        # Ids of a table without rows become −1, which no kernel reads.
        high = num_rows - 1
        index = index.clamp(min=0)
        index = index.clamp(max=high) if isinstance(high, int) else index.minimum(high.to(index.dtype))
    return index, offsets
