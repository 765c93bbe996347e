"""How a call is timed: the clocks, the choice of a graph's replay, settling, turns, and pytest-benchmark's timer."""

from __future__ import annotations

import contextlib
import functools
import itertools
import operator
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from gossamer import _backend
from gossamer.bench.harness import timing
from gossamer.bench.harness.case import Case, Variant
from gossamer.bench.harness.ceilings import Ceilings
from gossamer.bench.harness.cores import NAP, Cores


class Machine:
    """A host and a device with a queue between them, in seconds of their own."""

    def __init__(self, monkeypatch, readable=True):
        self.host, self.device, self.capturing, self.readable, self.mode = 0.0, 0.0, None, readable, 0
        monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: self.host))
        machine, self.captures = self, 0

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                machine.device = self.at = max(machine.device, machine.host)

            def elapsed_time(self, end):
                return 1e3 * (end.at - self.at)

        class Graph:
            def replay(self):
                machine.launch(2e-6, sum(self.work))

        @contextlib.contextmanager
        def graph(graph, stream):
            machine.captures += 1
            machine.capturing = graph.work = []
            yield
            machine.capturing = None

        names = dict(
            Event=Event,
            CUDAGraph=Graph,
            graph=graph,
            Stream=lambda device: SimpleNamespace(wait_stream=lambda other: None),
            current_stream=lambda device: SimpleNamespace(wait_stream=lambda other: None),
            stream=lambda stream: contextlib.nullcontext(),
            device=lambda device: contextlib.nullcontext(),
            set_stream=lambda stream: None,
            get_sync_debug_mode=lambda: self.mode,
            set_sync_debug_mode=lambda mode: setattr(self, "mode", mode),
            synchronize=lambda device: self.wait(asked=True),
        )
        for name, value in names.items():
            monkeypatch.setattr(torch.cuda, name, value)
        self.clock = object.__new__(timing.CudaClock)
        self.clock._device = None
        self.clock._flush = SimpleNamespace(zero_=lambda: self.launch(2e-6, 40e-6))

    def launch(self, host, device):
        self.host += host
        if self.capturing is not None:
            self.capturing.append(device)
        else:
            self.device = max(self.device, self.host) + device

    def wait(self, asked=False):
        if self.mode == "error" and not asked:
            raise RuntimeError("called a synchronizing CUDA operation")
        if self.capturing is not None:
            self.capturing = None
            raise RuntimeError("operation not permitted when stream is capturing")
        self.host = max(self.host, self.device)

    def call(self, kernels, device, reads_the_host=False):
        for _ in range(kernels):
            self.launch(10e-6, device)
            if reads_the_host:
                self.wait()


def test_short_kernels_are_timed_by_replay_and_not_through_the_host(monkeypatch):
    machine = Machine(monkeypatch)
    timed = machine.clock.prepare(lambda: machine.call(10, 1e-6))
    assert timed.method == "graph replay"
    assert timed.sample() == pytest.approx(10e-6)
    assert timed.host == pytest.approx(100e-6)


def test_long_kernels_are_timed_by_events_with_the_flush_outside(monkeypatch):
    machine = Machine(monkeypatch)
    timed = machine.clock.prepare(lambda: machine.call(3, 1e-3))
    assert timed.method == "events"
    assert timed.sample() == pytest.approx(3e-3)
    assert timed.host == pytest.approx(30e-6)


def test_what_cannot_be_captured_says_that_the_host_is_in_its_time(monkeypatch):
    machine = Machine(monkeypatch)
    timed = machine.clock.prepare(lambda: machine.call(10, 1e-6, reads_the_host=True))
    assert timed.method == "events, host included"
    assert timed.sample() > 50e-6
    # The clock found this out without a capture, which would have failed, and restored the mode.
    assert machine.captures == 0 and machine.mode == 0


def test_cpu_clock_takes_off_its_own_cost_and_repeats_short_calls():
    calls = itertools.count()
    timer = timing.CpuClock()
    timed = timer.prepare(lambda: next(calls))
    before = next(calls)
    assert 0 < timed.sample() < 20e-6
    assert next(calls) - before > 10
    assert timed.method == "wall clock" and timed.host is None
    slept = timer.prepare(lambda: time.sleep(0.005))
    assert 0.005 <= slept.sample() < 0.1


def test_settling_waits_for_the_medians_to_agree_and_no_longer_than_told():
    drifting = itertools.chain([2.0 - 0.1 * i for i in range(10)], itertools.repeat(1.0))
    taken = []
    assert timing.settle(lambda: taken.append(next(drifting)) or taken[-1], limit=60)
    assert len(taken) == 18  # the earlier window, samples 9 to 13, holds two that drift and three that do not
    growing = itertools.count(1)
    assert not timing.settle(lambda: time.sleep(0.001) or 1.1 ** next(growing), limit=0.05)


@pytest.fixture
def naps(monkeypatch):
    """A clock that only samples and naps advance."""
    now = {"s": 0.0, "naps": 0}

    def nap(seconds):
        now["s"] += seconds
        now["naps"] += 1

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now["s"])
    monkeypatch.setattr(timing.time, "sleep", nap)
    return now


def taking(seconds):
    return lambda: time.sleep(seconds) or seconds


@pytest.mark.parametrize(("patience", "rounds"), [(0.01, timing.MIN_ROUNDS), (60.0, timing.ROUNDS)])
def test_calls_take_turns_and_slow_ones_sit_out(naps, monkeypatch, patience, rounds):
    monkeypatch.setattr(timing, "MAX_ROUNDS", 30)
    monkeypatch.setattr(timing, "ROUNDS_SECONDS", patience)
    order = []

    def sample(name, seconds):
        order.append(name)
        time.sleep(seconds)
        return seconds

    turns = timing.Turns({"slow": lambda: sample("slow", 0.02), "quick": lambda: sample("quick", 0.0)}, budget=0.04)
    turns.take(1.0)
    assert order[:4] == ["slow", "quick", "quick", "slow"]
    assert turns.samples == {"slow": dict.fromkeys(range(rounds), 0.02), "quick": dict.fromkeys(range(30), 0.0)}


def test_calls_whose_ratio_counts_share_their_time_and_sit_out_together(naps, monkeypatch):
    monkeypatch.setattr(timing, "MAX_ROUNDS", 1000)
    samplers = {"ours": taking(0.002), "peer": taking(0.002), "dense": taking(0.006)}
    turns = timing.Turns(samplers, budget=0.8, compared=("ours", "dense"))
    turns.take(1.0)
    samples = turns.samples
    assert samples["ours"].keys() == samples["dense"].keys() and timing.ROUNDS < len(samples["ours"]) <= 50
    assert timing.ROUNDS < len(samples["peer"]) <= 200
    only = timing.Turns({"ours": taking(0.002)}, budget=0.1, compared=("ours", "dense"))
    only.take(1.0)
    assert timing.ROUNDS < len(only.samples["ours"]) <= 50


def test_time_is_spread_over_visits(naps, monkeypatch):
    """Each of three visits has a third of the rounds of all."""
    monkeypatch.setattr(timing, "PRECISE", 0.0)
    turns = timing.Turns({"ours": taking(0.001), "dense": taking(0.001), "peer": taking(0.001)}, 0.0, ("ours", "dense"))
    for visit in range(3):
        turns.take((visit + 1) / 3)
        assert {len(samples) for samples in turns.samples.values()} == {timing.ROUNDS // 3 * (visit + 1)}
    turns.take(1.0)
    assert list(turns.samples["peer"]) == list(range(timing.ROUNDS))


def swing(low, high):
    values = itertools.cycle([low, high])
    return lambda: next(values)


def rounds_of(turns):
    turns.take(1.0)
    return {name: len(samples) for name, samples in turns.samples.items()}


def falling():
    seconds = itertools.accumulate(itertools.repeat(0.97), operator.mul, initial=4.0)
    return lambda: next(seconds)


@pytest.mark.parametrize("steady", [True, False])
def test_a_call_whose_ratio_is_known_well_sits_out(steady):
    """A steady ratio needs seven rounds; the ratio of calls that are slow by turns gets every round.

    So does the ratio of a call that becomes faster all the time, and the compared calls go along.
    """
    noise = torch.rand(100, generator=torch.Generator().manual_seed(0)).tolist()
    dense = [2.0 if steady else 2.0 + value for value in noise]

    def samplers(**more):
        times = {"ours": [4.0 / seconds for seconds in dense], "dense": dense, "peer": dense}
        return {name: functools.partial(next, iter(values)) for name, values in times.items()} | more

    few = timing.ENOUGH_ROUNDS if steady else timing.ROUNDS
    found = rounds_of(timing.Turns(samplers(), 0.0, ("ours", "dense")))
    assert found == {"ours": few, "dense": few, "peer": few}
    found = rounds_of(timing.Turns(samplers(falling=falling()), 0.0, ("ours", "dense")))
    assert found == {"ours": timing.ROUNDS, "dense": timing.ROUNDS, "peer": few, "falling": timing.ROUNDS}


def test_rounds_for_an_uncertain_ratio_begin_in_time(monkeypatch):
    """Each takes 1 s, from 20 s on: three are owed, and two more begin before 25 s."""
    now = {"s": 20.0}
    monkeypatch.setattr(timing, "MIN_ROUNDS", 3)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now["s"])
    sampler = falling()

    def sample():
        now["s"] += 1.0
        return sampler()

    turns = timing.Turns({"ours": sample, "dense": lambda: 2.0}, 0.0, ("ours", "dense"))
    turns.take(1.0, until=25.0)
    assert len(turns.samples["ours"]) == 5
    turns.take(1.0, until=0.0)
    assert len(turns.samples["ours"]) == 5


def test_a_call_has_no_more_rounds_without_those_it_is_compared_with(naps, monkeypatch):
    """They have had their seconds after six rounds, more than the rounds of each call."""
    monkeypatch.setattr(timing, "ROUNDS_SECONDS", 0.055)
    samplers = {"ours": taking(0.01), "dense": taking(0.01), "swinging": swing(0.001, 0.0012)}
    found = rounds_of(timing.Turns(samplers, 0.0, ("ours", "dense")))
    assert found["ours"] == found["dense"] == found["swinging"] <= 6


def test_of_a_short_call_the_median_of_three_samples_counts():
    """From the second round on, beside a call three times as long."""
    ours = itertools.chain([1.09], itertools.cycle([0.9, 5.0, 1.1]))
    samplers = {"ours": lambda: next(ours), "dense": lambda: 3.5, "peer": lambda: 2.0}
    turns = timing.Turns(samplers, 0.0, ("ours", "dense"))
    turns.take(1.0)
    assert list(turns.samples["ours"].values()) == [1.09] + [1.1] * (timing.ENOUGH_ROUNDS - 1)
    assert next(ours) == 0.9


def test_a_slow_call_has_partners_in_all_its_rounds(monkeypatch):
    """One of 5 s is owed three rounds, spread over nine visits; those compared, known well after seven, go along."""
    now = {"s": 0.0}

    def takes(seconds):
        def sample():
            now["s"] += seconds
            return seconds

        return sample

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now["s"])
    turns = timing.Turns({"ours": takes(0.2), "dense": takes(0.3), "slow": takes(5.0)}, 1.5, ("ours", "dense"))
    for visit in range(9):
        turns.take((visit + 1) / 9)
    assert len(turns.samples["slow"]) == timing.MIN_ROUNDS
    assert turns.samples["slow"].keys() <= turns.samples["ours"].keys() == turns.samples["dense"].keys()


def test_rounds_with_near_cores_are_enough_where_the_others_disagree():
    """Every second round has the cores apart: ours is then shorter, and a peer by turns half or twice as long."""
    apart, times = iter(range(10_000)), itertools.cycle([1e-3, 4e-3])
    now = {"far": False}

    def distance():
        now["far"] = next(apart) // 3 % 2 == 1
        return 9.0 if now["far"] else 1.0

    samplers = {"ours": lambda: 4e-4 if now["far"] else 1e-3, "peer": lambda: next(times) if now["far"] else 2e-3}
    found = rounds_of(timing.Turns(samplers, 0.0, ("ours",), Cores(distance)))
    assert 2 * timing.ENOUGH_ROUNDS - 1 <= found["peer"] < timing.ROUNDS


def test_distance_of_cores_is_the_larger_around_each_sample():
    distances = iter([1.0, 4.0, 4.0, 1.0, 1.0, 1.0])
    turns = timing.Turns({"a": lambda: 0.0, "b": lambda: 0.0}, 0.0, cores=Cores(lambda: next(distances, 1.0)))
    turns.take(1.0)
    assert [turns.distances[name][round_] for round_, name in [(0, "a"), (0, "b"), (1, "b"), (1, "a")]] == [4, 4, 1, 1]


def test_samples_wait_for_cores_to_come_together(naps):
    """A sample drives them apart, the third nap brings them together; a brief call is warm again when it is timed."""
    state = {"calls": 0, "due": 0}

    def distance():
        return 9.0 if naps["naps"] < state["due"] else 1.0

    def sample(seconds):
        def call():
            state["calls"] += 1
            state["due"] = naps["naps"] + 3 if seconds > 0.1 else state["due"]
            naps["s"] += seconds
            return seconds

        return call

    cores = Cores(distance)
    turns = timing.Turns({"brief": sample(0.001), "slow": sample(0.2)}, 30.0, ("brief", "slow"), cores)
    turns.take(0.1)
    rounds = len(turns.samples["slow"])
    assert rounds >= timing.MIN_ROUNDS and naps["naps"] == 3 * (rounds - 1)
    assert all(turns.near("brief")) and not any(turns.near("slow"))
    # In every second round the brief call is the last, after a pause; of the first there is one sample, then several.
    assert state["calls"] == rounds + 1 + (rounds - 1) * timing.SHORT_SAMPLES + rounds // 2


def test_samples_wait_no_longer_than_their_share(naps):
    """Cores that stay apart cost 0.4 of the budget, spread over the visits, and the naps that were begun."""
    near = iter([1.0])
    cores = Cores(lambda: next(near, 9.0))
    cores.distance()

    def sample():
        naps["s"] += 0.05
        return 0.05

    turns = timing.Turns({"ours": sample, "dense": sample}, 10.0, ("ours", "dense"), cores)
    for visit in range(1, 5):
        turns.take(visit / 4)
        assert naps["naps"] * NAP == pytest.approx(timing.GATHERING_SHARE * 10.0 * visit / 4, abs=(visit + 1) * NAP)
    assert not any(turns.near("ours")) and len(turns.samples["ours"]) > timing.ROUNDS


def test_least_distance_is_looked_for_where_there_is_one(naps):
    found = itertools.chain([9.0, 9.0, 2.0], itertools.repeat(9.0))
    cores = Cores(lambda: next(found))
    cores.look()
    assert cores.least == 2.0 and not cores.near(9.0)
    before = naps["naps"]
    Cores().look()
    assert Cores().gather(1.0) == 0.0 and naps["naps"] == before


def test_distance_of_cores_is_that_of_a_cache_line_between_them():
    """No processor passes a cache line on in a nanosecond. One thread has no distance, and nor has a CUDA device."""
    threads, cores = torch.get_num_threads(), Cores.of(torch.device("cpu"))
    try:
        torch.set_num_threads(1)
        assert cores.distance() == 0
        torch.set_num_threads(2)
        assert _backend.native_unavailable() or 1e-9 < cores.distance() < 1e-4
    finally:
        torch.set_num_threads(threads)
    assert Cores.of(torch.device("cuda")).distance() == 0


def test_a_ratio_is_taken_within_the_rounds():
    slow_machine = dict(enumerate([1.0, 1.0, 3.0, 3.0, 3.0]))
    ours = {round_: 0.5 * seconds for round_, seconds in slow_machine.items()}
    assert timing.ratio(ours, slow_machine) == 0.5
    assert timing.ratio({3: 1.5, 7: 9.0}, slow_machine) == 0.5
    assert timing.ratio(by_round([1.0, 2.0, 9.0]), by_round([1.0, 1.0, 1.0])) == 2.0


def by_round(seconds):
    return dict(enumerate(seconds))


def test_a_ratio_is_of_the_rounds_that_were_least_disturbed():
    """Other work slows ours by a half and theirs by a tenth, in all rounds but six of thirty; six are a fifth."""
    quiet = {4, 5, 11, 20, 21, 29}
    ours = {r: 2.0 + 0.01 * r if r in quiet else 3.0 for r in range(30)}
    theirs = {r: 1.0 + 0.005 * r if r in quiet else 1.1 + 0.05 for r in range(30)}
    assert timing.ratio(ours, theirs) == pytest.approx(2.0)
    assert timing.ratio_interval(ours, theirs) == pytest.approx((2.0, 2.0))
    assert timing.ratio(theirs, ours) == pytest.approx(0.5)


def test_interval_of_a_ratio_holds_the_true_one_nine_times_of_ten_or_more():
    """Also where the machine's own speed changes from round to round more than what is measured."""
    assert timing.ratio_interval(by_round([3.0, 1.0, 2.0]), by_round([1.0] * 3)) == (1.0, 3.0)
    same = [1.0, 2.0, 0.5, 4.0, 0.25]
    assert timing.ratio_interval(by_round(same), by_round([1 / seconds for seconds in same])) == (0.0625, 16.0)
    generator = torch.Generator().manual_seed(0)
    for rounds in (5, 9, 40, 100):
        speed = torch.rand(2000, rounds, generator=generator)
        ours, theirs = ((speed + 0.2 * torch.randn(2000, rounds, generator=generator)).exp().tolist() for _ in range(2))
        found = [timing.ratio_interval(by_round(a), by_round(b)) for a, b in zip(ours, theirs, strict=True)]
        held = sum(low <= 1 <= high for low, high in found)
        assert 0.89 <= held / 2000 <= 0.97


def test_freed_memory_is_kept_once_the_c_library_was_told():
    """48 MiB that were used and freed are used again without a page being cleared, in a process of its own."""
    code = """
import resource, torch
from gossamer.bench.harness.timing import keep_freed_memory
kept = keep_freed_memory(torch.device("cpu"))
use = lambda: torch.empty(12 << 20).zero_()
use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    use()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    kept, faults = done.stdout.split()
    if kept == "False":
        pytest.skip("the C library has no mallopt")
    assert int(faults) < 100


def test_timer_of_pytest_benchmark_counts_samples_alone():
    timer = timing.MeasuredTime()
    call = timer.through(lambda: time.sleep(0.002) or 0.5)
    start = timer()
    call()
    assert timer() - start == pytest.approx(0.5, abs=1e-8)
    assert timer() > timer.__call__() - 1 and timer() < timer()


def test_what_is_timed_holds_the_work_and_none_of_the_bookkeeping():
    x = torch.randn(4, requires_grad=True)
    variant = Variant("square", "ours", lambda: x.square(), {"dx": x}, torch.ones(4))
    assert variant.bare("forward") is variant.forward
    (grad,) = variant.bare("both")()
    assert torch.equal(grad, 2 * x)


def test_floor_is_the_slower_of_products_and_the_better_bandwidth(device):
    case = dict(family="f", shape="s", sizes={}, dtype="fp32", device=torch.device(device), direction="forward")
    rest = dict(variants=(), skipped={}, gates={}, checked="")
    for ceilings in (Ceilings({"fp32": 1e12}, 1e11), Ceilings({"fp32": 1e12}, 0.5e11, 1e11)):
        assert ceilings.floor_seconds(Case(**case, **rest, flops=2e12, bytes=1e11)) == 2.0
        assert ceilings.floor_seconds(Case(**case, **rest, flops=1e10, bytes=3e11)) == 3.0
