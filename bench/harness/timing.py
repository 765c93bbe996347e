"""Measures the time, host latency and peak memory of a call on the CPU and on CUDA, and interleaves several calls."""

from __future__ import annotations

import ctypes
import math
import time
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

import gossamer
from gossamer.bench.harness.cores import Cores

Call = Callable[[], object]

# Samples of a call: at least MIN_ROUNDS. While the ratio is uncertain (an interval wider than PRECISE, or fewer than
# ENOUGH_ROUNDS quiet rounds) sampling continues up to ROUNDS samples or ROUNDS_SECONDS. Even with as few rounds as that
# the interval is reliable: it is their whole range, which is rarely narrow by chance.
MIN_ROUNDS, ROUNDS, ROUNDS_SECONDS, MAX_ROUNDS = 3, 30, 12.0, 500
ENOUGH_ROUNDS, PRECISE = 7, 1.03
# Samples per round of a call that takes less than a third of the time of the calls it is compared with.
SHORT_SAMPLES = 3
# Ratios use only rounds with near cores if there are at least this many.
NEAR_ROUNDS = 5
# A ratio uses the quietest rounds of its two calls: this share of all rounds, but at least this many.
QUIET_SHARE, QUIET_ROUNDS = 0.2, 5
# The machine counts as idle if median samples exceed the shortest ones by at most this share.
IDLE = 0.05
# Time to wait for near cores, as a share of the budget; it comes in addition to the budget.
GATHERING_SHARE = 0.4
# Calls shorter than this, in seconds, are called once before a sample, since a pause leaves the caches cold.
BRIEF_CALL = 0.01
# Share of the budget for the calls whose ratio counts.
COMPARED_SHARE = 0.5
HOST_SAMPLES = 9
# Least seconds of a sample on the CPU; a shorter call is repeated within it.
CPU_SAMPLE = 1e-4
# The machine has settled if the medians of two windows of this many samples agree.
SETTLE_WINDOW, SETTLE_TOLERANCE = 5, 0.02
SETTLE_LIMIT = {"cuda": 1.0, "cpu": 0.1}


@dataclass(frozen=True)
class Timed:
    """A call prepared for timing.

    Attributes:
        method: ``"wall clock"``, ``"events"`` or ``"graph replay"``; ``"events, host included"`` where the host is
            slower than the device and the call cannot be captured.
        sample: takes one sample, in seconds.
        host: seconds that the host needs to issue the call; None on the CPU, where the host does the whole call.
        first: seconds of one call during preparation.
    """

    method: str
    sample: Callable[[], float]
    host: float | None = None
    first: float = 0.0


class CpuClock:
    """Measures wall-clock time by the monotonic performance counter, and subtracts the counter's own cost."""

    def __init__(self) -> None:
        self._empty = 0.0
        self._empty = min(self._seconds(_nothing, 1000) for _ in range(5))

    def _seconds(self, call: Call, repeats: int) -> float:
        rounds = range(repeats)
        start = time.perf_counter()
        for _ in rounds:
            call()
        return (time.perf_counter() - start) / repeats - self._empty

    def prepare(self, call: Call) -> Timed:
        """Choose how often the call is repeated in a sample."""
        first = self._seconds(call, 1)
        repeats = max(1, math.ceil(CPU_SAMPLE / max(first, 1e-7)))
        return Timed("wall clock", lambda: self._seconds(call, repeats), first=first)


def _nothing() -> None:
    pass


def launch_bound(host: float, device: float) -> bool:
    """Return whether the device may have waited for the host, so that events measure both."""
    return host > 0.5 * device


class CudaClock:
    """Measures device time between two events, starting from an L2 cache that was just overwritten.

    Overwriting the cache also gives the host a head start of tens of microseconds. If the device may nevertheless have
    to wait for the host, the call is captured, and the replay of its graph is timed.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        l2 = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20)
        self._flush = torch.empty(max(2 * l2, 64 << 20), dtype=torch.uint8, device=device)

    def _seconds(self, call: Call) -> float:
        # Events are recorded on the current device.
        with torch.cuda.device(self._device):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._flush.zero_()
            start.record()
            call()
            end.record()
            torch.cuda.synchronize(self._device)
        return start.elapsed_time(end) * 1e-3

    def _host_seconds(self, call: Call) -> float:
        samples = []
        for _ in range(HOST_SAMPLES):
            torch.cuda.synchronize(self._device)
            start = time.perf_counter()
            call()
            samples.append(time.perf_counter() - start)
        torch.cuda.synchronize(self._device)
        return quantile(samples, 0.5)

    def _waits(self, call: Call) -> bool:
        """Whether the call waits for the device, as a peer's may; such a call cannot be captured.

        The check does not try a capture, since one that fails leaves its stream and the random number generator
        unusable.
        """
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        except RuntimeError:
            return True
        finally:
            torch.cuda.set_sync_debug_mode(mode)
            torch.cuda.synchronize(self._device)
        return False

    def _capture(self, call: Call) -> torch.cuda.CUDAGraph | None:
        # A backward pass runs on the stream of its forward pass, so both are warmed up on the stream that captures.
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            call()
            call()
        before = torch.cuda.current_stream(self._device)
        before.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=stream):
                call()
        except RuntimeError:
            # The call cannot be captured, for a reason other than a wait. If the capture did not end, its stream is
            # left behind.
            torch.cuda.set_stream(before)
            torch.cuda.synchronize(self._device)
            return None
        return graph

    def prepare(self, call: Call) -> Timed:
        """Measure host latency, and choose between the call and a graph of it."""
        host = self._host_seconds(call)
        if not launch_bound(host, quantile([self._seconds(call) for _ in range(3)], 0.5)):
            return Timed("events", lambda: self._seconds(call), host)
        with torch.cuda.device(self._device):
            graph = None if self._waits(call) else self._capture(call)
        if graph is None:
            return Timed("events, host included", lambda: self._seconds(call), host)
        return Timed("graph replay", lambda: self._seconds(graph.replay), host)


def clock(device: torch.device) -> CpuClock | CudaClock:
    """The clock for this device."""
    return CudaClock(device) if device.type == "cuda" else CpuClock()


def settle(sample: Callable[[], float], limit: float) -> bool:
    """Take samples until the medians of the last two windows agree or ``limit`` seconds have passed.

    The medians drift while clock rates change and while caches and pages are being filled.

    Returns:
        Whether they agreed.
    """
    start, samples = time.perf_counter(), []
    while time.perf_counter() - start < limit:
        samples.append(sample())
        if len(samples) >= 2 * SETTLE_WINDOW:
            before = quantile(samples[-2 * SETTLE_WINDOW : -SETTLE_WINDOW], 0.5)
            if abs(quantile(samples[-SETTLE_WINDOW:], 0.5) - before) <= SETTLE_TOLERANCE * before:
                return True
    return False


# Round -> seconds of the sample that a call took in it.
Samples = dict[int, float]


class Turns:
    """Times several calls in turns, so that a change in the machine's speed affects all of them alike.

    Each call has one turn per round, and the order rotates from round to round. A call whose time is used up sits out.

    Args:
        samplers: name -> function that takes one sample of a warmed-up call.
        budget: seconds for all calls together, half of them for those in ``compared``.
        compared: the calls whose ratio counts. They share their time and sit out together, so that in every round
            either all of them are sampled or none.
        cores: the cores that run the calls. A sample waits until they are near each other, as long as
            ``GATHERING_SHARE`` of the budget lasts.

    Attributes:
        samples: name -> the samples so far.
        distances: name -> round -> the larger of the cores' distances before and after the sample.
    """

    def __init__(
        self,
        samplers: Mapping[str, Callable[[], float]],
        budget: float,
        compared: Collection[str] = (),
        cores: Cores | None = None,
    ) -> None:
        pair = [n for n in samplers if n in compared]
        others = [n for n in samplers if n not in compared]
        share = 1.0 if not others else 0.0 if not pair else COMPARED_SHARE
        groups = [(pair, share * budget)] + [([n], (1 - share) * budget / len(others)) for n in others]
        self._compared = pair
        self._samplers, self._groups = samplers, [(group, seconds) for group, seconds in groups if group]
        self.samples: dict[str, Samples] = {name: {} for name in samplers}
        self.distances: dict[str, dict[int, float]] = {name: {} for name in samplers}
        self._spent = dict.fromkeys(samplers, 0.0)
        self._round, self._cores = 0, cores or Cores()
        self._gathering, self._gathered = GATHERING_SHARE * budget, 0.0
        self._paused: set[str] = set()
        self._until = math.inf

    def take(
        self, share: float, progress: Callable[[str], None] = lambda message: None, until: float = math.inf
    ) -> None:
        """Take samples until every call has had ``share``, at most 1, of its time and rounds.

        Extra rounds, for a ratio that is still uncertain, begin only before the performance counter reaches ``until``.
        """
        self._paused, self._until = set(self._samplers), until
        while self._round < share * MAX_ROUNDS:
            active = [n for group, seconds in self._groups if self._wants_more(group, seconds, share) for n in group]
            if not active:
                return
            progress(f"timing, round {self._round + 1}")
            turn, before = self._round % len(active), self._cores.distance()
            for name in active[turn:] + active[:turn]:
                before = self._gather(before, share)
                self._warm(name)
                start = time.perf_counter()
                found = [self._samplers[name]() for _ in range(self._repeats(name))]
                self.samples[name][self._round] = quantile(found, 0.5)
                self._spent[name] += time.perf_counter() - start
                after = self._cores.distance()
                self.distances[name][self._round] = max(before, after)
                before = after
            self._round += 1

    def _gather(self, distance: float, share: float) -> float:
        """Wait until the cores are near each other or no time is left; return their distance."""
        left = share * self._gathering - self._gathered
        if self._cores.near(distance) or left <= 0:
            return distance
        self._paused = set(self._samplers)
        start = time.perf_counter()
        distance = self._cores.gather(left)
        self._gathered += time.perf_counter() - start
        return distance

    def _warm(self, name: str) -> None:
        """Call a short call once before its sample, to warm the caches after a pause."""
        if name in self._paused and next(reversed(self.samples[name].values()), math.inf) < BRIEF_CALL:
            self._samplers[name]()
        self._paused.discard(name)

    def _repeats(self, name: str) -> int:
        """How many samples to take in this round: several for a call much shorter than its partners.

        The median of several counts. In the ratio of a short sample to a long one, a disturbance of the short one
        weighs as much as one of the long one.
        """
        before = [next(reversed(self.samples[n].values()), math.inf) for n in (name, *self._compared)]
        return SHORT_SAMPLES if SHORT_SAMPLES * before[0] < max(before[1:], default=0.0) < math.inf else 1

    def near(self, name: str) -> list[bool]:
        """Return for each sample of a call whether the cores were near each other."""
        return [self._cores.near(distance) for distance in self.distances[name].values()]

    def _wants_more(self, group: list[str], seconds: float, share: float) -> bool:
        if self._is_owed(group, seconds, share):
            return True
        if group == self._compared and any(self._lacks_rounds(other, share) for other, _ in self._groups):
            return True
        if not self._has_room(group, share):
            return False
        if group == self._compared:
            return any(self._has_room(other, share) and not self._precise(other) for other, _ in self._groups)
        # A sample tells nothing about a ratio in a round in which the compared calls did not run.
        partners = [each for each in self._groups if each[0] == self._compared]
        stay = all(self._has_room(names, share) or self._is_owed(names, budget, share) for names, budget in partners)
        return stay and not self._precise(group)

    def _is_owed(self, group: list[str], seconds: float, share: float) -> bool:
        return self._lacks_rounds(group, share) or sum(self._spent[n] for n in group) < share * seconds

    def _lacks_rounds(self, group: list[str], share: float) -> bool:
        """Whether a group has too few samples from rounds in which all compared calls were sampled too."""
        rounds = set(self.samples[group[0]])
        return len(rounds.intersection(*(self.samples[name] for name in self._compared))) < share * MIN_ROUNDS

    def _has_room(self, group: list[str], share: float) -> bool:
        rounds, spent = len(self.samples[group[0]]), max(self._spent[n] for n in group)
        return rounds < share * ROUNDS and spent < share * ROUNDS_SECONDS and time.perf_counter() < self._until

    def _precise(self, group: list[str]) -> bool:
        """Whether the ratios to the compared calls are known precisely enough; never for a call without a partner."""
        pairs = [(name, partner) for name in group for partner in self._compared if partner != name]
        return bool(pairs) and all(self._known(name, partner) for name, partner in pairs)

    def _known(self, name: str, partner: str) -> bool:
        """Whether the interval of a ratio is narrow, over all rounds or over those with near cores."""
        mine, theirs = self.samples[name], self.samples[partner]
        together = mine.keys() & theirs.keys()
        near = [
            {round_ for round_, is_near in zip(self.samples[n], self.near(n), strict=True) if is_near}
            for n in (name, partner)
        ]
        for rounds in (together, together.intersection(*near)):
            if len(rounds) >= ENOUGH_ROUNDS:
                low, high = ratio_interval({r: mine[r] for r in rounds}, theirs)
                if high <= PRECISE * low:
                    return True
        return False


def _quiet_share(rounds: int) -> int:
    """Return how many of ``rounds`` count as quiet."""
    return max(QUIET_ROUNDS, math.ceil(QUIET_SHARE * rounds))


def _quiet_ratios(ours: Samples, theirs: Samples) -> list[float]:
    """Return our seconds over theirs in the rounds in which neither sample was among its call's slower ones."""
    shared = sorted(ours.keys() & theirs.keys())
    ordered = [sorted(samples[round_] for round_ in shared) for samples in (ours, theirs)]

    def loudness(round_: int) -> tuple[int, int]:
        ranks = [bisect_left(times, samples[round_]) for times, samples in zip(ordered, (ours, theirs), strict=True)]
        return max(ranks), sum(ranks)

    return [ours[round_] / theirs[round_] for round_ in sorted(shared, key=loudness)[: _quiet_share(len(shared))]]


def ratio(ours: Samples, theirs: Samples) -> float:
    """The median of our seconds over theirs, over the quietest of the rounds that both took part in.

    A drift of the machine from round to round is in both samples of a round, so it cancels in their ratio. Other work
    on the machine or its host slows one call more than another, and it only ever slows. Each sample is therefore ranked
    among those of its own call, and a round's rank is the higher of its two. The ratio uses the fifth of the rounds
    with the lowest ranks, but at least five rounds. Variation of a call's own time counts as disturbance too.
    """
    return quantile(_quiet_ratios(ours, theirs), 0.5)


def ratio_interval(ours: Samples, theirs: Samples) -> tuple[float, float]:
    """The ends of a confidence interval of :func:`ratio`, computed only from the order of the rounds' ratios.

    The ratio of each of those rounds is as likely to be below the true median as above it, so the number below it
    follows a binomial distribution. The interval leaves out as many ratios at either end as keeps its confidence at 90%
    or more. With four rounds or fewer it is the whole range, whose confidence is lower.
    """
    ratios = sorted(_quiet_ratios(ours, theirs))
    n, outside, ways = len(ratios), 0, 1
    while 2 * ways <= 0.1 * 2**n:
        outside += 1
        ways += math.comb(n, outside)
    first = max(0, outside - 1)
    return ratios[first], ratios[-1 - first]


def slowing(seconds: list[float]) -> float:
    """Return by what share the median sample exceeds the median of the shortest fifth."""
    return quantile(seconds, 0.5) / quantile(sorted(seconds)[: _quiet_share(len(seconds))], 0.5) - 1


def mean_slowing(calls: Iterable[list[float]]) -> float | None:
    """Return the mean of :func:`slowing` over the samples of calls: how busy the machine was.

    None if no call has enough samples: twice the least number of quiet ones.
    """
    found = [slowing(seconds) for seconds in calls if len(seconds) >= 2 * QUIET_ROUNDS]
    return sum(found) / len(found) if found else None


class MeasuredTime:
    """A timer for pytest-benchmark that advances by the time a clock measured: the device's time, not the host's.

    Each reading advances it by another nanosecond, because pytest-benchmark measures the least step of its timer.
    """

    __name__ = "measured_time"

    def __init__(self) -> None:
        self._now = 0.0

    def __call__(self) -> float:
        """Seconds measured so far."""
        self._now += 1e-9
        return self._now

    def through(self, sample: Callable[[], float]) -> Callable[[], None]:
        """A call that takes one sample and advances the timer by it."""

        def call() -> None:
            self._now += sample()

        return call


def quantile(samples: list[float], q: float) -> float:
    """The ``q`` quantile, by linear interpolation."""
    ordered = sorted(samples)
    position = q * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


# Parameters of the C library's mallopt.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory(device: torch.device) -> bool:
    """Tell the C library to keep freed memory in this process; return whether it will.

    By default, whether it gives the memory of large results back to the system after each call, so that the next call
    clears their pages again, depends on what the process freed before. That took a quarter of the time of a dense layer
    in one run and nothing in the next.
    """
    if device.type != "cpu":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1) and mallopt(_M_MMAP_THRESHOLD, 2**30))


def peak_memory(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that a warmed-up call needs at its peak in addition to those in use when it starts, its results included.

    On CUDA it counts the memory that torch's allocator hands out. On the CPU it counts all physical memory, from the
    kernel's high-water mark of the process; None if the system has no such mark that can be reset.
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
        # A call that reuses kept memory would not raise the mark, so such memory is given back to the system first.
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


def resident_bytes() -> int | None:
    """Return the physical memory of this process, or None if the system does not report it."""
    try:
        return _process_bytes("VmRSS")
    except OSError:
        return None


def _process_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")
