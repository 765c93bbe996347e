"""Measures the exchanges of a process group, fits a link to some of them, and predicts the others.

The link's latency and bandwidth are fitted to all-to-alls of a few sizes. The times of all-to-alls of other sizes, in
one hop and in two, and of all-gathers, reduce-scatters and all-reduces are then predicted by :mod:`exchanges`, and
reported beside the measured times.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from gossamer.parallel.planning.exchanges import Cluster, Link
from gossamer.parallel.planning.files import integer, number, read_object
from gossamer.parallel.processes import shutdown

ALL_TO_ALL, TWO_HOPS = "all-to-all", "all-to-all, two hops"
ALL_GATHER, REDUCE_SCATTER, ALL_REDUCE = "all-gather", "reduce-scatter", "all-reduce"
COLLECTIVES = (ALL_TO_ALL, TWO_HOPS, ALL_GATHER, REDUCE_SCATTER, ALL_REDUCE)
# Processes per "node" of an exchange in two hops; all these nodes are on this machine.
LOCAL = 2
# Bytes to each other process: of the all-to-alls that the link is fitted to, and of those that are predicted.
FITTED = (1 << 10, 1 << 14, 1 << 18, 1 << 22)
PREDICTED = (1 << 12, 1 << 16, 1 << 20, 3 << 20)
# Bytes in total of the other collectives.
TOTALS = (1 << 14, 1 << 18, 1 << 22)
REPEATS = (5, 200)
WARMUP = 2


@dataclass(frozen=True)
class Sample:
    """One exchange of one size.

    Attributes:
        collective: a member of :data:`COLLECTIVES`.
        nbytes: bytes to each other process for an all-to-all; in total for other collectives.
        fitted: whether the link is fitted to it.
        seconds: the median over calls; the time of a call is that of the slowest process.
        p20: the 20th percentile.
        p80: the 80th percentile.
        calls: number of calls.
    """

    collective: str
    nbytes: int
    fitted: bool
    seconds: float
    p20: float
    p80: float
    calls: int


def _call(
    collective: str,
    nbytes: int,
    group: dist.ProcessGroup | None,
    device: torch.device,
    hops: Sequence[dist.ProcessGroup],
) -> Callable[[], object]:
    """A function that makes one exchange of float32 tensors."""
    size = dist.get_world_size(group)
    if collective == TWO_HOPS:
        # The rows for a node travel there together, and then go on to its processes.
        sent = torch.ones(size * nbytes // 4, device=device)
        between, received = torch.empty_like(sent), torch.empty_like(sent)

        def exchange() -> None:
            dist.all_to_all_single(between, sent, group=hops[0])
            nodes = size // LOCAL
            ordered = between.view(nodes, LOCAL, -1).transpose(0, 1).reshape(-1)
            dist.all_to_all_single(received, ordered, group=hops[1])

        return exchange
    if collective == ALL_TO_ALL:
        sent = torch.ones(size * nbytes // 4, device=device)
        received = torch.empty_like(sent)
        return lambda: dist.all_to_all_single(received, sent, group=group)
    whole = torch.ones(nbytes // 4 // size * size, device=device)
    part = torch.ones(whole.numel() // size, device=device)
    if collective == ALL_GATHER:
        return lambda: dist.all_gather_into_tensor(whole, part, group=group)
    if collective == REDUCE_SCATTER:
        return lambda: dist.reduce_scatter_tensor(part, whole, group=group)
    return lambda: dist.all_reduce(whole, group=group)


def time_exchange(
    collective: str,
    nbytes: int,
    *,
    group: dist.ProcessGroup | None = None,
    hops: Sequence[dist.ProcessGroup] = (),
    budget: float = 0.5,
    fitted: bool = False,
) -> Sample:
    """Time one exchange; every process of the group makes the same call and gets the same answer.

    Args:
        collective: a member of :data:`COLLECTIVES`.
        nbytes: bytes to each other process for an all-to-all; in total for other collectives.
        group: group of processes; None for all.
        hops: the two groups of this process, across nodes and within its node; None for one hop.
        budget: approximate seconds to spend.
        fitted: a note for the sample.

    Raises:
        ValueError: ``collective`` is unknown, or ``nbytes`` below 4 bytes for each process.
    """
    if collective not in COLLECTIVES:
        raise ValueError(f"collective must be one of {', '.join(COLLECTIVES)}, got {collective!r}")
    least = 4 * (1 if collective in (ALL_TO_ALL, TWO_HOPS) else dist.get_world_size(group))
    if nbytes < least:
        raise ValueError(f"nbytes must be at least {least} for {collective}, got {nbytes}")
    cuda = dist.get_backend(group) == "nccl"
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    call = _call(collective, nbytes, group, device, hops)

    def slowest(count: int) -> list[float]:
        """The time of each of ``count`` calls on the slowest process."""
        seconds = []
        for _ in range(count):
            dist.barrier(group)
            if cuda:
                torch.cuda.synchronize()
            begin = time.perf_counter()
            call()
            if cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begin)
        times = torch.tensor(seconds, dtype=torch.float64, device=device)
        dist.all_reduce(times, dist.ReduceOp.MAX, group=group)
        return times.tolist()

    each = slowest(WARMUP)[-1]
    calls = max(REPEATS[0], int(min(REPEATS[1], budget / each)))
    times = sorted(slowest(calls))
    return Sample(
        collective, nbytes, fitted, statistics.median(times), times[calls // 5], times[-1 - calls // 5], calls
    )


def fit(samples: Sequence[Sample], processes: int) -> Link:
    """Fit a link to measured all-to-alls by the alpha-beta model, with the least sum of squared relative errors.

    Minimises ``sum_s ((p - 1) (alpha + m_s beta) / t_s - 1)^2`` over ``alpha >= 0`` and ``beta > 0``.

    Raises:
        ValueError: there are fewer than two sizes, or times that do not grow with the size.
    """
    rounds = processes - 1
    rows = [(rounds / s.seconds, rounds * s.nbytes / s.seconds) for s in samples if s.collective == ALL_TO_ALL]
    if len({s.nbytes for s in samples if s.collective == ALL_TO_ALL}) < 2:
        raise ValueError("samples must hold all-to-alls of at least two sizes")
    aa, ab, bb = sum(a * a for a, _ in rows), sum(a * b for a, b in rows), sum(b * b for _, b in rows)
    a1, b1 = sum(a for a, _ in rows), sum(b for _, b in rows)
    determinant = aa * bb - ab * ab
    latency, inverse = (bb * a1 - ab * b1) / determinant, (aa * b1 - ab * a1) / determinant
    if latency < 0:
        latency, inverse = 0.0, b1 / bb
    if inverse <= 0:
        raise ValueError("samples must hold times that grow with the size")
    return Link(latency, 1 / inverse)


def predict(link: Link, collective: str, nbytes: int, processes: int) -> float:
    """Seconds of an exchange between processes that are all joined by one link."""
    if collective == TWO_HOPS:
        nodes = Cluster(processes, LOCAL, link, link)
        return nodes.all_to_all(nodes.group(processes), nbytes, node_nbytes=LOCAL * nbytes)
    cluster = Cluster(processes, processes, link)
    group = cluster.group(processes)
    by_name = {
        ALL_TO_ALL: cluster.all_to_all,
        ALL_GATHER: cluster.all_gather,
        REDUCE_SCATTER: cluster.reduce_scatter,
        ALL_REDUCE: cluster.all_reduce,
    }
    return by_name[collective](group, nbytes)


def measure(group: dist.ProcessGroup | None = None, *, seconds: float = 10.0) -> dict:
    """Measure a process group. Returns plain values: the fitted link, and each exchange measured and predicted.

    Every process of the group makes the call and gets the same answer.

    Args:
        group: group of processes; None for all.
        seconds: approximate seconds that it may take.

    Raises:
        ValueError: the group has one process, or ``seconds`` is not above 0.
    """
    processes = dist.get_world_size(group)
    if processes < 2:
        raise ValueError(f"group must have at least 2 processes, got {processes}")
    if not seconds > 0:
        raise ValueError(f"seconds must be above 0, got {seconds:g}")
    plan = [(ALL_TO_ALL, nbytes, nbytes in FITTED) for nbytes in sorted(FITTED + PREDICTED)]
    hops: list[dist.ProcessGroup] = []
    if processes > LOCAL and processes % LOCAL == 0:
        ranks = [dist.get_global_rank(group or dist.group.WORLD, rank) for rank in range(processes)]
        lines = [ranks[place::LOCAL] for place in range(LOCAL)]
        nodes = [ranks[at : at + LOCAL] for at in range(0, processes, LOCAL)]
        # Every process must create every group; it keeps those that it is in.
        hops = [dist.new_subgroups_by_enumeration(each)[0] for each in (lines, nodes)]
        plan += [(TWO_HOPS, nbytes, False) for nbytes in PREDICTED]
    plan += [(name, nbytes, False) for name in (ALL_GATHER, REDUCE_SCATTER, ALL_REDUCE) for nbytes in TOTALS]
    common = {"group": group, "hops": hops, "budget": seconds / len(plan)}
    samples = [time_exchange(name, nbytes, fitted=fitted, **common) for name, nbytes, fitted in plan]
    link = fit([sample for sample in samples if sample.fitted], processes)
    rows = []
    for sample in samples:
        predicted = predict(link, sample.collective, sample.nbytes, processes)
        rows.append(asdict(sample) | {"predicted": predicted, "ratio": predicted / sample.seconds})
    return {
        "processes": processes,
        "backend": dist.get_backend(group),
        "threads": torch.get_num_threads(),
        "link": asdict(link),
        "samples": rows,
    }


def read_link(path: Path) -> Link:
    """The link that a file of ``gossamer plan measure --json`` holds: that of the run with the most processes.

    Raises:
        ValueError: the file cannot be read or holds something else.
    """
    runs = read_object(path).get("runs")
    if not isinstance(runs, list) or not runs or not all(isinstance(run, dict) for run in runs):
        raise ValueError(f"{path} must be a file of gossamer plan measure --json: it holds no runs")
    run = max(runs, key=lambda run: integer(str(path), "processes", run.get("processes"), 2, 2**20))
    link = run.get("link")
    if not isinstance(link, dict):
        raise ValueError(f"{path} must be a file of gossamer plan measure --json: a run holds no link")
    latency = link.get("latency")
    return Link(
        0.0 if latency == 0 else number(str(path), "latency", latency),
        number(str(path), "bandwidth", link.get("bandwidth")),
    )


def write_answer(output: Path, compute: Callable[[], object]) -> None:
    """Compute in the gloo processes that RANK and WORLD_SIZE describe; rank 0 writes its answer as JSON."""
    dist.init_process_group("gloo")
    found = compute()
    if dist.get_rank() == 0:
        output.write_text(json.dumps(found))
    shutdown()


def main(arguments: list[str] | None = None) -> None:
    """Measure the processes that RANK and WORLD_SIZE describe; rank 0 writes the answer."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    write_answer(chosen.output, lambda: measure(seconds=chosen.seconds))


if __name__ == "__main__":
    main()
