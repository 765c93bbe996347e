"""Low-rank updates of many adapters in one batch, each row by its own."""

from __future__ import annotations

import math

import torch

from gossamer import _backend
from gossamer.ops._autocast import autocast
from gossamer.ops._checks import (
    check_float,
    check_index,
    check_same_device,
    check_same_dtype,
    check_shape,
    check_tensor,
)
from gossamer.ops._registration import register
from gossamer.ops.dispatch import Dispatch, dispatch
from gossamer.ops.low_rank import check_factor_dtype, check_rank


def multi_low_rank_reference(
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    adapter_ids: torch.Tensor,
    *,
    scale: torch.Tensor | float,
    out: torch.Tensor | None = None,
    ranks: torch.Tensor | None = None,
) -> torch.Tensor:
    """:func:`multi_low_rank` as a loop over adapters in plain torch, differentiable; ``out`` is not written to."""
    rows, ids = x.reshape(-1, x.shape[-1]), adapter_ids.reshape(-1)
    y = rows.new_zeros(rows.shape[0], b.shape[1])
    if out is not None:
        y = y + out.reshape(y.shape)
    for e in range(a.shape[0]):
        mine = (ids == e).nonzero().squeeze(1)
        rank = a.shape[1] if ranks is None else int(ranks[e])
        factor = scale[e].to(x.dtype) if isinstance(scale, torch.Tensor) and scale.dim() else scale
        update = rows[mine] @ a[e, :rank].T.to(x.dtype) @ b[e, :, :rank].T.to(x.dtype)
        y = y.index_add(0, mine, factor * update)
    return y.view(*x.shape[:-1], b.shape[1])


def _expert_ids(adapter_ids, num_adapters):
    bad = (adapter_ids < -1) | (adapter_ids >= num_adapters)
    if adapter_ids.device.type == "cpu" and bool(bad.any()):
        position = int(bad.reshape(-1).nonzero()[0])
        raise IndexError(
            f"adapter_ids must be in [-1, A) with A={num_adapters}, got {int(adapter_ids.reshape(-1)[position])} at "
            f"flat position {position}"
        )
    return torch.where(bad | (adapter_ids < 0), num_adapters, adapter_ids).view(-1, 1)


def _expert_ids_fake(adapter_ids, num_adapters):
    return adapter_ids.new_empty(adapter_ids.numel(), 1)


# Adapter ids as dispatch takes them: no adapter is the id A. The check reads values, so it stands inside an operator.
_adapter_expert_ids = register(
    "adapter_expert_ids(Tensor adapter_ids, int num_adapters) -> Tensor", _expert_ids, _expert_ids_fake
)


def adapter_dispatch(adapter_ids: torch.Tensor, num_adapters: int) -> Dispatch:
    """Sort rows by adapter, once for every layer of a model: :func:`multi_low_rank` takes the result for the ids.

    Args:
        adapter_ids: ``(...)`` int32 or int64 in ``[−1, A)``, the adapter of each row; −1 means none.
        num_adapters: A, at least 1.

    Returns:
        A :class:`gossamer.Dispatch` with one slot a row.

    Raises:
        TypeError: ``adapter_ids`` is no int32 or int64 tensor.
        IndexError: on the CPU, an id outside ``[−1, A)``; on CUDA such a row has no adapter.
        ValueError: ``num_adapters < 1``.
    """
    check_index("adapter_ids", adapter_ids)
    if num_adapters < 1:
        raise ValueError(f"num_adapters must be at least 1, got {num_adapters}")
    return dispatch(_adapter_expert_ids(adapter_ids.reshape(-1), num_adapters), num_adapters)


def row_adapters(routing: Dispatch) -> torch.Tensor:
    """``(M,)`` int64: the adapter of each row of a dispatch of adapters, −1 for none."""
    sorted_ids = torch.searchsorted(routing.offsets[1:].long(), routing.rows.long(), right=True)
    return torch.where(sorted_ids >= routing.num_experts, -1, sorted_ids)


def multi_low_rank(
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    adapter_ids: torch.Tensor | Dispatch,
    *,
    scale: torch.Tensor | float,
    out: torch.Tensor | None = None,
    ranks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Low-rank updates of rows, each by its own adapter: ``y[m] = out[m] + scale[i]·x[m]·a[i]ᵀ·b[i]ᵀ``, ``i = id[m]``.

    After Punica (Chen et al., 2023) and S-LoRA (Sheng et al., 2023); differentiable, so several adapters train in one
    step. Rows are sorted by adapter on the device, nothing is read on the host, and no shape depends on the ids, so the
    ids may change between replays of a CUDA graph. An adapter without rows gets a zero gradient.

    Adapters of different ranks lie side by side in factors as wide as the largest: adapter ``i`` is
    ``a[i, :ranks[i]]`` and ``b[i, :, :ranks[i]]``, what lies beyond is not read and gets zero gradient.

    Args:
        x: ``(..., C)`` float.
        a: ``(A, r, C)`` for A adapters, ``1 <= r <= min(N, C)``; the dtype of ``x``, or float32, which is rounded to it
            for the products while its gradient is not.
        b: ``(A, N, r)``, the dtype of ``a``.
        adapter_ids: ``(...)`` int32 or int64 in ``[−1, A)``, the shape of ``x`` but its last dimension; −1 means no
            adapter. Or what :func:`gossamer.adapter_dispatch` made of them.
        scale: the factor of the update: one number, or ``(A,)`` float32, an adapter's each. Not differentiable.
        out: ``(..., N)`` in the dtype of ``x``, to which the update is added in place, or None for zeros.
        ranks: ``(A,)`` int32 or int64 in ``[0, r]``, on the device of ``x``, or None where all adapters have rank r.

    Returns:
        ``(..., N)`` in the dtype of ``x``, accumulated in float32 (float64 for float64); ``out`` itself where given.
        Rows without an adapter are those of ``out``, bit for bit. Differentiable in ``x``, ``a``, ``b`` and ``out``.

    Raises:
        TypeError: an argument is no tensor, or a dtype is not supported, or dtypes differ.
        ValueError: shapes or devices do not fit, the rank is 0 or beyond the matrix.
        IndexError: on the CPU, an id outside ``[−1, A)`` or a rank outside ``[0, r]``; on CUDA such a row has no
            adapter, and such a rank is r.
    """
    check_tensor("x", x)
    if x.dim() < 1:
        raise ValueError(f"x must have shape (..., C), got {tuple(x.shape)}")
    c = x.shape[-1]
    check_shape("a", a, (None, None, c), "(A, r, C)")
    num_adapters, rank = a.shape[:2]
    check_shape("b", b, (num_adapters, None, rank), "(A, N, r)")
    n = b.shape[1]
    if num_adapters < 1:
        raise ValueError("a must hold at least one adapter, got A=0")
    check_rank(rank, n, c)
    if out is not None:
        check_shape("out", out, (*x.shape[:-1], n), "(..., N)")
    else:
        x, a, b = autocast(x, a, b)
    backend = _backend.resolve("multi_low_rank", x)
    check_float("x", x, backend)
    check_factor_dtype(x, a, b)
    check_same_dtype(x=x, out=out)
    num_rows = math.prod(x.shape[:-1])
    if isinstance(adapter_ids, Dispatch):
        routing = adapter_ids
        if (routing.num_tokens, routing.top_k, routing.num_experts) != (num_rows, 1, num_adapters):
            raise ValueError(
                f"adapter_ids must be a dispatch of {num_rows} rows with one of {num_adapters} adapters each, got "
                f"{routing.num_tokens} rows, {routing.top_k} slots each, {routing.num_experts} adapters"
            )
    else:
        check_index("adapter_ids", adapter_ids)
        check_shape("adapter_ids", adapter_ids, tuple(x.shape[:-1]), "that of x but its last dimension")
        check_same_device(x=x, adapter_ids=adapter_ids)
        routing = adapter_dispatch(adapter_ids, num_adapters)
    if isinstance(scale, torch.Tensor):
        check_shape("scale", scale, (num_adapters,), "(A,)")
        check_float("scale", scale, backend)
    if ranks is not None:
        check_index("ranks", ranks)
        check_shape("ranks", ranks, (num_adapters,), "(A,)")
    check_same_device(
        x=x,
        a=a,
        b=b,
        dispatch=routing.slots,
        scale=scale if isinstance(scale, torch.Tensor) else None,
        out=out,
        ranks=ranks,
    )
    ids = row_adapters(routing).view(x.shape[:-1])
    y = multi_low_rank_reference(x, a, b, ids, scale=scale, ranks=ranks)
    return y if out is None else out.add_(y)
