"""Launches of a mixture-of-experts layer: which kernels a call starts, and a training step in one CUDA graph."""

import contextlib

import pytest
import torch
from helpers import randn
from torch.utils._python_dispatch import TorchDispatchMode

import gossamer
from gossamer.nn import MoE

pytest.importorskip("triton")
from triton.runtime.interpreter import GridExecutor
from triton.runtime.jit import JITFunction

# Operators of torch that start no kernel.
VIEWS = {"view", "t", "detach", "transpose", "expand", "promote_types", "_unsafe_view", "alias", "select", "slice"}
H, I, E, K = 32, 16, 8, 2


class TorchLaunches(TorchDispatchMode):
    """Adds to ``names`` each operator of torch that is not a view."""

    def __init__(self, names):
        super().__init__()
        self.names = names

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Call the operator, and note it."""
        if func.namespace == "aten" and func._opname not in VIEWS:
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def launches(monkeypatch):
    """Names of the Triton kernels, interpreted or compiled, and of torch's operators that are called inside."""
    names = []

    def noting(real):
        def call(self, *args, **kwargs):
            names.append(getattr(self, "fn", self).__name__)
            return real(self, *args, **kwargs)

        return call

    with monkeypatch.context() as patch, TorchLaunches(names):
        patch.setattr(GridExecutor, "__call__", noting(GridExecutor.__call__))
        patch.setattr(JITFunction, "run", noting(JITFunction.run))
        yield names


def expected(num_tokens, device):
    """Kernels of the forward and of the backward pass of a training step, in order."""
    sort = ["_place_kernel"] if num_tokens * K <= 512 else ["_count_kernel", "_place_kernel"]
    up = ["_row_tiles_kernel", "_up_kernel", "_grouped_matmul_kernel", "gather_reduce_kernel"]
    forward = ["mm", "_topk_routing_kernel", *sort, *up]
    backward = ["_row_tiles_kernel", "_down_backward_kernel", "_weight_gradient_kernel", "_dweight_kernel"]
    backward += ["_grouped_matmul_kernel", "gather_reduce_kernel", "_dweight_kernel"]
    return forward, [*backward, "_topk_routing_backward_kernel", "mm", "mm", "add"]


@pytest.mark.parametrize("num_tokens", [20, 300])
def test_kernels_of_a_training_step(monkeypatch, device, num_tokens):
    """No kernel beside those that compute; launches in tiles of as many rows share the table of them."""
    layer = MoE(H, I, E, K).to(device)
    x = randn(num_tokens, H, device=device).requires_grad_()
    dy = randn(num_tokens, H, seed=1, device=device)
    forward, backward = expected(num_tokens, device)
    with gossamer.backend("triton"):
        with launches(monkeypatch) as names:
            y = layer(x)
        assert names == forward
        with launches(monkeypatch) as names:
            y.backward(dy)
    # Where TMA is there, gathered operands of weight gradients may be copied into padded rows, by a table of their own.
    extra = {"_row_tiles_kernel", "_padded_rows_kernel"} if device == "cuda" else {"_row_tiles_kernel"}
    assert [n for n in names if n not in extra] == [n for n in backward if n not in extra]
    assert names.count("_row_tiles_kernel") <= 3


def test_kernels_of_decoding(monkeypatch, device):
    """With few tokens and no gradient: products in parts, their sums, and the table once."""
    # So deep that the up-projection of one row is cut.
    layer = MoE(512, 32, 2, 1).to(device)
    x = randn(1, 512, device=device)
    with gossamer.backend("triton"), torch.no_grad(), launches(monkeypatch) as names:
        layer(x)
    products = ["_row_tiles_kernel", "_split_matmul_kernel", "_finish_kernel", "_split_matmul_kernel"]
    assert names == ["mm", "_topk_routing_kernel", "_place_kernel", *products, "gather_reduce_kernel"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("optimizer", [None, torch.optim.SGD])
def test_training_step_in_a_cuda_graph(optimizer):
    """Forward, backward and the step are captured once; replays on other tokens give the gradients of eager steps."""
    torch.manual_seed(0)
    layer = MoE(64, 32, E, K).to("cuda", torch.bfloat16)
    eager = MoE(64, 32, E, K).to("cuda", torch.bfloat16)
    eager.load_state_dict(layer.state_dict())
    x = randn(200, 64, device="cuda", dtype=torch.bfloat16).requires_grad_()
    dy = randn(200, 64, seed=1, device="cuda", dtype=torch.bfloat16)
    steps = [optimizer(m.parameters(), lr=0.1) if optimizer else None for m in (layer, eager)]

    def step(module, tokens, taken):
        module(tokens).backward(dy)
        if taken is not None:
            taken.step()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step(layer, x, None)
    torch.cuda.current_stream().wait_stream(side)
    for p in (x, *layer.parameters()):
        p.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(layer, x, steps[0])
    for seed in (2, 3):
        tokens = randn(200, 64, seed=seed, device="cuda", dtype=torch.bfloat16)
        with torch.no_grad():
            x.copy_(tokens)
        graph.replay()
        tokens.requires_grad_()
        eager.zero_grad(set_to_none=True)
        step(eager, tokens, steps[1])
        assert torch.equal(x.grad, tokens.grad)
        for (name, a), b in zip(layer.named_parameters(), eager.parameters(), strict=True):
            assert torch.equal(a.grad, b.grad), name
            assert torch.equal(a, b), name
