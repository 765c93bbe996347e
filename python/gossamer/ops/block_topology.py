"""The positions of a block-sparse matrix's blocks, row by row and column by column, on the device."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import ClassVar

import torch
from torch.compiler import is_compiling, is_dynamo_compiling

from gossamer._checks import (
    check_device,
    check_index,
    check_same_device,
    check_shape,
    check_sizes,
    check_strided,
    check_tensor,
)
from gossamer._trusted import (
    check_indices,
    check_offsets,
    check_permutation,
    check_range,
    copy_mark,
    in_inference_mode,
    is_readable,
    mark,
    state_without_mark,
)
from gossamer.ops._expert_topology import expert_places, expert_topology, longest_first, offsets_of
from gossamer.ops.dispatch import Dispatch, check_is_dispatch

BLOCK_SIZES = (16, 32, 64, 128)
MAX_BLOCKS = 2**31 - 1
MAX_PLACES = 2**53


def check_block(block: object) -> tuple[int, int]:
    """``block`` must be two sizes out of :data:`BLOCK_SIZES`, or one for both; returns ``(bm, bn)``."""
    pair = (block, block) if isinstance(block, int) else block
    if not isinstance(pair, (tuple, list)) or len(pair) != 2 or any(size not in BLOCK_SIZES for size in pair):
        raise ValueError(f"block must be (bm, bn), each one of {BLOCK_SIZES}, got {block!r}")
    return tuple(pair)


def _check_blocked(shape: object, block: tuple[int, int]) -> tuple[int, int]:
    """``shape`` must be in whole blocks; returns the number of block rows and block columns."""
    two = isinstance(shape, (tuple, list)) and len(shape) == 2 and all(isinstance(size, int) for size in shape)
    if not two or min(shape) < 0:
        raise ValueError(f"shape must be (rows, cols), two sizes that are not negative, got {shape!r}")
    for name, size, step in zip(("rows", "cols"), shape, block, strict=True):
        if size % step:
            raise ValueError(
                f"shape must be in whole blocks: {name} {size} is not a multiple of {step}; pad it to "
                f"{(size + step - 1) // step * step}"
            )
    grid = shape[0] // block[0], shape[1] // block[1]
    _check_grid("shape", grid)
    return grid


def _check_grid(name: str, grid: tuple[int, int]) -> None:
    """Check that block rows and columns fit int32, and their product float64's integers."""
    if max(grid) > MAX_BLOCKS:
        raise ValueError(f"{name} must have at most {MAX_BLOCKS} block rows and block columns, got {tuple(grid)}")
    if grid[0] * grid[1] >= MAX_PLACES:
        raise ValueError(f"{name} must have fewer than {MAX_PLACES} places for blocks, got {tuple(grid)}")


@dataclass(frozen=True)
class BlockTopology:
    """The positions of the blocks of a matrix, as ints and as device tensors that no product reads on the host.

    Blocks are listed row by row, and within a row by column. A :class:`BlockSparseTensor`'s ``values`` hold them in
    that order; the values of a transposed view are in the order of the original matrix. ``nnz`` may be an upper
    bound: entries of both lists from ``row_offsets[-1]`` on are not blocks. Their row and column are ``rows/bm`` and
    ``cols/bn``, they are not computed, and their values are zero.

    Made by :meth:`from_mask`, :meth:`from_indices`, :meth:`from_dispatch` and :meth:`random`.

    Attributes:
        shape: ``(rows, cols)`` in elements.
        block: ``(bm, bn)``, each 16, 32, 64 or 128.
        row_offsets: ``(rows/bm + 1,)`` int32; the blocks of block row ``r`` are ``row_offsets[r]:row_offsets[r+1]``.
        column_indices: ``(nnz,)`` int32, the block column of each block.
        row_indices: ``(nnz,)`` int32, the block row of each block.
        order: ``(nnz,)`` int32, the position of each block in ``values``; None if that is the order of this list.
        column_offsets: ``(cols/bn + 1,)`` int32, the same for the second list: column by column, and by row within one.
        row_indices_t: ``(nnz,)`` int32, the block row of each block of that list.
        column_indices_t: ``(nnz,)`` int32, the block column of each.
        order_t: like ``order`` for that list.
        row_schedule: ``(rows/bm,)`` int32, block rows from the one with most blocks to the one with fewest.
        column_schedule: ``(cols/bn,)`` int32, block columns likewise.
        padded_offsets: ``(E+1,)`` int32, made by :meth:`from_dispatch`: rows of expert ``e`` begin at element row
            ``padded_offsets[e]``. None for other topologies.
        live_rows: ``(rows/bm,)`` int32, the number of rows of each block row that count, at least one for a row with
            blocks. The other rows, at its end, are padding that products may skip. A product's result in padding is
            either zero or the value of the formula, and its gradient there must be zero. A sum over rows may or may not
            include padding, so padding must be finite, and zero in one of the factors. None if all rows count. See
            ``skip_padding`` of :meth:`from_dispatch`.
        live_columns: the same for block columns, in a transposed view.
    """

    shape: tuple[int, int]
    block: tuple[int, int]
    row_offsets: torch.Tensor
    column_indices: torch.Tensor
    row_indices: torch.Tensor
    order: torch.Tensor | None
    column_offsets: torch.Tensor
    row_indices_t: torch.Tensor
    column_indices_t: torch.Tensor
    order_t: torch.Tensor | None
    row_schedule: torch.Tensor
    column_schedule: torch.Tensor
    padded_offsets: torch.Tensor | None = None
    live_rows: torch.Tensor | None = None
    live_columns: torch.Tensor | None = None

    # Versions of the tensors at the last check, see gossamer._trusted; None before the first check.
    _checked_version: ClassVar[int | None] = None

    def __getstate__(self) -> dict[str, object]:
        return state_without_mark(self)

    @property
    def grid(self) -> tuple[int, int]:
        """Block rows and block columns."""
        return self.shape[0] // self.block[0], self.shape[1] // self.block[1]

    @property
    def nnz_blocks(self) -> int:
        """Number of blocks that ``values`` has room for; an upper bound on the number of blocks."""
        return self.column_indices.shape[0]

    @property
    def density(self) -> float:
        """``nnz_blocks`` over the number of places for blocks; 0 for an empty matrix."""
        places = self.grid[0] * self.grid[1]
        return self.nnz_blocks / places if places else 0.0

    @property
    def device(self) -> torch.device:
        """The device of the tensors."""
        return self.row_offsets.device

    def transposed(self) -> BlockTopology:
        """The topology of the transposed matrix over the same values: the two lists are swapped, and no values move."""
        transposed = BlockTopology(
            (self.shape[1], self.shape[0]),
            (self.block[1], self.block[0]),
            self.column_offsets,
            self.row_indices_t,
            self.column_indices_t,
            self.order_t,
            self.row_offsets,
            self.column_indices,
            self.row_indices,
            self.order,
            self.column_schedule,
            self.row_schedule,
            live_rows=self.live_columns,
            live_columns=self.live_rows,
        )
        copy_mark(self, transposed)
        return transposed

    def to(self, device: torch.device | str) -> BlockTopology:
        """The topology on another device; the same object if it is there already."""
        check_device("device", device)
        if torch.device(device) == self.device:
            return self
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: v.to(device) for k, v in tensors.items() if isinstance(v, torch.Tensor)})

    def to_mask(self) -> torch.Tensor:
        """``(rows/bm, cols/bn)`` bool: where there are blocks."""
        rows, cols = self.grid
        # Entries past the last block go to an extra place, which is cut off.
        flat = self.flat_places()
        mask = torch.zeros(rows * cols + 1, dtype=torch.bool, device=self.device)
        return mask.index_fill(0, flat, True)[: rows * cols].view(rows, cols)

    def flat_places(self) -> torch.Tensor:
        """``(nnz,)`` int64 in this list's order: ``row · cols/bn + column``; ``rows/bm · cols/bn`` for no block."""
        rows, cols = self.grid
        flat = self.row_indices.long() * cols + self.column_indices.long()
        return flat.clamp(max=rows * cols)

    @staticmethod
    def from_mask(mask: torch.Tensor, block: int | tuple[int, int], *, nnz: int | None = None) -> BlockTopology:
        """The topology with a block wherever ``mask`` is True.

        Args:
            mask: ``(rows/bm, cols/bn)`` bool, on the device where the topology is wanted.
            block: ``(bm, bn)``, or one size for both.
            nnz: number of blocks to make room for. None counts them, and the host waits for the device. With a number
                nothing is read on the host; use this for masks that change while a model trains.

        Raises:
            TypeError: ``mask`` is not a bool tensor.
            ValueError: wrong rank or block; ``nnz`` negative, or, on the CPU, less than the number of blocks. On CUDA,
                where checking would stall the stream, blocks beyond ``nnz`` are left out.
        """
        check_shape("mask", mask, (None, None), "(rows/bm, cols/bn)")
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be bool, got {mask.dtype}")
        check_strided("mask", mask)
        block = check_block(block)
        _check_grid("mask", mask.shape)
        if nnz is not None and (not isinstance(nnz, int) or isinstance(nnz, bool)):
            raise TypeError(f"nnz must be an int or None, got {type(nnz).__name__}")
        if nnz is None:
            if mask.is_meta:
                raise ValueError("nnz must be given for a mask on meta, whose blocks cannot be counted")
            nnz = int(mask.sum())
        elif nnz < 0:
            raise ValueError(f"nnz must not be negative, got {nnz}")
        elif mask.device.type == "cpu" and (found := int(mask.sum())) > nnz:
            raise ValueError(f"nnz must be at least the number of blocks in mask, {found}, got {nnz}")
        if nnz > MAX_BLOCKS:
            raise ValueError(f"a topology holds at most {MAX_BLOCKS} blocks, got {nnz}")
        return _from_mask(mask, block, nnz)

    @staticmethod
    def from_indices(
        rows: torch.Tensor,
        cols: torch.Tensor,
        shape: tuple[int, int],
        block: int | tuple[int, int],
        *,
        sort: bool = False,
    ) -> BlockTopology:
        """The topology with a block at each ``(rows[i], cols[i])``, which are read on the host.

        Args:
            rows: ``(nnz,)`` int32 or int64, block rows; the blocks come in row-major order.
            cols: ``(nnz,)`` like ``rows``, block columns.
            shape: ``(rows, cols)`` in elements.
            block: ``(bm, bn)``, or one size for both.
            sort: whether to accept blocks in any order; otherwise a block out of order is an error. A tensor's values
                then follow the topology's order, not that of the arguments.

        Raises:
            TypeError: indices are not int32 or int64 tensors.
            ValueError: shapes, devices, or the first block that is out of range, out of order or there twice.
        """
        check_index("rows", rows)
        check_index("cols", cols)
        check_shape("rows", rows, (None,), "(nnz,)")
        check_shape("cols", cols, (rows.shape[0],), "(nnz,)")
        check_same_device(rows=rows, cols=cols)
        block = check_block(block)
        grid = _check_blocked(shape, block)
        if not isinstance(sort, bool):
            raise TypeError(f"sort must be a bool, got {type(sort).__name__}")
        for name, index, size in (("rows", rows, grid[0]), ("cols", cols, grid[1])):
            outside = (index < 0) | (index >= size)
            if outside.any():
                at = int(outside.nonzero()[0])
                raise ValueError(f"{name} must be block indices in [0, {size}), got {int(index[at])} at entry {at}")
        flat = rows.long() * grid[1] + cols.long()
        flat, source = flat.sort(stable=True) if sort else (flat, None)
        step = flat.diff()
        if (step <= 0).any():
            at = int((step <= 0).nonzero()[0]) + 1
            entry = at if source is None else int(source[at])
            place = f"({int(rows[entry])}, {int(cols[entry])}) at entry {entry}"
            if step[at - 1] == 0:
                raise ValueError(f"blocks must not be given twice, got {place} again")
            raise ValueError(f"blocks must be in row-major order unless sort=True, got {place} after a later block")
        mask = torch.zeros(grid[0] * grid[1], dtype=torch.bool, device=rows.device).index_fill(0, flat, True)
        return _from_mask(mask.view(grid), block, rows.shape[0])

    @staticmethod
    def from_dispatch(
        dispatch: Dispatch, ffn_size: int, block: int | tuple[int, int], *, skip_padding: bool = False
    ) -> BlockTopology:
        """The topology of an expert layer's hidden activation: each row has the I columns of its expert, of E·I.

        The rows of each expert are padded to whole blocks: expert ``e`` has its rows from ``padded_offsets[e]`` on. It
        is computed on the device, and nothing is read on the host: ``rows`` is the maximum for any routing with this
        number of slots. MegaBlocks, Gale et al., arXiv:2211.15841.

        Args:
            dispatch: from :func:`gossamer.dispatch`. Dropped slots get no row.
            ffn_size: I, a multiple of bn.
            block: ``(bm, bn)``, or one size for both.
            skip_padding: whether products may skip padded rows. You must then not read results there, and gradients
                there must be zero. See ``live_rows``.

        Raises:
            TypeError: ``dispatch`` is not a Dispatch, or its offsets are not int32.
            ValueError: wrong block, or ``ffn_size`` is not a positive multiple of bn; on the CPU, offsets that decrease
                or end beyond the slots.
        """
        if in_inference_mode():
            with torch.inference_mode(False):
                return BlockTopology.from_dispatch(dispatch, ffn_size, block, skip_padding=skip_padding)
        check_is_dispatch(dispatch)
        bm, bn = check_block(block)
        check_sizes(ffn_size=ffn_size)
        if not ffn_size or ffn_size % bn:
            raise ValueError(
                f"ffn_size must be a positive multiple of the block's {bn} columns, got {ffn_size}; pad it to "
                f"{max(1, (ffn_size + bn - 1) // bn) * bn}"
            )
        experts, wide = dispatch.num_experts, ffn_size // bn
        # The last block of every expert with rows holds at least one row.
        rows = min(dispatch.buffer_rows, (dispatch.buffer_rows + experts * (bm - 1)) // bm)
        if max(rows * bm, rows * wide) > MAX_BLOCKS:
            raise ValueError(
                f"padded rows and blocks must be at most {MAX_BLOCKS}, got {rows * bm} and {rows * wide} for "
                f"{dispatch.num_rows} slots, {experts} experts and blocks of {bm} x {bn}"
            )
        lists = expert_topology(dispatch.offsets, rows, wide, bm)
        if not skip_padding:
            lists["live_rows"] = None
        return _made(BlockTopology((rows * bm, experts * ffn_size), (bm, bn), order=None, **lists))

    def padded_slots(self, dispatch: Dispatch) -> torch.Tensor:
        """``(rows,)`` int32: the slot ``t·K + k`` of each padded row, R for padding. For gathering tokens.

        ``dispatch`` must be the one that the topology was made from. A ``ValueError`` is raised if the number of
        experts differs, and on the CPU also if an expert has more rows than the topology has room for.
        """
        return self.padded_places(dispatch)[0]

    def padded_rows(self, dispatch: Dispatch) -> torch.Tensor:
        """``(R,)`` int32: the padded row of each slot ``t·K + k``, ``rows`` for a dropped one. For gathering results.

        ``dispatch`` and errors are as for :meth:`padded_slots`.
        """
        return self.padded_places(dispatch)[1]

    def padded_places(self, dispatch: Dispatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Both :meth:`padded_slots` and :meth:`padded_rows`, in one computation."""
        check_is_dispatch(dispatch)
        check_topology(self)
        if self.padded_offsets is None or self.padded_offsets.shape[0] != dispatch.num_experts + 1:
            raise ValueError("the topology must be the one that BlockTopology.from_dispatch made from dispatch")
        check_same_device(dispatch=dispatch.slots, topology=self.padded_offsets)
        return expert_places(dispatch.offsets, self.padded_offsets, dispatch.slots, self.shape[0])

    @staticmethod
    def random(
        shape: tuple[int, int],
        block: int | tuple[int, int],
        density: float,
        *,
        generator: torch.Generator | None = None,
        balanced: bool = False,
        device: torch.device | str = "cpu",
    ) -> BlockTopology:
        """``round(density · places)`` blocks at random.

        Args:
            shape: ``(rows, cols)`` in elements.
            block: ``(bm, bn)``, or one size for both.
            density: share of the places that get a block, from 0 to 1.
            generator: a CPU generator to draw from.
            balanced: whether the numbers of blocks of block rows differ by at most one; otherwise all choices are
                equally likely.
            device: where the topology is wanted. Draws are made on the CPU, so they are the same on every device.

        Raises:
            ValueError: a density outside [0, 1], a wrong block, or a shape that is not in whole blocks.
        """
        block = check_block(block)
        rows, cols = _check_blocked(shape, block)
        if not 0 <= density <= 1:
            raise ValueError(f"density must be from 0 to 1, got {density}")
        check_device("device", device)
        places = rows * cols
        nnz = round(density * places)
        scores = torch.rand(rows, cols, generator=generator, device="cpu", dtype=torch.float32)
        if balanced and places:
            extra = torch.randperm(rows, generator=generator, device="cpu") < nnz % rows
            ranks = scores.argsort(1).argsort(1)
            mask = ranks < (nnz // rows + extra).unsqueeze(1)
        else:
            chosen = scores.view(-1).argsort()[:nnz]
            mask = torch.zeros(places, dtype=torch.bool, device="cpu").index_fill(0, chosen, True).view(rows, cols)
        return _from_mask(mask.to(device), block, nnz)


def _from_mask(mask: torch.Tensor, block: tuple[int, int], nnz: int) -> BlockTopology:
    """The topology of a mask that has at most ``nnz`` blocks, with no host read; those past ``nnz`` are left out."""
    if in_inference_mode():
        with torch.inference_mode(False):
            return _from_mask(mask, block, nnz)
    (rows, cols), device = mask.shape, mask.device
    if mask.is_meta:
        return _sizes_alone((rows, cols), block, nnz)
    position = (mask.reshape(-1).cumsum(0) - 1).view(rows, cols)
    mask = mask & (position < nnz)

    def places(mask: torch.Tensor) -> torch.Tensor:
        flat = mask.reshape(-1)
        # Entries without a block are written past the end, to a place that is cut off.
        at = torch.where(flat, flat.cumsum(0) - 1, nnz)
        empty = torch.full((nnz + 1,), flat.numel(), dtype=torch.int64, device=device)
        return empty.scatter(0, at, torch.arange(flat.numel(), device=device))[:nnz]

    flat, flat_t = places(mask), places(mask.t())
    live = flat < rows * cols
    row_offsets, column_offsets = offsets_of(mask.sum(1)), offsets_of(mask.sum(0))
    own = torch.arange(nnz, device=device)
    if rows * cols == 0:
        row_t = column_t = order_t = own
    else:
        row_t, column_t = flat_t % rows, flat_t // rows
        order_t = torch.where(live, position[row_t.clamp(max=rows - 1), column_t.clamp(max=cols - 1)], own)
    lists = (
        row_offsets,
        torch.where(live, flat % max(cols, 1), cols).int(),
        torch.where(live, flat // max(cols, 1), rows).int(),
        column_offsets,
        torch.where(live, row_t, rows).int(),
        torch.where(live, column_t, cols).int(),
        order_t.int(),
        longest_first(row_offsets),
        longest_first(column_offsets),
    )
    return _made(BlockTopology((rows * block[0], cols * block[1]), block, *lists[:3], None, *lists[3:]))


def _sizes_alone(grid: tuple[int, int], block: tuple[int, int], nnz: int) -> BlockTopology:
    """A topology on meta, made from shapes alone: torch's cumsum on meta computes the square of the length, which can
    overflow.
    """
    rows, cols = grid

    def indices(size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.int32, device="meta")

    blocks = [indices(nnz) for _ in range(5)]
    return _made(
        BlockTopology(
            (rows * block[0], cols * block[1]),
            block,
            indices(rows + 1),
            *blocks[:2],
            None,
            indices(cols + 1),
            *blocks[2:],
            indices(rows),
            indices(cols),
        )
    )


def _tensors(t: BlockTopology) -> tuple[torch.Tensor, ...]:
    """The tensors that native products follow as they are, so that a write to them needs a new check.

    A write to another one cannot make a kernel leave its memory. Native kernels read no schedule, and those of Triton
    clamp its entries. Numbers of live rows or columns out of range mean all. ``expert_places`` compares every entry of
    ``padded_offsets`` with its neighbours and the sizes before it writes.
    """
    order = t.order_t if t.order is None else t.order
    rows, columns = (t.row_offsets, t.column_indices, t.row_indices), (t.column_offsets, t.row_indices_t)
    return *rows, *columns, t.column_indices_t, order


def _check_list(topology: BlockTopology, rows: str, across: str, suffix: str) -> None:
    """Check the list along ``rows``: blocks are in order, and each is in the row whose list contains it."""
    offsets, indices, own = (
        getattr(topology, name) for name in (f"{rows}_offsets", f"{across}_indices{suffix}", f"{rows}_indices{suffix}")
    )
    size = topology.grid[0 if across == "column" else 1], topology.grid[1 if across == "column" else 0]
    check_offsets(f"topology.{rows}_offsets", offsets, indices.shape[0])
    live = int(offsets[-1])
    check_range(f"topology.{across}_indices{suffix}", indices[:live], size[1])
    for name, tensor, none in ((f"{across}_indices", indices, size[1]), (f"{rows}_indices", own, size[0])):
        check_range(f"topology.{name}{suffix}", tensor[live:], none + 1)
    expected = torch.repeat_interleave(torch.arange(size[0], dtype=torch.int32), offsets.diff())
    if (bad := own[:live] != expected).any():
        at = int(bad.nonzero()[0])
        raise ValueError(
            f"topology.{rows}_indices{suffix} must be the {rows} that lists the block, {int(expected[at])} at position "
            f"{at}, got {int(own[at])}"
        )
    step = (own[:live].long() * size[1] + indices[:live]).diff()
    if (step <= 0).any():
        at = int((step <= 0).nonzero()[0]) + 1
        raise ValueError(f"topology.{across}_indices{suffix} must ascend in each list, which ends at position {at}")
    check_permutation(f"topology.{rows}_schedule", getattr(topology, f"{rows}_schedule"))


def _check_contents(topology: BlockTopology) -> None:
    """Check both lists, the order that maps the blocks of one to the other, and the offsets of the experts' rows."""
    if topology.padded_offsets is not None:
        check_offsets("topology.padded_offsets", topology.padded_offsets, topology.shape[0])
    _check_list(topology, "row", "column", "")
    _check_list(topology, "column", "row", "_t")
    live = int(topology.row_offsets[-1])
    name = "order_t" if topology.order is None else "order"
    order = getattr(topology, name)
    check_permutation(f"topology.{name}", order)
    places = [(topology.row_indices, topology.column_indices), (topology.row_indices_t, topology.column_indices_t)]
    (row, column), (row_of, column_of) = places if topology.order is None else places[::-1]
    at = order[:live]
    if (
        int(topology.column_offsets[-1]) != live
        or ((row.index_select(0, at) != row_of[:live]) | (column.index_select(0, at) != column_of[:live])).any()
    ):
        raise ValueError(f"topology.{name} must say where each block of one list is in the other")


def _is_remembered(topology: object) -> bool:
    """Whether it was checked and none of its tensors was written to since; every product calls this."""
    try:
        checked = topology._checked_version
        if checked is None:
            return False
        t, order = topology, topology.order_t if topology.order is None else topology.order
        rows = t.row_offsets._version + t.column_indices._version + t.row_indices._version
        columns = t.column_offsets._version + t.row_indices_t._version + t.column_indices_t._version
        return checked == rows + columns + order._version
    except AttributeError:
        return False  # not a topology


def check_topology(topology: object) -> None:
    """Check that ``topology`` is a :class:`BlockTopology` with valid tensors; on the CPU their values too."""
    if not is_dynamo_compiling() and _is_remembered(topology):
        return
    if not isinstance(topology, BlockTopology):
        raise TypeError(f"topology must be a gossamer.BlockTopology, got {type(topology).__name__}")
    check_block(topology.block)
    rows, cols = _check_blocked(topology.shape, topology.block)
    if (topology.order is None) == (topology.order_t is None):
        raise ValueError("topology must have one of order and order_t, and None for the other")
    check_tensor("topology.row_offsets", topology.row_offsets)
    check_tensor("topology.column_indices", topology.column_indices)
    nnz = topology.column_indices.numel()
    sizes = dict.fromkeys(("column_indices", "row_indices", "row_indices_t", "column_indices_t"), (nnz, "(nnz,)"))
    sizes["order_t" if topology.order is None else "order"] = nnz, "(nnz,)"
    sizes |= {"row_offsets": (rows + 1, "(rows/bm + 1,)"), "column_offsets": (cols + 1, "(cols/bn + 1,)")}
    sizes |= {"row_schedule": (rows, "(rows/bm,)"), "column_schedule": (cols, "(cols/bn,)")}
    for name, size in (("live_rows", rows), ("live_columns", cols)):
        if getattr(topology, name) is not None:
            sizes[name] = size, "as many as block " + name.removeprefix("live_")
    if topology.padded_offsets is not None:
        check_tensor("topology.padded_offsets", topology.padded_offsets)
        sizes["padded_offsets"] = max(2, topology.padded_offsets.numel()), "(E+1,)"
    for name, (size, symbols) in sizes.items():
        tensor, device = getattr(topology, name), topology.row_offsets.device
        check_indices(f"topology.{name}", tensor, size, symbols, "topology.row_offsets", device)
    if all(map(is_readable, (*_tensors(topology), topology.row_schedule, topology.column_schedule))):
        _check_contents(topology)
    mark(topology, _tensors(topology))


def check_parts(topology: object) -> None:
    """Check a topology that was never checked; later changes in place are found by the products."""
    if is_compiling() or not isinstance(topology, BlockTopology) or topology._checked_version is None:
        check_topology(topology)


def _made(topology: BlockTopology) -> BlockTopology:
    """Make a topology whose contents need no check."""
    mark(topology, _tensors(topology))
    return topology


def check_whole_blocks(name: str, size: int, wanted: int, block: int) -> None:
    """Check that a blocked dimension of a dense operand has the topology's size."""
    if size == wanted:
        return
    hint = f": pad it with zeros to {wanted}" if wanted - block < size < wanted else ""
    raise ValueError(f"{name} must be {wanted}, as the topology says, got {size}{hint}")
