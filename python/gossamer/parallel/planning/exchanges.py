"""The alpha-beta model of exchanges: a message of ``m`` bytes takes ``alpha + m * beta`` seconds.

``alpha`` is a link's latency, ``beta`` the inverse of its bandwidth. A device sends to one peer at a time: an exchange
is a sequence of rounds, in each of which every device sends one message and receives one. Devices on one node are
joined by the ``intra`` link, those on different nodes by the ``inter`` link; each device has its own share of both.

For a group of ``p`` devices, ``l`` of them on each of ``n`` nodes, with subscripts i and e for the links within and
between nodes:

====================================  ==============================================================================
all-to-all, ``m`` bytes to each peer  ``(l-1) (a_i + m b_i) + (p-l) (a_e + m b_e)``
the same by node, ``w`` to each node  ``(n-1) (a_e + w b_e) + (l-1) (a_i + n m b_i)``
all-gather of ``m`` bytes in total    ``(n-1) (a_e + m/p b_e) + (l-1) (a_i + m/l b_i)``
reduce-scatter                        as the all-gather
all-reduce                            reduce-scatter, then all-gather
====================================  ==============================================================================

The all-to-all is a pairwise exchange. By node, each device first sends the bytes for a whole node, ``w <= l m`` if some
are for several of its devices, to the device with the same place on that node, and devices then exchange within nodes.
With one node, or one device per node, the other rows are the ring algorithms; else they are one ring along the devices
with the same place on their nodes and one ring within each node. Thakur, Rabenseifner and Gropp 2005, "Optimization of
Collective Communication Operations in MPICH", derives the terms.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Link:
    """A connection of one device.

    Attributes:
        latency: seconds from the start of a message of no bytes to its arrival.
        bandwidth: bytes per second in each direction.
    """

    latency: float
    bandwidth: float

    def __post_init__(self) -> None:
        """Check both numbers."""
        if not (math.isfinite(self.latency) and self.latency >= 0):
            raise ValueError(f"latency must be a finite number of seconds and at least 0, got {self.latency!r}")
        if not (math.isfinite(self.bandwidth) and self.bandwidth > 0):
            raise ValueError(f"bandwidth must be finite and above 0, got {self.bandwidth!r}")

    def seconds(self, nbytes: float) -> float:
        """The seconds that a message takes."""
        return self.latency + nbytes / self.bandwidth


@dataclass(frozen=True)
class Group:
    """The devices of one exchange.

    Attributes:
        size: number of devices.
        local: number of devices per node, the same on every node.
    """

    size: int
    local: int

    @property
    def nodes(self) -> int:
        """The number of nodes they are on; the last node may hold fewer of them."""
        return -(-self.size // self.local)


@dataclass(frozen=True)
class Cluster:
    """Devices on nodes.

    Attributes:
        devices: in total.
        per_node: on each node.
        intra: the link between devices on one node.
        inter: the link between nodes; None if one node holds all devices.
        memory: bytes of memory per device; None for no limit.
    """

    devices: int
    per_node: int
    intra: Link
    inter: Link | None = None
    memory: float | None = None

    def __post_init__(self) -> None:
        """Check that the devices fill their nodes, and that nodes are linked."""
        if self.devices < 1:
            raise ValueError(f"devices must be at least 1, got {self.devices}")
        if self.per_node < 1:
            raise ValueError(f"per_node must be at least 1, got {self.per_node}")
        if self.devices > self.per_node and self.devices % self.per_node:
            raise ValueError(f"devices must fill their nodes of {self.per_node}, got {self.devices}")
        if self.devices > self.per_node and self.inter is None:
            raise ValueError(
                f"inter must be given for {self.devices} devices on nodes of {self.per_node}: a link between nodes"
            )
        if self.memory is not None and not self.memory > 0:
            raise ValueError(f"memory must be above 0 bytes, got {self.memory!r}")

    def group(self, size: int, stride: int = 1) -> Group:
        """The group of ``size`` devices that are ``stride`` places apart, if nodes are filled one after the other."""
        return Group(size, max(1, min(size, self.per_node // stride)))

    def resized(self, devices: int) -> Cluster:
        """The same links and nodes with another number of devices."""
        return Cluster(devices, self.per_node, self.intra, self.inter, self.memory)

    def _between(self, group: Group) -> Link:
        if self.inter is None:
            raise ValueError(f"inter must be given for a group on {group.nodes} nodes")
        return self.inter

    def all_to_all(self, group: Group, nbytes: float, *, node_nbytes: float | None = None) -> float:
        """Seconds of an all-to-all in which each device sends ``nbytes`` to each other device of the group.

        With ``node_nbytes`` the exchange goes by node: first that many bytes to each other node, then on to the
        devices.
        """
        local, nodes = group.local, group.nodes
        if nodes == 1:
            return (local - 1) * self.intra.seconds(nbytes)
        between = self._between(group)
        if node_nbytes is not None:
            along = (nodes - 1) * between.seconds(node_nbytes)
            return along + (local - 1) * self.intra.seconds(nodes * nbytes)
        return (local - 1) * self.intra.seconds(nbytes) + (group.size - local) * between.seconds(nbytes)

    def all_gather(self, group: Group, nbytes: float) -> float:
        """Seconds until each device of the group holds all ``nbytes``, if each began with an equal part."""
        local, nodes = group.local, group.nodes
        seconds = (local - 1) * self.intra.seconds(nbytes / local)
        if nodes > 1:
            seconds += (nodes - 1) * self._between(group).seconds(nbytes / group.size)
        return seconds

    def reduce_scatter(self, group: Group, nbytes: float) -> float:
        """Seconds until each device holds its part of the sum of ``nbytes`` from every device of the group."""
        return self.all_gather(group, nbytes)

    def all_reduce(self, group: Group, nbytes: float) -> float:
        """Seconds until each device holds the sum of ``nbytes`` from every device of the group."""
        return self.reduce_scatter(group, nbytes) + self.all_gather(group, nbytes)


def met_parts(sizes: list[int], top_k: int) -> list[float]:
    """For each part of the experts, the probability that a uniform choice of ``top_k`` among all includes one of it.

    Of ``E`` experts, the choice misses a part of ``s`` with probability ``C(E - s, K) / C(E, K)``.
    """
    total = sum(sizes)
    return [
        1.0 - math.prod(max(0, total - size - chosen) / (total - chosen) for chosen in range(top_k)) for size in sizes
    ]


def parts(total: int, ranks: int) -> list[int]:
    """Sizes of the consecutive parts into which ``torch.chunk`` divides ``total`` things for ``ranks`` ranks."""
    each = -(-total // ranks)
    return [max(0, min(each, total - rank * each)) for rank in range(ranks)]
