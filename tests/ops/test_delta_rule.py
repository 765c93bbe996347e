"""The delta rule: worked values, transformers' fallback, every backend against the recurrence, and bad arguments."""

import itertools
import math

import pytest
import torch
from helpers import check, check_draws

import gossamer
from gossamer import delta_rule, delta_rule_step
from gossamer.ops import _delta_rule_reference as plain
from gossamer.ops.delta_rule import _GRADIENTS, CHECKPOINT_TOKENS, _checked
from gossamer.testing import assert_close, errors

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
    operands += [a_log, dt_bias, given.get("initial_state"), cu_seqlens]
    return compute(_checked(plain.DeltaRule(*operands, scale, lower_bound, bool(l2norm), True)))


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
            assert errors(ours, theirs)[0] < 1e-12


# b, t, key heads, heads, key size, value size: one token, odd sizes, whole chunks, several spans, wide heads.
SHAPES = [
    (2, 1, 1, 2, 16, 16),
    (2, 37, 2, 4, 9, 7),
    (1, 128, 1, 1, 128, 128),
    (1, 333, 2, 2, 33, 65),
    (1, 70, 1, 2, 256, 20),
]


@pytest.fixture
def compiled(request):
    """Leaves a test out where Triton's interpreter would take minutes: the kernels have short tests of their own."""
    backend = request.getfixturevalue("kernel_backend" if "kernel_backend" in request.fixturenames else "any_backend")
    if backend == "triton" and request.getfixturevalue("device") == "cpu":
        pytest.skip("minutes in Triton's interpreter")


def function(gate, compute=None, final=False, **options):
    """The output, or the final state, of ``compute`` or of the public function, of the operands by name."""

    def call(**given):
        if compute is not None:
            return evaluate(compute, given, **options)[final]
        return delta_rule(**given, **options, output_final_state=final)[final]

    return call


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("final", [False, True])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_recurrence(kernel_backend, dtype, device, shape, gate, final):
    """Output, final state and all gradients as near to float64 as plain torch in chunks of the same dtype.

    Chunks compute with products of keys, whose rounding the recurrence does not have. The largest of few roundings is
    chance: what misses the rule must meet it in two other draws.
    """
    options = {"final": final, "use_qk_l2norm": True}

    def judge(seed):
        given = {name: x.to(device) for name, x in draw(gate, *shape, dtype=dtype, seed=seed).items()}
        needs = [name for name in given if not (final and name == "q")]
        with gossamer.backend(kernel_backend):
            check(function(gate, **options), function(gate, plain.chunked, **options), given, needs)

    try:
        judge(0)
    except AssertionError:
        judge(1)
        judge(2)


@pytest.mark.parametrize("gate", GATES)
def test_native_gradients_by_finite_differences(gate):
    given = draw(gate, b=1, t=19, key_heads=1, heads=2, key_size=3, value_size=2, dtype=torch.float64, reset=False)
    names, values = zip(*given.items(), strict=True)
    with gossamer.backend("native"):
        assert torch.autograd.gradcheck(
            lambda *leaves: delta_rule(**dict(zip(names, leaves, strict=True)), output_final_state=True),
            [x.requires_grad_() for x in values],
        )


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("gate", ["head", "channel"])
def test_a_reset_forgets_exactly(kernel_backend, device, gate):
    """Behind g = −inf in all channels nothing is left of what came before, in values and in gradients."""
    given = {name: x.to(device) for name, x in draw(gate, b=1, t=150, reset=False).items()}
    given["g"][:, 75] = -math.inf
    other = given | {name: x.clone() for name, x in given.items()}
    for name in ("q", "k", "v", "beta"):
        other[name][:, :75] = other[name][:, :75].flip(1)
    with gossamer.backend(kernel_backend):
        (o, state), (o_other, state_other) = (delta_rule(**x, output_final_state=True) for x in (given, other))
        assert torch.equal(o[:, 75:], o_other[:, 75:]) and torch.equal(state, state_other)
        leaves = {name: x.clone().requires_grad_() for name, x in given.items()}
        o, state = delta_rule(**leaves, output_final_state=True)
        (o[:, 75:].square().sum() + state.square().sum()).backward()
    for name in ("q", "k", "v", "beta", "g"):
        gradient = leaves[name].grad
        assert not gradient[:, : 76 if name == "g" else 75].any() and gradient.isfinite().all(), name
        assert gradient[:, 76:].any(), name
    assert not leaves["initial_state"].grad.any()


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("gate", GATES)
def test_long_decays_neither_overflow_nor_vanish(kernel_backend, device, gate):
    """Decays far beyond what exp of their sums holds, and none at all, in float32."""
    given = {name: x.to(device) for name, x in draw(gate, b=1, t=200, reset=False).items()}
    if "g" in given:
        given["g"][:, :100] = -60.0
        given["g"][:, 100:] = 0.0
    with gossamer.backend(kernel_backend):
        check(function(gate), function(gate, plain.chunked), given)


@pytest.mark.parametrize("gate", GATES)
def test_bits_do_not_depend_on_threads_or_place(gate):
    """The native kernels give one result, whatever the threads, the other sequences and the place in a pack."""
    given = draw(gate, b=3, t=300, key_heads=1, heads=3, key_size=24, value_size=72, state=False)

    def results(given, **options):
        leaves = {name: x.clone().requires_grad_() for name, x in given.items()}
        with gossamer.backend("native"):
            o, state = delta_rule(**leaves, output_final_state=True, use_qk_l2norm=True, **options)
        (o.sin().sum() + state.sin().sum()).backward()
        return [o.detach(), *(x.grad for x in leaves.values())], state.detach()

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        rows, state = results(given)
        for count in (1, 2, 5, 16):
            torch.set_num_threads(count)
            again, other = results(given)
            assert all(torch.equal(a, b) for a, b in zip([*rows, state], [*again, other], strict=True)), count
    finally:
        torch.set_num_threads(threads)
    last, _ = results({name: x[2:] for name, x in given.items()})
    assert all(torch.equal(a[2:], b) for a, b in zip(rows, last, strict=True))
    pack = {name: torch.cat([x[0, :7], x[2], x[1, :90]])[None] for name, x in given.items()}
    packed, _ = results(pack, cu_seqlens=torch.tensor([0, 7, 307, 397]))
    assert all(torch.equal(a[2], b[0, 7:307]) for a, b in zip(rows, packed, strict=True))


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("gate", GATES)
def test_strided_operands_and_wanted_gradients(kernel_backend, device, gate):
    """Views of other layouts give the bits of contiguous ones; gradients that nobody wants change no others."""
    given = {name: x.to(device) for name, x in draw(gate, t=70).items()}
    strided = {
        name: x if name == "initial_state" else x.transpose(1, 2).contiguous().transpose(1, 2)
        for name, x in given.items()
    }
    every_second = torch.stack([given["v"], given["v"]], -1).flatten(-2)[..., ::2]
    with gossamer.backend(kernel_backend):
        whole = {name: x.clone().requires_grad_() for name, x in given.items()}
        o, _ = delta_rule(**whole)
        o.sin().sum().backward()
        assert torch.equal(delta_rule(**strided)[0], o) and torch.equal(
            delta_rule(**strided | {"v": every_second})[0], o
        )
        for wanted in given:
            leaves = strided | {wanted: strided[wanted].detach().requires_grad_()}
            delta_rule(**leaves)[0].sin().sum().backward()
            assert torch.equal(leaves[wanted].grad, whole[wanted].grad), wanted


@pytest.mark.parametrize("gate", GATES)
def test_nothing_to_do(kernel_backend, device, gate):
    """No token and no sequence: states pass, gradients are empty or pass."""
    given = {name: x.to(device).requires_grad_() for name, x in draw(gate, t=0).items()}
    with gossamer.backend(kernel_backend):
        o, state = delta_rule(**given, output_final_state=True)
        assert o.shape == (2, 0, 4, 7) and torch.equal(state, given["initial_state"])
        (o.sum() + (3 * state).sum()).backward()
        assert (given["initial_state"].grad == 3).all()
        o, state = delta_rule(**{name: x[:0] for name, x in draw(gate, t=5).items()}, output_final_state=True)
        assert o.shape == (0, 5, 4, 7) and state.shape == (0, 4, 9, 7)


@pytest.mark.parametrize("gate", GATES)
def test_operators_and_compiled(kernel_backend, device, gate):
    """Torch's own checks of the operators, and one graph with the bits of the eager call."""
    if kernel_backend == "triton" and device == "cpu" and gate != "head":
        pytest.skip("a minute in Triton's interpreter, and the same operators")
    given = {name: x.to(device).requires_grad_() for name, x in draw(gate, b=1, t=9, heads=2).items()}
    operands = [given.get(name) for name in ("q", "k", "v", "beta", "g")]
    args = _checked(plain.DeltaRule(*operands, None, None, given["initial_state"], None, None, None, True, True))
    flat = (*args, CHECKPOINT_TOKENS[kernel_backend], kernel_backend)
    torch.library.opcheck(torch.ops.gossamer.delta_rule.default, flat)
    with torch.no_grad():
        o, state, kept = torch.ops.gossamer.delta_rule(*flat)
    plain_args = [x.detach() if isinstance(x, torch.Tensor) else x for x in flat[:-1]]
    needs = [name for name in _GRADIENTS if getattr(args, name) is not None]
    gradients = (*plain_args, kept, torch.ones_like(o), torch.ones_like(state), needs, kernel_backend)
    torch.library.opcheck(torch.ops.gossamer.delta_rule_backward.default, gradients)
    token = [None if x is None else x[:, :1].detach() for x in operands]
    state = given["initial_state"].detach().clone()
    step = _checked(plain.DeltaRule(*token, None, None, state, None, None, None, True, False))
    torch.library.opcheck(torch.ops.gossamer.delta_rule_step.default, (*step, kernel_backend))

    def call(given):
        return delta_rule(**given, output_final_state=True, use_qk_l2norm=True)

    with gossamer.backend(kernel_backend):
        gradients = []
        for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
            o, state = function(given)
            gradients.append([o, state, *torch.autograd.grad(o.sin().sum() + state.sin().sum(), list(given.values()))])
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_every_instruction_set(isa):
    """The kernels of each give what the recurrence does."""
    for gate in GATES:
        with gossamer.backend("native"):
            check(function(gate), function(gate, plain.chunked), draw(gate, b=1, t=75, key_size=20, value_size=40))


def test_families_keep_states_where_the_operator_says():
    from gossamer import _C

    assert CHECKPOINT_TOKENS["native"] == _C.DELTA_RULE_SPAN


def test_autocast_casts_what_is_multiplied():
    given = draw("head")
    with torch.autocast("cpu", torch.bfloat16):
        o, state = delta_rule(**given, output_final_state=True)
    assert o.dtype == torch.bfloat16 and state.dtype == torch.float32
    low = {name: x.bfloat16() if name in "qkv" else x for name, x in given.items()}
    assert torch.equal(o, delta_rule(**low)[0])


@pytest.mark.parametrize("gate", GATES)
def test_forward_mode_and_transformations_use_plain_torch(gate):
    given = draw(gate, dtype=torch.float64, t=9, reset=False)
    _, tangent = torch.func.jvp(
        lambda v: delta_rule(**(given | {"v": v}))[0], (given["v"],), (torch.ones_like(given["v"]),)
    )
    ones = delta_rule(**(given | {"v": torch.ones_like(given["v"]), "initial_state": given["initial_state"] * 0}))[0]
    assert errors(tangent, ones)[0] < 1e-12


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
    options = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
    expected = theirs(*operands, initial_state=given["initial_state"], **options)
    truth = evaluate(plain.recurrent, {name: x.double() for name, x in given.items()}, use_qk_l2norm=True)
    for value, exact, want in zip(ours, truth, expected, strict=True):
        assert_close(value, exact, want)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("gate", GATES)
def test_a_pack_is_its_sequences(any_backend, device, gate, index):
    """Each sequence of a pack has the values and gradients that it has alone, empty ones keep their state."""
    bounds = [0, 0, 5, 70, 70, 400]
    given = {name: x.to(device).requires_grad_() for name, x in draw(gate, b=1, t=400, state=False).items()}
    states = torch.randn(5, 4, 9, 7, device=device, requires_grad=True)
    leaves = [*given.values(), states]
    cu_seqlens = torch.tensor(bounds, dtype=index, device=device)
    with gossamer.backend(any_backend):
        o, last = delta_rule(**given, initial_state=states, output_final_state=True, cu_seqlens=cu_seqlens)
        parts = []
        for n, (begin, end) in enumerate(itertools.pairwise(bounds)):
            part = {name: x[:, begin:end] for name, x in given.items()}
            parts.append(delta_rule(**part, initial_state=states[n : n + 1], output_final_state=True))
    alone, alone_last = torch.cat([o for o, _ in parts], 1), torch.cat([state for _, state in parts])
    weights = torch.randn_like(o), torch.randn_like(last)
    found = torch.autograd.grad((o, last), leaves, weights)
    expected = torch.autograd.grad((alone, alone_last), leaves, weights)
    for value, want in zip((o, last, *found), (alone, alone_last, *expected), strict=True):
        assert errors(value, want)[0] < 1e-6
    assert torch.equal(last[0], states[0]) and torch.equal(last[3], states[3])


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("sizes", [(9, 7), (128, 128), (40, 150)])
def test_steps_are_the_sequence(kernel_backend, dtype, device, gate, sizes):
    """Token by token the outputs and the state of the recurrence; the state's version counts."""

    def problem(seed):
        given = draw(gate, t=6, key_size=sizes[0], value_size=sizes[1], dtype=dtype, seed=seed)
        return {name: x.to(device) for name, x in given.items()}

    def expected(seed):
        given = problem(seed)
        truth = evaluate(plain.recurrent, {name: x.double() for name, x in given.items()}, use_qk_l2norm=True)
        baseline = evaluate(plain.recurrent, given, use_qk_l2norm=True)
        return tuple(dict(zip(("o", "state"), found, strict=True)) for found in (truth, baseline))

    def stepped(seed):
        given, outputs = problem(seed), []
        state = given.pop("initial_state")
        with gossamer.backend(kernel_backend):
            for t in range(6):
                version, token = state._version, {name: x[:, t] for name, x in given.items()}
                outputs.append(delta_rule_step(**token, state=state, use_qk_l2norm=True))
                assert state._version == version + 1
        return {"o": torch.stack(outputs, 1), "state": state}

    check_draws(stepped(0), expected, stepped)


@pytest.mark.parametrize("lower_bound", [None, -5.0])
@pytest.mark.parametrize("gate", ["head", "channel"])
def test_gates_of_the_models(any_backend, gate, lower_bound):
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
    if any_backend == "triton":
        pytest.skip("Triton's kernels compute in no float64")
    with gossamer.backend(any_backend):
        ours, _ = delta_rule(**given, A_log=a_log, dt_bias=dt_bias.flatten(), lower_bound=lower_bound)
    theirs, _ = evaluate(plain.recurrent, given | {"g": decay})
    weights = torch.randn_like(ours)
    found, expected = (torch.autograd.grad(o, leaves, weights) for o in (ours, theirs))
    for value, want in zip((ours, *found), (theirs, *expected), strict=True):
        assert errors(value, want)[0] < 1e-12


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
        ({"beta": torch.full((2, 37, 4), 2.5)}, ValueError, r"beta must be in \[0, 2\], got 2.5"),
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
        ({"A_log": torch.zeros(4), "lower_bound": -math.inf}, ValueError, "lower_bound must be finite, got -inf"),
        ({"A_log": torch.zeros(4), "lower_bound": [-5]}, TypeError, "lower_bound must be a number"),
        ({"use_qk_l2norm": 1.5}, TypeError, "use_qk_l2norm must be a bool, got float"),
        ({"output_final_state": None}, TypeError, "output_final_state must be a bool, got NoneType"),
        ({"v": torch.zeros(2, 37, 4, 0)}, ValueError, "heads of q and v must have at least one channel"),
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
    with pytest.raises(ValueError, match="state requires a gradient, but delta_rule_step has no derivative"):
        delta_rule_step(**token, state=state.clone().requires_grad_())
    with pytest.raises(TypeError, match="use_qk_l2norm must be a bool, got int"):
        delta_rule_step(**token, state=state, use_qk_l2norm=1)
    for stray in ({"dt_bias": torch.zeros(4)}, {"lower_bound": -1.0}):
        with pytest.raises(ValueError, match="they need A_log"):
            delta_rule_step(**token, state=state, **stray)
    with pytest.raises(ValueError, match=r"beta must be in \[0, 2\]"):
        delta_rule_step(**(token | {"beta": token["beta"] + 5}), state=state)
    assert not state.any()
