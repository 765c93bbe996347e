"""gossamer.nn.DynamicEmbedding and its table: what calls that fail leave behind, and rows that move."""

import pytest
import torch

import gossamer
from gossamer import optim
from gossamer.nn import DynamicEmbedding

PRIMITIVE = "hash_table"


def trained(device, **options):
    """A layer whose ids 1, 2 and 3 have trained rows."""
    layer = DynamicEmbedding(4, 3, optimizer=optim.Adagrad(lr=0.1), device=device, **options)
    layer(torch.tensor([[1, 2, 3]], device=device)).square().sum().backward()
    return layer


def rows_of(layer, device):
    with torch.no_grad():
        layer.eval()
        rows = layer(torch.tensor([[1], [2], [3]], device=device))
        layer.train()
    return rows


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda layer, to: layer(to([11, 12, 13]), to([0, 3, 2, 3])), ValueError, "offsets must ascend .* got 2 at"),
        (lambda layer, to: layer(to([11, 12, 13]), to([0, 99])), ValueError, r"offsets must ascend within \[0, L\]"),
        (
            lambda layer, to: layer(to([[11, 12, 13]]), weights=to([[1.0, 1.0, float("nan")]])),
            ValueError,
            "weights must not be NaN, got nan at flat position 2",
        ),
        (lambda layer, to: layer(to([[11, 12, 13]]), weights=to([1.0])), ValueError, "weights must have shape"),
        (lambda layer, to: layer(to([[[11]], [[12]]])), ValueError, "ids must have shape"),
        (lambda layer, to: layer([11, 12]), TypeError, "ids must be a torch.Tensor"),
    ],
)
@pytest.mark.parametrize("train", [True, False])
def test_a_call_that_fails_makes_no_row(call, error, message, train):
    """Rows that were trained stay, none is made, and none evicted, in training and in evaluation."""
    layer = trained("cpu")
    before = rows_of(layer, "cpu")
    layer.train(train)
    with pytest.raises(error, match=message):
        call(layer, torch.tensor)
    assert torch.equal(rows_of(layer, "cpu"), before)
    assert (len(layer), layer.counters.inserted, layer.counters.evicted) == (3, 3, 0)


def test_an_initializer_that_fails_once(device):
    """Its ids have no row afterwards, and get one from the next call."""
    calls = []

    def initializer(keys, dim):
        calls.append(keys.numel())
        if len(calls) == 1:
            raise RuntimeError("not now")
        return torch.ones(keys.numel(), dim, device=keys.device)

    layer = DynamicEmbedding(4, 10, initializer=initializer, device=device)
    ids = torch.tensor([[5], [6]], device=device)
    with pytest.raises(RuntimeError, match="not now"):
        layer(ids)
    assert len(layer) == 0
    assert torch.equal(layer(ids), torch.ones(2, 4, device=device))


def test_a_second_backward_takes_no_second_step(device):
    """As with tables of fixed size, it raises an error and changes no row."""
    layer = DynamicEmbedding(4, 10, optimizer=optim.SGD(lr=1.0), device=device)
    ids = torch.tensor([[1]], device=device)
    out = layer(ids).sum()
    out.backward(retain_graph=True)
    after = layer(ids).detach()
    with pytest.raises(RuntimeError, match="its graph cannot run backward a second time"):
        out.backward()
    assert torch.equal(layer(ids), after)


@pytest.mark.parametrize("evict", [None, "lru"])
def test_reserve_takes_all_along(device, evict):
    """Rows, optimizer state, ages and marks of a layer that grew train on like those of one that was large at once."""
    layers = [
        DynamicEmbedding(4, size, optimizer=optim.Adam(lr=0.1), evict=evict, device=device) for size in (20, 2000)
    ]
    generator = torch.Generator().manual_seed(0)
    batches = torch.randint(1 << 40, (3, 20), generator=generator).to(device)
    pending = []
    for i, layer in enumerate(layers):
        layer.advance_clock(7)
        layer(batches[0].view(4, 5)).square().sum().backward()
        pending.append(layer(batches[0].view(4, 5)).square().sum())
        if i == 0:
            layer.reserve(2000)
        # The rows that it looked up have moved.
        pending[i].backward()
        for step in (1, 2, 0):
            layer(batches[step].view(4, 5)).square().sum().backward()
    grown, large = layers
    assert grown.table.capacity >= 2000
    keys = batches.reshape(-1)
    first, second = (layer.table.rows(keys) for layer in layers)
    assert (first >= 0).all()
    assert torch.equal(grown.table.values[first], large.table.values[second])
    assert torch.equal(grown._last_used[first], large._last_used[second])
    assert torch.equal(grown._changed[first], large._changed[second])
    for name in grown.optimizer.state_kinds():
        assert torch.equal(grown.optimizer_state[name][first], large.optimizer_state[name][second]), name


def test_reserve_within_as_many_slots(device):
    """Rows move there too: the state stays with its id, and so does a step that was under way."""
    layer = DynamicEmbedding(4, 3, optimizer=optim.Adagrad(lr=0.1), device=device)
    one, two, three = (torch.tensor([[i]], device=device) for i in (1, 2, 3))
    for times, ids in ((1, one), (2, two), (3, three)):
        for _ in range(times):
            layer(ids).sum().backward()
    sums = {i: layer.optimizer_state["sum"][layer.table.rows(ids[0])].clone() for i, ids in ((2, two), (3, three))}
    pending = layer(three).sum()
    layer.erase(one[0])
    before = layer.table.values.shape[0]
    layer.reserve(5)
    assert layer.table.values.shape[0] == before and layer.table.capacity == 5
    for i, ids in ((2, two), (3, three)):
        assert torch.equal(layer.optimizer_state["sum"][layer.table.rows(ids[0])], sums[i])
    pending.backward()
    assert torch.equal(layer.optimizer_state["sum"][layer.table.rows(three[0])], sums[3] + 1)
    assert torch.equal(layer.optimizer_state["sum"][layer.table.rows(two[0])], sums[2])


def test_arrays_beside_a_table_must_fit():
    """Kernels write where rows say: arrays and rows of another size are refused."""
    table = gossamer.HashTable(2, 10)
    rows = table.rows(torch.tensor([1, 2]), insert=True)
    slots = table.values.shape[0]
    for call, error, message in (
        (lambda: table.mark_rows(torch.zeros(1, dtype=torch.int64), rows, 1), ValueError, "array must have shape"),
        (lambda: table.mark_rows(torch.zeros(slots), rows, 1), TypeError, "array must be torch.int64 or torch.bool"),
        (
            lambda: table.mark_rows(torch.zeros(slots, dtype=torch.bool), torch.tensor([10**9]), 1),
            ValueError,
            "rows must be in",
        ),
        (
            lambda: table.insert_rows(torch.tensor([3]), marks=torch.zeros(1, dtype=torch.int64)),
            ValueError,
            "marks must have shape",
        ),
        (lambda: table.start_uniform(torch.tensor([-1]), torch.tensor([1]), 0, 1.0), ValueError, "rows must be in"),
        (lambda: table.start_uniform(rows, torch.tensor([1]), 0, 1.0), ValueError, "keys must be one for each row"),
    ):
        with pytest.raises(error, match=message):
            call()
    assert len(table) == 2


def with_rows(values, device, **options):
    """A layer whose ids 1, 2 and so on have these rows."""
    values = torch.tensor(values, device=device)
    layer = DynamicEmbedding(values.shape[1], 32, optimizer=optim.SGD(lr=0.5), device=device, **options)
    ids = torch.arange(1, len(values) + 1, device=device)
    layer.table.insert_or_assign(ids, values)
    return layer, ids.unsqueeze(0)


def test_two_lookups_before_a_step_are_those_of_the_forward_pass(device):
    """The first step makes another row the largest, and another gradient of the weights, but not of this lookup."""
    layer, ids = with_rows([[1.0], [0.9]], device, pooling="max", evict=None)
    (layer(ids).sum() + layer(ids).sum()).backward()
    torch.testing.assert_close(layer.table.find(ids[0])[0].flatten().tolist(), [0.0, 0.9])
    layer, ids = with_rows([[1.0, 2.0], [3.0, 4.0]], device, evict=None)
    weights = [torch.ones(ids.shape, device=device, requires_grad=True) for _ in range(2)]
    sum(layer(ids, None, w).sum() for w in weights).backward()
    assert all(w.grad.tolist() == [[3.0, 7.0]] for w in weights)


@pytest.mark.parametrize("lists", ["fixed", "offsets"])
def test_an_id_that_has_left_counted_in_its_mean(device, lists):
    layer, ids = with_rows([[1.0, 1.0], [2.0, 2.0]], device, pooling="mean")
    offsets = None if lists == "fixed" else torch.tensor([0, 2, 2], device=device)
    weights = torch.ones(ids.shape, device=device, requires_grad=True)
    y = layer(ids if lists == "fixed" else ids[0], offsets, weights if lists == "fixed" else weights.flatten())
    assert layer.erase(ids[0, :1]).all()
    y.sum().backward()
    # Its weight's gradient is of the row that it had.
    assert weights.grad.tolist() == [[1.0, 2.0]]
    assert layer.table.find(ids[0, 1:])[0].tolist() == [[1.75, 1.75]]


def test_a_batch_that_does_not_fit_renews_no_age(device):
    layer = DynamicEmbedding(4, 1, evict=None, expire_after=5, device=device)
    layer(torch.tensor([[1]], device=device))
    layer.advance_clock(10)
    with pytest.raises(gossamer.HashTableFull):
        layer(torch.tensor([[1, 2]], device=device))
    assert layer.expire() == 1
    # One that fits renews them, also where it has more ids than there is room for.
    layer(torch.tensor([[3]], device=device))
    layer.advance_clock(20)
    layer(torch.tensor([[3, 3, 3]], device=device))
    assert layer.expire() == 0


def test_the_smallest_layers_are_saved(device, tmp_path):
    """Tables of one bucket, of which a slice counts as contiguous whatever its stride."""
    admission = gossamer.nn.FrequencyAdmission(1, 8)
    ids = torch.tensor([[1, 2]], device=device)
    small = DynamicEmbedding(1, 4, optimizer=optim.SGD(lr=0.5), admission=admission, device=device)
    for _ in range(2):
        small(ids).sum().backward()
    small.save(tmp_path / "small.safetensors")
    other = DynamicEmbedding(
        1, 4, optimizer=optim.SGD(lr=0.5), admission=gossamer.nn.FrequencyAdmission(1, 8), device=device
    )
    other.load(tmp_path / "small.safetensors")
    assert torch.equal(other(ids), small(ids)) and len(other) == len(small) == 2
