"""The dense operands of sdd, dsd and dds: every layout and stride, parts, and what goes by TMA descriptors."""

import importlib.util
import itertools

import pytest
import torch
from block_sparse_products import (
    PRODUCTS,
    check_by_differences,
    functions,
    in_parts,
    live_values,
    make_inputs,
    randn,
    topology_of,
)
from helpers import check, check_draws, run

import gossamer
from gossamer import BlockSparseTensor, BlockTopology
from gossamer.ops._records import Layout


@pytest.mark.parametrize("product", PRODUCTS)
def test_layouts(kernel_backend, device, product):
    """Dense operands by rows and by columns: the same values, and gradients in the operands' own layouts."""
    t = topology_of(device)
    function, reference = functions(product, t, backend=kernel_backend)
    for by_columns in itertools.product([False, True], repeat=2 if product == "sdd" else 1):
        inputs = make_inputs(product, t, by_columns=(*by_columns, False))
        results = check(function, reference, inputs)
        for name in set(inputs) & {"a", "b"}:
            assert results[name].stride() == inputs[name].stride(), name


@pytest.mark.parametrize("product", PRODUCTS)
def test_strided_operands(kernel_backend, device, product):
    """Sliced and broadcast operands and output gradients, and values that are not a contiguous tensor."""
    t = topology_of(device)
    function, reference = functions(product, t, backend=kernel_backend)
    inputs = make_inputs(product, t)
    for name in inputs:
        wide = torch.stack([inputs[name]] * 2, -1)[..., 0]
        assert not wide.is_contiguous()
        check(function, reference, inputs | {name: wide})
    shape = reference(**inputs).shape
    row = torch.randn(shape[-1], device=device)

    def draw(i):
        dout = row.roll(i).expand(shape)
        wide = {k: v.double() for k, v in inputs.items()}
        return run(reference, wide, wide, dout.double()), run(reference, inputs, inputs, dout)

    check_draws(run(function, inputs, inputs, row.expand(shape)), draw)


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("block", [(32, 16), (16, 64)])
def test_parts(kernel_backend, device, product, block):
    """An operand in parts, by rows and by columns: the bits of the matrix in one, and gradients of its own strides."""
    t = topology_of(device, block, grid=(2, 4) if product != "dds" else (4, 2), density=0.7)
    function, _ = functions(product, t, backend=kernel_backend)
    for by_columns in (False, True):
        whole = make_inputs(product, t, by_columns=(by_columns, by_columns))
        parts = in_parts(whole, product)
        (name,) = (key for key in parts if parts[key].dim() == 3 and key != "s")
        dout = torch.randn(function(**whole).shape, device=device)
        one, other = (run(function, inputs, inputs, dout) for inputs in (whole, parts))
        assert other[name].stride() == parts[name].stride()
        other[name] = torch.cat(list(other[name]), 0 if product == "dsd" else 1)
        for key, value in one.items():
            assert torch.equal(other[key], value), key


@pytest.mark.parametrize("product", ["sdd", "dsd"])
def test_parts_of_views(kernel_backend, device, product):
    """Parts cut out of a larger tensor, in whose odd strides no vector is aligned, and one part again and again."""
    t = topology_of(device, (16, 32), grid=(3, 4))
    half, depth = t.shape[1] // 2, 64
    function, reference = functions(product, t, backend=kernel_backend)
    inputs = make_inputs(product, t, n=depth, dtype=torch.float16)
    for cut in (torch.randn(2, half + 1, depth + 1), torch.randn(1, half, depth + 1).expand(2, -1, -1)):
        b = cut.to(device, torch.float16)[:, :half, :depth]
        check(
            function,
            reference,
            inputs | {"b": b.mT if product == "sdd" else b},
            needs=["a" if product == "sdd" else "s"],
        )


def test_parts_that_are_one_matrix_and_a_transposed_result(kernel_backend, device):
    t = topology_of(device, (16, 32), grid=(4, 6))
    whole = make_inputs("dsd", t, n=9)
    check(*functions("dsd", t, backend=kernel_backend), whole | {"b": whole["b"].view(3, -1, 9)})
    inputs = make_inputs("sdd", t.transposed(), n=9)
    check(*functions("sdd", t.transposed(), backend=kernel_backend), in_parts(inputs, "sdd"))


def test_parts_have_second_derivatives(device):
    """Finite differences in float64 through gradients that come in parts themselves."""
    if device != "cpu":
        pytest.skip("float64 is for the CPU")
    t = topology_of(device, (16, 16), grid=(2, 2), density=1.0, spare=0)
    for product in PRODUCTS:
        inputs = in_parts(make_inputs(product, t, n=2, dtype=torch.float64), product)
        function, _ = functions(product, t, backend="native")
        check_by_differences(function, inputs)


def opcheck(args, backend):
    """Torch's own checks of the operator that takes a record of arguments."""
    name = {"SampledProduct": "block_sparse_sdd", "BlockProduct": "block_sparse_dsd"}[type(args).__name__]
    flat = (*Layout(type(args)).flatten(args), backend)
    torch.library.opcheck(getattr(torch.ops.gossamer, name).default, flat)


@pytest.mark.parametrize("transposed", [False, True])
def test_operators_are_well_formed(kernel_backend, device, transposed):
    """Schemas, fake kernels, autograd registration and traceability of both operators."""
    from gossamer.ops._block_sparse_operators import BlockProduct, SampledProduct, topology_lists

    t = topology_of(device, (16, 32), grid=(2, 2))
    lists = topology_lists(t)
    rows, cols = t.shape
    a, b = randn(rows, 5, device=device).requires_grad_(), randn(5, cols, device=device).requires_grad_()
    bias = randn(rows if transposed else cols, device=device).requires_grad_()
    opcheck(SampledProduct(a, b, bias, lists, *t.block, transposed), kernel_backend)
    values = live_values(t).requires_grad_()
    depth, long = (rows, cols) if transposed else (cols, rows)
    b = randn(depth, 5, device=device).requires_grad_()
    for by_columns in (False, True):
        bias = randn(long if by_columns else 5, device=device).requires_grad_()
        opcheck(BlockProduct(values, b, bias, lists, transposed, by_columns), kernel_backend)


@pytest.mark.parametrize("by_columns", [False, True])
def test_operators_with_parts_are_well_formed(device, by_columns):
    """Schemas, fake kernels and autograd registration of both operators with operands, and results, in parts."""
    from gossamer.ops._block_sparse_operators import BlockProduct, SampledProduct, topology_lists

    t = topology_of(device, (16, 32), grid=(2, 2))
    lists, backend = topology_lists(t), "native" if device == "cpu" else "triton"
    values = live_values(t).requires_grad_()
    b = in_parts(make_inputs("dsd", t, n=5, by_columns=(by_columns,) * 2), "dsd")["b"].requires_grad_()
    opcheck(BlockProduct(values, b, None, lists, False, by_columns, 2), backend)
    inputs = in_parts(make_inputs("sdd", t, n=5, by_columns=(by_columns,) * 2), "sdd")
    a, b = (inputs[name].requires_grad_() for name in "ab")
    opcheck(SampledProduct(a, b, None, lists, *t.block), backend)


def named_rows(t, tokens, dtype=torch.int64):
    """A row of ``tokens`` for each of a topology, some of them none: below zero, and beyond what is there."""
    rows = torch.randint(tokens, (t.shape[0],), device=t.device)
    rows[::5], rows[1::7], rows[2::11] = -1, tokens, 2**32 if dtype == torch.int64 else 2**31 - 1
    return rows.to(dtype)


@pytest.mark.skipif(not importlib.util.find_spec("gossamer._C"), reason="needs the native kernels")
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("depth", [300, 20], ids=["rectangles", "blocks"])
def test_named_rows_have_the_bits_of_rows_below_each_other(depth, index):
    """Of any strides, in each dtype; whether the blocks make rectangles that are worth it or not, or are transposed."""
    mask = torch.zeros(6, 32, dtype=torch.bool)
    mask[:4, :16], mask[4:, 16:] = True, True
    t = BlockTopology.from_mask(mask, (16, 16))
    for topology in (t, t.transposed()):
        rows = named_rows(topology, 7, index)
        there = ((rows >= 0) & (rows < 7)).unsqueeze(1)
        for dtype in (torch.float32, torch.bfloat16):
            shapes = ((7, 2 * depth), (depth, topology.shape[1]), (topology.shape[1],))
            a, b, bias = (randn(*shape, device="cpu", dtype=dtype) for shape in shapes)
            for view in (a[:, :depth], a[:, ::2], a.flatten()[: 7 * depth].view(depth, 7).t()):
                spread = torch.where(there, view[rows.clamp(0, 6)], 0)
                with gossamer.backend("native"):
                    ours = gossamer.sdd(view, b, topology, bias=bias, activation="silu", rows=rows).values
                    theirs = gossamer.sdd(spread, b, topology, bias=bias, activation="silu").values
                assert torch.equal(ours, theirs)


def test_gradients_of_named_rows(device, kernel_backend):
    """Gradients equal those of rows gathered beforehand, whichever kernel multiplies them."""
    t = topology_of(device, (16, 16), grid=(3, 4))
    rows = named_rows(t, 5)
    inputs = make_inputs("sdd", t, n=9)
    inputs["a"] = inputs["a"][:5].contiguous()

    def product(backend):
        def call(a, b, bias):
            with gossamer.backend(backend):
                return gossamer.sdd(a, b, t, bias=bias, rows=rows).values

        return call

    check(product(kernel_backend), product("reference"), inputs)


@pytest.mark.skipif(not importlib.util.find_spec("gossamer._C"), reason="native kernels alone gather rows")
def test_an_operator_with_named_rows_is_well_formed():
    """The operator passes torch's checks, and has no gradient."""
    from gossamer.ops._block_sparse_operators import SampledProduct, sdd_operator, topology_lists

    t = topology_of("cpu", (16, 32), grid=(2, 2))
    a, b = randn(5, 6, device="cpu"), randn(6, t.shape[1], device="cpu")
    args = SampledProduct(a, b, None, topology_lists(t), *t.block, a_rows=named_rows(t, 5, torch.int32))
    opcheck(args, "native")
    with pytest.raises(RuntimeError, match="gathered its rows inside the kernel has no gradient"):
        sdd_operator(args._replace(a=a.requires_grad_()), "native")


@pytest.mark.skipif(not importlib.util.find_spec("gossamer._C"), reason="needs the native kernels")
def test_named_rows_of_one_column_and_of_no_rows():
    """Views whose strides say nothing about where a row lies."""
    t = BlockTopology.from_mask(torch.ones(64, 64, dtype=torch.bool), (16, 16))
    rows = named_rows(t, 7)
    there = (rows >= 0) & (rows < 7)
    a, b = randn(1, 7, device="cpu").t(), randn(1, t.shape[1], device="cpu")
    with gossamer.backend("native"):
        ours = gossamer.sdd(a, b, t, rows=rows).to_dense()
        assert torch.equal(ours, torch.where(there, a[rows.clamp(0, 6), 0], 0)[:, None] * b)
        nothing = gossamer.sdd(randn(64, 7, device="cpu").t()[:0], randn(64, t.shape[1], device="cpu"), t, rows=rows)
    assert not nothing.values.any()


def test_named_rows_must_fit(device):
    t = topology_of(device, (16, 16), grid=(2, 2))
    a, b = torch.randn(5, 3, device=device), torch.randn(3, 32, device=device)
    with pytest.raises(ValueError, match=r"rows must have shape \(rows,\) = \(32\), got \(31,\)"):
        gossamer.sdd(a, b, t, rows=torch.zeros(31, dtype=torch.int64, device=device))
    with pytest.raises(TypeError, match=r"rows must be int32 or int64, got torch\.float32"):
        gossamer.sdd(a, b, t, rows=torch.zeros(32, device=device))
    with pytest.raises(ValueError, match="rows must be on the device of a"):
        gossamer.sdd(a, b, t, rows=torch.zeros(32, dtype=torch.int64, device="meta"))


def test_the_reference_takes_parts(device):
    t = topology_of(device, grid=(4, 4))
    for product in PRODUCTS:
        inputs = make_inputs(product, t)
        _, reference = functions(product, t, backend="reference")
        assert torch.equal(reference(**in_parts(inputs, product)), reference(**inputs))
    s = BlockSparseTensor(live_values(t), t)
    parts = torch.randn(2, t.shape[1] // 2, 3, device=device)
    torch.testing.assert_close(gossamer.ops.block_sparse.dsd_reference(s, parts), s.to_dense() @ parts.flatten(0, 1))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU makes its own choices, and other tests hold them")
@pytest.mark.parametrize("block", [(64, 128), (128, 64), (32, 32)])
def test_by_descriptors(monkeypatch, device, block):
    """What a Hopper GPU runs and the interpreter would not choose: TMA descriptors, wide tiles."""
    for name in ("block_sparse", "block_sparse_sampled"):
        module = importlib.import_module(f"gossamer.triton_kernels.{name}")
        monkeypatch.setattr(module, "arch_of", lambda tensor: 90)
    t = topology_of(device, block, grid=(2, 2), density=0.75)
    for product, by_columns in itertools.product(PRODUCTS, [(False, False), (True, True)]):
        inputs = make_inputs(product, t, n=40, dtype=torch.float16, by_columns=by_columns)
        check(*functions(product, t, backend="triton"), inputs)
        check(*functions(product, t, backend="triton"), in_parts(inputs, product))
