"""The transpose of gather_reduce, fused with an optimizer step on touched rows; duplicates are summed in a fixed order.

Runs of at most PIECE positions are summed and stepped by one program, several runs at a time. Longer runs are cut into
pieces, whose sums go to memory; the program that takes the row's step adds them in order. No float is added atomically.

Floor: each touched row and its state read and written once, ``B·D`` elements of the gradient and the lists read once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl

from gossamer._step_rules import RULES
from gossamer.triton_kernels.gather_reduce import DIM, ELEMENT, ROW, Scales, dims_of, multiple, scales_of
from gossamer.triton_kernels.row_gradients import (
    PIECE,
    TILE,
    about,
    bisect,
    find_runs,
    gradients,
    long_run,
    piece_tile,
    sorted_rows,
    sorted_types,
    sum_pieces_kernel,
)
from gossamer.triton_kernels.sparse_update_rules import (
    Numbers,
    RuleForm,
    moved_scale,
    random_bits,
    round_stochastically,
    rule_form,
    rule_numbers,
    take_step,
    to_codes,
)

if TYPE_CHECKING:
    from gossamer.ops.sparse_update import SparseUpdate

MAX_RUNS = 32
UNROLL = 2
# Without a limit the assembler spills a few bytes to fit more programs on a multiprocessor.
STEP_REGISTERS = 128
# Whole rows are held, because steps may need their norm.
MAX_DIM = 16384
# Partial sums that a program adds at a time.
LANES_TILE = 4096
PROGRAMS_PER_MULTIPROCESSOR = 16

_INTS = ["num_positions", "num_bags", "sentinel", "width", "dim", "seed"]
_STRIDES = ["stride_tn", "stride_1n", "stride_2n", "stride_gb"]


class Updated(NamedTuple):
    """Pointers to tensors that a step changes, with scales of codes, to the step count, and to a rate in a tensor."""

    table: torch.Tensor
    state1: torch.Tensor | None
    state2: torch.Tensor | None
    lr: torch.Tensor | None
    step: torch.Tensor
    scale: Scales | None


@triton.jit
def _state_ptrs(state_ptr, row, table_row, stride, column, TABLES: tl.constexpr, ROW_STATE: tl.constexpr):
    """Offsets of rows in a state tensor with a value per row or per element."""
    if ROW_STATE:
        return state_ptr + row * stride
    elif TABLES:
        return state_ptr + table_row[:, None] + column.to(tl.int64)[None, :]
    else:
        return state_ptr + (row * stride)[:, None] + column.to(tl.int64)[None, :]


@triton.jit
def _step_rows(
    row,
    live,
    grad,
    column,
    first,
    dim,
    sizes,
    rows,
    to,
    strides,
    numbers,
    scale_rate,
    seed,
    RULE: tl.constexpr,
    VEC: tl.constexpr,
):
    """Read rows ``row [R]``, step with ``grad [R, C]``, and write them; ``first [R]`` is a sorted position of each."""
    stride_tn, stride_1n, stride_2n = strides
    tables: tl.constexpr = rows.layout is not None
    if tables:
        about_ptr = about(first, live, rows, sizes[3])
        dims = tl.load(about_ptr + DIM, live, other=0) // VEC * VEC
        inside = (row - tl.load(about_ptr + ROW, live, other=0)) * dims
        table_row = tl.load(about_ptr + ELEMENT, live, other=0) // 16 * 16 + inside // VEC * VEC
        dim = dims[:, None]
    else:
        table_row = row * stride_tn
    mask = live[:, None] & (column[None, :] < dim)
    table_ptrs = to.table + table_row[:, None] + column.to(tl.int64)[None, :]
    # Tested here, because Triton 3.6 compiles no function that returns None.
    state1_ptrs = None
    if to.state1 is not None:
        state1_ptrs = _state_ptrs(to.state1, row, table_row, stride_1n, column, tables, RULE.row_state1)
    state2_ptrs = None
    if to.state2 is not None:
        state2_ptrs = _state_ptrs(to.state2, row, table_row, stride_2n, column, tables, RULE.row_state2)
    rate = numbers.lr
    if to.lr is not None:
        rate = tl.load(to.lr).to(tl.float32)
    step = tl.load(to.step)
    w = tl.load(table_ptrs, mask, other=0.0).to(tl.float32)
    if to.scale is not None:
        scale_ptrs = to.scale.each + row * to.scale.stride
        scale = tl.load(scale_ptrs, live, other=1.0)
        w *= scale[:, None]
    new = take_step(
        w,
        grad,
        live,
        mask,
        (dim + tl.zeros((1, 1), tl.int64)).to(tl.float32),
        state1_ptrs,
        state2_ptrs,
        step,
        rate,
        numbers,
        RULE,
    )
    if to.scale is not None:
        if RULE.learns_scale:
            scale = moved_scale(new, grad, mask, scale, scale_rate, to.table.dtype.element_ty)
            tl.store(scale_ptrs, scale, live)
        bits = None
        if RULE.rounds:
            bits = random_bits(seed, step, row, column)
        tl.store(table_ptrs, to_codes(new, scale, bits, to.table.dtype.element_ty), mask)
    elif RULE.rounds:
        bits = random_bits(seed, step, row, column)
        tl.store(table_ptrs, round_stochastically(new, bits, to.table.dtype.element_ty), mask)
    else:
        tl.store(table_ptrs, new.to(to.table.dtype.element_ty), mask)


@triton.jit(do_not_specialize=_INTS + _STRIDES, do_not_specialize_on_alignment=["totals_ptr"])
def _step_kernel(
    rows,
    totals_ptr,
    runs_ptr,
    partial_ptr,
    to,
    numbers,
    num_positions,
    num_bags,
    sentinel,
    width,
    dim,
    seed,
    stride_tn,
    stride_1n,
    stride_2n,
    scale_rate,
    stride_gb,
    stride_gd,
    RULE: tl.constexpr,
    LONG: tl.constexpr,
    PIECE: tl.constexpr,
    LANES: tl.constexpr,
    RUNS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VEC: tl.constexpr,
):
    """Step the rows of runs of at most PIECE positions, RUNS at a time, in turns with the other programs.

    With LONG, step the row of a longer run that begins among PIECE positions, and whose pieces have been summed.
    """
    dim = dim // VEC * VEC
    ids_ptr = rows.ids
    sizes = (stride_gb.to(tl.int64) // VEC * VEC, stride_gd, width, num_bags)
    wide_1n, wide_2n = stride_1n.to(tl.int64), stride_2n.to(tl.int64)
    if not RULE.row_state1:
        wide_1n = wide_1n // VEC * VEC
    if not RULE.row_state2:
        wide_2n = wide_2n // VEC * VEC
    strides = (stride_tn.to(tl.int64) // VEC * VEC, wide_1n, wide_2n)
    column = tl.arange(0, BLOCK_D)
    if LONG:
        window = tl.program_id(0).to(tl.int64)
        exists, begin = long_run(ids_ptr, window, num_positions, sentinel, PIECE)
        if exists:
            id = tl.load(ids_ptr + begin)
            end = bisect(ids_ptr, id, begin, begin * 0 + num_positions, True)
            pieces = (end - begin + PIECE - 1) // PIECE
            total = tl.zeros((LANES, BLOCK_D), tl.float32)
            for first in range(0, pieces, LANES):
                piece = first + tl.arange(0, LANES)
                slot = 2 * (window + piece) + (piece == 0)
                mask = (piece < pieces)[:, None] & (column < dim)[None, :]
                total += tl.load(partial_ptr + slot[:, None] * dim + column[None, :], mask, other=0.0)
            one = tl.zeros((1,), tl.int64)
            grad = tl.sum(total, 0)[None, :]
            _step_rows(
                id.to(tl.int64) + one,
                one == 0,
                grad,
                column,
                begin + one,
                dim,
                sizes,
                rows,
                to,
                strides,
                numbers,
                scale_rate,
                seed,
                RULE,
                VEC,
            )
    else:
        num_runs = tl.load(totals_ptr)
        # The last run may hold the positions that contribute nothing.
        num_runs -= (tl.load(ids_ptr + num_positions - 1) == sentinel).to(num_runs.dtype)
        for tile in range(tl.program_id(0), tl.cdiv(num_runs, RUNS), tl.num_programs(0)):
            run = tile * RUNS + tl.arange(0, RUNS)
            begin = tl.load(runs_ptr + run, run < num_runs, other=0).to(tl.int64)
            end = tl.load(runs_ptr + run + 1, run < num_runs, other=0).to(tl.int64)
            live = (run < num_runs) & (end - begin <= PIECE)
            row = tl.load(ids_ptr + begin, live, other=0).to(tl.int64)
            dims = dim
            if rows.layout is not None:
                dims = (tl.load(about(begin, live, rows, num_bags) + DIM, live, other=0) // VEC * VEC)[:, None]
            grad = tl.zeros((RUNS, BLOCK_D), tl.float32)
            longest = tl.max(tl.where(live, end - begin, 0), 0)
            for first in range(0, longest, LANES):
                for u in tl.static_range(LANES):
                    at = begin + first + u
                    grad += gradients(at, live & (at < end), column, dims, rows, sizes, VEC)
            _step_rows(
                row,
                live,
                grad,
                column,
                begin,
                dim,
                sizes,
                rows,
                to,
                strides,
                numbers,
                scale_rate,
                seed,
                RULE,
                VEC,
            )


def step_tile(dim: int) -> tuple[int, int, int]:
    """Runs and columns that one program steps at a time, and its warps; rows are held whole."""
    block_d = max(16, triton.next_power_of_2(dim))
    return max(1, min(MAX_RUNS, TILE // block_d)), block_d, max(4, min(16, block_d // 256))


def step_options(num_warps: int, long: bool) -> dict[str, int]:
    """Warps and registers of a program that steps short runs or long ones."""
    num_warps = max(8, num_warps) if long else num_warps
    return {"num_warps": num_warps, "maxnreg": min(STEP_REGISTERS, 2048 // num_warps)}


def _grid(device: torch.device, tiles: int) -> int:
    """The number of programs that share ``tiles`` tiles: at most as many as run at once, because skewed ids leave most
    tiles empty.
    """
    if device.type != "cuda":
        return min(tiles, 3)
    at_once = PROGRAMS_PER_MULTIPROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count
    return min(tiles, at_once)


def sparse_update_(args: SparseUpdate) -> None:
    """The operator ``gossamer::sparse_update_``: one step on the touched rows of ``table``, in place.

    Raises:
        ValueError: a row is longer than MAX_DIM.
    """
    table, bags, dout, update = args.table, args.bags, args.dout, args.update
    features, rule = bags.features, update.rule
    many = features.layout is not None
    dims = dims_of(table, bags)
    dim = max(dims)
    if dim > MAX_DIM:
        raise ValueError(f"table must have rows of at most {MAX_DIM} elements on CUDA for a fused step, got {dim}")
    num_rows = max(map(sum, zip(features.row, features.rows, strict=True))) if many else table.shape[0]
    num_positions = bags.index.numel()
    if num_positions >= 2**31 - PIECE:
        raise ValueError(f"index must hold fewer than 2³¹ − {PIECE} ids, got {num_positions}")
    update.step.add_(1)
    if num_positions == 0 or num_rows == 0 or bags.num_bags == 0 or dim == 0:
        return
    to = Updated(table, update.state1, update.state2, update.lr, update.step, scales_of(update.scale))
    changed = (table, update.state1, update.state2)
    full = [t.stride(0) for t in changed if not many and t is not None and t.dim() == 2]
    vec = multiple(min(table.element_size(), dout.element_size()), *dims, *full, dout.stride(0))
    rows = sorted_rows(bags, args.argmax, dout, num_rows)
    runs, num_runs = find_runs(rows.ids)
    windows = triton.cdiv(num_positions, PIECE)
    partial = torch.empty(2 * windows, dim, dtype=torch.float32, device=table.device)
    lanes, block_d = piece_tile(dim)
    sizes = (num_positions, bags.num_bags, num_rows, 0 if bags.offsets is not None else bags.index.shape[1], dim)
    sum_pieces_kernel[(2 * windows, triton.cdiv(dim, block_d))](
        rows, partial, *sizes, *dout.stride(), PIECE=PIECE, LANES=lanes, BLOCK_D=block_d, VEC=vec, num_warps=4
    )
    tile, block_d, num_warps = step_tile(dim)
    for long in (False, True):
        grid = windows if long else _grid(table.device, triton.cdiv(num_positions, tile))
        _step_kernel[(grid,)](
            rows,
            num_runs,
            runs,
            partial,
            to,
            rule_numbers(rule),
            *sizes,
            rule.seed,
            *(0 if t is None else t.stride(0) for t in changed),
            args.scale_rate,
            *dout.stride(),
            RULE=rule_form(rule, table.dtype, update.scale_lr > 0),
            LONG=long,
            PIECE=PIECE,
            LANES=max(1, LANES_TILE // block_d) if long else UNROLL,
            RUNS=1 if long else tile,
            BLOCK_D=block_d,
            VEC=vec,
            **step_options(num_warps, long),
        )


# For each rule: the type of the table that it is compiled for, whether for many tables, and whether for long runs.
_AOT_FORMS = {
    "sgd": ("bf16", True, False),
    "adagrad": ("fp32", False, True),
    "rowwise_adagrad": ("i8", False, False),
    "adam": ("bf16", True, True),
    "partial_rowwise_adam": ("bf16", False, False),
    "lamb": ("fp32", True, False),
    "ftrl": ("fp32", False, False),
}


def aot_cases(arch: int) -> list[tuple]:
    """Launches to compile ahead of time: each optimizer once, over one table and many, in short and long runs."""
    common = {"partial_ptr": "*fp32:16", "totals_ptr": "*i32:16", "runs_ptr": "*i32:16"}
    common |= dict.fromkeys(_INTS + _STRIDES, "i32") | {"stride_tn": "i64"}
    common |= {"numbers": Numbers(*["fp32"] * len(Numbers._fields)), "scale_rate": "fp32"}
    block_runs, block_d, num_warps = step_tile(128)
    cases = []
    for name in RULES if arch == 90 else list(RULES)[:4]:
        type_, tables, long = _AOT_FORMS.get(name, ("fp32", False, False))
        codes, wide = type_ == "i8", type_ == "fp32"
        states, pointer = list(RULES[name].states.values()), f"*{type_}:16"
        kinds = [*states, None, None]
        scale = Scales("*fp32:16", "i32") if codes else None
        to = Updated(pointer, *("*fp32:16" if kind else None for kind in kinds[:2]), None, "*i64:16", scale)
        rows = [kind == "row" for kind in kinds[:2]]
        form = RuleForm(
            name, "formula" if RULES[name].own_decay else "gradient", name == "sgd", True, True, *rows, not wide, codes
        )
        constants = {"stride_gd": 1, "RULE": form, "LONG": long, "PIECE": PIECE, "RUNS": 1 if long else block_runs}
        constants |= {"LANES": LANES_TILE // block_d if long else UNROLL, "BLOCK_D": block_d, "VEC": 4 if wide else 8}
        dout = "*fp32:16" if codes else pointer
        signature = common | {"rows": sorted_types(dout, tables), "to": to}
        cases.append((_step_kernel, signature, constants, step_options(num_warps, long)))
    return cases
