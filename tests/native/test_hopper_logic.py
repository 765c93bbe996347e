"""The parts of Hopper kernels that also compile for the host: shared-memory layouts, tile order, stages, activations.

Models written from the documentation stand in for the hardware: where the copy engine writes a box, what a wgmma
descriptor addresses, when a wait on an mbarrier returns.
"""

import itertools
import random

import numpy as np
import pytest
import torch

import gossamer
from gossamer import _backend
from gossamer._activation import ACTIVATIONS, activate_reference
from gossamer.testing import assert_close

if reason := _backend.native_unavailable():
    pytest.skip(reason, allow_module_level=True)

from gossamer import _C

logic = _C.hopper_logic
PANEL, ROW_BYTES = 64, 128


def swizzled(address):
    """The 128-byte swizzle: bits 4 to 6 of an address, xor bits 7 to 9."""
    return address ^ ((address >> 7 & 7) << 4)


def place_panels(memory, base, matrix):
    """Boxes of 64 rows by 64 columns of 16-bit ``matrix``, one after the other, as the copy engine writes them."""
    rows, columns = matrix.shape
    for box, (r0, c0) in enumerate(itertools.product(range(0, rows, PANEL), range(0, columns, PANEL))):
        for r, c in itertools.product(range(PANEL), range(PANEL)):
            address = base + box * PANEL * ROW_BYTES + r * ROW_BYTES + 2 * c
            memory[swizzled(address) // 2] = matrix[r0 + r, c0 + c]


def operand(memory, descriptor, k_contiguous, size):
    """``[size, 16]`` of an operand that one wgmma reads by its descriptor."""
    start, leading, stride = ((descriptor >> bit & 0x3FFF) << 4 for bit in (0, 16, 32))
    assert descriptor >> 62 == 1, "128-byte swizzle"
    assert descriptor >> 49 & 7 == 0, "base offset"
    out = np.zeros((size, 16), memory.dtype)
    for i, k in itertools.product(range(size), range(16)):
        if k_contiguous:
            address = start + i // 8 * stride + i % 8 * ROW_BYTES + 2 * k
        else:
            address = start + i // 64 * leading + i % 64 * 2 + k // 8 * stride + k % 8 * ROW_BYTES
        out[i, k] = memory[swizzled(address) // 2]
    return out


@pytest.mark.parametrize("k_contiguous", [True, False])
@pytest.mark.parametrize("size", [64, 128, 192, 256])
def test_descriptors_read_what_the_copy_engine_wrote(k_contiguous, size):
    """Descriptors read each K step of an operand as that part of its tile, also by blocks of 64 rows, as for A."""
    assert (logic.PANEL, logic.PANEL_BYTES) == (PANEL, PANEL * ROW_BYTES)
    tile = np.arange(size * PANEL, dtype=np.uint16).reshape(size, PANEL)
    base = 3 * 1024
    memory = np.full(2**17, 0xFFFF, np.uint16)
    if k_contiguous:
        place_panels(memory, base, tile)
    else:
        # 64 rows of K by `size` columns: boxes go along the columns.
        place_panels(memory, base, tile.T)
    descriptor = logic.operand_descriptor(base, k_contiguous)
    for step in range(PANEL // 16):
        at = descriptor + step * logic.descriptor_step(k_contiguous)
        part = tile[:, 16 * step : 16 * step + 16]
        assert np.array_equal(operand(memory, at, k_contiguous, size), part)
        for block in range(size // 64):
            mine = operand(memory, at + block * (logic.PANEL_BYTES >> 4), k_contiguous, 64)
            assert np.array_equal(mine, part[64 * block : 64 * block + 64])


def test_descriptors_reach_all_of_shared_memory():
    """Every shared-memory address of a block fits its field, and adding K steps does not carry into the next field."""
    for address in range(0, 232448, 1024):
        descriptor = logic.operand_descriptor(address, True)
        assert (descriptor & 0x3FFF) << 4 == address
        last = descriptor + 3 * logic.descriptor_step(True)
        assert last >> 14 == descriptor >> 14


def test_chunk_copies_lie_as_boxes_do():
    """128 threads that copy chunk t % 8 of rows t // 8, t // 8 + 16, ... write the same bytes as the copy engine."""
    tile = np.arange(2 * PANEL * PANEL, dtype=np.uint16).reshape(2 * PANEL, PANEL)
    by_box, by_chunk = np.zeros((2, 2**14), np.uint16)
    place_panels(by_box, 0, tile)
    for thread, i in itertools.product(range(128), range(8)):
        row, chunk = thread // 8, thread % 8
        at = (logic.panel_offset(row, chunk) + i * 16 * ROW_BYTES) // 2
        by_chunk[at : at + 8] = tile[row + 16 * i, 8 * chunk : 8 * chunk + 8]
    assert np.array_equal(by_box, by_chunk)


def test_staged_accumulators_come_out_by_rows():
    """Lanes write fragments as wgmma leaves them and read eight columns of a row; each access uses all banks."""
    memory = np.full(16 * 32, -1)
    values = np.arange(16 * 32).reshape(16, 32)
    for j, half in itertools.product(range(4), range(2)):
        for lanes in (range(16), range(16, 32)):
            banks = []
            for lane in lanes:
                row, column = lane // 4 + 8 * half, 8 * j + lane % 4 * 2
                at = (logic.staging_offset(row, column // 4) + column % 4 * 4) // 4
                memory[at : at + 2] = values[row, column : column + 2]
                banks += [at % 32, (at + 1) % 32]
            assert len(set(banks)) == 32
    seen = np.zeros_like(values)
    for half, unit in itertools.product(range(2), range(2)):
        for first in range(0, 32, 8):
            banks = []
            for lane in range(first, first + 8):
                row, eighth = logic.staging_row(lane) + 8 * half, lane % 4
                at = logic.staging_offset(row, 2 * eighth + unit) // 4
                columns = slice(8 * eighth + 4 * unit, 8 * eighth + 4 * unit + 4)
                assert np.array_equal(memory[at : at + 4], values[row, columns])
                seen[row, columns] += 1
                banks += [(at + i) % 32 for i in range(4)]
            assert len(set(banks)) == 32
    assert (seen == 1).all()


def all_row_tiles(offsets, block_rows, num_columns):
    """The tiles in order: by expert, then by eight row tiles, then by column tile."""
    found = []
    for expert, (start, end) in enumerate(itertools.pairwise(offsets)):
        count = -(-(end - start) // block_rows)
        for first in range(0, count, 8):
            for column in range(num_columns):
                for row in range(first, min(first + 8, count)):
                    found.append((expert, start + row * block_rows, end, row, column))
    return found


def ragged_offsets(num_experts, generator):
    """Groups of which many are empty and a few long."""
    sizes = [generator.choice([0, 0, 1, 63, 64, 65, 128, 700, 3000]) for _ in range(num_experts)]
    return [0, *itertools.accumulate(sizes)]


@pytest.mark.parametrize("num_experts", [1, 5, 31, 32, 33, 64, 70, 200])
def test_row_tiles_are_each_found_once_in_order(num_experts):
    """Any number of blocks divide the tiles of a plain loop, for any groups, also for more than a warp's 32 experts."""
    generator = random.Random(num_experts)
    cases = [ragged_offsets(num_experts, generator) for _ in range(6)]
    cases += [[0] * (num_experts + 1), [0] * num_experts + [257], [0] + [1000] * num_experts]
    for offsets in cases:
        for block_rows, num_columns in ((128, 1), (128, 5), (64, 3)):
            expected = all_row_tiles(offsets, block_rows, num_columns)
            for blocks in (1, 3, 132):
                for block in range(blocks):
                    tiles = logic.row_tiles(offsets, block_rows, num_columns, block, blocks)
                    assert tiles == expected[block::blocks]


def test_row_tiles_near_the_largest_row_count():
    """Rows and tiles beyond 32 bits are counted right."""
    most, columns = 2**31 - 1, 1000
    offsets = [0, most - 200, most]
    tiles = -(-offsets[1] // 128) * columns

    def one(index):
        return logic.row_tiles(offsets, 128, columns, index, 2**62)

    row_tile = 9_000_000_000 // (8 * columns) * 8 + 9_000_000_000 % 8
    column = 9_000_000_000 % (8 * columns) // 8
    assert one(9_000_000_000) == [(0, 128 * row_tile, offsets[1], row_tile, column)]
    assert one(tiles + 2 * columns - 1) == [(1, offsets[1] + 128, most, 1, columns - 1)]
    assert one(tiles + 2 * columns) == []


def test_weight_tiles_are_each_found_once_in_order():
    """The tiles of each expert, empty ones included, eight row tiles by all columns at a time."""
    offsets = [0, 5, 5, 300]
    for rows, columns in ((1, 1), (3, 2), (8, 4), (19, 3)):
        order = [
            (row, column)
            for first in range(0, rows, 8)
            for column in range(columns)
            for row in range(first, min(first + 8, rows))
        ]
        expected = [(e, offsets[e], offsets[e + 1], *place) for e in range(3) for place in order]
        for blocks in (1, 4, 132):
            for block in range(blocks):
                assert logic.weight_tiles(offsets, rows, columns, block, blocks) == expected[block::blocks]


@pytest.mark.parametrize("seed", range(8))
def test_tiles_stay_inside_the_rows_whatever_offsets_hold(seed):
    """Every tile begins at an existing row, and its group ends at or before the last row."""
    generator, num_rows, experts = random.Random(seed), 300, 40
    numbers = [-(2**31), -1, 0, 5, 299, 300, 301, 2**31 - 1]
    offsets = [generator.choice(numbers) for _ in range(experts + 1)]
    for expert, row, row_end, _, _ in logic.row_tiles(offsets, 64, 3, 0, 1, num_rows=num_rows):
        assert 0 <= expert < experts and 0 <= row < row_end <= num_rows
    tiles = logic.weight_tiles(offsets, 2, 2, 0, 1, num_rows=num_rows)
    assert len(tiles) == 4 * experts
    assert all(0 <= row <= row_end <= num_rows for _, row, row_end, _, _ in tiles)


class Barrier:
    """An mbarrier: a wait for a parity returns once the phase before the current one has that parity."""

    def __init__(self, arrivals):
        self.arrivals = self.pending = arrivals
        self.phase = 0

    def arrive(self):
        assert self.pending > 0
        self.pending -= 1
        if self.pending == 0:
            self.phase, self.pending = self.phase + 1, self.arrivals

    def passed(self, parity):
        return self.phase % 2 != parity


class Block:
    """A block of threads: warps are generators that yield the barrier and parity they wait for.

    Each block of a cluster loads its part of a stage into all blocks. Therefore the consumers of every block must free
    a stage before it is loaded again: ``frees_all``.
    """

    def __init__(self, stages, steps, *, ping_pong, chunk_copies, turns=True, blocks=1, frees_all=True):
        self.stages, self.steps, self.ping_pong, self.turns = stages, steps, ping_pong, turns
        self.producers = 4 if chunk_copies else 1
        self.full = [Barrier(1 + blocks + (4 if chunk_copies else 0)) for _ in range(stages)]
        self.empty = [Barrier((4 if ping_pong else 8) * (blocks if frees_all else 1)) for _ in range(stages)]
        self.turn = [Barrier(4) for _ in range(2)]
        self.held = [[None] * (self.producers + blocks) for _ in range(stages)]
        self.read = {}
        self.cluster, self.rank, self.frees_all = [self], 0, frees_all

    def join(self, cluster, rank):
        """Become a block of a cluster."""
        self.cluster, self.rank = cluster, rank

    def produce(self, warp):
        use = 0
        for steps in self.steps:
            for _ in range(steps):
                stage, parity = logic.ring_position(self.stages, use)
                yield self.empty[stage], parity ^ 1
                self.held[stage][warp] = use
                if warp == 0:
                    self.full[stage].arrive()
                    for block in self.cluster:
                        yield None
                        block.held[stage][self.producers + self.rank] = use
                        block.full[stage].arrive()
                if self.producers > 1:
                    yield None
                    self.full[stage].arrive()
                use += 1
        for last in range(use, use + self.stages):
            stage, parity = logic.ring_position(self.stages, last)
            yield self.empty[stage], parity ^ 1

    def consume(self, group, warp):
        first, every = (group, 2) if self.ping_pong else (0, 1)
        turn_parity = 1 if group == 0 else 0
        for tile in range(first, len(self.steps), every):
            use = sum(self.steps[:tile])
            if self.ping_pong and self.turns:
                yield self.turn[group], turn_parity
                turn_parity ^= 1
            previous = None
            for step in range(self.steps[tile]):
                stage, parity = logic.ring_position(self.stages, use + step)
                yield self.full[stage], parity
                self.read.setdefault((group, warp), []).append((use + step, *self.held[stage]))
                yield None
                if previous is not None:
                    yield from self.free(previous)
                previous = stage
            if self.ping_pong:
                self.turn[1 - group].arrive()
            yield None
            if previous is not None:
                yield from self.free(previous)

    def free(self, stage):
        for block in self.cluster if self.frees_all else [self]:
            block.empty[stage].arrive()
            yield None

    def run(self, generator):
        """Step the warps of the cluster in a random order until all have ended; returns whether they did."""
        warps = [block.produce(w) for block in self.cluster for w in range(block.producers)]
        warps += [block.consume(g, w) for block in self.cluster for g in range(2) for w in range(4)]
        waiting = {warp: next(warp, StopIteration) for warp in warps}
        waiting = {warp: at for warp, at in waiting.items() if at is not StopIteration}
        while waiting:
            ready = [w for w, at in waiting.items() if at is None or at[0].passed(at[1])]
            if not ready:
                return False
            warp = generator.choice(ready)
            waiting[warp] = next(warp, StopIteration)
            if waiting[warp] is StopIteration:
                del waiting[warp]
        return True

    def wrong(self):
        """Uses of a stage that did not hold what they should, or that are missing."""
        stale = [read for reads in self.read.values() for read in reads if set(read[1:]) != {read[0]}]
        expected = {}
        for tile, steps in enumerate(self.steps):
            first = sum(self.steps[:tile])
            for group in [tile % 2] if self.ping_pong else [0, 1]:
                for warp in range(4):
                    expected.setdefault((group, warp), []).extend(range(first, first + steps))
        seen = {who: [use for use, *_ in reads] for who, reads in self.read.items()}
        return stale or seen != {who: uses for who, uses in expected.items() if uses}


@pytest.mark.parametrize("chunk_copies", [False, True])
@pytest.mark.parametrize(
    ("stages", "steps", "ping_pong"),
    [
        (4, [5, 5, 5], False),
        (4, [0, 1, 0, 7, 3, 0], False),
        (4, [], False),
        (4, [1] * 9, True),
        (4, [9] * 5, True),
        (6, [3] * 6, True),
        (6, [6], True),
        (6, [13] * 4, True),
    ],
)
def test_every_stage_is_read_as_it_was_filled(stages, steps, ping_pong, chunk_copies):
    """Whatever the order in which warps run, each use of a stage is read once, whole, and all warps end."""
    for seed in range(30):
        block = Block(stages, steps, ping_pong=ping_pong, chunk_copies=chunk_copies)
        assert block.run(random.Random(seed)), "deadlock"
        assert not block.wrong()
        assert all(barrier.pending == barrier.arrivals for barrier in (*block.full, *block.empty))


def pair(stages, steps, **form):
    """Two blocks that load halves for each other."""
    blocks = [Block(stages, steps, blocks=2, **form) for _ in range(2)]
    for rank, block in enumerate(blocks):
        block.join(blocks, rank)
    return blocks


@pytest.mark.parametrize(
    ("stages", "steps", "ping_pong", "chunk_copies"),
    [(4, [5, 5, 5], False, False), (4, [9] * 3, False, True), (4, [1] * 9, False, True), (6, [3] * 6, True, True)],
)
def test_blocks_that_load_for_each_other(stages, steps, ping_pong, chunk_copies):
    """Both read each use once, whole, with their own half and the other's, and end."""
    for seed in range(30):
        blocks = pair(stages, steps, ping_pong=ping_pong, chunk_copies=chunk_copies)
        assert blocks[0].run(random.Random(seed)), "deadlock"
        for block in blocks:
            assert not block.wrong()
            assert all(barrier.pending == barrier.arrivals for barrier in (*block.full, *block.empty))


def test_a_stage_must_be_free_in_both_blocks():
    """A block that waits only for its own readers overwrites what the other has not read; the model detects it."""

    def fails(seed):
        blocks = pair(4, [9] * 4, ping_pong=False, chunk_copies=True, frees_all=False)
        try:
            return not blocks[0].run(random.Random(seed)) or any(block.wrong() for block in blocks)
        except AssertionError:  # an arrival too many
            return True

    assert any(fails(seed) for seed in range(20))


def test_turns_are_needed():
    """Without turns, a warpgroup two phases early mistakes an old phase for its own; the model detects it."""
    blocks = [Block(4, [9] * 4, ping_pong=True, chunk_copies=False, turns=False) for _ in range(20)]
    assert any(not block.run(random.Random(seed)) or block.wrong() for seed, block in enumerate(blocks))


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activations(name):
    """Values and both gradients against autograd in float64, at ordinary, large and clamped arguments."""
    form = gossamer.Activation(name, alpha=1.3, limit=0.8)
    gate, up, dact = torch.randn(3, 400) * torch.logspace(-2, 1.5, 400)

    def expected(dtype):
        g, u = gate.to(dtype).requires_grad_(), up.to(dtype).requires_grad_()
        out = activate_reference(torch.cat([g, u]) if form.gated else g, form)
        out.backward(dact.to(dtype))
        return out.detach(), g.grad, u.grad if form.gated else torch.zeros_like(up, dtype=dtype)

    rows = [
        logic.glu_gradient(form.gate, form.gated, form.alpha, form.limit, *v)
        for v in torch.stack([dact, gate, up], 1).tolist()
    ]
    value, act, dgate, dup = torch.tensor(rows).unbind(1)
    assert torch.equal(value, act)
    for actual, truth, plain in zip((value, dgate, dup), expected(torch.float64), expected(torch.float32), strict=True):
        assert_close(actual, truth, plain, name)
