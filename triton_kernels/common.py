"""Shared by the kernels: the list of row tiles of ragged groups, operand loads, and activations."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from gossamer._activation import Activation
from gossamer._layout import stored_transposed
from gossamer.triton_kernels.tile_tables import device_table
from gossamer.triton_kernels.tiles import Problem, Tile, choose, with_update

TMA_ARCH = 90
TRITON_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@functools.cache
def _cuda_arch(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def arch_of(tensor: torch.Tensor) -> int:
    """Compute capability of the tensor's device as ``10·major + minor``; 80 for the interpreter on the CPU."""
    return _cuda_arch(tensor.device.index) if tensor.is_cuda else 80


@functools.cache
def _cuda_sm_count(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def multiprocessors(tensor: torch.Tensor) -> int:
    """Multiprocessors of the tensor's device; 4 for the interpreter on the CPU."""
    return _cuda_sm_count(tensor.device.index) if tensor.is_cuda else 4


def grid_size(num_tiles: int, tile: Tile, tensor: torch.Tensor) -> int:
    """Programs to launch for at most ``num_tiles`` tiles: one each, or one for each multiprocessor when persistent."""
    if not tile.persistent:
        return num_tiles
    return min(num_tiles, multiprocessors(tensor))


def dot_precision(dtype: torch.dtype) -> str:
    """The precision of products of float32 operands: TF32 only if torch's own matmuls may use it."""
    # Not allow_tf32, which raises if the setting was made under this name.
    allowed = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed else "ieee"


def choose_tile(
    kernel: str,
    form: str,
    x: torch.Tensor,
    arch: int,
    num_rows: int,
    num_experts: int,
    n: int,
    c: int,
    updated: bool = False,
) -> Tile:
    """The tile of a launch over ``x``, from its device's tables or the heuristic; arguments are those of ``Problem``.

    ``updated`` says that the weight has an update.
    """
    precision = TRITON_NAMES[x.dtype] if dot_precision(x.dtype) == "ieee" else "tf32"
    problem = Problem(kernel, form, precision, num_rows / num_experts, num_experts, n, c)
    tile = choose(problem, arch, device_table(x.device.index) if x.is_cuda else None)
    return with_update(problem, tile, arch) if updated else tile


def unit_columns(x: torch.Tensor) -> torch.Tensor:
    """``x`` itself if its last dimension is contiguous, else a contiguous copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def can_describe(x: torch.Tensor, arch: int) -> bool:
    """Whether a TMA descriptor may cover ``x``: the hardware has it, and base, strides and sizes fit its rules."""
    size = x.element_size()
    return (
        arch >= TMA_ARCH
        and x.numel() > 0
        and size < 8
        and x.stride(-1) == 1
        and x.data_ptr() % 16 == 0
        and all(s > 0 and s * size % 16 == 0 and s * size < 2**40 for s in x.stride()[:-1])
        and all(n < 2**31 for n in x.shape)
    )


def describe(x: torch.Tensor, block: list[int]) -> TensorDescriptor:
    """A TMA descriptor of ``x`` for blocks of the given shape."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block)


def weight_operand(weight: torch.Tensor, arch: int, block_n: int, block_k: int) -> tuple[object, dict[str, bool]]:
    """``weight (E, N, C)`` as passed to a kernel, by descriptor if possible, and the flags that describe the form."""
    transposed = stored_transposed(weight)
    stored = weight.transpose(1, 2) if transposed else weight
    if can_describe(stored, arch):
        block = [1, block_k, block_n] if transposed else [1, block_n, block_k]
        return describe(stored, block), {"W_TMA": True, "W_TRANSPOSED": transposed}
    return weight, {"W_TMA": False, "W_TRANSPOSED": transposed}


def max_row_tiles(num_rows: int, num_experts: int, block_m: int) -> int:
    """An upper bound on the number of row tiles of E groups and the dropped tail, whatever the routing."""
    return min(num_rows, num_rows // block_m + num_experts + 1)


# The table of row tiles: int32, [0] the number of live tiles, [1] live and dropped ones, then `capacity` entries each
# of expert, first row, and end row of its group. Dropped tiles come last, with expert E.
TABLE_HEAD = 2


@triton.jit
def clamped(index, most):
    """The nearest index in ``[0, most]``, since structures made by hand may hold anything."""
    return tl.maximum(tl.minimum(index, most), 0)


@triton.jit
def group_range(offsets_ptr, group, num_rows):
    """First and end row of a group, both in ``[0, num_rows]``."""
    start, end = tl.load(offsets_ptr + group), tl.load(offsets_ptr + group + 1)
    return clamped(start, num_rows), clamped(end, num_rows)


@triton.jit(do_not_specialize=["num_rows", "capacity"])
def _row_tiles_kernel(
    offsets_ptr,
    table_ptr,
    num_rows,
    num_experts,
    capacity,
    BLOCK_M: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    expert = tl.zeros((TILES,), tl.int32)
    # In 64 bits, which overlapping offsets do not overflow.
    first_tile = tl.zeros((TILES,), tl.int64)
    total = tl.zeros((), tl.int64)
    live = tl.zeros((), tl.int64)
    for e0 in range(0, num_experts + 1, BLOCK_E):
        e = e0 + tl.arange(0, BLOCK_E)
        start = clamped(tl.load(offsets_ptr + e, e <= num_experts, other=0), num_rows)
        # The dropped tail is group E: from offsets[E] to the last row.
        end = clamped(tl.load(offsets_ptr + e + 1, e < num_experts, other=0), num_rows)
        end = tl.where(e == num_experts, num_rows, end)
        size = tl.where(e <= num_experts, tl.maximum(end - start, 0), 0).to(tl.int64)
        tiles = (size + BLOCK_M - 1) // BLOCK_M
        after = total + tl.cumsum(tiles, 0)
        passed = (after[None, :] <= tile[:, None]) & (e <= num_experts)[None, :]
        expert += tl.sum(passed.to(tl.int32), 1)
        first_tile = tl.maximum(first_tile, tl.max(tl.where(passed, after[None, :], 0), 1))
        live += tl.sum(tl.where(e < num_experts, tiles, 0), 0)
        total += tl.sum(tiles, 0)
    if tl.program_id(0) == 0:
        tl.store(table_ptr, tl.minimum(live, capacity).to(tl.int32))
        tl.store(table_ptr + 1, tl.minimum(total, capacity).to(tl.int32))
    inside = (tile < total) & (tile < capacity)
    start = clamped(tl.load(offsets_ptr + expert, inside, other=0), num_rows)
    row = start + (tile - first_tile).to(tl.int32) * BLOCK_M
    end = clamped(tl.load(offsets_ptr + expert + 1, inside & (expert < num_experts), other=0), num_rows)
    end = tl.where(expert == num_experts, num_rows, end)
    tl.store(table_ptr + 2 + tile, expert, inside)
    tl.store(table_ptr + 2 + capacity + tile, row, inside)
    tl.store(table_ptr + 2 + 2 * capacity + tile, end, inside)


# Tables of row tiles of one dispatch by the rows of a tile, shared by the launches of one call.
RowTables = dict[int, tuple[torch.Tensor, int]]


def row_tiles(
    offsets: torch.Tensor, num_rows: int, block_m: int, tables: RowTables | None = None
) -> tuple[torch.Tensor, int]:
    """The table of row tiles for groups at ``offsets (E+1,)``, built on the device, and its capacity.

    If ``tables`` has the table, it is returned; else it is built and put there.
    """
    if tables is not None and block_m in tables:
        return tables[block_m]
    num_experts = offsets.shape[0] - 1
    capacity = max_row_tiles(num_rows, num_experts, block_m)
    table = torch.empty(TABLE_HEAD + 3 * capacity, dtype=torch.int32, device=offsets.device)
    tiles = 64
    _row_tiles_kernel[(triton.cdiv(capacity, tiles),)](
        offsets, table, num_rows, num_experts, capacity, BLOCK_M=block_m, TILES=tiles, BLOCK_E=64, num_warps=4
    )
    if tables is not None:
        tables[block_m] = table, capacity
    return table, capacity


@triton.jit
def tile_coordinates(tile, num_m, num_n, GROUP_M: tl.constexpr):
    """Row and column of tile number ``tile``; GROUP_M row tiles take all column tiles in turn, for reuse in L2."""
    in_group = GROUP_M * num_n
    first_m = tile // in_group * GROUP_M
    size_m = tl.minimum(num_m - first_m, GROUP_M)
    return first_m + tile % in_group % size_m, tile % in_group // size_m


@triton.jit
def row_tile(table_ptr, capacity, m):
    """Expert, first row and end row of row tile ``m``."""
    entry = table_ptr + 2 + m
    return tl.load(entry), tl.load(entry + capacity), tl.load(entry + 2 * capacity)


@triton.jit
def load_rows(x, x_rows, row, k0, C, X_TMA: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_K: tl.constexpr):
    """``[BLOCK_M, BLOCK_K]`` of the left operand: by descriptor from ``row`` on, else by row pointers ``x_rows``."""
    if X_TMA:
        return x.load([row, k0])
    else:
        k = k0 + tl.arange(0, BLOCK_K)
        if EVEN_K:
            return tl.load(x_rows + k[None, :])
        else:
            return tl.load(x_rows + k[None, :], mask=k[None, :] < C, other=0.0)


@triton.jit
def load_weight(
    w,
    expert,
    n0,
    k0,
    N,
    C,
    stride_e,
    stride_n,
    stride_k,
    W_TMA: tl.constexpr,
    W_TRANSPOSED: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``[BLOCK_K, BLOCK_N]`` of one expert's weight, whichever of its two dimensions is contiguous in memory."""
    if W_TMA:
        if W_TRANSPOSED:
            return tl.reshape(w.load([expert, k0, n0]), (BLOCK_K, BLOCK_N))
        else:
            return tl.trans(tl.reshape(w.load([expert, n0, k0]), (BLOCK_N, BLOCK_K)))
    else:
        k = (k0 + tl.arange(0, BLOCK_K))[:, None]
        n = (n0 + tl.arange(0, BLOCK_N))[None, :]
        ptrs = w + expert.to(tl.int64) * stride_e + n.to(tl.int64) * stride_n + k.to(tl.int64) * stride_k
        if EVEN_K:
            return tl.load(ptrs, mask=n < N, other=0.0)
        else:
            return tl.load(ptrs, mask=(n < N) & (k < C), other=0.0)


@triton.jit
def add_low_rank(acc, low, expert, r, inside, n, live, PRECISION: tl.constexpr, RANK_TILE: tl.constexpr):
    """``acc + scale·s[r]·b[expert, n]ᵀ``, from which a product's accumulator starts if its weight has an update.

    ``low`` is ``(s, b, rank, scale, strides of b)`` with ``s (R, rank)`` float32; ``RANK_TILE`` is the number of blocks
    that the rank is cut into, and their width. Rows outside ``inside`` and columns outside ``live`` are unchanged.
    """
    s_ptr, b_ptr, rank, scale, strides = low
    stride_be, stride_bn, stride_bj = strides
    RANK_BLOCKS: tl.constexpr = RANK_TILE[0]
    BLOCK_R: tl.constexpr = RANK_TILE[1]
    b_rows = b_ptr + expert.to(tl.int64) * stride_be + n.to(tl.int64)[None, :] * stride_bn
    s_rows = s_ptr + r.to(tl.int64)[:, None] * rank
    for block in tl.static_range(RANK_BLOCKS):
        j = block * BLOCK_R + tl.arange(0, BLOCK_R)
        s = tl.load(s_rows + j[None, :], inside[:, None] & (j < rank)[None, :], other=0.0) * scale
        mask = (j < rank)[:, None] & live[None, :]
        b = tl.load(b_rows + j.to(tl.int64)[:, None] * stride_bj, mask, other=0.0)
        acc = tl.dot(s.to(b.dtype), b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def column_halves(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Left and right half of ``x [ROWS, COLUMNS]``, a renaming of registers.

    Epilogues work on one part of an accumulator after the other, so that their values do not spill.
    """
    return tl.split(tl.permute(tl.reshape(x, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def column_eighths(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The eight parts of ``x [ROWS, COLUMNS]``, from left to right."""
    left, right = column_halves(x, ROWS, COLUMNS)
    a, b = column_halves(left, ROWS, COLUMNS // 2)
    c, d = column_halves(right, ROWS, COLUMNS // 2)
    a0, a1 = column_halves(a, ROWS, COLUMNS // 4)
    b0, b1 = column_halves(b, ROWS, COLUMNS // 4)
    c0, c1 = column_halves(c, ROWS, COLUMNS // 4)
    d0, d1 = column_halves(d, ROWS, COLUMNS // 4)
    return a0, a1, b0, b1, c0, c1, d0, d1


@triton.jit
def sigmoid(x, FAST: tl.constexpr):
    """Logistic function. FAST has errors up to 2⁻²¹, invisible in 16 bits, and half the instructions of a division."""
    if FAST:
        r = tl.rsqrt(1.0 + tl.exp(-x))
        return r * r
    else:
        return tl.sigmoid(x)


# The functions of the gate, in the order that ``activation`` numbers them in.
GATES = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "clamped_silu")


def gate_code(activation: Activation) -> int:
    """The ACT of kernels for an activation."""
    return GATES.index(activation.gate)


@triton.jit
def activation(g, alpha, limit, ACT: tl.constexpr, FAST: tl.constexpr):
    """Value and derivative of the activation ``ACT``, a place in GATES, at the gate ``g``, in float32."""
    if ACT == 0:
        s = sigmoid(g, FAST)
        return g * s, s * (1.0 + g * (1.0 - s))
    elif ACT == 1:
        cdf = 0.5 * (1.0 + tl.erf(g * 0.7071067811865476))
        return g * cdf, cdf + g * 0.3989422804014327 * tl.exp(-0.5 * g * g)
    elif ACT == 2:
        # ½(1 + tanh z) is σ(2z), and its derivative σ(2z)·σ(−2z) loses nothing at large gates.
        z = 1.5957691216057308 * g * (1.0 + 0.044715 * g * g)
        e = tl.exp(-tl.abs(z))
        half = 1.0 / (1.0 + e)
        s = tl.where(z < 0, e * half, half)
        return g * s, s + g * e * half * half * 1.5957691216057308 * (1.0 + 0.134145 * g * g)
    elif ACT == 3:
        # Comparisons instead of minima and maxima, which would turn NaN into numbers.
        return tl.where(g < 0, 0.0, g), tl.where(g > 0, 1.0, 0.0)
    elif ACT == 4:
        r = tl.where(g < 0, 0.0, g)
        return r * r, 2.0 * r
    else:
        c = tl.where(g > limit, limit, g)
        s = sigmoid(alpha * c, FAST)
        return c * s, tl.where(g <= limit, s * (1.0 + alpha * c * (1.0 - s)), 0.0)


@triton.jit
def up_factor(u, limit, ACT: tl.constexpr):
    """The factor of the activated gate, and its derivative: the up half, or gpt-oss's clamped up half plus one."""
    if ACT == 5:
        inside = (u <= limit) & (u >= -limit)
        return tl.where(u > limit, limit, tl.where(u < -limit, -limit, u)) + 1.0, tl.where(inside, 1.0, 0.0)
    else:
        return u, tl.full(u.shape, 1.0, tl.float32)


def rank_block(rank: int) -> int:
    """Columns of a tile along the rank of an update: tensor cores need 16 or more."""
    return min(64, max(16, triton.next_power_of_2(rank)))


class LowRankTerm(NamedTuple):
    """An update of a product: ``scale·s·b[e]ᵀ`` with ``s (R, r)`` float32 by expert and ``b (E, N, r)``."""

    s: torch.Tensor
    b: torch.Tensor
    scale: float


def _rank_blocks(rank: int) -> tuple[int, int]:
    """The number of steps over the rank, and their width, bounded because wide ones take too much shared memory."""
    block = min(32, rank_block(rank))
    return triton.cdiv(rank, block), block


def low_rank_arguments(term: LowRankTerm | None) -> dict[str, object]:
    """The arguments of a kernel that takes a product's update, None where there is none."""
    if term is None:
        return {"low": None, "RANK_TILE": None}
    rank = term.b.shape[2]
    return {"low": (term.s, term.b, rank, term.scale, term.b.stride()), "RANK_TILE": _rank_blocks(rank)}


def aot_low_rank(dtype: torch.dtype, rank: int | None) -> tuple[dict[str, object], dict[str, object]]:
    """Signature and compile-time arguments of a product's update, for ahead-of-time compilation; None for no update."""
    if rank is None:
        return {}, {"low": None, "RANK_TILE": None}
    low = ("*fp32:16", aot_pointer(dtype), "i32:16", "fp32", ("i32:16", "i32:16", 1))
    return {"low": low}, {"RANK_TILE": _rank_blocks(rank)}


# How a weight may be stored and read: as torch.nn.Linear does, transposed, and without descriptors.
AOT_LAYOUTS = ("usual", "transposed", "pointers")


def aot_dtype(precision: str) -> torch.dtype:
    """The dtype of operands multiplied in a precision of :class:`gossamer.triton_kernels.tiles.Problem`."""
    return {"tf32": torch.float32, **{name: dtype for dtype, name in TRITON_NAMES.items()}}[precision]


def aot_pointer(dtype: torch.dtype) -> str:
    """The type of an aligned pointer."""
    return f"*{TRITON_NAMES[dtype]}:16"


def aot_signature(dtype: torch.dtype, data: str, indices: str, sizes: str, floats: str = "") -> dict[str, str]:
    """Types of kernel arguments for ahead-of-time compilation: data and int32 pointers, ints and floats, by name."""
    signature = {name: aot_pointer(dtype) for name in data.split()}
    signature |= {name: "*i32:16" for name in indices.split()}
    signature |= {name: "i32:16" for name in sizes.split()}
    return signature | {name: "fp32" for name in floats.split()}


def aot_descriptor(dtype: torch.dtype, block: list[int]) -> str:
    """Type of a TMA descriptor argument for ahead-of-time compilation."""
    return f"tensordesc<{TRITON_NAMES[dtype]}{block}>".replace(" ", "")


def aot_cases(arch: int) -> list[tuple]:
    """The launch of the row-tile table, for ahead-of-time compilation: (kernel, signature, constexprs, options)."""
    signature = {"offsets_ptr": "*i32:16", "table_ptr": "*i32:16", "num_experts": "i32"}
    signature |= {"num_rows": "i32", "capacity": "i32"}
    constexprs = {"BLOCK_M": 128, "TILES": 64, "BLOCK_E": 64}
    return [(_row_tiles_kernel, signature, constexprs, {"num_warps": 4})]
