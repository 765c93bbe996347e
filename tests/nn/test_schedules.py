"""Schedules: pure functions of the step, and how block moves follow one of a user's own."""

import copy

import pytest
import torch
from contracts import ScheduleContract

from gossamer.nn import BlockSparseLinear, ConstantSchedule, CosineSchedule, PruneAndRegrow, Schedule

TestSchedules = ScheduleContract.over(
    constant=lambda: ConstantSchedule(0.25), cosine=lambda: CosineSchedule(0.9, 0.1, until=40)
)


def test_cosine():
    schedule = CosineSchedule(0.5, 0.1, until=100)
    assert [round(schedule.density(t), 12) for t in (0, 50, 100, 1000)] == [0.5, 0.3, 0.1, 0.1]
    assert schedule == copy.deepcopy(schedule)


class Late(Schedule):
    """Nothing moves before step 10, and a half of the blocks from there on."""

    def density(self, step):
        return 0.5 if step >= 10 else 0.0


def test_moves_follow_a_schedule(device):
    layer = BlockSparseLinear(128, 128, density=0.25, block=16, device=device)
    moves = PruneAndRegrow(
        layer, torch.optim.SGD(layer.parameters(), lr=0.0), rule="set", every=5, until=100, anneal=Late()
    )
    changed = []
    for _ in range(10):
        before = layer.block_mask.clone()
        moves.step()
        changed.append(int((before != layer.block_mask).sum()))
    assert not any(changed[:9]) and changed[9] > 0
    assert moves.fraction_at(10) == 0.5


class Wrong(Schedule):
    def density(self, step):
        return 2.0


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ConstantSchedule(1.5), ValueError, "value must be from 0 to 1, got 1.5"),
        (lambda: ConstantSchedule("1"), TypeError, "value must be a number, got str"),
        (lambda: CosineSchedule(0.5, -1, 10), ValueError, "last must be from 0 to 1, got -1"),
        (lambda: CosineSchedule(0.5, 0.1, 0), ValueError, "until must be at least 1, got 0"),
        (lambda: Schedule().density(0), NotImplementedError, r"Schedule must define density\(step\)"),
        (lambda: moves(Wrong()).fraction_at(3), ValueError, "anneal must give shares from 0 to 1, got 2.0 at step 3"),
        (lambda: moves(Late(), fraction=0.5), ValueError, "fraction and final_fraction must be None beside a Schedule"),
        (lambda: moves(0.5), TypeError, "anneal must be a str or a gossamer.nn.Schedule, got float"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def moves(anneal, **options):
    layer = BlockSparseLinear(32, 32, density=0.5, block=16)
    return PruneAndRegrow(layer, torch.optim.SGD(layer.parameters(), lr=0.0), until=9, anneal=anneal, **options)
