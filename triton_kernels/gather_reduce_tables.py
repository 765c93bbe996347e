"""Bags over many tables of mixed dims in one launch: the kernels of gather_reduce, told of each feature by a layout."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton

from gossamer.triton_kernels.gather_reduce import (
    NUM_WARPS,
    UNROLL,
    dot_tile,
    gather_dot_kernel,
    gather_reduce_kernel,
    multiple,
    reduce_tile,
)


def feature_dims(spec: Sequence[int]) -> list[int]:
    """The dim of each feature of a layout's ``spec``."""
    return list(spec[3::6])


def feature_tile(dims: Sequence[int], itemsize: int) -> tuple[int, int, int]:
    """Bags and columns of a program, and column blocks of the widest row: tiles fit the mean dim, not the largest."""
    bags, block_d = reduce_tile(-(-sum(dims) // len(dims)), itemsize)
    return bags, block_d, triton.cdiv(max(dims), block_d)


def gather_reduce_tables(
    storage: torch.Tensor,
    index: torch.Tensor,
    offsets: torch.Tensor,
    weights: torch.Tensor | None,
    layout: torch.Tensor,
    spec: Sequence[int],
    drop: bool,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """``(B, ΣD)``: bag ``f·B + b`` of feature f's table, summed or averaged, in feature f's columns of row b."""
    dims = feature_dims(spec)
    num_bags = (offsets.shape[0] - 1) // len(dims)
    out = torch.empty(num_bags, sum(dims), dtype=out_dtype, device=storage.device)
    if out.numel() == 0:
        return out
    bags, block_d, blocks = feature_tile(dims, storage.element_size())
    gather_reduce_kernel[(len(dims) * triton.cdiv(num_bags, bags) * blocks,)](
        storage,
        index,
        offsets.contiguous(),
        weights,
        None,
        layout,
        out,
        num_bags,
        index.numel(),
        0,
        -1,
        0,
        0,
        blocks,
        0,
        1,
        out.stride(0),
        0,
        index.stride(0),
        0,
        weights.stride(0) if weights is not None else 0,
        MEAN=False,
        CSR=True,
        WIDTH=0,
        UNROLL=UNROLL,
        BAGS=bags,
        BLOCK_D=block_d,
        VEC=multiple(storage.element_size(), *dims),
        num_warps=NUM_WARPS,
    )
    return out


def gather_dot_tables(
    dout: torch.Tensor,
    storage: torch.Tensor,
    index: torch.Tensor,
    offsets: torch.Tensor,
    layout: torch.Tensor,
    spec: Sequence[int],
    drop: bool,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The weights' gradient: each position's table row times its feature's columns of its bag's row of ``dout``."""
    dims = feature_dims(spec)
    # A ragged list may hold positions that lie in no bag.
    out = torch.zeros(index.shape, dtype=dtype, device=storage.device)
    num_bags = (offsets.shape[0] - 1) // len(dims)
    if out.numel() == 0 or num_bags == 0:
        return out
    positions, block_d = dot_tile(-(-sum(dims) // len(dims)), storage.element_size(), None)
    gather_dot_kernel[(len(dims) * num_bags,)](
        dout,
        storage,
        index,
        offsets.contiguous(),
        None,
        layout,
        out,
        num_bags,
        index.numel(),
        0,
        -1,
        0,
        0,
        *dout.stride(),
        0,
        1,
        0,
        index.stride(0),
        MEAN=False,
        CSR=True,
        POSITIONS=positions,
        BLOCK_D=block_d,
        VEC=multiple(storage.element_size(), *dims, dout.stride(0)),
        num_warps=NUM_WARPS,
    )
    return out
