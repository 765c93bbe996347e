"""The delta rule's Triton kernels by themselves: against the recurrence in float64, as near as plain torch."""

import math

import pytest
import torch
from helpers import check_draws

from gossamer.ops import _delta_rule_reference as plain
from gossamer.ops._delta_rule_reference import DeltaRule

kernels = pytest.importorskip("gossamer.triton_kernels.delta_rule")

GATES = ["plain", "head", "channel"]
DIFFERENTIABLE = ("q", "k", "v", "beta", "g", "a_log", "dt_bias", "initial_state")


def draw(
    gate,
    t,
    device,
    dtype=torch.float32,
    b=1,
    key_heads=1,
    heads=2,
    key_size=9,
    value_size=7,
    raw=False,
    seed=0,
    **options,
):
    """A record of random arguments, with hard resets among the decays and tokens that write nothing."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape, of=dtype):
        return torch.randn(*shape, generator=generator).to(device, of)

    k = torch.randn(b, t, key_heads, key_size, generator=generator)
    k = (k / k.norm(dim=-1, keepdim=True).clamp_min(1e-3)).to(device, dtype)
    beta = randn(b, t, heads).sigmoid() * 2
    beta[:, t // 3] = 0
    g = a_log = dt_bias = None
    if gate != "plain":
        shape = (b, t, heads) if gate == "head" else (b, t, heads, key_size)
        g = randn(*shape, of=torch.float32)
        if raw:
            a_log, dt_bias = randn(heads, of=torch.float32), randn(*shape[2:], of=torch.float32)
        else:
            g = -(g - 1).exp()
            g[:, t // 2, 0] = -math.inf
    sequences = b if options.get("cu_seqlens") is None else len(options["cu_seqlens"]) - 1
    state = randn(sequences, heads, key_size, value_size, of=torch.float32)
    given = {"cu_seqlens": None, "lower_bound": None, "use_qk_l2norm": False} | options
    q, v = randn(b, t, key_heads, key_size), randn(b, t, heads, value_size)
    return DeltaRule(q, k, v, beta, g, a_log, dt_bias, state, scale=0.3, output_final_state=True, **given)


def widened(args):
    """The same record in float64."""
    return DeltaRule(*(x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args))


def differentiated(compute, args, do, dstate):
    """Output, final state and gradients of plain torch by name."""
    leaves = {n: getattr(args, n).detach().requires_grad_() for n in DIFFERENTIABLE if getattr(args, n) is not None}
    o, state = compute(args._replace(**leaves))
    found = torch.autograd.grad((o, state), list(leaves.values()), (do.to(o.dtype), dstate.to(state.dtype)))
    return {"o": o.detach(), "state": state.detach()} | dict(zip(leaves, found, strict=True))


def check(*arguments, **options):
    """Hold outputs and gradients of the kernels against float64 by the error rule; returns a record and them."""

    def problem(seed):
        args = draw(*arguments, **options, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        above = (torch.randn(x.shape, generator=generator).to(x) for x in (args.v, args.initial_state))
        return args, *above

    def expected(seed):
        args, *above = problem(seed)
        return differentiated(plain.recurrent, widened(args), *above), differentiated(plain.chunked, args, *above)

    def ours(seed):
        args, *above = problem(seed)
        o, state = kernels.run_forward(args)
        return {"o": o, "state": state} | kernels.run_backward(args, *above)._asdict()

    args, found = problem(0)[0], ours(0)
    present = {name for name, value in found.items() if value is not None}
    assert present == {name for name in (*DIFFERENTIABLE, "o", "state") if getattr(args, name, found) is not None}
    check_draws({name: found[name] for name in present}, expected, ours)
    return args, found


@pytest.mark.parametrize("gate", GATES)
def test_chunks(device, gate):
    """Two chunks, the second not whole; where beta or a decay is zero, and grouped heads of odd sizes."""
    args, ours = check(gate, 75, device)
    if gate != "plain":
        assert not ours["g"][args.g == -math.inf].any()


@pytest.mark.parametrize("gate", GATES)
def test_half_precision_and_norms(device, gate):
    check(gate, 21, device, torch.float16, use_qk_l2norm=True)


@pytest.mark.parametrize("gate", GATES)
def test_packed_sequences(device, gate):
    """Empty sequences, one of a token, and ones that end within and at a chunk; each from its own state."""
    bounds = torch.tensor([0, 0, 1, 65, 65, 70], dtype=torch.int32, device=device)
    check(gate, 70, device, heads=1, key_size=5, value_size=3, cu_seqlens=bounds)


@pytest.mark.parametrize("lower_bound", [None, -5.0])
@pytest.mark.parametrize("gate", ["head", "channel"])
def test_gates_of_the_models(device, gate, lower_bound):
    check(gate, 18, device, raw=True, lower_bound=lower_bound)


def test_wide_heads_and_several_sequences(device):
    """More channels than a tile has, of keys and of values."""
    check("channel", 19, device, b=2, heads=1, key_size=40, value_size=35)


@pytest.mark.parametrize("gate", GATES)
def test_steps(device, gate):
    """Tokens one by one, with the state changed in place."""

    def problem(seed):
        return draw(gate, 3, device, b=2, key_heads=2, heads=4, value_size=35, use_qk_l2norm=True, seed=seed)

    def expected(seed):
        args = problem(seed)
        results = (plain.recurrent(args) for args in (widened(args), args))
        return tuple(dict(zip(("o", "state"), found, strict=True)) for found in results)

    def stepped(seed):
        args, outputs = problem(seed), []
        state = args.initial_state.clone()
        for t in range(3):
            token = [None if x is None else x[:, t : t + 1] for x in args[:5]]
            step = args._replace(**dict(zip(("q", "k", "v", "beta", "g"), token, strict=True)), initial_state=state)
            outputs.append(kernels.delta_rule_step(step))
        return {"o": torch.cat(outputs, 1), "state": state}

    check_draws(stepped(0), expected, stepped)


def test_no_tokens(device):
    """No token leaves the state as it is, and passes its gradient through."""
    args = draw("head", 6, device)
    args = args._replace(**{name: getattr(args, name)[:, :0] for name in ("q", "k", "v", "beta", "g")})
    o, state = kernels.run_forward(args)
    assert o.shape == args.v.shape and torch.equal(state, args.initial_state)
    found = kernels.run_backward(args, o, 2 * state)
    assert torch.equal(found.initial_state, 2 * state) and found.q.shape == args.q.shape
