"""Dispatches in which many slots have no expert: buffers of live rows alone, and the results of the full buffers."""

import pytest
import torch
from helpers import randn, run

import gossamer
from gossamer.nn.moe.experts.block_sparse import block_sparse_mlp
from gossamer.testing import random_expert_ids

PRIMITIVE = "expert_mlp"
T, H, I, E, K = 13, 24, 16, 5, 4
# Share of the slots without an expert; 1 leaves none with one.
DROPPED = [0.0, 0.6, 1.0]
# Kernels that compile ahead of a GPU take the bound that is given; this one is not tight.
SLACK = 3


def dispatches(device, dropped, top_k=K, seed=0):
    """The same assignments with buffers of all slots and with buffers of those that have an expert."""
    ids = random_expert_ids(T, E, top_k, dropped=0.0, seed=seed)
    ids = ids.masked_fill(torch.rand(ids.shape, generator=torch.Generator().manual_seed(7)) < dropped, E).to(device)
    live = int((ids < E).sum())
    full, ragged = gossamer.dispatch(ids, E), gossamer.dispatch(ids, E, max_rows=live + SLACK)
    assert full.buffer_rows == full.num_rows == T * top_k
    expected = max(live, 1) if device == "cpu" else min(live + SLACK, T * top_k)
    assert ragged.buffer_rows == ragged.row_slots.shape[0] == expected
    return full, ragged


def check(ragged, full, tensors, needs=None):
    """Results and gradients of two functions of ``tensors`` have the same bits."""
    needs = list(tensors) if needs is None else needs
    dout = randn(*full(**tensors).shape, seed=9, device=tensors["x"].device)
    found, expected = (run(function, tensors, needs, dout) for function in (ragged, full))
    assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []


def inputs(device, dtype, top_k=K, **extra):
    return {
        "x": randn(T, H, device=device, dtype=dtype),
        "gate_up": randn(E, 2 * I, H, seed=1, device=device, dtype=dtype) / H**0.5,
        "down": randn(E, H, I, seed=2, device=device, dtype=dtype) / I**0.5,
        "weights": randn(T, top_k, seed=3, device=device, dtype=dtype).abs(),
        **{name: randn(*shape, seed=4, device=device, dtype=dtype) for name, shape in extra.items()},
    }


BIASES = {"gate_up_bias": (E, 2 * I), "down_bias": (E, H)}
FACTORS = {"a1": (E, 3, H), "b1": (E, 2 * I, 3), "a2": (E, 2, I), "b2": (E, H, 2)}


@pytest.mark.parametrize("dropped", DROPPED)
@pytest.mark.parametrize("top_k", [1, K])
def test_expert_mlp(kernel_backend, dtype, device, dropped, top_k):
    full, ragged = dispatches(device, dropped, top_k)

    def layer(plan):
        return lambda **tensors: gossamer.expert_mlp(dispatch=plan, **tensors)

    with gossamer.backend(kernel_backend):
        check(layer(ragged), layer(full), inputs(device, dtype, top_k, **BIASES))


@pytest.mark.parametrize("dropped", DROPPED)
def test_low_rank_factors(kernel_backend, device, dropped):
    full, ragged = dispatches(device, dropped)

    def layer(plan):
        def call(a1, b1, a2, b2, **tensors):
            factors = {"gate_up_lora": (a1, b1), "down_lora": (a2, b2), "lora_scale": 0.5}
            return gossamer.expert_mlp(dispatch=plan, **factors, **tensors)

        return call

    with gossamer.backend(kernel_backend):
        check(layer(ragged), layer(full), inputs(device, torch.float32, **FACTORS))


@pytest.mark.parametrize("dropped", DROPPED)
def test_quantised_weights(kernel_backend, device, dropped):
    """As the fused kernel without gradients, and as a composition of products with them."""
    full, ragged = dispatches(device, dropped)
    given = inputs(device, torch.float32, **BIASES)
    gate_up, down = (gossamer.QuantizedExpertWeight.quantize(given.pop(n), "int8") for n in ("gate_up", "down"))

    def layer(plan):
        return lambda **tensors: gossamer.expert_mlp(gate_up=gate_up, down=down, dispatch=plan, **tensors)

    with gossamer.backend(kernel_backend):
        check(layer(ragged), layer(full), given)
        check(layer(ragged), layer(full), given, needs=[])


@pytest.mark.parametrize("dropped", DROPPED)
def test_block_sparse_form(device, dropped):
    full, ragged = dispatches(device, dropped)
    activation = gossamer.Activation("swiglu")

    def layer(plan):
        return lambda **tensors: block_sparse_mlp(dispatch=plan, activation=activation, **tensors)

    check(layer(ragged), layer(full), inputs(device, torch.float32, **BIASES))


@pytest.mark.parametrize("dropped", DROPPED)
@pytest.mark.parametrize("top_k", [1, K])
@pytest.mark.parametrize("x_grouped", [False, True])
@pytest.mark.parametrize("y_grouped", [False, True])
@pytest.mark.parametrize("quantised", [False, True])
def test_grouped_matmul(kernel_backend, device, dropped, top_k, x_grouped, y_grouped, quantised):
    full, ragged = dispatches(device, dropped, top_k)
    form = {"x_grouped": x_grouped, "y_grouped": y_grouped}
    rows = ragged.buffer_rows
    x = randn(rows if x_grouped else T, H, device=device)
    tensors = {"x": x, "weight": randn(E, I, H, seed=1, device=device), "bias": randn(E, I, seed=2, device=device)}
    fixed = {}
    if quantised:
        fixed["weight"] = gossamer.QuantizedExpertWeight.quantize(tensors.pop("weight"), "int8")

    def product(**tensors):
        return gossamer.grouped_matmul(dispatch=ragged, **tensors, **fixed, **form)

    def of_all_slots(x, **tensors):
        if x_grouped:
            x = torch.cat([x, x.new_zeros(T * top_k - rows, H)])
        y = gossamer.grouped_matmul(x, dispatch=full, **tensors, **fixed, **form)
        return y[:rows] if y_grouped else y

    with gossamer.backend(kernel_backend):
        check(product, of_all_slots, tensors)


def test_reference_takes_live_rows(device):
    full, ragged = dispatches(device, 0.6)
    given = inputs(device, torch.float64)
    with gossamer.backend("reference"):
        assert torch.equal(gossamer.expert_mlp(dispatch=ragged, **given), gossamer.expert_mlp(dispatch=full, **given))
        x, weight = given["x"], given["gate_up"]
        for grouped in (False, True):
            left, right = (gossamer.grouped_matmul(x, weight, plan, y_grouped=grouped) for plan in (ragged, full))
            assert torch.equal(left, right[: ragged.buffer_rows] if grouped else right)


def test_saved_activations_have_live_rows(kernel_backend, device):
    """What the backward pass keeps is the pre-activation of live rows, not of all slots."""
    _, ragged = dispatches(device, 0.6)
    given = inputs(device, torch.float32)
    sizes = []
    with (
        gossamer.backend(kernel_backend),
        torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(tuple(t.shape)) or t, lambda t: t),
    ):
        gossamer.expert_mlp(given.pop("x").requires_grad_(), dispatch=ragged, **given)
    assert (ragged.buffer_rows, 2 * I) in sizes
    assert (T * K, 2 * I) not in sizes


def test_too_many_rows(any_backend, device):
    """More live slots than the bound: an error on the CPU; on CUDA the last experts' rows are dropped and counted."""
    ids = torch.tensor([[0, 1], [1, 5], [2, 0]], device=device)
    with gossamer.backend(any_backend):
        if device == "cpu":
            with pytest.raises(ValueError, match=r"max_rows must be at least the number of slots with an expert, 5"):
                gossamer.dispatch(ids, 3, max_rows=4)
            return
        plan = gossamer.dispatch(ids, 3, max_rows=4)
        assert plan.offsets.tolist() == [0, 2, 4, 4] and plan.buffer_rows == 4
        assert int((ids < 3).sum() - plan.offsets[-1]) == 1
        x = torch.randn(3, 8, device=device)
        y = gossamer.grouped_matmul(x, torch.eye(8, device=device).expand(3, 8, 8), plan)
        assert torch.equal(
            y, torch.where(torch.tensor([[1, 1], [1, 0], [0, 1]], device=device)[..., None] > 0, x[:, None], 0)
        )


def test_bound_in_compiled_code(device):
    """Compiled code, which must not read the number of live rows, takes the bound; the error on the CPU remains."""
    ids = torch.tensor([[0, 1], [1, 5], [2, 0]], device=device)
    weight = randn(3, 8, 8, device=device)
    x = randn(3, 8, seed=1, device=device)

    def product(x, ids, bound):
        plan = gossamer.dispatch(ids, 3, max_rows=bound)
        y = gossamer.grouped_matmul(x, weight, plan, y_grouped=True)
        assert y.shape[0] == plan.buffer_rows
        return gossamer.grouped_matmul(y, weight, plan, x_grouped=True), y.shape[0]

    compiled = torch.compile(product, fullgraph=True, backend="aot_eager")
    y, rows = compiled(x, ids, 6)
    assert rows == 6
    expected, live = product(x, ids, 6)
    assert live == (5 if device == "cpu" else 6)
    assert torch.equal(y, expected)
    if device == "cpu":
        with pytest.raises(ValueError, match="max_rows must be at least"):
            compiled(x, ids, 4)


@pytest.mark.parametrize("bound", [-1, 2.0, True])
def test_bad_bounds(device, bound):
    with pytest.raises((TypeError, ValueError), match="max_rows must be"):
        gossamer.dispatch(torch.zeros(2, 1, dtype=torch.int64, device=device), 2, max_rows=bound)
