"""gossamer.gather_reduce_tables and its fused steps: many tables in one storage, against one call a table."""

import pytest
import torch
from helpers import assert_same_bits, check, flat

import gossamer
from gossamer import optim
from gossamer.ops._bags import Bags
from gossamer.ops.gather_reduce import GatherDot, GatherReduce

# Odd dims, a table without rows, one read by two features, and both poolings.
SPECS = [(11, 5), (7, 33), (0, 4), (200, 16)]
FEATURES = [0, 1, 0, 2, 3]
POOLING = ["sum", "mean", "sum", "mean"]
BAGS = 4


def jagged(layout, device, index_dtype=torch.int64):
    """Random ids of BAGS bags a feature, with empty ones; none for the table without rows."""
    lists, lengths = [], []
    for table in layout.feature_table_map:
        rows = layout.specs[table][0]
        length = torch.tensor([3, 0, 5, 1]) if rows else torch.zeros(BAGS, dtype=torch.int64)
        lengths.append(length)
        lists.append(torch.randint(max(rows, 1), (int(length.sum()),)))
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), torch.cat(lengths).cumsum(0)])
    return torch.cat(lists).to(device, index_dtype), offsets.to(device, index_dtype)


def one_by_one(layout, storage, index, offsets, weights, **settings):
    """The same with one gather_reduce a feature, by the reference."""
    outs = []
    views = layout.views(storage)
    with gossamer.backend("reference"):
        for f, table in enumerate(layout.feature_table_map):
            bags = offsets[f * BAGS : (f + 1) * BAGS + 1]
            part = slice(int(bags[0]), int(bags[-1]))
            factors = None if weights is None else weights[part]
            lists = (index[part], bags - bags[0], factors)
            outs.append(gossamer.gather_reduce(views[table], *lists, mode=layout.pooling[table], **settings))
    return torch.cat(outs, 1)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_forward_and_gradients(kernel_backend, dtype, device, index_dtype):
    """Results and the gradients of storage and weights are those of one call a table."""
    layout = gossamer.TableLayout(SPECS, FEATURES, POOLING)
    index, offsets = jagged(layout, device, index_dtype)

    def function(storage, weights=None):
        with gossamer.backend(kernel_backend):
            return gossamer.gather_reduce_tables(storage, layout, index, offsets, weights)

    def reference(storage, weights=None):
        return one_by_one(layout, storage, index, offsets, weights)

    storage = torch.randn(layout.num_elements, device=device, dtype=dtype)
    weights = torch.rand(index.shape, device=device)
    check(function, reference, {"storage": storage, "weights": weights})
    check(function, reference, {"storage": storage})
    assert function(storage).shape == (BAGS, layout.total_dim) == (BAGS, 5 + 33 + 5 + 4 + 16)


@pytest.mark.parametrize(
    "optimizer",
    [optim.SGD(0.1), optim.RowwiseAdagrad(0.1), optim.PartialRowwiseAdam(0.1), optim.Adam(0.1, weight_decay=0.1)],
    ids=lambda o: type(o).__name__,
)
def test_step(kernel_backend, dtype, device, optimizer):
    """The fused step has the bits of the function, which are those of each table with all its features' bags."""
    layout = gossamer.TableLayout(SPECS, FEATURES, POOLING)
    index, offsets = jagged(layout, device)
    storage = torch.randn(layout.num_elements, device=device, dtype=dtype)
    weights = torch.rand(index.shape, device=device, requires_grad=True)
    dout = torch.randn(BAGS, layout.total_dim, device=device, dtype=dtype)
    handle = torch.zeros(0, device=device, requires_grad=True)

    fused, fused_state = storage.clone(), layout.state(optimizer, device)
    plain, plain_state = storage.clone(), layout.state(optimizer, device)
    settings = {"optimizer": optimizer}
    with gossamer.backend(kernel_backend):
        y = gossamer.gather_reduce_tables_step(
            fused, layout, index, offsets, weights, handle=handle, state=fused_state, **settings
        )
        assert torch.equal(y, gossamer.gather_reduce_tables(storage, layout, index, offsets, weights))
        y.backward(dout)
        lists = (index, dout, offsets, weights.detach())
        gossamer.sparse_update_tables_(plain, layout, *lists, state=plain_state, **settings)
    assert_same_bits({"storage": fused, **fused_state}, {"storage": plain, **plain_state})

    tables, states = layout.views(storage.clone()), layout.state(optimizer, device)
    views = {name: layout.views(states[name]) for name in optimizer.state_kinds()}
    column = 0
    found: dict[int, list] = {}
    for f, table in enumerate(layout.feature_table_map):
        bags = offsets[f * BAGS : (f + 1) * BAGS + 1]
        part = slice(int(bags[0]), int(bags[-1]))
        dim = layout.specs[table][1]
        found.setdefault(table, []).append(
            (index[part], dout[:, column : column + dim], bags[1:] - bags[0], weights.detach()[part])
        )
        column += dim
    with gossamer.backend(kernel_backend):
        for table, parts in found.items():
            ids, grads, ends, factors = zip(*parts, strict=True)
            sizes = torch.tensor([0, *(len(i) for i in ids)]).cumsum(0).tolist()
            starts = torch.cat([torch.zeros(1, dtype=torch.int64, device=device)] + [
                end + size for end, size in zip(ends, sizes[:-1], strict=True)
            ])  # fmt: skip
            state = {"step": torch.zeros(1, dtype=torch.int64, device=device)}
            state |= {name: views[name][table] for name in views}
            lists = (torch.cat(ids), torch.cat(grads), starts, torch.cat(factors))
            mode = {"mode": layout.pooling[table]}
            gossamer.sparse_update_(tables[table], *lists, state=state, optimizer=optimizer, **mode)
    for table, view in enumerate(layout.views(fused)):
        assert torch.equal(view, tables[table]), table
        for name in views:
            assert torch.equal(layout.views(fused_state[name])[table], views[name][table]), (name, table)


def test_rounding_by_linear_row(device, any_backend):
    """Stochastic rounding goes by the linear row, so that tables draw different bits; the same in every backend."""
    if any_backend == "triton" and device == "cpu":
        pytest.skip("the interpreter does not compute in bfloat16")
    layout = gossamer.TableLayout([(3, 8), (3, 8)])
    optimizer = optim.SGD(0.25, stochastic_rounding=True, seed=3)
    index, offsets = torch.tensor([0, 1, 2, 0, 1, 2], device=device), torch.arange(7, device=device)
    results = {}
    for name in ("reference", any_backend):
        storage = torch.ones(layout.num_elements, device=device).bfloat16()
        with gossamer.backend(name):
            gossamer.sparse_update_tables_(
                storage,
                layout,
                index,
                torch.full((3, 16), 2.0**-9, device=device),
                offsets,
                optimizer=optimizer,
                state=layout.state(optimizer, device),
            )
        results[name] = storage
    assert torch.equal(results["reference"], results[any_backend])
    first, second = layout.views(results[any_backend])
    assert not torch.equal(first, second) and first.unique().numel() == 2


@pytest.mark.parametrize("bounds", ["clamp", "drop"])
def test_bounds(any_backend, device, bounds):
    """Each id is held against its own table, and what is wrong is counted."""
    layout = gossamer.TableLayout([(3, 2), (5, 2)])
    storage = torch.arange(layout.num_elements, device=device).float()
    index, offsets = torch.tensor([4, 4, -1], device=device), torch.tensor([0, 1, 3], device=device)
    count = torch.zeros(1, dtype=torch.int64, device=device)
    with gossamer.backend(any_backend):
        out = gossamer.gather_reduce_tables(storage, layout, index, offsets, bounds=bounds, bounds_count=count)
    first, second = layout.views(storage)
    expected = [first[2], second[4] + second[0]] if bounds == "clamp" else [torch.zeros_like(first[0]), second[4]]
    assert torch.equal(out[0], torch.cat(expected)) and count.item() == 2


def test_layout():
    """Offsets, views and refusals of a layout."""
    layout = gossamer.TableLayout(SPECS, FEATURES, POOLING)
    assert layout.row_offsets == (0, 11, 18, 18, 218) and layout.dims == (5, 33, 5, 4, 16)
    assert all(start % 64 == 0 for start in layout.element_offsets)
    flat = torch.arange(layout.num_elements)
    assert [tuple(view.shape) for view in layout.views(flat)] == SPECS
    assert layout.views(flat)[1][0, 0] == layout.element_offsets[1]
    for arguments, message in [
        (([],), "specs must be"),
        (([(3, 0)],), "specs must be"),
        (([(3, 2)], [1]), r"feature_table_map must name tables in \[0, 1\)"),
        (([(3, 2)], None, "max"), "pooling must be one of"),
        (([(3, 2)], None, ["sum", "sum"]), "pooling must be one of"),
    ]:
        with pytest.raises(ValueError, match=message):
            gossamer.TableLayout(*arguments)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_errors(backend):
    """Each error names the argument, the rule and the value."""
    layout = gossamer.TableLayout([(3, 2), (5, 2)])
    storage = torch.zeros(layout.num_elements)
    index, offsets = torch.tensor([2, 4, 1]), torch.tensor([0, 1, 3])
    with gossamer.backend(backend):
        for change, error, message in [
            ({"index": torch.tensor([3, 4, 1])}, IndexError, r"index must be in \[0, N\) with N=3, got 3 at flat"),
            ({"index": torch.tensor([2, 5, 1])}, IndexError, r"index must be in \[0, N\) with N=5, got 5 at flat"),
            ({"offsets": torch.tensor([0, 1])}, ValueError, r"offsets must have shape \(F·B\+1,\) with F=2 features"),
            ({"offsets": torch.tensor([0, 2, 1])}, ValueError, "offsets must ascend within"),
            ({"weights": torch.tensor([1, 1, float("nan")])}, ValueError, "weights must not be NaN"),
            ({"storage": torch.zeros(5)}, ValueError, r"storage must have shape \(E,\) of the layout"),
            ({"layout": [(3, 2)]}, TypeError, "layout must be a TableLayout, got list"),
        ]:
            arguments = {"storage": storage, "layout": layout, "index": index, "offsets": offsets} | change
            with pytest.raises(error, match=message):
                gossamer.gather_reduce_tables(**arguments)


def test_operators_are_well_formed(kernel_backend, device):
    """Schemas, fake kernels, autograd registration and traceability."""
    layout = gossamer.TableLayout([(3, 2), (5, 4)])
    storage = torch.randn(layout.num_elements, device=device, requires_grad=True)
    index, offsets = torch.tensor([2, 4, 1], device=device), torch.tensor([0, 1, 3], device=device)
    weights = torch.rand(3, device=device, requires_grad=True)
    bags = Bags(index, offsets, weights, features=layout.on(storage.device))
    args = GatherReduce(storage, bags, torch.float32)
    torch.library.opcheck(torch.ops.gossamer.gather_reduce.default, flat(args, kernel_backend))
    dout = torch.randn(1, 6, device=device)
    args = GatherDot(dout, storage.detach(), bags._replace(weights=None), torch.float32)
    torch.library.opcheck(torch.ops.gossamer.gather_dot.default, flat(args, kernel_backend))
