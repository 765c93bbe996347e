"""Codes of vectors by residual quantisation, and tables that are looked up by them."""

import math

import pytest
import torch
from contracts import TrainedTableContract, assert_near

import gossamer
from gossamer.nn import ResidualQuantizer, SemanticIdEmbedding, balanced_kmeans, unique_codes
from gossamer.nn.embeddings import residual_quantizer
from gossamer.nn.embeddings.residual_quantizer import kmeans, nearest


def codes(n):
    return torch.randint(0, 4, (n, 3), generator=torch.Generator().manual_seed(n))


def case(**how):
    def make(num_embeddings, embedding_dim, **options):
        return SemanticIdEmbedding(num_embeddings, embedding_dim, **{"codes": codes(num_embeddings)} | how | options)

    def from_budget(num_embeddings, embedding_dim, nbytes, **options):
        more = {"codes": codes(num_embeddings)} | how | options
        return SemanticIdEmbedding.from_budget(num_embeddings, embedding_dim, nbytes, **more)

    make.from_budget = from_budget
    return make


TestSemanticId = TrainedTableContract.over({"codes": case(), "prefixes": case(prefixes=True, mode="mean")})


def quantizer():
    """Three levels of two codewords in the plane."""
    made = ResidualQuantizer(2, 3, 2, commitment=0.25, dtype=torch.float64)
    books = [[[1, 0], [0, 1]], [[0.1, 0.1], [-0.1, 0.3]], [[0, 0], [-0.1, 0.1]]]
    made.codebooks.data.copy_(torch.tensor(books, dtype=torch.float64))
    return made


def test_published_codes():
    made, z = quantizer(), torch.tensor([1.0, 0.21], dtype=torch.float64, requires_grad=True)
    found = made(z)
    assert found.codes.tolist() == [0, 1, 0]
    assert_near(found.values, torch.tensor([0.9, 0.3], dtype=torch.float64))
    assert_near(made.decode(found.codes), found.values)
    assert torch.equal(made.encode(z), found.codes)
    (dz,) = torch.autograd.grad(found.values.sum(), z)
    assert dz.tolist() == [1, 1]


def test_loss_is_the_sum_of_the_levels():
    """‖sg(r) − C‖² trains codewords, a quarter of ‖r − sg(C)‖² the vectors."""
    made, z = quantizer(), torch.tensor([[1.0, 0.21]], dtype=torch.float64, requires_grad=True)
    found = made(z)
    left = [torch.tensor(r, dtype=torch.float64) for r in ([1.0, 0.21], [0.0, 0.21], [0.1, -0.09])]
    chosen = [made.codebooks[level, code].detach() for level, code in enumerate([0, 1, 0])]
    distances = [(r - c).square().sum() for r, c in zip(left, chosen, strict=True)]
    assert_near(found.loss, 1.25 * sum(distances))
    dz, books = torch.autograd.grad(found.loss, [z, made.codebooks])
    assert_near(dz[0], 0.25 * 2 * sum(r - c for r, c in zip(left, chosen, strict=True)))
    assert_near(books[0, 0], 2 * (chosen[0] - left[0]))
    assert not books[0, 1].any()


def clustered_vectors(n=300, d=6):
    """Three groups of three groups of points."""
    generator = torch.Generator().manual_seed(0)
    coarse = 4 * torch.randn(3, d, generator=generator)
    fine = torch.randn(3, d, generator=generator)
    place = torch.arange(n)
    points = coarse[place % 3] + fine[place // 3 % 3]
    return points + 0.02 * torch.randn(n, d, generator=generator), place % 3


def test_fit_finds_the_hierarchy():
    """The first code is the coarse group, both together all nine; each level leaves less over."""
    x, group = clustered_vectors()
    made = ResidualQuantizer(6, 2, 3)
    fitted = made.fit(x)
    assert torch.equal(fitted, made.encode(x))
    assert len(torch.stack([fitted[:, 0], group], 1).unique(dim=0)) == 3
    assert len(fitted.unique(dim=0)) == 9
    left = x - made.codebooks[0][fitted[:, 0]].detach()
    assert (made.decode(fitted) - x).square().mean() < 0.05 * left.square().mean() < 0.05 * x.square().mean()


def test_dead_codes_are_reseeded():
    x, _ = clustered_vectors()
    made = ResidualQuantizer(6, 2, 3)
    made.fit(x)
    made.codebooks.data[0, 1] = 1000.0
    assert made.reseed_dead_codes(x) >= 1
    assert len(made.encode(x)[:, 0].unique()) == 3
    assert made.reseed_dead_codes(x) == 0


def test_balanced_clusters():
    """Eight items on a line in two clusters of four, where plain k-means makes three and five."""
    line = torch.tensor([0.0, 1, 2, 9, 10, 11, 12, 13]).unsqueeze(1)

    def distortion(found):
        centroids, chosen = found
        return (line - centroids[chosen]).square().sum().item()

    found = [balanced_kmeans(line, 2, seed=seed) for seed in range(6)]
    assert all(chosen.bincount().tolist() == [4, 4] for _, chosen in found)
    best = min(found, key=distortion)
    assert len(best[1][:4].unique()) == len(best[1][4:].unique()) == 1
    plain = kmeans(line, 2)
    assert sorted(plain[1].bincount().tolist()) == [3, 5]
    assert distortion(best) >= distortion(plain)


@pytest.mark.parametrize(("n", "k"), [(10, 4), (3, 5), (64, 8)])
def test_balanced_sizes(n, k):
    x = torch.randn(n, 3, generator=torch.Generator().manual_seed(n))
    made = ResidualQuantizer(3, 2, k)
    fitted = made.fit(x, balanced=True)
    for level in fitted.T:
        counts = level.bincount(minlength=k)
        assert counts.max() - counts.min() <= 1 and counts.sum() == n
    if n % k == 0:
        share = fitted[:, 0].bincount(minlength=k) / n
        assert -(share * share.log()).sum().item() == pytest.approx(math.log(k))


@pytest.mark.parametrize("dim", [1, 3])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (7, 5), (1001, 300)])
def test_nearest_words(n, k, dim):
    """Of equally near words the first, whether they are sought among numbers or vectors, of an even number or not."""
    generator = torch.Generator().manual_seed(n)
    x, words = (torch.randint(-3, 4, (rows, dim), generator=generator).float() for rows in (n, k))
    assert torch.equal(nearest(x, words), (x.unsqueeze(1) - words).double().square().sum(-1).argmin(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("compiled", [False, True])
def test_nearest_of_equal_words_is_the_first(dtype, compiled):
    """Products may round the columns of equal words differently; zeros of both signs are equal."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randn(3, 6, generator=generator, dtype=torch.float64).to(dtype)
    words[0, 0] = 0.0
    words = words[[2, 0, 1, 0, 1, 2, 0, 0, 1, 2, 1]]
    words[6, 0] = -0.0
    x = words[torch.randint(11, (500,), generator=generator)]
    x = x + torch.randn(x.shape, generator=generator, dtype=torch.float64).to(dtype) / 1024
    find = torch.compile(nearest, fullgraph=True) if compiled else nearest
    with gossamer.backend("reference"):
        assert set(find(x, words).tolist()) == {0, 1, 2}
    assert set(nearest(x, words).tolist()) == {0, 1, 2}


@pytest.mark.parametrize("size", [1e19, 3e38])
def test_nearest_words_whose_scores_overflow(size, monkeypatch):
    """Infinite scores are compared as they are; the search, which refuses them, gets none."""
    x, words = (
        torch.tensor([[size, 0.0], [0.0, -1.0], [0.0, 0.5]]),
        torch.tensor([[0.0, 1.0], [0.0, -1.0], [size, 0.0]]),
    )
    assert nearest(x[1:], words).tolist() == [1, 0]
    assert nearest(x, words[:2])[1:].tolist() == [1, 0]

    def refuse(*args):
        raise ValueError("keys are wrong")

    monkeypatch.setattr(residual_quantizer, "product_key_search", refuse)
    with pytest.raises(ValueError, match="keys are wrong"):
        nearest(x[1:], words[:2])


def test_many_codes_are_drawn_in_rounds():
    """Where fewer vectors differ than there are codes, each has one; else the codes are the vectors of the clusters."""
    x = torch.randn(500, 4, generator=torch.Generator().manual_seed(0))
    x[::2] = 0
    words, chosen = kmeans(x, 300)
    assert torch.equal(words[chosen], x) and len(words.unique(dim=0)) == 251
    again = kmeans(x, 300)
    assert torch.equal(again[0], words) and torch.equal(again[1], chosen)
    centres = 100 * torch.arange(200.0).unsqueeze(1).expand(-1, 2)
    words, chosen = kmeans(centres.repeat(10, 1), 200)
    assert torch.equal(words.sort(0).values, centres)


@pytest.mark.parametrize("scale", [1.0, 5e-324])
def test_draws_from_more_weights_than_multinomial_takes(scale, monkeypatch):
    """Each index is drawn as often as its weight says, none of weight zero, also where sums are subnormal numbers."""
    monkeypatch.setattr(residual_quantizer, "_MULTINOMIAL_WEIGHTS", 4)
    weights = scale * torch.tensor([0.0, 1.0, 0.0, 5.0, 2.0, 0.0], dtype=torch.float64)
    draws = 8000
    drawn, again = (
        residual_quantizer._drawn(weights, draws, torch.Generator().manual_seed(3)).bincount(minlength=6)
        for _ in range(2)
    )
    assert torch.equal(drawn, again) and not drawn[[0, 2, 5]].any()
    if scale == 1.0:
        share = weights / weights.sum()
        # Five standard deviations of a binomial distribution.
        assert ((drawn - draws * share).abs() <= 5 * (draws * share * (1 - share)).sqrt()).all()
    alone = scale * torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    assert (residual_quantizer._drawn(alone, 100, torch.Generator().manual_seed(3)) == 2).all()


@pytest.mark.parametrize("cluster", [kmeans, balanced_kmeans])
def test_more_vectors_than_multinomial_takes(cluster, monkeypatch):
    """As torch.multinomial would, which refuses them; codes drawn one by one and in rounds are all different."""
    centres = 100 * torch.arange(100.0).unsqueeze(1).expand(-1, 2)
    monkeypatch.setattr(residual_quantizer, "_MULTINOMIAL_WEIGHTS", 999)
    monkeypatch.setattr(torch, "multinomial", None)
    words, chosen = cluster(centres.repeat(10, 1), 100)
    assert torch.equal(words.sort(0).values, centres) and torch.equal(words[chosen], centres.repeat(10, 1))


def test_last_code_tells_items_apart():
    given = torch.tensor([[1, 2], [0, 0], [1, 2], [1, 2], [0, 0]])
    assert unique_codes(given)[:, 2].tolist() == [0, 0, 1, 2, 1]
    assert len(unique_codes(given).unique(dim=0)) == 5


def test_rows_of_codes_and_prefixes():
    given = torch.tensor([[0, 1], [1, 1], [0, 0]])
    table = SemanticIdEmbedding(3, 4, given)
    assert table.sizes == (2, 2)
    assert_near(table.lookup(torch.tensor([0])), (table.weight[0] + table.weight[3]).unsqueeze(0))
    deep = SemanticIdEmbedding(3, 4, given, prefixes=True)
    assert deep.sizes == (2, 3) and len(deep.addresses(torch.arange(3))[:, 1].unique()) == 3
    fixed = SemanticIdEmbedding(3, 4, given, num_codes=256)
    assert fixed.weight.shape == (512, 4) and fixed.codes.shape == (3, 2)


def test_published_bytes():
    """Three levels of 256 codewords: three bytes an item."""
    table = SemanticIdEmbedding(1000, 32, torch.zeros(1000, 3, dtype=torch.int64), num_codes=256)
    assert table.inference_nbytes() == 4 * 3 * 256 * 32 + 3 * 1000
    assert 4 * 3 * 256 * 32 == 98_304


def test_codes_of_trained_rows():
    """Vectors start near the rows, nearer with more bytes; groups of like rows share their first code."""
    generator = torch.Generator().manual_seed(0)
    group = torch.arange(600) % 8
    rows = torch.randn(8, 8, generator=generator)[group] + 0.05 * torch.randn(600, 8, generator=generator)
    ids, errors = torch.arange(600), []
    for nbytes in (2000, 6000):
        table = SemanticIdEmbedding.from_table(rows, nbytes=nbytes)
        assert 0.99 * nbytes < table.inference_nbytes() <= nbytes
        assert table.inference_nbytes() == SemanticIdEmbedding.size_within(600, 8, nbytes)
        errors.append((table.lookup(ids) - rows).square().mean() / rows.square().mean())
    assert errors[1] < errors[0] < 0.002
    few = SemanticIdEmbedding.from_table(rows, nbytes=2000, num_levels=1, num_codes=8)
    assert few.sizes == (8,) and len(torch.stack([few.addresses(ids).view(600), group]).unique(dim=1).T) == 8
    given = SemanticIdEmbedding.from_table(rows, nbytes=4000, codes=torch.zeros(600, 2, dtype=torch.int64))
    assert given.sizes == (1, 1)
    with pytest.raises(
        ValueError, match=r"nbytes must be at least \d+ for SemanticIdEmbedding with 600 embeddings of 8"
    ):
        SemanticIdEmbedding.from_table(rows, nbytes=90)
    with pytest.raises(ValueError, match="prefixes must be False without codes, got True"):
        SemanticIdEmbedding.from_table(rows, nbytes=4000, prefixes=True)
    with pytest.raises(ValueError, match=r"codes must be given to SemanticIdEmbedding\.from_budget, got None"):
        SemanticIdEmbedding.from_budget(600, 8, 4000)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"codes": torch.zeros(4, 2, dtype=torch.int64)}, r"codes must have shape \(N, L\) = \(3, any\), got \(4, 2\)"),
        ({"codes": torch.full((3, 2), -1)}, "codes must be at least 0, got -1"),
        ({"codes": torch.full((3, 2), 9), "num_codes": 4}, "codes must be below num_codes=4, got 9"),
        (
            {"codes": torch.zeros(3, 2, dtype=torch.int64), "num_codes": 4, "prefixes": True},
            "num_codes must be None with prefixes=True, got 4",
        ),
    ],
)
def test_bad_codes(arguments, message):
    with pytest.raises(ValueError, match=message):
        SemanticIdEmbedding(3, 4, **arguments)


def test_bad_vectors():
    made = ResidualQuantizer(3, 2, 2)
    with pytest.raises(ValueError, match=r"x must have shape \(n, d\) = \(any, 3\), got \(2, 4\)"):
        made.fit(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="x must hold at least one vector, got 0"):
        made.fit(torch.zeros(0, 3))
    with pytest.raises(ValueError, match="num_codes must be at least 1, got 0"):
        ResidualQuantizer(3, 2, 0)


def test_more_codes_than_the_memory_holds():
    """Refused before they are drawn one after the other."""
    with pytest.raises(RuntimeError, match="allocate"):
        balanced_kmeans(torch.ones(3, 2), 2**42)


@pytest.mark.parametrize("value", [1e19, float("inf"), float("nan")])
def test_vectors_whose_distances_overflow_are_refused(value):
    """Infinite distances would be no nearer than those of vectors that a cluster took."""
    x = torch.cat([torch.full((3, 2), value), torch.zeros(4, 2)])
    for clusters in (balanced_kmeans, lambda x, k: ResidualQuantizer(2, 1, k).fit(x)):
        with pytest.raises(ValueError, match=r"x must be finite, and its squared distances in torch\.float32, got"):
            clusters(x, 3)
