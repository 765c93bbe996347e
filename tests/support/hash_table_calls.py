"""Calls of a hash table, and the comparison of the resulting tables."""

import torch

POLICY_SCORES = ("lfu", "epoch_lfu", "score")


def random_keys(count, distinct, device, seed=0, dtype=torch.int64):
    """Keys drawn with repeats from ``distinct`` ones that are spread over the dtype, its extremes among them."""
    generator = torch.Generator().manual_seed(seed)
    info = torch.iinfo(dtype)
    some = torch.randint(info.min, info.max, (distinct,), generator=generator)
    some[: min(4, distinct)] = torch.tensor([info.min, info.max, 0, -1])[: min(4, distinct)]
    return some.unique()[torch.randint(some.unique().numel(), (count,), generator=generator)].to(device, dtype)


def state(table):
    """Everything that determines a table's further behaviour, as tensors."""
    storage, live = table._storage, table.live_rows()
    found = [storage.digests, live, storage.keys[live], table.values[live], storage.buckets[:, 0], storage.fill]
    if storage.scores is not None:
        found.append(storage.scores[live])
    return [t.clone() for t in found] + [torch.tensor([len(table), table._clock])]


def assert_same_state(first, second):
    for a, b in zip(state(first), state(second), strict=True):
        assert torch.equal(a, b)


def scores_for(evict, count, device, seed):
    """Scores for the policies that take some, else None."""
    if evict not in POLICY_SCORES:
        return None
    return torch.randint(0, 50, (count,), generator=torch.Generator().manual_seed(seed)).to(device)


def stream(table, device, batch, distinct, rounds=6):
    """Make calls of all kinds; return every result."""
    results = []
    for seed in range(rounds):
        keys = random_keys(batch, distinct, device, seed)
        values = torch.randn(batch, table.dim, generator=torch.Generator().manual_seed(seed)).to(device)
        values = values.to(table.value_dtype)
        scores = scores_for(table.evict, batch, device, seed)
        table.epoch = seed // 2
        results += table.find_or_insert(keys, values, scores)
        results.append(table.insert_or_assign(keys.roll(7), values, scores))
        results += table.insert_and_evict(keys.flip(0) + 1, values, scores)
        results.append(
            table.accum_or_assign(
                keys[: batch // 2], values[: batch // 2], None if scores is None else scores[: batch // 2]
            )
        )
        results += table.find(keys + seed)
        results.append(table.erase(keys[: batch // 8]))
        results.append(table.rows(keys[: batch // 3], True, None if scores is None else scores[: batch // 3]))
    return results


def score_stream(table, distinct):
    """Calls with scores that rise and fall."""
    results = []
    for seed in range(5):
        keys = random_keys(900, distinct, "cpu", seed)
        values = torch.randn(900, table.dim, generator=torch.Generator().manual_seed(seed)).to(table.value_dtype)
        scores = torch.randint(-100, 100, (900,), generator=torch.Generator().manual_seed(seed))
        results += table.insert_and_evict(keys, values, scores)
        results += [table.insert_or_assign(keys[::2], values[::2], scores[::2] + seed)]
        results += table.find(keys)
    return results
