"""Weight gradients of grouped products: outer products summed over each group's rows, a product with ragged K.

Floor: 2·R·N·C floating-point operations; R·C + R·N + E·N·C elements moved.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from gossamer.triton_kernels.common import (
    TMA_ARCH,
    RowTables,
    aot_descriptor,
    aot_dtype,
    aot_signature,
    arch_of,
    can_describe,
    choose_tile,
    clamped,
    describe,
    dot_precision,
    grid_size,
    group_range,
    row_tile,
    row_tiles,
    tile_coordinates,
    unit_columns,
)
from gossamer.triton_kernels.tiles import Problem, Tile, choose

if TYPE_CHECKING:
    from gossamer.ops._groups import Groups
    from gossamer.ops.grouped_matmul import GroupedDweight

# If the other operand is at least this wide, a gathered operand is first copied to contiguous rows, this many columns
# at a time. The product then runs a quarter faster on an H100, which at this width pays for the copy.
PADDED_FROM = 1536
PADDED_COLUMNS = 1024


def operand_form(x: torch.Tensor, dy: torch.Tensor, x_div: int, dy_div: int, finite: bool) -> tuple[bool, str]:
    """Whether ``x`` is read by descriptor, and the form of the launch: ``"padded"`` where ``dy`` is copied first."""
    arch = arch_of(x)
    x_tma = finite and x_div == 0 and dy_div > 0 and can_describe(x, arch)
    # Copied rows are as wide as those of dy and follow each other without a gap.
    packed = dy.shape[1] * dy.element_size() % 16 == 0
    padded = x_tma and x.shape[1] >= PADDED_FROM and x.element_size() == 2 and packed and can_describe(dy, arch)
    return x_tma, "padded" if padded else "gathered"


@triton.jit
def sorted_rows(slots_ptr, r, inside, num_slots, DIV: tl.constexpr):
    """Rows of an operand for sorted rows ``r``: ``r`` itself when DIV is 0."""
    if DIV > 0:
        return clamped(tl.load(slots_ptr + r, inside, other=0), num_slots - 1) // DIV
    else:
        return r


@triton.jit(do_not_specialize=["capacity", "num_rows", "num_slots"])
def _padded_rows_kernel(
    x_ptr,
    padded_ptr,
    first_block_ptr,
    slots_ptr,
    offsets_ptr,
    table_ptr,
    capacity,
    num_rows,
    num_slots,
    W,
    stride_x,
    DIV: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    # Programs with neighbouring numbers write neighbouring whole rows, since the copy is bound by memory.
    SPLIT: tl.constexpr = BLOCK_ROWS // ROWS
    block = tl.program_id(0) // SPLIT
    part = tl.program_id(0) % SPLIT
    if block < tl.load(table_ptr):
        expert, row, row_end = row_tile(table_ptr, capacity, block)
        if part == 0:
            if row == clamped(tl.load(offsets_ptr + expert), num_rows):
                tl.store(first_block_ptr + expert, block)
        i = part * ROWS + tl.arange(0, ROWS)
        x_index = sorted_rows(slots_ptr, row + i, row + i < row_end, num_slots, DIV)
        x_rows = x_ptr + x_index.to(tl.int64)[:, None] * stride_x
        out_rows = padded_ptr + (block.to(tl.int64) * BLOCK_ROWS + i)[:, None] * W
        for w0 in range(0, W, BLOCK_W):
            w = w0 + tl.arange(0, BLOCK_W)
            values = tl.load(x_rows + w[None, :], (row + i < row_end)[:, None] & (w < W)[None, :], other=0.0)
            tl.store(out_rows + w[None, :], values, (w < W)[None, :])


def padded_rows(
    x: torch.Tensor, groups: Groups, div: int, rows: int, tables: RowTables | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows ``x[slots[r] // div]`` in sorted order, each group padded with zero rows to a multiple of ``rows``.

    Returns:
        The padded rows, and for each group the block of ``rows`` rows that it starts at (undefined when empty).
    """
    slots, _, offsets = groups
    num_experts, width = offsets.shape[0] - 1, x.shape[1]
    table, capacity = row_tiles(offsets, slots.shape[0], rows, tables)
    padded = torch.empty(capacity * rows, width, dtype=x.dtype, device=x.device)
    first_block = torch.empty(num_experts, dtype=torch.int32, device=x.device)
    rows_per_program = 16
    _padded_rows_kernel[(capacity * rows // rows_per_program,)](
        x,
        padded,
        first_block,
        slots,
        offsets,
        table,
        capacity,
        slots.shape[0],
        groups.rows.shape[0],
        width,
        x.stride(0),
        DIV=div,
        BLOCK_ROWS=rows,
        ROWS=rows_per_program,
        BLOCK_W=512,
        num_warps=8,
    )
    return padded, first_block


@triton.jit(do_not_specialize=["num_rows", "num_slots"])
def _dweight_kernel(
    x,
    dy,
    dw_ptr,
    slots_ptr,
    offsets_ptr,
    first_block_ptr,
    num_rows,
    num_slots,
    num_experts,
    N,
    C,
    num_n,
    num_c,
    strides,
    X_DIV: tl.constexpr,
    DY_DIV: tl.constexpr,
    X_TMA: tl.constexpr,
    DY_PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    """``strides`` are of rows of x and of dy, and of the result's experts, rows and columns."""
    stride_x, stride_dy, stride_e, stride_n, stride_c = strides
    tiles = num_n * num_c
    for tile in tl.range(tl.program_id(0), num_experts * tiles, tl.num_programs(0), flatten=FLATTEN):
        expert = tile // tiles
        n_tile, c_tile = tile_coordinates(tile % tiles, num_n, num_c, GROUP_M)
        start, end = group_range(offsets_ptr, expert, num_rows)
        if DY_PADDED:
            dy_start = tl.load(first_block_ptr + expert, end > start, other=0) * BLOCK_K
        n = n_tile * BLOCK_M + tl.arange(0, BLOCK_M)
        c = c_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, tl.cdiv(end - start, BLOCK_K)):
            r0 = start + k * BLOCK_K
            r = r0 + tl.arange(0, BLOCK_K)
            inside = r < end
            if DY_PADDED:
                dy_block = dy.load([dy_start + k * BLOCK_K, n_tile * BLOCK_M])
            else:
                dy_rows = dy + sorted_rows(slots_ptr, r, inside, num_slots, DY_DIV).to(tl.int64)[:, None] * stride_dy
                dy_block = tl.load(dy_rows + n[None, :], inside[:, None] & (n < N)[None, :], other=0.0)
            if X_TMA:
                # Rows past the group meet zero rows of dy.
                x_block = x.load([r0, c_tile * BLOCK_N])
            else:
                x_rows = x + sorted_rows(slots_ptr, r, inside, num_slots, X_DIV).to(tl.int64)[:, None] * stride_x
                x_block = tl.load(x_rows + c[None, :], inside[:, None] & (c < C)[None, :], other=0.0)
            acc = tl.dot(tl.trans(dy_block), x_block, acc, input_precision=PRECISION)
        out = dw_ptr + expert.to(tl.int64) * stride_e
        out += n.to(tl.int64)[:, None] * stride_n + c.to(tl.int64)[None, :] * stride_c
        tl.store(out, acc.to(dw_ptr.dtype.element_ty), (n < N)[:, None] & (c < C)[None, :])


def outer_sums(
    x: torch.Tensor,
    dy: torch.Tensor,
    groups: Groups,
    x_div: int,
    dy_div: int,
    finite: bool,
    out: torch.Tensor,
    tile: Tile | None = None,
    tables: RowTables | None = None,
) -> None:
    """Write the sums over each group of ``dy[r]ᵀ x[r]`` to ``out (E, N, C)``; see :func:`grouped_matmul_dweight`."""
    # The gathered operand takes the narrow side of the tile, the contiguous one the wide side, which TMA fills.
    if dy_div == 0 and x_div > 0:
        x, dy, x_div, dy_div, out = dy, x, dy_div, x_div, out.transpose(1, 2)
    arch = arch_of(x)
    num_experts, n, c = out.shape
    x_tma, form = operand_form(x, dy, x_div, dy_div, finite)
    if tile is None:
        tile = choose_tile("grouped_matmul_dweight", form, x, arch, groups.slots.shape[0], num_experts, n, c)
    if form == "gathered":
        _launch_dweight(x, dy, out, groups, None, x_div, dy_div, x_tma, tile)
        return
    tables = {} if tables is None else tables
    for n0 in range(0, n, PADDED_COLUMNS):
        part = slice(n0, n0 + PADDED_COLUMNS)
        rows, first_block = padded_rows(dy[:, part], groups, dy_div, tile.block_k, tables)
        _launch_dweight(x, rows, out[:, part], groups, first_block, x_div, dy_div, x_tma, tile)


def _launch_dweight(x, dy, out, groups, first_block, x_div, dy_div, x_tma, tile):
    num_experts, n, c = out.shape
    num_n, num_c = triton.cdiv(n, tile.block_m), triton.cdiv(c, tile.block_n)
    _dweight_kernel[(grid_size(num_experts * num_n * num_c, tile, out),)](
        describe(x, [tile.block_k, tile.block_n]) if x_tma else x,
        dy if first_block is None else describe(dy, [tile.block_k, tile.block_m]),
        out,
        groups.slots,
        groups.offsets,
        first_block,
        groups.slots.shape[0],
        groups.rows.shape[0],
        num_experts,
        n,
        c,
        num_n,
        num_c,
        (x.stride(0), dy.stride(0), *out.stride()),
        X_DIV=x_div,
        DY_DIV=dy_div,
        X_TMA=x_tma,
        DY_PADDED=first_block is not None,
        PRECISION=dot_precision(x.dtype),
        **tile.constants(),
        **tile.options(),
    )


def weight_gradient(
    x: torch.Tensor,
    dy: torch.Tensor,
    groups: Groups,
    x_div: int,
    dy_div: int,
    transposed: bool,
    finite: bool = False,
    tables: RowTables | None = None,
) -> torch.Tensor:
    """``dweight[e] = Σ dy[g(r)]ᵀ x[g'(r)]`` over the rows of each group, stored ``(E, C, N)`` when ``transposed``.

    Both operands read their rows as in :func:`grouped_matmul`, by ``x_div`` and ``dy_div``. Empty groups give zeros.
    ``finite`` promises that an operand in sorted order has no NaN or infinity in its dropped rows, which allows faster
    loads. ``tables`` as in :func:`gossamer.triton_kernels.common.row_tiles`.
    """
    x, dy = unit_columns(x), unit_columns(dy)
    num_experts, n, c = groups.offsets.shape[0] - 1, dy.shape[1], x.shape[1]
    if transposed:
        dweight = torch.empty(num_experts, c, n, dtype=x.dtype, device=x.device).transpose(1, 2)
    else:
        dweight = torch.empty(num_experts, n, c, dtype=x.dtype, device=x.device)
    if dweight.numel():
        outer_sums(x, dy, groups, x_div, dy_div, finite, dweight, tables=tables)
    return dweight


def grouped_matmul_dweight(args: GroupedDweight) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The weight gradient, and the bias gradient or None."""
    dweight = weight_gradient(args.x, args.dy, args.groups, args.x_div, args.dy_div, args.transposed)
    return dweight, group_sums(unit_columns(args.dy), args.groups, args.dy_div) if args.with_bias else None


@triton.jit(do_not_specialize=["num_rows", "num_slots"])
def _group_sums_kernel(
    dy_ptr,
    weights_ptr,
    out_ptr,
    slots_ptr,
    offsets_ptr,
    num_rows,
    num_slots,
    N,
    stride_dy,
    DIV: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    expert = tl.program_id(0)
    start, end = group_range(offsets_ptr, expert, num_rows)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for r0 in range(start, end, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        inside = r < end
        rows = sorted_rows(slots_ptr, r, inside, num_slots, DIV).to(tl.int64)
        mask = inside[:, None] & (n < N)[None, :]
        values = tl.load(dy_ptr + rows[:, None] * stride_dy + n[None, :], mask, other=0.0).to(tl.float32)
        if weights_ptr is not None:
            slot = sorted_rows(slots_ptr, r, inside, num_slots, 1)
            values *= tl.load(weights_ptr + slot, inside, other=0.0).to(tl.float32)[:, None]
        total += tl.sum(values, 0)
    tl.store(out_ptr + expert.to(tl.int64) * N + n, total.to(out_ptr.dtype.element_ty), n < N)


def group_sums(dy: torch.Tensor, groups: Groups, dy_div: int, weights: torch.Tensor | None = None) -> torch.Tensor:
    """``(E, N)`` sums of each group's rows of ``dy``, each times its slot's element of ``weights (R,)``, if given."""
    slots, _, offsets = groups
    num_experts, n = offsets.shape[0] - 1, dy.shape[1]
    out = torch.empty(num_experts, n, dtype=dy.dtype, device=dy.device)
    if out.numel():
        block_n = 64
        _group_sums_kernel[(num_experts, triton.cdiv(n, block_n))](
            dy,
            weights,
            out,
            slots,
            offsets,
            slots.shape[0],
            groups.rows.shape[0],
            n,
            dy.stride(0),
            DIV=dy_div,
            BLOCK_R=64,
            BLOCK_N=block_n,
            num_warps=4,
        )
    return out


def aot_case(arch: int, problem: Problem, tile: Tile, layout: str = "usual") -> tuple:
    """One launch, for ahead-of-time compilation: (kernel, signature, constexprs, options).

    ``layout`` says how the weight is stored and read: one of ``AOT_LAYOUTS``.
    """
    dtype, padded = aot_dtype(problem.precision), problem.form == "padded"
    tma = arch >= TMA_ARCH and layout != "pointers"
    signature = aot_signature(dtype, "x dy dw_ptr", "slots_ptr offsets_ptr", "num_experts N C num_n num_c")
    rows_and_columns = ("i32:16", 1) if layout == "transposed" else (1, "i32:16")
    signature["strides"] = ("i32:16", "i32:16", "i32:16", *rows_and_columns)
    signature |= {"num_rows": "i32", "num_slots": "i32"}
    constexprs = {"X_DIV": 0, "DY_DIV": 8, "X_TMA": tma, "DY_PADDED": padded}
    constexprs |= {"first_block_ptr": None, "PRECISION": "ieee", **tile.constants()}
    if tma:
        signature["x"] = aot_descriptor(dtype, [tile.block_k, tile.block_n])
    if padded:
        signature["dy"] = aot_descriptor(dtype, [tile.block_k, tile.block_m])
        signature["first_block_ptr"] = "*i32:16"
        del constexprs["first_block_ptr"]
    return _dweight_kernel, signature, constexprs, tile.options()


def aot_cases(arch: int) -> list[tuple]:
    """The default launches, for ahead-of-time compilation: (kernel, signature, constexprs, options) each."""
    cases = []
    for precision in ("bf16", "fp32"):
        for form, layout in (("gathered", "transposed"), ("gathered", "usual"), ("padded", "usual")):
            if form == "padded" and (arch < TMA_ARCH or precision == "fp32"):
                continue
            problem = Problem("grouped_matmul_dweight", form, precision, 1024, 64, 2048, 2048)
            cases.append(aot_case(arch, problem, choose(problem, arch), layout))
    signature = aot_signature(
        torch.bfloat16, "x_ptr padded_ptr", "first_block_ptr slots_ptr offsets_ptr table_ptr", "W stride_x"
    )
    signature |= {"capacity": "i32", "num_rows": "i32", "num_slots": "i32"}
    signature_sums = aot_signature(torch.bfloat16, "dy_ptr weights_ptr out_ptr", "slots_ptr offsets_ptr", "N stride_dy")
    signature_sums |= {"num_rows": "i32", "num_slots": "i32"}
    cases.append((_group_sums_kernel, signature_sums, {"DIV": 8, "BLOCK_R": 64, "BLOCK_N": 64}, {"num_warps": 4}))
    constexprs = {"DIV": 8, "BLOCK_ROWS": 64, "ROWS": 16, "BLOCK_W": 512}
    cases.append((_padded_rows_kernel, signature, constexprs, {"num_warps": 8}))
    return cases
