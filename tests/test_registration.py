"""The autograd of operators."""

import pytest
import torch

import gossamer
from gossamer.ops._registration import register_autograd


def test_backward_runs_again(kernel_backend, device):
    """A graph that is kept gives the same gradients more often than an operator has arguments."""
    x = torch.randn(5, 8, device=device, requires_grad=True)
    with gossamer.backend(kernel_backend):
        y = gossamer.activate(x, "swiglu")
    dy = torch.randn_like(y)
    (first,) = torch.autograd.grad(y, x, dy, retain_graph=True)
    for _ in range(len(torch.ops.gossamer.activate.default._schema.arguments) + 2):
        (again,) = torch.autograd.grad(y, x, dy, retain_graph=True)
        assert torch.equal(first, again)


def test_refuses_operators_that_change_arguments():
    """What torch serves alone is refused."""
    with pytest.raises(TypeError, match="multi_low_rank_ must have no lists of tensors or keyword-only arguments"):
        register_autograd("multi_low_rank_", None, None)
