"""The split of products with few rows or quantised weights, as a pure function of problem and device."""

from __future__ import annotations

from dataclasses import dataclass

from gossamer.triton_kernels.tiles import ITEM_BYTES, Tile, choose_block_m, shared_limit

MOST_SPLITS = 16
# Fewest steps of a part: with fewer, filling the pipeline costs more than additional multiprocessors gain.
LEAST_STEPS = 4
# Mean rows per expert up to which reading the weights from memory limits the speed.
DECODE_ROWS = 64


@dataclass(frozen=True)
class SplitTile:
    """A tile, and the number of parts that the summed dimension is cut into; their sums are added in order."""

    tile: Tile
    splits: int


def choose_split(
    precision: str, bits: int, num_rows: int, experts: int, n: int, c: int, arch: int, multiprocessors: int
) -> SplitTile:
    """The cut of a product of ``num_rows`` rows with ``experts`` weights ``(n, c)``.

    There should be two programs per multiprocessor, counting one for each output tile of the experts that can have
    rows. If there are fewer, the summed dimension is cut.

    Args:
        precision: precision of the products, a key of :data:`gossamer.triton_kernels.tiles.ITEM_BYTES`.
        bits: bits per stored weight; 4 or 8 for quantised ones.
        num_rows: R, live and dropped.
        experts: E.
        n: output columns.
        c: summed columns.
        arch: compute capability, ``10·major + minor``.
        multiprocessors: number of multiprocessors of the device.
    """
    block_m = choose_block_m(num_rows / experts)
    tile = _tile(precision, bits, block_m, arch)
    touched = max(1, min(num_rows, experts))
    programs = touched * max(1, -(-num_rows // (touched * block_m))) * -(-n // tile.block_n)
    steps = -(-c // tile.block_k)
    wanted = -(-2 * multiprocessors // programs)
    return SplitTile(tile, max(1, min(wanted, steps // LEAST_STEPS, MOST_SPLITS)))


def decodes(num_rows: int, experts: int) -> bool:
    """Whether experts have so few rows that reading weights limits the speed, so that splitting pays."""
    return num_rows <= DECODE_ROWS * min(experts, max(1, num_rows))


def _tile(precision: str, bits: int, block_m: int, arch: int) -> Tile:
    if ITEM_BYTES[precision] == 4:
        # With four warps, decoding 64 x 64 would spill.
        return Tile(min(block_m, 64), 64, 32, 8 if block_m >= 64 and bits < 16 else 4, 2)
    if block_m < 128:
        # 4-bit rows of 64 columns are one sector of memory.
        return Tile(block_m, 64, 64 if bits == 16 else 128, 4, 4 if shared_limit(arch) > 128 * 1024 else 3)
    # Decoding takes registers in addition to the accumulators, and without wgmma so do the operands.
    return Tile(128, 128 if arch in (90, 100) else 64, 64, 8, 3)
