"""The cases that the processes of tests/parallel/test_exchange.py run.

Each function is a case. Every process runs all cases, in the same order.
"""

import os

import processes
import torch
import torch.distributed as dist
from processes import all_ranks_raise

from gossamer.parallel import RowExchange, count_traffic
from gossamer.parallel.exchange import raise_together

RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])

# Rows from rank i to rank j: none from rank 0 to itself, none at all from or to the last.
SIZES = [
    [(3 * i + 5 * j) % 4 if max(i, j) < WORLD - 1 or WORLD == 2 else 0 for j in range(WORLD)] for i in range(WORLD)
]


def rows_of(rank, *tail, sizes=SIZES, dtype=torch.float32):
    """Rows whose values tell the sending and the receiving rank."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(sum(sizes[rank]), *tail, generator=generator).to(dtype)


def part_for(rows, sender, receiver, sizes=SIZES):
    begin = sum(sizes[sender][:receiver])
    return rows[begin : begin + sizes[sender][receiver]]


def expected(*tail, sizes=SIZES, dtype=torch.float32):
    """The rows that this rank receives."""
    return torch.cat([part_for(rows_of(r, *tail, sizes=sizes, dtype=dtype), r, RANK, sizes) for r in range(WORLD)])


def rows_arrive_in_order():
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.bool, torch.int8):
        for tail in ((), (3,), (2, 3), (0,)):
            rows = rows_of(RANK, *tail, dtype=dtype)
            exchange = RowExchange.of(torch.tensor(SIZES[RANK]), None, rows)
            assert exchange.sent_sizes == tuple(SIZES[RANK])
            assert exchange.received_sizes == tuple(sizes[RANK] for sizes in SIZES)
            received = exchange.send(rows)
            assert received.dtype == dtype
            assert torch.equal(received, expected(*tail, dtype=dtype))
            assert torch.equal(exchange.reversed.send(received), rows)


def several_tensors_travel_as_one_message():
    tensors = [
        rows_of(RANK, 3, dtype=torch.bfloat16),
        rows_of(RANK, dtype=torch.float64),
        (rows_of(RANK, 2) * 100).int(),
        rows_of(RANK, 5)[:, ::2],
    ]
    exchange = RowExchange.of(SIZES[RANK], None, *tensors)
    with count_traffic() as traffic:
        received = exchange.send(*tensors, label="mixed")
    assert torch.equal(received[0], expected(3, dtype=torch.bfloat16))
    assert torch.equal(received[1], expected(dtype=torch.float64))
    assert torch.equal(received[2], (expected(2) * 100).int())
    assert torch.equal(received[3], expected(5)[:, ::2])
    away = sum(SIZES[RANK]) - SIZES[RANK][RANK]
    flow = traffic.flows["mixed"]
    # 6 + 8 + 8 + 12 bytes in records of a multiple of 8.
    assert (flow.collectives, flow.rows, flow.nbytes) == (1, away, 40 * away)


def gradients_go_back():
    x = rows_of(RANK, 3).requires_grad_()
    weights = rows_of(RANK, 2, dtype=torch.float64).requires_grad_()
    ids = torch.arange(sum(SIZES[RANK]))
    with count_traffic() as traffic:
        exchange = RowExchange.of(SIZES[RANK], None, x, weights, ids)
        received, factors, places = exchange.send(x, weights, ids, label="tokens")
        assert not places.requires_grad
        y = exchange.reversed.send(received.double() * factors[:, :1] * (RANK + 1), label="outputs")
        gradient = torch.arange(y.numel(), dtype=torch.float64).view(y.shape)
        y.backward(gradient)
    ranks = torch.repeat_interleave(torch.arange(WORLD), torch.tensor(SIZES[RANK])).double().unsqueeze(1) + 1
    assert torch.equal(y, x.double() * weights[:, :1] * ranks)
    assert torch.equal(x.grad, (gradient * weights[:, :1] * ranks).float())
    by_weights = (gradient * x.double() * ranks).sum(1).detach()
    torch.testing.assert_close(weights.grad, torch.stack([by_weights, torch.zeros_like(by_weights)], 1))
    away = sum(SIZES[RANK]) - SIZES[RANK][RANK]
    assert {label: flow.rows for label, flow in traffic.flows.items()} == {
        "rows sizes": WORLD - 1,
        "tokens": away,
        "outputs": sum(sizes[RANK] for sizes in SIZES) - SIZES[RANK][RANK],
        "outputs gradient": away,
        "tokens gradient": sum(sizes[RANK] for sizes in SIZES) - SIZES[RANK][RANK],
    }
    # Ids have no gradient: 3 floats and 2 doubles.
    assert traffic.flows["tokens gradient"].nbytes == traffic.flows["tokens gradient"].rows * 32


def work_between_start_and_wait_is_differentiable():
    x = rows_of(RANK, 3).requires_grad_()
    exchange = RowExchange.of(SIZES[RANK], None, x)
    pending = exchange.start(x)
    beside = x.square()
    y = exchange.reversed.send(2 * pending.wait())
    (y + beside).sum().backward()
    torch.testing.assert_close(x.grad, 2 + 2 * x.detach())
    # A second pass over a new graph finds nothing left of the first.
    x.grad = None
    exchange.reversed.send(exchange.send(x)).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def without_gradients_nothing_goes_back():
    x = rows_of(RANK, 3).requires_grad_()
    with torch.no_grad():
        exchange = RowExchange.of(SIZES[RANK], None, x)
        assert exchange.send(x).grad_fn is None


def static_sizes_are_not_told():
    rows = torch.arange(2.0 * WORLD).view(-1, 1) + 100 * RANK
    with count_traffic() as traffic:
        received = RowExchange.static(2, None).send(rows)
    assert traffic.collectives == 1
    assert received.flatten().tolist() == [100.0 * r + 2 * RANK + i for r in range(WORLD) for i in range(2)]


def a_group_is_of_some_ranks():
    mine = [RANK // 2 * 2, RANK // 2 * 2 + 1]
    groups = [dist.new_group([first, first + 1]) for first in range(0, WORLD, 2)]
    rows = torch.tensor([10.0 * RANK, 10.0 * RANK + 1])
    received = RowExchange.of([1, 1], groups[RANK // 2], rows).send(rows)
    assert received.tolist() == [10.0 * r + RANK % 2 for r in mine]


def errors_are_the_same_everywhere():
    def wrong_on_one(**options):
        sizes = [1] * (WORLD + 1) if RANK == WORLD - 1 else [0] * WORLD
        RowExchange.of(sizes, None, **options)

    all_ranks_raise(ValueError, f"rank {WORLD - 1}: sent_sizes must have P = {WORLD} sizes", wrong_on_one)
    all_ranks_raise(ValueError, "sent_sizes must be at least 0", lambda: RowExchange.of(torch.full((WORLD,), -1), None))
    floats = torch.zeros(WORLD)
    all_ranks_raise(TypeError, "sent_sizes must hold integers", lambda: RowExchange.of(floats, None))
    dtype = torch.float64 if RANK else torch.float32
    zero = [0] * WORLD
    all_ranks_raise(
        ValueError,
        "rank 0: float32[3], rank 1: float64[3]",
        lambda: RowExchange.of(zero, None, torch.zeros(0, 3, dtype=dtype)),
    )
    all_ranks_raise(
        ValueError,
        "rank 0: float32[3], rank 1: float32[3] with gradient",
        lambda: RowExchange.of(zero, None, torch.zeros(0, 3, requires_grad=RANK > 0)),
    )
    all_ranks_raise(
        ValueError, "as many as sent_sizes add up to, 0", lambda: RowExchange.of(zero, None, torch.zeros(1, 3))
    )
    found = KeyError("lost") if RANK else None
    all_ranks_raise(RuntimeError, "rank 1: ", lambda: raise_together(found, dist.group.WORLD))
    assert raise_together(None, dist.group.WORLD, description=str(RANK)) == [str(rank) for rank in range(WORLD)]


CASES = (
    rows_arrive_in_order,
    several_tensors_travel_as_one_message,
    gradients_go_back,
    work_between_start_and_wait_is_differentiable,
    without_gradients_nothing_goes_back,
    static_sizes_are_not_told,
    a_group_is_of_some_ranks,
    errors_are_the_same_everywhere,
)

if __name__ == "__main__":
    processes.main(CASES)
