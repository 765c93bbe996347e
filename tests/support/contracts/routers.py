"""The contracts of routers, and of the routing functions of logits that they are made of."""

import copy

import pytest
import torch

import gossamer
from contracts.base import (
    FLOATS,
    Contract,
    E,
    H,
    T,
    assert_gradients,
    assert_near,
    functional,
    hidden_states,
    parameters,
    sum_of_slots,
    token_ids,
)
from gossamer.nn import MoE, Routing


class LogitsContract(Contract):
    """The contract of routing functions of logits; a case turns logits ``(..., E)`` into a routing.

    ``alone`` says whether a token's routing depends only on that token's logits.
    """

    alone = True

    def logits(self, device, dtype=torch.float64, shape=(T, E)):
        return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(11), dtype=dtype).to(device)

    def test_gradients(self, make, device):
        """Gradients of weights and probabilities with respect to the logits agree with differences."""
        logits = self.logits(device)
        plain = make(logits)
        factors = torch.linspace(-1, 1, plain.weights.numel(), device=device, dtype=logits.dtype)
        columns = torch.linspace(-1, 1, E, device=device, dtype=logits.dtype)

        def function(logits):
            routing = make(logits)
            assert torch.equal(routing.expert_ids, plain.expert_ids)
            return (routing.weights * factors.view_as(routing.weights)).sum() + (routing.probabilities * columns).sum()

        assert_gradients(function, {"logits": logits})

    def test_both_precisions(self, make, device):
        """Logits in float32, which kernels serve, and in half precision, which is widened, agree with float64."""
        logits = self.logits(device, torch.float16)
        wide = make(logits.double())
        narrow, half = make(logits.float()), make(logits)
        assert torch.equal(narrow.expert_ids, wide.expert_ids) and torch.equal(half.expert_ids, wide.expert_ids)
        assert narrow.weights.dtype == torch.float32 and wide.weights.dtype == torch.float64
        assert_near(narrow.weights, wide.weights)
        assert torch.equal(half.weights, narrow.weights)

    def test_masked_experts(self, make, device):
        """An expert at −inf adds nothing and gets no gradient; neither does a token whose experts are all masked."""
        for dtype in (torch.float32, torch.float64):
            logits = self.logits(device, dtype)
            logits[:, 1] = -torch.inf
            logits[3] = -torch.inf
            logits.requires_grad_()
            routing = make(logits)
            weights = routing.weights
            assert bool((weights[routing.expert_ids == 1] == 0).all()) and bool((weights[3] == 0).all())
            assert bool(weights.isfinite().all()) and bool((weights >= 0).all()) and bool(weights.any())
            (gradient,) = torch.autograd.grad(weights.square().sum() + routing.probabilities.square().sum(), logits)
            assert bool(gradient.isfinite().all()) and bool((gradient[:, 1] == 0).all()) and not gradient[3].any()
            if self.alone:
                rest = [t for t in range(T) if t != 3]
                other = make(logits.detach()[rest])
                assert torch.equal(other.weights, weights[rest])
                assert torch.equal(other.expert_ids, routing.expert_ids[rest])

    def test_no_numbers(self, make, device):
        """NaN and +inf are errors if values may be read; else ids stay in range."""
        for value in (torch.nan, torch.inf):
            for dtype in (torch.float32, torch.float64):
                logits = self.logits(device, dtype)
                logits[2, 3] = value
                if device == "cpu":
                    with pytest.raises(ValueError, match=rf"logits must hold neither NaN nor \+inf .* got {value}"):
                        make(logits)
                else:
                    routing = make(logits)
                    assert bool((routing.expert_ids >= 0).all()) and bool(routing.weights.isfinite().all())

    def test_shapes(self, make, device):
        routing = make(self.logits(device, shape=(2, 3, E)))
        assert routing.num_tokens == 6 and routing.num_experts == E
        assert make(self.logits(device, shape=(0, E))).num_tokens == 0
        with pytest.raises(TypeError, match=r"logits must be floating point, got torch\.int64"):
            make(torch.zeros(2, E, dtype=torch.int64, device=device))


class RouterContract(Contract):
    """The contract of routers; a case makes one from ``num_experts``, ``hidden_size``, ``device`` and ``dtype``."""

    def route(self, router, num_tokens, device, dtype=torch.float32, seed=0):
        x = hidden_states(num_tokens, H, device=device, dtype=dtype, seed=seed)
        return router(x, token_ids=token_ids(num_tokens, device))

    def test_routing(self, make, device):
        router = make(num_experts=E, hidden_size=H, device=device, dtype=torch.float32)
        routing = self.route(router, T, device)
        ids, weights = routing.expert_ids, routing.weights
        assert isinstance(routing, Routing) and routing.num_experts == router.num_experts == E
        assert ids.shape == weights.shape == (T, routing.top_k) and routing.top_k <= router.top_k
        assert ids.dtype in (torch.int32, torch.int64) and bool((ids >= 0).all())
        assert weights.dtype == torch.float32 and bool(weights.isfinite().all())
        assert bool((weights[ids >= E] == 0).all())
        assert int(routing.counts.sum()) == int((ids < E).sum())
        if routing.max_rows is not None:
            assert int((ids < E).sum()) <= routing.max_rows

    def test_probabilities(self, make, device):
        routing = self.route(make(num_experts=E, hidden_size=H, device=device, dtype=torch.float32), T, device)
        if routing.logits is not None:
            assert routing.logits.shape == (T, E)
        if routing.has_probabilities:
            assert routing.probabilities.shape == (T, E)
            assert_near(routing.probabilities.sum(1), torch.ones(T, device=device))
            assert bool(gossamer.nn.load_balance_loss(routing).isfinite())
        else:
            with pytest.raises(ValueError, match="needs the router's probabilities"):
                gossamer.nn.load_balance_loss(routing)

    def test_leading_sizes(self, make, device):
        router = make(num_experts=E, hidden_size=H, device=device, dtype=torch.float32)
        x, ids = hidden_states(3, 4, H, device=device), token_ids(12, device)
        left, right = router(x, token_ids=ids.view(3, 4)), router(x.view(12, H), token_ids=ids)
        assert torch.equal(left.expert_ids, right.expert_ids) and torch.equal(left.weights, right.weights)

    def test_gradients(self, make, device):
        """Gradients of weights and of probabilities of chosen experts, for the hidden states and every parameter."""
        router = make(num_experts=E, hidden_size=H, device=device, dtype=torch.float64)
        ids = token_ids(T, device)
        x = hidden_states(T, H, device=device, dtype=torch.float64)
        plain = router(x, token_ids=ids)
        inputs = {"x": x} | parameters(router, self.detached)
        factors = torch.linspace(-1, 1, plain.weights.numel(), device=device).view_as(plain.weights)
        columns = torch.linspace(-1, 1, E, device=device, dtype=torch.float64)

        def call(forward, x):
            routing = forward(x, token_ids=ids)
            assert torch.equal(routing.expert_ids, plain.expert_ids)
            total = (routing.weights * factors).sum()
            return total + (routing.probabilities * columns).sum() if routing.has_probabilities else total

        function = functional(router, call)
        if function(**{k: v.requires_grad_() for k, v in inputs.items()}).requires_grad:
            assert_gradients(function, {k: v.detach() for k, v in inputs.items()})
        else:
            assert list(inputs) == ["x"], "parameters that no gradient reaches"

    def test_same_bits_twice(self, make, device):
        router = make(num_experts=E, hidden_size=H, device=device, dtype=torch.float32)
        left, right = (self.route(router, T, device) for _ in range(2))
        assert torch.equal(left.expert_ids, right.expert_ids) and torch.equal(left.weights, right.weights)

    def test_state_dict(self, make, device):
        first = make(num_experts=E, hidden_size=H, device=device, dtype=torch.float32)
        second = copy.deepcopy(first)
        with torch.no_grad():
            for parameter in second.parameters():
                parameter.zero_()
        second.load_state_dict(first.state_dict())
        left, right = self.route(first, T, device), self.route(second, T, device)
        assert torch.equal(left.expert_ids, right.expert_ids) and torch.equal(left.weights, right.weights)

    def test_compiles(self, make, device):
        router = make(num_experts=E, hidden_size=H, device=device, dtype=torch.float32)
        # Routers share a forward function, and torch limits how many of them it compiles it for.
        torch._dynamo.reset()
        compiled = torch.compile(router, fullgraph=True, backend="aot_eager")
        left, right = self.route(compiled, T, device), self.route(router, T, device)
        assert torch.equal(left.expert_ids, right.expert_ids)
        assert_near(left.weights, right.weights)
        if left.weights.requires_grad:
            found, expected = (
                torch.autograd.grad(r.weights.square().sum(), list(router.parameters()), allow_unused=True)
                for r in (left, right)
            )
            for a, b in zip(found, expected, strict=True):
                assert (a is None) == (b is None)
                if a is not None:
                    assert_near(a, b)

    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    def test_dtypes(self, make, device, dtype):
        """Hidden states and parameters in 16 bits give weights in float32."""
        router = make(num_experts=E, hidden_size=H, device=device, dtype=dtype)
        routing = self.route(router, T, device, dtype)
        assert routing.weights.dtype == torch.float32 and bool(routing.weights.isfinite().all())

    @pytest.mark.parametrize("num_tokens", [0, 1])
    def test_few_tokens(self, make, device, num_tokens):
        routing = self.route(make(num_experts=E, hidden_size=H, device=device, dtype=torch.float32), num_tokens, device)
        assert routing.num_tokens == num_tokens and int(routing.counts.sum()) <= num_tokens * routing.top_k

    def test_one_expert(self, make, device):
        routing = self.route(make(num_experts=1, hidden_size=H, device=device, dtype=torch.float32), T, device)
        assert routing.top_k == 1 and int(routing.counts[0]) == int((routing.expert_ids == 0).sum())

    def test_inside_the_layer(self, make, device):
        """nn.MoE over the router computes the weighted sum of its experts."""
        router = make(num_experts=E, hidden_size=H, device=device, dtype=torch.float64)
        moe = MoE(H, 16, router=router, device=device, dtype=torch.float64)
        x, ids = hidden_states(T, H, device=device, dtype=torch.float64), token_ids(T, device)
        y, routing = moe(x, token_ids=ids, return_routing=True)
        expected = sum_of_slots(moe.experts, x, routing.expert_ids, routing.weights.double())
        if routing.residual is not None:
            expected = expected + routing.residual.double().unsqueeze(1) * x
        assert_near(y, expected)
