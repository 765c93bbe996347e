"""gossamer.multi_low_rank: many adapters in one batch, their gradients and the rows that they leave alone."""

import pytest
import torch
import torch.nn.functional as F
from helpers import OperatorLog, assert_same_bits, check, check_capture, run, saved_tensors
from multi_low_rank_inputs import NAMES, A, C, M, N, R, make_ids, make_inputs

import gossamer
from gossamer.ops._records import Layout
from gossamer.ops.multi_low_rank import (
    MultiLowRank,
    MultiLowRankBackward,
    multi_low_rank_reference,
    row_adapters,
)


def functions(ids, *, backend, scale=1.5, **form):
    """The function under test and its reference, closed over the adapters of the rows, of x, a, b and out."""

    def function(x, a, b, out=None):
        with gossamer.backend(backend):
            # A sum of another product, which is written to.
            target = None if out is None else out * 1
            y = gossamer.multi_low_rank(x, a, b, ids, scale=scale, out=target, **form)
        assert target is None or y is target
        return y

    def reference(x, a, b, out=None):
        plain = ids if isinstance(ids, torch.Tensor) else row_adapters(ids)
        return multi_low_rank_reference(x, a, b, plain, scale=scale, out=out, **form)

    return function, reference


def test_reference_is_the_formula(device):
    """The reference itself against one update a row, and rows sorted by adapter as written down by hand."""
    ids = torch.tensor([0, -1, 2, 0, 2, 2, -1, 1])
    d = gossamer.adapter_dispatch(ids, 3)
    assert d.slots.tolist() == [0, 3, 7, 2, 4, 5, 1, 6] and d.offsets.tolist() == [0, 2, 3, 6]
    assert torch.equal(row_adapters(d), ids)
    inputs = {k: v.double() for k, v in make_inputs("cpu", m=8, num_adapters=3).items()}
    scale, ranks = torch.tensor([0.5, 1.0, 2.0]), torch.tensor([3, 0, 1])
    y = multi_low_rank_reference(**inputs, adapter_ids=ids, scale=scale, ranks=ranks)
    for m, i in enumerate(ids.tolist()):
        x, a, b, out = (inputs[k] for k in NAMES)
        kept = slice(0, int(ranks[i]))
        update = 0 if i < 0 else scale[i].double() * (b[i][:, kept] @ (a[i][kept] @ x[m]))
        torch.testing.assert_close(y[m], out[m] + update)


@pytest.mark.parametrize("with_out", [True, False])
def test_against_float64(kernel_backend, dtype, device, with_out):
    """Mixed adapters, rows without one, a scale for each: the result and all gradients."""
    scale = torch.rand(A, device=device) + 0.5
    pair = functions(make_ids(device=device), backend=kernel_backend, scale=scale)
    check(*pair, make_inputs(device, dtype, out=with_out))


def test_double(device):
    """float64 on the CPU keeps float64."""
    if device == "cuda":
        pytest.skip("float64 is computed on the CPU alone")
    function, reference = functions(make_ids(), backend="native")
    inputs = {k: v.double() for k, v in make_inputs("cpu").items()}
    dout = torch.randn(M, N, dtype=torch.float64)
    actual, expected = run(function, inputs, inputs, dout), run(reference, inputs, inputs, dout)
    for name in actual:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-12, atol=1e-12)


def test_one_adapter_is_a_low_rank_layer(kernel_backend, dtype, device):
    """With one adapter the layer's product and its update are those of gossamer.low_rank_linear."""
    weight = (torch.randn(N, C, device=device) / C**0.5).to(dtype)
    inputs = make_inputs(device, dtype, num_adapters=1, out=False)
    ids = torch.zeros(M, dtype=torch.int64, device=device)

    def function(x, a, b):
        with gossamer.backend(kernel_backend):
            return gossamer.multi_low_rank(x, a, b, ids, scale=2.0, out=F.linear(x, weight))

    def reference(x, a, b):
        with gossamer.backend("reference"):
            return gossamer.low_rank_linear(x, weight.to(x.dtype), a[0], b[0], scale=2.0)

    check(function, reference, inputs)


@pytest.mark.parametrize("ranks", [[3, 1, 0, 2, 3], [0, 0, 0, 0, 0]])
def test_mixed_ranks(kernel_backend, device, ranks):
    """What lies beyond an adapter's rank is not read, NaN or not, and gets zero gradient; rank 0 changes nothing."""
    ranks = torch.tensor(ranks, device=device)
    inputs = make_inputs(device)
    pair = functions(make_ids(device=device), backend=kernel_backend, ranks=ranks)
    check(*pair, inputs)
    beyond = torch.arange(R, device=device) >= ranks[:, None]
    inputs["a"][beyond] = float("nan")
    inputs["b"].transpose(1, 2)[beyond] = float("nan")
    dout = torch.ones(M, N, device=device)
    actual = run(pair[0], inputs, NAMES, dout)
    assert not actual["a"][beyond].any() and not actual["b"].transpose(1, 2)[beyond].any()
    assert all(torch.isfinite(v).all() for v in actual.values())


def test_rows_without_adapter_keep_their_bits(kernel_backend, dtype, device):
    """Id −1 is not an adapter, and not adapter 0: signed zeros, NaN and infinity stay, gradients skip the row."""
    ids = make_ids(device=device, none=0.4)
    none = ids < 0
    inputs = make_inputs(device, dtype)
    inputs["out"][none] = torch.tensor([-0.0, float("nan"), float("inf"), 1.0], device=device, dtype=dtype).repeat(16)[
        :N
    ]
    inputs["x"][none] = float("nan")
    out = inputs["out"].clone()
    with gossamer.backend(kernel_backend):
        y = gossamer.multi_low_rank(inputs["x"], inputs["a"], inputs["b"], ids, scale=1.0, out=out)
    assert y is out
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(out.view(bits)[none], inputs["out"].view(bits)[none])
    assert (out[~none] != inputs["out"][~none]).any(1).all() and torch.isfinite(out[~none]).all()
    dout = torch.randn(M, N, device=device, dtype=dtype)
    dout[none] = float("nan")
    function, _ = functions(ids, backend=kernel_backend)
    grads = run(function, inputs, ["x", "a", "b"], dout)
    assert all(torch.isfinite(grads[k]).all() for k in ("x", "a", "b")) and not grads["x"][none].any()


@pytest.mark.parametrize("ids", [torch.full((M,), -1), torch.full((M,), A - 1), torch.arange(M) % 2 * 3], ids=str)
def test_few_adapters_used(kernel_backend, device, ids):
    """No row with an adapter; all with the last; two of five: adapters without rows get zero gradient."""
    ids = ids.to(device)
    actual = check(*functions(ids, backend=kernel_backend), make_inputs(device))
    idle = [i for i in range(A) if i not in ids.tolist()]
    assert not actual["a"][idle].any() and not actual["b"][idle].any()


@pytest.mark.parametrize(
    ("m", "num_adapters", "r", "c", "n"),
    [
        (0, 3, 2, 9, 7),
        (1, 128, 16, 130, 70),
        (9, 2, 70, 75, 80),
        (300, 2, 16, 64, 200),
        (3, 2, 8, 2049, 3424),
        (1, 1, 1, 1, 1),
    ],
)
def test_sizes(kernel_backend, device, m, num_adapters, r, c, n):
    """No row; one row of 128 adapters; ranks beyond a block; many rows of one adapter; widths that nothing divides."""
    if kernel_backend == "triton" and c > 2048 and device == "cpu":
        c, n = 321, 428  # as odd, with several blocks as well; the interpreter takes long for more
    ids = make_ids(m, num_adapters, none=0.1 if m > 1 else 0.0, device=device)
    check(*functions(ids, backend=kernel_backend), make_inputs(device, m=m, num_adapters=num_adapters, r=r, c=c, n=n))


def test_layouts(kernel_backend, device):
    """More dimensions than two; strided rows and factors; one matrix for all adapters; a broadcast output gradient."""
    ids = make_ids(device=device)
    function, reference = functions(ids, backend=kernel_backend)
    inputs = make_inputs(device)
    strided = {
        "x": torch.randn(C, M, device=device).t(),
        "a": torch.randn(A, C, R, device=device).transpose(1, 2) / C**0.5,
        "b": torch.randn(1, 2 * N, 2 * R, device=device)[:, ::2, ::2].expand(A, N, R),
        "out": inputs["out"],
    }
    check(function, reference, strided)
    dout = torch.randn(1, N, device=device).expand(M, N)
    actual, expected = (run(f, inputs, NAMES, dout) for f in (function, reference))
    for name in actual:
        torch.testing.assert_close(actual[name], expected[name])
    with gossamer.backend(kernel_backend):
        whole = gossamer.multi_low_rank(inputs["x"][:42], inputs["a"], inputs["b"], ids[:42], scale=1.5)
        folded = gossamer.multi_low_rank(
            inputs["x"][:42].view(2, 21, C), inputs["a"], inputs["b"], ids[:42].view(2, 21).int(), scale=1.5
        )
        assert torch.equal(folded.view(42, N), whole)
        target = torch.zeros(N, M, device=device).t()
        y = gossamer.multi_low_rank(inputs["x"], inputs["a"], inputs["b"], ids, scale=1.5, out=target)
    assert y is target and torch.equal(y[:42], whole)


@pytest.mark.parametrize("needed", [["x"], ["a"], ["b"], ["out"], ["x", "b"]])
def test_frozen_subsets(kernel_backend, device, needed):
    """Only wanted gradients are computed, and they have the same bits as beside all others."""
    function, _ = functions(make_ids(device=device), backend=kernel_backend)
    inputs, dout = make_inputs(device), torch.randn(M, N, device=device)
    every = run(function, inputs, NAMES, dout)
    with OperatorLog() as log:
        some = run(function, inputs, needed, dout)
    for name in needed:
        assert torch.equal(some[name], every[name]), name
    calls = log.named("multi_low_rank_backward")
    wanted = [name for name in ("x", "a", "b") if name in needed]
    assert [list(call[1]["needs"]) for call in calls] == ([wanted] if wanted else [])


def test_float32_factors(kernel_backend, device):
    """float32 factors beside float16 rows are rounded for the products; their gradients are not."""
    inputs = make_inputs(device, torch.float16) | {
        k: v.float() for k, v in make_inputs(device).items() if k in ("a", "b")
    }
    ids = make_ids(device=device)
    function, _ = functions(ids, backend=kernel_backend)
    dout = torch.randn(M, N, device=device).half()
    mixed = run(function, inputs, NAMES, dout)
    rounded = {k: v.half() for k, v in inputs.items()}
    half = run(function, rounded, NAMES, dout)
    assert mixed["a"].dtype == mixed["b"].dtype == torch.float32
    for name, value in mixed.items():
        assert torch.equal(value.half(), half[name]), name
    assert not torch.equal(mixed["a"], half["a"].float())


def test_float32_factors_of_float64(device):
    """The CPU takes them beside float64 rows, too; their gradients are float64 sums, rounded once."""
    if device != "cpu":
        pytest.skip("float64 is computed on the CPU alone")
    inputs = {k: v if k in ("a", "b") else v.double() for k, v in make_inputs(device).items()}
    function, _ = functions(make_ids(device=device), backend="native")
    dout = torch.randn(M, N, dtype=torch.float64)
    found = run(function, inputs, NAMES, dout)
    wide = run(function, {k: v.double() for k, v in inputs.items()}, NAMES, dout)
    for name, value in found.items():
        assert torch.equal(value, wide[name].to(value.dtype)), name
    assert found["a"].dtype == found["b"].dtype == torch.float32


def test_same_bits(kernel_backend, dtype, device):
    """Two runs agree bit by bit; permuting the rows, or adding others, changes no bit of a row's result or gradient."""
    ids = make_ids(300, 3, device=device)
    inputs = make_inputs(device, dtype, m=300, num_adapters=3)
    dout = torch.randn(300, N, device=device).to(dtype)
    first = run(functions(ids, backend=kernel_backend)[0], inputs, NAMES, dout)
    assert_same_bits(first, run(functions(ids, backend=kernel_backend)[0], inputs, NAMES, dout))
    order = torch.randperm(300, device=device)
    moved = inputs | {k: inputs[k][order] for k in ("x", "out")}
    results = run(functions(ids[order], backend=kernel_backend)[0], moved, ["x", "out"], dout[order])
    assert torch.equal(results["out"], first["out"][order]) and torch.equal(results["x"], first["x"][order])


def test_several_adapters_train_in_one_step(device):
    """One SGD step on a mixed batch moves every adapter as a step on its rows alone does, in float64."""
    ids, lr = make_ids(device="cpu"), 0.1
    inputs = {k: v.double() for k, v in make_inputs("cpu", out=False).items()}
    target = torch.randn(M, N, dtype=torch.float64)
    a, b = (inputs[k].clone().requires_grad_() for k in "ab")
    optimizer = torch.optim.SGD([a, b], lr)
    y = gossamer.multi_low_rank(inputs["x"], a, b, gossamer.adapter_dispatch(ids, A), scale=2.0)
    (y - target).square().sum().backward()
    optimizer.step()
    for i in range(A):
        ai, bi = (inputs[k][i].clone().requires_grad_() for k in "ab")
        mine = ids == i
        (2.0 * (inputs["x"][mine] @ ai.T @ bi.T) - target[mine]).square().sum().backward()
        torch.testing.assert_close(a[i], ai - lr * ai.grad)
        torch.testing.assert_close(b[i], bi - lr * bi.grad)


def test_in_place_counts_as_a_change(device):
    """Autograd sees that out was written to: a tensor that a backward pass still needs is not silently changed."""
    inputs = make_inputs(device)
    leaf = inputs["out"].clone().requires_grad_()
    out = leaf.exp()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            before = out._version
            gossamer.multi_low_rank(inputs["x"], inputs["a"], inputs["b"], make_ids(device=device), scale=1.0, out=out)
        assert out._version == before + 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
    view = (leaf * 2)[:, : N // 2]
    with pytest.raises(RuntimeError, match="leaf Variable"):
        gossamer.multi_low_rank(inputs["x"], inputs["a"], inputs["b"], make_ids(device=device), scale=1.0, out=leaf)
    gossamer.multi_low_rank(
        inputs["x"], inputs["a"], inputs["b"][:, : N // 2], make_ids(device=device), scale=1.0, out=view
    )
    view.sum().backward()
    assert torch.equal(leaf.grad[:, : N // 2], torch.full((M, N // 2), 2.0, device=device))


def test_what_is_kept(kernel_backend, device):
    """The backward pass keeps x and x·aᵀ (M, r), nothing of the result's size; nothing with frozen inputs."""
    inputs = make_inputs(device)
    leaves = {k: v.requires_grad_(k in "ab") for k, v in inputs.items()}
    d = gossamer.adapter_dispatch(make_ids(device=device), A)

    def function():
        with gossamer.backend(kernel_backend):
            return gossamer.multi_low_rank(leaves["x"], leaves["a"], leaves["b"], d, scale=1.0, out=leaves["out"] * 1)

    saved = saved_tensors(function, list(leaves.values()))
    floats = [t for t in saved if t.is_floating_point()]
    assert [tuple(t.shape) for t in floats] == [(M, R)]
    for leaf in leaves.values():
        leaf.requires_grad_(False)
    assert not saved_tensors(function, [])


def test_operators_are_sound(kernel_backend, device):
    """Schemas, fake kernels and autograd registrations hold, with and without scales, ranks and gradients."""
    # Rows without adapter of x·aᵀ are not written, so there are none.
    small = {"m": 6, "num_adapters": 3, "c": 9, "n": 7}
    d = gossamer.adapter_dispatch(make_ids(6, 3, none=0.0, device=device), 3)
    scales, ranks = torch.rand(3, device=device), torch.tensor([3, 0, 2], device=device)
    for optional, grad, needs in (
        ((None, None, 1.5), True, ["x", "a", "b"]),
        ((scales, ranks, 1.0), False, ["a"]),
    ):
        inputs = make_inputs(device, **small)
        leaves = [inputs[k].requires_grad_(grad) for k in "xab"]
        args = MultiLowRank(*leaves, d.slots, d.offsets, *optional, True)
        flat = (*Layout(MultiLowRank).flatten(args), kernel_backend)
        torch.library.opcheck(torch.ops.gossamer.multi_low_rank.default, flat)
        torch.library.opcheck(torch.ops.gossamer.multi_low_rank_.default, (inputs["out"], *flat))
        args = args._replace(**{name: inputs[name].detach() for name in "xab"})
        args = MultiLowRankBackward(inputs["out"], torch.randn(6, R, device=device), args, needs)
        flat = (*Layout(MultiLowRankBackward).flatten(args), kernel_backend)
        torch.library.opcheck(torch.ops.gossamer.multi_low_rank_backward.default, flat)
    torch.library.opcheck(torch.ops.gossamer.adapter_expert_ids.default, (make_ids(device=device), A))


@pytest.mark.parametrize("whole", [False, True])
def test_compiles_whole(device, whole):
    """A layer with its update compiles in one graph, forward and backward, for any number of rows, with equal bits."""
    weight = torch.randn(N, C, device=device)

    def function(x, a, b, ids, weight):
        if whole:
            return gossamer.multi_low_rank_linear(x, weight, a, b, ids, scale=1.5)
        return gossamer.multi_low_rank(x, a, b, ids, scale=1.5, out=F.linear(x, weight))

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for m in (M, 50):
        inputs = make_inputs(device, m=m, out=False)
        leaves = [*(inputs[k].requires_grad_() for k in "xab")]
        ids, dout = make_ids(m, device=device), torch.randn(m, N, device=device)
        results = []
        for f in (function, compiled):
            y = f(*leaves, ids, weight)
            results.append((y, *torch.autograd.grad(y, leaves, dout)))
        for value, expected in zip(*results, strict=True):
            assert torch.equal(value, expected)


def test_meta_tensors():
    """Shapes without data, on the meta device."""
    inputs = {k: v.to("meta") for k, v in make_inputs("cpu", torch.bfloat16).items()}
    out = inputs.pop("out")
    y = gossamer.multi_low_rank(**inputs, adapter_ids=make_ids().to("meta"), scale=1.0)
    assert y.is_meta and y.shape == out.shape and y.dtype == torch.bfloat16


def arguments(**change):
    return make_inputs("cpu") | {"adapter_ids": make_ids(), "scale": 1.0} | change


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x must be a torch.Tensor, got list"),
        ({"a": torch.randn(A, R, C + 1)}, ValueError, r"a must have shape \(A, r, C\) = \(any, any, 97\)"),
        ({"b": torch.randn(A, N, R + 1)}, ValueError, r"b must have shape \(A, N, r\) = \(5, any, 3\)"),
        ({"scale": "2"}, TypeError, "scale must be a number, got .2."),
        ({"a": torch.randn(A, 0, C), "b": torch.randn(A, N, 0)}, ValueError, r"rank of a and b must be in \[1, min"),
        ({"a": torch.randn(A, R, C).half()}, TypeError, "b must have the dtype of a, torch.float16, got torch.float32"),
        ({"out": torch.randn(M, N + 1)}, ValueError, r"out must have shape \(..., N\) = \(43, 61\), got \(43, 62\)"),
        ({"out": torch.randn(M, N).half()}, TypeError, "out must have the dtype of x"),
        ({"adapter_ids": torch.zeros(M)}, TypeError, "adapter_ids must be int32 or int64, got torch.float32"),
        ({"adapter_ids": torch.zeros(M - 1, dtype=torch.int64)}, ValueError, "adapter_ids must have shape"),
        (
            {"adapter_ids": gossamer.adapter_dispatch(make_ids(), A + 1)},
            ValueError,
            "a dispatch of 43 rows with one of 5",
        ),
        ({"adapter_ids": torch.full((M,), A)}, IndexError, r"adapter_ids must be in \[-1, A\) with A=5, got 5 at flat"),
        ({"adapter_ids": torch.full((M,), -2)}, IndexError, r"adapter_ids must be in \[-1, A\) with A=5, got -2"),
        ({"scale": torch.ones(A + 1)}, ValueError, r"scale must have shape \(A,\) = \(5\), got \(6,\)"),
        (
            {"ranks": torch.tensor([1, 2, 3, 4, 1])},
            IndexError,
            r"ranks must be in \[0, r\] with r=3, got 4 for adapter 3",
        ),
        ({"ranks": torch.ones(A)}, TypeError, "ranks must be int32 or int64"),
    ],
)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_errors(change, error, message, backend):
    """Each documented error names the argument, the rule and the value."""
    with pytest.raises(error, match=message), gossamer.backend(backend):
        gossamer.multi_low_rank(**arguments(**change))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_synchronisation_and_graph_capture(kernel_backend, device):
    """Clean under sync debugging, forward and backward, and right when replayed with other adapters."""
    ids = make_ids(device=device)
    inputs = make_inputs(device, torch.bfloat16)
    out = inputs.pop("out")
    leaves = [v.requires_grad_() for v in inputs.values()]
    ranks, scale = torch.tensor([3, 1, 0, 2, 3], device=device), torch.rand(A, device=device)

    def step():
        y = gossamer.multi_low_rank(*leaves, ids, scale=scale, out=out * 1, ranks=ranks)
        return y, *torch.autograd.grad(y, leaves, out)

    with gossamer.backend(kernel_backend):
        check_capture(step, lambda: ids.copy_(make_ids(device=device, seed=7)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("m", "num_adapters", "r"), [(1, 128, 16), (64, 16, 64), (4096, 3, 16), (700, 1, 130)])
def test_gpu_tiles(kernel_backend, dtype, device, m, num_adapters, r):
    """Sizes that reach the split sums and the large tiles of a GPU."""
    ids = make_ids(m, num_adapters, none=0.1, device=device)
    inputs = make_inputs(device, dtype, m=m, num_adapters=num_adapters, r=r, c=1024, n=520)
    check(*functions(ids, backend=kernel_backend), inputs)
