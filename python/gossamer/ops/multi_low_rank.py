"""Low-rank updates by many adapters in one batch; each row has its own adapter."""

from __future__ import annotations

import functools
import math
from types import ModuleType
from typing import NamedTuple

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
    check_strided,
    check_written,
    last_size,
)
from gossamer.ops._records import Layout, define, define_gradients
from gossamer.ops._registration import register
from gossamer.ops.dispatch import Dispatch, check_dispatch, dispatch
from gossamer.ops.low_rank import base_linear, check_factor_dtype, check_rank
from gossamer.ops.quantized_expert_weight import QuantizedExpertWeight
from gossamer.ops.quantized_weight import QuantizedWeight


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


# Adapter ids in the form that dispatch takes, where A means no adapter. The check reads values, so it runs inside an
# operator.
_adapter_expert_ids = register(
    "adapter_expert_ids(Tensor adapter_ids, int num_adapters) -> Tensor", _expert_ids, _expert_ids_fake
)


def adapter_dispatch(adapter_ids: torch.Tensor, num_adapters: int) -> Dispatch:
    """Sort rows by adapter, once for all layers of a model; :func:`multi_low_rank` takes the result instead of ids.

    Args:
        adapter_ids: ``(...)`` int32 or int64 in ``[−1, A)``, the adapter of each row; −1 means none.
        num_adapters: A, at least 1.

    Returns:
        A :class:`gossamer.Dispatch` with one slot per row.

    Raises:
        TypeError: ``adapter_ids`` is not an int32 or int64 tensor.
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
    """``adapter_ids`` must hold one id for each row of ``x (..., C)``."""
    check_index("adapter_ids", adapter_ids)
    check_shape("adapter_ids", adapter_ids, tuple(x.shape[:-1]), "that of x but its last dimension")
    check_same_device(x=x, adapter_ids=adapter_ids)


def _check_ranks(ranks: torch.Tensor | None, rank: int) -> None:
    """On the CPU a rank outside ``[0, r]`` is an error. Reads values, so it is called inside the operators."""
    if ranks is None or ranks.device.type != "cpu" or not bool(((ranks < 0) | (ranks > rank)).any()):
        return
    adapter = int(((ranks < 0) | (ranks > rank)).nonzero()[0])
    raise IndexError(f"ranks must be in [0, r] with r={rank}, got {int(ranks[adapter])} for adapter {adapter}")


class MultiLowRank(NamedTuple):
    """Arguments of low-rank updates of rows, each by its own adapter.

    Attributes:
        x: ``(M, C)`` float.
        a: ``(A, r, C)``, the dtype of ``x`` or float32.
        b: ``(A, N, r)``, the dtype of ``a``.
        slots: ``(M,)`` int32, the rows sorted by adapter, as ``offsets`` from a dispatch.
        offsets: ``(A+1,)`` int32.
        scales: ``(A,)`` float, or None if all adapters use ``scale``.
        ranks: ``(A,)`` int, or None if every adapter has rank r.
        scale: the scale of all adapters if ``scales`` is None.
        save: whether to save ``x·aᵀ`` for the backward pass.
    """

    x: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    slots: torch.Tensor
    offsets: torch.Tensor
    scales: torch.Tensor | None
    ranks: torch.Tensor | None
    scale: float
    save: bool


class MultiLowRankAdd(NamedTuple):
    """Arguments of the updates added in place to ``out (..., N)``, which is contiguous."""

    out: torch.Tensor
    update: MultiLowRank


class MultiLowRankBackward(NamedTuple):
    """Arguments of the backward pass.

    Attributes:
        dy: ``(M, N)``.
        s: the ``x·aᵀ`` that the forward pass saved.
        forward: the complete arguments of the forward pass.
        needs: names of the needed gradients, among :data:`GRADIENTS`.
    """

    dy: torch.Tensor
    s: torch.Tensor
    forward: MultiLowRank
    needs: list[str]


# The differentiable arguments.
GRADIENTS = ("x", "a", "b")


@functools.cache
def _kernels(backend: str) -> ModuleType:
    if backend == "native":
        from gossamer.cpu_kernels import multi_low_rank
    else:
        from gossamer.triton_kernels import multi_low_rank
    return multi_low_rank


def _saved_shape(args: MultiLowRank) -> torch.Tensor:
    dtype = torch.promote_types(args.x.dtype, torch.float32)
    return args.x.new_empty((args.slots.shape[0], args.a.shape[1]) if args.save else (0,), dtype=dtype)


def _forward(args: MultiLowRank, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    _check_ranks(args.ranks, args.a.shape[1])
    y = args.x.new_empty(args.x.shape[0], args.b.shape[1])
    return y, _kernels(backend).multi_low_rank(args, y, add=False)


def _forward_fake(args: MultiLowRank) -> tuple[torch.Tensor, torch.Tensor]:
    return args.x.new_empty(args.x.shape[0], args.b.shape[1]), _saved_shape(args)


# s (M, r) is x·aᵀ by adapter, in float32 or float64, without the scale; empty unless save.
_multi_low_rank = define(
    "multi_low_rank", MultiLowRank, kernel=_forward, fake=_forward_fake, returns="(Tensor y, Tensor s)"
)


def _add(args: MultiLowRankAdd, backend: str) -> torch.Tensor:
    update = args.update
    _check_ranks(update.ranks, update.a.shape[1])
    return _kernels(backend).multi_low_rank(update, args.out.view(-1, update.b.shape[1]), add=True)


def _add_fake(args: MultiLowRankAdd) -> torch.Tensor:
    return _saved_shape(args.update)


_multi_low_rank_ = define(
    "multi_low_rank_", MultiLowRankAdd, kernel=_add, fake=_add_fake, returns="Tensor s", mutates=("out",)
)


def _backward(args: MultiLowRankBackward, backend: str) -> dict[str, torch.Tensor]:
    return _kernels(backend).multi_low_rank_backward(args)


def _backward_fake(args: MultiLowRankBackward) -> dict[str, torch.Tensor]:
    tensors = {name: getattr(args.forward, name) for name in args.needs}
    return {name: tensor.new_empty(tensor.shape) for name, tensor in tensors.items()}


_multi_low_rank_backward = define_gradients(
    "multi_low_rank_backward", MultiLowRankBackward, GRADIENTS, kernel=_backward, fake=_backward_fake
)


def _factor_gradients(dy, s, args: MultiLowRank, needed, backend: str) -> dict[str, torch.Tensor]:
    """The gradients that are ``needed``, by name."""
    needs = [name for name in GRADIENTS if name in needed]
    if not needs:
        return {}
    return _multi_low_rank_backward(MultiLowRankBackward(dy.reshape(-1, args.b.shape[1]), s, args, needs), backend)


def _check_saved(args: MultiLowRank) -> None:
    if not args.save:
        raise RuntimeError("gossamer::multi_low_rank needs save=True where a gradient is wanted")


def _save(ctx, args: MultiLowRank, output: tuple[torch.Tensor, torch.Tensor]):
    _, s = output
    ctx.mark_non_differentiable(s)
    ctx.set_materialize_grads(False)
    _check_saved(args)
    return args, s.detach()


def _differentiate(ctx, args: MultiLowRank, tensors, dy: torch.Tensor | None, _ds):
    return {} if dy is None else _factor_gradients(dy, *tensors, args, ctx.needs, ctx.backend)


_multi_low_rank.differentiate(_save, _differentiate)

_ADD_LAYOUT = Layout(MultiLowRankAdd)


class _InPlace(torch.autograd.Function):
    """Autograd of the in-place operator, which :meth:`Operator.differentiate` does not support."""

    @staticmethod
    def forward(ctx, saved, *flat):
        out, args = _ADD_LAYOUT.restore(flat[:-1])
        # mark_dirty counts the change; the operator must not count it a second time.
        with torch._C._AutoDispatchBelowAutograd(), torch.autograd._unsafe_preserve_version_counter(out):
            s = torch.ops.gossamer.multi_low_rank_.default(*flat)
        ctx.mark_dirty(out)
        ctx.set_materialize_grads(False)
        wanted = zip(_ADD_LAYOUT.paths, ctx.needs_input_grad[1:], strict=False)
        ctx.needs = {path.removeprefix("update.") for path, want in wanted if want}
        if ctx.needs - {"out"}:
            _check_saved(args)
            tensors = {name: value for name, value in args._asdict().items() if isinstance(value, torch.Tensor)}
            ctx.args = args._replace(**dict.fromkeys(tensors))
            ctx.names, ctx.backend = list(tensors), flat[-1]
            ctx.save_for_backward(s, *tensors.values())
        # Not returned: autograd allows a function that writes to a view only one result.
        saved.append(s)
        return out

    @staticmethod
    def backward(ctx, dy):
        found = {}
        if dy is not None:
            found["out"] = dy if "out" in ctx.needs else None
            if ctx.needs - {"out"}:
                s, *tensors = ctx.saved_tensors
                args = ctx.args._replace(**dict(zip(ctx.names, tensors, strict=True)))
                gradients = _factor_gradients(dy, s, args, ctx.needs, ctx.backend)
                found |= {f"update.{name}": gradient for name, gradient in gradients.items()}
        return None, *map(found.get, _ADD_LAYOUT.paths), None


def _add_autograd(out, *inputs):
    if not torch.is_grad_enabled():
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.gossamer.multi_low_rank_.default(out, *inputs)
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

    Adapters of different ranks are stored in factors as wide as the largest rank: adapter ``i`` is ``a[i, :ranks[i]]``
    and ``b[i, :, :ranks[i]]``; elements beyond its rank are not read and get zero gradient.

    Args:
        x: ``(..., C)`` float.
        a: ``(A, r, C)`` for A adapters, ``1 <= r <= min(N, C)``; the dtype of ``x``, or float32, which is rounded to it
            for the products while its gradient is not.
        b: ``(A, N, r)``, the dtype of ``a``.
        adapter_ids: ``(...)`` int32 or int64 in ``[−1, A)``, the shape of ``x`` but its last dimension; −1 means no
            adapter. Or the result of :func:`gossamer.adapter_dispatch` for them.
        scale: the factor of the update: one number, or ``(A,)`` float32, an adapter's each. Not differentiable.
        out: ``(..., N)`` in the dtype of ``x``, to which the update is added in place, or None for zeros.
        ranks: ``(A,)`` int32 or int64 in ``[0, r]``, on the device of ``x``, or None where all adapters have rank r.

    Returns:
        ``(..., N)`` in the dtype of ``x``, accumulated in float32 (float64 for float64); ``out`` itself if given. Rows
        without an adapter equal those of ``out``, bit for bit. Differentiable in ``x``, ``a``, ``b`` and ``out``.

    Raises:
        TypeError: an argument is not a tensor, or a dtype is not supported, or dtypes differ.
        ValueError: shapes or devices do not fit, the rank is 0 or beyond the matrix.
        IndexError: on the CPU, an id outside ``[−1, A)`` or a rank outside ``[0, r]``; on CUDA a row with such an id
            has no adapter, and such a rank is taken as r.
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
        check_strided("out", out)
        if not out.is_contiguous():
            check_written("out", out)
    else:
        x, a, b = autocast(x, a, b)
    backend = _backend.resolve("multi_low_rank", x)
    check_float("x", x, backend)
    check_factor_dtype(x, a, b)
    check_same_dtype(x=x, out=out)
    num_rows = math.prod(x.shape[:-1])
    if isinstance(adapter_ids, Dispatch):
        routing = adapter_ids
        check_dispatch(routing)
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
        scale = check_scale("scale", scale)
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
    args = MultiLowRank(x.reshape(-1, c), a, b, routing.slots, routing.offsets, scales, ranks, number, save)
    if out is None:
        return _multi_low_rank(args, backend)[0].view(*x.shape[:-1], n)
    if out.is_contiguous():
        _multi_low_rank_(MultiLowRankAdd(out, args), backend)
        return out
    # Non-contiguous rows are updated through a copy, which keeps the bits of rows without an adapter.
    rows = out.contiguous()
    _multi_low_rank_(MultiLowRankAdd(rows, args), backend)
    return out.copy_(rows)


def multi_low_rank_linear(
    x: torch.Tensor,
    weight: torch.Tensor | QuantizedWeight | QuantizedExpertWeight,
    a: torch.Tensor,
    b: torch.Tensor,
    adapter_ids: torch.Tensor | Dispatch,
    *,
    scale: torch.Tensor | float,
    bias: torch.Tensor | None = None,
    ranks: torch.Tensor | None = None,
) -> torch.Tensor:
    """A linear layer with a separate low-rank update for each row: ``y[m] = x[m]·Wᵀ + bias +
    scale[i]·x[m]·a[i]ᵀ·b[i]ᵀ``.

    :func:`multi_low_rank` added to the layer's own product, which on the CPU runs on the faster of torch's kernels and
    gossamer's.

    Args:
        x: ``(..., C)`` float.
        weight: ``(N, C)``, the dtype of ``x``; or quantised, as for :func:`low_rank_linear`, or a
            :class:`gossamer.QuantizedExpertWeight` of one matrix.
        a: ``(A, r, C)``, as for :func:`multi_low_rank`.
        b: ``(A, N, r)``, the dtype of ``a``.
        adapter_ids: the adapter of each row, as for :func:`multi_low_rank`; −1 means none.
        scale: the factor of the update: one number, or ``(A,)`` float32, an adapter's each. Not differentiable.
        bias: ``(N,)`` or None, the dtype of ``x``.
        ranks: ``(A,)`` int32 or int64 in ``[0, r]``, or None where all adapters have rank r.

    Returns:
        ``(..., N)`` in the dtype of ``x``. Differentiable in ``x``, a float ``weight``, ``a``, ``b`` and ``bias``.
        Under ``torch.autocast`` in its dtype.

    Raises:
        TypeError: as :func:`multi_low_rank`, and for ``weight`` and ``bias``.
        ValueError: as :func:`multi_low_rank`, and for ``weight`` and ``bias``.
        IndexError: as :func:`multi_low_rank`.
    """
    quantized = not isinstance(weight, torch.Tensor) and hasattr(weight, "operand")
    if not quantized:
        check_shape("weight", weight, (None, last_size("x", x, "(..., C)")), "(N, C)")
    n = weight.shape[-2]
    check_shape("b", b, (None, n, None), "(A, N, r)")
    if bias is not None:
        check_shape("bias", bias, (n,), "(N,)")
    if quantized:
        x, a, b, bias = autocast(x, a, b, bias)
    else:
        x, weight, a, b, bias = autocast(x, weight, a, b, bias)
    check_same_device(x=x, weight=weight.data if quantized else weight, bias=bias)
    if not isinstance(adapter_ids, Dispatch):
        _check_ids(adapter_ids, x)
        adapter_ids = adapter_ids.reshape(-1)
    rows = x.reshape(-1, x.shape[-1])
    y = base_linear(rows, weight, bias)
    y = multi_low_rank(rows, a, b, adapter_ids, scale=scale, out=y, ranks=ranks)
    return y.view(*x.shape[:-1], n)
