"""The cases that the processes of tests/parallel/test_tables.py run: sharded tables against one process."""

import copy

import processes
import torch
import torch._inductor.lowering  # compiling imports this in each process otherwise
import torch.distributed as dist
from processes import all_ranks_raise as raises
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import gossamer
from gossamer.nn import DynamicEmbedding, Embedding, EmbeddingBag, TableBatchedEmbeddingBags
from gossamer.optim import FTRL, LAMB, SGD, Adagrad, Adam, AdamW, PartialRowwiseAdam, RowwiseAdagrad
from gossamer.parallel import count_traffic, lookup, measure_lookups, shard_tables

N, D = 37, 16
# Examples of each rank: unequal, and none.
EXAMPLES = (5, 0, 3, 1)


def mesh():
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tables",))


def sizes():
    return EXAMPLES[: dist.get_world_size()]


def ids_of(rank, step, rows=N, most=6, features=1):
    """Bags of a rank as (ids, offsets), feature-major; half of the ids are among the first three rows."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    lengths = torch.randint(0, most, (features * sizes()[rank],), generator=generator)
    total = int(lengths.sum())
    ids = torch.randint(0, rows, (total,), generator=generator)
    ids = torch.where(torch.rand(total, generator=generator) < 0.5, ids % 3, ids)
    return ids, torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


def join(parts, features=1):
    """The joined batch of (ids, offsets) of all ranks."""
    ids, lengths = [], []
    for feature in range(features):
        for own, offsets in parts:
            each = (len(offsets) - 1) // features
            ends = offsets[feature * each : (feature + 1) * each + 1]
            ids.append(own[ends[0] : ends[-1]])
            lengths.append(ends.diff())
    lengths = torch.cat(lengths)
    return torch.cat(ids), torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


def factors(rows, columns, step):
    """The factors of the results in the loss; they depend only on column f and row b, so each rank knows its own."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(step))


def mine(joined, features=1):
    """Return this rank's rows of the joined results."""
    begin = sum(sizes()[: dist.get_rank()])
    return joined[begin : begin + sizes()[dist.get_rank()]]


def whole(shard, name="weight"):
    """A tensor of the whole table, joined from the parts of all ranks."""
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, (shard.piece, getattr(shard, name).detach()))
    split = shard.split
    if split.kind in ("replicate", "table"):
        # Replicas have the same bits.
        whole = [part for piece, part in parts if piece.numel]
        assert all(torch.equal(part, whole[0]) for part in whole)
        return whole[0]
    full = parts[0][1].dim() == 2
    if split.kind == "column" and not full:
        assert all(torch.equal(part, parts[0][1]) for _, part in parts)
        return parts[0][1]
    return torch.cat([part for _, part in parts], 1 if split.kind == "column" else 0)


def same(found, expected, exact, what):
    if exact:
        assert torch.equal(found, expected), f"{what}: {(found - expected).abs().max()}"
    else:
        torch.testing.assert_close(found, expected, msg=lambda m: f"{what}: {m}")


def compare(make, kind, exact=True, steps=3, gradients="sum", weighted=False, single=False, **batch):
    """Check that steps of a sharded layer give one process's results and table; ``single`` ids have no bags."""
    rank, world = dist.get_rank(), dist.get_world_size()
    reference = make()
    sharded = shard_tables(nn.ModuleDict({"t": make()}), mesh(), {"t": kind}, gradients=gradients)["t"]
    what = f"{type(reference).__name__} by {kind}, {getattr(reference, 'mode', '')} {reference.optimizer}"
    for step in range(steps):
        parts = [ids_of(r, step, **batch) for r in range(world)]
        ids, offsets = join(parts)
        own_ids, own_offsets = parts[rank]
        first = sum(len(own) for own, _ in parts[:rank])
        own = slice(first, first + len(own_ids))
        rows = own if single else slice(sum(sizes()[:rank]), sum(sizes()[: rank + 1]))
        weights = own_weights = ()
        if weighted:
            every = torch.rand(len(ids), generator=torch.Generator().manual_seed(step))
            weights, own_weights = (every.clone().requires_grad_(),), (every[own].clone().requires_grad_(),)
        expected = reference(*((ids,) if single else (ids, offsets)), *weights)
        found = sharded(*((own_ids,) if single else (own_ids, own_offsets)), *own_weights)
        same(found.detach(), expected.detach()[rows], exact or step == 0, f"{what}: results of step {step}")
        c = factors(*expected.shape, step)
        (expected * c).sum().backward()
        loss = (found * c[rows]).sum()
        (loss * world if gradients == "mean" else loss).backward()
        if weighted:
            same(own_weights[0].grad, weights[0].grad[own], exact or step == 0, f"{what}: weights of step {step}")
    if reference.optimizer is None:
        sharded.gradient = sharded.weight.grad
        same(whole(sharded, "gradient"), reference.weight.grad, exact, f"{what}: gradient")
        return
    same(whole(sharded), reference.weight.detach(), exact, what)
    for name in reference.optimizer.state_kinds():
        same(whole(sharded, f"optimizer_{name}"), getattr(reference, f"optimizer_{name}"), exact, f"{what}: {name}")
    assert int(sharded.optimizer_step) == steps


def bag(mode="mean", optimizer=None, **options):
    def make():
        torch.manual_seed(0)
        return EmbeddingBag(N, D, mode=mode, include_last_offset=True, optimizer=optimizer, **options)

    return make


ADAGRAD = RowwiseAdagrad(lr=0.3, initial_accumulator=0.01)


def rows_and_whole_tables_have_the_bits_of_one_process():
    for kind in ("row", "table", "replicate"):
        for optimizer in (SGD(lr=0.5), ADAGRAD, Adam(lr=0.1), LAMB(lr=0.1), FTRL(lr=0.3)):
            compare(bag("sum", optimizer), kind)
        for mode in ("mean", "max"):
            compare(bag(mode, ADAGRAD), kind)
        compare(bag("mean", ADAGRAD, padding_idx=2), kind)
        compare(bag("sum", ADAGRAD), kind, weighted=True)
        compare(bag("sum", ADAGRAD), kind, gradients="mean")
        compare(bag("sum", ADAGRAD, scale_grad_by_freq=True), kind)
        # Runs of one row that the kernel sums in pieces.
        compare(bag("sum", ADAGRAD), kind, steps=1, rows=2, most=200)


def columns_learn_by_whole_rows():
    for optimizer in (SGD(lr=0.5), Adagrad(lr=0.3), AdamW(lr=0.1), FTRL(lr=0.3)):
        compare(bag("sum", optimizer), "column")
    for mode in ("sum", "mean", "max"):
        for optimizer in (ADAGRAD, PartialRowwiseAdam(lr=0.1), LAMB(lr=0.1), SGD(lr=0.5, clip_norm=0.5)):
            compare(bag(mode, optimizer), "column", exact=False)
    compare(bag("sum", ADAGRAD), "column", exact=False, weighted=True)
    compare(bag("max", SGD(lr=0.5)), "column")


def lookups_without_pooling():
    def make(optimizer):
        torch.manual_seed(0)
        return Embedding(N, D, padding_idx=1, optimizer=optimizer)

    for kind in ("row", "table", "replicate", "column"):
        for optimizer in (Adam(lr=0.1), ADAGRAD):
            exact = kind != "column" or optimizer is not ADAGRAD
            compare(lambda optimizer=optimizer: make(optimizer), kind, exact, single=True)


def parts_get_the_gradient_of_the_whole_batch():
    for kind in ("row", "table", "replicate", "column"):
        for mode in ("sum", "mean", "max"):
            compare(bag(mode), kind, steps=1, exact=False)
        compare(bag("sum"), kind, steps=1, exact=False, weighted=True)
        compare(bag("sum", max_norm=1.0), kind, steps=1, exact=False) if kind in ("row", "table") else None


SPECS, MAP, POOLING = [(N, 16), (11, 8), (5, 4)], [0, 1, 0, 2], ["sum", "mean", "sum"]


def batched(optimizer, **options):
    torch.manual_seed(0)
    return TableBatchedEmbeddingBags(SPECS, MAP, pooling=POOLING, optimizer=optimizer, **options)


def tables_behind_one_lookup():
    rank, world = dist.get_rank(), dist.get_world_size()
    kinds = ("row", "table", "column", "replicate")
    for index in range(4):
        exact = True
        for options in ({}, {"bounds": "drop"}, {"bounds": "clamp", "weights_dtype": torch.bfloat16}):
            reference = batched(Adam(lr=0.1), **options)
            plan = {f"t.{table}": kinds[(index + table) % 4] for table in range(3)}
            sharded = shard_tables(
                nn.ModuleDict({"t": batched(Adam(lr=0.1), **options)}), mesh(), plan, gradients="sum"
            )
            sharded = sharded["t"]
            for step in range(2):
                # Some ids are outside the smaller tables, where the mode takes them.
                most = 13 if options else 5
                parts = [ids_of(r, step, rows=most, features=4) for r in range(world)]
                joined = join(parts, 4)
                weights = torch.rand(len(joined[0]), generator=torch.Generator().manual_seed(step))
                given = weights_of(parts, weights, rank)
                expected, found = reference(*joined, weights), sharded(*parts[rank], given)
                assert torch.equal(found, mine(expected)), (plan, options, step)
                c = factors(*expected.shape, step).to(expected.dtype)
                (expected * c).sum().backward()
                (found * mine(c)).sum().backward()
            for table, shard in enumerate(sharded.tables):
                what = f"table {table} {plan} {options}"
                same(whole(shard), reference.split_embedding_weights()[table], exact, what)
                for name, state in reference.split_optimizer_states()[table].items():
                    same(whole(shard, f"optimizer_{name}"), state, exact, f"{what} {name}")
            if options:
                count = sharded.bounds_count.clone()
                dist.all_reduce(count)
                assert torch.equal(count, reference.bounds_count) and (count > 0 or not options)
            ids = torch.arange(4).view(2, 2)
            assert torch.equal(sharded.lookup(ids, 1), reference.lookup(ids, 1))


def weights_of(parts, joined, rank):
    """Return this rank's weights, feature-major, of the joined ones, which are ordered by feature, then by rank."""
    pieces, at = [], 0
    for feature in range(4):
        for other, (_, offsets) in enumerate(parts):
            each = (len(offsets) - 1) // 4
            count = int(offsets[(feature + 1) * each] - offsets[feature * each])
            pieces += [joined[at : at + count]] if other == rank else []
            at += count
    return torch.cat(pieces)


def one_exchange_serves_all_tables():
    """A step takes four collectives; each distinct id and row, and each bag's gradient, travels once per rank."""
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    names = ("a", "b", "c")
    tables = nn.ModuleDict({name: EmbeddingBag(N, D, mode="sum", optimizer=ADAGRAD) for name in names})
    shard_tables(tables, mesh(), {"a": "row", "b": "row", "c": "table"})
    ids = torch.tensor([[3, 3, 20], [20, 3, 36]])
    with count_traffic() as traffic:
        out = lookup(tables, dict.fromkeys(names, ids))
        torch.cat(list(out.values()), 1).sum().backward()
    assert list(out) == list(names)
    assert traffic.collectives == 4, str(traffic)
    row, others = 4 * D, [r for r in range(world) if r != rank]
    piece = [tables["a"].split.piece(r) for r in range(world)]
    # The ids that other ranks requested from this one, and those that it requested from them.
    distinct = [[i for i in (3, 20, 36) if p.row <= i < p.row + p.rows] for p in piece]
    bags = [sum(any(int(i) in have for i in bag) for bag in ids) for have in distinct]
    sums = 2 * row
    rows = 2 * row * len(distinct[rank]) * len(others) + (sums * len(others) if rank == tables["c"].split.owner else 0)
    assert traffic.flows["table rows"].nbytes == rows + 8 * len(others)
    gradients = 2 * row * sum(bags[r] for r in others) + (sums if rank != tables["c"].split.owner else 0)
    assert traffic.flows["table gradients"].nbytes == gradients
    # A frozen table beside one that learns.
    tables["b"].freeze()
    out = lookup(tables, dict.fromkeys(names, ids))
    assert out["a"].requires_grad and out["c"].requires_grad and not out["b"].requires_grad
    before = [whole(tables[name]).clone() for name in names]
    (out["a"] + out["c"]).sum().backward()
    assert [torch.equal(whole(tables[name]), old) for name, old in zip(names, before, strict=True)] == [0, 1, 0]


def bad_input_is_an_error_on_every_rank():
    rank, world = dist.get_rank(), dist.get_world_size()

    def model(rows=N, columns=D, **options):
        return nn.ModuleDict({"t": EmbeddingBag(rows, columns, **options), "u": nn.Linear(2, 2)})

    raises(ValueError, "mesh must have the dimension 'rows', got", shard_tables, model(), mesh(), dim="rows")
    raises(TypeError, "mesh must be a", shard_tables, model(), None)
    raises(ValueError, "got nothing for ['t']", shard_tables, model(), mesh(), {})
    raises(ValueError, "got ['u']", shard_tables, model(), mesh(), {"t": "row", "u": "row"})
    raises(ValueError, "plan['t'] must be one of", shard_tables, model(), mesh(), {"t": "rows"})
    raises(ValueError, "plan must be 'auto'", shard_tables, model(), mesh(), "row")
    raises(TypeError, "plan must be a str", shard_tables, model(), mesh(), 3)
    raises(ValueError, f"over {world} ranks, which are more", shard_tables, model(rows=1), mesh(), {"t": "row"})
    raises(ValueError, "would get none", shard_tables, model(columns=1), mesh(), {"t": "column"})
    raises(ValueError, "with max_norm", shard_tables, model(max_norm=1.0), mesh(), {"t": "column"})
    raises(ValueError, "gradients must be one of", shard_tables, model(), mesh(), gradients="average")
    raises(ValueError, "must have a table", shard_tables, nn.Linear(2, 2), mesh())
    raises(ValueError, "for the mesh's", shard_tables, model(), mesh(), gossamer.parallel.plan_tables(model(), 7))
    mixed = nn.ModuleDict({"t": EmbeddingBag(N, D), "m": EmbeddingBag(N, D, device="meta")})
    raises(ValueError, "all tables on one device", shard_tables, mixed, mesh())

    class Own(EmbeddingBag):
        def forward(self, ids):
            return super().forward(ids % 3)

    raises(ValueError, "has a forward or lookup of its own", shard_tables, nn.ModuleDict({"t": Own(N, D)}), mesh())
    # Errors on a single rank.
    last = rank == world - 1
    raises(ValueError, f"rank {world - 1}: plan['t']", shard_tables, model(), mesh(), {"t": "rows" if last else "row"})
    raises(ValueError, "must be the same on all ranks", shard_tables, model(rows=N + last), mesh())
    table = shard_tables(model(), mesh(), {"t": "row"})["t"]
    good = torch.tensor([[0, 1]])
    raises(IndexError, f"rank {world - 1}: input must be in [0, N)", table, good + N * last)
    raises(TypeError, f"rank {world - 1}: input must be int32 or int64", table, good.float() if last else good)
    assert torch.isfinite(table(good)).all()
    with torch.set_grad_enabled(not last):
        try:
            table(good)
        except ValueError as error:
            assert "looked up alike" in str(error)
        else:
            raise AssertionError("ranks differ in what they look up")


def compiled_models_break_at_tables():
    """A compiled model takes the same steps, also under DistributedDataParallel."""
    rank = dist.get_rank()
    results = []
    for wrap in (lambda model: model, lambda model: torch.compile(model, backend="eager"), DistributedDataParallel):
        torch.manual_seed(0)
        table = EmbeddingBag(N, D, mode="sum", optimizer=ADAGRAD)
        model = shard_tables(nn.Sequential(table, nn.Linear(D, 3)), mesh(), {"0": "row"})
        wrapped = wrap(model)
        for step in range(2):
            out = wrapped(torch.arange(6).view(2, 3) + rank + step)
            out.square().mean().backward()
        results.append((out.detach(), model[0].weight.detach()))
    for out, weight in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(weight, results[0][1])


def tables_that_no_process_could_hold():
    """Parts of tables on the meta device are created in place; rows of all ranks differ, replicas do not."""
    for kind in ("row", "column", "table", "replicate"):
        with torch.device("meta"):
            bags = EmbeddingBag(N, D, mode="sum", optimizer=ADAGRAD, padding_idx=3)
            many = TableBatchedEmbeddingBags([(N, 8), (9, 8)], optimizer=ADAGRAD)
        model = nn.ModuleDict({"bag": bags, "many": many, "free": DynamicEmbedding(8, 400, device="meta")})
        kinds = {"bag": kind, "many": kind, "free": "row"}
        shard_tables(model, mesh(), kinds)
        assert model["bag"].weight.is_meta and model["free"].device.type == "cpu"
        torch.manual_seed(dist.get_rank())
        model.to_empty(device="cpu")
        for layer in (model["bag"], model["many"]):
            layer.reset_parameters()
        table, second = whole(model["bag"]), whole(model["many"].tables[0])
        assert table.shape == (N, D) and not table[3].any()
        assert len(table.unique(dim=0)) == N and len(table.unique(dim=1).T) == D
        assert 0.8 < table.std() < 1.2 and 0 < second.abs().max() <= N**-0.5
        assert (whole(model["bag"], "optimizer_sum") == 0.01).all()
        copied = copy.deepcopy(model)
        out = model["bag"](torch.tensor([[1, 2]]))
        assert torch.equal(out[0], table[1] + table[2])
        out.sum().backward()
        assert torch.equal(whole(copied["bag"]), table) and not torch.equal(whole(model["bag"]), table)


def what_ranks_count_is_added_up():
    """Each rank uses a different table most; all make the same plan."""
    tables = nn.ModuleDict({name: EmbeddingBag(64, 8, mode="sum") for name in "abcd"})
    with measure_lookups(tables) as lookups:
        for index, name in enumerate("abcd"):
            tables[name](torch.arange(60 if index % 4 == dist.get_rank() else 2).view(1, -1))
    shard_tables(tables, mesh(), lookups=lookups)
    plans = [None] * dist.get_world_size()
    dist.all_gather_object(plans, [table.split for table in tables.values()])
    assert all(plan == plans[0] for plan in plans)
    hot = [split.owner for split in plans[0][: dist.get_world_size()]]
    assert all(split.kind == "table" for split in plans[0]) and len(set(hot)) == dist.get_world_size()


CASES = (
    rows_and_whole_tables_have_the_bits_of_one_process,
    columns_learn_by_whole_rows,
    lookups_without_pooling,
    parts_get_the_gradient_of_the_whole_batch,
    tables_behind_one_lookup,
    one_exchange_serves_all_tables,
    bad_input_is_an_error_on_every_rank,
    compiled_models_break_at_tables,
    what_ranks_count_is_added_up,
    tables_that_no_process_could_hold,
)

if __name__ == "__main__":
    processes.main(CASES, timeout=60)
