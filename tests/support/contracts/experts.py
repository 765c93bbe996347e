"""The contract of expert layers."""

import copy

import pytest
import torch
from helpers import check
from torch import nn

import gossamer
from contracts.base import (
    FLOATS,
    Contract,
    H,
    T,
    assert_gradients,
    assert_near,
    functional,
    hidden_states,
    parameters,
    sum_of_slots,
)
from gossamer.nn import MoE, Routing


def random_routing(num_tokens, num_experts, top_k, device, dtype=torch.float32, absent=0.3):
    """Ids and weights with some slots without an expert, and the last token without any."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.rand(num_tokens, num_experts, generator=generator).argsort(1)[:, :top_k]
    ids = ids.masked_fill(torch.rand(ids.shape, generator=generator) < absent, num_experts)
    if num_tokens:
        ids[-1] = num_experts
    weights = torch.rand(ids.shape, generator=generator).masked_fill(ids >= num_experts, 0)
    return ids.to(device), weights.to(device, dtype)


class ExpertsContract(Contract):
    """The contract of expert layers; cases make one from ``num_experts``, ``hidden_size``, ``device`` and ``dtype``."""

    E, K = 5, 3

    def test_output(self, make, device):
        """One row per token in the shape of x: the weighted sum of its experts' outputs, zeros if it has no expert."""
        layer = make(num_experts=self.E, hidden_size=H, device=device, dtype=torch.float64)
        assert (layer.num_experts, layer.hidden_size) == (self.E, H)
        ids, weights = random_routing(12, self.E, self.K, device, torch.float64)
        x = hidden_states(3, 4, H, device=device, dtype=torch.float64)
        y = layer(x, Routing(ids, weights, self.E))
        assert y.shape == x.shape and y.dtype == x.dtype
        assert bool((y[-1, -1] == 0).all())
        assert_near(y.view(12, H), sum_of_slots(layer, x.view(12, H), ids, weights))
        assert torch.equal(y, layer(x, ids, weights))

    def test_gradients(self, make, device):
        layer = make(num_experts=self.E, hidden_size=H, device=device, dtype=torch.float64)
        ids, weights = random_routing(T, self.E, self.K, device, torch.float64)
        factors = hidden_states(T, H, device=device, dtype=torch.float64, seed=8)

        def call(forward, x, weights):
            return (forward(x, Routing(ids, weights, self.E)) * factors).sum()

        x = hidden_states(T, H, device=device, dtype=torch.float64)
        assert_gradients(functional(layer, call), {"x": x, "weights": weights} | parameters(layer, self.detached))

    def test_same_bits_twice(self, make, device):
        layer = make(num_experts=self.E, hidden_size=H, device=device, dtype=torch.float32)
        ids, weights = random_routing(T, self.E, self.K, device)
        results = []
        for _ in range(2):
            x = hidden_states(T, H, device=device).requires_grad_()
            y = layer(x, Routing(ids, weights, self.E))
            trained = [p for p in layer.parameters() if p.requires_grad]
            results.append([y, *torch.autograd.grad(y.square().sum(), [x, *trained])])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

    def test_state_dict(self, make, device):
        first = make(num_experts=self.E, hidden_size=H, device=device, dtype=torch.float32)
        second = copy.deepcopy(first)
        with torch.no_grad():
            for tensor in second.state_dict().values():
                tensor.zero_()
        second.load_state_dict(first.state_dict())
        x, (ids, weights) = hidden_states(T, H, device=device), random_routing(T, self.E, self.K, device)
        assert torch.equal(first(x, ids, weights), second(x, ids, weights))

    def test_compiles(self, make, device):
        # All cases compile the same method of their base class, each separately.
        torch._dynamo.reset()
        layer = make(num_experts=self.E, hidden_size=H, device=device, dtype=torch.float32)
        ids, weights = random_routing(T, self.E, self.K, device)
        torch._dynamo.reset()
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        results = []
        for function in (compiled, layer):
            x = hidden_states(T, H, device=device).requires_grad_()
            y = function(x, Routing(ids, weights, self.E))
            results.append([y, *torch.autograd.grad(y.square().sum(), [x])])
        for found, expected in zip(*results, strict=True):
            assert_near(found, expected)

    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    def test_dtypes(self, make, device, dtype):
        """Results in the dtype of x are as close to float64 as those of plain torch in that dtype."""
        layer = make(num_experts=self.E, hidden_size=H, device=device, dtype=dtype)
        x, (ids, weights) = hidden_states(T, H, device=device, dtype=dtype), random_routing(T, self.E, self.K, device)
        wide = copy.deepcopy(layer).double()

        def plain(x, weights):
            with gossamer.backend("reference"):
                return (wide if x.dtype == torch.float64 else layer)(x, ids, weights)

        with torch.no_grad():
            found = check(lambda x, weights: layer(x, ids, weights), plain, {"x": x, "weights": weights}, needs=())
        assert found["out"].dtype == dtype

    @pytest.mark.parametrize("num_tokens", [0, 1])
    def test_few_tokens(self, make, device, num_tokens):
        layer = make(num_experts=self.E, hidden_size=H, device=device, dtype=torch.float32)
        ids, weights = random_routing(num_tokens, self.E, self.K, device)
        assert layer(hidden_states(num_tokens, H, device=device), ids, weights).shape == (num_tokens, H)

    def test_one_expert(self, make, device):
        layer = make(num_experts=1, hidden_size=H, device=device, dtype=torch.float64)
        x = hidden_states(T, H, device=device, dtype=torch.float64)
        ids, weights = torch.zeros(T, 1, dtype=torch.int64, device=device), torch.ones(T, 1, dtype=torch.float64)
        y = layer(x, ids, weights.to(device))
        assert_near(y[:1], layer(x[:1], ids[:1], weights[:1].to(device)))

    def test_all_tokens_on_one_expert(self, make, device):
        layer = make(num_experts=self.E, hidden_size=H, device=device, dtype=torch.float64)
        x = hidden_states(T, H, device=device, dtype=torch.float64)
        ids = torch.full((T, 1), self.E - 1, device=device)
        weights = torch.ones(T, 1, dtype=torch.float64, device=device)
        assert_near(layer(x, ids, weights), torch.cat([layer(x[t : t + 1], ids[:1], weights[:1]) for t in range(T)]))

    def test_no_expert_at_all(self, make, device):
        layer = make(num_experts=self.E, hidden_size=H, device=device, dtype=torch.float32)
        x = hidden_states(T, H, device=device).requires_grad_()
        ids = torch.full((T, 2), self.E, device=device)
        y = layer(x, Routing(ids, torch.zeros(T, 2, device=device), self.E))
        (dx,) = torch.autograd.grad(y.sum(), [x])
        assert not y.any() and not dx.any()

    def test_parts_add_up(self, make, device):
        """Layers that each hold a part of the experts, as processes do, add up to the whole layer."""
        layer = make(num_experts=self.E, hidden_size=H, device=device, dtype=torch.float64)
        try:
            stacks = layer.stacks()
        except NotImplementedError as error:
            assert f"{type(layer).__name__} must define stacks()" in str(error)
            return
        ids, weights = random_routing(T, self.E, 2, device, torch.float64)
        x = hidden_states(T, H, device=device, dtype=torch.float64)
        size = max(self.E // tensor.shape[0] for tensor in stacks.values())
        total = 0
        for first in range(0, self.E, size):
            part = {
                name: stack[first * stack.shape[0] // self.E : (first + size) * stack.shape[0] // self.E]
                for name, stack in stacks.items()
            }
            away = (ids < first) | (ids >= first + size)
            local, own = (ids - first).masked_fill(away, size), weights.masked_fill(away, 0.0)
            slots = [Routing(local[:, k : k + 1], own[:, k : k + 1], size) for k in range(2)]
            total = total + sum(layer.over(part, size)(x, slot) for slot in slots)
        assert_near(total, layer(x, ids, weights))
        assert layer.num_experts == self.E

    def test_inside_the_layer(self, make, device):
        layer = make(num_experts=self.E, hidden_size=H, device=device, dtype=torch.float32)
        moe = MoE(H, None, self.E, 2, experts=layer, device=device)
        x = hidden_states(T, H, device=device)
        y, routing = moe(x, return_routing=True)
        assert torch.equal(y, layer(x, routing))
        assert isinstance(moe.experts, nn.Module)
