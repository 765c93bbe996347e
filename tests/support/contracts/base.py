"""What the suites share: the base class, sizes, derivatives by differences, and modules as functions."""

import pytest
import torch

from gossamer.testing import errors

H = 32
T = 13
E = 5
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
    """``call(forward, **inputs)`` with the module's parameters among the inputs, as ``parameter:NAME``."""

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

    Every test runs once for each of ``cases``, with the case as ``make``. ``detached`` lists parts of the names of
    parameters from which the method withholds some gradient on purpose, so that differences do not apply to them.
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
