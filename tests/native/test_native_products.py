"""The native matrix products: every instruction set and every number of rows, by bits."""

import pytest
import torch

import gossamer
from gossamer.testing import assert_close


# Depths below and above one block of the panel, none a whole number of vectors; 37 rows are not whole tiles.
@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("depth", [23, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_rows_do_not_depend_on_their_company(isa, dtype, depth, layout):
    """With one row or many, whatever path they take, a row of a product has the same bits, and they are right."""
    rows = 40
    x = torch.randn(rows, depth).to(dtype)
    weight = (torch.randn(1, 37, depth) / depth**0.5).to(dtype)
    if layout == "columns":
        weight = weight.mT.contiguous().mT

    def product(count):
        dispatch = gossamer.dispatch(torch.zeros(count, 1, dtype=torch.int64), 1)
        with gossamer.backend("native"):
            return gossamer.grouped_matmul(x[:count], weight, dispatch, y_grouped=True)

    together = product(rows)
    if dtype != torch.float64:
        assert_close(together, x.double() @ weight[0].double().mT, x @ weight[0].mT)
    for count in (1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 33):
        alone = product(count)
        assert torch.equal(alone, together[:count]), f"{count} rows"


# Ranks of part of a vector and of two segments of a sum; widths that are not a whole number of vectors, deep enough for
# several segments.
@pytest.mark.parametrize("rank", [5, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_updated_rows_do_not_depend_on_their_company(isa, dtype, rank):
    """However many rows share an adapter, a row and the gradient of its x have the same bits, and they are right."""
    rows, depth, width = 40, 531, 45
    x = torch.randn(rows, depth).to(dtype)
    a, b = (torch.randn(1, rank, depth) / depth**0.5).to(dtype), (torch.randn(1, width, rank) / rank**0.5).to(dtype)
    dy = torch.randn(rows, width).to(dtype)

    def update(count):
        leaf = x[:count].clone().requires_grad_()
        with gossamer.backend("native"):
            y = gossamer.multi_low_rank(leaf, a, b, torch.zeros(count, dtype=torch.int64), scale=2.0)
        (dx,) = torch.autograd.grad(y, leaf, dy[:count])
        return y.detach(), dx

    together = update(rows)
    if dtype != torch.float64:
        truth = 2.0 * x.double() @ a[0].double().mT @ b[0].double().mT
        assert_close(together[0], truth, 2.0 * x @ a[0].mT @ b[0].mT)
        truth = 2.0 * dy.double() @ b[0].double() @ a[0].double()
        assert_close(together[1], truth, 2.0 * dy @ b[0] @ a[0])
    for count in (1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 33):
        for alone, all_of_them in zip(update(count), together, strict=True):
            assert torch.equal(alone, all_of_them[:count]), f"{count} rows"


# More than the 16 MB from which results go past the caches; 100 rows of 4096 values come in two chunks, 40 in one; the
# second shape's rows end within a tile and a line of memory.
@pytest.mark.parametrize("rows", [40, 100])
@pytest.mark.parametrize(("n", "c"), [(2080, 4096), (2071, 4099)])
def test_weight_gradients_beyond_the_caches(isa, n, c, rows):
    """Gradients that are written past the caches, at once or after partial sums, are right, and the same every time."""
    x, dy = torch.randn(rows, c).bfloat16(), torch.randn(rows, n).bfloat16()
    weight = torch.zeros(1, n, c, dtype=torch.bfloat16, requires_grad=True)
    dispatch = gossamer.dispatch(torch.zeros(rows, 1, dtype=torch.int64), 1)

    def gradient():
        with gossamer.backend("native"):
            y = gossamer.grouped_matmul(x, weight, dispatch, y_grouped=True)
            return torch.autograd.grad(y, weight, dy)[0][0]

    first = gradient()
    assert_close(first, dy.double().mT @ x.double(), dy.mT @ x)
    assert torch.equal(gradient(), first)


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_empty_sums_are_the_bias(isa, dtype, layout):
    """A product without terms is its bias, for every group of rows and columns."""
    weight = torch.zeros(2, 70, 0, dtype=dtype) if layout == "rows" else torch.zeros(2, 0, 70, dtype=dtype).mT
    bias = torch.randn(2, 70).to(dtype)
    dispatch = gossamer.dispatch(torch.arange(90).view(90, 1) % 2, 2)
    with gossamer.backend("native"):
        y = gossamer.grouped_matmul(torch.zeros(90, 0, dtype=dtype), weight, dispatch, bias=bias)
    assert torch.equal(y.view(90, 70), bias.repeat(45, 1))
