"""Tables that learn to be codes: product quantisation with both gradients, and two classes of ids."""

import functools

import pytest
import torch
from contracts import TrainedTableContract, assert_near
from helpers import assert_same_bits, check, run

import gossamer
from gossamer.nn import ProductQuantizedEmbedding
from gossamer.nn.embeddings import codeword_mixture
from gossamer.nn.embeddings.codes import code_bits, pack_codes, packed_width
from gossamer.ops.composed_rows import unpack_codes


def case(**how):
    def more(num_embeddings):
        return how | ({"frequent": num_embeddings // 3} if "rare_codes" in how else {})

    def make(num_embeddings, embedding_dim, **options):
        return ProductQuantizedEmbedding(num_embeddings, embedding_dim, 6, 4, **more(num_embeddings) | options)

    make.from_budget = lambda n, d, nbytes, **options: ProductQuantizedEmbedding.from_budget(
        n, d, nbytes, num_parts=4, **more(n) | options
    )
    return make


class TestProductQuantized(
    TrainedTableContract.over(
        {"nearest": case(), "softmax": case(variant="sx"), "two classes": case(rare_codes=3, mode="mean")}
    )
):
    # The output is constant between choices; what stands in for its gradient is tested below.
    test_gradients = None


@pytest.mark.parametrize("bits", [1, 3, 5, 6, 8, 11, 16])
@pytest.mark.parametrize("parts", [1, 3, 8])
def test_packing(bits, parts):
    codes = torch.randint(0, 2**bits, (7, parts), generator=torch.Generator().manual_seed(bits))
    codes[0], codes[1] = 0, 2**bits - 1
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (7, packed_width(parts, bits))
    assert torch.equal(unpack_codes(packed, parts, bits), codes.int())
    assert code_bits(2**bits) == bits and code_bits(2**bits - 1) == (bits if bits > 1 else 1)


def published():
    """Two parts of two codewords: those of a query (1, 2, −1, 0.5) are (1, 1) and (−1, 0)."""
    table = ProductQuantizedEmbedding(1, 4, 2, 2, regularization=0.0)
    with torch.no_grad():
        table.weight.copy_(torch.tensor([[1.0, 2.0, -1.0, 0.5]]))
        table.codewords.copy_(torch.tensor([[[1.0, 1.0], [0.0, 0.0]], [[-1.0, 0.0], [1.0, 1.0]]]))
    return table


def test_published_values():
    """The nearest codewords, and the gradient of the output for the query as it is."""
    table = published()
    assert table.choose(torch.tensor([0])).tolist() == [[0, 0]]
    out = table.lookup(torch.tensor([0]))
    assert out.tolist() == [[1, 1, -1, 0]]
    gradient = torch.tensor([[1.0, -2.0, 3.0, 0.5]])
    out.backward(gradient)
    assert torch.equal(table.weight.grad, gradient) and table.codewords.grad is None


def test_regularization_trains_the_codewords():
    """A backward pass through the table adds the gradient of the mean squared distance."""
    table = published()
    table.regularization = 0.5
    ids = torch.tensor([0, 0, 0])
    table.lookup(ids).sum().backward()
    words = table.codewords.detach().clone().requires_grad_()
    chosen = words[torch.arange(2), 0]
    distance = (chosen - table.weight.detach().view(2, 2)).square().sum(-1).mean()
    (0.5 * distance).backward()
    assert_near(table.codewords.grad, words.grad)


def test_softmax_gradient():
    """The value of the best codeword, the gradient of the mixture, by its formula."""
    table = ProductQuantizedEmbedding(5, 6, 4, 2, variant="sx", dtype=torch.float64)
    ids = torch.tensor([3, 0, 3])
    factors = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    out = table.lookup(ids)
    (out * factors).sum().backward()
    leaves = [p.detach().clone().requires_grad_() for p in (table.weight, table.keys, table.codewords)]
    weight, keys, words = leaves
    pieces = weight[ids].view(3, 2, 3)
    scores = (pieces.unsqueeze(2) * keys).sum(-1)
    mixture = (scores.softmax(-1).unsqueeze(-1) * words).sum(2)
    (mixture.flatten(1) * factors).sum().backward()
    best = torch.stack([words[p, scores[:, p].argmax(-1)] for p in range(2)], 1).flatten(1)
    assert torch.equal(out, best)
    for parameter, leaf in zip((table.weight, table.keys, table.codewords), leaves, strict=True):
        assert_near(parameter.grad, leaf.grad)


@pytest.mark.parametrize("variant", ["vq", "sx"])
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_search_finds_the_best_scores(variant, parts):
    """Codes chosen without storing scores are those of the highest scores, also where some are not finite."""
    table = ProductQuantizedEmbedding(300, 6, 21, parts, variant=variant)
    for parameter in table.parameters():
        torch.nn.init.normal_(parameter)
    ids = torch.arange(300)
    for entry in (0.5, float("nan"), float("inf")):
        table.weight.data[7, 2] = entry
        scores = table._responses(table._pieces(table.weight), ids)
        assert torch.equal(table.choose(ids), scores.argmax(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixture(monkeypatch, dtype):
    """Queries in several chunks, the last one shorter: gradients against float64, the same bits for any number of
    threads.
    """
    monkeypatch.setattr(codeword_mixture, "_SCORES", 4 * 3 * 5)
    inputs = {"pieces": torch.randn(14, 3, 2), "keys": torch.randn(3, 5, 2), "codewords": torch.randn(3, 5, 2)}
    inputs = {name: value.to(dtype) for name, value in inputs.items()}
    words = torch.randn(14, 3, 2, dtype=dtype)

    def grafted(pieces, keys, codewords):
        found = codeword_mixture.with_mixture_gradient(words, pieces, keys, codewords)
        assert torch.equal(found, words)
        return found - words.detach()

    def plain(pieces, keys, codewords):
        weights = torch.einsum("lpd,pkd->lpk", pieces, keys).softmax(-1)
        found = torch.einsum("lpk,pkd->lpd", weights, codewords)
        return found - found.detach()

    check(grafted, plain, inputs)
    dout, threads = torch.randn(14, 3, 2), torch.get_num_threads()
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(run(grafted, inputs, list(inputs), dout))
    torch.set_num_threads(threads)
    assert_same_bits(*results)


def test_two_classes():
    """Rare ids choose among the first codewords alone, and their codes take fewer bits."""
    table = ProductQuantizedEmbedding(100, 8, 64, 4, frequent=10, rare_codes=4)
    codes = table.choose(torch.arange(100))
    assert codes[10:].max() < 4 <= codes[:10].max()
    before = table.lookup(torch.arange(100)).detach()
    table.freeze()
    assert table.served.codes.shape == (10, 3) and table.served.rare.shape == (90, 1)
    assert torch.equal(table.choose(torch.arange(100)), codes)
    assert torch.equal(table.lookup(torch.arange(100)), before)
    with pytest.raises(IndexError):
        table.lookup(torch.tensor([100]))


def test_published_bytes():
    """A million rows of 16: K = 32 in eight parts, and 256 codewords of which rare ids use 64."""
    dense = ProductQuantizedEmbedding(10**6, 16, 32, 8, device="meta")
    assert dense.inference_nbytes() == 5_002_048
    classes = ProductQuantizedEmbedding(10**6, 16, 256, 4, frequent=10**5, rare_codes=64, device="meta")
    assert classes.inference_nbytes() == 4 * 256 * 16 + 10**5 * 4 + 9 * 10**5 * 3


def test_frozen_tables_take_less():
    table = ProductQuantizedEmbedding(1000, 16, 32, 8, optimizer=gossamer.optim.Adam(lr=0.1))
    assert table.nbytes() > 3 * 1000 * 16 * 4
    assert table.freeze().nbytes() == 32 * 16 * 4 + 1000 * 5
    assert not any(p.requires_grad for p in table.parameters())


def test_starts_from_a_trained_table():
    """Rows around eight points come back as those points; the better, the larger the budget."""
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(8, 8, generator=generator)
    weight = points[torch.arange(400) % 8] + 0.01 * torch.randn(400, 8, generator=generator)
    table = ProductQuantizedEmbedding.from_table(weight, nbytes=2000, num_parts=4)
    assert table.inference_nbytes() <= 2000
    found = table.lookup(torch.arange(400)).detach()
    assert (found - weight).square().mean() < 0.01 * weight.var()
    wider = ProductQuantizedEmbedding.from_table(weight, nbytes=4000, num_parts=4)
    assert (wider.lookup(torch.arange(400)) - weight).square().mean() < (found - weight).square().mean()


@pytest.mark.parametrize("variant", ["vq", "sx"])
def test_learns(variant):
    """Both gradients bring the vectors of ids of four kinds to the targets of their kinds."""
    torch.manual_seed(0)
    kinds = torch.randn(4, 8)
    targets = kinds[torch.arange(40) % 4]
    table = ProductQuantizedEmbedding(40, 8, 8, 2, variant=variant)
    for parameter in table.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    optimizer = torch.optim.Adam(table.parameters(), lr=0.05)
    for _ in range(100):
        loss = (table.lookup(torch.arange(40)) - targets).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.2 * targets.var()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_codes": 0}, "num_codes must be at least 1, got 0"),
        ({"num_codes": 2**17}, "num_codes must be at most 65536, got 131072"),
        ({"num_parts": 3}, "embedding_dim must be a multiple of num_parts, 3, got 8"),
        ({"variant": "pq"}, "variant must be one of .*, got 'pq'"),
        ({"frequent": 3}, "frequent and rare_codes go together, got 3 and None"),
        ({"frequent": 11, "rare_codes": 2}, r"frequent must be in \[0, N\] with N=10, got 11"),
        ({"frequent": 3, "rare_codes": 300}, "rare_codes must be at most num_codes, 256, got 300"),
        ({"regularization": -1.0}, r"regularization must be at least 0, got -1\.0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        functools.partial(ProductQuantizedEmbedding, 10, 8)(**arguments)
