"""Self-referential weight matrices against their definition."""

import pytest
import torch

import gossamer
from gossamer.ops.self_referential import SEGMENT, SelfReferential, self_referential_reference
from gossamer.testing import assert_close


@pytest.fixture(params=["reference", "native"])
def backend(request):
    if request.param == "native" and gossamer._backend.native_unavailable():
        pytest.skip(gossamer._backend.native_unavailable())
    with gossamer.backend(request.param):
        yield request.param


def draw(batch, tokens, heads, size, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    x = torch.randn(batch, tokens, heads, size, dtype=dtype)
    weight = torch.randn(heads, size, 3 * size + 4, dtype=dtype) / size**0.5
    return x, weight, torch.randn(batch, heads, size, 3 * size + 4, dtype=dtype) / size


def test_worked_values(backend):
    """Two steps by hand: identity for output and query, a swap for keys, rates of one half."""
    weight = torch.zeros(1, 2, 10, dtype=torch.float64)
    weight[0, :, 0:2] = weight[0, :, 2:4] = torch.eye(2)
    weight[0, :, 4:6] = torch.eye(2).flip(0)
    x = torch.tensor([1.0, 0.0], dtype=torch.float64).expand(1, 2, 1, 2)
    y, shift = gossamer.self_referential(x, weight, output_final_shift=True)
    expected = torch.tensor([[1.0, 0.0], [1.062141, -0.062141]], dtype=torch.float64)
    torch.testing.assert_close(y[0, :, 0], expected, rtol=0, atol=5e-7)
    last = torch.tensor([[1.117947, -0.117947], [0.340689, 0.659311]], dtype=torch.float64)
    torch.testing.assert_close((weight + shift[0])[0, :, 0:2], last, rtol=0, atol=5e-7)


@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "size"), [(2, 9, 3, 5), (1, 1, 1, 1), (1, 300, 2, 16), (0, 4, 2, 3)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_rule(backend, batch, tokens, heads, size, dtype):
    """As near to float64 as the plain computation; more tokens than a segment, odd sizes, no sequence."""
    x, weight, shift = (t.to(dtype) for t in draw(batch, tokens, heads, size))
    shift = shift.float()
    truth = self_referential_reference(
        SelfReferential(x.double(), weight.double(), shift.double(), True, False, SEGMENT)
    )
    plain = self_referential_reference(SelfReferential(x, weight, shift, True, False, SEGMENT))
    y, last = gossamer.self_referential(x, weight, shift=shift, output_final_shift=True)
    assert last.dtype == torch.float32
    if batch:
        assert_close(y, truth[0], baseline=plain[0])
        assert_close(last, truth[1], baseline=plain[1])
    again, _ = gossamer.self_referential(x, weight, shift=shift)
    assert torch.equal(y, again)


def test_gradients(backend, monkeypatch):
    """Finite differences of all three operands, through the outputs and the last shift, over several segments."""
    monkeypatch.setattr("gossamer.ops.self_referential.SEGMENT", 3)
    operands = [t.requires_grad_() for t in draw(2, 7, 2, 3, torch.float64)]
    torch.autograd.gradcheck(
        lambda x, w, s: gossamer.self_referential(x, w, shift=s, output_final_shift=True), operands
    )
    torch.autograd.gradcheck(lambda x, w: gossamer.self_referential(x, w)[0], operands[:2])


def test_long_sequences_do_not_drift():
    """Gradients over 4096 tokens, whose steps are undone in float32, stay as near to float64 as the plain ones do."""
    if gossamer._backend.native_unavailable():
        pytest.skip(gossamer._backend.native_unavailable())
    x, weight, _ = draw(1, 4096, 1, 4)
    dy = torch.randn_like(x)

    def gradients(dtype, backend):
        leaves = [t.to(dtype).requires_grad_() for t in (x, weight)]
        with gossamer.backend(backend):
            y, _ = gossamer.self_referential(*leaves)
        return torch.autograd.grad(y, leaves, dy.to(dtype))

    truth, plain, ours = (
        gradients(torch.float64, "native"),
        gradients(torch.float32, "reference"),
        gradients(torch.float32, "native"),
    )
    for name, a, t, b in zip(("x", "weight"), ours, truth, plain, strict=True):
        assert_close(a, t, baseline=b, name=name)


def test_parts_of_a_sequence(backend):
    """A sequence in two calls, the second going on from the shift of the first, is the whole one."""
    x, weight, _ = draw(2, 8, 2, 4, torch.float64)
    whole, last = gossamer.self_referential(x, weight, output_final_shift=True)
    first, shift = gossamer.self_referential(x[:, :3], weight, output_final_shift=True)
    second, end = gossamer.self_referential(x[:, 3:], weight, shift=shift, output_final_shift=True)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    torch.testing.assert_close(end, last)
    zero, nothing = gossamer.self_referential(x[:, :0], weight, output_final_shift=True)
    assert zero.shape == (2, 0, 2, 4) and not nothing.any()


def test_batch_place_and_threads_do_not_show():
    """A sequence has the same bits alone, in another place, and with one thread."""
    x, weight, _ = draw(4, 12, 3, 6)
    y, _ = gossamer.self_referential(x, weight)
    assert torch.equal(gossamer.self_referential(x[2:3], weight)[0], y[2:3])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(gossamer.self_referential(x, weight)[0], y)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512", "avx512_bf16"])
def test_every_instruction_set(isa):
    """Each instruction set's kernels, where they are compiled and this processor runs them."""
    if gossamer._backend.native_unavailable():
        pytest.skip(gossamer._backend.native_unavailable())
    from gossamer import _C

    try:
        _C.choose_isa(isa)
    except ValueError as error:
        pytest.skip(str(error))
    try:
        x, weight, shift = draw(1, 20, 2, 7)
        leaves = [t.requires_grad_() for t in (x, weight, shift)]
        y, last = gossamer.self_referential(leaves[0], leaves[1], shift=leaves[2], output_final_shift=True)
        ours = [y, last, *torch.autograd.grad([y, last], leaves, [torch.ones_like(y), torch.ones_like(last)])]

        def plain(dtype):
            args = [t.detach().to(dtype).requires_grad_() for t in leaves]
            y, last = self_referential_reference(SelfReferential(*args, True, False, SEGMENT))
            return [y, last, *torch.autograd.grad([y, last], args, [torch.ones_like(y), torch.ones_like(last)])]

        for actual, truth, baseline in zip(ours, plain(torch.float64), plain(torch.float32), strict=True):
            assert_close(actual, truth, baseline=baseline)
    finally:
        _C.choose_isa("")


def test_compiled_and_checked():
    """Compiled whole, and the operator's schema, fake kernel and autograd agree."""
    if gossamer._backend.native_unavailable():
        pytest.skip(gossamer._backend.native_unavailable())
    x, weight, shift = draw(1, 5, 2, 3)
    weight.requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, w: gossamer.self_referential(x, w, output_final_shift=True), fullgraph=True, backend="aot_eager"
    )
    for a, b in zip(compiled(x, weight), gossamer.self_referential(x, weight, output_final_shift=True), strict=True):
        assert torch.equal(a, b)
    torch.library.opcheck(
        torch.ops.gossamer.self_referential.default, (x, weight, shift, True, True, SEGMENT, "native")
    )
    _, _, steps, kept = torch.ops.gossamer.self_referential.default(x, weight, shift, True, True, SEGMENT, "native")
    flat = (torch.randn_like(x), None, steps.detach(), kept.detach(), x, weight.detach(), shift, True, True, SEGMENT)
    torch.library.opcheck(torch.ops.gossamer.self_referential_backward.default, (*flat, "native"))


def test_bad_arguments():
    """Errors name the argument, the rule and the values."""
    x, weight, shift = draw(1, 2, 2, 3)
    with pytest.raises(ValueError, match=r"weight must have shape \(H, d, 3d \+ 4\) = \(2, 3, 13\)"):
        gossamer.self_referential(x, weight[..., :-1])
    with pytest.raises(TypeError, match=r"shift must be torch\.float32 beside x of torch\.bfloat16"):
        gossamer.self_referential(x.bfloat16(), weight, shift=shift.double())
    with pytest.raises(TypeError, match="weight must have the dtype of x"):
        gossamer.self_referential(x, weight.double())
    with pytest.raises(ValueError, match="d = 0"):
        gossamer.self_referential(x[..., :0], weight[:, :0, :4])
    with pytest.raises(TypeError, match=r"x must be a torch\.Tensor"):
        gossamer.self_referential([1.0], weight)


def test_layer():
    """The block by its formula, its state carried on, and a first step of training that lowers a loss."""
    torch.manual_seed(0)
    layer = gossamer.nn.SelfReferentialLinear(12, 3, input_softmax=True)
    x = torch.randn(2, 6, 12)
    heads = x.unflatten(-1, (3, 4)).softmax(-1)
    y = self_referential_reference(SelfReferential(heads, layer.weight, None, False, False, SEGMENT))[0]
    expected = layer.norm(x + layer.out_proj(y.flatten(-2)))
    torch.testing.assert_close(layer(x), expected)
    state = layer.initial_state(2)
    parts = torch.cat([layer(x[:, :4], state=state), layer(x[:, 4:], state=state)], 1)
    torch.testing.assert_close(parts, expected)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = (layer(x) - x.flip(1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    with pytest.raises(
        ValueError, match="hidden_size must be a multiple of num_heads, got hidden_size=12, num_heads=5"
    ):
        gossamer.nn.SelfReferentialLinear(12, 5)
