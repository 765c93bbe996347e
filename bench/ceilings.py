"""What the machine can do, measured in the same run: a large matrix product in each dtype, a copy, and a read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from gossamer.bench.case import DTYPES, Case
from gossamer.bench.timing import SETTLE_LIMIT, clock, settle

GEMM_SIZE = {"cuda": 8192, "cpu": 2048}
COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 28}
SAMPLES = {"cuda": 20, "cpu": 7}


@dataclass(frozen=True)
class Ceilings:
    """Rates of the fastest of several samples.

    Attributes:
        gemm: dtype -> FLOP/s of a square product, the weight stored either way.
        copy: bytes per second, read and written.
        read: bytes per second of a sum over all threads, on the CPU; None elsewhere.
    """

    gemm: dict[str, float]
    copy: float
    read: float | None = None

    @property
    def bandwidth(self) -> float:
        """The larger of copy and read: a copy on the CPU may first read what it overwrites."""
        return max(self.copy, self.read or 0.0)

    def floor_seconds(self, case: Case) -> float:
        """The least time the case could take: its FLOPs at the product's rate, or its bytes at the bandwidth."""
        compute = case.flops / self.gemm[case.dtype] if case.flops else 0.0
        return max(compute, case.bytes / self.bandwidth)


def measure(device: torch.device, dtypes: Iterable[str]) -> Ceilings:
    """Measure the ceilings on ``device``."""
    timer, samples = clock(device), SAMPLES[device.type]

    def fastest(call: Callable[[], object]) -> float:
        call()
        sample = timer.prepare(call).sample
        settle(sample, SETTLE_LIMIT[device.type])
        return min(sample() for _ in range(samples))

    n = GEMM_SIZE[device.type]
    gemm = {}
    for name in dict.fromkeys(d for d in dtypes if d in DTYPES):
        a = torch.randn(n, n, device=device).to(DTYPES[name])
        b = torch.randn(n, n, device=device).to(DTYPES[name])
        out = torch.empty_like(a)
        stored = (b, b.T)
        gemm[name] = 2 * n**3 / min(fastest(lambda a=a, w=w, out=out: torch.mm(a, w, out=out)) for w in stored)
    source = torch.zeros(COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source).copy_(source)
    copy = 2 * source.nbytes / fastest(lambda: target.copy_(source))
    read = source.nbytes / fastest(lambda: torch.sum(source)) if device.type == "cpu" else None
    return Ceilings(gemm, copy, read)
