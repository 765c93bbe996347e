"""Contract suites: tests that every implementation of a role must pass.

One line in an implementation's own test file, with a name that begins with ``Test``, applies the whole suite::

    TestMyRouter = RouterContract.over(name=lambda num_experts, hidden_size, **factory: MyRouter(...))
"""

import copy
import functools
import inspect
import re

import pytest
import torch
from helpers import check
from torch import nn

import gossamer
from gossamer.nn import MoE, Routing
from gossamer.testing import errors

H, T, E = 32, 13, 5
FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def assert_near(found, expected, slack=256):
    """Assert that two computations of a quantity differ only by rounding, relative to its root mean square."""
    assert found.shape == expected.shape
    if expected.numel():
        bound = slack * max(torch.finfo(t.dtype).eps for t in (found, expected))
        assert max(errors(found, expected.double())) <= bound


def differences(function, inputs, step=1e-6):
    """Derivatives of a scalar function in random directions of its float64 inputs: (name, exact, by differences)."""
    leaves = {name: value.detach().requires_grad_() for name, value in inputs.items()}
    exact = torch.autograd.grad(function(**leaves), list(leaves.values()))
    for index, (name, value) in enumerate(inputs.items()):
        direction = torch.randn(value.shape, generator=torch.Generator().manual_seed(index), dtype=torch.float64)
        direction = direction.to(value.device)
        with torch.no_grad():
            high, low = (function(**inputs | {name: value + s * step * direction}) for s in (1, -1))
        yield name, float((exact[index] * direction).sum()), float(high - low) / (2 * step)


def assert_gradients(function, inputs):
    """Assert that the derivatives agree with central differences, to the precision that these have."""
    for name, exact, difference in differences(function, inputs):
        assert exact == pytest.approx(difference, rel=1e-6, abs=1e-8), name


def functional(module, call):
    """``call(forward, **inputs)`` with the module's parameters among the inputs, named after ``parameter:``."""

    def function(**tensors):
        own = {k.removeprefix("parameter:"): v for k, v in tensors.items() if k.startswith("parameter:")}
        rest = {k: v for k, v in tensors.items() if not k.startswith("parameter:")}
        return call(lambda *args, **kw: torch.func.functional_call(module, own, args, kw), **rest)

    return function


def parameters(module, detached=()):
    """The trainable parameters, named as :func:`functional` takes them, without those that match ``detached``."""
    return {
        f"parameter:{name}": p.detach().clone()
        for name, p in module.named_parameters()
        if p.requires_grad and not any(part in name for part in detached)
    }


class Contract:
    """The base of the suites.

    ``make`` is in each test one of ``cases``. ``detached`` lists parts of the names of parameters from which the method
    deliberately withholds some gradient, so that differences do not apply to them.
    """

    cases = None
    detached = ()

    @classmethod
    def over(cls, cases=None, *, detached=(), **named):
        """The suite over ``cases``, a dictionary or keywords."""
        return type(cls.__name__, (cls,), {"cases": (cases or {}) | named, "detached": detached})

    def pytest_generate_tests(self, metafunc):
        if "make" in metafunc.fixturenames:
            metafunc.parametrize("make", list(self.cases.values()), ids=list(self.cases))


def token_ids(num_tokens, device):
    """Token ids below 20, all of which a case's router must know."""
    return torch.randint(0, 20, (num_tokens,), generator=torch.Generator().manual_seed(3)).to(device)


def hidden_states(*shape, device, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


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
            with pytest.raises(ValueError, match="routing must have"):
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


def sum_of_slots(experts, x, expert_ids, weights):
    """The sum over k of the layer's output for slot k alone, without tokens that have no expert in that slot."""
    total = torch.zeros_like(x)
    for k in range(expert_ids.shape[1]):
        (tokens,) = (expert_ids[:, k] < experts.num_experts).nonzero(as_tuple=True)
        if len(tokens):
            total = total.index_add(
                0, tokens, experts(x[tokens], expert_ids[tokens, k : k + 1], weights[tokens, k : k + 1])
            )
    return total


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
        """One row per token in the shape of x: the weighted sum of its experts' outputs, or zeros without any."""
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


def bag_lists(num_embeddings, device):
    """Ids, offsets without the last one, and the bag of each id: empty bags, one id twice in a bag, one in two bags."""
    generator = torch.Generator().manual_seed(6)
    ids = torch.randint(0, num_embeddings, (12,), generator=generator)
    ids[1] = ids[0]
    ids[7] = ids[0]
    offsets = torch.tensor([0, 0, 3, 3, 9, 12])
    bags = torch.repeat_interleave(torch.arange(6), torch.tensor([0, 3, 0, 6, 3, 0]))
    return ids.to(device), offsets.to(device), bags.to(device)


class TableContract(Contract):
    """The contract of tables; a case makes one from ``num_embeddings``, ``embedding_dim``, ``device`` and ``dtype``.

    A case's table knows all ids below ``num_embeddings``, pools sums or means, and takes ``optimizer`` too.
    ``both_widths`` says whether it takes ids of both 32 and 64 bits; ``computed`` says whether vectors come from
    products, whose last bits depend on how many are computed at once.
    """

    N, D = 30, 8
    both_widths = True
    computed = False

    def assert_same(self, found, expected):
        if self.computed:
            assert_near(found, expected.double())
        else:
            assert torch.equal(found, expected)

    def make(self, make, device, dtype=torch.float32, n=None, **options):
        return make(num_embeddings=n or self.N, embedding_dim=self.D, device=device, dtype=dtype, **options)

    def test_lookup(self, make, device):
        """The vector of an id is the same whatever the shape of the ids and whatever else is looked up."""
        table = self.make(make, device)
        ids = torch.randint(0, self.N, (3, 4), generator=torch.Generator().manual_seed(1)).to(device)
        rows = table.lookup(ids)
        assert rows.shape == (3, 4, self.D) and rows.dtype == torch.float32
        for index in ((0, 0), (2, 3)):
            self.assert_same(rows[index], table.lookup(ids[index].reshape(1))[0])
        if self.both_widths:
            assert torch.equal(table.lookup(ids.int()), rows)
        assert table.lookup(ids[:0]).shape == (0, 4, self.D)
        assert table.embedding_dim == self.D

    def test_bags(self, make, device):
        """Pooled vectors by offsets and by rows of ids; empty bags are zero."""
        table = self.make(make, device)
        ids, offsets, bags = bag_lists(self.N, device)
        rows = table.lookup(ids).detach().double()
        sums = torch.zeros(6, self.D, dtype=torch.float64, device=device).index_add(0, bags, rows)
        if getattr(table, "mode", "sum") == "mean":
            sums = sums / bags.bincount(minlength=6).clamp(min=1).unsqueeze(1)
        pooled = self.pooled(table, ids, offsets)
        assert_near(pooled, sums)
        assert not pooled[[0, 2, 5]].any()
        fixed = self.pooled(table, ids.view(4, 3))
        ends = torch.arange(0, 12, 3, device=device)
        assert_near(fixed, self.pooled(table, ids, ends).double())
        assert self.pooled(table, ids[:0], offsets[:0]).shape == (0, self.D)

    def pooled(self, table, ids, offsets=None, weights=None, through=None):
        """The bags of a table, or of a function of it, by offsets without the last one."""
        if offsets is not None and getattr(table, "include_last_offset", False):
            offsets = torch.cat([offsets, offsets.new_full((1,), ids.shape[0])])
        return (table if through is None else through)(ids, offsets, weights)

    def test_weighted_bags(self, make, device):
        table = self.make(make, device)
        if getattr(table, "mode", "sum") != "sum":
            return
        ids, offsets, bags = bag_lists(self.N, device)
        weights = torch.linspace(-1, 1, 12, device=device)
        rows = table.lookup(ids).detach().double() * weights.double().unsqueeze(1)
        sums = torch.zeros(6, self.D, dtype=torch.float64, device=device).index_add(0, bags, rows)
        assert_near(self.pooled(table, ids, offsets, weights), sums)

    def test_shapes_are_refused_by_name(self, make, device):
        """Errors use the names of the layer's arguments, not those of the primitives behind it."""
        table = self.make(make, device)
        ids, offsets, _ = bag_lists(self.N, device)
        name = next(iter(inspect.signature(table.forward).parameters))
        with pytest.raises(ValueError, match=rf"\b{name}\b .*(shape|1D or 2D)"):
            table(ids.view(2, 2, 3))
        with pytest.raises(ValueError, match=rf"weights must have .*shape .*{name}"):
            table(ids, offsets, torch.ones(5, device=device))

    def test_same_bits_twice(self, make, device):
        table = self.make(make, device)
        ids, offsets, _ = bag_lists(self.N, device)
        assert torch.equal(self.pooled(table, ids, offsets), self.pooled(table, ids, offsets))

    def test_one_row(self, make, device):
        table = self.make(make, device, n=1)
        rows = table.lookup(torch.zeros(5, dtype=torch.int64, device=device))
        self.assert_same(rows, rows[:1].expand(5, -1))

    def test_bytes(self, make, device):
        """Bytes for training include the optimizer's state; after freezing, the bytes held are those promised."""
        table = self.make(make, device, optimizer=gossamer.optim.Adam(lr=0.1))
        plain = self.make(make, device)
        assert table.nbytes() > plain.inference_nbytes() == table.inference_nbytes() > 0
        ids = torch.arange(self.N, device=device)
        with torch.no_grad():
            before = table.eval().lookup(ids)
        assert table.freeze() is table
        assert table.nbytes() == table.inference_nbytes() == plain.inference_nbytes()
        assert table.frozen and not table.training
        assert torch.equal(table.lookup(ids), before)
        with pytest.raises(ValueError, match="optimizer must be None for a frozen table"):
            table.optimizer = gossamer.optim.Adam(lr=0.1)

    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    def test_dtypes(self, make, device, dtype):
        table = self.make(make, device, dtype)
        rows = table.lookup(torch.arange(self.N, device=device))
        assert rows.dtype == dtype and bool(rows.isfinite().all())

    def test_state_dict(self, make, device):
        first = self.make(make, device, optimizer=gossamer.optim.Adam(lr=0.1))
        ids = torch.arange(self.N, device=device)
        first.lookup(ids).square().sum().backward()
        second = self.make(make, device, optimizer=gossamer.optim.Adam(lr=0.1))
        second.load_state_dict(first.state_dict())
        for table in (first, second):
            table.lookup(ids).square().sum().backward()
        assert torch.equal(first.lookup(ids), second.lookup(ids))
        # The state of a frozen table loads into another frozen one.
        served = self.make(make, device).freeze()
        served.load_state_dict(first.freeze().state_dict())
        assert torch.equal(served.lookup(ids), first.lookup(ids))


class TrainedTableContract(TableContract):
    """The additional contract of tables that are parameters: gradients, fused steps, compilation, a budget.

    A case whose ``from_budget`` needs arguments other than the sizes supplies them by an attribute ``from_budget``.
    ``any_ids`` says whether the table takes all ids of 64 bits.
    """

    any_ids = False

    def test_gradients(self, make, device):
        table = self.make(make, device, torch.float64)
        ids, offsets, _ = bag_lists(self.N, device)
        factors = hidden_states(6, self.D, device=device, dtype=torch.float64, seed=8)

        def call(forward):
            return (self.pooled(table, ids, offsets, through=forward) * factors).sum()

        inputs = parameters(table, self.detached)
        assert inputs
        assert_gradients(functional(table, call), inputs)

    def test_fused_step(self, make, device):
        """A backward pass moves the tables by a step of plain gradient descent, and leaves them without a gradient.

        Other parameters, such as projections, get the same gradient as with a plain table.
        """
        plain = self.make(make, device)
        fused = self.make(make, device, optimizer=gossamer.optim.SGD(lr=0.5))
        with torch.no_grad():
            for name, parameter in plain.named_parameters():
                fused.get_parameter(name).copy_(parameter)
        ids, offsets, _ = bag_lists(self.N, device)
        factors = hidden_states(6, self.D, device=device, seed=8)
        for table in (plain, fused):
            (self.pooled(table, ids, offsets) * factors).sum().backward()
        for name, parameter in plain.named_parameters():
            moved = fused.get_parameter(name)
            if name not in fused.tables:
                assert_near(moved.grad, parameter.grad)
                continue
            assert moved.grad is None and not moved.requires_grad
            assert_near(moved, parameter - 0.5 * parameter.grad)
            assert not torch.equal(moved, parameter)

    def test_compiles(self, make, device):
        table = self.make(make, device)
        ids, offsets, _ = bag_lists(self.N, device)
        # Tables share a forward function, and torch limits how many of them it compiles it for.
        torch._dynamo.reset()
        compiled = torch.compile(table, fullgraph=True, backend="aot_eager")
        assert torch.equal(self.pooled(table, ids, offsets, through=compiled), self.pooled(table, ids, offsets))

    def test_ids_outside(self, make, device):
        table = self.make(make, device)
        if self.any_ids:
            ids = torch.tensor([-1, -(2**63), 2**63 - 1, self.N], device=device)
            assert bool(table.lookup(ids).isfinite().all())
        elif device == "cpu":
            for bad in (-1, self.N):
                with pytest.raises(IndexError):
                    table.lookup(torch.tensor([0, bad]))

    def test_budget(self, make, device):
        """The smallest size that an error names is accepted, a byte less is refused, and tables fit their budgets."""
        table = self.make(make, device)
        from_budget = functools.partial(getattr(make, "from_budget", type(table).from_budget), self.N, self.D)
        with pytest.raises(ValueError, match=r"nbytes must be at least \d+ for .*, got 1$") as refused:
            from_budget(1, device=device)
        smallest = int(re.search(r"at least (\d+)", str(refused.value))[1])
        with pytest.raises(ValueError, match=f"nbytes must be at least {smallest} for .*, got {smallest - 1}"):
            from_budget(smallest - 1, device=device)
        for nbytes in (smallest, max(smallest, table.inference_nbytes())):
            made = from_budget(nbytes, device=device)
            assert made.inference_nbytes() <= nbytes
            assert made.lookup(torch.arange(self.N, device=device)).shape[0] == self.N
        assert made.inference_nbytes() >= table.inference_nbytes()
        with pytest.raises(TypeError, match="nbytes must be an int, got float"):
            from_budget(0.5, device=device)
        with pytest.raises(ValueError, match="nbytes must be at least 1, got 0"):
            from_budget(0, device=device)


class ScheduleContract(Contract):
    """The contract of schedules: shares in [0, 1] that depend only on the step."""

    def test_is_a_pure_function(self, make):
        first, second = make(), make()
        forward = [first.density(step) for step in range(60)]
        assert forward[::-1] == [second.density(step) for step in range(59, -1, -1)]
        assert vars(first) == vars(make())

    def test_is_a_share(self, make):
        assert all(0 <= make().density(step) <= 1 for step in (0, 1, 39, 40, 41, 10**9))
