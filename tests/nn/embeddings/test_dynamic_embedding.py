"""gossamer.nn.DynamicEmbedding: against a static table, through admission, expiry and eviction, and its files."""

import copy
import os
import threading

import pytest
import torch

import gossamer
from gossamer import optim
from gossamer.nn import DynamicEmbedding, FrequencyAdmission, ProbabilisticAdmission
from gossamer.nn.embeddings import files

safetensors_torch = pytest.importorskip("safetensors.torch")
INT64 = torch.iinfo(torch.int64)
OPTIMIZERS = [
    optim.SGD(lr=0.1, momentum=0.9),
    optim.RowwiseAdagrad(lr=0.1, initial_accumulator=0.1),
    optim.Adam(lr=0.1),
]


def batch(step, device, distinct=60, shape=(8, 5), drift=0):
    """Ids spread over int64, which repeat within a batch and across batches."""
    generator = torch.Generator().manual_seed(step)
    some = torch.randint(INT64.min, INT64.max, (2000,), generator=torch.Generator().manual_seed(99))
    some[:3] = torch.tensor([INT64.min, INT64.max, -1])
    return some[torch.randint(distinct, shape, generator=generator) + drift * step].to(device)


def train(layer, steps, device, drift=4, start=0):
    """Steps on drifting ids, the clock ahead by one each; returns the results."""
    outputs = []
    for step in range(start, start + steps):
        layer.advance_clock(step)
        out = layer(batch(step, device, drift=drift))
        target = torch.linspace(-1, 1, out.numel(), device=device).view(out.shape)
        (out.float() - target).square().sum().backward()
        outputs.append(out.detach())
    return outputs


def everything(layer):
    """All state of a layer, by name."""
    state = layer.get_extra_state()
    return state["tensors"] | {k: torch.tensor(v) for k, v in state["header"]["counters"].items()}


def assert_same(first, second):
    first, second = everything(first), everything(second)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: type(o).__name__)
@pytest.mark.parametrize("pooling", ["sum", "mean", "max", None])
def test_it_trains_like_a_static_table(device, pooling, optimizer):
    """Results, rows and gradients of weights over several steps are bit by bit those of a table with a row for each."""
    layer = DynamicEmbedding(6, 3000, pooling=pooling, optimizer=optimizer, evict=None, device=device)
    ids = torch.stack([batch(step, device) for step in range(4)])
    known = ids.unique()
    static = copy.deepcopy(layer)(known if pooling is None else known[:, None]).detach()
    state = optimizer.state(len(known), 6, device)
    for step in range(4):
        index = torch.searchsorted(known, ids[step])
        weights = torch.rand(ids[step].shape, device=device) if pooling == "sum" else None
        lists = (index.view(-1, 1) if pooling is None else index, None)
        mine = None if weights is None else weights.clone().requires_grad_()
        theirs = None if weights is None else weights.clone().requires_grad_()
        out = layer(ids[step], None, mine) if pooling else layer(ids[step])
        with torch.enable_grad():
            expected = gossamer.gather_reduce(static, *lists, theirs, mode=pooling or "sum", bounds="drop")
        assert torch.equal(out.view(expected.shape), expected)
        dout = torch.randn_like(expected)
        out.backward(dout.view(out.shape))
        if weights is not None:
            expected.backward(dout)
            assert torch.equal(mine.grad, theirs.grad)
        gossamer.sparse_update_(
            static, *lists[:1], dout, None, weights, optimizer=optimizer, state=state, mode=pooling or "sum"
        )
    assert len(layer) == ids.unique().numel()
    assert torch.equal(layer.table.find(known)[0], static)


def test_ragged_bags(device):
    """CSR bags, empty ones too; ids without a row add nothing and do not count in a mean."""
    layer = DynamicEmbedding(3, 50, pooling="mean", device=device)
    ids = torch.tensor([5, -7, 5], device=device)
    out = layer(ids, torch.tensor([0, 0, 2, 3], device=device))
    rows = layer.table.find(ids)[0]
    assert not out[0].any() and torch.equal(
        out[1], gossamer.gather_reduce(rows, torch.tensor([[0, 1]]), mode="mean")[0]
    )
    layer.eval()
    assert torch.equal(layer(torch.tensor([[5, 12345]], device=device))[0], rows[0]) and len(layer) == 2


@pytest.mark.parametrize("pooling", ["sum", "mean", "max"])
def test_ids_without_offsets_are_bags_of_their_own(device, pooling):
    """Trained as ``(L, 1)`` are, also where a row is lost before the backward pass."""
    ids, layers = torch.arange(4, device=device), []
    for shape in ((4,), (4, 1)):
        layer = DynamicEmbedding(2, 4, pooling=pooling, optimizer=optim.SGD(lr=1.0), device=device)
        weights = torch.linspace(1, 2, 4, device=device).view(shape).requires_grad_() if pooling == "sum" else None
        out = layer(ids.view(shape), None, weights)
        layer(torch.full((1, 1), 100, device=device))
        assert layer.counters.evicted == 1
        out.square().sum().backward()
        layers.append((layer, out, None if weights is None else weights.grad.view(-1)))
    (first, out, dweights), (second, expected, wanted) = layers
    assert torch.equal(out, expected) and (wanted is None or torch.equal(dweights, wanted))
    assert_same(first, second)


@pytest.mark.parametrize("pooling", ["sum", "mean", "max"])
@pytest.mark.parametrize(
    ("dim", "dtype"), [(4, torch.float32), (64, torch.float32), (128, torch.float16), (300, torch.float32)]
)
@pytest.mark.parametrize("hot", [False, True])
def test_evaluation_reduces_the_rows_of_ids(device, pooling, dim, dtype, hot):
    """Few and many ids, rows fetched while ids are found or not, absent ids, long bags: the bits of two steps."""
    generator = torch.Generator().manual_seed(dim)
    layer = DynamicEmbedding(dim, 9000, pooling=pooling, dtype=dtype, key_dtype=torch.int32, device=device).eval()
    keys = torch.randperm(100_000, generator=generator)[:8000].int().to(device)
    layer.table.insert_or_assign(keys, torch.randn(8000, dim, generator=generator).to(device, dtype))
    ids = torch.cat([keys, keys.new_full((800,), -5)])[torch.randint(20 if hot else 8800, (3000,), generator=generator)]
    ragged = torch.tensor([0, 3, 3, 903, 910, *range(920, 2990, 10), 2990], device=device)
    weights = torch.rand(3000, generator=generator).to(device)
    rows = layer.table.rows(ids)
    for shape, offsets, used in (((600, 5), None, weights), ((3000,), ragged, weights), ((3000,), ragged, None)):
        given = None if used is None or pooling == "max" else used.view(shape)
        lists = (offsets, given)
        want = gossamer.gather_reduce(layer.table.values, rows.view(shape), *lists, mode=pooling, bounds="drop")
        assert torch.equal(layer(ids.view(shape), *lists), want)


def test_evaluation_has_a_gradient_for_weights(device):
    layer = DynamicEmbedding(4, 100, device=device).eval()
    ids = torch.arange(12, device=device).view(3, 4)
    layer.table.insert_or_assign(ids.flatten()[:9], torch.arange(36.0, device=device).view(9, 4))
    weights = torch.rand(3, 4, device=device, requires_grad=True)
    (found,) = torch.autograd.grad(layer(ids, None, weights).sum(), weights)
    values, present = layer.table.find(ids.flatten())
    assert torch.equal(found.flatten(), (values.sum(1) * present))


def test_values_depend_on_the_id_alone(device):
    """Order, batches and company do not matter; the seed does; values fill (−a, a)."""
    ids = torch.arange(4000, device=device) * 1_000_003
    layers = [DynamicEmbedding(4, 8000, initializer=0.25, seed=s, pooling=None, device=device) for s in (1, 1, 2)]
    first = layers[0](ids)
    for part in ids.flip(0).split(700):
        layers[1](part)
    assert torch.equal(first, layers[1](ids)) and not torch.equal(first, layers[2](ids))
    assert 0.2499 < first.abs().max() < 0.25
    assert abs(first.mean()) < 0.25 / 3**0.5 / first.numel() ** 0.5 * 4
    assert abs(first.std() * 3**0.5 / 0.25 - 1) < 0.02 and first.unique().numel() > 0.99 * first.numel()
    own = DynamicEmbedding(
        2, 10, pooling=None, initializer=lambda k, d: k[:, None].float().expand(-1, d), device=device
    )
    assert own(ids[:3]).tolist() == [[0, 0], [1_000_003, 1_000_003], [2_000_006, 2_000_006]]
    wrong = DynamicEmbedding(2, 10, initializer=lambda k, d: k[:, None].float(), device=device)
    with pytest.raises(ValueError, match=r"initializer must return \(3, 2\) values, got \(3, 1\)"):
        wrong(ids[:3, None])


@pytest.mark.parametrize("sketch", [False, True])
def test_frequency_admission(device, sketch):
    """A row at the third sight, counted within a batch and across batches; until then zeros and no step."""
    layer = DynamicEmbedding(
        2,
        100,
        pooling=None,
        optimizer=optim.SGD(lr=1.0),
        admission=FrequencyAdmission(3, capacity=5000, sketch=sketch),
        device=device,
    )
    once, twice, often = 11, 22, 33
    out = layer(torch.tensor([once, twice, often, often, twice, often], device=device))
    assert len(layer) == 1 and not out[:2].any() and out[2].any() and torch.equal(out[2], out[3])
    assert layer.counters.rejected == 3
    out.sum().backward()
    assert layer.table.contains(torch.tensor([often], device=device)).all()
    assert not layer(torch.tensor([once], device=device)).any()
    assert layer(torch.tensor([twice, once], device=device)).any(1).all() and len(layer) == 3
    layer.eval()
    layer(torch.tensor([44] * 9, device=device))
    assert len(layer) == 3 and layer.counters.rejected == 4


def test_probabilistic_admission(device):
    """95 % have a row after θ sights, whether in one batch or in several; the draw is repeatable."""
    ids = torch.arange(20_000, device=device)
    sizes = []
    for parts in (1, 5):
        layers = [
            DynamicEmbedding(1, 30_000, evict=None, admission=ProbabilisticAdmission(10), pooling=None, device=device)
            for _ in range(2)
        ]
        for layer in layers:
            for _ in range(parts):
                layer(ids.repeat(10 // parts))
        assert_same(*layers)
        sizes.append(len(layers[0]))
    for size in sizes:
        assert abs(size / 20_000 - 0.95) < 4 * (0.95 * 0.05 / 20_000) ** 0.5


def test_expiry(device):
    """Rows unused for the given time go, and come back as new, optimizer state too."""
    layer = DynamicEmbedding(
        2, 100, pooling=None, optimizer=optim.Adagrad(lr=0.5, initial_accumulator=0.25), expire_after=10, device=device
    )
    ids = torch.arange(6, device=device)
    first = layer(ids)
    first.sum().backward()
    layer.advance_clock(5)
    layer(ids[:2])
    layer.advance_clock(9)
    assert layer.expire() == 0
    layer.advance_clock(10)
    layer.advance_clock(3)
    layer.eval()
    layer(ids)
    layer.train()
    assert layer.clock == 10 and layer.expire() == 4 == layer.counters.expired and len(layer) == 2
    again = layer(ids)
    assert torch.equal(again[2:], first[2:]) and not torch.equal(again[:2], first[:2])
    rows = layer.table.rows(ids)
    assert (layer.optimizer_state["sum"][rows[2:]] == 0.25).all() and (layer.optimizer_state["sum"][rows[:2]] > 1).all()


def test_a_row_lost_before_the_backward_pass_is_left_alone(device):
    """What another id got in between is not trained on the first one's gradient."""
    layer = DynamicEmbedding(2, 4, pooling=None, optimizer=optim.SGD(lr=1.0), device=device)
    ids = torch.arange(4, device=device)
    out = layer(ids)
    layer(ids[1:])
    newcomer = layer(torch.tensor([100], device=device)).detach()
    kept = layer.table.contains(ids)
    assert kept.tolist() == [False, True, True, True] and layer.counters.evicted == 1
    before = layer.table.find(ids)[0]
    out.sum().backward()
    assert torch.equal(layer.table.find(torch.tensor([100], device=device))[0], newcomer)
    assert torch.equal(layer.table.find(ids[1:])[0], before[1:] - 1)


def make(device, kind="count", **changes):
    """A layer that is full and forgetful enough for all of its parts to matter."""
    admission = {
        "count": FrequencyAdmission(2, capacity=300),
        "sketch": FrequencyAdmission(2, capacity=400, sketch=True),
        "chance": ProbabilisticAdmission(3),
        "none": None,
    }[kind]
    options = {
        "optimizer": optim.Adam(lr=0.1),
        "admission": admission,
        "expire_after": 6,
        "evict": "lfu" if kind == "none" else "lru",
        "dtype": torch.bfloat16 if kind == "chance" else torch.float32,
        "device": device,
        "seed": 5,
    }
    return DynamicEmbedding(4, 50, **(options | changes))


@pytest.mark.parametrize("kind", ["count", "sketch", "chance", "none"])
def test_resume_has_the_same_bits(device, tmp_path, kind):
    """Training that was stopped, saved, loaded and continued ends where uninterrupted training does."""
    whole, first = make(device, kind), make(device, kind)
    outputs = train(whole, 6, device)
    whole.expire()
    outputs += train(whole, 6, device, start=6)
    train(first, 6, device)
    first.save(tmp_path / "layer")
    second = make(device, kind)
    train(second, 2, device, start=40)
    second.load(tmp_path / "layer")
    assert_same(first, second)
    second.expire()
    resumed = train(second, 6, device, start=6)
    assert all(torch.equal(a, b) for a, b in zip(outputs[6:], resumed, strict=True))
    assert_same(whole, second)
    assert whole.counters.evicted and (kind == "none" or whole.counters.rejected)
    module = make(device, kind)
    module.load_state_dict(whole.state_dict())
    assert_same(whole, module)


def test_deltas_follow_a_trainer(device, tmp_path):
    """Each delta brings a server to the trainer's rows, removed ones included, and another trainer to its state."""
    trainer, server = make(device, expire_after=3), DynamicEmbedding(4, 50, evict=None, device=device).eval()
    follower = make(device, admission=None)
    sizes = []
    for part in range(4):
        train(trainer, 4, device, start=4 * part, drift=6)
        trainer.expire()
        sizes.append(trainer.export_delta(tmp_path / f"{part}", with_state=True))
        assert server.apply_delta(tmp_path / f"{part}") == sizes[-1]
        follower.apply_delta(tmp_path / f"{part}")
        keys, values, _ = trainer.table.export()
        for other in (server, follower):
            found_keys, _, _ = other.table.export()
            assert torch.equal(found_keys.sort().values, keys.sort().values)
            assert torch.equal(other.table.find(keys)[0], values)
        assert server.sequence == trainer.sequence == part + 1
    assert trainer.counters.evicted and trainer.counters.expired and min(sizes) < len(trainer)
    rows = [layer.table.rows(keys) for layer in (trainer, follower)]
    for name, state in trainer.optimizer_state.items():
        other = follower.optimizer_state[name]
        assert torch.equal(state, other) if name == "step" else torch.equal(state[rows[0]], other[rows[1]])
    assert trainer.export_delta(tmp_path / "empty") == 0
    late = DynamicEmbedding(4, 50, evict=None, device=device)
    late(torch.tensor([[123]], device=device))
    with pytest.raises(ValueError, match=r"delta .* is number 5, but number 1 comes next"):
        late.apply_delta(tmp_path / "empty")
    trainer.export_delta(tmp_path / "full", full=True)
    late.apply_delta(tmp_path / "full")
    assert torch.equal(late.table.find(keys)[0], values) and len(late) == len(trainer) and late.sequence == 6
    small = DynamicEmbedding(4, 5, evict=None, device=device)
    with pytest.raises(gossamer.HashTableFull, match=r"holds \d+ new rows for 5 free ones"):
        small.apply_delta(tmp_path / "full")
    assert len(small) == 0


@pytest.mark.parametrize("broken", ["replace", "fsync"])
def test_a_failed_export_leaves_the_previous_one(device, tmp_path, monkeypatch, broken):
    """An error on the way keeps the old file, leaves no other, and the next export has the rows."""
    layer = make(device)
    train(layer, 3, device)
    path = tmp_path / "delta"
    layer.export_delta(path)
    old, sequence = path.read_bytes(), layer.sequence
    train(layer, 2, device, start=3)

    def fail(*args):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, broken, fail)
        for write in (layer.export_delta, layer.save):
            with pytest.raises(OSError, match="no space left"):
                write(path)
    assert path.read_bytes() == old and os.listdir(tmp_path) == ["delta"] and layer.sequence == sequence
    other = copy.deepcopy(layer)
    assert layer.export_delta(path) == other.export_delta(tmp_path / "again") > 0


def test_bad_files_are_named_and_change_nothing(device, tmp_path):
    """Truncated at any length, a flipped byte, foreign, missing, of another layer: one error each."""
    layer = make(device)
    train(layer, 4, device)
    layer.save(tmp_path / "good")
    layer.export_delta(tmp_path / "delta")
    victim = make(device)
    train(victim, 2, device)
    reference = copy.deepcopy(victim)
    data = (tmp_path / "good").read_bytes()
    bad = tmp_path / "bad"
    for size in (0, 4, 9, 200, len(data) // 2, len(data) - 1):
        bad.write_bytes(data[:size])
        with pytest.raises(ValueError, match="bad is truncated or corrupt"):
            victim.load(bad)
    for place in (len(data) // 2, len(data) - 5):
        bad.write_bytes(data[:place] + bytes([data[place] ^ 64]) + data[place + 1 :])
        with pytest.raises(ValueError, match="bad is corrupt: the checksum of"):
            victim.load(bad)
    safetensors_torch.save_file({"weight": torch.zeros(3)}, bad)
    for read in (victim.load, victim.apply_delta):
        with pytest.raises(ValueError, match=r"bad is not a (checkpoint|delta) of a gossamer\.nn\.DynamicEmbedding"):
            read(bad)
    with pytest.raises(ValueError, match=r"is not a checkpoint .*its kind is 'delta'"):
        victim.load(tmp_path / "delta")
    with pytest.raises(FileNotFoundError, match="nothing"):
        victim.load(tmp_path / "nothing")
    tensors, header = files.read(tmp_path / "good", "checkpoint")
    edits = {
        "lacks the tensor 'removed'": {k: v for k, v in tensors.items() if k != "removed"},
        "'table.keys'|'keys' must be": tensors | {"table.keys": tensors["table.keys"][:-1]},
        "where no search would find it": tensors | {"table.keys": tensors["table.keys"] + 1},
        "rows must ascend": tensors | {"table.rows": tensors["table.rows"] - 1000},
        "'optimizer.exp_avg' must be": tensors | {"optimizer.exp_avg": tensors["optimizer.exp_avg"][:, :2]},
    }
    for message, edited in edits.items():
        files.write(bad, edited, header)
        with pytest.raises(ValueError, match=message):
            victim.load(bad)
    assert_same(victim, reference)
    others = {
        "dim=4, but this layer has dim=3": DynamicEmbedding(3, 50, optimizer=optim.Adam(), device=device),
        "optimizer='Adam', .* has optimizer='SGD'": make(device, optimizer=optim.SGD(lr=0.1)),
        "capacity=50": DynamicEmbedding(4, 60, optimizer=optim.Adam(), seed=5, device=device),
        "evict='lru'": make(device, evict="lfu"),
        "dtype='torch.float32'": make(device, dtype=torch.float16),
        "seed=5": make(device, seed=6),
        "admission='Frequency": make(device, "none", evict="lru"),
    }
    for message, other in others.items():
        with pytest.raises(ValueError, match=message):
            other.load(tmp_path / "good")
        assert len(other) == 0
    with pytest.raises(ValueError, match="dim=4, but this layer has dim=3"):
        DynamicEmbedding(3, 50, device=device).apply_delta(tmp_path / "delta")
    assert safetensors_torch.load_file(tmp_path / "delta")["values"].shape[1] == 4


@pytest.mark.parametrize("kind", ["count", "none"])
def test_a_full_table_without_eviction_refuses(device, kind):
    """The batch that does not fit raises, and table, filter and counters are as they were."""
    layer = make(device, kind, evict=None)
    ids = torch.arange(50, device=device).repeat(2)[:, None]
    layer(ids)
    layer(torch.tensor([[70], [71]], device=device)) if kind == "count" else None
    before = copy.deepcopy(layer)
    with pytest.raises(gossamer.HashTableFull, match=r"[12] new keys for 0 free rows of capacity=50"):
        layer(torch.tensor([[99], [99], [1], [98]] if kind == "count" else [[99], [1]], device=device))
    assert_same(layer, before)


def test_half_precision_steps(device):
    """Rows of 16 bits train with stochastic rounding, the same each time."""
    optimizer = optim.SGD(lr=1e-4, stochastic_rounding=True)
    layers = [DynamicEmbedding(8, 90, optimizer=optimizer, dtype=torch.bfloat16, device=device) for _ in range(2)]
    for layer in layers:
        train(layer, 5, device, drift=0)
    assert_same(*layers)


def test_threads_take_turns(device):
    """Two threads that train one layer leave every id with a row of its own and no step lost."""
    layer = DynamicEmbedding(4, 4000, pooling=None, optimizer=optim.SGD(lr=1.0), initializer=0.0, device=device)
    errors = []

    def work(offset):
        try:
            for step in range(8):
                ids = torch.arange(100 * step, 100 * step + 200, device=device) + offset
                layer(ids).sum().backward()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(offset,)) for offset in (0, 100_000)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and len(layer) == 1800
    values = layer.table.find(torch.arange(900, device=device))[0][:, 0]
    assert (values[:100] == -1).all() and (values[100:800] == -2).all() and (values[800:] == -1).all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"pooling": "median"}, ValueError, "pooling must be one of"),
        ({"optimizer": torch.optim.SGD}, TypeError, "optimizer must be a gossamer.optim.Optimizer or None, got type"),
        ({"admission": 3}, TypeError, "admission must be FrequencyAdmission"),
        ({"expire_after": 0}, ValueError, "expire_after must be above 0 or None, got 0"),
        ({"evict": "score"}, ValueError, "evict='score' needs scores"),
        ({"initializer": -1.0}, ValueError, "initializer must be at least 0"),
        ({"seed": -1}, ValueError, r"seed must be in \[0, 2\*\*63\), got -1"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        DynamicEmbedding(2, 10, **arguments)
    for call in (lambda: FrequencyAdmission(0), lambda: FrequencyAdmission(256, sketch=True)):
        with pytest.raises(ValueError, match="threshold must be in"):
            call()
    with pytest.raises(ValueError, match=r"threshold must be at least 1, got 0.5"):
        ProbabilisticAdmission(0.5)
