"""Sums and means over lists of ids whose vectors are composed of several rows, decoded as they are read."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import NamedTuple

import torch

from gossamer import _backend
from gossamer._checks import (
    check_flag,
    check_float,
    check_positive,
    check_same_device,
    check_sequence,
    check_shape,
    check_sizes,
    check_tensor,
)
from gossamer._numerics import accumulation_dtype, rows_dtype
from gossamer.ops._bags import (
    Bags,
    bags_of_columns,
    check_bags,
    check_offsets,
    check_weights_values,
    elements_of_blocks,
    raises,
)
from gossamer.ops._records import define
from gossamer.ops.gather_reduce import checked_out_dtype, table_gradient
from gossamer.ops.map_ids import IdMaps, MapIds, map_ids_reference, raise_outside
from gossamer.ops.sparse_update import sum_blocks

OPERATIONS = ("add", "mul", "concat")
# Codes with more bits than this are stored as int32.
PACKED_BITS = 16
# Gradients of tables of up to so many elements are summed in the caches, without sorting ids by their rows.
SMALL_TABLE = 1 << 16


def unpack_codes(packed: torch.Tensor, parts: int, bits: int) -> torch.Tensor:
    """Codes ``(N, P)`` int32 of at most 16 bits, from bytes ``(N, ceil(P·bits/8))`` that hold them lowest bit first."""
    if bits == 8:
        return packed.int()
    # A code of up to 16 bits lies in three bytes.
    width = packed.shape[1]
    wide = torch.nn.functional.pad(packed, (0, 2)).int()
    first = torch.arange(parts, device=packed.device) * bits
    byte, shift = first // 8, (first % 8).int()
    window = wide[:, byte] | wide[:, (byte + 1).clamp(max=width)] << 8 | wide[:, (byte + 2).clamp(max=width)] << 16
    return (window >> shift) & (2**bits - 1)


class Parts(NamedTuple):
    """The rows of a table ``(M, C)`` that compose an id's vector, and the operation.

    Attributes:
        dim: D of the vector.
        operation: how H rows are combined: ``"add"`` or ``"mul"`` of rows of D columns, or ``"concat"``.
        maps: one per part, giving the row of an id. For a coded part, ``bases`` is its first row and ``moduli`` its
            number of rows.
        coded: number of leading parts whose row is a code stored for each id, added to the part's first row.
        codes: ``(F, ...)``, codes of the first F ids: bytes that hold ``coded`` codes each, packed lowest bit first, or
            int32 ``(F, coded)``; None where no part is coded.
        rare: the same for the ids that follow, or None.
        bits: of a code of ``codes`` and of ``rare``, 32 where they are int32.
        block: 0, or Z if parts are blocks of Z consecutive elements of an array ``(M, 1)``, at the positions that the
            maps give; blocks are concatenated and cut off at D.
        wrap: whether blocks continue at the start of the array. Maps then give positions below their prime p, and
            element i of a block is at ``(position + i) mod p mod M``.
    """

    dim: int
    operation: str
    maps: IdMaps
    coded: int
    codes: torch.Tensor | None
    rare: torch.Tensor | None
    bits: list[int]
    block: int
    wrap: bool

    @classmethod
    def of(cls, dim: int, operation: str, maps: IdMaps, **more: object) -> Parts:
        """Parts with defaults for the arguments that are not given."""
        rest = {"coded": 0, "codes": None, "rare": None, "bits": [], "block": 0, "wrap": False}
        return cls(dim, operation, maps, **rest | more)

    @property
    def num_ids(self) -> int:
        """Ids below this number are valid; 0 if all are."""
        if self.codes is None:
            return self.maps.limit
        return self.codes.shape[0] + (0 if self.rare is None else self.rare.shape[0])

    @property
    def places(self) -> int:
        """Number of rows that an id reads: H, or D elements of an array."""
        return self.dim if self.block else self.maps.count

    @property
    def whole_blocks(self) -> bool:
        """Whether all parts are blocks of one size, and the array's end breaks none of them."""
        return self.block > 0 and not self.wrap and (self.maps.count == 1 or self.dim % self.block == 0)

    @property
    def listed(self) -> int:
        """What the gradient lists of an id: H rows or first elements of whole blocks, or the D elements of others."""
        return self.maps.count if self.whole_blocks else self.places


class GatherCompose(NamedTuple):
    """Arguments of sums and means of composed vectors over bags.

    Attributes:
        table: ``(M, C)`` float.
        bags: the lists of ids.
        parts: what an id's vector is composed of.
        out_dtype: of the result ``(B, D)``.
    """

    table: torch.Tensor
    bags: Bags
    parts: Parts
    out_dtype: torch.dtype


class ComposeGradient(NamedTuple):
    """Arguments of the gradients of composed vectors.

    Attributes:
        dout: ``(B, D)`` of the accumulator's dtype.
        table: ``(M, C)``; values are read for factors and weights.
        bags: the lists of ids.
        parts: what an id's vector is composed of.
        factors: whether the gradients of a product's factors are wanted.
        weights: whether the gradients of the bags' weights are wanted; the weights are left out of ``bags``.
    """

    dout: torch.Tensor
    table: torch.Tensor
    bags: Bags
    parts: Parts
    factors: bool
    weights: bool


class RowSums(NamedTuple):
    """Arguments of the gradients of all rows of a small table.

    Attributes:
        dout: ``(B, D)`` of the accumulator's dtype.
        table: ``(M, C)``.
        bags: the lists of ids.
        parts: what an id's vector is composed of, rows.
    """

    dout: torch.Tensor
    table: torch.Tensor
    bags: Bags
    parts: Parts


@functools.cache
def _kernels(backend: str) -> ModuleType:
    if backend == "native":
        from gossamer.cpu_kernels import gather_compose
    else:
        from gossamer.triton_kernels import gather_compose
    return gather_compose


def live_positions(bags: Bags, parts: Parts) -> torch.Tensor:
    """Which flat positions lie in a bag and contribute to it."""
    flat, limit = bags.index.reshape(-1), parts.num_ids
    live = (flat >= 0) & (flat < limit) if limit else torch.ones_like(flat, dtype=torch.bool)
    if bags.padding_idx >= 0:
        live &= flat != bags.padding_idx
    return live & (bags.numbers() < bags.num_lists) if bags.offsets is not None else live


def _codes_at(parts: Parts, ids: torch.Tensor) -> torch.Tensor:
    """The codes ``(L, coded)`` of known ids."""
    found = []
    first, frequent = 0, parts.codes.shape[0]
    for stored, bits in zip((parts.codes, parts.rare), parts.bits, strict=False):
        if stored is None or not stored.shape[0]:
            continue
        inside = (ids - first).clamp(0, stored.shape[0] - 1)
        rows = stored.index_select(0, inside)
        found.append(unpack_codes(rows, parts.coded, bits) if bits <= PACKED_BITS else rows)
        first = frequent
    if len(found) == 2:
        return torch.where((ids < frequent).unsqueeze(1), found[0], found[1])
    # Without a stored code no id is known, and ids are none.
    return found[0] if found else ids.new_empty(len(ids), parts.coded)


def _decoded(flat: torch.Tensor, parts: Parts) -> torch.Tensor:
    """The rows ``(L, H)`` of known ids ``(L,)`` in plain torch, or the places of their blocks."""
    maps = parts.maps
    rows = map_ids_reference(MapIds(flat, maps)).long() if parts.coded < maps.count else None
    if not parts.coded:
        return rows
    first = torch.tensor(maps.bases[: parts.coded], device=flat.device)
    coded = _codes_at(parts, flat).long() + first
    return coded if rows is None else torch.cat([coded, rows[:, parts.coded :]], 1)


def part_rows(ids: torch.Tensor, parts: Parts, num_rows: int) -> torch.Tensor:
    """The rows ``(*ids.shape, H)`` of known ids in plain torch, or the elements ``(*ids.shape, D)`` of their blocks."""
    rows, maps = _decoded(ids.reshape(-1).long(), parts), parts.maps
    if parts.block:
        within = torch.arange(parts.dim, device=ids.device) % parts.block
        rows = rows.repeat_interleave(parts.block, 1)[:, : parts.dim] + within
        rows = rows % maps.prime % num_rows if parts.wrap else rows
    return rows.view(*ids.shape, parts.places)


def composed_rows(ids: torch.Tensor, parts: Parts, num_rows: int) -> torch.Tensor:
    """:func:`part_rows` of any ids.

    Raises:
        IndexError: on the CPU, an id that is not valid for the parts.
    """
    if parts.num_ids and ids.is_cpu and not torch.compiler.is_compiling():
        raise_outside(ids, parts.num_ids)
    return part_rows(ids, parts, num_rows)


def _compose(rows: torch.Tensor, parts: Parts) -> torch.Tensor:
    """Vectors ``(L, D)`` of table rows ``(L, H, C)``."""
    if parts.operation == "add":
        return rows.sum(1)
    return rows.prod(1) if parts.operation == "mul" else rows.flatten(1)


def counts_of(bags: Bags, live: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Ids of each bag that contribute, at least 1."""
    numbers = torch.where(live, bags.numbers(), bags.num_bags)
    counts = torch.zeros(bags.num_bags + 1, dtype=dtype, device=live.device)
    return counts.index_add(0, numbers, counts.new_ones(numbers.shape))[:-1].clamp(min=1)


def pooled(
    values: torch.Tensor, kept: torch.Tensor, live: torch.Tensor, bags: Bags, dtype: torch.dtype
) -> torch.Tensor:
    """Weighted sums or means over bags of the vectors ``(K, D)`` of the positions ``kept``, where ``live`` is true."""
    if bags.weights is not None:
        values = values * bags.weights.reshape(-1)[kept].to(values.dtype).unsqueeze(1)
    out = torch.zeros(bags.num_bags, values.shape[1], dtype=values.dtype, device=values.device)
    out = out.index_add(0, bags.numbers()[kept], values)
    if bags.mode == "mean":
        out = out / counts_of(bags, live, values.dtype).unsqueeze(1)
    return out.to(dtype)


def gather_compose_reference(args: GatherCompose) -> torch.Tensor:
    """:func:`gather_compose` in plain torch, differentiable."""
    table, bags, parts = args.table, args.bags, args.parts
    live = live_positions(bags, parts)
    kept = live.nonzero().squeeze(1)
    rows = part_rows(bags.index.reshape(-1)[kept], parts, table.shape[0])
    values = _compose(table[rows].to(accumulation_dtype(table.dtype)), parts)
    return pooled(values, kept, live, bags, args.out_dtype)


def check_values(bags: Bags, parts: Parts) -> None:
    """Check ids, offsets and weights, as the native kernels do themselves; for the reference on the CPU."""
    if torch.compiler.is_compiling() or not raises(bags.index, "reference"):
        return
    if bags.offsets is not None and bags.num_lists:
        check_offsets(bags.index, bags.offsets)
    inside = bags.numbers() < bags.num_lists
    if parts.num_ids:
        raise_outside(torch.where(inside, bags.index.reshape(-1), 0), parts.num_ids)
    if bags.weights is not None:
        check_weights_values(bags.weights, inside)


def forward(args: GatherCompose, backend: str) -> torch.Tensor:
    """Sums and means outside autograd."""
    if backend == "reference":
        check_values(args.bags, args.parts)
        return gather_compose_reference(args)
    return _kernels(backend).gather_compose(args)


def forward_fake(args: GatherCompose) -> torch.Tensor:
    """An empty tensor of the shape that :func:`forward` returns."""
    return args.table.new_empty(args.bags.num_bags, args.parts.dim, dtype=args.out_dtype)


# out[b] = sum or mean over the ids of bag b of weight · the composition of their rows.
_gather_compose = define("gather_compose", GatherCompose, kernel=forward, fake=forward_fake, returns="Tensor")


def compose_gradient_reference(args: ComposeGradient) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """What :attr:`Parts.listed` says of each position, −1 where it contributes nothing, and gradients, in plain torch.

    The gradients are those of factors and of weights.
    """
    bags, parts, table = args.bags, args.parts, args.table
    live, wide = live_positions(bags, parts), args.dout.dtype
    ids = torch.where(live, bags.index.reshape(-1).long(), 0)
    listed = _decoded(ids, parts) if parts.whole_blocks else part_rows(ids, parts, table.shape[0])
    shown = listed.masked_fill(~live.unsqueeze(1), -1).to(rows_dtype(table.shape[0]))
    if not (args.factors or args.weights):
        return shown, None, None
    rows = part_rows(ids, parts, table.shape[0])
    bag = bags.numbers().clamp(max=max(bags.num_bags - 1, 0))
    dout = args.dout[bag] if bags.num_bags else args.dout.new_zeros(len(ids), parts.dim)
    if bags.mode == "mean":
        dout = dout / counts_of(bags, live, wide)[bag].unsqueeze(1)
    dout = dout.masked_fill(~live.unsqueeze(1), 0)
    found = table[rows].to(wide)
    if args.weights:
        return shown, None, (_compose(found, parts) * dout).sum(1)
    if bags.weights is not None:
        dout = dout * bags.weights.reshape(-1).to(wide).masked_fill(~live, 0).unsqueeze(1)
    others = [found[:, [k for k in range(rows.shape[1]) if k != part]].prod(1) for part in range(rows.shape[1])]
    return shown, dout.unsqueeze(1) * torch.stack(others, 1), None


@functools.cache
def _gradient_kernels(backend: str) -> ModuleType:
    if backend == "native":
        from gossamer.cpu_kernels import gather_compose as gather_compose_gradient
    else:
        from gossamer.triton_kernels import gather_compose_gradient
    return gather_compose_gradient


def _gradient(args: ComposeGradient, backend: str) -> tuple:
    if backend == "reference":
        return compose_gradient_reference(args)
    if backend == "native":
        return _gradient_kernels(backend).compose_gradient(args)
    bags = args.bags
    counts = counts_of(bags, live_positions(bags, args.parts), args.dout.dtype) if bags.mode == "mean" else None
    return _gradient_kernels(backend).compose_gradient(args, counts)


def _gradient_fake(args: ComposeGradient) -> tuple:
    count, parts, dout = args.bags.index.numel(), args.parts, args.dout
    rows = dout.new_empty(count, parts.listed, dtype=rows_dtype(args.table.shape[0]))
    factors = dout.new_empty(count, parts.maps.count, parts.dim) if args.factors else None
    return rows, factors, dout.new_empty(count) if args.weights else None


_compose_gradient = define(
    "compose_gradient",
    ComposeGradient,
    kernel=_gradient,
    fake=_gradient_fake,
    returns="(Tensor rows, Tensor factors, Tensor weights)",
)


def rows_of_positions(bags: Bags, parts: Parts, table: torch.Tensor, backend: str) -> torch.Tensor:
    """The rows ``(L, H)`` of all positions, −1 where they contribute nothing."""
    none = table.new_empty(0, parts.dim, dtype=accumulation_dtype(table.dtype))
    return _compose_gradient(ComposeGradient(none, table.detach(), bags, parts, False, False), backend)[0]


def _gradient_parts(args: ComposeGradient, backend: str) -> tuple:
    """The same, differentiable if a graph of the backward pass is recorded."""
    if torch.is_grad_enabled() and (args.factors or args.weights):
        return compose_gradient_reference(args)
    return _compose_gradient(args, backend)


def _sum_rows(args: RowSums, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient ``(M, C)`` of each row, and the rows' numbers ``(M,)``, −1 where no position contributes."""
    if backend == "native":
        return _kernels(backend).row_sums(args)
    compose = GatherCompose(args.table, args.bags, args.parts, args.dout.dtype)
    bags, values = _listed_gradients(compose, args.dout, backend)
    count = args.table.shape[0]
    sums = table_gradient(bags, values, args.table.shape, args.dout.dtype, backend)
    found = bags.index.reshape(-1).long()
    touched = torch.zeros(count + 1, dtype=torch.bool, device=found.device)
    touched = touched.index_fill(0, torch.where(found < 0, count, found), True)[:-1]
    return sums, torch.where(touched, torch.arange(count, device=found.device), -1).int()


def _sum_rows_fake(args: RowSums) -> tuple[torch.Tensor, torch.Tensor]:
    table = args.table
    return table.new_empty(table.shape, dtype=args.dout.dtype), table.new_empty(table.shape[0], dtype=torch.int32)


_row_sums = define(
    "compose_row_sums", RowSums, kernel=_sum_rows, fake=_sum_rows_fake, returns="(Tensor sums, Tensor rows)"
)


def sums_rows(args: GatherCompose, backend: str) -> bool:
    """Whether the table is small, and the lists long enough, for its gradient to be summed as a whole."""
    small = args.table.numel() <= SMALL_TABLE and args.table.shape[0] <= args.bags.index.numel() * args.parts.maps.count
    return backend == "native" and small and not args.parts.block and not torch.is_grad_enabled()


def row_gradients(args: GatherCompose, dout: torch.Tensor, backend: str) -> tuple[Bags, torch.Tensor]:
    """The table's gradient in the form of a sum over bags of its rows: the lists, and one gradient per bag.

    Of whole blocks the lists hold first elements; of a small table, each row at most once.
    """
    if sums_rows(args, backend):
        wide = accumulation_dtype(args.table.dtype)
        sums, rows = _row_sums(RowSums(dout.to(wide), args.table, args.bags, args.parts), backend)
        return Bags(rows.unsqueeze(1), drop=True), sums
    return _listed_gradients(args, dout, backend)


def _listed_gradients(args: GatherCompose, dout: torch.Tensor, backend: str) -> tuple[Bags, torch.Tensor]:
    bags, parts, wide = args.bags, args.parts, accumulation_dtype(args.table.dtype)
    dout, mul = dout.to(wide), parts.operation == "mul"
    rows, factors, _ = _gradient_parts(ComposeGradient(dout, args.table, bags, parts, mul, False), backend)
    drop = bags.drop or bags.offsets is not None or bags.padding_idx >= 0 or backend != "native"
    if mul:
        return Bags(rows.reshape(-1, 1), drop=drop), factors.flatten(0, 1)
    if bags.mode == "mean":
        dout = dout / counts_of(bags, rows[:, 0] >= 0, wide).unsqueeze(1)
    times, weights = parts.listed, bags.weights
    if parts.operation != "add":
        return bags_of_columns(bags, rows, dout, drop)
    if bags.offsets is None:
        count, length = bags.index.shape
        weights = None if weights is None else weights.repeat_interleave(times, 1)
        return Bags(rows.view(count, length * times), weights=weights, drop=drop), dout
    weights = None if weights is None else weights.repeat_interleave(times)
    return Bags(rows.flatten(), bags.offsets.long() * times, weights, drop=drop), dout


def block_gradient(bags: Bags, dout: torch.Tensor, table: torch.Tensor, backend: str) -> torch.Tensor:
    """The gradient of an array ``(M, 1)`` from lists of first elements of blocks of D and ``dout (B, D)``."""
    if torch.is_grad_enabled():
        return table_gradient(*elements_of_blocks(bags, dout), table.shape, table.dtype, backend)
    return sum_blocks(bags, dout, table, backend)


def weight_gradients(args: GatherCompose, dout: torch.Tensor, backend: str) -> torch.Tensor:
    """The gradient of the bags' weights, shaped like them."""
    weights, bags = args.bags.weights, args.bags._replace(weights=None)
    dout = dout.to(accumulation_dtype(args.table.dtype))
    found = _gradient_parts(ComposeGradient(dout, args.table, bags, args.parts, False, True), backend)[2]
    return found.to(weights.dtype).view(weights.shape)


def _save(ctx, args: GatherCompose, output: torch.Tensor):
    return (args,)


def _differentiate(ctx, args: GatherCompose, tensors, dout: torch.Tensor):
    gradients = {}
    if "table" in ctx.needs:
        bags, values = row_gradients(args, dout, ctx.backend)
        if sums_rows(args, ctx.backend):
            gradients["table"] = values.to(args.table.dtype)
        elif args.parts.whole_blocks:
            gradients["table"] = block_gradient(bags, values, args.table, ctx.backend)
        else:
            gradients["table"] = table_gradient(bags, values, args.table.shape, args.table.dtype, ctx.backend)
    if "bags.weights" in ctx.needs:
        gradients["bags.weights"] = weight_gradients(args, dout, ctx.backend)
    return gradients


_gather_compose.differentiate(_save, _differentiate)


def check_parts(parts: object, ids: torch.Tensor, num_rows: int) -> None:
    """Check that kernels stay inside the codes and, for rows given by maps, inside the table.

    Raises:
        TypeError: ``parts`` is not a :class:`Parts`, or codes have another dtype.
        ValueError: codes are missing, have too few bytes for their bits, or are empty; blocks that wrap have maps that
            exceed their prime.
    """
    if not isinstance(parts, Parts) or not isinstance(parts.maps, IdMaps):
        raise TypeError(f"parts must be gossamer.Parts with maps, got {type(parts).__name__}")
    # Looked at without a call, as each lookup asks.
    if not type(parts.coded) is type(parts.dim) is type(parts.block) is int or type(parts.wrap) is not bool:
        check_sizes(**{f"parts.{name}": getattr(parts, name) for name in ("coded", "dim", "block")})
        check_flag("parts.wrap", parts.wrap)
    if type(parts.bits) is not list:
        check_sequence("parts.bits", parts.bits)
    if not 0 <= parts.coded <= parts.maps.count:
        raise ValueError(f"parts.coded must be in [0, {parts.maps.count}], the number of maps, got {parts.coded}")
    if parts.coded and (parts.codes is None or parts.block):
        raise ValueError("parts.codes must be given for coded parts, and those be no blocks")
    for name, stored, bits in zip(("codes", "rare"), (parts.codes, parts.rare), [*parts.bits, 0, 0], strict=False):
        if stored is None:
            continue
        check_positive(**{"parts.bits": bits})
        check_tensor(f"parts.{name}", stored)
        check_shape(f"parts.{name}", stored, (None, None), "two dimensions")
        wanted = torch.int32 if bits == 32 else torch.uint8
        if not (1 <= bits <= PACKED_BITS or bits == 32) or stored.dtype != wanted:
            raise TypeError(
                f"parts.{name} must be uint8 with 1 to {PACKED_BITS} bits a code or int32 with 32, got {stored.dtype} "
                f"with {bits}"
            )
        if stored.shape[1] * stored.element_size() * 8 < parts.coded * bits:
            raise ValueError(f"parts.{name} must hold {parts.coded} codes of {bits} bits, got {tuple(stored.shape)}")
    if parts.coded and ids.numel() and not parts.num_ids:
        raise ValueError("parts.codes must have codes of at least one id")
    if parts.wrap:
        places = max(base + modulus for base, modulus in zip(parts.maps.bases, parts.maps.moduli, strict=True))
        if not parts.block or places > parts.maps.prime or not num_rows:
            raise ValueError(
                f"parts that wrap must be blocks placed below their prime, {parts.maps.prime}, got {places}"
            )


def checked_compose(table, ids, parts: Parts, offsets, weights, mode, include_last_offset, backend: str) -> Bags:
    """Check the arguments of :func:`gather_compose`, except the values of ids and offsets; their bags."""
    if mode == "max":
        raise ValueError("mode must be 'sum' or 'mean' for composed rows, got 'max'")
    bags = check_bags(table, ids, offsets, weights, backend, mode, None, include_last_offset, "raise", name="ids")
    check_parts(parts, bags.index, table.shape[0])
    check_same_device(table=table, codes=parts.codes, rare=parts.rare)
    if parts.operation not in OPERATIONS:
        raise ValueError(f"operation must be one of {OPERATIONS}, got {parts.operation!r}")
    maps, columns = parts.maps, parts.block or table.shape[1]
    whole = columns * maps.count if parts.operation == "concat" else columns
    if not (whole - columns < parts.dim <= whole if parts.block else parts.dim == whole):
        raise ValueError(f"parts must have the dim {whole} of {maps.count} rows of {columns}, got {parts.dim}")
    if parts.block:
        check_shape("table", table, (None, 1), "(M, 1) for blocks")
        if parts.operation != "concat":
            raise ValueError(f"operation must be 'concat' for blocks, got {parts.operation!r}")
    last = max(base + modulus for base, modulus in zip(maps.bases, maps.moduli, strict=True))
    beyond = 0 if parts.wrap else max(parts.block - 1, 0)
    if not parts.wrap and last + beyond > table.shape[0]:
        raise ValueError(f"table must have at least {last + beyond} rows, which the maps reach, got {table.shape[0]}")
    return bags


def gather_compose(
    table: torch.Tensor,
    ids: torch.Tensor,
    parts: Parts,
    offsets: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    *,
    mode: str = "sum",
    include_last_offset: bool = True,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Reduce composed vectors over lists of ids: ``y[b] = Σ_j weights[b,j] · ω_h table[row_h(ids[b,j])]``.

    ω is the sum, product or concatenation of the H rows of an id, which are chosen by maps of ids or by stored codes.
    Rows are decoded, combined and added in one pass: neither rows nor vectors are stored.

    Args:
        table: ``(M, C)`` float.
        ids: ``(B, J)`` int32 or int64; ``(L,)`` with ``offsets``; or ``(L,)`` without, each id a bag of its own.
        parts: which rows, and ω; its ``dim`` is D.
        offsets: as for :func:`gossamer.gather_reduce`.
        weights: like ``ids``, float, or None for ones.
        mode: ``"sum"`` or ``"mean"``.
        include_last_offset: as for :func:`gossamer.gather_reduce`.
        out_dtype: of the result; the table's by default.

    Returns:
        ``(B, D)``, accumulated in float32 (float64 for float64); empty bags are zero. Differentiable in ``table`` (rows
        that ids share get the sum of their gradients, in a fixed order) and ``weights``.

    Raises:
        TypeError: an argument is not a tensor, or a dtype is not supported.
        ValueError: ranks, sizes, devices, modes or offsets do not fit; the maps give rows that the table does not have;
            on the CPU, a weight is NaN.
        IndexError: on the CPU, an id outside the maps or codes, or a code outside its part. On CUDA such ids contribute
            nothing.
    """
    check_tensor("table", table)
    backend = _backend.resolve("gather_compose", table)
    check_float("table", table, backend)
    bags = checked_compose(table, ids, parts, offsets, weights, mode, include_last_offset, backend)
    args = GatherCompose(table, bags, parts, checked_out_dtype(out_dtype, table, backend))
    if backend == "reference":
        check_values(bags, parts)
        return gather_compose_reference(args)
    return _gather_compose(args, backend)
