"""The role of tables: its contract suite over those that are here, and over one of two tables as a user writes it."""

import math

import pytest
import torch
from contracts import TableContract, TrainedTableContract
from torch import nn

import gossamer
from gossamer.nn import DynamicEmbedding, Embedding, EmbeddingBag, FusedTable, TableBatchedEmbeddingBags


class QuotientRemainder(FusedTable):
    """The vector of an id as the sum of a row by its quotient and a row by its remainder."""

    tables = ("quotient", "remainder")

    def __init__(self, num_embeddings, embedding_dim, *, optimizer=None, device=None, dtype=None):
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.base = math.isqrt(num_embeddings - 1) + 1
        for name in self.tables:
            rows = torch.randn(self.base, embedding_dim, device=device, dtype=dtype)
            setattr(self, name, nn.Parameter(rows))
        self.attach(optimizer)

    def parts(self, ids):
        outside = (ids < 0) | (ids >= self.num_embeddings)
        # An id outside the table is one outside both of its own.
        return {"quotient": torch.where(outside, -1, ids // self.base), "remainder": ids % self.base}

    def lookup(self, ids):
        return sum(self.rows(name, part) for name, part in self.parts(ids).items())

    def forward(self, ids, offsets=None, per_sample_weights=None):
        how = {"include_last_offset": self.include_last_offset}
        return sum(self.bags(name, part, offsets, per_sample_weights, **how) for name, part in self.parts(ids).items())


class ByLookup(QuotientRemainder):
    """The same with the bags that the role gives a table that defines its lookup alone."""

    forward = gossamer.nn.Table.forward


class Grouped(TableBatchedEmbeddingBags):
    """One table of a group, made as a table is."""

    def __init__(self, num_embeddings, embedding_dim=None, *, dtype=torch.float32, **options):
        specs = [(num_embeddings, embedding_dim)] if isinstance(num_embeddings, int) else num_embeddings
        super().__init__(specs, weights_dtype=dtype, **options)

    include_last_offset = True

    def forward(self, indices, offsets=None, per_sample_weights=None):
        if indices.dim() == 2:
            offsets = torch.arange(0, indices.numel() + 1, indices.shape[1], device=indices.device)
            indices = indices.reshape(-1)
        return super().forward(indices, offsets, per_sample_weights)


def of(kind, **more):
    return lambda num_embeddings, embedding_dim, **options: kind(num_embeddings, embedding_dim, **more, **options)


TestTables = TrainedTableContract.over(
    {
        "bag of sums": of(EmbeddingBag, mode="sum"),
        "bag of means": of(EmbeddingBag),
        "bag with the last offset": of(EmbeddingBag, mode="sum", include_last_offset=True),
        "a group's": of(Grouped),
        "two summed": of(QuotientRemainder),
        "two summed, by lookup": of(ByLookup),
    }
)


def dynamic(num_embeddings, embedding_dim, **options):
    layer = DynamicEmbedding(embedding_dim, 2 * num_embeddings, **options)
    layer(torch.arange(num_embeddings, device=layer.device).unsqueeze(1))
    return layer


class TestDynamic(TableContract.over(dynamic=dynamic)):
    both_widths = False


def test_embedding_looks_up(device):
    """nn.Embedding's forward is its lookup; its bytes and budget are those of its matrix."""
    layer = Embedding(20, 4, padding_idx=3, optimizer=gossamer.optim.SGD(lr=1.0), device=device)
    ids = torch.randint(0, 20, (2, 5), device=device)
    assert torch.equal(layer.lookup(ids), layer(ids))
    assert layer.inference_nbytes() == 20 * 4 * 4 < layer.nbytes()
    assert layer.freeze().nbytes() == 20 * 4 * 4
    assert Embedding.from_budget(20, 4, 320, padding_idx=3, device=device).padding_idx == 3
    with pytest.raises(ValueError, match="nbytes must be at least 320 for Embedding with 20 embeddings of 4, got 319"):
        Embedding.from_budget(20, 4, 319)


def test_lookup_of_a_bag_is_embedding_s(device):
    """Padding rows are read as any other, and get no gradient."""
    bag = EmbeddingBag(10, 4, mode="sum", padding_idx=2, device=device)
    layer = Embedding(10, 4, padding_idx=2, _weight=bag.weight.detach().clone(), device=device)
    ids = torch.tensor([2, 1, 2, 9], device=device)
    for table in (bag, layer):
        table.lookup(ids).sum().backward()
    assert torch.equal(bag.lookup(ids), layer.lookup(ids))
    assert torch.equal(bag.weight.grad, layer.weight.grad) and not bag.weight.grad[2].any()


def test_lookup_in_a_group(device):
    tables = TableBatchedEmbeddingBags([(5, 4), (7, 8)], [1, 0, 1], device=device, optimizer=gossamer.optim.SGD(lr=1.0))
    first, second = (t.clone() for t in tables.split_embedding_weights())
    ids = torch.tensor([[3, 1], [3, 0]], device=device)
    assert torch.equal(tables.lookup(ids, 2), second[ids]) and torch.equal(tables.lookup(ids, 1), first[ids])
    assert (tables.num_embeddings, tables.embedding_dim) == (12, None)
    tables.lookup(ids, 2).sum().backward()
    moved_first, moved = tables.split_embedding_weights()
    assert torch.equal(moved_first, first)
    assert torch.equal(moved[3], second[3] - 2) and torch.equal(moved[2], second[2])
    with pytest.raises(ValueError, match=r"feature must be in \[0, F\) with F=3, got 3"):
        tables.lookup(ids, 3)
    made = TableBatchedEmbeddingBags.from_budget([5, 7], [4, 8], 10_000, device=device)
    assert made.layout.specs == ((5, 4), (7, 8))


def test_state_of_two_tables(device):
    """Each table has its own state and step, under its name; a tampered optimizer is refused whole."""
    table = QuotientRemainder(30, 4, optimizer=gossamer.optim.Adam(lr=0.1), device=device)
    names = {name for name, _ in table.named_buffers()}
    kinds = {"step", "exp_avg", "exp_avg_sq"}
    assert names == {"optimizer_algorithm"} | {f"optimizer_{t}_{k}" for t in table.tables for k in kinds}
    table.lookup(torch.tensor([3, 7], device=device)).sum().backward()
    assert table.optimizer_quotient_step.item() == table.optimizer_remainder_step.item() == 1
    other = QuotientRemainder(30, 4, optimizer=gossamer.optim.SGD(lr=0.1), device=device)
    with pytest.raises(RuntimeError, match="another optimizer's than SGD's"):
        other.load_state_dict(table.state_dict())
    table.bfloat16()
    assert table.quotient.dtype == torch.bfloat16 and table.optimizer_quotient_exp_avg.dtype == torch.float32


def test_budget_of_a_dynamic_table():
    """Room for the most ids that fit, and no more than are asked for."""
    options = {"optimizer": gossamer.optim.Adam(lr=0.1)}
    layer = DynamicEmbedding.from_budget(10_000, 8, 100_000, **options)
    assert layer.inference_nbytes() <= 100_000 and layer.num_embeddings < 10_000
    more = DynamicEmbedding(8, layer.num_embeddings + 1, device="meta")
    assert more.inference_nbytes() > 100_000
    assert DynamicEmbedding.from_budget(100, 8, 100_000).num_embeddings == 100
    with pytest.raises(ValueError, match="nbytes must be at least"):
        DynamicEmbedding.from_budget(100, 8, 10)


def test_a_frozen_dynamic_table_admits_nobody():
    layer = DynamicEmbedding(4, 16, optimizer=gossamer.optim.SGD(lr=1.0))
    layer(torch.tensor([[1, 2]]))
    layer.freeze().train()
    assert not layer(torch.tensor([[5]])).any() and len(layer) == 2
