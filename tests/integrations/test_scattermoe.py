"""Code written against ScatterMoE: its functions, kernels and layers against loops in float64, and by hand."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers import OperatorLog, check, randn, run
from torch import nn

import gossamer
import gossamer.integrations.scattermoe as scattermoe
from gossamer.integrations.scattermoe import GLUMLP, MLP, ParallelExperts, flatten_sort_count, parallel_linear
from gossamer.integrations.scattermoe.kernels import ops
from gossamer.testing import random_expert_ids

# C and N are multiples of nothing; 2 of 5 experts leave one with few rows under the skew.
T, C, N, E, K = 23, 12, 20, 5, 2


def order_of(ids):
    """What the functions take, by a plain stable sort."""
    flat = ids.flatten()
    experts, slots = torch.sort(flat, stable=True)
    return experts, slots, torch.stack([(flat <= e).sum() for e in range(E)])


def loop(x, w, ids, *, bias=None, gates=None, divide=K, grouped_in=False, grouped_out=False):
    """One sorted row after another."""
    experts, slots, _ = order_of(ids)
    rows = [None] * slots.numel()
    for r, (e, s) in enumerate(zip(experts.tolist(), slots.tolist(), strict=True)):
        source = x[r if grouped_in else s // divide]
        out = x.new_zeros(w.shape[2]) if e >= E else source @ w[e] + (0 if bias is None else bias[e])
        rows[r if grouped_out else s] = out
    y = torch.stack(rows)
    return y if gates is None else (y.view(*gates.shape, -1) * gates.unsqueeze(2)).sum(1)


def inputs_of(device, dtype=torch.float32, *, grouped_in=False, gates=False):
    given = {
        "x": randn(T * K if grouped_in else T, C, device=device, dtype=dtype),
        "w": randn(E, C, N, seed=1, device=device, dtype=dtype),
        "bias": randn(E, N, seed=2, device=device, dtype=dtype),
    }
    return given | ({"gates": randn(T, K, seed=3, device=device, dtype=dtype)} if gates else {})


@pytest.mark.parametrize(("skew", "dropped"), [("zipf", 0.0), ("one", 0.2), ("few", 0.0)])
def test_flatten_sort_count(device, skew, dropped):
    ids = random_expert_ids(T, E, K, skew=skew, dropped=dropped, device=device)
    mine = flatten_sort_count(ids, num_experts=E)
    for name, one, other in zip(("experts", "slots", "offsets"), mine, order_of(ids), strict=True):
        assert one.dtype == torch.int64 and torch.equal(one, other), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("grouped_in", "grouped_out"), list(itertools.product([False, True], repeat=2)))
def test_layouts(device, grouped_in, grouped_out, dtype):
    """All four layouts against the loop, with gradients; dropped slots are zero and have none."""
    ids = random_expert_ids(T, E, K, skew="zipf", dropped=0.1, device=device)
    form = {"grouped_in": grouped_in, "grouped_out": grouped_out}
    check(
        lambda x, w, bias: parallel_linear(x, w, K, *flatten_sort_count(ids, E), bias, **form),
        lambda x, w, bias: loop(x, w, ids, bias=bias, **form),
        inputs_of(device, dtype, grouped_in=grouped_in),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grouped_in", [False, True])
def test_gates(device, grouped_in, dtype):
    ids = random_expert_ids(T, E, K, skew="zipf", dropped=0.1, device=device)
    order = flatten_sort_count(ids, E)

    def plain(x, w, bias, gates):
        # Gates and sums in float32 beside products in dtype, as every expert layer of ours.
        wide = torch.promote_types(x.dtype, torch.float32)
        y = loop(x, w, ids, bias=bias, grouped_in=grouped_in)
        return (y.view(T, K, N).to(wide) * gates.unsqueeze(2).to(wide)).sum(1).to(x.dtype)

    check(
        lambda x, w, bias, gates: parallel_linear(x, w, K, *order, bias, gates, grouped_in=grouped_in),
        plain,
        inputs_of(device, dtype, grouped_in=grouped_in, gates=True),
    )


def test_by_hand(device):
    """Two experts of one number each: values and gradients worked out on paper."""
    ids = torch.tensor([[0, 1], [1, 0]], device=device)
    values = {"w": [[[3.0]], [[5.0]]], "x": [[1.0], [2.0]], "gates": [[0.75, 0.25], [0.6, 0.4]]}
    leaves = {name: torch.tensor(value, device=device, dtype=torch.float64) for name, value in values.items()}
    order = flatten_sort_count(ids, 2)
    z = parallel_linear(leaves["x"], leaves["w"], 2, *order)
    torch.testing.assert_close(z.view(2, 2), torch.tensor([[3.0, 5.0], [10.0, 6.0]], device=device).double())
    dout = torch.tensor([[1.0], [-1.0]], device=device)
    found = run(lambda w, x, gates: parallel_linear(x, w, 2, *order, gates=gates), leaves, list(leaves), dout)
    expected = {
        "out": [[3.5], [8.4]],
        "gates": [[3.0, 5.0], [-10.0, -6.0]],
        "w": [[[-0.05]], [[-0.95]]],
        "x": [[3.5], [-4.2]],
    }
    for name, value in expected.items():
        torch.testing.assert_close(found[name], torch.tensor(value, device=device).double(), msg=name)


def test_kernels(device):
    """The three kernels by themselves, and ``out`` filled and returned."""
    ids = random_expert_ids(T, E, K, skew="one", dropped=0.1, device=device)
    experts, slots, offsets = order_of(ids)
    x, w, b, coeff = randn(T, C), randn(E, C, N, seed=1), randn(E, N, seed=2), randn(T, K, seed=3)
    x, w, b, coeff = (t.to(device) for t in (x, w, b, coeff))
    for x_grouped, y_grouped in itertools.product([False, True], repeat=2):
        rows = x[slots // K] if x_grouped else x
        y = ops.scatter2scatter(rows, w, experts, slots, 1 if x_grouped else K, b, x_grouped, y_grouped)
        wide = loop(rows.double(), w.double(), ids, bias=b.double(), grouped_in=x_grouped, grouped_out=y_grouped)
        torch.testing.assert_close(y.double(), wide, rtol=1e-5, atol=1e-5)
    out = torch.empty(T * K, N, device=device)
    assert ops.scatter2scatter(x, w, experts, slots, K, b, out=out) is out
    assert torch.equal(out, ops.scatter2scatter(x, w, experts, slots, K, b))
    grouped = ops.group(x, slots, coeff=coeff, fan_out=K)
    assert torch.equal(grouped, x[slots // K] * coeff.flatten()[slots].unsqueeze(1))
    assert torch.equal(ops.group(grouped, slots), grouped[slots])
    dy, rows = randn(T * K, N, seed=4, device=device).double(), x[slots // K].double()
    for backend in ("reference", None):
        with gossamer.backend(backend) if backend else torch.no_grad():
            dw, db = ops.group_bwd_W(dy, rows, offsets, E, has_bias=True)
        for e in range(E):
            mine = experts == e
            torch.testing.assert_close(dw[e], rows[mine].T @ dy[mine], rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(db[e], dy[mine].sum(0), rtol=1e-12, atol=1e-12)
    assert ops.group_bwd_W(dy, rows, offsets, E)[1] is None


def test_kernels_are_differentiable(device):
    ids = random_expert_ids(T, E, K, skew="zipf", device=device)
    experts, slots, _ = order_of(ids)
    check(
        lambda a, coeff: ops.group(a, slots, coeff, K),
        lambda a, coeff: a[slots // K] * coeff.flatten()[slots].unsqueeze(1),
        {"a": randn(T, C, device=device), "coeff": randn(T, K, seed=1, device=device)},
    )
    given = inputs_of(device)
    check(
        lambda x, w, bias: ops.scatter2scatter(x, w, experts, slots, K, bias),
        lambda x, w, bias: loop(x, w, ids, bias=bias),
        given,
    )


def mlp_loop(x, gates, p, ids, between):
    y = torch.zeros_like(x)
    for e in range(E):
        hidden = x @ p["experts.weight"][e].T
        hidden = hidden + p["experts.bias"][e] if "experts.bias" in p else hidden
        out = between(hidden) @ p["output_experts.weight"][e].T
        out = out + p["output_experts.bias"][e] if "output_experts.bias" in p else out
        y = y + ((ids == e) * gates).sum(1, keepdim=True) * out
    return y


def glu(hidden):
    value, gate = hidden.chunk(2, dim=-1)
    return F.silu(gate) * value


LAYERS = [
    pytest.param(lambda: MLP(C, N, E, K, bias=True, activation=nn.GELU()), F.gelu, "expert_mlp", id="fused"),
    pytest.param(lambda: MLP(C, N, E, K, activation=torch.tanh), torch.tanh, "grouped_matmul", id="own function"),
    pytest.param(lambda: MLP(C, 3, E, K, activation=nn.Identity()), lambda h: h, "grouped_matmul", id="LoRA"),
    pytest.param(lambda: GLUMLP(C, N, E, K, bias=True), glu, "grouped_matmul", id="glu"),
]


@pytest.mark.parametrize(("make", "between", "operator"), LAYERS)
def test_layers(device, make, between, operator):
    layer = make().to(device)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    ids = random_expert_ids(T, E, K, skew="zipf", device=device)
    names = [name for name, _ in layer.named_parameters()]

    def ours(x, gates, **p):
        return torch.func.functional_call(layer, {n: p[n.replace(".", "_")] for n in names}, (x, gates, ids))

    def plain(x, gates, **p):
        return mlp_loop(x, gates, {n: p[n.replace(".", "_")] for n in names}, ids, between)

    inputs = {"x": randn(T, C, device=device), "gates": torch.rand(T, K).to(device)}
    inputs |= {n.replace(".", "_"): p.detach() for n, p in layer.named_parameters()}
    check(ours, plain, inputs)
    with OperatorLog() as log:
        y = layer(inputs["x"].view(1, T, C), inputs["gates"], ids)
    assert y.shape == (1, T, C)
    assert log.named(operator) and (operator == "expert_mlp" or not log.named("expert_mlp"))


def test_layers_watched_by_hooks_are_called(device):
    layer = MLP(C, N, E, K, activation=nn.ReLU()).to(device)
    args = randn(T, C, device=device), torch.rand(T, K).to(device), random_expert_ids(T, E, K, device=device)
    expected, seen = layer(*args), []
    layer.experts.register_forward_hook(lambda module, given, out: seen.append(out.shape))
    torch.testing.assert_close(layer(*args), expected)
    assert seen == [(T * K, N)]


def test_names_and_layouts():
    """Parameters have ScatterMoE's names and shapes, and its modules are found by its paths."""
    shapes = {name: tuple(p.shape) for name, p in GLUMLP(C, N, E, 9, bias=True).state_dict().items()}
    assert shapes == {
        "experts.weight": (E, 2 * N, C),
        "experts.bias": (E, 2 * N),
        "output_experts.weight": (E, C, N),
        "output_experts.bias": (E, C),
    }
    assert GLUMLP(C, N, E, 9).top_k == E and repr(MLP(C, N, E, K)).startswith("MLP(\n  k=2")
    assert scattermoe.mlp.MLP is MLP and scattermoe.parallel_experts.ParallelExperts is ParallelExperts
    assert scattermoe.kernels.ops.scatter2scatter is ops.scatter2scatter
    experts = ParallelExperts(8, 50, 60, bias=True)
    assert abs(float(experts.weight.detach().std()) - 0.02) < 0.001 and not experts.bias.any()
    assert repr(experts) == "ParallelExperts(num_experts=8, input_size=50, output_size=60)"


@pytest.mark.parametrize("k", [1, 2])
def test_mixture_of_attention(device, k):
    """Experts for queries and outputs, keys and values shared: with one projection for all it is plain attention."""
    heads, size = 2, 6
    ids = random_expert_ids(T, E, k, seed=1, device=device)
    order = flatten_sort_count(ids, E)
    given = {
        "x": randn(T, C, device=device),
        "q": randn(C, heads * size, seed=1, device=device) * C**-0.5,
        "kv": randn(C, 2 * heads * size, seed=2, device=device) * C**-0.5,
        "o": randn(heads * size, C, seed=3, device=device) * (heads * size) ** -0.5,
    }
    gates = torch.softmax(randn(T, k, seed=4, device=device), 1)

    def attention(q, kv, copies):
        keys, values = (t.view(T, heads, size).transpose(0, 1).repeat(copies, 1, 1) for t in kv.chunk(2, dim=1))
        q = q.view(T, copies * heads, size).transpose(0, 1)
        return F.scaled_dot_product_attention(q, keys, values, is_causal=True).transpose(0, 1)

    def mixture(x, q, kv, o):
        queries = parallel_linear(x, q.expand(E, -1, -1), k, *order)
        mixed = attention(queries.reshape(T, -1), x @ kv, k).reshape(T * k, heads * size)
        return parallel_linear(mixed, o.expand(E, -1, -1), 1, *order, gates=gates.to(x.dtype))

    def plain(x, q, kv, o):
        return attention(x @ q, x @ kv, 1).reshape(T, -1) @ o

    check(mixture, plain, given)


def test_float32_gates_and_autocast(device):
    ids = random_expert_ids(T, E, K, device=device)
    order = flatten_sort_count(ids, E)
    x, w = randn(T, C, device=device), randn(E, C, N, seed=1, device=device)
    gates = torch.rand(T, K).to(device)
    narrow = parallel_linear(x.bfloat16(), w.bfloat16(), K, *order, gates=gates)
    assert narrow.dtype == torch.bfloat16
    with torch.autocast(device, dtype=torch.bfloat16):
        assert torch.equal(parallel_linear(x, w, K, *order, gates=gates), narrow)


def test_traces_without_a_graph_break(device):
    layer = GLUMLP(C, N, E, K).to(device)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for tokens in (T, 7):
        x, gates = randn(tokens, C, device=device).requires_grad_(), torch.rand(tokens, K).to(device)
        ids = random_expert_ids(tokens, E, K, device=device)
        grads = [
            torch.autograd.grad(f(x, gates, ids).square().sum(), [x, *layer.parameters()]) for f in (layer, compiled)
        ]
        assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))


def test_no_tokens(device):
    layer = MLP(C, N, E, K, activation=torch.tanh).to(device)
    x = torch.zeros(0, C, device=device, requires_grad=True)
    layer(x, x.new_zeros(0, K), torch.zeros(0, K, dtype=torch.long, device=device)).sum().backward()
    assert x.grad.shape == (0, C) and not layer.experts.weight.grad.any()


X, W = torch.zeros(T, C), torch.zeros(E, C, N)
ORDER = order_of(torch.zeros(T, K, dtype=torch.long))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: parallel_linear(X, W, 3, *ORDER),
            ValueError,
            "k must be at least 1 and divide the R = 46 rows, got 3",
        ),
        (lambda: parallel_linear(X, W, 2.0, *ORDER), TypeError, "k must be an int, got float"),
        (lambda: parallel_linear(X[:5], W, K, *ORDER), ValueError, r"x must have shape \(T, C\) = \(23, 12\)"),
        (lambda: parallel_linear(X, W[:3], K, *ORDER), ValueError, r"expert_offsets must have shape \(E,\) = \(3\)"),
        (lambda: parallel_linear(X, W.double(), K, *ORDER), TypeError, "weight must have the dtype of x"),
        (lambda: parallel_linear(X, W, K, *ORDER, gates=X), ValueError, "gates must have one element for each of 46"),
        (
            lambda: parallel_linear(X, W, K, *ORDER, gates=X[:, :K], grouped_out=True),
            ValueError,
            "gates must be None with grouped_out=True",
        ),
        (lambda: ops.group(X, ORDER[1], fan_out=3), ValueError, "A must have R / fan_out = 46 / 3 rows"),
        (lambda: ops.scatter2scatter(X, W, *ORDER[:2], K, out=X), ValueError, "out must have shape that of the result"),
        (lambda: flatten_sort_count(X, E), TypeError, "expert_idxs must be int32 or int64"),
        (lambda: ParallelExperts(0, 1, 1), ValueError, "num_experts must be at least 1, got 0"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("rows", ["one", "each"])
def test_single_token_product(rows, device):
    """The k experts of one token, on one row or on one each."""
    from gossamer.integrations.scattermoe.kernels.single import single2scatter

    ids = torch.tensor([[3, 0, 4]], device=device)
    x = randn(1 if rows == "one" else 3, C, device=device)
    w = randn(E, C, N, seed=1, device=device)
    check(
        lambda x, w: single2scatter(x, w, ids),
        lambda x, w: torch.stack([x[0 if rows == "one" else j] @ w[e] for j, e in enumerate(ids[0].tolist())]),
        {"x": x, "w": w},
    )
    with pytest.raises(ValueError, match=r"X must have shape \(1, C\) or \(k, C\) with k = 3, got \(2, 12\)"):
        single2scatter(x.new_zeros(2, C), w, ids)
    with pytest.raises(ValueError, match=r"expert_idxs must have shape \(1, k\)"):
        single2scatter(x, w, ids[0])


def test_parallel_linear_by_its_autograd_functions_name(device):
    ids = random_expert_ids(T, E, K, skew="zipf", device=device)
    given = inputs_of(device, gates=True)
    order = flatten_sort_count(ids, num_experts=E)
    y = scattermoe.ParallelLinear.apply(given["x"], given["w"], K, *order, given["bias"], given["gates"], False, False)
    assert torch.equal(
        y, parallel_linear(given["x"], given["w"], K, *order, expert_biases=given["bias"], gates=given["gates"])
    )
