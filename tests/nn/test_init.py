"""First values of tables from wide vectors."""

import pytest
import torch
from contracts import assert_near

from gossamer.nn.init import from_text_embeddings


def vectors(*variances, n=500):
    z = torch.randn(n, len(variances), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z = (z - z.mean(0)) / z.std(0, unbiased=False)
    return z * torch.tensor(variances, dtype=torch.float64).sqrt()


@pytest.mark.parametrize(("select", "columns"), [("variance", [0, 2]), ("uniform", [0, 1])])
def test_published_columns(select, columns):
    """Variances 3, 1, 2 and 0: the last column is never taken."""
    z = vectors(3, 1, 2, 0)
    found = from_text_embeddings(z, 2, select=select, std=1.0)
    assert_near(found, z[:, columns] / z[:, columns].std(unbiased=False))


def test_uniform_spreads():
    z = vectors(*[1.0] * 8)
    found = from_text_embeddings(z, 4, select="uniform", standardize=True, std=1.0)
    assert_near(found, z[:, [0, 2, 4, 6]])


def test_all_columns_are_the_identity_up_to_scale():
    z = vectors(3, 1, 2)
    for select in ("uniform", "random", "variance"):
        found = from_text_embeddings(z, 3, select=select)
        assert_near(found / found.std(unbiased=False), z / z.std(unbiased=False))
        assert found.std(unbiased=False).item() == pytest.approx((3 * 500) ** -0.5)


def test_random_columns_follow_the_seed():
    z = vectors(*range(1, 41))
    first, second = (from_text_embeddings(z, 5, select="random", seed=seed) for seed in (1, 2))
    assert torch.equal(first, from_text_embeddings(z, 5, select="random", seed=1))
    assert not torch.equal(first, second)


def test_standardized_columns():
    found = from_text_embeddings(vectors(9, 1, 4) + 5, 3, standardize=True, std=2.0)
    assert_near(found.mean(0) + 1, torch.ones(3, dtype=torch.float64))
    assert_near(found.std(0, unbiased=False), torch.full((3,), 2.0, dtype=torch.float64))
    assert from_text_embeddings(vectors(1, 2).half(), 2).dtype == torch.float16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"embedding_dim": 4}, "at least embedding_dim=4 columns that vary over the items, got 3 of 4"),
        ({"select": "best"}, "select must be one of .*, got 'best'"),
        ({"std": 0.0}, r"std must be positive, got 0\.0"),
        ({"vectors": torch.full((3, 4), torch.nan)}, "vectors must be finite"),
        ({"vectors": torch.ones(3)}, r"vectors must have shape \(N, D'\)"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        from_text_embeddings(**{"vectors": vectors(3, 1, 2, 0), "embedding_dim": 2} | arguments)
