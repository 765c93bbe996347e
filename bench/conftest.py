"""``pytest bench/ --benchmark-only``: each family's variants on a small shape, through pytest-benchmark."""

from __future__ import annotations

import time

import pytest
import torch

from gossamer.bench.case import DENSE, OURS, Request
from gossamer.bench.harness import judge, resolve_device

SMALL = {
    ("T", "H", "I", "E", "K"): (256, 256, 128, 8, 2),
    ("T", "E", "K"): (1024, 32, 4),
    ("N", "D", "B", "J"): (10_000, 64, 512, 20),
}


def synchronised_clock() -> float:
    """Wall-clock seconds, after the work queued on the GPU, if there is one, is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def pytest_generate_tests(metafunc):
    """One test for each dtype, direction and role of the module's family."""
    if "measured" not in metafunc.fixturenames:
        return
    family = metafunc.module.FAMILY
    dtypes = [d for d in ("fp32", "bf16", "int") if d in family.dtypes]
    cases = [(family, d, way, role) for d in dtypes for way in family.directions for role in (OURS, DENSE)]
    metafunc.parametrize("measured", cases, indirect=True, ids=["-".join(case[1:]) for case in cases])


def pytest_collection_modifyitems(items):
    """Time with the GPU's queue drained."""
    for item in items:
        if "measured" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=synchronised_clock))


@pytest.fixture
def measured(request, benchmark):
    """Check one variant of one case, then time it."""
    family, dtype, direction, role = request.param
    sizes = SMALL[family.symbols]
    shape = ",".join(map(str, sizes))
    wanted = Request(shape, family.sizes(shape), dtype, resolve_device("auto"), direction, "uniform")
    case = family.build(wanted)
    variant = next(v for v in case.variants if v.role == role)

    def measure() -> None:
        verdict = judge(case, variant, {})
        if verdict is not None and verdict.failures:
            pytest.fail("; ".join(verdict.failures))
        benchmark.group = case.title
        benchmark.extra_info.update(flops=case.flops, bytes=case.bytes, device=str(case.device))
        benchmark(variant.call, direction)

    return measure
