"""``pytest bench/ --benchmark-only``: each family's variants on a small shape, through pytest-benchmark.

Its samples come from :mod:`gossamer.bench.harness.timing`, so on CUDA they are device time over a flushed L2 cache;
storage, comparison, limits and histograms are pytest-benchmark's own.
"""

from __future__ import annotations

import pytest

from gossamer.bench.harness.case import DENSE, OURS, Request
from gossamer.bench.harness.runner import grad_mode, judge_fairly, resolve_device
from gossamer.bench.harness.timing import SETTLE_LIMIT, MeasuredTime, clock, keep_freed_memory, settle

SMALL = {
    ("M", "N", "C", "r"): (256, 256, 256, 16),
    ("T", "H", "I", "E", "K"): (256, 256, 128, 8, 2),
    ("T", "E", "K"): (1024, 32, 4),
    ("T", "I", "E", "K"): (256, 128, 8, 2),
    ("N", "D", "B", "J"): (10_000, 64, 512, 20),
    ("M", "N", "C", "r", "A"): (128, 256, 256, 8, 8),
    ("T", "H", "I", "E", "K", "r"): (256, 256, 128, 8, 2, 8),
    ("M", "N", "K", "BLOCK", "SPARSE"): (256, 256, 256, 32, 75),
    ("N", "D", "B", "J", "T"): (10_000, 64, 512, 20, 1),
    ("N", "D", "B", "L"): (10_000, 16, 4096, 75),
    ("R", "I"): (1024, 128),
    ("T", "D", "N", "h", "K"): (64, 32, 1024, 2, 4),
    ("T", "H", "W", "E", "K"): (256, 128, 64, 8, 2),
    ("B", "T", "C", "W"): (2, 256, 128, 4),
    ("B", "T", "HK", "H", "D", "G", "N"): (1, 192, 1, 2, 32, 1, 1),
}
TIMER = MeasuredTime()


def pytest_generate_tests(metafunc):
    """One test for each dtype, direction and role of the module's family."""
    if "measured" not in metafunc.fixturenames:
        return
    family = metafunc.module.FAMILY
    dtypes = [d for d in ("fp32", "bf16", "int") if d in family.dtypes]
    cases = [(family, d, way, role) for d in dtypes for way in family.directions for role in (OURS, DENSE)]
    metafunc.parametrize("measured", cases, indirect=True, ids=["-".join(case[1:]) for case in cases])


def pytest_collection_modifyitems(items):
    """Make pytest-benchmark count the time of the samples."""
    for item in items:
        if "measured" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=TIMER))


@pytest.fixture
def measured(request, benchmark):
    """Check one variant of one case, then time it."""
    family, dtype, direction, role = request.param
    sizes = SMALL[family.symbols]
    shape = ",".join(map(str, sizes))
    wanted = Request(shape, family.sizes(shape), dtype, resolve_device("auto"), direction, "uniform", ())
    keep_freed_memory(wanted.device)
    case = family.build(wanted)
    variant = next(v for v in case.variants if v.role == role)

    def measure() -> None:
        verdict = judge_fairly(case, variant, {}, family, wanted)
        if verdict is not None and verdict.failures:
            pytest.fail("; ".join(verdict.failures))
        with grad_mode(direction):
            timed = clock(case.device).prepare(variant.bare(direction))
            settle(timed.sample, SETTLE_LIMIT[case.device.type])
            benchmark.group = case.title
            benchmark.extra_info.update(
                flops=case.flops,
                bytes=case.bytes,
                device=str(case.device),
                timed_by=timed.method,
                host_seconds=timed.host,
            )
            benchmark(TIMER.through(timed.sample))

    return measure
