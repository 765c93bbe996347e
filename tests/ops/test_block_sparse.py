"""gossamer.sdd, dsd and dds: products and gradients against float64 over topologies, layouts, blocks and epilogues."""

import itertools

import pytest
import torch
from block_sparse_products import (
    PRODUCTS,
    UNGATED,
    N,
    check_by_differences,
    check_same_bits,
    functions,
    live_values,
    make_inputs,
    randn,
    topology_of,
)
from helpers import OperatorLog, assert_same_bits, check, check_capture, huge_storage, run, saved_tensors

import gossamer
from gossamer import BlockSparseTensor, BlockTopology


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("transposed", [False, True], ids=["stored", "transposed"])
def test_products(kernel_backend, dtype, device, product, transposed):
    """Each product and all its gradients, with a bias, of a matrix and of a view of its transpose."""
    t = topology_of(device)
    t = t.transposed() if transposed else t
    check(*functions(product, t, backend=kernel_backend), make_inputs(product, t, dtype=dtype))


@pytest.mark.parametrize("block", [(16, 16), (32, 64), (64, 32), (128, 16), (16, 128)])
def test_blocks(kernel_backend, device, block):
    """Square and oblong blocks of every size, smaller and larger than a step and a tile; more columns than a tile."""
    t = topology_of(device, block, grid=(2, 3), density=0.7)
    n = 70 if kernel_backend == "native" else 17
    for product in PRODUCTS:
        check(*functions(product, t, backend=kernel_backend), make_inputs(product, t, n=n))


@pytest.mark.parametrize("n", [0, 1, 48, 100])
def test_sizes(kernel_backend, device, n):
    """No column, one, whole panels, and several tiles with a rest, of the dimension that is not blocked."""
    # Many block rows, since the largest error of a few sums is a matter of luck.
    t = topology_of(device, (16, 32), grid=(7, 3))
    for product in PRODUCTS:
        check(*functions(product, t, backend=kernel_backend), make_inputs(product, t, n=n))


@pytest.mark.parametrize(
    "mask",
    [
        torch.zeros(3, 4, dtype=torch.bool),
        torch.ones(3, 4, dtype=torch.bool),
        torch.ones(1, 1, dtype=torch.bool),
        torch.eye(4, 12).bool().roll(7, 1),
        torch.zeros(0, 3, dtype=torch.bool),
        torch.zeros(3, 0, dtype=torch.bool),
        torch.cat([torch.zeros(2, 19), torch.ones(1, 19), torch.eye(2, 19)]).bool(),
        torch.cat([torch.ones(9, 1), torch.eye(9, 3)], 1).bool(),
    ],
    ids=["none", "all", "one", "diagonal", "no_rows", "no_columns", "one_long_row", "one_long_column"],
)
def test_topologies(kernel_backend, device, mask):
    """Empty rows and columns, one block, none, and rows of very different length."""
    t = BlockTopology.from_mask(mask.to(device), 16, nnz=int(mask.sum()) + 3)
    for product in PRODUCTS:
        check(*functions(product, t, backend=kernel_backend), make_inputs(product, t))


@pytest.mark.parametrize("activation", UNGATED)
def test_epilogues(kernel_backend, dtype, device, activation):
    """Bias and activation inside the kernels; with a gradient wanted, outside, and right."""
    t = topology_of(device, (16, 32), grid=(2, 2))
    for product, view in (("sdd", t), ("sdd", t.transposed()), ("dsd", t), ("dds", t)):
        inputs = make_inputs(product, view, dtype=dtype)
        function, reference = functions(product, view, backend=kernel_backend, activation=activation)
        with OperatorLog() as log:
            check(function, reference, inputs, needs=[])
        fused = [call[1]["activation"] for call in log.calls]
        assert fused and set(fused) == {activation}
        check(function, reference, inputs)


def test_full_topology_is_the_dense_product(kernel_backend, device):
    """With every block there the products are those of the dense matrices, transposed or not."""
    t = BlockTopology.random((64, 48), 16, 1.0, device=device)
    dense = torch.randn(64, 48, device=device)
    s = BlockSparseTensor.from_dense(dense, t)
    x = torch.randn(N, 64, device=device)
    with gossamer.backend(kernel_backend):
        for actual, left, right in (
            (gossamer.dds(x, s), x, dense),
            (gossamer.dds(x[:, :48], s.t()), x[:, :48], dense.t()),
            (gossamer.dsd(s.t(), x.t()), dense.t(), x.t()),
            (gossamer.sdd(x.t(), x[:, :48], t).to_dense(), x.t(), x[:, :48]),
        ):
            gossamer.testing.assert_close(actual, left.double() @ right.double(), left @ right)


def test_expert_layer(kernel_backend, device):
    """MegaBlocks' layer: hidden blocks sampled, an activation, and back, over padded groups; against a plain loop."""
    tokens, hidden, size, experts, top_k = 50, 24, 32, 4, 2
    ids = gossamer.testing.random_expert_ids(tokens, experts - 1, top_k, dropped=0.2, seed=3)
    ids = ids.masked_fill(ids == experts - 1, experts).to(device)
    dispatch = gossamer.dispatch(ids, experts)
    t = BlockTopology.from_dispatch(dispatch, size, 16)
    slots = t.padded_slots(dispatch).long()
    rows = t.padded_rows(dispatch).long()
    assert (ids == experts).any() and t.padded_offsets[-1] < t.shape[0]

    def layer(x, up, down):
        padded = torch.cat([x, x.new_zeros(1, hidden)])[(slots // top_k).clamp(max=tokens)]
        h = gossamer.sdd(padded, up, t)
        y = gossamer.dsd(BlockSparseTensor(h.values.relu(), t), down)
        return torch.cat([y, y.new_zeros(1, hidden)])[rows].view(tokens, top_k, hidden)

    def loop(x, up, down):
        y = x.new_zeros(tokens, top_k, hidden)
        for e in range(experts):
            part = slice(e * size, (e + 1) * size)
            every = (x @ up[:, part]).relu() @ down[part]
            y = torch.where((ids == e).unsqueeze(2), every.unsqueeze(1), y)
        return y

    def function(**inputs):
        with gossamer.backend(kernel_backend):
            return layer(**inputs)

    inputs = {
        "x": torch.randn(tokens, hidden, device=device),
        "up": torch.randn(hidden, experts * size, device=device) / hidden**0.5,
        "down": torch.randn(experts * size, hidden, device=device) / size**0.5,
    }
    check(function, loop, inputs)


@pytest.mark.parametrize("product", PRODUCTS)
def test_unused_room_is_not_read(kernel_backend, device, product):
    """NaN in what lies past the last block reaches nothing, and results and gradients are zero there."""
    t = topology_of(device, spare=3)
    function, _ = functions(product, t, backend=kernel_backend)
    inputs = make_inputs(product, t)
    if product != "sdd":
        inputs["s"][-3:] = float("nan")
    shape = run(function, inputs)["out"].shape
    dout = torch.randn(shape, device=device)
    if product == "sdd":
        dout[-3:] = 0
    results = run(function, inputs, inputs, dout)
    assert all(torch.isfinite(value).all() for value in results.values())
    sparse = results["out"] if product == "sdd" else results["s"]
    assert not sparse[-3:].any() and sparse[:-3].any()


@pytest.mark.parametrize("product", PRODUCTS)
def test_gradients_alone(kernel_backend, device, product):
    """Each gradient by itself has the same bits as among all, and only its own product is computed."""
    t = topology_of(device)
    function, _ = functions(product, t, backend=kernel_backend)
    inputs = make_inputs(product, t)
    dout = torch.randn(run(function, inputs)["out"].shape, device=device)
    every = run(function, inputs, inputs, dout)
    dense, sampled = "block_sparse_dsd", "block_sparse_sdd"
    expected = {"a": [dense], "b": [dense], "s": [sampled], "bias": ["gather_reduce"] if product == "sdd" else []}
    for name in inputs:
        with OperatorLog() as log:
            one = run(function, inputs, [name], dout)
        assert torch.equal(one[name], every[name])
        assert [call[0] for call in log.calls][1:] == expected[name], name


@pytest.mark.parametrize("product", PRODUCTS)
def test_same_bits(kernel_backend, dtype, device, product):
    """Two runs agree bit by bit, with more threads than one and with one."""
    t = topology_of(device, grid=(6, 5))
    function, _ = functions(product, t, backend=kernel_backend)
    inputs = make_inputs(product, t, n=60, dtype=dtype)
    dout = torch.randn(run(function, inputs)["out"].shape, device=device)
    check_same_bits(function, inputs, dout, threads=kernel_backend == "native")


def test_rows_do_not_depend_on_their_neighbours(kernel_backend, device):
    """A row of a linear layer's result has the same bits in another place of another batch."""
    t = topology_of(device, (16, 32))
    function, _ = functions("dds", t, backend=kernel_backend)
    inputs = make_inputs("dds", t, n=60)
    order = torch.randperm(60, device=device)
    whole = run(function, inputs)["out"]
    moved = run(function, inputs | {"a": inputs["a"][order]})["out"]
    assert torch.equal(moved, whole[order])
    part = run(function, inputs | {"a": inputs["a"][37:38]})["out"]
    if kernel_backend == "native":
        assert torch.equal(part, whole[37:38])
    else:
        torch.testing.assert_close(part, whole[37:38])


@pytest.mark.parametrize("block", [(16, 16), (32, 32), (64, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_few_rows_have_the_bits_of_many(isa, dtype, block):
    """Few rows read each block once and in its own order: the bits that they have among many."""
    t = topology_of("cpu", block, grid=(5, 7))
    function, _ = functions("dds", t, backend="native")
    inputs = make_inputs("dds", t, n=40, dtype=dtype)
    whole = run(function, inputs)["out"]
    for rows in (1, 2, 3, 7, 8, 16, 17):
        for first in (0, 11):
            part = run(function, inputs | {"a": inputs["a"][first : first + rows]})["out"]
            assert torch.equal(part, whole[first : first + rows])


def test_long_sums(device):
    """More terms than are packed at a time, in 16 bits too, where partial sums lie apart; the native kernels' own."""
    if device != "cpu":
        pytest.skip("for the CPU")
    t = topology_of(device, (16, 32), grid=(2, 2), density=0.75)
    for dtype in (torch.float32, torch.bfloat16):
        a = randn(32, 70_000, device=device, dtype=dtype) / 256
        b = randn(70_000, 64, device=device, dtype=dtype, by_columns=True)
        check(*functions("sdd", t, backend="native", activation="relu2"), {"a": a, "b": b}, needs=[])
    tall = topology_of(device, (16, 16), grid=(1, 4096), density=0.2)
    wide = make_inputs("dsd", tall, n=200)
    check(*functions("dsd", tall, backend="native"), wide, needs=[])


def test_instruction_sets(isa):
    """The native kernels of each instruction set that this processor has."""
    for block in ((16, 16), (32, 64)):
        t = topology_of("cpu", block)
        for product, dtype in itertools.product(PRODUCTS, (torch.float32, torch.bfloat16, torch.float16)):
            check(*functions(product, t, backend="native"), make_inputs(product, t, n=50, dtype=dtype))


def test_gradcheck(device):
    """Finite differences in float64, first and second order, on the CPU's kernels."""
    if device != "cpu":
        pytest.skip("float64 is for the CPU")
    t = topology_of(device, (16, 16), grid=(1, 2), density=1.0, spare=0)
    for product, view in itertools.product(PRODUCTS, (t, t.transposed())):
        inputs = make_inputs(product, view, n=2, dtype=torch.float64)
        function, _ = functions(product, view, backend="native", activation="gelu")
        check_by_differences(function, inputs)


def test_saves_operands_and_topology_only(kernel_backend, device):
    """The graph keeps the operands that gradients need, and nothing when none is wanted."""
    t = topology_of(device)
    function, _ = functions("dds", t, backend=kernel_backend)
    inputs = {k: v.requires_grad_() for k, v in make_inputs("dds", t).items()}
    saved = saved_tensors(lambda: function(**inputs), [inputs["s"]])
    assert [tensor.shape for tensor in saved if tensor.dtype.is_floating_point] == [inputs["a"].t().shape]
    with torch.no_grad():
        assert not saved_tensors(lambda: function(**inputs), [])
    frozen = inputs | {"s": inputs["s"].detach()}
    saved = saved_tensors(lambda: function(**frozen), [frozen["s"]])
    assert not [tensor for tensor in saved if tensor.dtype.is_floating_point]


def test_compiles(kernel_backend, device):
    """Dispatch, topology and all three products traced whole, forward and backward, with another number of tokens."""
    torch._dynamo.reset()
    experts, size, hidden = 3, 32, 16

    def f(x, up, down, w, ids, topology):
        t = BlockTopology.from_dispatch(gossamer.dispatch(ids, experts), size, 16)
        padded = torch.cat([x, x.new_zeros(1, hidden)])[t.padded_slots(gossamer.dispatch(ids, experts)).long()]
        h = gossamer.sdd(padded, up, t)
        y = gossamer.dsd(BlockSparseTensor(h.values.relu(), h.topology), down)
        return gossamer.dds(y, BlockSparseTensor(w, topology).t(), activation="silu")

    # What the compiler makes of the code around interpreted kernels is the same, and takes half a minute.
    backend = "aot_eager" if kernel_backend == "triton" and device == "cpu" else "inductor"
    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend=backend)
    topology = topology_of(device, (16, 16), grid=(2, 1), density=1.0)
    with gossamer.backend(kernel_backend):
        for tokens in (29, 40):
            ids = torch.randint(experts, (tokens, 1), device=device)
            inputs = {
                "x": torch.randn(tokens, hidden, device=device),
                "up": torch.randn(hidden, experts * size, device=device) / 4,
                "down": torch.randn(experts * size, hidden, device=device) / 6,
                "w": live_values(topology),
            }
            fixed = {"ids": ids, "topology": topology}
            dout = torch.randn(run(lambda f=f, fixed=fixed, **v: f(**v, **fixed), inputs)["out"].shape, device=device)
            actual, expected = (
                run(lambda g=g, fixed=fixed, **v: g(**v, **fixed), inputs, inputs, dout) for g in (compiled, f)
            )
            torch.testing.assert_close(actual, expected)


def test_no_gradient_through_a_fused_activation(device):
    """The operator that applied an activation says that it has no gradient, rather than give a wrong one."""
    from gossamer.ops._block_sparse_operators import BlockProduct, dsd_operator, topology_lists

    t = topology_of(device)
    b = torch.randn(t.shape[1], N, device=device, requires_grad=True)
    backend = "native" if device == "cpu" else "triton"
    with pytest.raises(RuntimeError, match="applied its activation inside the kernel has no gradient"):
        dsd_operator(BlockProduct(live_values(t), b, None, topology_lists(t), activation="relu"), backend)


def test_addresses_beyond_32_bits(kernel_backend, device):
    """Dense operands whose rows lie more than 2³¹ elements apart."""
    if kernel_backend == "triton" and device == "cpu":
        pytest.skip("the interpreter copies its arguments whole")
    t = topology_of(device, (16, 16), grid=(2, 2), density=0.75)
    stride = 2**27 + 64
    inputs = make_inputs("dds", t, n=18, dtype=torch.float16)
    far = huge_storage(17 * stride + 32, torch.float16, device).as_strided((18, 32), (stride, 1))
    far.copy_(inputs["a"])
    function, _ = functions("dds", t, backend=kernel_backend)
    dout = torch.randn(18, 32, device=device)
    moved = run(function, inputs | {"a": far}, ["s"], dout)
    assert_same_bits(moved, run(function, inputs, ["s"], dout))


def test_autocast(kernel_backend, device):
    """Under autocast the products are those of the cast operands, and gradients come in the inputs' dtypes."""
    t = topology_of(device)
    for product in PRODUCTS:
        inputs = make_inputs(product, t)
        function, _ = functions(product, t, backend=kernel_backend)
        dout = torch.randn(run(function, inputs)["out"].shape, device=device)
        with torch.autocast(device, dtype=torch.float16):
            actual = run(function, inputs, inputs, dout)
        expected = run(function, {k: v.half() for k, v in inputs.items()}, inputs, dout)
        assert actual["out"].dtype == torch.float16
        assert_same_bits(actual, {k: v if k == "out" else v.float() for k, v in expected.items()})


def test_default_backend_and_meta_tensors(device):
    """The device's kernels serve by default, and shapes come without data."""
    t = topology_of(device)
    s = BlockSparseTensor(live_values(t), t)
    with OperatorLog() as log:
        gossamer.dsd(s, torch.randn(t.shape[1], N, device=device))
    assert log.named("block_sparse_dsd")[0][1]["backend"] == ("native" if device == "cpu" else "triton")
    meta = s.to("meta")
    assert gossamer.dsd(meta, torch.empty(t.shape[1], 3, device="meta")).shape == (t.shape[0], 3)
    y = gossamer.dds(torch.empty(3, t.shape[1], device="meta"), meta.t())
    assert y.shape == (3, t.shape[0]) and y.is_contiguous()
    sampled = gossamer.sdd(
        torch.empty(t.shape[0], 3, device="meta"), torch.empty(3, t.shape[1], device="meta"), meta.topology
    )
    assert sampled.values.shape == s.values.shape


def test_float64_is_for_the_cpu(device):
    """Triton's kernels name the dtypes they take."""
    t = topology_of(device)
    with gossamer.backend("triton"), pytest.raises(TypeError, match="or float64 on the CPU"):
        gossamer.sdd(
            torch.randn(t.shape[0], 3, dtype=torch.float64, device=device),
            torch.randn(3, t.shape[1], dtype=torch.float64, device=device),
            t,
        )


S = BlockSparseTensor(torch.randn(4, 32, 16), BlockTopology.random((64, 48), (32, 16), 2 / 3))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: gossamer.dsd(S, torch.randn(40, 3)),
            ValueError,
            "rows of b must be 48, .* got 40: pad it with zeros to 48",
        ),
        (
            lambda: gossamer.dsd(S, torch.randn(64, 3)),
            ValueError,
            r"rows of b must be 48, as the topology says, got 64$",
        ),
        (
            lambda: gossamer.dsd(S.t(), torch.randn(50, 3)),
            ValueError,
            "rows of b must be 64, .*pad it with zeros to 64",
        ),
        (lambda: gossamer.dds(torch.randn(3, 63), S), ValueError, "columns of a must be 64, .* got 63: pad it"),
        (lambda: gossamer.dsd(S, torch.randn(48)), ValueError, r"b must have shape \(cols, N\)"),
        (lambda: gossamer.dds(torch.randn(1, 2, 3, 64), S), ValueError, r"a must have shape \(M, rows\)"),
        (lambda: gossamer.dds(torch.randn(2, 3, 64), S), ValueError, "columns of a must be 64, .* got 128"),
        (
            lambda: gossamer.dds(torch.randn(4, 3, 16), S),
            ValueError,
            "a must come in one or more parts of whole blocks of 32: columns of a are 4 times 16",
        ),
        (lambda: gossamer.dsd(S, torch.randn(0, 16, 3)), ValueError, "b must come in one or more parts"),
        (
            lambda: gossamer.sdd(torch.randn(64, 3), torch.randn(3, 4, 16), S.topology),
            ValueError,
            r"b must have shape \(K, cols\) = \(3, any\), got \(3, 4, 16\)",
        ),
        (
            lambda: gossamer.dsd(torch.randn(64, 48), torch.randn(48, 3)),
            TypeError,
            "s must be a gossamer.BlockSparseTensor",
        ),
        (lambda: gossamer.dsd(S, torch.randn(48, 3).half()), TypeError, "b must have the dtype of s, torch.float32"),
        (lambda: gossamer.dds(torch.ones(3, 64, dtype=torch.int64), S), TypeError, "a must be float32"),
        (lambda: gossamer.dds(torch.randn(3, 64, device="meta"), S), ValueError, "s must be on the device of a, meta"),
        (
            lambda: gossamer.dds(torch.randn(3, 64), S, bias=torch.randn(64)),
            ValueError,
            r"bias must have shape \(cols,\)",
        ),
        (lambda: gossamer.dsd(S, torch.randn(48, 3), bias=torch.randn(48)), ValueError, r"bias must have shape \(N,\)"),
        (
            lambda: gossamer.dsd(S, torch.randn(48, 3), activation="swiglu"),
            ValueError,
            "must not be gated, got 'swiglu'",
        ),
        (lambda: gossamer.dsd(S, torch.randn(48, 3), activation="tanh"), ValueError, "activation must be one of"),
        (
            lambda: gossamer.sdd(torch.randn(60, 3), torch.randn(3, 48), S.topology),
            ValueError,
            "rows of a must be 64, .* got 60: pad it with zeros to 64",
        ),
        (
            lambda: gossamer.sdd(torch.randn(64, 3), torch.randn(3, 40), S.topology),
            ValueError,
            "columns of b must be 48, .* got 40: pad it with zeros to 48",
        ),
        (
            lambda: gossamer.sdd(torch.randn(64, 3), torch.randn(4, 48), S.topology),
            ValueError,
            r"b must have shape \(K, cols\) = \(3, any\), got \(4, 48\)",
        ),
        (lambda: gossamer.sdd(torch.randn(64, 3), torch.randn(3, 48), S), TypeError, "topology must be a"),
        (
            lambda: gossamer.sdd(torch.randn(64, 3), torch.randn(3, 48), S.topology.to("meta")),
            ValueError,
            "topology must be on the device of a, cpu, got meta",
        ),
    ],
)
def test_errors(call, error, message):
    """Each documented error names the argument, the rule and the value, and what to pad to."""
    with pytest.raises(error, match=message):
        call()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_synchronisation_and_graph_capture(kernel_backend, device):
    """Clean under sync debugging, forward and backward, and right when replayed on another routing and mask."""
    experts, size, hidden = 4, 64, 64
    ids = gossamer.testing.random_expert_ids(50, experts, 2).to(device)
    mask = torch.rand(4, 4, device=device) < 0.5
    leaves = [
        torch.randn(50, hidden, device=device, dtype=torch.bfloat16, requires_grad=True),
        torch.randn(hidden, experts * size, device=device, dtype=torch.bfloat16, requires_grad=True),
        torch.randn(16, 16, 16, device=device, dtype=torch.bfloat16, requires_grad=True),
    ]

    def step():
        x, up, w = leaves
        dispatch = gossamer.dispatch(ids, experts)
        t = BlockTopology.from_dispatch(dispatch, size, 16)
        padded = torch.cat([x, x.new_zeros(1, hidden)])[(t.padded_slots(dispatch) // 2).long()]
        h = gossamer.sdd(padded, up, t)
        y = gossamer.dsd(h, up.t())
        y = gossamer.dds(y, BlockSparseTensor(w, BlockTopology.from_mask(mask, 16, nnz=16)).t())
        return y, *torch.autograd.grad(y.square().mean(), leaves)

    def change():
        ids.copy_(gossamer.testing.random_expert_ids(50, experts, 2, seed=5, dropped=0.3).to(device))
        mask.logical_not_()

    with gossamer.backend(kernel_backend):
        check_capture(step, change)
