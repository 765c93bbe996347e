"""ScatterMoE's three products, each one call of a primitive; all are differentiable."""

from __future__ import annotations

import torch

from gossamer._checks import (
    MAX_SIZE,
    check_flag,
    check_flags,
    check_floating,
    check_id_range,
    check_index,
    check_positive,
    check_same_device,
    check_same_dtype,
    check_shape,
    check_tensor,
    check_written,
)
from gossamer._trusted import is_readable
from gossamer.ops.dispatch import Dispatch
from gossamer.ops.gather_reduce import gather_reduce
from gossamer.ops.grouped_matmul import grouped_matmul, grouped_matmul_dweight


def sorted_dispatch(slots: torch.Tensor, expert_offsets: torch.Tensor, k: int) -> Dispatch:
    """The :class:`gossamer.Dispatch` that ScatterMoE's index tensors describe.

    Args:
        slots: ``(R,)`` int32 or int64, the flat slot of each sorted row (``sorted_scattered_idxs``).
        expert_offsets: ``(E,)`` int32 or int64, the rows up to the end of each expert.
        k: slots that share an input row.

    Raises:
        TypeError: an argument holds something else, or ``k`` is not an int.
        ValueError: ranks or devices do not fit, ``k`` does not divide R, or, on the CPU, a slot does not occur exactly
            once, or offsets decrease or exceed R.
    """
    check_index("sorted_scattered_idxs", slots)
    check_shape("sorted_scattered_idxs", slots, (None,), "(R,)")
    check_index("expert_offsets", expert_offsets)
    check_shape("expert_offsets", expert_offsets, (None,), "(E,)")
    check_same_device(sorted_scattered_idxs=slots, expert_offsets=expert_offsets)
    if not isinstance(k, (int, torch.SymInt)) or isinstance(k, bool):
        raise TypeError(f"k must be an int, got {type(k).__name__}")
    num_rows = slots.shape[0]
    if k > MAX_SIZE:
        raise ValueError(f"k must be at most {MAX_SIZE}, got {k}")
    if k < 1 or num_rows % k:
        raise ValueError(f"k must be at least 1 and divide the R = {num_rows} rows, got {k}")
    plain = type(slots) is torch.Tensor and slots.is_cpu and not torch.compiler.is_compiling()
    if plain and num_rows and (int(slots.min()) < 0 or int(slots.max()) >= num_rows):
        got = f"values from {int(slots.min())} to {int(slots.max())}"
        raise ValueError(f"sorted_scattered_idxs must be in [0, R={num_rows}), got {got}")
    positions = torch.arange(num_rows, dtype=torch.int32, device=slots.device)
    rows = positions.scatter(0, slots.long(), positions)
    if plain and not torch.equal(rows.index_select(0, slots), positions):
        raise ValueError("sorted_scattered_idxs must have every slot once")
    offsets = torch.cat([expert_offsets.new_zeros(1), expert_offsets])
    if plain and (int(offsets[-1]) > num_rows or (offsets.diff() < 0).any()):
        raise ValueError(f"expert_offsets must ascend to at most R={num_rows}, got {expert_offsets.tolist()}")
    offsets = offsets.int()
    return Dispatch(slots.int(), rows, offsets, num_rows // k, k, expert_offsets.shape[0])


def check_experts(name: str, weight: torch.Tensor) -> None:
    """A stack of weights must hold at least one."""
    if weight.shape[0] < 1:
        raise ValueError(f"{name} must hold at least one expert, got {tuple(weight.shape)}")


def _store(result: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    if out is None:
        return result
    check_shape("out", out, tuple(result.shape), "that of the result")
    check_written("out", out)
    check_same_device(result=result, out=out)
    check_same_dtype(result=result, out=out)
    return out.copy_(result)


def scatter2scatter(
    X: torch.Tensor,
    W: torch.Tensor,
    sorted_expert_idxs: torch.Tensor,
    sorted_scattered_idxs: torch.Tensor,
    k: int,
    b: torch.Tensor | None = None,
    x_grouped: bool = False,
    y_grouped: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """``Y[o(r)] = X[i(r)]·W[e(r)] + b[e(r)]`` over the sorted rows r: :func:`gossamer.grouped_matmul`.

    ``i(r)`` is r for grouped input, else ``sorted_scattered_idxs[r] // k``; ``o(r)`` is r for grouped output, else
    ``sorted_scattered_idxs[r]``.

    Args:
        X: ``(R/k, C)``; ``(R, C)`` with ``x_grouped``.
        W: ``(E, C, N)``, a transposed view of ``(E, N, C)`` is not copied; the dtype of ``X``.
        sorted_expert_idxs: ``(R,)`` ascending; ids of E and above mean no expert; their rows are zero.
        sorted_scattered_idxs: ``(R,)``, the flat slot of each sorted row.
        k: slots that share a row of ``X``; 1 for input in slot order.
        b: ``(E, N)`` or None.
        x_grouped: whether ``X`` is sorted by expert.
        y_grouped: whether the result stays sorted by expert.
        out: ``(R, N)`` that the result is copied into, or None.

    Returns:
        ``(R, N)``.

    Raises:
        TypeError: dtypes do not fit.
        ValueError: shapes or devices do not fit.
    """
    check_tensor("W", W)
    check_shape("W", W, (None, None, None), "(E, C, N)")
    check_experts("W", W)
    check_flags(x_grouped=x_grouped, y_grouped=y_grouped)
    check_index("sorted_expert_idxs", sorted_expert_idxs)
    check_index("sorted_scattered_idxs", sorted_scattered_idxs)
    check_shape("sorted_scattered_idxs", sorted_scattered_idxs, (None,), "(R,)")
    check_shape("sorted_expert_idxs", sorted_expert_idxs, tuple(sorted_scattered_idxs.shape), "(R,)")
    check_same_device(sorted_expert_idxs=sorted_expert_idxs, sorted_scattered_idxs=sorted_scattered_idxs)
    experts = torch.arange(W.shape[0], dtype=sorted_expert_idxs.dtype, device=sorted_expert_idxs.device)
    ends = torch.searchsorted(sorted_expert_idxs.contiguous(), experts, right=True)
    dispatch = sorted_dispatch(sorted_scattered_idxs, ends, 1 if x_grouped else k)
    y = grouped_matmul(X, W.transpose(1, 2), dispatch, bias=b, x_grouped=x_grouped, y_grouped=y_grouped)
    return _store(y.reshape(dispatch.num_rows, W.shape[2]), out)


def group(
    A: torch.Tensor,
    sorted_expert_idxs: torch.Tensor,
    coeff: torch.Tensor | None = None,
    fan_out: int = 1,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """``Y[r] = coeff[s(r)]·A[s(r) // fan_out]`` with ``s = sorted_expert_idxs``: rows in slot order, sorted by expert.

    Args:
        A: ``(R / fan_out, D)`` float.
        sorted_expert_idxs: ``(R,)`` int32 or int64, the flat slot of each sorted row.
        coeff: R factors in slot order, in any shape, or None for ones.
        fan_out: slots that share a row of ``A``.
        out: ``(R, D)`` that the result is copied into, or None.

    Returns:
        ``(R, D)`` in the dtype of ``A``.

    Raises:
        TypeError: dtypes do not fit.
        ValueError: ``A`` has not ``R / fan_out`` rows, or shapes do not fit.
        IndexError: on the CPU, a slot outside ``[0, R)``.
    """
    check_floating("A", A)
    check_shape("A", A, (None, None), "(R / fan_out, D)")
    check_positive(fan_out=fan_out)
    check_index("sorted_expert_idxs", sorted_expert_idxs)
    check_shape("sorted_expert_idxs", sorted_expert_idxs, (None,), "(R,)")
    if coeff is not None:
        check_floating("coeff", coeff)
    check_same_device(A=A, sorted_expert_idxs=sorted_expert_idxs, coeff=coeff)
    num_rows = sorted_expert_idxs.shape[0]
    if A.shape[0] * fan_out != num_rows:
        raise ValueError(f"A must have R / fan_out = {num_rows} / {fan_out} rows, got {tuple(A.shape)}")
    if is_readable(sorted_expert_idxs):
        check_id_range("sorted_expert_idxs", sorted_expert_idxs, num_rows, "R")
    if coeff is not None:
        coeff = coeff.reshape(-1)
        check_shape("coeff", coeff, (num_rows,), "(R,)")
        coeff = coeff[sorted_expert_idxs.long()]
    index = torch.div(sorted_expert_idxs, fan_out, rounding_mode="floor")
    return _store(gather_reduce(A, index, weights=coeff), out)


def group_bwd_W(
    DY: torch.Tensor, X: torch.Tensor, expert_offsets: torch.Tensor, E: int, has_bias: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``DW[e] = Σ_r X[r]ᵀ·DY[r]`` and ``Db[e] = Σ_r DY[r]`` over the sorted rows of each expert.

    Args:
        DY: ``(R, N)``.
        X: ``(R, C)``, the dtype of ``DY``.
        expert_offsets: ``(E,)`` int32 or int64, the rows up to the end of each expert.
        E: number of experts.
        has_bias: whether ``Db`` is wanted.

    Returns:
        ``DW (E, C, N)``, a transposed view of ``(E, N, C)``, and ``Db (E, N)`` or None. Zero where an expert is empty.

    Raises:
        TypeError: dtypes do not fit.
        ValueError: shapes or devices do not fit.
    """
    check_positive(E=E)
    check_flag("has_bias", has_bias)
    check_index("expert_offsets", expert_offsets)
    check_shape("expert_offsets", expert_offsets, (E,), "(E,)")
    check_floating("DY", DY)
    check_shape("DY", DY, (None, None), "(R, N)")
    check_floating("X", X)
    check_shape("X", X, (DY.shape[0], None), "(R, C)")
    check_same_device(DY=DY, X=X, expert_offsets=expert_offsets)
    check_same_dtype(DY=DY, X=X)
    slots = torch.arange(DY.shape[0], dtype=torch.int32, device=DY.device)
    dispatch = sorted_dispatch(slots, expert_offsets, 1)
    dweight, dbias = grouped_matmul_dweight(X, DY, dispatch, with_bias=has_bias)
    return dweight.transpose(1, 2), dbias
