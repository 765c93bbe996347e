"""gossamer.HashTable: against a dictionary, against its reference bit for bit, and at the edges of its capacity."""

import threading

import pytest
import torch
from hash_table_calls import POLICY_SCORES, assert_same_state, random_keys, score_stream, state, stream

import gossamer
from gossamer import _backend
from gossamer.ops._hash_table_storage import digests_and_buckets
from gossamer.ops.hash_table import EVICT, HashTableFull

INT64 = torch.iinfo(torch.int64)
NATIVE = _backend.native_unavailable() is None


@pytest.fixture(params=["reference", "default"])
def served(request, device):
    """Run the test with the reference, and with what serves the device."""
    if request.param == "default":
        yield
    elif device == "cpu":
        with gossamer.backend("reference"):
            yield
    else:
        pytest.skip("the reference works on the CPU")


@pytest.mark.parametrize("value_dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("key_dtype", [torch.int64, torch.int32])
def test_without_eviction_it_is_a_dictionary(served, device, key_dtype, value_dtype):
    """Batches with repeats, against Python's dictionary: the last assignment stays, sums are rounded once."""
    options = {"key_dtype": key_dtype, "value_dtype": value_dtype, "device": device}
    table, truth = gossamer.HashTable(3, 1500, **options), {}
    for seed in range(4):
        keys = random_keys(300, 250, device, seed % 2, key_dtype)
        values = torch.randn(300, 3).to(device, value_dtype)
        assert table.insert_or_assign(keys, values).all()
        truth |= dict(zip(keys.tolist(), values, strict=True))
        more = random_keys(200, 300, device, seed + 1, key_dtype)
        added = torch.randn(200, 3).to(device, value_dtype)
        table.accum_or_assign(more, added)
        sums = {}
        for key, row in zip(more.tolist(), added.float(), strict=True):
            sums[key] = sums[key] + row if key in sums else row
        for key, row in sums.items():
            truth[key] = (truth[key].float() + row if key in truth else row).to(value_dtype)
        gone = keys[::9]
        assert table.erase(gone).all() and not table.contains(gone).any()
        truth = {k: v for k, v in truth.items() if k not in set(gone.tolist())}
        assert len(table) == len(truth)
        found_keys, found_values, _ = table.export()
        assert sorted(found_keys.tolist()) == sorted(truth)
        assert torch.equal(found_values, torch.stack([truth[k] for k in found_keys.tolist()]))
        asked = torch.cat([keys, random_keys(50, 50, device, 99, key_dtype)])
        values, found = table.find(asked)
        assert found.tolist() == [k in truth for k in asked.tolist()]
        assert not values[~found].any() and torch.equal(table.contains(asked), found)
    table.clear()
    assert len(table) == 0 and not table.contains(keys).any()


@pytest.mark.skipif(not NATIVE, reason="there are no native kernels")
@pytest.mark.parametrize("evict", EVICT)
def test_native_is_the_reference(evict):
    """Every result and all state, bit by bit, over two partitions that overflow (or, without eviction, do not)."""
    capacity, distinct = (2200, 1000) if evict is None else (2200, 4000)
    tables, results = [], []
    for backend in ("native", "reference"):
        tables.append(gossamer.HashTable(2, capacity, evict=evict))
        with gossamer.backend(backend):
            if evict in ("score",):
                results.append(score_stream(tables[-1], distinct))
            else:
                results.append(stream(tables[-1], "cpu", 700, distinct, 4 if evict else 1))
    for native, reference in zip(*results, strict=True):
        assert torch.equal(native, reference)
    assert_same_state(*tables)
    assert tables[0]._storage.fill.numel() == 2


@pytest.mark.skipif(not NATIVE, reason="there are no native kernels")
@pytest.mark.parametrize("evict", ["lru", "epoch_lfu", None])
def test_threads_do_not_show(evict):
    """1, 2 and 4 threads give the same bits, in batches large enough for four, of keys that half of a batch repeats."""
    tables, results = [], []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            table = gossamer.HashTable(4, 70000, evict=evict)
            done = []
            for seed in range(3):
                keys = random_keys(17000, 25000 if evict else 13000, "cpu", seed)
                keys[::2] = keys[0]
                values = torch.randn(17000, 4, generator=torch.Generator().manual_seed(seed))
                done += [table.rows(keys, True), table.insert_or_assign(keys.roll(3), values), *table.find(keys)]
                done += table.insert_and_evict(keys + 1, values) if evict else []
                done += [table.accum_or_assign(keys, values), table.erase(keys[:4000])]
            tables.append(table)
            results.append(done)
    finally:
        torch.set_num_threads(threads)
    for others in (1, 2):
        assert all(torch.equal(a, b) for a, b in zip(results[0], results[others], strict=True))
        assert_same_state(tables[0], tables[others])


@pytest.mark.parametrize("capacity", [1, 16, 17, 700, 2500])
def test_full_without_eviction(served, device, capacity):
    """Exactly ``capacity`` keys fit; one more raises and nothing changes; room that is made is used."""
    table = gossamer.HashTable(2, capacity, device=device)
    keys = torch.arange(capacity, device=device) * 977 - 5
    values = torch.randn(capacity, 2, device=device)
    assert table.insert_or_assign(keys, values).all() and len(table) == capacity and table.load_factor == 1
    before = state(table)
    batch = torch.cat([keys[:2], torch.tensor([-99, -99, -100], device=device)])
    calls = {
        "insert_or_assign": lambda: table.insert_or_assign(batch, torch.ones(len(batch), 2, device=device)),
        "accum_or_assign": lambda: table.accum_or_assign(batch, torch.ones(len(batch), 2, device=device)),
        "insert_and_evict": lambda: table.insert_and_evict(batch, torch.ones(len(batch), 2, device=device)),
        "import_": lambda: table.import_(batch, torch.ones(len(batch), 2, device=device)),
        "find_or_insert": lambda: table.find_or_insert(batch),
        "rows": lambda: table.rows(batch, insert=True),
    }
    for call in calls.values():
        with pytest.raises(HashTableFull, match=rf"2 new keys for 0 free rows of capacity={capacity}"):
            call()
        assert all(torch.equal(a, b) for a, b in zip(before, state(table), strict=True))
    table.erase(keys[:1])
    assert table.find_or_insert(torch.tensor([-99], device=device))[1].all() and len(table) == capacity
    table.reserve(capacity + 1)
    table.rows(torch.tensor([-100], device=device), insert=True)
    assert torch.equal(table.find(keys[1:])[0], values[1:])


@pytest.mark.parametrize("evict", EVICT[:-1])
def test_at_load_one_nothing_is_lost_or_shared(served, device, evict):
    """A table of one partition fills to the last row, then evicts one for one; table and evicted hold all that came."""
    table, values_of = gossamer.HashTable(2, 500, evict=evict, device=device), {}
    for seed in range(6):
        keys = (torch.randperm(400) + 400 * seed).to(device)
        values = torch.randn(400, 2).to(device)
        scores = torch.arange(400, device=device) + 300 * seed if evict in POLICY_SCORES else None
        values_of |= dict(zip(keys.tolist(), values, strict=True))
        before = set(table.export()[0].tolist())
        left, left_values, left_scores = table.insert_and_evict(keys, values, scores)
        kept, kept_values, _ = table.export()
        assert sorted(kept.tolist() + left.tolist()) == sorted(before | set(keys.tolist()) | set(left.tolist()))
        assert not set(kept.tolist()) & set(left.tolist()) or evict == "score"
        assert len(table) == min(500, len(before | set(keys.tolist())))
        assert all(torch.equal(v, values_of[k]) for k, v in zip(kept.tolist(), kept_values, strict=True))
        assert all(torch.equal(v, values_of[k]) for k, v in zip(left.tolist(), left_values, strict=True))
        assert left_scores.shape == left.shape
        rows = table.rows(kept)
        assert rows.min() >= 0 and rows.unique().numel() == len(table)


def one_bucket(evict, device):
    """A table of 16 rows: all keys see all rows."""
    return gossamer.HashTable(1, 16, evict=evict, device=device)


def fill(table, device, scores=None):
    keys = torch.arange(1, 17, device=device)
    for key in keys.split(1):
        table.insert_or_assign(key, key[:, None].float(), None if scores is None else scores[key - 1])
    return keys


def evicted_by(table, keys, device, scores=None):
    """The keys that leave, one call after another."""
    left = []
    for i, key in enumerate(keys):
        score = None if scores is None else torch.tensor([scores[i]], device=device)
        left += table.insert_and_evict(torch.tensor([key], device=device), torch.zeros(1, 1, device=device), score)[0]
    return [int(key) for key in left]


def test_lru(served, device):
    """The key that was not touched longest goes, and reading does not touch."""
    table = one_bucket("lru", device)
    keys = fill(table, device)
    table.find(keys[:1])
    table.find_or_insert(keys[1:2])
    table.accum_or_assign(keys[2:3], torch.ones(1, 1, device=device))
    assert evicted_by(table, range(100, 114), device) == [1, *range(4, 17)]
    assert sorted(table.export()[0].tolist()) == [2, 3, *range(100, 114)]


def test_lru_within_one_large_batch(served, device):
    """The last keys of a batch larger than the table stay."""
    table = one_bucket("lru", device)
    keys = torch.arange(1000, device=device)
    assert table.insert_or_assign(keys, keys[:, None].float()).all() and len(table) == 16
    assert table.contains(keys[-12:]).all()


def test_lfu(served, device):
    """The key with the lowest sum of increments goes; a new key counts once."""
    table = one_bucket("lfu", device)
    keys = fill(table, device, torch.arange(16, 0, -1, device=device))
    table.rows(keys[15:].repeat(30), insert=True)
    assert evicted_by(table, [100, 101, 102], device) == [15, 100, 101]
    assert evicted_by(table, [103], device, [INT64.max]) == [102]
    table.rows(torch.tensor([103], device=device), insert=True)
    assert int(table.export(lambda k, s: k == 103)[2]) == INT64.max


def test_epochs(served, device):
    """An older epoch goes first, whatever its counts."""
    for evict in ("epoch_lru", "epoch_lfu"):
        table = one_bucket(evict, device)
        keys = fill(table, device)
        table.rows(keys[:8].repeat(5), insert=True)
        table.epoch = 1
        table.rows(keys[8:], insert=True)
        left = evicted_by(table, [100, 101], device)
        assert set(left) <= set(range(1, 9)), evict
        assert (table.export(lambda k, s: k >= 9)[2] >> 32 == 1).all()
        with pytest.raises(ValueError, match=r"epoch must be an int in \[0, 2\*\*31\), got -1"):
            table.epoch = -1


def test_scores(served, device):
    """A lower score than all is refused, a higher one evicts the lowest; a hit takes the new score, up or down."""
    table = one_bucket("score", device)
    keys = fill(table, device, torch.arange(1, 17, device=device))
    assert evicted_by(table, [500], device, [0]) == [500] and not table.contains(keys.new_tensor([500])).any()
    assert not table.insert_or_assign(keys.new_tensor([500]), torch.ones(1, 1, device=device), keys.new_zeros(1)).any()
    assert evicted_by(table, [501], device, [200]) == [1]
    assert evicted_by(table, [16], device, [-7]) == []
    assert evicted_by(table, [502], device, [2]) == [16]
    assert evicted_by(table, [503], device, [2]) == [2]


def test_a_batch_keeps_its_own_rows(served, device):
    """rows() never gives one row to two keys, and refuses the keys that do not fit beside the batch's own."""
    table = gossamer.HashTable(1, 40, evict="lru", device=device)
    table.rows(torch.arange(100, 140, device=device), insert=True)
    keys = torch.cat([torch.arange(120, 140, device=device), torch.arange(60, device=device)])
    done = table.insert_rows(keys.repeat(2))
    rows = done.rows[:80]
    assert torch.equal(rows, done.rows[80:]) and (rows[:20] >= 0).all() and not done.inserted[80:].any()
    assert (rows[20:40] >= 0).all() and (rows[40:] == -1).all()
    assert rows[:40].unique().numel() == 40 and len(table) == 40
    assert sorted(done.victim_keys[done.evicted].tolist()) == list(range(100, 120))
    assert torch.equal(table.rows(keys), rows)


def test_many_inserts_of_one_key(served, device):
    table = gossamer.HashTable(2, 100, evict="lfu", device=device)
    keys = torch.full((5000,), INT64.min, device=device)
    done = table.insert_rows(keys)
    assert len(table) == 1 and done.rows.unique().numel() == 1
    assert done.inserted.nonzero().tolist() == [[0]]
    assert int(table.export()[2]) == 5000


def keys_of_partition(partitions, size, count):
    """Keys that all belong to the first partition."""
    keys = torch.arange(8_000)
    first = digests_and_buckets(keys, partitions, size)[1]
    return keys[torch.from_numpy(first < size)][:count]


def test_keys_of_one_partition(served, device):
    """More keys than a partition has slots go on into the other, and are found, assigned and erased there."""
    table = gossamer.HashTable(2, 2100, device=device)
    partitions, size = table._storage.fill.numel(), table._storage.partition_buckets
    keys = keys_of_partition(partitions, size, 1300).to(device)
    assert partitions == 2 and keys.numel() == 1300 > size * 16
    values = torch.randn(1300, 2, device=device)
    for part in range(0, 1300, 500):
        table.insert_or_assign(keys[part : part + 500], values[part : part + 500])
    others = torch.arange(-600, 0, device=device)
    table.find_or_insert(others)
    table.insert_or_assign(keys[::2], values[::2] + 1)
    values[::2] += 1
    assert torch.equal(table.find(keys)[0], values) and len(table) == 1900
    assert table.erase(keys[:700]).all() and torch.equal(table.contains(keys), torch.arange(1300, device=device) >= 700)
    assert table.contains(others).all() and table._storage.fill.sum() == len(table) == 1200
    bounded = gossamer.HashTable(2, 2100, evict="lru", device=device)
    bounded.insert_or_assign(keys, values)
    assert len(bounded) == int(bounded._storage.quota[0])


@pytest.mark.parametrize("evict", ["lru", "score", None])
def test_reserve_keeps_everything(served, device, evict):
    table = gossamer.HashTable(2, 300, evict=evict, device=device)
    keys = torch.arange(300, device=device) * 31
    scores = keys - 4000 if evict == "score" else None
    table.insert_or_assign(keys, torch.randn(300, 2, device=device), scores)
    before = sorted((int(k), v.tolist(), int(s)) for k, v, s in zip(*table.export(), strict=True))
    table.reserve(200)
    assert table.capacity == 300
    table.reserve(5000)
    after = sorted((int(k), v.tolist(), int(s)) for k, v, s in zip(*table.export(), strict=True))
    assert before == after and table.capacity >= 5000 and len(table) == 300


def test_export_and_import(served, device):
    """A predicate over keys and scores picks; an import restores values and scores, and keeps what is there."""
    table = gossamer.HashTable(2, 64, evict="lru", device=device)
    for batch in torch.arange(60, device=device).split(20):
        table.insert_or_assign(batch, torch.randn(20, 2, device=device))
    keys, values, scores = table.export(lambda keys, scores: (keys % 2 == 0) & (scores > 1))
    assert set(keys.tolist()) <= set(range(0, 60, 2)) and keys.numel() < 30
    other = gossamer.HashTable(2, 64, evict="lru", device=device)
    other.insert_or_assign(torch.tensor([-5], device=device), torch.ones(1, 2, device=device))
    assert other.import_(keys, values, scores).all() and len(other) == keys.numel() + 1
    order = [x.sort() for x in (keys, other.export(lambda k, s: k >= 0)[0])]
    assert torch.equal(order[0].values, order[1].values)
    assert torch.equal(other.find(keys)[0], values)
    other.rows(torch.tensor([7], device=device), insert=True)
    assert other.export(lambda k, s: k == 7)[2] > scores.max()
    with pytest.raises(ValueError, match="predicate must return a bool tensor"):
        table.export(lambda keys, scores: keys)


def test_rows_serve_gather_reduce(served, device):
    """Bags over a table's value storage are bags over the keys' values; a reserved key is none."""
    table = gossamer.HashTable(8, 50, device=device)
    keys = torch.tensor([5, INT64.max, -7], device=device)
    table.insert_or_assign(keys, torch.randn(3, 8, device=device))
    bags = keys[torch.tensor([[0, 1], [2, 2], [1, 0]], device=device)]
    sums = gossamer.gather_reduce(table.values, table.rows(bags.reshape(-1)).view(3, 2))
    torch.testing.assert_close(sums, table.find(bags.reshape(-1))[0].view(3, 2, 8).sum(1))


@pytest.mark.skipif(not NATIVE, reason="there are no native kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_first_values(dtype):
    """Native and reference give a key the same values, inside the bound and with the spread of a uniform draw."""
    tables = []
    for backend in ("native", "reference"):
        with gossamer.backend(backend):
            tables.append(gossamer.HashTable(37, 400, value_dtype=dtype, key_dtype=torch.int32))
            keys = random_keys(300, 300, "cpu", dtype=torch.int32).unique()
            rows = tables[-1].rows(keys, insert=True)
            tables[-1].start_uniform(rows, keys, 2**63 - 1, 0.3)
    first, second = (table.find(keys)[0] for table in tables)
    assert torch.equal(first, second) and first.abs().max() <= 0.3
    assert abs(first.double().std() * 3**0.5 / 0.3 - 1) < 0.02


def test_marks_beside_the_values(served, device):
    """A caller's array is set at the given rows, and nowhere for row −1."""
    table = gossamer.HashTable(2, 100, device=device)
    rows = table.rows(torch.arange(40, device=device), insert=True)
    for dtype, value in ((torch.int64, 2**40), (torch.bool, True)):
        marks = torch.zeros(table.values.shape[0], dtype=dtype, device=device)
        table.mark_rows(marks, torch.cat([rows[::3], rows.new_full((5,), -1)]), value)
        assert set(marks.nonzero().squeeze(1).tolist()) == set(rows[::3].tolist())
        assert (marks[rows[::3]] == value).all()


def test_two_python_threads():
    """Calls from several threads take turns."""
    table = gossamer.HashTable(4, 80_000)
    errors = []

    def work(start):
        try:
            for step in range(10):
                keys = torch.arange(start, start + 4000) + 4000 * step
                table.insert_or_assign(keys, keys[:, None].float().expand(-1, 4))
                table.find(keys)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(start,)) for start in (0, 1_000_000)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    keys = torch.cat([torch.arange(40_000), torch.arange(1_000_000, 1_040_000)])
    values, found = table.find(keys)
    assert not errors and found.all() and len(table) == 80_000
    assert torch.equal(values, keys[:, None].float().expand(-1, 4))


def test_empty_and_strided_batches(served, device):
    table = gossamer.HashTable(2, 30, evict="lru", device=device)
    none = torch.empty(0, dtype=torch.int64, device=device)
    assert table.rows(none, insert=True).shape == (0,) and table.find(none)[0].shape == (0, 2)
    assert [t.shape[0] for t in table.insert_and_evict(none, torch.empty(0, 2, device=device))] == [0, 0, 0]
    table.accum_or_assign(none, torch.empty(0, 2, device=device))
    keys = torch.arange(40, device=device)[::4]
    values = torch.randn(2, 10, device=device).t()
    table.insert_or_assign(keys, values)
    assert torch.equal(table.find(keys)[0], values)
