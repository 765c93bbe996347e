"""Layers with no memory: what they make lies on their tensors' device, and no value is read on the host.

On the meta device a tensor of another device, or a value read on the host, raises an error. Elsewhere only a GPU
would show them, by an error or a wait.
"""

import pytest
import torch

import gossamer
from gossamer import nn

META = torch.device("meta")
T, H, ROWS = 10, 64, 50


def tokens():
    return (torch.randn(T, H, device=META, requires_grad=True),)


def ids():
    return (torch.randint(ROWS, (4, 3), device=META),)


def jagged():
    return torch.randint(ROWS, (12,), device=META), torch.arange(0, 13, 3, device=META)


OPTIMIZERS = (gossamer.optim.SGD(lr=0.1), gossamer.optim.RowwiseAdagrad(lr=0.1), gossamer.optim.Adam(lr=0.1))
LAYERS = {
    **{
        f"moe {r}": (lambda r=r: nn.MoE(H, 32, 8, 2, router=r, device=META), tokens)
        for r in nn.moe.routers.ROUTERS
        if r != "hash"  # which goes by token ids
    },
    "moe capacity": (lambda: nn.MoE(H, 32, 8, 2, capacity_factor=1.0, device=META), tokens),
    "moe block-sparse": (lambda: nn.MoE(H, 32, 8, 2, form="block_sparse", device=META), tokens),
    "moe shared": (lambda: nn.MoE(H, 32, 8, 2, shared_intermediate_size=32, device=META), tokens),
    "lora": (lambda: nn.LoRALinear(H, 32, 4, device=META), tokens),
    "lora dropout": (lambda: nn.LoRALinear(H, 32, 4, dropout=0.1, device=META), tokens),
    "dora": (lambda: nn.LoRALinear(H, 32, 4, dora=True, device=META), tokens),
    "lora embedding": (lambda: nn.LoRAEmbedding(ROWS, 32, 4, device=META), ids),
    "low rank": (lambda: nn.LowRankLinear(H, 32, 4, device=META), tokens),
    "block-sparse linear": (lambda: nn.BlockSparseLinear(H, H, density=0.5, block=16, device=META), tokens),
    "embedding": (lambda: nn.Embedding(ROWS, 32, device=META), ids),
    **{f"bag {m}": (lambda m=m: nn.EmbeddingBag(ROWS, 32, mode=m, device=META), ids) for m in ("sum", "mean", "max")},
    **{
        f"trained bag {type(o).__name__}": (lambda o=o: nn.EmbeddingBag(ROWS, 32, optimizer=o, device=META), ids)
        for o in OPTIMIZERS
    },
    "tables": (lambda: nn.TableBatchedEmbeddingBags([(ROWS, 8), (ROWS, 16)], device=META), jagged),
    "trained tables": (
        lambda: nn.TableBatchedEmbeddingBags([(ROWS, 8), (ROWS, 16)], optimizer=OPTIMIZERS[1], device=META),
        jagged,
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_training_step(name):
    """Forward and backward."""
    make, inputs = LAYERS[name]
    layer, inputs = make(), inputs()
    y = layer(*inputs)
    assert y.is_meta and y.requires_grad
    y.sum().backward()
    for x in inputs:
        assert not x.requires_grad or (x.grad.is_meta and x.grad.shape == x.shape)
    for parameter in layer.parameters():
        assert parameter.grad is None or parameter.grad.is_meta


def test_adapters_of_a_batch():
    """Ids of adapters sorted, rows multiplied, gradients of all factors."""
    a, b = torch.randn(3, 4, H, device=META, requires_grad=True), torch.randn(3, 32, 4, device=META, requires_grad=True)
    (x,) = tokens()
    gossamer.multi_low_rank(x, a, b, torch.randint(3, (T,), device=META), scale=1.0).sum().backward()
    assert all(leaf.grad.is_meta and leaf.grad.shape == leaf.shape for leaf in (x, a, b))
