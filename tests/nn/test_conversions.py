"""Casts, moves, export, tracing and transforms of layers: each works, or is refused with what to do instead."""

import pytest
import torch

from gossamer import optim
from gossamer.nn import (
    BlockSparseLinear,
    DynamicEmbedding,
    Embedding,
    EmbeddingBag,
    Experts,
    LoRAEmbedding,
    MaskedEmbedding,
    MoE,
    ProductQuantizedEmbedding,
    SearchedDimensionEmbedding,
    expert_factors,
    flat_expert_factors,
    given_experts,
    limit_capacity,
)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_casts_reach_a_dynamic_table(dtype):
    """Rows are rounded once, state stays in float32, and training goes on."""
    layer = DynamicEmbedding(4, 64, optimizer=optim.Adam(lr=0.1))
    ids = torch.arange(10).unsqueeze(1)
    before = layer(ids).detach()
    model = torch.nn.Sequential(layer).to(dtype)
    assert layer.table.value_dtype == dtype and layer.optimizer_state["exp_avg"].dtype == torch.float32
    out = model(ids)
    assert out.dtype == dtype and torch.equal(out, before.to(dtype))
    out.sum().backward()
    assert not torch.equal(model(ids), before.to(dtype))
    layer(torch.tensor([[77]]))
    assert len(layer) == 11
    with pytest.raises(TypeError, match=r"value_dtype must be float32, float16 or bfloat16, got torch\.float64"):
        model.double()


def test_a_dynamic_table_is_not_moved_to_meta():
    layer = DynamicEmbedding(4, 64)
    layer(torch.tensor([[5]]))
    with pytest.raises(ValueError, match="cannot be moved to the meta device, where its ids would be lost"):
        torch.nn.Sequential(layer).to("meta")
    assert len(layer) == 1 and layer.table.values.device.type == "cpu"


@pytest.mark.parametrize("strict", [False, True])
def test_export_of_a_block_sparse_layer(strict):
    layer = BlockSparseLinear(40, 50, density=0.5, block=16)
    x = torch.randn(3, 40)
    program = torch.export.export(layer, (x,), strict=strict)
    assert torch.equal(program.module()(x), layer(x))


def test_export_of_a_dynamic_table_is_refused():
    with pytest.raises(Exception, match=r"torch\.export cannot record DynamicEmbedding, whose table changes outside"):
        torch.export.export(DynamicEmbedding(4, 64).eval(), (torch.tensor([[1]]),))


@pytest.mark.parametrize("training", [True, False])
def test_traces_and_transforms_of_a_dynamic_table_are_refused(training):
    """A trace recorded the rows of its example as constants, and gave vectors of memory that nobody wrote to."""
    layer, head, ids = DynamicEmbedding(4, 64).train(training), torch.nn.Linear(4, 2), torch.tensor([[1]])
    message = (
        "cannot record DynamicEmbedding, whose table changes outside the program: apply it to the layers that follow"
    )
    with pytest.raises(RuntimeError, match=rf"torch\.jit\.trace {message}"):
        torch.jit.trace(layer, (ids,))

    def loss(parameters):
        return torch.func.functional_call(head, parameters, (layer(ids),)).sum()

    with pytest.raises(RuntimeError, match=rf"torch\.func {message}"):
        torch.func.grad(loss)(dict(head.named_parameters()))


TABLES = {
    "Embedding": lambda: Embedding(20, 8, padding_idx=3),
    "Embedding_by_frequency": lambda: Embedding(20, 8, scale_grad_by_freq=True),
    "EmbeddingBag_by_frequency": lambda: EmbeddingBag(20, 8, scale_grad_by_freq=True),
    "MaskedEmbedding": lambda: MaskedEmbedding(20, 8),
    "ProductQuantizedEmbedding": lambda: ProductQuantizedEmbedding(20, 8, 4, 2),
    "SearchedDimensionEmbedding": lambda: SearchedDimensionEmbedding(20, 8, (2, 4)),
}


@pytest.mark.parametrize("name", TABLES)
def test_gradients_of_tables_by_torch_func(name):
    """The same as those of backward()."""
    torch.manual_seed(0)
    layer, ids = TABLES[name]().eval(), torch.randint(20, (6, 3))

    def loss(parameters):
        return torch.func.functional_call(layer, parameters, (ids,)).square().sum()

    found = torch.func.grad(loss)({key: p.detach() for key, p in layer.named_parameters()})
    layer(ids).square().sum().backward()
    for key, parameter in layer.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[key], parameter.grad)
    assert any(gradient.count_nonzero() for gradient in found.values())


@pytest.mark.parametrize("make", [lambda: MoE(16, 8, 4, 2), lambda: Experts(4, 16, 8)], ids=["MoE", "Experts"])
def test_tracing_and_vmap_are_refused(make):
    layer, x = make(), torch.randn(5, 16)
    more = () if isinstance(layer, MoE) else (torch.zeros(5, 1, dtype=torch.int64), torch.ones(5, 1))
    name = type(layer).__name__
    with pytest.raises(RuntimeError, match=f"torch.jit.trace cannot record {name}: use torch.export.export"):
        torch.jit.trace(layer, (x, *more))
    parameters = dict(layer.named_parameters())

    def loss(parameters, x, *more):
        rows = (x[None], *(m[None] for m in more))
        return torch.func.functional_call(layer, parameters, rows).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, *(0 for _ in more)))
    with pytest.raises(RuntimeError, match=f"torch.func.vmap cannot map over {name}.*call torch.func.grad in a loop"):
        each(parameters, x, *more)
    # The error advises a loop over the samples, whose gradients add up to those of the batch.
    samples = [torch.func.grad(loss)(parameters, x[i], *(m[i] for m in more)) for i in range(5)]
    layer(x, *more).square().sum().backward()
    for key, parameter in layer.named_parameters():
        total = sum(sample[key] for sample in samples).double()
        error = torch.linalg.vector_norm(total - parameter.grad) / torch.linalg.vector_norm(total)
        assert float(error) < 1e-5


def test_export_of_moe():
    moe, x = MoE(16, 8, 4, 2), torch.randn(5, 16)
    assert torch.equal(torch.export.export(moe, (x,)).module()(x), moe(x))


W = torch.zeros(10, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: EmbeddingBag(10, 3)([1, 2]), TypeError, "input must be a torch.Tensor, got list"),
        (
            lambda: EmbeddingBag(10, 3)(torch.arange(6), torch.tensor([1, 3])),
            ValueError,
            "offsets must begin at 0, where the first bag does, got 1",
        ),
        (
            lambda: EmbeddingBag(10, 3, mode="sum")(torch.ones(1, 1).long(), None, torch.ones(1, 1).double()),
            TypeError,
            "per_sample_weights must have the dtype of the table, torch.float32, got torch.float64",
        ),
        (
            lambda: EmbeddingBag(10, 3, mode="sum", dtype=torch.float16)(W[:1, :1].long(), None, W[:1, :1].double()),
            TypeError,
            "per_sample_weights must have the dtype of the table, torch.float16, or float32, got torch.float64",
        ),
        (
            lambda: LoRAEmbedding(10, 3, 2)(torch.tensor([3, 11])),
            IndexError,
            r"ids must be in \[0, N\) with N=10, got 3 to",
        ),
        (lambda: LoRAEmbedding(10, 3, 2)([1]), TypeError, "ids must be a torch.Tensor, got list"),
        (lambda: expert_factors(W, W.T, 0), ValueError, "num_experts must be at least 1, got 0"),
        (lambda: expert_factors(3, W, 1), TypeError, "flat_a must be a torch.Tensor, got int"),
        (lambda: flat_expert_factors(W, W), ValueError, r"a must have shape \(E, r, C\) = .* got \(10, 3\)"),
        (
            lambda: flat_expert_factors(torch.zeros(4, 2, 3), torch.zeros(5, 7, 2)),
            ValueError,
            r"b must have shape \(E, N, r\) = \(4, any, 2\), got \(5, 7, 2\)",
        ),
        (
            lambda: limit_capacity(given_experts(torch.zeros(2, 1).long(), 2), None),
            TypeError,
            "capacity_factor must be a number, got NoneType",
        ),
        (lambda: limit_capacity(W, 1.0), TypeError, "routing must be a Routing, got Tensor"),
        (lambda: optim.SGD(lr=1.0, seed=1.5), TypeError, "seed must be an int, got float"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_the_last_bag_ends_at_the_last_offset(mode):
    """With ``include_last_offset`` ids behind it are in no bag, whatever the mode and padding."""
    weight, ids = torch.randn(10, 3), torch.tensor([1, 2, 3, 4, 5, 6])
    for padding in (None, 2):
        bag = EmbeddingBag(10, 3, mode=mode, padding_idx=padding, include_last_offset=True, _weight=weight)
        cut = torch.nn.EmbeddingBag(10, 3, mode=mode, padding_idx=padding, include_last_offset=True, _weight=weight)
        offsets = torch.tensor([0, 2, 4])
        assert torch.equal(bag(ids, offsets), cut(ids[:4], offsets))
