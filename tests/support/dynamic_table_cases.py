"""The cases that the processes of tests/parallel/test_dynamic_tables.py run: sharded tables of ids that come and go."""

import sys
from pathlib import Path

import processes
import torch
import torch.distributed as dist
from table_cases import factors, ids_of, join, mesh, mine, raises
from torch import nn

from gossamer.nn import DynamicEmbedding, FrequencyAdmission, ProbabilisticAdmission
from gossamer.ops.hash_table import HashTableFull
from gossamer.optim import Adam, RowwiseAdagrad
from gossamer.parallel import shard_tables

D = 8
ADAGRAD = RowwiseAdagrad(lr=0.3, initial_accumulator=0.01)


def dynamic(**options):
    return DynamicEmbedding(D, 400, **{"optimizer": ADAGRAD, "seed": 3} | options)


def content(layers):
    """Everything that layers hold by id: values, last use, optimizer state, and membership in the next delta."""
    found = {}
    for layer in layers:
        tensors, _ = layer._snapshot()
        for row, key in enumerate(tensors["table.keys"].tolist()):
            states = [v[row].tolist() for k, v in tensors.items() if k.startswith("optimizer.") and k[10:] != "step"]
            of = ("table.values", "last_used", "changed")
            found[key] = [tensors[name][row].tolist() for name in of] + states
        found["removed"] = sorted(found.get("removed", []) + tensors["removed"].tolist())
    return found


class Rank:
    """The snapshot of another rank's layer."""

    def __init__(self, state):
        self.state = state

    def _snapshot(self):
        return self.state


def everywhere(layer):
    """The layers of all ranks."""
    states = [None] * dist.get_world_size()
    dist.all_gather_object(states, layer._snapshot())
    return [Rank(state) for state in states]


def step(reference, sharded, number, weighted=False, rows=300):
    """Take one training step of both on the joined batch; return the rows looked up."""
    rank, world = dist.get_rank(), dist.get_world_size()
    parts = [ids_of(r, number, rows=rows, most=20) for r in range(world)]
    # Spread the ids over a wide range, as for a table without a vocabulary.
    parts = [(ids * 1_000_003 - 5_000_000, offsets) for ids, offsets in parts]
    ids, offsets = join(parts)
    weights = own_weights = None
    if weighted:
        first = sum(len(own) for own, _ in parts[:rank])
        weights = torch.rand(len(ids), generator=torch.Generator().manual_seed(number))
        own_weights = weights[first : first + len(parts[rank][0])].clone().requires_grad_()
        weights.requires_grad_()
    expected = reference(ids, offsets, weights) if reference.pooling else reference(ids)
    found = sharded(*parts[rank], own_weights) if reference.pooling else sharded(parts[rank][0])
    if reference.pooling:
        own = mine(expected)
    else:
        first = sum(len(own) for own, _ in parts[:rank])
        own = expected[first : first + len(parts[rank][0])]
    assert torch.equal(found, own), f"step {number}: {(found - own).abs().max()}"
    assert found.requires_grad == expected.requires_grad
    if not expected.requires_grad:
        return
    c = factors(*expected.shape, number)
    (expected * c).sum().backward()
    local = mine(c) if reference.pooling else c[first : first + len(parts[rank][0])]
    (found * local).sum().backward()
    if weighted:
        assert torch.equal(own_weights.grad, weights.grad[first : first + len(own_weights)])


def ids_learn_as_in_one_process():
    """The same ids, values and states as in one process, with admission, expiry and erasing, pooled in every way."""
    admissions = (None, FrequencyAdmission(3), FrequencyAdmission(3, 4096, sketch=True), ProbabilisticAdmission(2.0))
    cases = [{"pooling": pooling} for pooling in ("sum", "mean", "max", None)]
    cases += [{"pooling": "mean", "admission": admission, "expire_after": 2} for admission in admissions]
    cases += [{"pooling": "sum", "optimizer": Adam(lr=0.1)}, {"optimizer": None}, {"evict": None}]
    for options in cases:
        for kind in ("row", "table"):
            reference = dynamic(**options)
            sharded = shard_tables(nn.ModuleDict({"t": dynamic(**options)}), mesh(), {"t": kind}, gradients="sum")["t"]
            for number in range(4):
                reference.advance_clock(number)
                sharded.advance_clock(number)
                step(reference, sharded, number, weighted=options.get("pooling") == "sum")
                gone = torch.tensor([-5_000_000, 7])
                if number == 1:
                    reference.erase(gone)
                    sharded.erase(gone)
                reference.expire()
                sharded.expire()
            layers = everywhere(sharded.local)
            assert content(layers) == content([reference]), (kind, options)
            count = torch.tensor([len(sharded)])
            dist.all_reduce(count)
            assert int(count) == len(reference) > 0
            counters = [state.state[1]["counters"] for state in layers]
            total = {name: sum(each[name] for each in counters) for name in counters[0]}
            assert total == reference._snapshot()[1]["counters"], (kind, options)
            if kind == "row":
                held = [len(layer.state[0]["table.keys"]) for layer in layers]
                assert min(held) > 0.5 * len(reference) / len(layers), held
            reference.eval()
            sharded.eval()
            seen = torch.tensor([[-5_000_000, 10], [-4_999_997, 10]]) if reference.pooling else torch.tensor([5, 10])
            assert torch.equal(sharded(seen), reference(seen))
            assert torch.equal(sharded.lookup(seen), reference.lookup(seen))


def a_trained_table_is_sharded():
    """Rows, states and ages of a table that one process trained go on where they were."""
    reference, other = dynamic(pooling="mean"), dynamic(pooling="mean")
    for number in range(3):
        parts = join([ids_of(r, number, rows=300, most=20) for r in range(dist.get_world_size())])
        for layer in (reference, other):
            layer.advance_clock(number)
            layer(*parts).square().sum().backward()
    sharded = shard_tables(other, mesh(), {"": "row"}, gradients="sum")
    before = sharded.state_dict()
    assert content(everywhere(sharded.local)) == content([reference])
    for number in range(3, 5):
        step(reference, sharded, number)
    assert content(everywhere(sharded.local)) == content([reference])
    sharded.load_state_dict(before)
    assert content(everywhere(sharded.local)) == content([other])
    sharded.load_state_dict({"_extra_state": reference.get_extra_state()})
    assert content(everywhere(sharded.local)) == content([reference])


def a_full_shard_is_an_error_on_every_rank():
    """If one rank's shard is full, no rank waits for it."""
    world = dist.get_world_size()
    full = shard_tables(DynamicEmbedding(D, 4 * world, evict=None, optimizer=ADAGRAD), mesh(), {"": "table"})
    ids = torch.arange(5 * world).view(1, -1)
    raises(HashTableFull, "the table is full", full, ids)
    assert len(full) == 0
    full(ids[:, :3]).sum().backward()
    assert len(full) == 3 * (full.split.owner == dist.get_rank())
    raises(ValueError, "plan[''] must be one of ('row', 'table')", shard_tables, dynamic(), mesh(), {"": "column"})


def the_click_example_steps_as_one_process():
    """A DLRM's tables have the bits of one process that trains on the joined batch; its dense layers are rounded."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
    from ctr_model import FEATURES, Settings, Trainer

    sizes = {"batch": 64, "dim": 16, "capacity": 4000, "threshold": 2, "expire_after": 50}
    settings = Settings("dynamic", **sizes, size=0.05, pace=1.0, lr=5e-3, embedding_lr=0.4, seed=0, device="cpu")
    for plan in ("row", "table"):
        one, shared = Trainer(settings), Trainer(settings, mesh(), plan)
        one.step = shared.step = 3
        for trainer in (one, shared):
            for table in trainer.dynamic.values():
                # Rows for all, so that one step trains them.
                own = getattr(table, "local", table)
                own._filter.threshold = 1
            trainer.train_step()
        for name in FEATURES:
            expected = content([one.dynamic[name]])
            assert content(everywhere(shared.dynamic[name].local)) == expected and len(expected) > 30, (plan, name)
        for name, parameter in one.dense.items():
            torch.testing.assert_close(shared.dense[name], parameter)
        assert one.measured[0][4:] == shared.measured[0][4:] and one.measured[0][0] == shared.measured[0][0]
        assert shared.parts["table rows"][1] > 0 and shared.parts["step"][0] > 0


CASES = (
    the_click_example_steps_as_one_process,
    ids_learn_as_in_one_process,
    a_trained_table_is_sharded,
    a_full_shard_is_an_error_on_every_rank,
)

if __name__ == "__main__":
    processes.main(CASES, timeout=60)
