"""Contract suites: tests that every implementation of a role must pass.

One line in an implementation's own test file, with a name that begins with ``Test``, applies the whole suite::

    TestMyRouter = RouterContract.over(name=lambda num_experts, hidden_size, **factory: MyRouter(...))
"""

from contracts.base import (
    assert_gradients,
    assert_near,
    differences,
    functional,
    hidden_states,
    parameters,
    sum_of_slots,
    token_ids,
)
from contracts.experts import ExpertsContract, random_routing
from contracts.routers import LogitsContract, RouterContract
from contracts.schedules import ScheduleContract
from contracts.tables import TableContract, TrainedTableContract, bag_lists

__all__ = [
    "ExpertsContract",
    "LogitsContract",
    "RouterContract",
    "ScheduleContract",
    "TableContract",
    "TrainedTableContract",
    "assert_gradients",
    "assert_near",
    "bag_lists",
    "differences",
    "functional",
    "hidden_states",
    "parameters",
    "random_routing",
    "sum_of_slots",
    "token_ids",
]
