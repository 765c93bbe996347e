"""The delta rule: worked values, transformers' fallback, every backend against the recurrence, and bad arguments."""

import itertools
import math

import pytest
import torch

from gossamer import delta_rule, delta_rule_step
from gossamer.ops import _delta_rule_reference as plain
from gossamer.ops.delta_rule import _record

GATES = ["plain", "head", "channel"]


def draw(
    gate, b=2, t=37, key_heads=2, heads=4, key_size=9, value_size=7, dtype=torch.float32, seed=0, reset=True, state=True
):
    """Random arguments of delta_rule by name, with some hard resets among the decays."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, k = randn(b, t, key_heads, key_size), randn(b, t, key_heads, key_size)
    k = k / k.norm(dim=-1, keepdim=True).clamp_min(1e-3)
    beta = randn(b, t, heads).sigmoid() * 2
    given = {"q": q, "k": k, "v": randn(b, t, heads, value_size), "beta": beta}
    if gate != "plain":
        shape = (b, t, heads) if gate == "head" else (b, t, heads, key_size)
        given["g"] = -(randn(*shape) - 1).exp()
        if reset and t > 3:
            given["g"][:, t // 2, 0] = -math.inf
    if state:
        given["initial_state"] = randn(b, heads, key_size, value_size)
    wide = plain.accumulator(dtype)
    return {name: x.to(wide if name in ("g", "initial_state") else dtype) for name, x in given.items()}


def evaluate(compute, given, **options):
    """Output and final state of ``compute``, one of the forms of the reference."""
    names = ("scale", "use_qk_l2norm", "A_log", "dt_bias", "lower_bound", "cu_seqlens")
    scale, l2norm, a_log, dt_bias, lower_bound, cu_seqlens = (options.pop(name, None) for name in names)
    assert not options
    operands = [given.get(name) for name in ("q", "k", "v", "beta", "g")]
    return compute(
        _record(
            *operands, scale, given.get("initial_state"), True, cu_seqlens, bool(l2norm), a_log, dt_bias, lower_bound
        )
    )


def test_worked_values():
    """Two tokens by hand: the second key reads back its value, because β = 1 and |k| = 1."""
    k = torch.tensor([[1.0, 0.0], [0.6, 0.8]], dtype=torch.float64)[None, :, None]
    v = torch.tensor([[1.0, 2.0], [0.0, 1.0]], dtype=torch.float64)[None, :, None]
    beta = torch.tensor([0.5, 1.0], dtype=torch.float64)[None, :, None]
    for compute in (plain.recurrent, plain.chunked):
        o, state = evaluate(compute, {"q": k, "k": k, "v": v, "beta": beta}, scale=1.0)
        expected = torch.tensor([[0.32, 1.24], [-0.24, 0.32]], dtype=torch.float64)
        torch.testing.assert_close(state[0, 0], expected)
        torch.testing.assert_close(o[0, 1, 0], torch.tensor([0.0, 1.0], dtype=torch.float64))


@pytest.mark.parametrize("t", [0, 1, 16, 64, 130])
@pytest.mark.parametrize("gate", GATES)
def test_chunks_equal_the_recurrence(gate, t):
    """Values and gradients of the chunked form, resets and the initial state included, in float64."""
    results = []
    for compute in (plain.recurrent, plain.chunked):
        given = {name: x.requires_grad_() for name, x in draw(gate, t=t, dtype=torch.float64).items()}
        o, state = evaluate(compute, given, use_qk_l2norm=True)
        weights = [torch.randn(x.shape, generator=torch.Generator().manual_seed(1)) for x in (o, state)]
        ((o * weights[0]).sum() + (state * weights[1]).sum()).backward()
        results.append([o, state, *(x.grad for x in given.values())])
    for ours, theirs in zip(*results, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("gate", ["head", "channel"])
def test_recurrence_equals_the_fallback_of_transformers(gate):
    """What transformers computes without kernels, in its layout and dtype."""
    if gate == "head":
        module = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
        theirs, heads = module.torch_recurrent_gated_delta_rule, 4
    else:
        module = pytest.importorskip("transformers.models.kimi_linear.modeling_kimi_linear")
        theirs, heads = module.recurrent_kimi_delta_attention, 2
    given = draw(gate, heads=heads, key_heads=2, reset=False)
    ours = evaluate(plain.recurrent, given, use_qk_l2norm=True)
    operands = [given[name] for name in ("q", "k", "v", "g", "beta")]
    expected = theirs(
        *operands, initial_state=given["initial_state"], output_final_state=True, use_qk_l2norm_in_kernel=True
    )
    for value, want in zip(ours, expected, strict=True):
        torch.testing.assert_close(value, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gate", GATES)
def test_a_pack_is_its_sequences(gate):
    """Each sequence of a pack has the values that it has alone, empty ones keep their state."""
    bounds = [0, 0, 5, 70, 70, 77]
    given = draw(gate, b=1, t=77, state=False)
    states = torch.randn(5, 4, 9, 7)
    o, last = delta_rule(
        **given, initial_state=states, output_final_state=True, cu_seqlens=torch.tensor(bounds, dtype=torch.int32)
    )
    for n, (begin, end) in enumerate(itertools.pairwise(bounds)):
        part = {name: x[:, begin:end] for name, x in given.items()}
        alone, state = delta_rule(**part, initial_state=states[n : n + 1], output_final_state=True)
        torch.testing.assert_close(o[:, begin:end], alone)
        torch.testing.assert_close(last[n : n + 1], state)
    assert torch.equal(last[0], states[0]) and torch.equal(last[3], states[3])


@pytest.mark.parametrize("gate", GATES)
def test_steps_are_the_sequence(gate):
    given = draw(gate, t=6)
    state = given.pop("initial_state")
    o, last = delta_rule(**given, initial_state=state, output_final_state=True, use_qk_l2norm=True)
    state = state.clone()
    for t in range(6):
        token = {name: x[:, t] for name, x in given.items()}
        torch.testing.assert_close(delta_rule_step(**token, state=state, use_qk_l2norm=True), o[:, t])
    torch.testing.assert_close(state, last)


@pytest.mark.parametrize("lower_bound", [None, -5.0])
@pytest.mark.parametrize("gate", ["head", "channel"])
def test_gates_of_the_models(gate, lower_bound):
    """A_log, dt_bias and lower_bound are the formulas of the models, values and gradients."""
    given = draw(gate, dtype=torch.float64, reset=False)
    given["g"] = torch.randn_like(given["g"])
    a_log = torch.randn(4, dtype=torch.float64)
    dt_bias = torch.randn(given["g"].shape[2:], dtype=torch.float64)
    leaves = [given["g"], a_log, dt_bias]
    for leaf in leaves:
        leaf.requires_grad_()
    rate = a_log.exp() if gate == "head" else a_log.exp()[:, None]
    if lower_bound is None:
        decay = -rate * torch.nn.functional.softplus(given["g"] + dt_bias)
    else:
        decay = lower_bound * torch.sigmoid(rate * (given["g"] + dt_bias))
    ours, _ = delta_rule(**given, A_log=a_log, dt_bias=dt_bias.flatten(), lower_bound=lower_bound)
    theirs, _ = delta_rule(**(given | {"g": decay}))
    torch.testing.assert_close(ours, theirs)
    weights = torch.randn_like(ours)
    for found, expected in zip(
        torch.autograd.grad(ours, leaves, weights), torch.autograd.grad(theirs, leaves, weights), strict=True
    ):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": None}, TypeError, "q must be a torch.Tensor"),
        ({"q": torch.zeros(2, 37, 2)}, ValueError, r"q must have shape \(B, T, H_k, D_k\)"),
        ({"k": torch.zeros(2, 37, 2, 8)}, ValueError, "k must have shape"),
        ({"v": torch.zeros(2, 37, 3, 7)}, ValueError, "multiple of those of q and k, got H=3 and H_k=2"),
        ({"v": torch.zeros(2, 36, 4, 7)}, ValueError, "v must have shape"),
        ({"v": torch.zeros(2, 37, 4, 7, dtype=torch.float16)}, TypeError, "v must have the dtype of q"),
        ({"beta": torch.zeros(2, 37, 2)}, ValueError, "beta must have shape"),
        ({"beta": torch.full((2, 37, 4), 2.5)}, ValueError, r"beta must be in \[0, 2\], got values from 2.5 to 2.5"),
        ({"beta": torch.full((2, 37, 4), -0.5)}, ValueError, r"beta must be in \[0, 2\]"),
        ({"beta": torch.zeros(2, 37, 4, dtype=torch.float64)}, TypeError, "beta must have"),
        ({"g": torch.zeros(2, 37, 2)}, ValueError, "g must have shape"),
        ({"g": torch.full((2, 37, 4), 0.25)}, ValueError, "g must be at most 0, the logarithm of a decay, got 0.25"),
        ({"initial_state": torch.zeros(2, 4, 7, 9)}, ValueError, "initial_state must have shape"),
        ({"initial_state": torch.zeros(2, 4, 9, 7).half()}, TypeError, "initial_state must be torch.float32"),
        ({"cu_seqlens": torch.tensor([0, 37])}, ValueError, "batch size 1 with cu_seqlens, got B=2"),
        ({"cu_seqlens": torch.tensor([0.0, 37.0])}, TypeError, "cu_seqlens must be int32 or int64"),
        ({"dt_bias": torch.zeros(4)}, ValueError, "they need A_log"),
        ({"g": None, "A_log": torch.zeros(4)}, ValueError, "A_log needs g"),
        ({"A_log": torch.zeros(3)}, ValueError, "A_log must have one value a head, H=4"),
        ({"A_log": torch.zeros(4), "dt_bias": torch.zeros(3)}, ValueError, "dt_bias must have shape"),
        ({"A_log": torch.zeros(4), "lower_bound": 1.0}, ValueError, "lower_bound must be below 0, got 1.0"),
    ],
)
def test_bad_arguments(change, error, message):
    with pytest.raises(error, match=message):
        delta_rule(**(draw("head") | change))


@pytest.mark.parametrize("bounds", [[0, 5, 4, 9], [0, 5], [1, 9], [0, 12]])
def test_bad_packs(bounds):
    with pytest.raises(ValueError, match="cu_seqlens must ascend from 0 to T=9"):
        delta_rule(**draw("head", b=1, t=9, state=False), cu_seqlens=torch.tensor(bounds))


def test_steps_refuse_what_they_cannot_change():
    token = {name: x[:, 0] for name, x in draw("head", state=False).items()}
    state = torch.zeros(2, 4, 9, 7)
    with pytest.raises(ValueError, match="state must be contiguous"):
        delta_rule_step(**token, state=torch.zeros(2, 4, 7, 9).mT)
    with pytest.raises(ValueError, match="state must have shape"):
        delta_rule_step(**token, state=state[:1])
    with pytest.raises(ValueError, match="has no derivative"):
        delta_rule_step(**token, state=state.clone().requires_grad_())
    with pytest.raises(ValueError, match=r"beta must be in \[0, 2\]"):
        delta_rule_step(**(token | {"beta": token["beta"] + 5}), state=state)
    assert not state.any()
