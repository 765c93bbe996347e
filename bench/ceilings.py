"""What the machine can do, measured in the same run: a large matrix product in each dtype, and a copy."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from gossamer.bench.case import DTYPES, Case
from gossamer.bench.timing import clock

GEMM_SIZE = {"cuda": 8192, "cpu": 2048}
COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 28}
SAMPLES = {"cuda": 20, "cpu": 7}


@dataclass(frozen=True)
class Ceilings:
    """Rates of the fastest of several samples.

    Attributes:
        gemm: dtype -> FLOP/s of a square product.
        copy: bytes per second, read and written.
    """

    gemm: dict[str, float]
    copy: float

    def floor_seconds(self, case: Case) -> float:
        """The least time the case could take: its FLOPs at the product's rate, or its bytes at the copy's."""
        compute = case.flops / self.gemm[case.dtype] if case.flops else 0.0
        return max(compute, case.bytes / self.copy)


def measure(device: torch.device, dtypes: Iterable[str]) -> Ceilings:
    """Measure both ceilings on ``device``."""
    timer, samples = clock(device), SAMPLES[device.type]
    n = GEMM_SIZE[device.type]
    gemm = {}
    for name in dict.fromkeys(d for d in dtypes if d in DTYPES):
        a = torch.randn(n, n, device=device).to(DTYPES[name])
        b = torch.randn(n, n, device=device).to(DTYPES[name])
        out = torch.empty_like(a)
        torch.mm(a, b, out=out)
        gemm[name] = (
            2 * n**3 / min(timer.seconds(lambda a=a, b=b, out=out: torch.mm(a, b, out=out)) for _ in range(samples))
        )
    source = torch.zeros(COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source).copy_(source)
    copy = 2 * source.nbytes / min(timer.seconds(lambda: target.copy_(source)) for _ in range(samples))
    return Ceilings(gemm, copy)
