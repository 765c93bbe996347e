"""gossamer.gather_reduce: sums and both gradients against float64, ragged and fixed-width lists, and their edges."""

import pytest
import torch
import torch.nn.functional as F
from helpers import OperatorLog, assert_same_bits, check, check_capture, flat, huge_storage, ragged, run, saved_tensors

import gossamer
from gossamer import _backend
from gossamer.ops._bags import Bags
from gossamer.ops.gather_reduce import GatherDot, GatherReduce, gather_reduce_reference, sum_slots
from gossamer.testing import assert_close


def functions(index, offsets=None, *, backend, padding_idx=None, num_rows=None):
    """The function under test and its reference, closed over the lists, of table and weights."""
    padding = -1 if padding_idx is None else padding_idx % num_rows

    def function(table, weights=None):
        with gossamer.backend(backend):
            return gossamer.gather_reduce(table, index, offsets, weights, padding_idx=padding_idx)

    def reference(table, weights=None):
        return gather_reduce_reference(table, Bags(index, offsets, weights, padding_idx=padding))

    return function, reference


# No id, one, fewer and more than are unrolled, and an uneven rest.
@pytest.mark.parametrize("width", [0, 1, 3, 8, 11])
def test_fixed_width(kernel_backend, dtype, device, width):
    """Bags of J ids, odd D: the sum and the gradients of table and weights."""
    table = torch.randn(29, 97, device=device, dtype=dtype)
    index = torch.randint(29, (13, width), device=device)
    weights = torch.randn(13, width, device=device, dtype=dtype)
    check(*functions(index, backend=kernel_backend), {"table": table, "weights": weights})


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_ragged(kernel_backend, dtype, device, index_dtype):
    """CSR lists with empty bags at both ends and inside, and one bag of most ids."""
    index, offsets = ragged([0, 3, 1, 0, 40, 9, 8, 0], 29, device, index_dtype)
    table = torch.randn(29, 97, device=device, dtype=dtype)
    weights = torch.randn(index.shape[0], device=device, dtype=dtype)
    check(*functions(index, offsets, backend=kernel_backend), {"table": table, "weights": weights})


@pytest.mark.parametrize("dim", [1, 16, 64, 130, 1100])
def test_dims(kernel_backend, device, dim):
    """One column, columns that fit tiles, and more than one tile of them."""
    table = torch.randn(9, dim, device=device)
    index = torch.randint(9, (3, 4), device=device)
    weights = torch.randn(3, 4, device=device)
    check(*functions(index, backend=kernel_backend), {"table": table, "weights": weights})
    index, offsets = ragged([2, 0, 5], 9, device)
    weights = torch.randn(7, device=device)
    check(*functions(index, offsets, backend=kernel_backend), {"table": table, "weights": weights})


def test_no_weights(kernel_backend, dtype, device):
    """Plain sums."""
    table = torch.randn(29, 20, device=device, dtype=dtype)
    check(*functions(torch.randint(29, (7, 3), device=device), backend=kernel_backend), {"table": table})
    check(*functions(*ragged([4, 0, 2], 29, device), backend=kernel_backend), {"table": table})


def test_float32_weights_of_16_bit_tables(kernel_backend, dtype, device):
    """Weights of their own dtype, and their gradient in it."""
    table = torch.randn(29, 97, device=device, dtype=dtype)
    index = torch.randint(29, (7, 3), device=device)
    weights = torch.rand(7, 3, device=device)
    results = check(*functions(index, backend=kernel_backend), {"table": table, "weights": weights})
    assert results["weights"].dtype == torch.float32 and results["out"].dtype == dtype


def test_reference_is_embedding_bag(device):
    """The reference itself, against torch's embedding bag in float64: sums, gradients and padding."""
    index, offsets = ragged([0, 3, 1, 0, 20, 2], 11, device)
    weights = torch.randn(index.shape[0], device=device, dtype=torch.float64)
    table = torch.randn(11, 5, device=device, dtype=torch.float64)
    inputs = {"table": table, "weights": weights}

    def bag(table, weights):
        return F.embedding_bag(
            index, table, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True, padding_idx=4
        )

    dout = torch.randn(6, 5, device=device, dtype=torch.float64)
    _, reference = functions(index, offsets, backend="reference", padding_idx=4, num_rows=11)
    expected = run(bag, inputs, inputs, dout)
    for name, value in run(reference, inputs, inputs, dout).items():
        torch.testing.assert_close(value, expected[name])


def test_offsets_without_the_last(any_backend, device):
    """``include_last_offset=False``, torch's default: the last bag goes to the end."""
    index, offsets = ragged([2, 0, 3], 11, device)
    table = torch.randn(11, 5, device=device)
    with gossamer.backend(any_backend):
        short = gossamer.gather_reduce(table, index, offsets[:-1], include_last_offset=False)
        whole = gossamer.gather_reduce(table, index, offsets)
    assert short.shape == (3, 5) and torch.equal(short, whole)


@pytest.mark.parametrize("padding_idx", [0, 7, -1])
def test_padding(kernel_backend, device, padding_idx):
    """The padding row adds nothing and gets no gradient, whatever it and its weights hold."""
    num_rows = 9
    index = torch.randint(num_rows, (20, 3), device=device)
    index[:3] = padding_idx % num_rows
    table = torch.randn(num_rows, 33, device=device)
    weights = torch.randn(20, 3, device=device)
    pair = functions(index, backend=kernel_backend, padding_idx=padding_idx, num_rows=num_rows)
    clean = check(*pair, {"table": table, "weights": weights})
    assert not clean["table"][padding_idx].any() and not clean["weights"][:3].any()
    table[padding_idx] = float("nan")
    weights[index == padding_idx % num_rows] = float("nan")
    torch.manual_seed(1)
    dout = torch.randn(20, 33, device=device)
    results = run(pair[0], {"table": table, "weights": weights}, ["table", "weights"], dout)
    assert all(torch.isfinite(value).all() for value in results.values())


@pytest.mark.parametrize("with_weights", [False, True])
def test_limit(kernel_backend, device, with_weights):
    """Rows from a limit in device memory on are never read: the dropped tail of an expert layer's rows."""
    table = torch.randn(90, 97, device=device)
    table[70:] = float("nan")
    rows = torch.randperm(90).to(device, torch.int32)
    offsets = torch.tensor([0, 30, 70], device=device, dtype=torch.int32)
    weights = torch.rand(30, 3, device=device) if with_weights else None
    dead = (rows >= 70).view(30, 3)
    if with_weights:
        weights[dead] = float("nan")

    def function(table, weights=None):
        return sum_slots(table, rows, offsets, 3, weights, kernel_backend)

    def reference(table, weights=None):
        return gather_reduce_reference(table, Bags(rows.view(30, 3), weights=weights, limit=offsets[-1:]))

    inputs = {"table": table} | ({"weights": weights} if with_weights else {})
    results = check(function, reference, inputs)
    assert not results["table"][70:].any()
    if with_weights:
        assert not results["weights"][dead].any()


@pytest.mark.parametrize("num_bags", [0, 1])
def test_few_bags(any_backend, device, num_bags):
    """No bag and one bag; all bags empty; no table rows at all."""
    table = torch.randn(5, 6, device=device, requires_grad=True)
    with gossamer.backend(any_backend):
        index = torch.randint(5, (num_bags, 3), device=device)
        out = gossamer.gather_reduce(table, index)
        torch.testing.assert_close(out, table[index].sum(1))
        out.sum().backward()
        counts = torch.bincount(index.reshape(-1), minlength=5).float()
        assert torch.equal(table.grad, counts[:, None].expand(5, 6))

        none = torch.empty(0, dtype=torch.int64, device=device)
        empty = gossamer.gather_reduce(table, none, torch.zeros(num_bags + 1, dtype=torch.int64, device=device))
        assert empty.shape == (num_bags, 6) and not empty.any()
        assert not torch.autograd.grad(empty.sum(), table)[0].any()

        no_rows = torch.randn(0, 6, device=device, requires_grad=True)
        empty = gossamer.gather_reduce(no_rows, torch.empty(num_bags, 0, dtype=torch.int64, device=device))
        assert empty.shape == (num_bags, 6) and not empty.any()
        assert torch.autograd.grad(empty.sum(), no_rows)[0].shape == (0, 6)

        no_columns = gossamer.gather_reduce(torch.randn(5, 0, device=device), index)
        assert no_columns.shape == (num_bags, 0)


def test_duplicates(kernel_backend, dtype, device):
    """One row read by every position: its gradient sums them all, once each."""
    table = torch.randn(4, 33, device=device, dtype=dtype)
    index = torch.full((30, 5), 2, device=device)
    results = check(*functions(index, backend=kernel_backend), {"table": table})
    assert not results["table"][[0, 1, 3]].any()


def test_strided(kernel_backend, device):
    """Transposed and sliced table, lists and weights are read where they lie."""
    index = torch.randint(9, (3, 14), device=device).t()[::2]
    weights = torch.randn(3, 14, device=device).t()[::2]
    for table in (
        torch.randn(33, 9, device=device).t(),
        torch.randn(9, 70, device=device)[:, 1:67:2],
        torch.randn(1, 33, device=device).expand(9, 33),
    ):
        check(*functions(index, backend=kernel_backend), {"table": table, "weights": weights})
    flat = torch.randint(9, (24,), device=device)[::2]
    offsets = torch.tensor([0, 9, 5, 9, 12, 9], device=device)[::2]
    table, weights = torch.randn(9, 33, device=device), torch.randn(24, device=device)[::2]
    check(*functions(flat, offsets, backend=kernel_backend), {"table": table, "weights": weights})


def test_expanded_output_gradient(kernel_backend, device):
    """A broadcast gradient, as ``sum()`` gives, in both gradients."""
    table = torch.randn(9, 33, device=device, requires_grad=True)
    weights = torch.randn(7, 3, device=device, requires_grad=True)
    index = torch.randint(9, (7, 3), device=device)
    with gossamer.backend(kernel_backend):
        gossamer.gather_reduce(table, index, weights=weights).sum().backward()
    torch.testing.assert_close(weights.grad, table.detach().sum(1)[index])


@pytest.mark.parametrize("needed", ["table", "weights"])
def test_one_gradient_alone(kernel_backend, device, needed):
    """With the other input frozen, only the needed gradient is computed, with the same bits."""
    index = torch.randint(9, (7, 3), device=device)
    inputs = {"table": torch.randn(9, 33, device=device), "weights": torch.randn(7, 3, device=device)}
    function, _ = functions(index, backend=kernel_backend)
    dout = torch.randn(7, 33, device=device)
    both = run(function, inputs, inputs, dout)
    with OperatorLog() as log:
        one = run(function, inputs, [needed], dout)
    assert torch.equal(one[needed], both[needed])
    sort = ["dispatch"] if kernel_backend == "native" else []
    expected = ["gather_reduce", *([*sort, "gather_reduce"] if needed == "table" else ["gather_dot"])]
    assert [name for name, _, _ in log.calls] == expected


def test_same_bits(kernel_backend, dtype, device):
    """Two runs agree bit by bit, and a bag's row does not depend on the bags around it."""
    index = torch.randint(29, (13, 11), device=device)
    inputs = {
        "table": torch.randn(29, 97, device=device, dtype=dtype),
        "weights": torch.randn(13, 11, device=device, dtype=dtype),
    }
    dout = torch.randn(13, 97, device=device)
    function, _ = functions(index, backend=kernel_backend)
    first = run(function, inputs, inputs, dout)
    assert_same_bits(first, run(function, inputs, inputs, dout))
    order = torch.randperm(13, device=device)[:5]
    part, _ = functions(index[order], backend=kernel_backend)
    out = part(inputs["table"], inputs["weights"][order])
    assert torch.equal(out, first["out"][order])


def test_backward_twice(kernel_backend, device):
    """A kept graph gives the same gradients again."""
    index = torch.randint(9, (7, 3), device=device)
    table = torch.randn(9, 33, device=device, requires_grad=True)
    weights = torch.randn(7, 3, device=device, requires_grad=True)
    with gossamer.backend(kernel_backend):
        out = gossamer.gather_reduce(table, index, weights=weights)
    dout = torch.randn_like(out)
    first = torch.autograd.grad(out, (table, weights), dout, retain_graph=True)
    second = torch.autograd.grad(out, (table, weights), dout)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_saves_only_lists(kernel_backend, device):
    """The table is kept only for the weights' gradient; without gradients nothing is."""
    index = torch.randint(9, (7, 3), device=device)
    table = torch.randn(9, 33, device=device, requires_grad=True)
    weights = torch.randn(7, 3, device=device)
    function, _ = functions(index, backend=kernel_backend)
    saved = saved_tensors(lambda: function(table, weights), [])
    assert all(t.shape == (7, 3) for t in saved)
    with torch.no_grad():
        assert not saved_tensors(lambda: function(table, weights), [])
    assert not saved_tensors(lambda: function(table.detach(), weights), [])


@pytest.mark.parametrize("form", ["fixed", "ragged"])
def test_gradcheck(device, form):
    """Finite differences in float64, on the CPU's kernels."""
    if device != "cpu":
        pytest.skip("float64 is for the CPU")
    index, offsets = (torch.randint(5, (4, 3)), None) if form == "fixed" else ragged([2, 0, 4], 5, device)
    function, _ = functions(index, offsets, backend="native")
    table = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(index.shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (table, weights))


@pytest.mark.parametrize("sparse_grad", [False, True])
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_ids_outside_every_bag_may_be_anything(backend, sparse_grad):
    """Neither these ids nor their weights are read or checked."""
    if reason := _backend.unavailable(backend, "cpu"):
        pytest.skip(reason)
    table, offsets = torch.randn(4, 2, requires_grad=True), torch.tensor([1, 2])
    index, weights = torch.tensor([99, 1, -7]), torch.tensor([float("nan"), 2.0, float("nan")])
    layout = gossamer.TableLayout([(4, 2)])
    storage = torch.randn(layout.num_elements)
    with gossamer.backend(backend):
        y = gossamer.gather_reduce(table, index, offsets, weights, sparse_grad=sparse_grad)
        y.sum().backward()
        flat = gossamer.gather_reduce_tables(storage, layout, index, offsets, weights)
    assert torch.equal(y, 2 * table[1:2]) and table.grad.to_dense().tolist() == [[0, 0], [2, 2], [0, 0], [0, 0]]
    assert torch.equal(flat, 2 * layout.views(storage)[0][1:2])


@pytest.mark.parametrize("sparse_grad", [False, True])
def test_a_float64_table_gets_a_float64_gradient_of_a_narrower_result(sparse_grad):
    """Three thousand float32 gradients a row, which a float32 sum would round."""
    table = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    index, dout = torch.arange(9000).view(1, -1) % 3, torch.randn(1, 8)
    gossamer.gather_reduce(table, index, out_dtype=torch.float32, sparse_grad=sparse_grad).backward(dout)
    torch.testing.assert_close(table.grad.to_dense(), dout.double().mul(3000).expand(3, 8), rtol=1e-12, atol=0)
    layout = gossamer.TableLayout([(3, 8)])
    flat = torch.zeros(layout.num_elements, dtype=torch.float64, requires_grad=True)
    offsets = torch.tensor([0, 9000])
    gossamer.gather_reduce_tables(flat, layout, index.flatten(), offsets, out_dtype=torch.float32).backward(dout)
    torch.testing.assert_close(layout.views(flat.grad)[0], table.grad.to_dense(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles(kernel_backend, device, backend):
    """Traced whole, forward and backward, with a dynamic number of bags, and no recompilation for another."""
    torch._dynamo.reset()

    def f(table, index, weights):
        return gossamer.gather_reduce(table.sin(), index, weights=weights).cos()

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend=backend)
    table = torch.randn(9, 33, device=device)
    with gossamer.backend(kernel_backend):
        for i, num_bags in enumerate((7, 12, 5) if backend == "aot_eager" else (7,)):
            index = torch.randint(9, (num_bags, 3), device=device)
            inputs = {"table": table, "weights": torch.randn(num_bags, 3, device=device)}
            dout = torch.randn(num_bags, 33, device=device)
            with torch._dynamo.config.patch(error_on_recompile=i > 0):
                actual = run(lambda table, weights, i=index: compiled(table, i, weights), inputs, inputs, dout)
            expected = run(lambda table, weights, i=index: f(table, i, weights), inputs, inputs, dout)
            for name, value in actual.items():
                torch.testing.assert_close(value, expected[name])


def test_compiles_ragged(kernel_backend, device):
    """CSR lists of dynamic lengths."""
    torch._dynamo.reset()

    def f(table, index, offsets):
        return gossamer.gather_reduce(table, index, offsets, include_last_offset=False)

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    with gossamer.backend(kernel_backend):
        for lengths in ([3, 2, 4], [2, 0, 5, 6, 1]):
            index, offsets = ragged(lengths, 9, device)
            inputs = {"table": torch.randn(9, 33, device=device)}
            dout = torch.randn(len(lengths), 33, device=device)
            pair = [lambda table, f=g, i=index, o=offsets[:-1]: f(table, i, o) for g in (compiled, f)]
            assert_same_bits(run(pair[0], inputs, inputs, dout), run(pair[1], inputs, inputs, dout))


@pytest.mark.parametrize("form", ["fixed", "ragged"])
def test_operators_are_well_formed(kernel_backend, device, form):
    """Schemas, fake kernels, autograd registration and traceability of both operators."""
    index, offsets = (torch.randint(9, (3, 4), device=device), None)
    if form == "ragged":
        index, offsets = ragged([2, 0, 4], 9, device)
    table = torch.randn(9, 33, device=device, requires_grad=True)
    weights = torch.randn(index.shape, device=device, requires_grad=True)
    limit = torch.tensor([8], device=device, dtype=torch.int32)
    bags = Bags(index, offsets, weights, limit, padding_idx=2)
    args = flat(GatherReduce(table, bags, table.dtype), kernel_backend)
    torch.library.opcheck(torch.ops.gossamer.gather_reduce.default, args)
    dout = torch.randn(3, 33, device=device)
    args = flat(GatherDot(dout, table.detach(), bags._replace(weights=None), torch.float16), kernel_backend)
    torch.library.opcheck(torch.ops.gossamer.gather_dot.default, args)


def test_ids_outside_the_table(any_backend, device):
    """An error on the CPU that names the position; on CUDA such ids add nothing and are never read."""
    table = torch.randn(9, 33, device=device)
    for bad in (-1, 9, 2**40):
        index = torch.tensor([[0, 1], [bad, 3]], device=device)
        with gossamer.backend(any_backend):
            if device == "cpu" and any_backend != "triton":
                with pytest.raises(
                    IndexError, match=rf"index must be in \[0, N\) with N=9, got {bad} at flat position 2"
                ):
                    gossamer.gather_reduce(table, index)
            else:
                out = gossamer.gather_reduce(table, index)
                torch.testing.assert_close(out, torch.stack([table[0] + table[1], table[3]]))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"table": [1.0]}, TypeError, "table must be a torch.Tensor, got list"),
        ({"table": torch.randn(9)}, ValueError, r"table must have shape \(N, D\)"),
        ({"table": torch.ones(9, 4, dtype=torch.int64)}, TypeError, "table must be float32, float16, bfloat16"),
        ({"index": torch.zeros(3, 2)}, TypeError, "index must be int32 or int64, got torch.float32"),
        (
            {"index": torch.zeros(3, 1, 1, dtype=torch.int64)},
            ValueError,
            r"index must have shape \(B, J\) or \(L,\) when offsets is None, got \(3, 1, 1\)",
        ),
        (
            {"offsets": torch.zeros(3, dtype=torch.int64)},
            ValueError,
            r"index must have shape \(L,\) when offsets is given",
        ),
        ({"weights": torch.ones(3, 3)}, ValueError, "weights must have shape that of index"),
        ({"weights": torch.ones(3, 2, dtype=torch.int64)}, TypeError, "weights must be float32"),
        ({"weights": [[1.0]]}, TypeError, "weights must be a torch.Tensor, got list"),
        ({"mode": "median"}, ValueError, "mode must be one of .* got 'median'"),
        ({"padding_idx": 9}, ValueError, r"padding_idx must be in \[-N, N\) with N=9, got 9"),
        ({"padding_idx": -10}, ValueError, r"padding_idx must be in \[-N, N\) with N=9, got -10"),
        (
            {"index": torch.zeros(3, 2, dtype=torch.int64, device="meta")},
            ValueError,
            "index must be on the device of table",
        ),
        ({"weights": torch.ones(3, 2, device="meta")}, ValueError, "weights must be on the device of table"),
    ],
)
def test_errors(change, error, message):
    """Each documented error names the argument, the rule and the value."""
    arguments = {"table": torch.randn(9, 4), "index": torch.zeros(3, 2, dtype=torch.int64)} | change
    with pytest.raises(error, match=message):
        gossamer.gather_reduce(**arguments)


def test_maxima_of_nothing_have_a_gradient(any_backend, device):
    """Where no id contributes the result is zeros that depend on the table, so that a model can run backward."""
    table = torch.randn(10, 4, device=device, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64, device=device)
    with gossamer.backend(any_backend):
        y = gossamer.gather_reduce(table, none, torch.zeros(3, dtype=torch.int64, device=device), mode="max")
    y.sum().backward()
    assert torch.equal(y, torch.zeros(2, 4, device=device))
    assert torch.equal(table.grad, torch.zeros_like(table))


def test_offsets_errors():
    """Offsets must be a list of integers with at least one element."""
    table, index = torch.randn(9, 4), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(TypeError, match="offsets must be int32 or int64"):
        gossamer.gather_reduce(table, index, torch.zeros(3))
    with pytest.raises(ValueError, match=r"offsets must have shape \(B\+1,\)"):
        gossamer.gather_reduce(table, index, torch.zeros(3, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="at least one element"):
        gossamer.gather_reduce(table, index, torch.zeros(0, dtype=torch.int64))


def test_meta_tensors():
    """Shapes without data, on the meta device."""
    table = torch.empty(9, 4, device="meta", dtype=torch.float16)
    out = gossamer.gather_reduce(table, torch.empty(3, 2, device="meta", dtype=torch.int64))
    assert out.is_meta and out.shape == (3, 4) and out.dtype == torch.float16


def test_addresses_beyond_32_bits(kernel_backend, device):
    """A table of more than 2³¹ elements, of which only rows at the far end are touched."""
    if kernel_backend == "triton" and device == "cpu":
        pytest.skip("the interpreter copies its arguments whole")
    num_rows, dim = 2**31 // 64 + 100, 64
    table = huge_storage(num_rows * dim, torch.float16, device).view(num_rows, dim)
    tail = torch.randn(100, dim, device=device).half()
    table[-100:] = tail
    near = torch.randint(100, (5, 3), device=device)
    far = near + num_rows - 100
    weights = torch.randn(5, 3, device=device)
    function, _ = functions(far, backend=kernel_backend)
    small, _ = functions(near, backend=kernel_backend)
    dout = torch.randn(5, dim, device=device)
    inputs = {"weights": weights}
    actual = run(lambda weights: function(table, weights), inputs, inputs, dout)
    assert_same_bits(actual, run(lambda weights: small(tail, weights), inputs, inputs, dout))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_synchronisation_and_graph_capture(kernel_backend, device):
    """Clean under sync debugging, forward and backward, and right when replayed on other data."""
    table = torch.randn(50, 256, device=device, requires_grad=True)
    weights = torch.randn(20, 8, device=device, requires_grad=True)
    index = torch.randint(50, (20, 8), device=device)
    dout = torch.randn(20, 256, device=device)

    def step():
        out = gossamer.gather_reduce(table, index, weights=weights)
        return out, *torch.autograd.grad(out, (table, weights), dout)

    with gossamer.backend(kernel_backend):
        check_capture(step, lambda: index.copy_(torch.randint(50, (20, 8), device=device)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_long_bags_with_ids_that_do_not_count(mode, dtype):
    """Bags of several runs of ids, in some of which the padding id stands, at their ends and within."""
    torch.manual_seed(5)
    index, offsets = ragged([700, 0, 256, 3, 600], 50, "cpu", torch.int64)
    index[torch.tensor([0, 300, 301, 699, 900, 1500])] = 7
    weights = torch.randn(index.shape[0], dtype=dtype) if mode == "sum" else None
    table = torch.randn(50, 24, dtype=dtype)
    bags = Bags(index, offsets, weights, mode=mode, padding_idx=7)
    truth = gather_reduce_reference(
        table.double(), bags._replace(weights=None if weights is None else weights.double())
    )
    found = gossamer.gather_reduce(table, index, offsets, weights, mode=mode, padding_idx=7)
    assert_close(found, truth, gather_reduce_reference(table, bags), mode)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("hot", [False, True])
def test_every_width(dtype, hot):
    """Whole vectors, parts of one, and both, with rows that a sample of the ids finds near and others."""
    torch.manual_seed(6)
    num_rows = 9 if hot else 40_000
    index = torch.randint(num_rows, (300, 8))
    for dim in (1, 4, 8, 15, 17, 31, 33, 48, 63, 65, 100, 127, 129, 200):
        table = torch.randn(num_rows, dim, dtype=dtype)
        truth = gather_reduce_reference(table.double(), Bags(index))
        found = gossamer.gather_reduce(table, index)
        assert_close(found, truth, gather_reduce_reference(table, Bags(index)), f"D={dim}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [4, 8, 16, 32, 64, 96, 128])
def test_sums_follow_the_order_of_a_bag(dtype, dim):
    """Rows of whole vectors or a narrow one, packed or in a wider table, give the bits of additions one by one."""
    generator = torch.Generator().manual_seed(dim)
    wide = torch.randn(500, dim + 8, generator=generator).to(dtype)
    index, weights = torch.randint(500, (40, 7), generator=generator), torch.randn(40, 7, generator=generator)
    sums = torch.zeros(40, dim)
    for column in index.T:
        sums += wide[column, :dim].float()
    for table in (wide[:, :dim], wide[:, :dim].contiguous()):
        assert torch.equal(gossamer.gather_reduce(table, index), sums.to(dtype))
        assert torch.equal(gossamer.gather_reduce(table, index, out_dtype=torch.float32), sums)
        assert torch.equal(gossamer.gather_reduce(table, index, mode="mean"), (sums / 7).to(dtype))
        bags = Bags(index, weights=weights)
        truth = gather_reduce_reference(table.double(), bags._replace(weights=weights.double()))
        assert_close(gossamer.gather_reduce(table, index, weights=weights), truth, gather_reduce_reference(table, bags))


@pytest.mark.parametrize("place", [3, 63, 64, 700, 1499])
@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16])
def test_wrong_ids_and_weights_are_found_anywhere(place, weights_dtype):
    """An id outside the table, and a NaN weight unless its id does not count, at their first position."""
    index, offsets = torch.randint(1, 50, (1500,)), torch.tensor([0, 20, 800, 1500])
    table, weights = torch.randn(50, 8, dtype=weights_dtype), torch.ones(1500, dtype=weights_dtype)
    wrong = index.clone()
    wrong[place] = 50
    for w in (None, weights):
        with pytest.raises(IndexError, match=f"got 50 at flat position {place}$"):
            gossamer.gather_reduce(table, wrong, offsets, w)
    weights[place] = torch.nan
    with pytest.raises(ValueError, match=f"weights must not be NaN, got nan at flat position {place}$"):
        gossamer.gather_reduce(table, index, offsets, weights)
    with pytest.raises(ValueError, match=f"got nan at flat position {place}$"):
        gossamer.gather_reduce(table, index, offsets, weights, bounds="drop")
    index[place] = 0
    found = gossamer.gather_reduce(table, index, offsets, weights, padding_idx=0)
    assert found.isfinite().all()
    assert torch.equal(found, gossamer.gather_reduce(table, index, offsets, weights.nan_to_num(1), padding_idx=0))
