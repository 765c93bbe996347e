"""A model's embedding layers under one budget in bytes."""

import re

import pytest
import torch
from contracts import assert_near
from torch import nn

import gossamer
from gossamer.integrations.compress import METHODS, TableLookup

SIZES = {"users": 2000, "goods": 3000, "shops": 400}


def blocks_of_four_kinds(rows, generator):
    """A table of blocks of eight rows, of which a quarter are their own and the others copies."""
    own = torch.randn(-(-rows // 32), 8, 16, generator=generator) * 0.1
    return own.repeat(4, 1, 1).flatten(0, 1)[:rows].clone()


class Recommender(nn.Module):
    """Three bags, one lookup with padding, and a small field."""

    def __init__(self, kind=nn.EmbeddingBag, **options):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.bags = nn.ModuleDict(
            {
                name: kind(n, 16, mode="sum", _weight=blocks_of_four_kinds(n, generator), **options)
                for name, n in SIZES.items()
            }
        )
        self.history = nn.Embedding(1000, 16, padding_idx=0, _weight=blocks_of_four_kinds(1000, generator))
        self.weekday = nn.Embedding(7, 16)

    def forward(self, ids):
        pooled = [bag(ids % bag.num_embeddings) for bag in self.bags.values()]
        history = self.history(ids % 1000).sum(1)
        return torch.stack([*pooled, history, self.weekday(ids[:, 0] % 7)]).sum(0)


PATHS = {"bags.users": 2000, "bags.goods": 3000, "bags.shops": 400, "history": 1000}
NEEDS = {
    "deep_hash": {"num_hashes": 64, "norm": "layer"},
    "clustered": {"field_options": {name: {"clusters": torch.arange(n) % (n // 4)} for name, n in PATHS.items()}},
    "deduplicated": {"block_rows": 8},
    "frequency": {"frequencies": {name: torch.arange(n) for name, n in PATHS.items()}},
}
# Two sizes a table, and blocks of 512 bytes.
COARSE = {"quantized", "deduplicated"}


class TwoFields(nn.Module):
    """Fields so large that a row, a rank or a codeword is far below 1% of a budget of a tenth of their bytes."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.users, self.goods = (
            nn.EmbeddingBag(n, 16, mode="mean", _weight=0.1 * torch.randn(n, 16, generator=generator))
            for n in (5000, 1500)
        )
        self.weekday = nn.Embedding(7, 16)


FREQUENCIES = {"users": torch.arange(5000), "goods": torch.arange(1500)}
OPTIONS = {
    "clustered": {"field_options": {name: {"clusters": count // 9} for name, count in FREQUENCIES.items()}},
    "deduplicated": {"block_rows": 4, "tolerance": 0.3, "bands": 4},
    "deep_hash": {"num_hashes": 32, "num_layers": 2},
    "product_quantized": {"steps": 1},
    "semantic_id": {"steps": 1},
}
# Codes of 8 and of 16 bits have these sizes alone; at more than a quarter thousands of codewords are sought.
BUDGETS = {"quantized": (0.251, 0.501), "product_quantized": (0.25, 0.1)}


# Methods whose papers train tables of the dense size, or larger.
DENSE_IN_TRAINING = {"masked", "product_quantized", "pruned", "searched_dimension"}


@pytest.mark.parametrize("method", METHODS)
def test_fills_the_budget(method):
    """What frozen tables hold, codes, maps and scales too, is within a hundredth of the budget, and as reported.

    So is what they hold in training, which is the dense size for methods whose papers need it alone.
    """
    for budget in BUDGETS.get(method, (0.4, 0.1)):
        model = TwoFields()
        before = sum(p.numel() * 4 for p in model.parameters())
        options = {"frequencies": FREQUENCIES} | OPTIONS.get(method, {})
        report = gossamer.compress_embeddings(model, method, budget, **options)
        assert report.budget == int(budget * before) and "of the budget of" not in str(report)
        trained = sum(table.nbytes() for table in (model.users, model.goods)) + 7 * 16 * 4
        assert report.training == trained and f"{trained} in training" in str(report)
        assert (trained >= before) == (method in DENSE_IN_TRAINING)
        held = sum(gossamer.freeze_embeddings(model).values()) + 7 * 16 * 4
        assert held == report.served
        assert 0.99 * budget * before < held <= budget * before


def test_models_without_tables_are_not_frozen():
    with pytest.raises(ValueError, match=r"model must hold tables of gossamer\.nn, got none in Sequential"):
        gossamer.freeze_embeddings(nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4)))
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        gossamer.freeze_embeddings("model")


def test_budgets_between_two_sizes():
    """A report names a budget that no sizes of the method fill, and counts layers that stay."""
    model = TwoFields()
    report = gossamer.compress_embeddings(model, "quantized", 0.5, min_rows=2000)
    assert str(report).endswith("next: " + METHODS["quantized"].note)
    assert "0.8474 of the budget of 208224 bytes: no larger tables of this method fit" in str(report)
    assert report.before == sum(t.before for t in report.tables) == 4 * 16 * 6507 and len(report.tables) == 3


@pytest.mark.parametrize("method", METHODS)
def test_meets_the_budget(method):
    """What all tables together hold once frozen is within a hundredth of the budget, and the model still trains."""
    model = Recommender()
    before = sum(p.numel() * 4 for p in model.parameters())
    report = gossamer.compress_embeddings(model, method, 0.5, **NEEDS.get(method, {}))
    assert report.before == before and len(report.tables) == 5
    assert report.served <= 0.5 * before
    if method not in COARSE:
        assert report.served > 0.99 * 0.5 * before
    ids = torch.randint(0, 10**6, (6, 4), generator=torch.Generator().manual_seed(1))
    tables = [m for m in model.modules() if isinstance(m, gossamer.nn.Table)]
    for table in tables:
        if method == "pruned":
            table.sparsify()
    if method == "searched_dimension":
        gossamer.nn.choose_widths(tables)
    y = model(ids)
    y.square().sum().backward()
    # Codes are trained by an optimizer in the table alone.
    assert all(p.grad is not None for table in tables for p in table.parameters() if p.is_floating_point())
    frozen = gossamer.freeze_embeddings(model)
    assert {*frozen} == {table.name for table in report.tables} - {"weekday"}
    assert sum(frozen.values()) + 7 * 16 * 4 == report.served
    assert gossamer.freeze_embeddings(model) == frozen
    served = model.eval()(ids)
    if method == "deep_hash":
        # Its products are of other numbers of rows once each id is computed once.
        assert_near(served, y.double())
    else:
        assert torch.equal(served, y)
    assert method in str(report) and "weekday: Embedding, 448 to 448" in str(report)


def test_codes_that_are_given():
    """Tables of given codes have one size each, whatever their shares of the budget are."""
    model = Recommender()
    codes = {name: {"codes": torch.arange(n).view(-1, 1) // torch.tensor([32, 1]) % 32} for name, n in PATHS.items()}
    report = gossamer.compress_embeddings(model, "semantic_id", 0.5, field_options=codes)
    sizes = {table.name: table.served for table in report.tables}
    assert sizes["history"] == 64 * 64 + 1000 * 2 and sizes["bags.users"] == 64 * 64 + 2000 * 2
    with pytest.raises(ValueError, match=r"budget must be at least 0\.069\d* for method 'semantic_id' in this model"):
        gossamer.compress_embeddings(Recommender(), "semantic_id", 0.05, field_options=codes)


def test_blocks_that_are_alike_in_some_fields():
    """A field without like blocks stays as it is, and the others give what it does not."""
    model = Recommender()
    with torch.no_grad():
        model.bags["shops"].weight.copy_(torch.randn(400, 16, generator=torch.Generator().manual_seed(1)))
    report = gossamer.compress_embeddings(model, "deduplicated", 0.4)
    kinds = {table.name: table.class_name for table in report.tables}
    assert kinds["bags.shops"] == "EmbeddingBag" and kinds["bags.users"] == "DeduplicatedEmbedding"
    assert report.served <= 0.4 * report.before == 0.4 * sum(table.before for table in report.tables)
    with pytest.raises(ValueError, match=r"budget must be at least 0\.26\d* for method 'deduplicated' in this model"):
        gossamer.compress_embeddings(Recommender(), "deduplicated", 0.2)


def test_padding_and_small_fields_stay(device):
    model = Recommender().to(device)
    gossamer.compress_embeddings(model, "hash", 0.3)
    assert type(model.weekday) is nn.Embedding and isinstance(model.history, TableLookup)
    ids = torch.tensor([0, 5, 1000], device=device)
    rows = model.history(ids)
    assert not rows[0].any() and rows[1].any()
    assert model.history.table.weight.device.type == device
    rows[0].sum().backward()
    assert not model.history.table.weight.grad.any()


def test_starts_from_the_trained_table():
    """Deduplication keeps the vectors within its tolerance."""
    model = Recommender()
    weight = model.bags["goods"].weight.detach().clone()
    gossamer.compress_embeddings(model, "deduplicated", 0.7, block_rows=8)
    assert torch.equal(model.bags["goods"].lookup(torch.arange(3000)), weight)


def test_keeps_and_restores():
    model = Recommender()
    ids = torch.arange(12).view(3, 4)
    before = model(ids)
    layers = dict(model.bags)
    gossamer.compress_embeddings(model, "double_hash", 0.2, keep_original=True)
    assert not torch.equal(model(ids), before)
    gossamer.restore(model)
    assert dict(model.bags) == layers and torch.equal(model(ids), before)
    gossamer.compress_embeddings(model, "double_hash", 0.2)
    with pytest.raises(ValueError, match=r"bags\.users was compressed without keep_original=True"):
        gossamer.restore(model)


def test_our_layers_keep_their_optimizer():
    model = Recommender(gossamer.nn.EmbeddingBag, optimizer=gossamer.optim.SGD(lr=1.0))
    report = gossamer.compress_embeddings(model, "compositional", 0.25, operation="add")
    table = model.bags["users"]
    assert isinstance(table.optimizer, gossamer.optim.SGD) and table.operation == "add"
    before = table.weight.clone()
    model(torch.arange(8).view(2, 4)).sum().backward()
    assert not torch.equal(table.weight, before)
    assert report.training > report.served


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(500, 8)
        self.head = nn.Linear(8, 500, bias=False)
        self.head.weight = self.embed.weight
        self.scaled = nn.Embedding(500, 8, max_norm=1.0)
        self.other = nn.Embedding(500, 8)


def test_layers_left_alone_are_named():
    report = gossamer.compress_embeddings(Tied(), "hash", 0.5)
    assert [table.name for table in report.tables] == ["other"]
    reasons = {skipped.name: skipped.reason for skipped in report.skipped}
    assert reasons["embed"] == "its weight is shared with another module"
    assert reasons["scaled"] == "it has max_norm=1.0, which tables do not compute"


@pytest.mark.parametrize(
    ("method", "budget", "arguments", "message"),
    [
        ("squeeze", 0.5, {}, "method must be one of clustered, .*, got 'squeeze'"),
        ("hash", 0.0, {}, r"budget must be in \(0, 1\], got 0\.0"),
        ("hash", 1.5, {}, r"budget must be in \(0, 1\], got 1\.5"),
        ("compositional", 0.001, {}, r"budget must be at least 0\.0\d+ for method 'compositional' .*, got 0\.001"),
        ("frequency", 0.5, {}, "method 'frequency' needs frequencies for 'bags.users', by frequencies"),
        ("frequency", 0.5, {"frequencies": {"nobody": torch.ones(3)}}, "frequencies must be of layers .*, got nobody"),
        ("hash", 0.5, {"min_rows": 10**6}, "model must hold embedding layers of at least min_rows=1000000 rows"),
    ],
)
def test_bad_arguments_change_nothing(method, budget, arguments, message):
    model = Recommender()
    with pytest.raises(ValueError, match=message):
        gossamer.compress_embeddings(model, method, budget, **arguments)
    assert all(type(m) in (nn.Embedding, nn.EmbeddingBag) for m in model.modules() if hasattr(m, "num_embeddings"))


def test_unknown_options_are_named():
    model = Recommender()
    known = "device, dtype, include_last_offset, mode, optimizer"
    with pytest.raises(TypeError, match=f"options of method 'hash' must be of {known}, got optimiser"):
        gossamer.compress_embeddings(model, "hash", 0.1, optimiser=3)
    with pytest.raises(
        TypeError, match=r"field_options\['history'\] of method 'semantic_id' must be of codes, .*, got step"
    ):
        gossamer.compress_embeddings(model, "semantic_id", 0.5, field_options={"history": {"step": 1}})
    with pytest.raises(TypeError, match=r"must be of .*, got num_rows"):
        gossamer.compress_embeddings(model, "double_hash", 0.5, num_rows=5)
    gossamer.compress_embeddings(model, "semantic_id", 0.5, num_levels=2, steps=1)
    assert len(model.bags["users"].sizes) == 2


@pytest.mark.parametrize("method", [name for name, how in METHODS.items() if how.from_table is not None])
def test_rows_that_are_not_finite_are_refused(method):
    """Methods that start from trained rows refuse them, by the model's path or by the table's argument ``weight``."""
    model = TwoFields()
    with torch.no_grad():
        model.goods.weight[7, 3] = torch.nan
    with pytest.raises(ValueError, match="the weight of goods must be finite, got NaN or infinity"):
        gossamer.compress_embeddings(model, method, 0.5)
    assert type(model.users) is type(model.goods) is nn.EmbeddingBag
    with pytest.raises(ValueError, match=r"^weight must be finite, got NaN or infinity"):
        METHODS[method].from_table(model.goods.weight.detach(), nbytes=60_000)


def test_a_budget_missed_by_a_hair_names_one_that_is_enough():
    """The named budget is neither one that rounds to the given one nor far larger."""

    def named(budget):
        with pytest.raises(ValueError, match="budget must be at least") as caught:
            gossamer.compress_embeddings(Recommender(), "compositional", budget)
        return float(re.search(r"at least (\S+)", str(caught.value))[1])

    least = named(0.001)
    short = least * (1 - 1e-4)
    assert short < named(short) == least
    gossamer.compress_embeddings(Recommender(), "compositional", least)


def test_frequencies_must_fit():
    wrong = NEEDS["frequency"]["frequencies"] | {"bags.shops": torch.ones(3)}
    with pytest.raises(ValueError, match=r"frequencies\['bags\.shops'\] must have shape \(N,\) = \(400\), got \(3,\)"):
        gossamer.compress_embeddings(Recommender(), "frequency", 0.5, frequencies=wrong)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got int"):
        gossamer.compress_embeddings(3, "hash", 0.5)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("last", [True, False])
def test_padding_in_bags(device, mode, last):
    """Padding adds nothing, is not counted, and trains no row, as in the layer; a bag of nothing else is zero."""

    class Bags(nn.Module):
        def __init__(self):
            super().__init__()
            self.bag = nn.EmbeddingBag(300, 16, mode=mode, padding_idx=3, include_last_offset=last)

    model = Bags().to(device)
    gossamer.compress_embeddings(model, "frequency", 0.5, frequencies={"bag": torch.ones(300)})
    table = model.bag.table
    rows = table.lookup(torch.arange(300, device=device)).detach()
    dense = nn.EmbeddingBag(300, 16, mode=mode, padding_idx=3, include_last_offset=last, _weight=rows)
    ids = torch.tensor([3, 5, 7, 3, 3, 5, 3, 299], device=device)
    offsets = torch.tensor([0, 3, 3, 5, 7, *([8] if last else [])], device=device)
    assert_near(model.bag(ids, offsets), dense(ids, offsets).double())
    assert not model.bag(ids, offsets)[[1, 2]].any()
    assert_near(model.bag(ids.view(2, 4)), dense(ids.view(2, 4)).double())
    if mode == "sum":
        weights = torch.rand(8, device=device)
        assert_near(model.bag(ids, offsets, weights), dense(ids, offsets, weights).double())
    model.bag(ids, offsets).sum().backward()
    touched = table.weight.grad.abs().sum(1).nonzero().flatten()
    assert set(touched.tolist()) == set(table.addresses(torch.tensor([5, 7, 299], device=device)).tolist())
    if device == "cpu":
        with pytest.raises(ValueError, match=r"offsets must ascend within \[0, L\] with L=8, got 9"):
            model.bag(ids, torch.tensor([0, 9]))


@pytest.mark.parametrize("method", ["compositional", "product_quantized", "pruned", "quantized"])
def test_what_replaces_a_layer_has_what_tables_have(method, device):
    """Vectors, bytes and the frozen form are those of the table, with the padding and pooling of the layer."""
    model = nn.ModuleDict(
        {
            "mean": nn.EmbeddingBag(300, 16, mode="mean", padding_idx=3),
            "max": nn.EmbeddingBag(300, 16, mode="max", padding_idx=3, include_last_offset=True),
            "rows": nn.Embedding(300, 16, padding_idx=3),
            "plain": nn.Embedding(300, 16),
        }
    ).to(device)
    report = gossamer.compress_embeddings(model, method, 0.4 if method != "quantized" else 0.3)
    ids = torch.tensor([[3, 5, 299], [3, 3, 3], [7, 0, 3]], device=device)
    for name, layer in model.items():
        row = next(table for table in report.tables if table.name == name)
        assert (layer.nbytes(), layer.inference_nbytes()) == (row.training, row.served)
        if method == "pruned":
            layer.table.sparsify()
        expected = layer.table.lookup(ids).detach().clone()
        if name != "plain":
            expected[ids == 3] = 0
        assert torch.equal(layer.lookup(ids), expected)
        before = layer(ids).detach()
        frozen = layer.freeze()
        assert type(frozen) is type(layer) and frozen.frozen and not frozen.training
        assert frozen.nbytes() == frozen.inference_nbytes() == row.served
        assert not any(p.requires_grad for p in frozen.parameters())
        assert torch.equal(frozen(ids), before) and torch.equal(frozen.lookup(ids), expected)
        if name == "mean":
            assert_near(before[0], expected[0, 1:].double().mean(0))
        if name == "max":
            assert torch.equal(before[2], expected[2, :2].amax(0)) and frozen.mode == "max"


class Grouped(nn.Module):
    def __init__(self, **options):
        super().__init__()
        specs, poolings = [(400, 16), (1000, 8), (20, 16)], ["sum", "mean", "sum"]
        self.group = gossamer.nn.TableBatchedEmbeddingBags(specs, [1, 0, 2, 1], pooling=poolings, **options)


def jagged(device):
    """Ids of three bags of each of four features, some empty."""
    offsets = torch.tensor([0, 2, 2, 3, 5, 6, 6, 7, 8, 9, 9, 12, 13], device=device)
    ids = torch.tensor([999, 5, 7, 399, 0, 8, 1, 19, 2, 500, 999, 5, 6], device=device)
    return ids, offsets


def test_tables_of_one_group(device):
    """Each table of a group is compressed by itself; those left as they are give what the group gave, by every call."""
    model = Grouped(optimizer=gossamer.optim.SGD(lr=1.0), device=device)
    ids, offsets = jagged(device)
    before, weights = model.group(ids, offsets), torch.rand(13, device=device)
    weighted = model.group(ids, offsets, weights)
    report = gossamer.compress_embeddings(model, "hash", 0.5, min_rows=100, keep_original=True)
    assert {table.name for table in report.tables} == {f"group.tables.{number}" for number in range(3)}
    group = model.group
    group.tables[1].weight.zero_()
    after = group(ids, offsets)
    # Columns of features 1 to 3 are those of tables 0, 2 and 1.
    assert after.shape == before.shape == (3, 8 + 16 + 16 + 8)
    assert torch.equal(after[:, 24:40], before[:, 24:40]) and not after[:, :8].any() and not after[:, 40:].any()
    assert torch.equal(group(ids, offsets, weights)[:, 24:40], weighted[:, 24:40])
    moved = group.tables[0].weight.clone()
    after.sum().backward()
    assert not torch.equal(group.tables[0].weight, moved)
    assert (
        type(group.tables[2]) is gossamer.nn.EmbeddingBag and group.tables[2].weight.untyped_storage().nbytes() < 2000
    )
    with pytest.raises(TypeError, match=r"offsets must be a torch\.Tensor, got NoneType"):
        group(ids)
    with pytest.raises(ValueError, match=r"offsets must have shape \(F·B\+1,\) with F=4, got \(12,\)"):
        group(ids, offsets[:-1])
    gossamer.restore(model)
    assert type(model.group) is gossamer.nn.TableBatchedEmbeddingBags


def test_groups_that_stay():
    report = gossamer.compress_embeddings(nn.ModuleList([Grouped(), Grouped(bounds="drop")]), "hash", 0.5, min_rows=100)
    assert [skipped.name for skipped in report.skipped] == ["1.group"]
    assert report.skipped[0].reason == "it has bounds='drop', which tables do not compute"


class Jagged:
    """One feature of a batch, with the methods of TorchRec's JaggedTensor that a collection calls."""

    def __init__(self, values, offsets):
        self._values, self._offsets = values, offsets

    def values(self):
        return self._values

    def offsets(self):
        return self._offsets


class EmbeddingBagCollection(nn.Module):
    """Bags by the names of their tables, called as TorchRec's collection of that name calls them."""

    def __init__(self, **rows):
        super().__init__()
        self.embedding_bags = nn.ModuleDict(
            {name: nn.EmbeddingBag(n, 16, mode="sum", include_last_offset=True) for name, n in rows.items()}
        )

    def forward(self, features):
        pooled = [
            bag(input=features[name].values(), offsets=features[name].offsets(), per_sample_weights=None).float()
            for name, bag in self.embedding_bags.items()
        ]
        return torch.cat(pooled, 1)


def test_collections_of_torchrec(device):
    """Collections call their bags by keywords of torch.nn.EmbeddingBag, which the compressed tables accept too."""
    model = nn.Sequential(EmbeddingBagCollection(users=500, goods=800)).to(device)
    ids, offsets = torch.tensor([3, 9, 3], device=device), torch.tensor([0, 1, 3], device=device)
    features = {name: Jagged(ids, offsets) for name in ("users", "goods")}
    report = gossamer.compress_embeddings(model, "quantized", 0.3)
    assert {table.name for table in report.tables} == {"0.embedding_bags.users", "0.embedding_bags.goods"}
    y = model(features)
    bags = model[0].embedding_bags
    assert y.shape == (2, 32)
    assert torch.equal(y[:, 16:], bags["goods"].table(ids, offsets))
    assert bags["goods"].num_embeddings == 800 and bags["goods"].mode == "sum"
