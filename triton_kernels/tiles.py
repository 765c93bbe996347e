"""The choice of a launch's tile, a pure function of the problem, the architecture and a table of measured tiles.

With no table, or no entry for the problem, a heuristic from the problem's shape and the architecture chooses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

# Accumulated columns of the up-projection per stored column: gate and up, or one if ungated.
ACTIVATION_FORMS = ("gated", "interleaved", "ungated")
FORMS = {
    "grouped_matmul": ("gathered", "sorted"),
    "expert_mlp_up": ACTIVATION_FORMS,
    "expert_mlp_down_backward": ACTIVATION_FORMS,
    "grouped_matmul_dweight": ("gathered", "padded"),
}
ITEM_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "tf32": 4}

# Bytes of shared memory of a program, by architecture; unlisted cards have at least the smallest of these.
SHARED_BYTES = {80: 163 * 1024, 87: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 103: 227 * 1024}
LEAST_SHARED_BYTES = 99 * 1024
# Most accumulators per thread: addresses and operands take as many registers again, so more would spill.
MOST_ACCUMULATORS = 128


@dataclass(frozen=True)
class Tile:
    """One launch shape: block sizes, warps, pipeline stages, and whether programs loop over tiles.

    ``block_n`` counts output columns of one accumulator; ``group_m`` row tiles share their weight tiles in L2.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8
    persistent: bool = False

    def options(self) -> dict[str, int]:
        """The launch options that are not kernel arguments."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}

    def constants(self) -> dict[str, int | bool]:
        """The compile-time arguments that every tiled kernel takes."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "GROUP_M": self.group_m,
            "FLATTEN": self.persistent,
        }

    def __str__(self) -> str:
        """The tile in words, such as ``128x256x64, 8 warps, 4 stages, persistent``."""
        words = [
            f"{self.block_m}x{self.block_n}x{self.block_k}",
            f"{self.num_warps} warps",
            f"{self.num_stages} stages",
        ]
        words += [f"groups of {self.group_m}"] if self.group_m != 8 else []
        return ", ".join(words + (["persistent"] if self.persistent else []))


@dataclass(frozen=True)
class Problem:
    """A problem that a tile is chosen for.

    Attributes:
        kernel: a key of :data:`FORMS`.
        form: one of the kernel's forms.
        precision: precision of products of operands: ``"bf16"``, ``"fp16"``, ``"fp32"`` or ``"tf32"``.
        mean_rows: rows over experts, live and dropped.
        experts: E.
        n: output columns; for a weight gradient, columns of the gathered operand.
        c: summed columns; for a weight gradient, columns of the operand in sorted order.
    """

    kernel: str
    form: str
    precision: str
    mean_rows: float
    experts: int
    n: int
    c: int

    @property
    def key(self) -> tuple[str, str, str, int, int, int, int]:
        """The key shared by problems that use the same table entry."""
        return self.kernel, self.form, self.precision, row_bucket(self.mean_rows), self.experts, self.n, self.c

    @property
    def halves(self) -> int:
        """Accumulator columns per column of ``n``."""
        return 2 if self.kernel == "expert_mlp_up" and self.form != "ungated" else 1


def row_bucket(mean_rows: float) -> int:
    """``mean_rows`` rounded up to a power of two, at least 16, so that it seldom changes with T."""
    bucket = 16
    while bucket < mean_rows:
        bucket *= 2
    return bucket


def choose_block_m(mean_rows: float) -> int:
    """Rows of a tile for the mean rows of an expert; smaller tiles waste less if experts have few rows."""
    return 16 if mean_rows <= 16 else 32 if mean_rows <= 32 else 64 if mean_rows <= 96 else 128


def _grouped_matmul(problem: Problem, arch: int) -> Tile:
    block_m = choose_block_m(problem.mean_rows)
    if ITEM_BYTES[problem.precision] == 4:
        return Tile(min(block_m, 64), 64, 16, 4, 3)
    if block_m < 128:
        return Tile(block_m, 128, 64, 4, 4 if arch >= 90 else 3)
    if arch >= 90 and problem.n > 128:
        return Tile(128, 256, 64, 8, 4, persistent=arch < 100)
    return Tile(128, 128, 64, 8, 3)


def _up(problem: Problem, arch: int) -> Tile:
    block_m, halves = choose_block_m(problem.mean_rows), problem.halves
    if ITEM_BYTES[problem.precision] == 4:
        return Tile(min(block_m, 64), 64 // halves, 16, 4, 3)
    if block_m < 128:
        return Tile(block_m, 128 // halves, 64, 4, 4 if arch >= 90 else 3)
    if arch >= 90:
        return Tile(128, 256 // halves, 64, 8, 4, persistent=arch < 100)
    return Tile(128, 128 // halves, 64, 8, 3)


def _down_backward(problem: Problem, arch: int) -> Tile:
    block_m = choose_block_m(problem.mean_rows)
    if ITEM_BYTES[problem.precision] == 4:
        return Tile(min(block_m, 32), 64, 16, 4, 3)
    if block_m < 128:
        return Tile(block_m, 128, 64, 4, 3)
    # Separating interleaved pairs takes registers, and a wide tile would spill.
    return Tile(128, 256 if 90 <= arch < 100 and problem.form != "interleaved" else 128, 64, 8, 3)


def _dweight(problem: Problem, arch: int) -> Tile:
    if ITEM_BYTES[problem.precision] == 4:
        return Tile(64, 64, 32, 4, 3)
    if arch >= 90:
        # Row indices are loaded in the loop ahead of the rows and take half of the pipeline stages.
        return Tile(128, 256, 64, 8, 3 if problem.form == "padded" else 6)
    return Tile(128, 128, 64, 8, 3)


_HEURISTICS: dict[str, Callable[[Problem, int], Tile]] = {
    "grouped_matmul": _grouped_matmul,
    "expert_mlp_up": _up,
    "expert_mlp_down_backward": _down_backward,
    "grouped_matmul_dweight": _dweight,
}


def choose(problem: Problem, arch: int, table: Mapping[tuple, Tile] | None = None) -> Tile:
    """The tile of a launch.

    Args:
        problem: the problem to launch.
        arch: compute capability of the device, ``10·major + minor``.
        table: :attr:`Problem.key` -> tile, measured on this device. An entry takes precedence over the heuristic.
    """
    if table and (tile := table.get(problem.key)):
        return tile
    tile = _HEURISTICS[problem.kernel](problem, arch)
    if shared_bytes(problem, tile) > shared_limit(arch):
        # Architectures above sm_90 may have less: consumer cards have the shared memory of sm_89.
        return _HEURISTICS[problem.kernel](problem, 80)
    return tile


def with_update(problem: Problem, tile: Tile, arch: int) -> Tile:
    """The tile if accumulators start from an update of the weight, which is a product of its own.

    On sm_100 its sums take as much tensor memory as the accumulators; elsewhere a wide ungated epilogue spills. So does
    a product in float32 of gate and up, whose operands are all in registers.
    """
    columns = tile.block_n * problem.halves
    wide = tile.block_m * columns // (32 * tile.num_warps) >= MOST_ACCUMULATORS
    spills = wide and (arch >= 100 or problem.form == "ungated")
    spills |= problem.halves == 2 and ITEM_BYTES[problem.precision] == 4 and arch >= 90
    return replace(tile, block_n=tile.block_n // 2) if spills else tile


def shared_limit(arch: int) -> int:
    """Bytes of shared memory that one program may have on an architecture."""
    return SHARED_BYTES.get(arch, LEAST_SHARED_BYTES)


def shared_bytes(problem: Problem, tile: Tile) -> int:
    """Shared memory of the operands' pipeline stages, without that of the epilogue."""
    # Indirect loads in the loop halve the stages, since indices are loaded before rows.
    stages = (tile.num_stages + 1) // 2 if problem.form == "gathered" and _gathers_in_loop(problem) else tile.num_stages
    return stages * (tile.block_m + tile.block_n * problem.halves) * tile.block_k * ITEM_BYTES[problem.precision]


def _gathers_in_loop(problem: Problem) -> bool:
    return problem.kernel == "grouped_matmul_dweight"


def _power_of_two(value: int, low: int, high: int) -> bool:
    return low <= value <= high and value & (value - 1) == 0


def fault(problem: Problem, tile: Tile, shared: int) -> str | None:
    """The reason why ``tile`` cannot serve ``problem`` with ``shared`` bytes per program, or None if it can."""
    sizes = {"block_m": (16, 256), "block_n": (16, 256), "block_k": (16, 128), "num_warps": (1, 16), "group_m": (1, 64)}
    for name, (low, high) in sizes.items():
        if not _power_of_two(getattr(tile, name), low, high):
            return f"{name} must be a power of two from {low} to {high}, got {getattr(tile, name)}"
    if not 1 <= tile.num_stages <= 8:
        return f"num_stages must be from 1 to 8, got {tile.num_stages}"
    columns = tile.block_n * problem.halves
    if columns > 256:
        return f"block_n {tile.block_n} makes accumulators of {columns} columns, more than 256"
    accumulators = tile.block_m * columns // (32 * tile.num_warps)
    if accumulators > MOST_ACCUMULATORS:
        return f"{accumulators} accumulators a thread are more than {MOST_ACCUMULATORS}"
    if (needed := shared_bytes(problem, tile)) > shared:
        return f"{needed} bytes of shared memory are more than {shared}"
    return None
