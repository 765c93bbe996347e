"""The native matrix products: every instruction set and every number of rows, by bits."""

import pytest
import torch

import gossamer
from gossamer.testing import assert_close

ISAS = ["avx512_bf16", "avx512", "avx2", "generic"]


@pytest.fixture(params=ISAS)
def isa(request):
    """One instruction set's kernels, if this processor runs them."""
    extension = pytest.importorskip("gossamer._C")
    try:
        extension.choose_isa(request.param)
    except ValueError:
        pytest.skip(f"this processor does not run {request.param}")
    yield request.param
    extension.choose_isa("")


# Depths below and above one block of the panel, none a whole number of vectors; 37 rows are no whole number of tiles.
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
