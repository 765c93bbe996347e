"""The cases that the processes of tests/parallel/test_table_checkpoints.py run: any number saves, any number loads."""

import copy
import os
import sys
from pathlib import Path

import processes
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from dynamic_table_cases import content, everywhere
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from gossamer.nn import (
    DeltaGap,
    DynamicEmbedding,
    Embedding,
    EmbeddingBag,
    FrequencyAdmission,
    TableBatchedEmbeddingBags,
)
from gossamer.optim import Adam, PartialRowwiseAdam, RowwiseAdagrad
from gossamer.parallel import (
    ShardedEmbeddingFolder,
    load_checkpoint,
    lookup,
    plan_tables,
    save_checkpoint,
    shard_tables,
)

FOLDER = Path(sys.argv[1])
ADAGRAD = RowwiseAdagrad(lr=0.3, initial_accumulator=0.01)
ADMISSION = FrequencyAdmission(2, capacity=1000)


def model(seed=0):
    torch.manual_seed(seed)
    return nn.ModuleDict(
        {
            "bag": EmbeddingBag(37, 16, mode="sum", optimizer=ADAGRAD),
            "rows": Embedding(11, 8, optimizer=Adam(lr=0.1)),
            "many": TableBatchedEmbeddingBags([(13, 8), (9, 4)], optimizer=PartialRowwiseAdam(lr=0.1)),
            "plain": EmbeddingBag(19, 8, mode="sum"),
            "dynamic": DynamicEmbedding(8, 400, optimizer=ADAGRAD, seed=3, admission=ADMISSION),
        }
    )


PLANS = (
    {"bag": "row", "rows": "table", "many.0": "column", "many.1": "row", "plain": "table", "dynamic": "row"},
    {"bag": "table", "rows": "row", "many.0": "row", "many.1": "replicate", "plain": "column", "dynamic": "table"},
    {"bag": "column", "rows": "replicate", "many": "table", "plain": "row", "dynamic": "row"},
)


def step(tables, number):
    """Take one step on the ranks' shares of the batch of this number, which is the same for any number of ranks."""
    rank, world = (tables["bag"].rank, tables["bag"].mesh.size()) if hasattr(tables["bag"], "mesh") else (0, 1)
    generator = torch.Generator().manual_seed(number)
    mine = slice(8 * rank // world, 8 * (rank + 1) // world)
    ids = torch.randint(0, 9, (8, 5), generator=generator)[mine]
    many = torch.randint(0, 9, (2, 8, 5), generator=generator)[:, mine].reshape(-1)
    dynamic = torch.randint(0, 50, (8, 5), generator=generator)[mine] * 7919
    inputs = {name: (ids,) for name in ("bag", "rows", "plain")}
    inputs |= {"many": (many, torch.arange(0, len(many) + 1, 5)), "dynamic": (dynamic,)}
    tables["dynamic"].advance_clock(number)
    out = lookup(tables, inputs)
    assert list(out) == list(inputs)
    (sum((part * part.detach().cos()).sum() for part in out.values())).backward()


def trained(steps, mesh, plan):
    tables = shard_tables(model(), mesh, plan, gradients="sum")
    for number in range(steps):
        step(tables, number)
    return tables


def assert_same(tables, expected):
    """Check that sharded tables hold the same as those of another number of ranks, including optimizer states."""
    found, wanted = whole_state(tables), whole_state(expected)
    assert found.keys() == wanted.keys(), found.keys() ^ wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name
    assert content(everywhere(tables["dynamic"].local)) == content(everywhere(expected["dynamic"].local))


def whole_state(tables):
    """The state of all tables without vocabulary rows, gathered from all ranks."""
    own = {}
    for name, tensor in tables.state_dict().items():
        if not isinstance(tensor, bytes):
            own[name] = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    every = [None] * dist.get_world_size()
    dist.all_gather_object(every, own)
    found = {}
    for other in every:
        for name, tensor in other.items():
            assert torch.equal(found.setdefault(name, tensor), tensor), name
    return found


def meshes():
    """Meshes of 4, 2 and 1 ranks; every rank is in one of each size."""
    world = dist.get_world_size()
    pairs = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("copies", "tables"))
    singles = init_device_mesh("cpu", (world, 1), mesh_dim_names=("copies", "tables"))
    return init_device_mesh("cpu", (world,), mesh_dim_names=("tables",)), pairs["tables"], singles["tables"]


def another_number_of_ranks_loads_a_checkpoint():
    """Two ranks save, four load with another plan and save, and one loads; training continues alike in each."""
    four, two, one = meshes()
    rank = dist.get_rank()
    pair = FOLDER / f"pair-{rank // 2}"
    tables = trained(2, two, PLANS[0])
    assert load_checkpoint({"tables": tables}, pair, group=two.get_group()) is None
    for number in (1, 2, 3):
        save_checkpoint(
            {"tables": tables, "at": torch.tensor([number])}, pair, info={"at": number}, group=two.get_group()
        )
    assert sorted(path.name for path in pair.glob("checkpoint-*")) == ["checkpoint-00000001", "checkpoint-00000002"]
    dist.barrier()
    other, at = shard_tables(model(seed=1), four, PLANS[1], gradients="sum"), torch.tensor([0])
    info = load_checkpoint({"tables": other, "at": at}, FOLDER / "pair-0", older=1)
    assert info == {"at": 2} and int(at) == 2
    assert_same(other, tables)
    for each in (other, tables):
        step(each, 2)
    save_checkpoint({"tables": other}, FOLDER / "all")
    alone = shard_tables(model(seed=2), one, PLANS[2])
    load_checkpoint({"tables": alone}, FOLDER / "all", group=one.get_group())
    assert_same(alone, other)
    # The admission filter has its counts, too: an id that was seen once gets a row when it is seen again.
    assert alone["dynamic"].local._filter.seen.export()[0].sort()[0].tolist() == seen_once(3)


def seen_once(steps):
    """Ids of the first batches that were seen less often than admission asks."""
    reference = model()["dynamic"]
    for number in range(steps):
        generator = torch.Generator().manual_seed(number)
        torch.randint(0, 9, (8, 5), generator=generator)
        torch.randint(0, 9, (2, 8, 5), generator=generator)
        reference(torch.randint(0, 50, (8, 5), generator=generator) * 7919)
    return reference._filter.seen.export()[0].sort()[0].tolist()


def files_of_one_process_are_loaded():
    """What one process saved with torch.save, before its tables were sharded."""
    four, _, _ = meshes()
    whole = model()
    whole["dynamic"].train()
    step(whole, 0)
    whole["plain"].zero_grad()
    state = copy.deepcopy(whole.state_dict())
    tables = shard_tables(model(seed=1), four, PLANS[0])
    missing, unexpected = tables.load_state_dict(state)
    assert not missing and not unexpected
    assert_same(tables, shard_tables(whole, four, PLANS[0]))


def folders_follow_and_resume():
    """Deltas and checkpoints of two ranks: resumed by the same, by four, and followed by one process."""
    four, two, _ = meshes()
    rank = dist.get_rank()
    path = FOLDER / f"folder-{rank // 2}"

    def layers(mesh):
        return {"d": shard_tables(nn.ModuleDict({"d": model()["dynamic"]}), mesh, {"d": "row"})["d"]}

    def train(own, numbers):
        for number in numbers:
            generator = torch.Generator().manual_seed(number)
            own["d"].advance_clock(number)
            own["d"](torch.randint(0, 80, (6, 4), generator=generator) * 7919).square().sum().backward()
            if number == 3:
                own["d"].erase(torch.arange(40) * 7919)

    own = layers(two)
    folder = ShardedEmbeddingFolder(path, own)
    assert folder.load() is None
    train(own, (0, 1))
    folder.save({"w": torch.arange(3.0)}, {"step": 2})
    follower = {"d": model()["dynamic"]}
    server = ShardedEmbeddingFolder(path, follower)
    found = server.load()
    assert found.info == {"step": 2} and torch.equal(found.tensors["w"], torch.arange(3.0))
    assert found.rows == len(follower["d"]) and server.apply_next() is None
    for numbers in ((2,), (3, 4)):
        train(own, numbers)
        dist.barrier(two.get_group())
        folder.export_delta({"w": torch.full((3,), float(numbers[-1]))}, {"step": numbers[-1]})
        dist.barrier(two.get_group())
        found = server.apply_next()
        assert found.info == {"step": numbers[-1]} and torch.equal(
            found.tensors["w"], torch.full((3,), float(numbers[-1]))
        )
    states = [None, None]
    dist.all_gather_object(states, own["d"].local._snapshot(), group=two.get_group())
    values = {}
    for tensors, _ in states:
        values |= dict(zip(tensors["table.keys"].tolist(), tensors["table.values"].tolist(), strict=True))
    follower["d"].eval()
    keys = torch.tensor(sorted(values))
    assert len(follower["d"]) == len(values)
    assert follower["d"].lookup(keys).tolist() == [values[key] for key in keys.tolist()]
    assert server.sequence == folder.sequence == 2 and server.apply_next() is None

    # The same two ranks resume, and write the same deltas again.
    again = layers(two)
    resumed = ShardedEmbeddingFolder(path, again)
    assert resumed.load().info == {"step": 2} and resumed.sequence == 0 and not resumed.resharded
    train(again, (2,))
    resumed.export_delta({"w": torch.full((3,), 2.0)}, {"step": 2})
    train(again, (3, 4))
    resumed.export_delta({"w": torch.full((3,), 4.0)}, {"step": 4})
    assert resumed._lineages == folder._lineages
    assert content_of(again, two) == content_of(own, two)
    resumed.save({"w": torch.zeros(1)}, {"step": 5})
    dist.barrier()

    # Four ranks go on from what two saved.
    wider = layers(four)
    wide = ShardedEmbeddingFolder(FOLDER / "folder-0", wider)
    assert wide.load().info == {"step": 5} and wide.resharded
    assert content(everywhere(wider["d"].local)) == content_of(again, two)
    try:
        wide.export_delta()
    except ValueError as error:
        assert "save() one first" in str(error)
    else:
        raise AssertionError("deltas of four ranks follow a checkpoint of two")
    wide.save(info={"step": 5})
    assert sorted(part.name for part in (FOLDER / "folder-0").glob("*-of-*")) == [f"{r}-of-4" for r in range(4)]
    dist.barrier()
    # A server that follows the two ranks' folder gets an error, and then loads the new checkpoint.
    if rank < 2:
        try:
            server.apply_next()
        except DeltaGap as error:
            assert "is gone" in str(error)
        else:
            raise AssertionError("the parts that were followed are gone")
        assert server.load().rows == len(content_of_all(wider)) - 1
    else:
        content_of_all(wider)


def content_of(layers, mesh):
    states = [None] * mesh.size()
    dist.all_gather_object(states, layers["d"].local._snapshot(), group=mesh.get_group())
    return content([_Layer(state) for state in states])


def content_of_all(layers):
    return content(everywhere(layers["d"].local))


class _Layer:
    def __init__(self, state):
        self._snapshot = lambda: state


def torch_saves_and_loads_the_state_dict():
    """Without a folder of ours: nested state_dicts, as torch's guide has them."""
    four, _, _ = meshes()
    tables, other = trained(2, four, PLANS[0]), shard_tables(model(seed=1), four, PLANS[1])
    dcp.save({"model": tables.state_dict(), "step": 2}, checkpoint_id=FOLDER / "plain")
    state = {"model": other.state_dict(), "step": 0}
    dcp.load(state, checkpoint_id=FOLDER / "plain")
    missing, unexpected = other.load_state_dict(state["model"])
    assert state["step"] == 2 and not missing and not unexpected
    assert_same(other, tables)


def no_rank_holds_more_than_its_share():
    """Bytes of parts with their optimizer states, counted on every rank."""
    four, _, _ = meshes()
    tables = nn.ModuleDict(
        {
            "large": EmbeddingBag(5000, 16, optimizer=Adam(lr=0.1)),
            "small": Embedding(700, 8, optimizer=ADAGRAD),
            "many": TableBatchedEmbeddingBags([(2000, 8), (300, 4), (5, 4)], optimizer=ADAGRAD),
            "dynamic": DynamicEmbedding(8, 4000, optimizer=ADAGRAD),
        }
    )
    plan = plan_tables(tables, 4)
    shard_tables(tables, four, plan)
    held = [None] * 4
    dist.all_gather_object(held, sum(table.nbytes() for table in tables.values()))
    assert max(held) <= 1.05 * sum(held) / 4, (held, str(plan))
    assert {plan.kinds["large"], plan.kinds["many.2"]} == {"row", "table"}


CASES = (
    another_number_of_ranks_loads_a_checkpoint,
    files_of_one_process_are_loaded,
    folders_follow_and_resume,
    torch_saves_and_loads_the_state_dict,
    no_rank_holds_more_than_its_share,
)

if __name__ == "__main__":
    assert "WORLD_SIZE" in os.environ
    processes.main(CASES, timeout=60)
