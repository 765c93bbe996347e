"""The causal convolution: every form against float64, its gradients, states, packs, both layouts, and its step."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers import OperatorLog, assert_same_bits, check, run, saved_tensors

import gossamer

# Sizes B, T, C: shorter than the taps, within a vector and past one, several groups.
SIZES = [(2, 1, 40), (2, 3, 25), (3, 9, 33), (1, 70, 20)]


def draw(b, t, c, taps, device, dtype=torch.float32, bias=True):
    inputs = {"x": torch.randn(b, t, c, device=device), "weight": torch.randn(c, taps, device=device)}
    if bias:
        inputs["bias"] = torch.randn(c, device=device)
    return {name: value.to(dtype) for name, value in inputs.items()}


def function(backend, pick=0, **options):
    """``causal_conv1d`` on a backend, of named tensors; ``pick`` is the output, or None for both as one vector."""

    def call(x, weight, bias=None, initial_state=None):
        with gossamer.backend(backend):
            outputs = gossamer.causal_conv1d(x, weight, bias, initial_state=initial_state, **options)
        return torch.cat([t.reshape(-1) for t in outputs]) if pick is None else outputs[pick]

    return call


def on_positions(x):
    """The same values with positions side by side."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def by_hand(x, weight, bias=None):
    """What torch computes of it."""
    y = F.conv1d(x.transpose(1, 2), weight.unsqueeze(1), bias, padding=weight.shape[1] - 1, groups=x.shape[2])
    return y[..., : x.shape[1]].transpose(1, 2)


@pytest.mark.parametrize("along", ["channels", "positions"])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("taps", [2, 3, 4, 5, 8])
def test_against_float64(kernel_backend, dtype, device, taps, activation, along):
    """Values and gradients in both layouts, and in float64 those of torch's own convolution."""
    sizes = SIZES if kernel_backend == "native" or taps == 4 else SIZES[1:3]
    for b, t, c in sizes:
        inputs = draw(b, t, c, taps, device, dtype, bias=t != 9)
        if along == "positions":
            inputs["x"] = on_positions(inputs["x"])
        reference = function("reference", activation=activation)
        results = check(function(kernel_backend, activation=activation), reference, inputs)
        if along == "positions" and t > 1:
            assert results["out"].stride(1) == 1
        wide = {name: value.double() for name, value in inputs.items()}
        expected = by_hand(**wide)
        torch.testing.assert_close(reference(**wide), F.silu(expected) if activation else expected)


def test_worked_values(any_backend, device):
    """Two taps by hand: y_t = w_0 x_{t-1} + w_1 x_t + b."""
    x = torch.tensor([1.0, 2.0, 4.0], device=device).view(1, 3, 1)
    weight, bias = torch.tensor([[10.0, 1.0]], device=device), torch.tensor([0.5], device=device)
    state = torch.tensor([7.0, 3.0], device=device).view(1, 1, 2)
    with gossamer.backend(any_backend):
        y, last = gossamer.causal_conv1d(x, weight, bias, initial_state=state, output_final_state=True)
        assert y.flatten().tolist() == [31.5, 12.5, 24.5] and last.flatten().tolist() == [2.0, 4.0]
        y, last = gossamer.causal_conv1d(x[:, :1], weight, bias, initial_state=state, output_final_state=True)
        assert y.flatten().tolist() == [31.5] and last.flatten().tolist() == [3.0, 1.0]
        assert gossamer.causal_conv1d(x, weight)[1] is None


@pytest.mark.parametrize("along", ["channels", "positions"])
@pytest.mark.parametrize("size", [3, 5])
@pytest.mark.parametrize("length", [0, 1, 2, 40])
def test_states_before_and_after(kernel_backend, dtype, device, length, size, along):
    """Output and final state, with gradients of both, where the state is as long as the taps need, or longer."""
    inputs = draw(2, length, 19, 4, device, dtype) | {
        "initial_state": torch.randn(2, 19, size, device=device).to(dtype)
    }
    if along == "positions":
        inputs["x"] = on_positions(inputs["x"])

    def reference(x, weight, bias, initial_state):
        inputs = torch.cat([initial_state.transpose(1, 2), x], 1)
        y = F.silu(by_hand(inputs, weight, bias)[:, size:])
        return torch.cat([y.reshape(-1), inputs[:, length:].transpose(1, 2).reshape(-1)])

    check(function(kernel_backend, None, activation="silu", output_final_state=True), reference, inputs)


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("along", ["channels", "positions"])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_packed_sequences(kernel_backend, dtype, device, index_dtype, along, with_state):
    """A pack is its sequences one by one, empty ones and ones shorter than the taps among them."""
    lengths = (0, 5, 1, 0, 2, 37, 3, 0)
    bounds = [0, *itertools.accumulate(lengths)]
    cu_seqlens = torch.tensor(bounds, dtype=index_dtype, device=device)
    inputs = draw(1, bounds[-1], 21, 4, device, dtype)
    if along == "positions":
        inputs["x"] = on_positions(inputs["x"])
    if with_state:
        inputs["initial_state"] = torch.randn(len(lengths), 21, 4, device=device).to(dtype)

    def reference(x, weight, bias, initial_state=None):
        size = 3 if initial_state is None else 4
        outputs, states = [], []
        for n, (begin, end) in enumerate(itertools.pairwise(bounds)):
            state = x.new_zeros(1, 21, size) if initial_state is None else initial_state[n : n + 1]
            whole = torch.cat([state.transpose(1, 2), x[:, begin:end]], 1)
            outputs.append(F.silu(by_hand(whole, weight, bias)[:, size:]).reshape(-1))
            states.append(whole[:, end - begin :].transpose(1, 2).reshape(-1))
        return torch.cat([*outputs, *states])

    options = {"activation": "silu", "output_final_state": True, "cu_seqlens": cu_seqlens}
    check(function(kernel_backend, None, **options), reference, inputs)


def test_packed_sequences_across_tiles(device):
    """Natively, packs whose sequences end within and at the rows that one sum of the weight's gradient is over."""
    for bounds in ([0, 256, 300, 600], [0, 255, 257, 513, 600], list(range(0, 601, 3))):
        inputs = draw(1, 600, 13, 4, device)
        cu_seqlens = torch.tensor(bounds, device=device)
        options = {"activation": "silu", "cu_seqlens": cu_seqlens}
        check(function("native", **options), function("reference", **options), inputs)


def test_float64(device):
    """As exact as float64 is, on the CPU; a GPU's kernels refuse it."""
    inputs = draw(2, 6, 3, 3, device, torch.float64) | {"initial_state": torch.randn(2, 3, 2, device=device).double()}
    if device == "cuda":
        with pytest.raises(TypeError, match="x must be float32, float16, bfloat16"):
            gossamer.causal_conv1d(**inputs)
        return
    for along in (lambda x: x, on_positions):
        leaves = [along(v).requires_grad_() if k == "x" else v.clone().requires_grad_() for k, v in inputs.items()]

        def call(x, weight, bias, initial_state):
            return gossamer.causal_conv1d(
                x, weight, bias, activation="silu", initial_state=initial_state, output_final_state=True
            )

        torch.autograd.gradcheck(call, leaves)


def test_weights_in_float32_and_autocast(kernel_backend, device):
    """Master weights of a 16-bit input; under autocast the input is cast, and gradients have their own dtypes."""
    inputs = draw(2, 11, 18, 4, device)
    half = inputs | {"x": inputs["x"].half()}
    results = run(function(kernel_backend), half, list(half), torch.randn(2, 11, 18, device=device))
    assert results["out"].dtype == torch.float16 and results["weight"].dtype == results["bias"].dtype == torch.float32
    truth = by_hand(**{name: value.double() for name, value in half.items()})
    plain = by_hand(half["x"].float(), half["weight"], half["bias"]).half()
    gossamer.testing.assert_close(results["out"], truth, plain)
    with torch.autocast(device, torch.bfloat16):
        cast = function("native" if device == "cpu" else "triton")(**inputs)
    again = function("native" if device == "cpu" else "triton")(
        inputs["x"].bfloat16(), inputs["weight"], inputs["bias"]
    )
    assert cast.dtype == torch.bfloat16 and torch.equal(cast, again)


@pytest.mark.parametrize("need", ["x", "weight", "bias", "initial_state"])
def test_gradients_one_by_one(kernel_backend, device, need):
    """The gradient of one argument alone is that of all together."""
    inputs = draw(2, 30, 17, 4, device) | {"initial_state": torch.randn(2, 17, 3, device=device)}
    dout = torch.randn(2, 30, 17, device=device)
    call = function(kernel_backend, activation="silu")
    together, alone = run(call, inputs, list(inputs), dout), run(call, inputs, [need], dout)
    assert torch.equal(together[need], alone[need])


def test_gradient_of_the_final_state_alone(kernel_backend, device):
    inputs = draw(2, 2, 7, 4, device) | {"initial_state": torch.randn(2, 7, 3, device=device)}
    call = function(kernel_backend, 1, output_final_state=True)
    results = run(call, inputs, ["x", "initial_state"], torch.arange(42.0, device=device).view(2, 7, 3))
    dout = torch.arange(42.0, device=device).view(2, 7, 3)
    assert torch.equal(results["x"], dout[..., 1:].transpose(1, 2))
    assert torch.equal(results["initial_state"], F.pad(dout[..., :1], (2, 0)))


def test_any_strides(kernel_backend, device):
    """Slices of wider rows, gaps between positions, expanded ones and strided parameters: as contiguous ones."""
    wide = torch.randn(2, 12, 40, device=device)
    weight, bias = torch.randn(4, 9, device=device).T, torch.randn(18, device=device)[::2]
    call = function(kernel_backend, activation="silu")
    for x in (
        wide[..., 3:12],
        wide[:, ::2, :9],
        wide[..., ::4][..., :9],
        wide[:1, :, :9].expand(3, -1, -1),
        wide[..., :1].expand(-1, -1, 9),
        wide.view(2, 40, 12).transpose(1, 2)[..., :9],
        wide.view(2, 40, 12).transpose(1, 2)[..., ::3][..., :9],
    ):
        state = torch.randn(5, 9, x.shape[0], device=device).permute(2, 1, 0)
        assert torch.equal(call(x, weight, bias, state), call(x.contiguous(), weight.contiguous(), bias, state))
    leaves = [wide[..., 3:12].clone().requires_grad_() for _ in range(2)]
    call(leaves[0], weight, bias).sum().backward()
    call(leaves[1], weight, bias).backward(torch.ones(2, 12, 9, device=device))
    assert torch.equal(leaves[0].grad, leaves[1].grad)


def test_empty(kernel_backend, device):
    for shape in ((0, 4, 3), (2, 0, 3), (2, 4, 0)):
        inputs = draw(*shape, 4, device)
        results = run(function(kernel_backend), inputs, list(inputs), torch.ones(shape, device=device))
        assert results["out"].shape == shape and all(results[k].shape == v.shape for k, v in inputs.items())
        if shape[2]:
            assert not results["weight"].any() and not results["bias"].any()


def test_nan_and_infinity_reach_their_taps_alone(kernel_backend, device):
    inputs = draw(1, 12, 5, 3, device)
    clean = function(kernel_backend)(**inputs)
    inputs["x"][0, 4, 2] = float("nan")
    out = function(kernel_backend)(**inputs)
    assert out.isnan().nonzero().tolist() == [[0, t, 2] for t in (4, 5, 6)]
    assert torch.equal(out[~out.isnan()], clean[~out.isnan()])


def test_large_sums(kernel_backend, device):
    """SiLU where exponentials overflow: its limits, with no NaN."""
    x = torch.tensor([-1e30, -1e4, -100.0, -88.0, 88.0, 1e4, 1e30], device=device).view(1, -1, 1).requires_grad_()
    weight = torch.tensor([[0.0, 1.0]], device=device)
    with gossamer.backend(kernel_backend):
        y, _ = gossamer.causal_conv1d(x, weight, activation="silu")
    y.sum().backward()
    wide = x.detach().double().requires_grad_()
    F.silu(wide).sum().backward()
    torch.testing.assert_close(y.double(), F.silu(wide), rtol=1e-5, atol=1e-30)
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("along", ["channels", "positions"])
def test_same_bits_whatever_the_threads(kernel_backend, device, along):
    """Run twice, with one thread, and each position and channel wherever it lies among the others."""
    t, c = (1001, 77) if kernel_backend == "native" else (40, 37)
    inputs = draw(2, t, c, 4, device)
    if along == "positions":
        inputs["x"] = on_positions(inputs["x"])
    dout = torch.randn(2, t, c, device=device)

    def once():
        return run(function(kernel_backend, activation="silu"), inputs, list(inputs), dout)

    first, threads = once(), torch.get_num_threads()
    assert_same_bits(first, once())
    try:
        torch.set_num_threads(1)
        assert_same_bits(first, once())
    finally:
        torch.set_num_threads(threads)
    call = function(kernel_backend, activation="silu")
    part = call(inputs["x"][1:, : t - 2, 3:20], inputs["weight"][3:20], inputs["bias"][3:20])
    assert torch.equal(part, first["out"][1:, : t - 2, 3:20])
    alone = call(inputs["x"][..., 4:5], inputs["weight"][4:5], inputs["bias"][4:5])
    assert torch.equal(alone, first["out"][..., 4:5])
    # Positions apart from the first W - 1, whose inputs the cut drops.
    late = call(inputs["x"][:, 5:], inputs["weight"], inputs["bias"])
    assert torch.equal(late[:, 3:], first["out"][:, 8:])


def test_every_instruction_set(isa):
    for dtype, activation in itertools.product((torch.float32, torch.bfloat16, torch.float16), (None, "silu")):
        for arrange in (lambda x: x, on_positions):
            inputs = draw(2, 21, 43, 4, "cpu", dtype)
            inputs["x"] = arrange(inputs["x"])
            options = {"activation": activation}
            check(function("native", **options), function("reference", **options), inputs)
        test_step_is_the_convolution("native", "cpu", dtype, activation, 4)


def test_second_derivative(any_backend, device):
    """What plain torch gives."""
    inputs, direction = draw(1, 7, 3, 4, device), torch.randn(1, 7, 3, device=device)

    def penalty(call):
        x, weight = inputs["x"].clone().requires_grad_(), inputs["weight"].clone().requires_grad_()
        y = call(x, weight, inputs["bias"])
        (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad((first * direction).sum(), (x, weight))

    ours = penalty(function(any_backend, activation="silu"))
    plain = penalty(lambda *args: F.silu(by_hand(*args)))
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b)


def test_keeps_its_arguments_alone(kernel_backend, device):
    inputs = draw(2, 8, 16, 4, device)
    inputs["x"].requires_grad_()
    kept = saved_tensors(lambda: function(kernel_backend, activation="silu")(**inputs), [])
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in inputs.values()}


@pytest.mark.parametrize("taps", [2, 4, 8])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_step_is_the_convolution(kernel_backend, device, dtype, activation, taps):
    """Steps give the convolution's outputs and its final state, from states of the least and of other lengths."""
    for size, channels in ((taps - 1, 70), (taps, 33), (taps + 2, 5)):
        inputs = draw(3, 6, channels, taps, device, dtype)
        start = torch.randn(3, channels, size, device=device).to(dtype)
        state, steps = start.clone(), []
        with gossamer.backend(kernel_backend):
            for x in inputs["x"].unbind(1):
                weight, bias = inputs["weight"], inputs["bias"]
                steps.append(gossamer.causal_conv1d_step(x, state, weight, bias, activation=activation))
        wide = {name: value.double() for name, value in inputs.items()}

        def reference(tensors, start):
            with gossamer.backend("reference"):
                return gossamer.causal_conv1d(
                    **tensors, initial_state=start, activation=activation, output_final_state=True
                )

        (truth, last), (plain, _) = reference(wide, start.double()), reference(inputs, start)
        gossamer.testing.assert_close(torch.stack(steps, 1), truth, plain)
        assert torch.equal(state.double(), last)


def test_step_of_strided_tensors(any_backend, device):
    """A state that is a view into a cache, and rows with gaps."""
    x, weight = torch.randn(4, 10, device=device)[::2], torch.randn(4, 10, device=device).T
    cache = torch.randn(3, 2, 6, 10, device=device)
    state = cache[1].transpose(1, 2)
    with gossamer.backend(any_backend):
        plain = state.clone(memory_format=torch.contiguous_format)
        expected = gossamer.causal_conv1d_step(x.contiguous(), plain, weight.contiguous())
        before = cache.clone()
        assert torch.equal(gossamer.causal_conv1d_step(x, state, weight), expected)
    assert torch.equal(state, plain)
    assert torch.equal(cache[[0, 2]], before[[0, 2]])
    with gossamer.backend(any_backend):
        assert gossamer.causal_conv1d_step(x[:0], state[:0], weight).shape == (0, 10)


def test_operators_are_well_formed(kernel_backend, device):
    inputs = draw(1, 9, 6, 4, device) | {"initial_state": torch.randn(2, 6, 3, device=device)}
    cu_seqlens = torch.tensor([0, 2, 9], device=device)
    for x in (inputs["x"], on_positions(inputs["x"])):
        leaves = [t.clone().requires_grad_() for t in (inputs | {"x": x}).values()]
        args = (*leaves, cu_seqlens, True, True, kernel_backend)
        torch.library.opcheck(torch.ops.gossamer.causal_conv1d.default, args)
        plain = [t.detach() for t in leaves]
        names = ["x", "weight", "bias", "initial_state"]
        back = (torch.randn(1, 9, 6, device=device), torch.randn(2, 6, 3, device=device), names, *plain)
        torch.library.opcheck(
            torch.ops.gossamer.causal_conv1d_backward.default, (*back, cu_seqlens, True, True, kernel_backend)
        )
    step = (inputs["x"][:, 0], inputs["initial_state"][:1].clone(), inputs["weight"], inputs["bias"])
    torch.library.opcheck(torch.ops.gossamer.causal_conv1d_step.default, (*step, True, kernel_backend))


def test_compiles_whole(any_backend, device):
    """Forward, backward and step in one graph each."""
    inputs = draw(2, 9, 6, 4, device)
    with gossamer.backend(any_backend):
        compiled = torch.compile(gossamer.causal_conv1d, fullgraph=True, backend="aot_eager")
        leaves = [[t.clone().requires_grad_() for t in inputs.values()] for _ in range(2)]
        outputs = [
            call(*tensors, activation="silu", output_final_state=True)
            for call, tensors in zip((compiled, gossamer.causal_conv1d), leaves, strict=True)
        ]
        for y, state in outputs:
            (y.square().sum() + state.sum()).backward()
        assert torch.equal(outputs[0][0], outputs[1][0]) and torch.equal(outputs[0][1], outputs[1][1])
        for a, b in zip(*leaves, strict=True):
            torch.testing.assert_close(a.grad, b.grad)
        states = [torch.ones(2, 6, 3, device=device) for _ in range(2)]
        step = torch.compile(gossamer.causal_conv1d_step, fullgraph=True, backend="aot_eager")
        ys = [
            call(inputs["x"][:, 0], state, inputs["weight"])
            for call, state in zip((step, gossamer.causal_conv1d_step), states, strict=True)
        ]
        assert torch.equal(*ys) and torch.equal(*states)


def test_one_operator(kernel_backend, device):
    inputs = draw(2, 9, 6, 4, device)
    with OperatorLog() as log:
        function(kernel_backend, activation="silu", output_final_state=True)(**inputs)
    assert [call[0] for call in log.calls] == ["causal_conv1d"]


def test_bad_arguments(any_backend, device):
    x, weight, bias = draw(2, 5, 6, 4, device).values()
    conv, step = gossamer.causal_conv1d, gossamer.causal_conv1d_step
    state = torch.zeros(2, 6, 3, device=device)
    bounds = torch.tensor([0, 5], device=device)
    cases = [
        (TypeError, r"x must be a torch.Tensor, got list", lambda: conv([1.0], weight)),
        (ValueError, r"x must have shape \(B, T, C\), got \(2, 5\)", lambda: conv(x[..., 0], weight)),
        (TypeError, r"x must be float32, float16, bfloat16.*int64", lambda: conv(x.long(), weight)),
        (ValueError, r"weight must have shape \(C, W\) = \(6, any\), got \(5, 4\)", lambda: conv(x, weight[:5])),
        (ValueError, r"W from 2 to 8 taps, got W=1", lambda: conv(x, weight[:, :1])),
        (ValueError, r"W from 2 to 8 taps, got W=9", lambda: conv(x, torch.zeros(6, 9, device=device))),
        (TypeError, r"weight must have the dtype of x, torch.float32, or .*float64", lambda: conv(x, weight.double())),
        (ValueError, r"bias must have shape \(C,\) = \(6\), got \(4,\)", lambda: conv(x, weight, bias[:4])),
        (TypeError, r"bias must have the dtype of weight", lambda: conv(x, weight, bias.half())),
        (ValueError, r"activation must be one of .*, got 'gelu'", lambda: conv(x, weight, activation="gelu")),
        (ValueError, r"initial_state must have shape \(B, C, S\)", lambda: conv(x, weight, initial_state=state[:1])),
        (ValueError, r"S of at least W - 1 = 3 inputs, got S=2", lambda: conv(x, weight, initial_state=state[..., 1:])),
        (TypeError, r"initial_state must have the dtype of x", lambda: conv(x, weight, initial_state=state.half())),
        (ValueError, r"batch size 1 with cu_seqlens, got B=2", lambda: conv(x, weight, cu_seqlens=bounds)),
        (TypeError, r"cu_seqlens must be int32 or int64", lambda: conv(x[:1], weight, cu_seqlens=bounds.float())),
        (ValueError, r"cu_seqlens must have shape \(N \+ 1,\)", lambda: conv(x[:1], weight, cu_seqlens=bounds[None])),
        (
            ValueError,
            r"initial_state must have shape \(N, C, S\) = \(1, 6, any\)",
            lambda: conv(x[:1], weight, initial_state=state, cu_seqlens=bounds),
        ),
        (ValueError, r"x must have shape \(B, C\), got \(2, 5, 6\)", lambda: step(x, state, weight)),
        (ValueError, r"state must have shape \(B, C, S\)", lambda: step(x[:, 0], state[:1], weight)),
        (ValueError, r"state must hold S of at least", lambda: step(x[:, 0], state[..., 1:], weight)),
        (ValueError, r"has no derivative", lambda: step(x[:, 0], state, weight.clone().requires_grad_())),
    ]
    if device == "cpu":
        for wrong in ([1, 5], [0, 4], [0, 4, 2, 5], [0, 7, 5]):
            given = torch.tensor(wrong)
            call = lambda given=given: conv(x[:1], weight, cu_seqlens=given)  # noqa: E731
            cases.append((ValueError, r"cu_seqlens must ascend from 0 to T=5, got \[", call))
    with gossamer.backend(any_backend):
        for error, message, call in cases:
            with pytest.raises(error, match=message):
                call()
