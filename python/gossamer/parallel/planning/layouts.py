"""Layouts of a mixture-of-experts model over a cluster: the time of a step, and the memory that each device needs.

A layout splits everything outside the experts over ``tensor`` devices of a node and copies it over the others. It
splits the experts over ``expert`` consecutive devices by whole experts or, if that is 1, over the ``tensor`` devices by
their width. Parameters, gradients and optimizer states can also be split over the devices that would hold
copies: over all of them (FSDP) or over those on a node (hybrid). Every device has a batch of its own with ``tokens``
tokens, so the total batch grows with the cluster.

The time of a step is a sum, since nothing is assumed to overlap: products at measured rates (or reading their weights,
if few tokens meet them), exchanges by :mod:`exchanges`, and the optimizer's pass over memory. Norms, activations, the
loss, and dispatch outside the measured rate are not counted. Routing is assumed to be uniform; ``imbalance`` is the
load of the busiest device over the mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from gossamer.parallel.planning.exchanges import Cluster, met_parts, parts
from gossamer.parallel.planning.models import Model
from gossamer.parallel.planning.rates import DENSE, EXPERTS, MEMORY, Rate, Rates

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
# Bytes of float32 state that each optimizer keeps for a parameter.
STATES = {"sgd": 0, "momentum": 4, "adam": 8}
STRATEGIES = ("data", "fsdp", "tensor", "expert")
# Each row carries an id and a weight for each expert that it may meet; the numbers of rows are exchanged first.
ROUTE_BYTES, WEIGHT_BYTES, SIZE_BYTES = 8, 4, 16


@dataclass(frozen=True)
class Workload:
    """The work of a device in a step.

    Attributes:
        tokens: tokens per device.
        sequence: tokens that attend to one another.
        dtype: dtype of weights, gradients and activations.
        direction: ``"both"``, a training step, or ``"forward"``.
        optimizer: a key of :data:`STATES`.
        master: whether the optimizer keeps float32 copies of 16-bit weights.
        checkpoint: whether a layer's activations are recomputed in the backward pass instead of kept.
        imbalance: rows of the busiest device over the mean.
    """

    tokens: int
    sequence: int
    dtype: str = "bf16"
    direction: str = "both"
    optimizer: str = "adam"
    master: bool = False
    checkpoint: bool = False
    imbalance: float = 1.0

    def __post_init__(self) -> None:
        """Check every choice."""
        if self.tokens < 1:
            raise ValueError(f"tokens must be at least 1, got {self.tokens}")
        if not 1 <= self.sequence <= self.tokens:
            raise ValueError(f"sequence must be from 1 to the {self.tokens} tokens of a device, got {self.sequence}")
        for name, value, allowed in (
            ("dtype", self.dtype, BYTES),
            ("direction", self.direction, ("both", "forward")),
            ("optimizer", self.optimizer, STATES),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        if not 1 <= self.imbalance < float("inf"):
            raise ValueError(f"imbalance must be finite and at least 1, got {self.imbalance:g}")

    @property
    def trains(self) -> bool:
        """Whether there is a backward pass and an optimizer."""
        return self.direction == "both"

    @property
    def nbytes(self) -> int:
        """Bytes of an element."""
        return BYTES[self.dtype]

    @property
    def state_bytes(self) -> int:
        """Bytes of optimizer state per parameter."""
        return STATES[self.optimizer] + (4 if self.master and self.nbytes < 4 else 0)


@dataclass(frozen=True)
class Layout:
    """One way to lay a model out.

    Attributes:
        devices: number of devices in total.
        tensor: devices that split everything outside the experts.
        expert: devices that split the experts by whole experts; 1 for none.
        shard: the copies over which parameters are split too: ``"none"``, ``"node"`` or ``"all"``.
        hierarchical: whether rows travel by node, then by device.
    """

    devices: int
    tensor: int = 1
    expert: int = 1
    shard: str = "none"
    hierarchical: bool = False

    @property
    def strategy(self) -> str:
        """The member of :data:`STRATEGIES` that this layout belongs to."""
        if self.expert > 1:
            return "expert"
        if self.tensor > 1:
            return "tensor"
        return "data" if self.shard == "none" else "fsdp"

    @property
    def copies(self) -> int:
        """The number of devices that each hold, or together hold, one part of everything outside the experts."""
        return self.devices // self.tensor

    @property
    def expert_split(self) -> int:
        """The number of devices that the experts are split over, before copies are split."""
        return self.expert if self.expert > 1 else self.tensor

    @property
    def expert_copies(self) -> int:
        """The number of devices that each hold, or together hold, one part of the experts."""
        return self.devices // self.expert_split

    def __str__(self) -> str:
        words = []
        if self.expert > 1:
            words.append(f"expert {self.expert}" + (" by node" if self.hierarchical else ""))
        if self.tensor > 1:
            words.append(f"tensor {self.tensor}")
        copies = max(self.copies, self.expert_copies)
        if copies > 1:
            words.append(f"{ {'none': 'data', 'node': 'hybrid', 'all': 'fsdp'}[self.shard] } {copies}")
        return " x ".join(words) or "one device"


@dataclass(frozen=True)
class Cost:
    """The cost of a layout for a device.

    Attributes:
        layout: the layout.
        seconds: seconds of a step, by part.
        memory: bytes held, by part.
        sent: bytes sent to other devices in a step, by part.
    """

    layout: Layout
    seconds: dict[str, float]
    memory: dict[str, float]
    sent: dict[str, float]

    @property
    def step(self) -> float:
        """Seconds of a step."""
        return sum(self.seconds.values())

    @property
    def total_memory(self) -> float:
        """Bytes in total."""
        return sum(self.memory.values())

    def fits(self, cluster: Cluster) -> bool:
        """Whether a device of the cluster can hold it."""
        return cluster.memory is None or self.total_memory <= cluster.memory


@dataclass(frozen=True)
class ModelRates:
    """The rates that a plan for a model needs.

    Attributes:
        experts: FLOP/s of expert layers.
        dense: FLOP/s of all other products.
        memory: bytes/s of a copy, the rate at which weights are read and an optimizer passes over them. None, for a
            forward pass only, if it is neither given nor measured; reading weights then counts as free.
    """

    experts: Rate
    dense: Rate
    memory: Rate | None

    @staticmethod
    def of(rates: Rates, model: Model, work: Workload) -> ModelRates:
        """Look up all rates.

        Raises:
            ValueError: a rate is neither given nor measured.
        """
        sizes = {"H": model.hidden, "I": model.intermediate}
        experts = rates.get(EXPERTS, dtype=work.dtype, direction=work.direction, sizes=sizes)
        dense = rates.get(DENSE, dtype=work.dtype, direction=work.direction, sizes=sizes)
        memory = None
        if work.trains or rates.has(MEMORY, dtype=work.dtype, direction=work.direction):
            memory = rates.get(MEMORY, dtype=work.dtype, direction=work.direction)
        return ModelRates(experts, dense, memory)


def divisors(number: int) -> list[int]:
    """The divisors of ``number``, in order."""
    return [d for d in range(1, number + 1) if number % d == 0]


def layouts(model: Model, cluster: Cluster) -> Iterator[Layout]:
    """All layouts of a model in which tensor parallelism stays within a node and divides heads and widths evenly."""
    attention = model.attention
    for tensor in divisors(cluster.devices):
        if tensor > cluster.per_node or cluster.per_node % tensor:
            continue
        if attention.heads % tensor or attention.kv_heads % tensor or model.shared_width % tensor:
            continue
        for expert in divisors(cluster.devices):
            if expert > model.experts or (expert > 1 and expert % tensor):
                continue
            if expert == 1 and model.intermediate % tensor:
                continue
            group = cluster.group(expert)
            several = group.nodes > 1 and group.local > 1 and model.experts % expert == 0
            seen = set()
            for shard in ("none", "all", "node"):
                layout = Layout(cluster.devices, tensor, expert, shard)
                split = tuple(shards(cluster, layout, *part) for part in _copied(layout))
                if split in seen:
                    continue
                seen.add(split)
                for hierarchical in (False, True) if several else (False,):
                    yield Layout(cluster.devices, tensor, expert, shard, hierarchical)


def _copied(layout: Layout) -> tuple[tuple[int, int], tuple[int, int]]:
    """The number of copies and the stride of their devices, for everything outside the experts and for the experts."""
    return (layout.copies, layout.tensor), (layout.expert_copies, layout.expert_split)


def shards(cluster: Cluster, layout: Layout, copies: int, stride: int) -> int:
    """The number of devices that split one copy, out of ``copies`` devices ``stride`` apart that would each hold
    one.
    """
    if layout.shard == "node":
        local = cluster.group(copies, stride).local
        return local if copies % local == 0 else 1
    return copies if layout.shard == "all" else 1


class _Tally:
    """The seconds and the bytes sent, by part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.sent: dict[str, float] = {}

    def add(self, part: str, seconds: float, sent: float = 0.0, times: float = 1.0) -> None:
        if times and (seconds or sent):
            self.seconds[part] = self.seconds.get(part, 0.0) + times * seconds
            if sent:
                self.sent[part] = self.sent.get(part, 0.0) + times * sent


def price(model: Model, cluster: Cluster, work: Workload, rates: ModelRates, layout: Layout) -> Cost:
    """The cost of a layout."""
    tally = _Tally()
    # A training step does the products of the forward pass, and twice as many in the backward pass.
    passes = 3.0 if work.trains else 1.0
    held = _held(model, cluster, layout)

    def products(count: float, rate: Rate, weights: float) -> float:
        """Seconds of products with ``count`` multiply-adds per token, or of reading the weights if longer."""
        seconds = passes * 2 * work.tokens * count / rate.value
        # A training step reads the weights twice and writes their gradients once.
        read = 0.0 if rates.memory is None else passes * weights * work.nbytes / rates.memory.value
        return max(seconds, read)

    dense = model.dense_products + model.score_products(work.sequence)
    tally.add("dense", products(dense, rates.dense, model.dense_products / layout.tensor))
    busiest = 1.0
    if layout.expert > 1:
        # The rank with the most experts gets their share of all rows.
        busiest = work.imbalance * max(parts(model.experts, layout.expert)) * layout.expert / model.experts
    tally.add("experts", products(busiest * model.expert_products, rates.experts, held.experts))
    if layout.expert > 1:
        _add_rows(tally, model, cluster, work, layout)
    if layout.tensor > 1:
        _add_tensor(tally, model, cluster, work, layout)
    _add_copies(tally, model, cluster, work, layout, held)
    if work.trains:
        # Gradient and weight are read and the weight is written; each state is read and written.
        moved = 3 * work.nbytes + 2 * work.state_bytes
        tally.add("optimizer", sum(held.kept) * moved / rates.memory.value)
    return Cost(layout, tally.seconds, _memory(model, work, layout, held), tally.sent)


@dataclass(frozen=True)
class _Held:
    """The parameters on the fullest device.

    Attributes:
        dense: parameters outside the experts, before copies are split.
        experts: parameters of the experts, before copies are split.
        kept: both together, after copies are split (if they are).
    """

    dense: float
    experts: float
    kept: tuple[float, float]


def _held(model: Model, cluster: Cluster, layout: Layout) -> _Held:
    # Norms and the router are small and not split by tensor parallelism.
    whole = model.norm_parameters + model.moe_layers * model.router_parameters
    dense = whole + (model.dense_total - whole) / layout.tensor
    if layout.expert > 1:
        most = max(parts(model.experts, layout.expert))
        experts = float(model.moe_layers * most * model.expert_parameters)
    else:
        experts = model.expert_total / layout.tensor
    split = [shards(cluster, layout, *part) for part in _copied(layout)]
    return _Held(dense, experts, (dense / split[0], experts / split[1]))


def met_ranks(model: Model, ranks: int) -> list[float]:
    """For each rank that holds experts, the probability that a token is routed to any of its experts."""
    return met_parts(parts(model.experts, ranks), model.top_k)


def _add_rows(tally: _Tally, model: Model, cluster: Cluster, work: Workload, layout: Layout) -> None:
    """Add the exchange of rows with the experts: one row per (token, rank) pair, there and back in both passes.

    By node, a token travels once to each node, and from there once to each device.
    """
    group = cluster.group(layout.expert)
    row = model.hidden * work.nbytes
    slots = min(model.top_k, -(-model.experts // layout.expert))
    # The gradients of the rows travel together with the gradients of their weights.
    messages = [row + ROUTE_BYTES * slots, row]
    messages += [row, row + WEIGHT_BYTES * slots] if work.trains else []
    rows = work.tokens * max(met_ranks(model, layout.expert)) * work.imbalance
    if layout.hierarchical:
        node_rows = work.tokens * max(met_ranks(model, group.nodes)) * work.imbalance
    for nbytes in messages:
        if layout.hierarchical:
            seconds = cluster.all_to_all(group, rows * nbytes, node_nbytes=node_rows * nbytes)
            sent = nbytes * ((group.nodes - 1) * node_rows + (group.local - 1) * group.nodes * rows)
        else:
            seconds = cluster.all_to_all(group, rows * nbytes)
            sent = nbytes * (layout.expert - 1) * rows
        tally.add("rows", seconds, sent, model.moe_layers)
    by_node = group.local * SIZE_BYTES if layout.hierarchical else None
    tally.add("rows", cluster.all_to_all(group, SIZE_BYTES, node_nbytes=by_node), 0.0, model.moe_layers)


def _add_tensor(tally: _Tally, model: Model, cluster: Cluster, work: Workload, layout: Layout) -> None:
    """Add the sums over the devices that split a product; these hold the tokens of all of those devices."""
    group, degree = cluster.group(layout.tensor), layout.tensor
    nbytes = float(work.tokens * degree * model.hidden * work.nbytes)
    reduce, sent = cluster.all_reduce(group, nbytes), 2 * nbytes * (degree - 1) / degree
    # Each pass has one sum after attention and one after the feed-forward layer; training has two passes.
    passes = 2 if work.trains else 1
    tally.add("tensor", reduce, sent, passes * model.layers)
    dense_layers = model.layers - model.moe_layers
    if layout.expert > 1:
        # The devices exchange rows of disjoint slices of their tokens, and gather the slices afterwards.
        gather = cluster.all_gather(group, nbytes)
        tally.add("tensor", gather, nbytes * (degree - 1) / degree, passes * model.moe_layers)
        layers = dense_layers + (model.moe_layers if model.shared_width else 0)
    else:
        layers = model.layers
    tally.add("tensor", reduce, sent, passes * layers)
    # The forward pass also sums the embedding, whose rows are split, and the backward pass the gradient of the head's
    # input.
    tally.add("tensor", reduce, sent, passes)


def _add_copies(tally: _Tally, model: Model, cluster: Cluster, work: Workload, layout: Layout, held: _Held) -> None:
    """Add sums of gradients over copies; with sharding, parameters gathered for each pass and gradients scattered."""
    whole, layers = (held.dense, held.experts), (model.layers, model.moe_layers)
    for parameters, count, (copies, stride) in zip(whole, layers, _copied(layout), strict=True):
        if copies == 1:
            continue
        split = shards(cluster, layout, copies, stride)
        nbytes = parameters * work.nbytes / count
        if split > 1:
            group, sent = cluster.group(split, stride), nbytes * (split - 1) / split
            gathers = 2 if work.trains else 1
            tally.add("parameters", cluster.all_gather(group, nbytes), sent, gathers * count)
            if work.trains:
                tally.add("gradients", cluster.reduce_scatter(group, nbytes), sent, count)
        if split < copies and work.trains:
            # A device sums its part over the other nodes; or everything, if nothing is split.
            part, rest = nbytes / split, copies // split
            reduce = cluster.all_reduce(cluster.group(rest, stride * split), part)
            tally.add("gradients", reduce, 2 * part * (rest - 1) / rest, count)


def activation_elements(model: Model, layout: Layout) -> tuple[float, float]:
    """Elements per token that a layer with experts keeps for the backward pass: not split, and split by ``tensor``.

    Input and output of the norms before attention and experts (4 H); queries, keys and values and the result of
    attention; the pre-activations of K experts and of the shared one.
    """
    attention = model.attention
    heads = attention.heads * (attention.key_width + attention.value_width)
    heads += attention.kv_heads * (attention.key_width + attention.value_width)
    shared = 2.0 * model.shared_width
    experts = 2.0 * model.top_k * model.intermediate
    if layout.expert > 1:
        # The rows received, and the pre-activations of a device's share of all tokens.
        rows = sum(met_ranks(model, layout.expert)) * model.hidden
        return 4.0 * model.hidden + (experts + rows) / layout.tensor, heads + shared
    return 4.0 * model.hidden, heads + shared + experts


def _memory(model: Model, work: Workload, layout: Layout, held: _Held) -> dict[str, float]:
    kept = sum(held.kept)
    memory = {"parameters": kept * work.nbytes}
    if layout.shard != "none":
        # The layer being computed and the next one are held whole.
        layer = held.dense / model.layers + held.experts / model.moe_layers
        memory["gathered"] = 2 * layer * work.nbytes
    whole, split = activation_elements(model, layout)
    tokens = work.tokens * layout.tensor
    layer = tokens * (whole + split / layout.tensor) * work.nbytes
    if not work.trains:
        memory["activations"] = layer
        return memory
    memory["gradients"] = kept * work.nbytes
    memory["optimizer"] = kept * work.state_bytes
    if work.checkpoint:
        memory["activations"] = layer + model.layers * tokens * model.hidden * work.nbytes
    else:
        memory["activations"] = layer * model.layers
    # Logits in the dtype and their float32 gradient.
    memory["logits"] = tokens * model.vocabulary / layout.tensor * (work.nbytes + 4)
    return memory


def plan(model: Model, cluster: Cluster, work: Workload, rates: ModelRates) -> list[Cost]:
    """All layouts of a model, sorted: first those that fit, then by time, and among equals by bytes sent."""
    costs = [price(model, cluster, work, rates, layout) for layout in layouts(model, cluster)]
    return sorted(costs, key=lambda cost: (not cost.fits(cluster), cost.step, sum(cost.sent.values())))


def growth(model: Model, cluster: Cluster, work: Workload, rates: ModelRates, most: int = 4096) -> list[dict]:
    """The best layout of each strategy at 1, 2, 4, ... ``most`` devices, with the same tokens on every device.

    If no layout of a strategy fits, its layout with the least memory is given, and ``fits`` is false.
    """
    return grown(cluster, lambda resized: plan(model, resized, work, rates), lambda c: c.layout.strategy, most)


def grown(
    cluster: Cluster, planned: Callable[[Cluster], list], strategy: Callable[[object], str], most: int
) -> list[dict]:
    """The best of each strategy at 1, 2, 4, ... ``most`` devices, as plain values."""
    found, devices = [], 1
    while devices <= most:
        if devices <= cluster.per_node or (devices % cluster.per_node == 0 and cluster.inter is not None):
            resized = cluster.resized(devices)
            best: dict[str, object] = {}
            for cost in planned(resized):
                kind = strategy(cost)
                if kind not in best or (not cost.fits(resized) and cost.total_memory < best[kind].total_memory):
                    best[kind] = cost
            found += [
                {"devices": devices, "strategy": kind, "fits": cost.fits(resized), **as_json(cost)}
                for kind, cost in best.items()
            ]
        devices *= 2
    return found


def as_json(cost) -> dict:
    """A cost as plain values."""
    return {
        "layout": str(cost.layout),
        "step_seconds": cost.step,
        "seconds": cost.seconds,
        "memory_bytes": cost.total_memory,
        "memory": cost.memory,
        "sent_bytes": sum(cost.sent.values()),
        "sent": cost.sent,
    }
