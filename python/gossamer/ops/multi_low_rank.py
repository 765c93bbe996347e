"""Low-rank updates of many adapters in one batch, each row by its own."""

from __future__ import annotations

import math

import torch

from gossamer import _backend
from gossamer._autocast import autocast
from gossamer._checks import (
    check_float,
    check_index,
    check_same_device,
    check_same_dtype,
    check_scale,
    check_shape,
    last_size,
)
from gossamer.ops._registration import register, register_autograd
from gossamer.ops.dispatch import Dispatch, dispatch
from gossamer.ops.low_rank import base_linear, check_factor_dtype, check_rank


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
    y = rows.new_zeros(rows.shape[0], b.shape[1]) if out is None else out.reshape(-1, b.shape[1])
    for e, (ae, be) in enumerate(zip(a.unbind(), b.unbind(), strict=True)):
        mine = (ids == e).nonzero().squeeze(1)
        rank = a.shape[1] if ranks is None else int(ranks[e])
        factor = scale[e].to(x.dtype) if isinstance(scale, torch.Tensor) else scale
        update = rows[mine] @ ae[:rank].T.to(x.dtype) @ be[:, :rank].T.to(x.dtype)
        y = y.index_add(0, mine, factor * update)
    return y.reshape(*x.shape[:-1], b.shape[1])


def _expert_ids(adapter_ids, num_adapters):
    if adapter_ids.device.type != "cpu":
        bad = (adapter_ids < 0) | (adapter_ids >= num_adapters)
        return torch.where(bad, num_adapters, adapter_ids).view(-1, 1)
    if adapter_ids.numel():
        least, most = torch.aminmax(adapter_ids)
        if least < -1 or most >= num_adapters:
            position = int(((adapter_ids < -1) | (adapter_ids >= num_adapters)).nonzero()[0])
            raise IndexError(
                f"adapter_ids must be in [-1, A) with A={num_adapters}, got {int(adapter_ids[position])} at flat "
                f"position {position}"
            )
    return torch.where(adapter_ids < 0, num_adapters, adapter_ids).view(-1, 1)


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


def _check_ids(adapter_ids: torch.Tensor, x: torch.Tensor) -> None:
    """An id for each row of ``x (..., C)``."""
    check_index("adapter_ids", adapter_ids)
    check_shape("adapter_ids", adapter_ids, tuple(x.shape[:-1]), "that of x but its last dimension")
    check_same_device(x=x, adapter_ids=adapter_ids)


def _check_ranks(ranks: torch.Tensor | None, rank: int) -> None:
    """On the CPU a rank outside ``[0, r]`` is an error. Reads values, so it stands inside the operators."""
    if ranks is None or ranks.device.type != "cpu" or not bool(((ranks < 0) | (ranks > rank)).any()):
        return
    adapter = int(((ranks < 0) | (ranks > rank)).nonzero()[0])
    raise IndexError(f"ranks must be in [0, r] with r={rank}, got {int(ranks[adapter])} for adapter {adapter}")


_FACTORS = "Tensor a, Tensor b, Tensor slots, Tensor offsets, Tensor? scales, float scale, Tensor? ranks"


def _saved_shape(x, a, slots, save):
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty((slots.shape[0], a.shape[1]) if save else (0,), dtype=dtype)


def _forward(x, a, b, slots, offsets, scales, scale, ranks, save, backend):
    _check_ranks(ranks, a.shape[1])
    y = x.new_empty(x.shape[0], b.shape[1])
    kernel = _backend.kernels(backend, "multi_low_rank").multi_low_rank
    return y, kernel(x, a, b, slots, offsets, scales, scale, ranks, y, False, save)


def _forward_fake(x, a, b, slots, offsets, scales, scale, ranks, save, backend):
    return x.new_empty(x.shape[0], b.shape[1]), _saved_shape(x, a, slots, save)


# s (M, r) is x·aᵀ by adapter, in float32 or float64, without the scale; empty unless save.
_multi_low_rank = register(
    f"multi_low_rank(Tensor x, {_FACTORS}, bool save, str backend) -> (Tensor y, Tensor s)", _forward, _forward_fake
)


def _add(out, x, a, b, slots, offsets, scales, scale, ranks, save, backend):
    _check_ranks(ranks, a.shape[1])
    kernel = _backend.kernels(backend, "multi_low_rank").multi_low_rank
    return kernel(x, a, b, slots, offsets, scales, scale, ranks, out.view(-1, b.shape[1]), True, save)


def _add_fake(out, x, a, b, slots, offsets, scales, scale, ranks, save, backend):
    return _saved_shape(x, a, slots, save)


# The same added in place to out (..., N), which is contiguous.
_multi_low_rank_ = register(
    f"multi_low_rank_(Tensor(a!) out, Tensor x, {_FACTORS}, bool save, str backend) -> Tensor s", _add, _add_fake
)


def _gradients(dy, x, a, b, s, slots, offsets, scales, scale, ranks, needs, backend):
    kernel = _backend.kernels(backend, "multi_low_rank").multi_low_rank_backward
    return kernel(dy, x, a, b, s, slots, offsets, scales, scale, ranks, needs)


def _gradients_fake(dy, x, a, b, s, slots, offsets, scales, scale, ranks, needs, backend):
    return tuple(
        t.new_empty(t.shape if need else (0,), dtype=t.dtype) for need, t in zip(needs, (x, a, b), strict=True)
    )


_multi_low_rank_backward = register(
    "multi_low_rank_backward(Tensor dy, Tensor x, Tensor a, Tensor b, Tensor s, Tensor slots, Tensor offsets, "
    "Tensor? scales, float scale, Tensor? ranks, bool[3] needs, str backend) -> (Tensor dx, Tensor da, Tensor db)",
    _gradients,
    _gradients_fake,
)


def _save(ctx, x, a, b, slots, offsets, scales, scale, ranks, save, backend, s, needs):
    if not save:
        raise RuntimeError("gossamer::multi_low_rank needs save=True where a gradient is wanted")
    ctx.scale, ctx.backend, ctx.needs = scale, backend, list(needs)
    ctx.save_for_backward(x, a, b, s, slots, offsets, scales, ranks)


def _factor_gradients(ctx, dy):
    if not any(ctx.needs):
        return None, None, None
    x, a, b, s, slots, offsets, scales, ranks = ctx.saved_tensors
    rows = dy.reshape(-1, b.shape[1])
    grads = _multi_low_rank_backward(rows, x, a, b, s, slots, offsets, scales, ctx.scale, ranks, ctx.needs, ctx.backend)
    return tuple(g if need else None for g, need in zip(grads, ctx.needs, strict=True))


def _setup_context(ctx, inputs, output):
    _, s = output
    ctx.mark_non_differentiable(s)
    ctx.set_materialize_grads(False)
    _save(ctx, *inputs, s.detach(), ctx.needs_input_grad[:3])


def _backward(ctx, dy, _ds):
    if dy is None:
        return (None,) * 10
    return *_factor_gradients(ctx, dy), *[None] * 7


register_autograd("multi_low_rank", _backward, _setup_context)


class _InPlace(torch.autograd.Function):
    """Autograd of the in-place operator, which ``register_autograd`` does not serve."""

    @staticmethod
    def forward(ctx, saved, out, *inputs):
        with torch._C._AutoDispatchBelowAutograd():
            s = _multi_low_rank_(out, *inputs)
        ctx.mark_dirty(out)
        ctx.set_materialize_grads(False)
        if any(ctx.needs_input_grad[2:5]):
            _save(ctx, *inputs, s, ctx.needs_input_grad[2:5])
        else:
            ctx.needs = []
        # Not a result: autograd lets a function that writes to a view have no other.
        saved.append(s)
        return out

    @staticmethod
    def backward(ctx, dy):
        if dy is None:
            return (None,) * 12
        return None, dy if ctx.needs_input_grad[1] else None, *_factor_gradients(ctx, dy), *[None] * 7


def _add_autograd(out, *inputs):
    if not torch.is_grad_enabled():
        with torch._C._AutoDispatchBelowAutograd():
            s = _multi_low_rank_(out, *inputs)
        if not out.is_inference():
            torch.autograd.graph.increment_version(out)
        return s
    saved = []
    _InPlace.apply(saved, out, *inputs)
    return saved[0]


torch.library.impl("gossamer::multi_low_rank_", "Autograd", _add_autograd)


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
    c = last_size("x", x, "(..., C)")
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
        _check_ids(adapter_ids, x)
        routing = adapter_dispatch(adapter_ids, num_adapters)
    if isinstance(scale, torch.Tensor):
        check_shape("scale", scale, (num_adapters,), "(A,)")
        check_float("scale", scale, backend)
        scale = scale.detach()
    else:
        check_scale("scale", scale)
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
    if backend == "reference":
        _check_ranks(ranks, rank)
        ids = row_adapters(routing).view(x.shape[:-1])
        y = multi_low_rank_reference(x, a, b, ids, scale=scale, out=out, ranks=ranks)
        return y if out is None else out.copy_(y)
    save = torch.is_grad_enabled() and (x.requires_grad or a.requires_grad or b.requires_grad)
    scales, number = (scale, 1.0) if isinstance(scale, torch.Tensor) else (None, float(scale))
    inputs = x.reshape(-1, c), a, b, routing.slots, routing.offsets, scales, number, ranks, save, backend
    if out is None:
        return _multi_low_rank(*inputs)[0].view(*x.shape[:-1], n)
    if out.is_contiguous():
        _multi_low_rank_(out, *inputs)
        return out
    # Where rows do not lie end to end, the update goes through a copy, which keeps the bits of those without adapter.
    rows = out.contiguous()
    _multi_low_rank_(rows, *inputs)
    return out.copy_(rows)


def multi_low_rank_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    adapter_ids: torch.Tensor | Dispatch,
    *,
    scale: torch.Tensor | float,
    bias: torch.Tensor | None = None,
    ranks: torch.Tensor | None = None,
) -> torch.Tensor:
    """A linear layer with a low-rank update of each row's own: ``y[m] = x[m]·Wᵀ + bias + scale[i]·x[m]·a[i]ᵀ·b[i]ᵀ``.

    :func:`multi_low_rank` over the layer's own product, which on the CPU is taken by the faster of torch's kernels and
    ours.

    Args:
        x: ``(..., C)`` float.
        weight: ``(N, C)``, the dtype of ``x``.
        a: ``(A, r, C)``, as for :func:`multi_low_rank`.
        b: ``(A, N, r)``, the dtype of ``a``.
        adapter_ids: the adapter of each row, as for :func:`multi_low_rank`; −1 means none.
        scale: the factor of the update: one number, or ``(A,)`` float32, an adapter's each. Not differentiable.
        bias: ``(N,)`` or None, the dtype of ``x``.
        ranks: ``(A,)`` int32 or int64 in ``[0, r]``, or None where all adapters have rank r.

    Returns:
        ``(..., N)`` in the dtype of ``x``. Differentiable in ``x``, ``weight``, ``a``, ``b`` and ``bias``. Under
        ``torch.autocast`` in its dtype.

    Raises:
        TypeError: as :func:`multi_low_rank`, of ``weight`` and ``bias`` too.
        ValueError: as :func:`multi_low_rank`, of ``weight`` and ``bias`` too.
        IndexError: as :func:`multi_low_rank`.
    """
    check_shape("weight", weight, (None, last_size("x", x, "(..., C)")), "(N, C)")
    if bias is not None:
        check_shape("bias", bias, (weight.shape[0],), "(N,)")
    x, weight, a, b, bias = autocast(x, weight, a, b, bias)
    check_same_device(x=x, weight=weight, bias=bias)
    if not isinstance(adapter_ids, Dispatch):
        _check_ids(adapter_ids, x)
        adapter_ids = adapter_ids.reshape(-1)
    rows = x.reshape(-1, x.shape[-1])
    y = base_linear(rows, weight, bias)
    y = multi_low_rank(rows, a, b, adapter_ids, scale=scale, out=y, ranks=ranks)
    return y.view(*x.shape[:-1], weight.shape[0])
