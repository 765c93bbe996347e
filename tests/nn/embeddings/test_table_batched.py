"""gossamer.nn.TableBatchedEmbeddingBags against one torch.nn.EmbeddingBag a feature."""

import copy
from dataclasses import dataclass

import pytest
import torch

import gossamer
from gossamer.nn import TableBatchedEmbeddingBags
from gossamer.optim import SGD, Adam, RowwiseAdagrad

# Odd dims, a table without rows, one that two features read, and one that none does.
SPECS = [(20, 8), (30, 33), (0, 4), (10, 16), (7, 5)]
MAP = [0, 1, 0, 2, 3]
POOLING = ["sum", "mean", "sum", "mean", "sum"]
BATCH = 5


@dataclass
class KeyedJagged:
    """What is used of TorchRec's KeyedJaggedTensor."""

    names: list
    ids: torch.Tensor
    ends: torch.Tensor
    weights: torch.Tensor | None
    batch: int

    def keys(self):
        return self.names

    def values(self):
        return self.ids

    def offsets(self):
        return self.ends

    def weights_or_none(self):
        return self.weights

    def stride(self):
        return self.batch


def draw(device, index_dtype=torch.int64):
    """Ids and offsets of every feature's bags, empty ones among them."""
    lengths = torch.randint(0, 4, (len(MAP), BATCH))
    lengths[3] = 0
    lengths[1, 2] = 12
    ids = [torch.randint(max(SPECS[t][0], 1), (int(n.sum()),)) for t, n in zip(MAP, lengths, strict=True)]
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.flatten().cumsum(0)])
    return torch.cat(ids).to(device, index_dtype), offsets.to(device, index_dtype)


def separately(tables, index, offsets, weights):
    """The same by one bag a feature, differentiable in the tables."""
    columns = []
    for f, table in enumerate(MAP):
        ends = offsets[f * BATCH : (f + 1) * BATCH + 1]
        ids = index[ends[0] : ends[-1]]
        part = None if weights is None else weights[ends[0] : ends[-1]]
        if not ids.numel():
            columns.append(tables[table].new_zeros(BATCH, SPECS[table][1]))
            continue
        total = torch.nn.functional.embedding_bag(
            ids, tables[table], ends - ends[0], mode="sum", per_sample_weights=part, include_last_offset=True
        )
        mean = POOLING[table] == "mean"
        columns.append(total / (ends[1:] - ends[:-1]).clamp(min=1).unsqueeze(1) if mean else total)
    return torch.cat(columns, 1)


def make(device, **options):
    """The module, and leaves that copy its tables."""
    torch.manual_seed(1)
    module = TableBatchedEmbeddingBags(SPECS, MAP, pooling=POOLING, device=device, **options)
    return module, [t.clone().requires_grad_() for t in module.split_embedding_weights()]


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_forward_and_gradients(kernel_backend, device, index_dtype):
    """Mixed dims and poolings, shared and empty tables: the result, and the gradients of tables and weights."""
    module, tables = make(device)
    index, offsets = draw(device, index_dtype)
    weights = [torch.rand(index.shape, device=device, requires_grad=True) for _ in range(2)]
    weights[1].data.copy_(weights[0].data)
    with gossamer.backend(kernel_backend):
        out = module(index, offsets, weights[0])
        dout = torch.randn_like(out)
        out.backward(dout)
        torch.testing.assert_close(module(index, offsets), separately(tables, index, offsets, None))
    expected = separately(tables, index, offsets, weights[1])
    expected.backward(dout)
    assert out.shape == (BATCH, module.layout.total_dim)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(weights[0].grad, weights[1].grad)
    for actual, table in zip(module.layout.views(module.weights.grad), tables, strict=True):
        torch.testing.assert_close(actual, torch.zeros_like(table) if table.grad is None else table.grad)


@pytest.mark.parametrize(
    "optimizer", [SGD(lr=0.2), Adam(lr=0.1), RowwiseAdagrad(lr=0.2)], ids=lambda o: type(o).__name__
)
def test_fused_step(kernel_backend, device, optimizer):
    """One step a row in the backward pass, a shared table's features summed first; untouched rows keep their bits."""
    module, tables = make(device, optimizer=optimizer)
    index, offsets = draw(device)
    before = [t.detach().clone() for t in tables]
    states = [optimizer.state(*t.shape, device) for t in tables]
    out = separately(tables, index, offsets, None)
    dout = torch.randn_like(out)
    out.backward(dout)
    with gossamer.backend(kernel_backend):
        module(index, offsets).backward(dout)
    assert module.weights.grad is None and int(module.optimizer_step) == 1
    for t, (table, state) in enumerate(zip(tables, states, strict=True)):
        actual = module.split_embedding_weights()[t]
        features = [f for f, m in enumerate(MAP) if m == t]
        spans = [slice(int(offsets[f * BATCH]), int(offsets[(f + 1) * BATCH])) for f in features]
        rows = torch.cat([index[s] for s in spans]).unique() if spans else index[:0]
        untouched = torch.ones(table.shape[0], dtype=torch.bool).index_fill(0, rows.cpu(), False)
        assert torch.equal(actual[untouched], before[t][untouched])
        if rows.numel():
            expected = before[t].clone()
            gossamer.sparse_update_(expected, rows, table.grad[rows], optimizer=optimizer, state=state)
            torch.testing.assert_close(actual, expected)
            for name, part in module.split_optimizer_states()[t].items():
                torch.testing.assert_close(part, state[name])


def test_keyed_jagged_tensor(device):
    """TorchRec's input by its methods; the wrong keys, and a batch size of each key's own, are refused."""
    names = ["a", "b", "c", "d", "e"]
    module, _ = make(device, feature_names=names)
    index, offsets = draw(device)
    weights = torch.rand(index.shape, device=device)
    keyed = KeyedJagged(names, index, offsets, weights, BATCH)
    assert torch.equal(module(keyed), module(index, offsets, weights))
    for change, message in (
        ({"names": names[::-1]}, "keys"),
        ({"batch": BATCH - 1}, "one batch size"),
    ):
        with pytest.raises(ValueError, match=message):
            module(KeyedJagged(**(vars(keyed) | change)))
    with pytest.raises(ValueError, match="beside a KeyedJaggedTensor"):
        module(keyed, offsets)
    with pytest.raises(TypeError, match="without keys"):
        module([1, 2])
    with pytest.raises(ValueError, match="5 keys"):
        make(device)[0](KeyedJagged(names[:2], index, offsets, None, BATCH))


def test_checkpoint(device):
    """The same bits after a state_dict; another layout of as many elements, and another optimizer, are refused."""
    index, offsets = draw(device)
    first, _ = make(device, optimizer=RowwiseAdagrad(lr=0.1))
    dout = torch.randn(BATCH, first.layout.total_dim, device=device)
    first(index, offsets).backward(dout)
    saved = {k: v.clone() for k, v in first.state_dict().items()}
    second, _ = make(device, optimizer=RowwiseAdagrad(lr=0.1))
    second.load_state_dict(saved)
    for module in (first, second, clone := copy.deepcopy(first)):
        module(index, offsets).backward(dout)
    assert torch.equal(first.weights, second.weights) and torch.equal(first.optimizer_sum, second.optimizer_sum)
    assert clone.weights.data_ptr() != first.weights.data_ptr()
    turned = TableBatchedEmbeddingBags([(8, 20), *SPECS[1:]], device=device)
    before = turned.weights.detach().clone()
    with pytest.raises(RuntimeError, match="table_specs"):
        turned.load_state_dict({k: saved[k] for k in ("weights", "table_specs")})
    assert torch.equal(turned.weights, before)
    with pytest.raises(RuntimeError, match="another optimizer's"):
        make(device, optimizer=SGD(lr=0.1))[0].load_state_dict(saved)


def test_dtypes_and_bounds(device):
    """Half tables with results in float32, state in float32; ids out of bounds clamped or dropped, and counted."""
    module, _ = make(device, weights_dtype=torch.float16, output_dtype=torch.float32, optimizer=Adam(lr=0.1))
    index, offsets = draw(device)
    out = module(index, offsets)
    tables = [t.float() for t in module.split_embedding_weights()]
    torch.testing.assert_close(out, separately(tables, index, offsets, None))
    out.sum().backward()
    assert module.weights.dtype == torch.float16 and module.optimizer_exp_avg.dtype == torch.float32
    one = [(4, 3)]
    ids, ends = torch.tensor([1, 9, -5], device=device), torch.tensor([0, 2, 3], device=device)
    for bounds, rows in (("clamp", [[1, 3], [0]]), ("drop", [[1], []])):
        small = TableBatchedEmbeddingBags(one, bounds=bounds, device=device)
        table = small.split_embedding_weights()[0]
        expected = torch.stack([table[r].sum(0) for r in rows])
        torch.testing.assert_close(small(ids, ends).detach(), expected)
        assert int(small.bounds_count) == 2
    if device == "cpu":
        with pytest.raises(IndexError):
            TableBatchedEmbeddingBags(one)(ids, ends)


def test_reset_parameters_fills_storage_that_came_without_values():
    """Tables, their specs and the optimizer's state, as in a layer that was made at once."""
    made = [
        gossamer.nn.TableBatchedEmbeddingBags([(5, 4), (7, 8)], optimizer=gossamer.optim.Adam(lr=0.1), device=where)
        for where in ("cpu", "meta")
    ]
    made[1].to_empty(device="cpu").reset_parameters()
    first, second = (layer.state_dict() for layer in made)
    assert first.keys() == second.keys()
    for name in first.keys() - {"weights"}:
        assert torch.equal(first[name], second[name]), name
    assert second["weights"].abs().max() <= 5**-0.5


def test_errors(device):
    """Arguments that do not fit."""
    for arguments in (
        {"specs": []},
        {"specs": [(3, 0)]},
        {"specs": [(3, 2)], "feature_table_map": [1]},
        {"specs": [(3, 2)], "pooling": "max"},
        {"specs": [(3, 2)], "bounds": "wrap"},
        {"specs": [(3, 2)], "feature_names": ["a", "b"]},
    ):
        with pytest.raises(ValueError):
            TableBatchedEmbeddingBags(**arguments)
    with pytest.raises(TypeError, match=r"gossamer\.optim"):
        TableBatchedEmbeddingBags([(3, 2)], optimizer="sgd")
    with pytest.raises(TypeError, match="feature_names must be a sequence, got int"):
        TableBatchedEmbeddingBags([(3, 2)], feature_names=1)
    module = TableBatchedEmbeddingBags([(3, 2)], device=device)
    with pytest.raises(TypeError, match="offsets"):
        module(torch.tensor([1], device=device))


def test_compiles(device):
    """Traced whole with its fused step: the same bits."""
    torch._dynamo.reset()
    module, _ = make(device, optimizer=RowwiseAdagrad(lr=0.1))
    twin = copy.deepcopy(module)
    compiled = torch.compile(lambda m, i, o: m(i, o).sin(), fullgraph=True, backend="aot_eager")
    for _ in range(2):
        index, offsets = draw(device)
        compiled(module, index, offsets).sum().backward()
        twin(index, offsets).sin().sum().backward()
        assert torch.equal(module.weights, twin.weights)
