"""Time and peak memory of a call, on the CPU and on CUDA, and the interleaving of several calls in one run."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

import gossamer

MIN_ROUNDS, MAX_ROUNDS = 3, 500


class CpuClock:
    """Wall-clock time of a call, by the monotonic performance counter."""

    def seconds(self, call: Callable[[], object]) -> float:
        """Time one call."""
        start = time.perf_counter()
        call()
        return time.perf_counter() - start


class CudaClock:
    """Device time of a call between two events, over an L2 cache that was just overwritten."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        l2 = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20)
        self._flush = torch.empty(max(2 * l2, 64 << 20), dtype=torch.uint8, device=device)

    def seconds(self, call: Callable[[], object]) -> float:
        """Time one call."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._flush.zero_()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize(self._device)
        return start.elapsed_time(end) * 1e-3


def clock(device: torch.device) -> CpuClock | CudaClock:
    """The clock for a device."""
    return CudaClock(device) if device.type == "cuda" else CpuClock()


def interleave(
    calls: Mapping[str, Callable[[], object]],
    device: torch.device,
    budget: float,
    progress: Callable[[str], None] = lambda message: None,
) -> dict[str, list[float]]:
    """Time several calls in turns, so that a change in the machine's speed meets all of them alike.

    Args:
        calls: name -> call, warmed up before. Each is called once a round; the order turns from round to round.
        device: where they run.
        budget: seconds for all together; a call that has used its share sits out once it has ``MIN_ROUNDS`` samples.
        progress: told what is going on.

    Returns:
        Name -> seconds of each sample.
    """
    timer = clock(device)
    names = list(calls)
    samples: dict[str, list[float]] = {name: [] for name in names}
    spent = dict.fromkeys(names, 0.0)
    for round_ in range(MAX_ROUNDS):
        active = [n for n in names if len(samples[n]) < MIN_ROUNDS or spent[n] < budget / len(names)]
        if not active:
            break
        progress(f"timing, round {round_ + 1}")
        turn = round_ % len(active)
        for name in active[turn:] + active[:turn]:
            start = time.perf_counter()
            samples[name].append(timer.seconds(calls[name]))
            spent[name] += time.perf_counter() - start
    return samples


def quantile(samples: list[float], q: float) -> float:
    """The ``q`` quantile, by linear interpolation."""
    ordered = sorted(samples)
    position = q * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def peak_memory(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that a warmed-up call needs at its peak on top of what is there when it starts, its results included.

    On CUDA this is what torch's allocator hands out. On the CPU it is physical memory, whoever allocates it, from the
    kernel's high-water mark of the process; None where the system has none that can be reset.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
        del result
        return peak
    try:
        # Freed memory that is kept would be used again unseen, so it goes back to the system first.
        gossamer.empty_cache()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _process_bytes("VmRSS")
        result = call()
        peak = _process_bytes("VmHWM") - before
    except (OSError, AttributeError):
        return None
    del result
    return peak


PEAK_MEMORY_METHOD = {
    "cuda": "torch.cuda.max_memory_allocated over the call, less what was allocated before it",
    "cpu": "high-water mark of resident memory (VmHWM) over the call, less what was resident before it",
}


def _process_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")
