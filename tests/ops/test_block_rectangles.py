"""Block-sparse products whose blocks make rectangles, which the native kernels compute as dense matrices."""

import importlib.util
import itertools
from dataclasses import replace

import pytest
import torch
from block_sparse_products import PRODUCTS, check_same_bits, functions, in_parts, make_inputs, topology_of
from helpers import assert_same_bits, check, run

from gossamer import BlockSparseTensor, BlockTopology
from gossamer.testing import assert_close

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("gossamer._C"), reason="needs the native kernels")

# Block rows of each rectangle: fewer and more rows than are packed at a time, one block row, and none.
HEIGHTS = (5, 1, 0, 40)
COLUMNS = 8
# Sizes of the dimension that is not blocked: at one, rectangles pay for the threads' barrier; at the other, none do.
MANY, FEW = 300, 20


def rectangles(block=(16, 16), columns=COLUMNS, heights=HEIGHTS):
    """A topology of rectangles ``columns`` block columns wide, three block rows without blocks, and unused room."""
    mask = torch.zeros(sum(heights) + 3, columns * len(heights), dtype=torch.bool)
    row = 0
    for i, height in enumerate(heights):
        mask[row : row + height, i * columns : (i + 1) * columns] = True
        row += height
    return BlockTopology.from_mask(mask, block, nnz=int(mask.sum()) + 2)


def chosen(t, across, part=None):
    """The rectangles by which a product with a topology is computed."""
    from gossamer import _C
    from gossamer.cpu_kernels.block_sparse import _lists

    lists = _lists(t.row_offsets, t.column_indices, t.column_offsets, live=t.live_rows, live_across=t.live_columns)
    return _C.choose_rectangles(lists, t.block, across, t.shape[1], t.shape[1] if part is None else part)


def test_choice():
    """Rectangles are found with the rows between them, and are taken where they are worth it."""
    t = rectangles()
    found = [(0, 5, 0, 8, 80, 128), (5, 6, 8, 8, 16, 128), (6, 46, 24, 8, 640, 128), (46, 49, 0, 0, 48, 0)]
    assert chosen(t, MANY) == found
    assert not chosen(t, FEW)
    # A dense operand in parts, one a rectangle, and parts that a rectangle crosses.
    assert chosen(t, MANY, part=128) == chosen(t, MANY)
    assert not chosen(t, MANY, part=64)
    # Columns that are not neighbours; bands, for each of which the dense operand would be read anew; no blocks.
    assert not chosen(topology_of("cpu", (16, 16), grid=(8, 30)), 10**6)
    band = (torch.arange(30)[:, None] - torch.arange(34)).add(2).abs() <= 2
    assert not chosen(BlockTopology.from_mask(band, 128), 10**6)
    assert not chosen(BlockTopology.from_mask(torch.zeros(3, 4, dtype=torch.bool), 16), 10**6)


def padded(t):
    """The same topology with padding at the end of its rectangles."""
    live = torch.full((t.grid[0],), t.block[0], dtype=torch.int32)
    live[torch.tensor(HEIGHTS).cumsum(0)[[0, 1, 3]] - 1] = torch.tensor([3, 16, 1], dtype=torch.int32)
    return replace(t, live_rows=live)


def test_choice_with_padding():
    """Rows and columns of padding are known at the end of a rectangle; elsewhere rows end it and columns count.

    Rows without blocks are computed, for they may have a bias.
    """
    t = padded(rectangles())
    t.live_rows[sum(HEIGHTS) :] = 0
    assert [r[4] for r in chosen(t, MANY)] == [67, 16, 625, 48]
    assert [r[5] for r in chosen(t.transposed(), MANY)] == [67, 16, 0, 625]
    t.live_rows[[0, 5]] = torch.tensor([0, -7], dtype=torch.int32)
    assert [r[4] for r in chosen(t, MANY)] == [67, 16, 625, 48]
    t.live_rows[2] = 9
    assert [(r[:2], r[4]) for r in chosen(t, MANY)][:2] == [((0, 3), 41), ((3, 5), 19)]
    assert [r[5] for r in chosen(t.transposed(), MANY)] == [80, 16, 0, 625]


# The operand, and the dimension of it or of the result, along which padding lies.
PADDED = {
    ("sdd", False): ("a", 0),
    ("sdd", True): ("b", 1),
    ("dsd", False): ("out", 0),
    ("dsd", True): ("b", 0),
    ("dds", False): ("a", 1),
    ("dds", True): ("out", 1),
}


@pytest.mark.parametrize("transposed", [False, True], ids=["stored", "transposed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("product", PRODUCTS)
def test_padding(product, dtype, transposed):
    """Padding is never read, whatever is there, and is zero in results, and in the gradients of what it is in."""
    t = padded(rectangles())
    rows = (torch.arange(t.block[0]) < t.live_rows[:, None]).flatten()
    # Room without blocks has the row behind the last.
    blocks = torch.cat([rows.view(t.grid[0], -1), torch.zeros(1, t.block[0], dtype=torch.bool)])[t.row_indices.long()]
    name, dim = PADDED[product, transposed]

    def keep(key, value, other):
        if key == "s" or (key, product) == ("out", "sdd"):
            return torch.where(blocks.unsqueeze(2), value, other)
        return torch.where(rows if dim else rows[:, None], value, other) if key == name else value

    def with_padding(function, other):
        def call(**inputs):
            out = function(**{key: keep(key, value, other) for key, value in inputs.items()})
            if other != 0:
                assert torch.equal(out, keep("out", out, 0.0))
            return keep("out", out, 0.0)

        return call

    t = t.transposed() if transposed else t
    function, reference = functions(product, t, backend="native")
    for by_columns in (False, True):
        inputs = make_inputs(product, t, n=MANY + 1, dtype=dtype, by_columns=(by_columns,) * 2)
        check(with_padding(function, float("nan")), with_padding(reference, 0.0), inputs)


@pytest.mark.parametrize("transposed", [False, True], ids=["stored", "transposed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("product", PRODUCTS)
def test_products(product, dtype, transposed):
    """Each product and its gradients, with a bias, by rows and by columns; n is not a multiple of a vector."""
    t = rectangles()
    t = t.transposed() if transposed else t
    for by_columns in (False, True):
        inputs = make_inputs(product, t, n=MANY + 1, dtype=dtype, by_columns=(by_columns,) * 2)
        check(*functions(product, t, backend="native"), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("product", PRODUCTS)
def test_parts(product, dtype):
    """Parts that are one a rectangle have the bits of one matrix; others end within rectangles; gradients so too."""
    t = rectangles()
    t = t.transposed() if product == "dds" else t
    function, reference = functions(product, t, backend="native")
    for by_columns in (False, True):
        whole = make_inputs(product, t, n=MANY, dtype=dtype, by_columns=(by_columns,) * 2, bias=False)
        parts = in_parts(whole, product, len(HEIGHTS))
        (name,) = (key for key in parts if parts[key].dim() == 3 and key != "s")
        dout = torch.randn(function(**whole).shape).to(dtype)
        one, other = (run(function, inputs, inputs, dout) for inputs in (whole, parts))
        assert other[name].stride() == parts[name].stride()
        other[name] = torch.cat(list(other[name]), 0 if product == "dsd" else 1)
        assert_same_bits(one, other)
        check(function, reference, in_parts(whole, product, 2 * len(HEIGHTS)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_columns_do_not_depend_on_each_other(dtype):
    """A column of a product with a transposed matrix has the same bits among many and among few, and they are right."""
    t = rectangles(heights=(40, 5))
    inputs = make_inputs("dsd", t.transposed(), n=4200, dtype=dtype, bias=False)
    function, _ = functions("dsd", t.transposed(), backend="native")
    whole = function(**inputs)
    for first, last in ((0, 1), (100, 120), (4090, 4200)):
        assert torch.equal(function(**inputs | {"b": inputs["b"][:, first:last].contiguous()}), whole[:, first:last])
    expected = BlockSparseTensor(inputs["s"].double(), t).to_dense().t() @ inputs["b"].double()
    error = (whole - expected).norm() / expected.norm()
    assert error < 16 * torch.finfo(dtype).eps


@pytest.mark.parametrize(("block", "columns"), [((64, 32), 3), ((16, 128), 1), ((128, 16), 5)])
def test_blocks(block, columns):
    """Blocks that end within a group of columns and within the rows that are packed at a time."""
    t = rectangles(block, columns, heights=(3, 0, 8))
    assert chosen(t, MANY) and chosen(t.transposed(), MANY)
    for product, activation, dtype in itertools.product(PRODUCTS, ("relu", None), (torch.float32, torch.bfloat16)):
        function, reference = functions(product, t, backend="native", activation=activation)
        check(function, reference, make_inputs(product, t, n=MANY, dtype=dtype), needs=[])
        if activation is None:
            check(function, reference, make_inputs(product, t, n=MANY))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_are_those_of_the_other_way(dtype):
    """Rectangle by rectangle or block by block: the same sums in the same order."""
    from gossamer import _C

    t = rectangles()
    for product in ("dsd", "dds"):
        inputs = make_inputs(product, t, n=MANY, dtype=dtype)
        function, _ = functions(product, t, backend="native", activation="silu")
        name, dim = ("b", 1) if product == "dsd" else ("a", 0)
        less = {name: inputs[name].narrow(dim, 0, FEW)}
        less |= {"bias": inputs["bias"][:FEW]} if product == "dsd" else {}
        part, whole = run(function, inputs | less)["out"], run(function, inputs)["out"]
        assert torch.equal(part, whole.narrow(dim, 0, FEW))
    # One block in a row far from the others, and the list is none of neighbours.
    mask = t.to_mask()
    mask[0, -1] = True
    other = BlockTopology.from_mask(mask, t.block)
    assert chosen(t, MANY) and not chosen(other, MANY)
    inputs = make_inputs("sdd", t, n=MANY, dtype=dtype)
    whole, found = (functions("sdd", s, backend="native")[0](**inputs) for s in (t, other))
    kept = torch.cat([torch.arange(COLUMNS), torch.arange(COLUMNS, int(t.row_offsets[-1])) + 1])
    if _C.isa() == "amx" and dtype == torch.bfloat16:
        # Rectangles are made of tiles, which have sums of their own.
        expected = functions("sdd", t, backend="native")[1](**{k: v.double() for k, v in inputs.items()})
        assert_close(found[kept], expected[: len(kept)], whole[: len(kept)])
    else:
        assert torch.equal(found[kept], whole[: len(kept)])


@pytest.mark.parametrize("product", PRODUCTS)
def test_same_bits(product):
    """Two runs, and one with one thread, agree bit by bit."""
    t = rectangles()
    function, _ = functions(product, t, backend="native")
    inputs = make_inputs(product, t, n=MANY)
    dout = torch.randn(run(function, inputs)["out"].shape)
    check_same_bits(function, inputs, dout, threads=True)


def test_instruction_sets(isa):
    """The kernels of each instruction set that this processor has."""
    for product, dtype in itertools.product(PRODUCTS, (torch.float32, torch.bfloat16)):
        t = rectangles((32, 16), 5, heights=(4, 1))
        inputs = make_inputs(product, t, n=MANY, dtype=dtype)
        check(*functions(product, t, backend="native"), inputs)
