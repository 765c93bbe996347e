"""The transpose of gather_reduce fused with an optimizer's step on the touched rows, duplicates summed in fixed order.

Runs of at most PIECE positions are summed and stepped by one program, several runs at a time. The sums of longer ones'
pieces go to memory and are added in order by the program that takes the row's step; no float is added atomically.

Floor: each touched row and its state read and written once, ``B·D`` elements of the gradient and the lists read once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from gossamer.triton_kernels.gather_reduce import DIM, ELEMENT, ROW, multiple
from gossamer.triton_kernels.row_gradients import (
    PIECE,
    TILE,
    about,
    bag_counts,
    bisect,
    find_runs,
    gradients,
    long_run,
    piece_tile,
    sorted_rows,
    sum_pieces_kernel,
)
from gossamer.triton_kernels.sparse_update_rules import (
    ADAM,
    CLIP_NORM,
    CLIP_VALUE,
    DECOUPLED,
    NESTEROV,
    PARTIAL_ROWWISE_ADAM,
    ROWWISE_ADAGRAD,
    random_bits,
    round_stochastically,
    take_step,
)

MAX_RUNS = 32
UNROLL = 2
# Left to itself the assembler spills a few bytes to fit more programs on a multiprocessor.
STEP_REGISTERS = 128
# A row is held whole, since steps may need its norm.
MAX_DIM = 16384
# Partial sums that a program adds at a time.
LANES_TILE = 4096
PROGRAMS_PER_MULTIPROCESSOR = 16

_INTS = ["num_positions", "num_bags", "sentinel", "width", "dim", "seed"]
_STRIDES = ["stride_tn", "stride_1n", "stride_2n", "stride_gb", "stride_pn"]
_FLOATS = "lr weight_decay beta1 beta2 log_beta1 log_beta2 eps l1 l2 clip_value clip_norm".split()
_VALUES = _INTS + _STRIDES + _FLOATS


@triton.jit
def _state_ptrs(state_ptr, row, table_row, stride, column, TABLES: tl.constexpr, ROW_STATE: tl.constexpr):
    """Where a state tensor keeps what belongs to rows: one value of each, or one of each element."""
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
    lists,
    table,
    numbers,
    lr_ptr,
    step_ptr,
    seed,
    ALGORITHM: tl.constexpr,
    FLAGS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    VEC: tl.constexpr,
):
    """Read rows ``row [R]``, step with ``grad [R, C]``, write them; ``first [R]`` is a sorted position of each."""
    table_ptr, state1_ptr, state2_ptr, stride_tn, stride_1n, stride_2n = table
    tables: tl.constexpr = lists[0][6] is not None
    row_state1: tl.constexpr = ALGORITHM == ROWWISE_ADAGRAD
    row_state2: tl.constexpr = ALGORITHM == PARTIAL_ROWWISE_ADAM
    if tables:
        about_ptr = about(first, live, lists)
        dims = tl.load(about_ptr + DIM, live, other=0) // VEC * VEC
        inside = (row - tl.load(about_ptr + ROW, live, other=0)) * dims
        table_row = tl.load(about_ptr + ELEMENT, live, other=0) // 16 * 16 + inside // VEC * VEC
        dim = dims[:, None]
    else:
        table_row = row * stride_tn
    mask = live[:, None] & (column[None, :] < dim)
    table_ptrs = table_ptr + table_row[:, None] + column.to(tl.int64)[None, :]
    # Triton 3.6 has no functions that return None.
    state1_ptrs = None
    if state1_ptr is not None:
        state1_ptrs = _state_ptrs(state1_ptr, row, table_row, stride_1n, column, tables, row_state1)
    state2_ptrs = None
    if state2_ptr is not None:
        state2_ptrs = _state_ptrs(state2_ptr, row, table_row, stride_2n, column, tables, row_state2)
    rate = numbers[0]
    if lr_ptr is not None:
        rate = tl.load(lr_ptr).to(tl.float32)
    step = tl.load(step_ptr)
    new = take_step(
        tl.load(table_ptrs, mask, other=0.0).to(tl.float32),
        grad,
        live,
        mask,
        (dim + tl.zeros((1, 1), tl.int64)).to(tl.float32),
        state1_ptrs,
        state2_ptrs,
        step,
        rate,
        numbers,
        ALGORITHM,
        FLAGS,
    )
    if STOCHASTIC:
        bits = random_bits(seed, step, row, column)
        tl.store(table_ptrs, round_stochastically(new, bits, table_ptr.dtype.element_ty), mask)
    else:
        tl.store(table_ptrs, new.to(table_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=_VALUES, do_not_specialize_on_alignment=["totals_ptr"])
def _step_kernel(
    ids_ptr,
    order_ptr,
    totals_ptr,
    runs_ptr,
    partial_ptr,
    bags_ptr,
    offsets_ptr,
    weights_ptr,
    counts_ptr,
    argmax_ptr,
    layout_ptr,
    dout_ptr,
    table_ptr,
    state1_ptr,
    state2_ptr,
    lr_ptr,
    step_ptr,
    num_positions,
    num_bags,
    sentinel,
    width,
    dim,
    seed,
    stride_tn,
    stride_1n,
    stride_2n,
    stride_gb,
    stride_gd,
    stride_pn,
    lr,
    weight_decay,
    beta1,
    beta2,
    log_beta1,
    log_beta2,
    eps,
    l1,
    l2,
    clip_value,
    clip_norm,
    ALGORITHM: tl.constexpr,
    FLAGS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    LONG: tl.constexpr,
    PIECE: tl.constexpr,
    LANES: tl.constexpr,
    RUNS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VEC: tl.constexpr,
):
    """Step the rows of runs of at most PIECE positions, RUNS at a time, in turns with the other programs.

    LONG: of the run of more positions that begins among PIECE of them, whose pieces have been summed.
    """
    dim = dim // VEC * VEC
    lists = (
        (order_ptr, bags_ptr, offsets_ptr, weights_ptr, counts_ptr, argmax_ptr, layout_ptr),
        (dout_ptr, stride_gb.to(tl.int64) // VEC * VEC, stride_gd, width, num_bags),
    )
    wide_1n, wide_2n = stride_1n.to(tl.int64), stride_2n.to(tl.int64)
    if ALGORITHM != ROWWISE_ADAGRAD:
        wide_1n = wide_1n // VEC * VEC
    if ALGORITHM != PARTIAL_ROWWISE_ADAM:
        wide_2n = wide_2n // VEC * VEC
    table = (table_ptr, state1_ptr, state2_ptr, stride_tn.to(tl.int64) // VEC * VEC, wide_1n, wide_2n)
    numbers = (lr, weight_decay, beta1, beta2, log_beta1, log_beta2, eps, l1, l2, clip_value, clip_norm)
    column = tl.arange(0, BLOCK_D)
    if LONG:
        window = tl.program_id(0).to(tl.int64)
        exists, begin = long_run(ids_ptr, window, num_positions, sentinel, PIECE)
        if exists:
            id = tl.load(ids_ptr + begin)
            end = bisect(ids_ptr, id, begin, begin * 0 + num_positions, True)
            pieces = (end - begin + PIECE - 1) // PIECE
            size = stride_pn // VEC * VEC
            total = tl.zeros((LANES, BLOCK_D), tl.float32)
            for first in range(0, pieces, LANES):
                piece = first + tl.arange(0, LANES)
                slot = 2 * (window + piece) + (piece == 0)
                mask = (piece < pieces)[:, None] & (column < size)[None, :]
                total += tl.load(partial_ptr + slot[:, None] * size + column[None, :], mask, other=0.0)
            one = tl.zeros((1,), tl.int64)
            grad = tl.sum(total, 0)[None, :]
            _step_rows(
                id.to(tl.int64) + one,
                one == 0,
                grad,
                column,
                begin + one,
                dim,
                lists,
                table,
                numbers,
                lr_ptr,
                step_ptr,
                seed,
                ALGORITHM,
                FLAGS,
                STOCHASTIC,
                VEC,
            )
    else:
        num_runs = tl.load(totals_ptr)
        # The last run may be that of positions which contribute nothing.
        num_runs -= (tl.load(ids_ptr + num_positions - 1) == sentinel).to(num_runs.dtype)
        for tile in range(tl.program_id(0), tl.cdiv(num_runs, RUNS), tl.num_programs(0)):
            run = tile * RUNS + tl.arange(0, RUNS)
            begin = tl.load(runs_ptr + run, run < num_runs, other=0).to(tl.int64)
            end = tl.load(runs_ptr + run + 1, run < num_runs, other=0).to(tl.int64)
            live = (run < num_runs) & (end - begin <= PIECE)
            row = tl.load(ids_ptr + begin, live, other=0).to(tl.int64)
            dims = dim
            if layout_ptr is not None:
                dims = (tl.load(about(begin, live, lists) + DIM, live, other=0) // VEC * VEC)[:, None]
            grad = tl.zeros((RUNS, BLOCK_D), tl.float32)
            longest = tl.max(tl.where(live, end - begin, 0), 0)
            for first in range(0, longest, LANES):
                for u in tl.static_range(LANES):
                    at = begin + first + u
                    grad += gradients(at, live & (at < end), column, dims, lists, VEC)
            _step_rows(
                row,
                live,
                grad,
                column,
                begin,
                dim,
                lists,
                table,
                numbers,
                lr_ptr,
                step_ptr,
                seed,
                ALGORITHM,
                FLAGS,
                STOCHASTIC,
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
    """Programs that share ``tiles`` tiles: no more than run at once, for most tiles of skewed ids are empty."""
    if device.type != "cuda":
        return min(tiles, 3)
    at_once = PROGRAMS_PER_MULTIPROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count
    return min(tiles, at_once)


def sparse_update_(
    table: torch.Tensor,
    index: torch.Tensor,
    dout: torch.Tensor,
    offsets: torch.Tensor | None,
    weights: torch.Tensor | None,
    argmax: torch.Tensor | None,
    layout: torch.Tensor | None,
    lr: torch.Tensor | None,
    step: torch.Tensor,
    state1: torch.Tensor | None,
    state2: torch.Tensor | None,
    spec: Sequence[int],
    padding_idx: int,
    mean: bool,
    drop: bool,
    algorithm: int,
    hyper: Sequence[float],
    seed: int,
) -> None:
    """The operator ``gossamer::sparse_update_``: one step on the touched rows of ``table``, in place.

    Raises:
        ValueError: a row is longer than MAX_DIM.
    """
    dims = list(spec[3::6]) if layout is not None else [table.shape[1]]
    dim = max(dims)
    if dim > MAX_DIM:
        raise ValueError(f"table must have rows of at most {MAX_DIM} elements on CUDA for a fused step, got {dim}")
    if layout is None:
        num_rows, num_bags = table.shape[0], dout.shape[0]
    else:
        num_rows, num_bags = max(a + b for a, b in zip(spec[1::6], spec[2::6], strict=True)), dout.shape[0]
    num_positions = index.numel()
    if num_positions >= 2**31 - PIECE:
        raise ValueError(f"index must hold fewer than 2³¹ − {PIECE} ids, got {num_positions}")
    step.add_(1)
    if num_positions == 0 or num_rows == 0 or num_bags == 0 or dim == 0:
        return
    device = table.device
    offsets = None if offsets is None else offsets.contiguous()
    weights = None if weights is None else weights.reshape(-1).contiguous()
    (rate, weight_decay, decoupled, beta1, beta2, eps, nesterov, l1, l2, clip_value, clip_norm, stochastic) = hyper
    flags = DECOUPLED.value * bool(decoupled) + NESTEROV.value * bool(nesterov)
    flags += CLIP_VALUE.value * math.isfinite(clip_value) + CLIP_NORM.value * math.isfinite(clip_norm)
    logs = [math.log(beta) if beta > 0 else -math.inf for beta in (beta1, beta2)]
    itemsize = table.element_size()
    strides = [t.stride(0) if t is not None else 0 for t in (table, state1, state2)]
    full = [t.stride(0) for t in (table, state1, state2) if layout is None and t is not None and t.dim() == 2]
    vec = multiple(min(itemsize, dout.element_size()), *dims, *full, dout.stride(0))
    keys, ids, order, bags = sorted_rows(index, offsets, padding_idx, num_rows, num_bags, layout)
    averaged = any(spec[5::6]) if layout is not None else mean
    counts = bag_counts(keys, offsets, num_rows, num_bags, layout) if averaged else None
    del keys
    runs, num_runs = find_runs(ids)
    windows = triton.cdiv(num_positions, PIECE)
    partial = torch.empty(2 * windows, dim, dtype=torch.float32, device=device)
    lists = (bags, offsets, weights, counts, argmax, layout, dout)
    lanes, block_d = piece_tile(dim)
    width = 0 if offsets is not None else index.shape[1]
    sum_pieces_kernel[(2 * windows, triton.cdiv(dim, block_d))](
        ids,
        order,
        *lists,
        partial,
        num_positions,
        num_bags,
        num_rows,
        width,
        dim,
        *dout.stride(),
        dim,
        PIECE=PIECE,
        LANES=lanes,
        BLOCK_D=block_d,
        VEC=vec,
        num_warps=4,
    )
    tile, block_d, num_warps = step_tile(dim)
    for long in (False, True):
        grid = windows if long else _grid(device, triton.cdiv(num_positions, tile))
        _step_kernel[(grid,)](
            ids,
            order,
            num_runs,
            runs,
            partial,
            *lists,
            table,
            state1,
            state2,
            lr,
            step,
            num_positions,
            num_bags,
            num_rows,
            width,
            dim,
            seed,
            *strides,
            *dout.stride(),
            dim,
            rate,
            weight_decay,
            beta1,
            beta2,
            *logs,
            eps,
            l1,
            l2,
            clip_value,
            clip_norm,
            ALGORITHM=algorithm,
            FLAGS=flags,
            STOCHASTIC=bool(stochastic) and itemsize == 2,
            LONG=long,
            PIECE=PIECE,
            LANES=max(1, LANES_TILE // block_d) if long else UNROLL,
            RUNS=1 if long else tile,
            BLOCK_D=block_d,
            VEC=vec,
            **step_options(num_warps, long),
        )


def aot_cases(arch: int) -> list[tuple]:
    """Launches to compile ahead of time: each optimizer once, over one table and many, in short and long runs."""
    common = {"ids_ptr": "*i32:16", "order_ptr": "*i64:16", "bags_ptr": "*i32:16", "offsets_ptr": "*i64:16"}
    common |= {"weights_ptr": "*fp32:16", "counts_ptr": "*i32:16", "partial_ptr": "*fp32:16"}
    common |= {"totals_ptr": "*i32:16", "runs_ptr": "*i32:16", "step_ptr": "*i64:16", "state1_ptr": "*fp32:16"}
    common |= dict.fromkeys(_INTS + _STRIDES, "i32") | {"stride_tn": "i64"} | dict.fromkeys(_FLOATS, "fp32")
    rows, block_d, num_warps = step_tile(128)
    cases = []
    for algorithm in range(7 if arch == 90 else 4):
        half, tables, long = algorithm in (0, 3, 4), algorithm in (0, 3, 5), algorithm in (1, 3)
        pointer = "*bf16:16" if half else "*fp32:16"
        signature = common | {"dout_ptr": pointer, "table_ptr": pointer}
        constants = {"argmax_ptr": None, "lr_ptr": None, "stride_gd": 1, "ALGORITHM": algorithm}
        (signature if tables else constants)["layout_ptr"] = "*i64:16" if tables else None
        two_states = algorithm >= ADAM.value
        (signature if two_states else constants)["state2_ptr"] = "*fp32:16" if two_states else None
        flags = CLIP_VALUE.value + CLIP_NORM.value + (NESTEROV.value if algorithm == 0 else 0)
        constants |= {"FLAGS": flags, "STOCHASTIC": half, "LONG": long, "PIECE": PIECE, "RUNS": 1 if long else rows}
        constants |= {"LANES": LANES_TILE // block_d if long else UNROLL, "BLOCK_D": block_d, "VEC": 8 if half else 4}
        cases.append((_step_kernel, signature, constants, step_options(num_warps, long)))
    return cases
