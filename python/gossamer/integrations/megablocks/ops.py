"""MegaBlocks' operators by name: sorting, counting, and moving rows between tokens and experts.

T tokens of D columns, ``top_k`` slots per token, R = T·top_k. ``indices (R,)`` holds the flat slot of each sorted row,
``bin_ids (R,)`` its expert, ``bins (E,)`` the rows up to the end of each expert, ``padded_bins (E,)`` the same with
experts padded. Moving rows is differentiable, in rows and weights, by :func:`gossamer.gather_reduce`.
"""

from __future__ import annotations

import torch

from gossamer._checks import (
    MAX_SIZE,
    check_floating,
    check_index,
    check_lengths,
    check_positive,
    check_same_device,
    check_sequence,
    check_shape,
    check_sizes,
    check_strided,
    check_tensor,
    shown,
)
from gossamer._trusted import check_range, is_readable
from gossamer.ops.dispatch import dispatch
from gossamer.ops.gather_reduce import gather_reduce

_SORTED_DTYPES = (torch.int16, torch.int32, torch.int64)
# Up to this many distinct keys, a counting sort is faster than a comparison sort; its table would be too long for more.
_MAX_COUNTING_BITS = 12


def _check_integers(name: str, x: torch.Tensor) -> None:
    check_tensor(name, x)
    check_strided(name, x)
    if x.dtype not in _SORTED_DTYPES:
        raise TypeError(f"{name} must be int16, int32 or int64, got {x.dtype}")


def _check_dim(x: torch.Tensor, dim: int) -> None:
    if not isinstance(dim, int) or isinstance(dim, bool):
        raise TypeError(f"dim must be an int, got {type(dim).__name__}")
    if not -x.dim() <= dim < x.dim():
        raise IndexError(f"dim must be in [-{x.dim()}, {x.dim()}) for x of shape {tuple(x.shape)}, got {dim}")


def sort(x: torch.Tensor, end_bit: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Stable sort of nonnegative integers by their lowest ``end_bit`` bits.

    Args:
        x: ``(R,)`` int16, int32 or int64.
        end_bit: bits to sort by; None for all.

    Returns:
        The sorted values and their original positions, both in the dtype of ``x``.

    Raises:
        TypeError: ``x`` is of another dtype.
        ValueError: ``x`` is not 1-D, has more elements than its dtype counts, or ``end_bit`` is below 1.
    """
    _check_integers("x", x)
    check_shape("x", x, (None,), "(R,)")
    if x.shape[0] > torch.iinfo(x.dtype).max:
        raise ValueError(f"x must have at most {torch.iinfo(x.dtype).max} elements to be numbered in {x.dtype}")
    bits = torch.iinfo(x.dtype).bits
    if end_bit is not None:
        check_positive(end_bit=end_bit)
    keys = x if end_bit is None or end_bit >= bits else x & (2**end_bit - 1)
    if end_bit is not None and end_bit <= _MAX_COUNTING_BITS:
        order = dispatch(keys.int().unsqueeze(1), 2**end_bit).slots.long()
    else:
        order = keys.argsort(stable=True)
    return x[order], order.to(x.dtype)


def histogram(x: torch.Tensor, max_val: int) -> torch.Tensor:
    """The number of occurrences of each of ``0 ... max_val - 1`` in ``x``; other values are not counted.

    Args:
        x: ``(R,)``, or ``(M, R)`` for one histogram per row; int16, int32 or int64.
        max_val: at least 1.

    Returns:
        ``(max_val,)`` or ``(M, max_val)`` int32.

    Raises:
        TypeError: ``x`` is of another dtype.
        ValueError: another rank, or ``max_val`` below 1.
    """
    _check_integers("x", x)
    check_lengths(max_val=max_val)
    if x.dim() not in (1, 2) or max_val < 1:
        raise ValueError(f"x must be 1-D or 2-D and max_val at least 1, got {tuple(x.shape)} and {max_val}")
    rows = x.long() if x.dim() == 2 else x.long().unsqueeze(0)
    inside = (rows >= 0) & (rows < max_val)
    counts = torch.zeros(rows.shape[0], max_val + 1, dtype=torch.int32, device=x.device)
    # Values out of range are counted separately, and dropped.
    counts.scatter_add_(1, rows.masked_fill(~inside, max_val), torch.ones_like(rows, dtype=torch.int32))
    counts = counts[:, :max_val]
    return counts if x.dim() == 2 else counts.squeeze(0)


def inclusive_cumsum(x: torch.Tensor, dim: int) -> torch.Tensor:
    """``y[i] = Σ_{j <= i} x[j]`` along ``dim``, in the dtype of ``x``; a vector of one element stays a vector."""
    _check_integers("x", x)
    _check_dim(x, dim)
    return x.cumsum(dim, dtype=x.dtype)


def exclusive_cumsum(x: torch.Tensor, dim: int) -> torch.Tensor:
    """``y[i] = Σ_{j < i} x[j]`` along ``dim``, in the dtype of ``x``; a vector of one element stays a vector."""
    return inclusive_cumsum(x, dim) - x


def round_up(x: torch.Tensor, value: int) -> torch.Tensor:
    """Each element of int32 ``x`` rounded up to a multiple of ``value``.

    Raises:
        TypeError: ``x`` is not int32, or ``value`` is not an int.
        ValueError: ``value`` is below 1.
    """
    _check_integers("x", x)
    if x.dtype != torch.int32:
        raise TypeError(f"x must be int32, got {x.dtype}")
    check_positive(value=value)
    if value > torch.iinfo(torch.int32).max:
        raise ValueError(f"value must fit int32, got {value}")
    return torch.div(x + (value - 1), value, rounding_mode="floor") * value


def repeat(x: torch.Tensor, tiling: tuple[int, ...]) -> torch.Tensor:
    """``x.repeat(*tiling)``; ``x`` itself for a single copy."""
    check_tensor("x", x)
    check_strided("x", x)
    check_sequence("tiling", tiling)
    check_sizes(**{f"tiling[{place}]": times for place, times in enumerate(tiling)})
    if len(tiling) < x.dim():
        raise ValueError(f"tiling must have a number for each dimension of x {tuple(x.shape)}, got {tuple(tiling)}")
    return x if all(times == 1 for times in tiling) else x.repeat(*tiling)


def sum(x: torch.Tensor, dim: int = 0) -> torch.Tensor:
    """``x.sum(dim)``; a view if the dimension has one element."""
    check_tensor("x", x)
    check_strided("x", x)
    _check_dim(x, dim)
    return x.squeeze(dim) if x.shape[dim] == 1 else x.sum(dim)


def replicate(x: torch.Tensor, bins: torch.Tensor, num_outputs: int) -> torch.Tensor:
    """Copy element b of each row to the columns of bin b: ``y[i, j] = x[i, b]`` for ``bins[b-1] <= j < bins[b]``.

    Args:
        x: ``(M, E)``, float or integer; differentiable.
        bins: ``(E,)`` int32 or int64, ascending.
        num_outputs: columns of the result.

    Returns:
        ``(M, num_outputs)``; zero from ``bins[-1]`` on.

    Raises:
        TypeError: ``bins`` is not an index tensor.
        ValueError: shapes or devices do not fit.
    """
    check_shape("x", x, (None, None), "(M, E)")
    check_index("bins", bins)
    check_shape("bins", bins, (x.shape[1],), "(E,)")
    check_strided("x", x)
    check_same_device(x=x, bins=bins)
    check_lengths(num_outputs=num_outputs)
    columns = torch.arange(num_outputs, dtype=bins.dtype, device=x.device)
    source = torch.searchsorted(bins, columns, right=True)
    if x.is_floating_point():
        return gather_reduce(x.t(), source, bounds="drop").t()
    return torch.cat([x, x.new_zeros(x.shape[0], 1)], dim=1).index_select(1, source)


def topology(
    padded_bins: torch.Tensor, block_size: int, output_block_rows: int, output_block_columns: int
) -> torch.Tensor:
    """Block columns of an expert layer's hidden activation: row r of expert e has ``e·columns + 0 ... columns - 1``.

    Args:
        padded_bins: ``(E,)`` int32 or int64, the padded rows up to the end of each expert.
        block_size: rows of a block, which divides all ``padded_bins``.
        output_block_rows: block rows of the matrix.
        output_block_columns: block columns of one expert.

    Returns:
        ``(output_block_rows · output_block_columns,)`` int32, which does not overflow for any number of experts. Block
        rows after the last expert have columns after the last.

    Raises:
        TypeError: ``padded_bins`` is not an index tensor.
        ValueError: ``block_size`` is below 1.
    """
    check_index("padded_bins", padded_bins)
    check_shape("padded_bins", padded_bins, (None,), "(E,)")
    check_positive(block_size=block_size)
    check_sizes(output_block_rows=output_block_rows, output_block_columns=output_block_columns)
    starts = torch.arange(output_block_rows, dtype=padded_bins.dtype, device=padded_bins.device) * block_size
    expert = torch.searchsorted(padded_bins, starts, right=True)
    columns = torch.arange(output_block_columns, device=padded_bins.device)
    return (expert.unsqueeze(1) * output_block_columns + columns).flatten().int()


def _check_rows(x: torch.Tensor, indices: torch.Tensor, top_k: int, **others: torch.Tensor | None) -> None:
    """Check the arguments common to the functions that move rows: ``x`` and integers on one device."""
    check_floating("x", x)
    check_index("indices", indices)
    check_shape("indices", indices, (None,), "(R,)")
    if not isinstance(top_k, int) or not 1 <= top_k <= MAX_SIZE or indices.shape[0] % top_k:
        raise ValueError(f"top_k must be an int that divides the R = {indices.shape[0]} rows, got {shown(top_k)}")
    for name, tensor in others.items():
        if name == "weights" and tensor is not None:
            check_floating(name, tensor)
            check_shape(name, tensor, (indices.shape[0],), "(R,)")
        elif name == "bin_ids":
            check_index(name, tensor)
            check_shape(name, tensor, (indices.shape[0],), "(R,)")
        elif name != "weights":
            check_index(name, tensor)
            check_shape(name, tensor, (None,), "(E,)")
    check_same_device(x=x, indices=indices, **others)
    if not is_readable(indices):
        return
    check_range("indices", indices, indices.shape[0])
    for name in ("bins", "padded_bins"):
        if name in others and (others[name].diff(prepend=others[name].new_zeros(1)) < 0).any():
            raise ValueError(f"{name} must ascend from 0 or more, got {others[name].tolist()}")
    if "bin_ids" in others:
        check_range("bin_ids", others["bin_ids"], others["bins"].shape[0])
        first = _starts(others["bins"])[others["bin_ids"].long()]
        if (first > torch.arange(indices.shape[0])).any():
            raise ValueError(f"bins must start each expert at or before its first row, got {others['bins'].tolist()}")


def _starts(bins: torch.Tensor) -> torch.Tensor:
    """The start of each bin, from ``bins (E,)``, which hold the ends."""
    return torch.cat([bins.new_zeros(1), bins[:-1]])


def _padded_rows(bin_ids: torch.Tensor, bins: torch.Tensor, padded_bins: torch.Tensor) -> torch.Tensor:
    """``(R,)`` int64: the position of each sorted row among the padded rows."""
    experts = bin_ids.long()
    ranks = torch.arange(bin_ids.shape[0], device=bin_ids.device) - _starts(bins)[experts]
    return ranks + _starts(padded_bins)[experts]


def _spread(x: torch.Tensor, indices: torch.Tensor, rows: torch.Tensor, num_rows: int, top_k: int) -> torch.Tensor:
    """``(num_rows, D)``: row ``rows[r]`` holds the token of sorted row r; rows without a token are zero."""
    tokens = torch.full((num_rows + 1,), x.shape[0], dtype=torch.int64, device=x.device)
    tokens = tokens.scatter(0, rows.clamp(max=num_rows), torch.div(indices, top_k, rounding_mode="floor").long())
    return gather_reduce(x, tokens[:num_rows], bounds="drop")


def _collect(
    x: torch.Tensor, indices: torch.Tensor, rows: torch.Tensor, weights: torch.Tensor | None, top_k: int
) -> torch.Tensor:
    """``(T, D)``: the weighted sum over a token's slots of row ``rows[r]`` of ``x``, the slot being sorted row r."""
    by_slot = torch.zeros_like(rows).scatter(0, indices.long(), rows).view(-1, top_k)
    return gather_reduce(x, by_slot, weights=None if weights is None else weights.view(-1, top_k), bounds="drop")


def padded_gather(
    x: torch.Tensor,
    indices: torch.Tensor,
    bin_ids: torch.Tensor,
    bins: torch.Tensor,
    padded_bins: torch.Tensor,
    top_k: int,
    output_rows: int | None = None,
) -> torch.Tensor:
    """Rows of tokens sorted by expert, each expert padded with zeros.

    Args:
        x: ``(T, D)`` float.
        indices: ``(R,)``, as the next three described above.
        bin_ids: ``(R,)``.
        bins: ``(E,)``.
        padded_bins: ``(E,)``.
        top_k: slots per token.
        output_rows: rows of the result, at least ``padded_bins[-1]``. None reads that number, and the host waits for
            the device.

    Returns:
        ``(output_rows, D)``.

    Raises:
        TypeError: dtypes do not fit.
        ValueError: shapes or devices do not fit.
    """
    check_shape("x", x, (None, None), "(T, D)")
    _check_rows(x, indices, top_k, bin_ids=bin_ids, bins=bins, padded_bins=padded_bins)
    check_shape("padded_bins", padded_bins, tuple(bins.shape), "(E,), as bins")
    check_shape("x", x, (indices.shape[0] // top_k, None), "(T, D)")
    output_rows = int(padded_bins[-1]) if output_rows is None else output_rows
    check_lengths(output_rows=output_rows)
    return _spread(x, indices, _padded_rows(bin_ids, bins, padded_bins), output_rows, top_k)


def padded_scatter(
    x: torch.Tensor,
    indices: torch.Tensor,
    bin_ids: torch.Tensor,
    weights: torch.Tensor | None,
    bins: torch.Tensor,
    padded_bins: torch.Tensor,
    top_k: int,
) -> torch.Tensor:
    """Undo :func:`padded_gather`: each token's slots, weighted and summed.

    Args:
        x: ``(at least padded_bins[-1], D)`` float.
        indices: ``(R,)``, as the others described above.
        bin_ids: ``(R,)``.
        weights: ``(R,)`` floating in slot order, or None for ones.
        bins: ``(E,)``.
        padded_bins: ``(E,)``.
        top_k: slots per token.

    Returns:
        ``(T, D)`` in the dtype of ``x``, accumulated in float32 (float64 for float64).

    Raises:
        TypeError: dtypes do not fit.
        ValueError: shapes or devices do not fit.
    """
    check_shape("x", x, (None, None), "(rows, D)")
    _check_rows(x, indices, top_k, bin_ids=bin_ids, weights=weights, bins=bins, padded_bins=padded_bins)
    check_shape("padded_bins", padded_bins, tuple(bins.shape), "(E,), as bins")
    return _collect(x, indices, _padded_rows(bin_ids, bins, padded_bins), weights, top_k)


def gather(
    x: torch.Tensor, indices: torch.Tensor, bin_ids: torch.Tensor, bins: torch.Tensor, top_k: int
) -> torch.Tensor:
    """Rows of tokens ``(T, D)`` sorted by expert, without padding: ``(R, D)``."""
    check_index("indices", indices)
    return padded_gather(x, indices, bin_ids, bins, bins, top_k, output_rows=indices.shape[0])


def scatter(
    x: torch.Tensor,
    indices: torch.Tensor,
    bin_ids: torch.Tensor,
    weights: torch.Tensor | None,
    bins: torch.Tensor,
    top_k: int,
) -> torch.Tensor:
    """Undo :func:`gather`: ``(R, D)`` to ``(T, D)``, each token's slots weighted and summed."""
    return padded_scatter(x, indices, bin_ids, weights, bins, bins, top_k)


def _binned_rows(bins: torch.Tensor, num_rows: int, bin_size: int) -> torch.Tensor:
    """``(R,)`` int64: the position of each sorted row in ``(E, bin_size)``, or E·bin_size if it exceeds its bin."""
    row = torch.arange(num_rows, dtype=bins.dtype, device=bins.device)
    expert = torch.searchsorted(bins, row, right=True)
    known = expert.clamp(max=max(bins.shape[0] - 1, 0))
    rank = row - _starts(bins)[known]
    places = bins.shape[0] * bin_size
    return torch.where((rank < bin_size) & (expert < bins.shape[0]), known * bin_size + rank, places)


def binned_gather(
    x: torch.Tensor, indices: torch.Tensor, bins: torch.Tensor, bin_size: int, top_k: int
) -> torch.Tensor:
    """Rows of tokens in one bin of equal size per expert; an expert's rows past the size of its bin are dropped.

    Args:
        x: ``(T, D)`` float.
        indices: ``(R,)``, as described above.
        bins: ``(E,)``.
        bin_size: rows of a bin, the capacity of an expert.
        top_k: slots per token.

    Returns:
        ``(E, bin_size, D)``, zero where an expert has fewer rows.

    Raises:
        TypeError: dtypes do not fit.
        ValueError: shapes or devices do not fit, or ``bin_size`` is negative or beyond int64.
    """
    check_shape("x", x, (None, None), "(T, D)")
    _check_rows(x, indices, top_k, bins=bins)
    check_shape("x", x, (indices.shape[0] // top_k, None), "(T, D)")
    check_sizes(bin_size=bin_size)
    if bins.shape[0] * bin_size > MAX_SIZE:
        raise ValueError(f"bin_size must be at most {MAX_SIZE} over E = {bins.shape[0]}, got {bin_size}")
    rows = _binned_rows(bins, indices.shape[0], bin_size)
    places = bins.shape[0] * bin_size
    return _spread(x, indices, rows, places, top_k).view(bins.shape[0], bin_size, x.shape[1])


def binned_scatter(
    x: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor | None, bins: torch.Tensor, top_k: int
) -> torch.Tensor:
    """Undo :func:`binned_gather`: each token's slots, weighted and summed; dropped ones add nothing.

    Args:
        x: ``(E, bin_size, D)`` float.
        indices: ``(R,)``, as described above.
        weights: ``(R,)`` floating in slot order, or None for ones.
        bins: ``(E,)``.
        top_k: slots per token.

    Returns:
        ``(T, D)`` in the dtype of ``x``, accumulated in float32 (float64 for float64).

    Raises:
        TypeError: dtypes do not fit.
        ValueError: shapes or devices do not fit.
    """
    _check_rows(x, indices, top_k, weights=weights, bins=bins)
    check_shape("x", x, (bins.shape[0], None, None), "(E, bin_size, D)")
    rows = _binned_rows(bins, indices.shape[0], x.shape[1])
    return _collect(x.flatten(0, 1), indices, rows, weights, top_k)
