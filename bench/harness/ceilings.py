"""The machine's ceilings, measured in the same run: a large matrix product in each dtype, a copy, and a read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from gossamer.bench.harness.case import DTYPES, Case
from gossamer.bench.harness.timing import SETTLE_LIMIT, clock, settle

GEMM_SIZES = {"cuda": (8192,), "cpu": (256, 512, 1024, 2048)}
COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 28}
SAMPLES = {"cuda": 20, "cpu": 7}
# A product that takes this many seconds needs only two samples: some processors take a minute for the largest in
# bfloat16.
LONG = 0.2


@dataclass(frozen=True)
class Ceilings:
    """Rates of the fastest of several samples.

    Attributes:
        gemm: dtype -> FLOP/s of a square product, the weight stored either way.
        copy: bytes per second, read and written.
        read: bytes per second that a sum over all threads reads, on the CPU; None elsewhere.
        slow_gemm: dtype -> FLOP/s of the product with the weight stored the slower way, if that was measured.
    """

    gemm: dict[str, float]
    copy: float
    read: float | None = None
    slow_gemm: dict[str, float] = field(default_factory=dict)

    @property
    def bandwidth(self) -> float:
        """The larger of copy and read: a copy on the CPU may first read what it overwrites."""
        return max(self.copy, self.read or 0.0)

    def best(self, other: Ceilings) -> Ceilings:
        """The faster of two measurements of each rate, of the same dtypes."""
        gemm = {name: max(rate, other.gemm[name]) for name, rate in self.gemm.items()}
        slow_gemm = {name: max(rate, other.slow_gemm[name]) for name, rate in self.slow_gemm.items()}
        return Ceilings(gemm, max(self.copy, other.copy), self.read and max(self.read, other.read), slow_gemm)

    def torch_seconds(self, case: Case) -> float:
        """The time of torch's products for the case's FLOPs; a backward pass has weights stored in both ways."""
        if not case.flops:
            return 0.0
        fast = self.gemm[case.dtype]
        return case.flops / (fast if case.direction == "forward" else self.slow_gemm.get(case.dtype, fast))

    def floor_seconds(self, case: Case) -> float:
        """The least time the case could take: its FLOPs at the product's rate, or its bytes at the bandwidth."""
        compute = case.flops / self.gemm[case.dtype] if case.flops else 0.0
        return max(compute, case.bytes / self.bandwidth)


def measure(device: torch.device, dtypes: Iterable[str]) -> Ceilings:
    """Measure the ceilings on ``device``."""
    timer, samples = clock(device), SAMPLES[device.type]

    def fastest(call: Callable[[], object]) -> float:
        if (first := timer.prepare(call)).first > LONG:
            return min(first.first, first.sample())
        sample = timer.prepare(call).sample
        settle(sample, SETTLE_LIMIT[device.type])
        return min(sample() for _ in range(samples))

    def gemm_rate(dtype: torch.dtype, transposed: bool) -> float:
        rate = 0.0
        for n in GEMM_SIZES[device.type]:
            a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
            out, weight = torch.empty_like(a), b.T if transposed else b
            seconds = fastest(lambda a=a, weight=weight, out=out: torch.mm(a, weight, out=out))
            rate = max(rate, 2 * n**3 / seconds)
            if seconds > LONG:
                break
        return rate

    names = dict.fromkeys(d for d in dtypes if d in DTYPES)
    rates = {name: [gemm_rate(DTYPES[name], transposed) for transposed in (False, True)] for name in names}
    source = torch.zeros(COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source).copy_(source)
    copy = 2 * source.nbytes / fastest(lambda: target.copy_(source))
    read = source.nbytes / fastest(lambda: torch.sum(source)) if device.type == "cpu" else None
    gemm, slow_gemm = ({name: pick(both) for name, both in rates.items()} for pick in (max, min))
    return Ceilings(gemm, copy, read, slow_gemm)
