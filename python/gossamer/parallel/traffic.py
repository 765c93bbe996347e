"""What a process sends to others, counted by label: collectives, rows, bytes and the time that the host waits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass
class Flow:
    """What one process sent under one label.

    Attributes:
        collectives: calls of a collective.
        rows: rows sent to other ranks.
        nbytes: bytes sent to other ranks, padding included.
        seconds: time that the host waited for rows to arrive.
    """

    collectives: int = 0
    rows: int = 0
    nbytes: int = 0
    seconds: float = 0.0


@dataclass
class Traffic:
    """What one process sent while :func:`count_traffic` was active.

    Attributes:
        flows: a :class:`Flow` by label, in the order of first use. A backward pass adds ``" gradient"`` to the label of
            its forward pass, and sizes exchanged before the rows are counted under the label plus ``" sizes"``.
    """

    flows: dict[str, Flow] = field(default_factory=dict)

    @property
    def collectives(self) -> int:
        """Calls of a collective."""
        return sum(flow.collectives for flow in self.flows.values())

    @property
    def rows(self) -> int:
        """Rows sent to other ranks."""
        return sum(flow.rows for flow in self.flows.values())

    @property
    def nbytes(self) -> int:
        """Bytes sent to other ranks."""
        return sum(flow.nbytes for flow in self.flows.values())

    def add(self, label: str, *, collectives: int = 0, rows: int = 0, nbytes: int = 0, seconds: float = 0.0) -> None:
        """Add to the flow of ``label``."""
        flow = self.flows.setdefault(label, Flow())
        flow.collectives += collectives
        flow.rows += rows
        flow.nbytes += nbytes
        flow.seconds += seconds

    def __str__(self) -> str:
        lines = [
            f"{label}: {flow.collectives} collectives, {flow.rows} rows, {flow.nbytes} bytes, {flow.seconds:.4f} s"
            for label, flow in self.flows.items()
        ]
        return "\n".join(lines)


# Visible to every thread, as backward passes run on autograd's threads.
_counters: list[Traffic] = []


@contextlib.contextmanager
def count_traffic() -> Iterator[Traffic]:
    """Count what this process sends to others by :class:`RowExchange` inside the ``with`` block.

    >>> with gossamer.parallel.count_traffic() as traffic:
    ...     loss = model(x).sum()
    ...     loss.backward()
    >>> traffic.flows["tokens"].nbytes, traffic.flows["tokens gradient"].nbytes
    """
    traffic = Traffic()
    _counters.append(traffic)
    try:
        yield traffic
    finally:
        # Compared by identity, since two counters with the same counts are equal.
        _counters[:] = [counter for counter in _counters if counter is not traffic]


def count_sent(label: str, **amounts: float) -> None:
    """Add to the flow of ``label`` of every active counter."""
    for counter in _counters:
        counter.add(label, **amounts)
