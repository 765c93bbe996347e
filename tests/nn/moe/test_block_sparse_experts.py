"""Expert layers in block-sparse form: the same numbers as by grouped products, and as by a dense loop."""

import pytest
import torch
from eager_draws import compare
from helpers import OperatorLog, randn

import gossamer
from gossamer.nn import Experts, LoRAExperts, MoE
from gossamer.nn.moe.experts.block_sparse import PaddedExperts, _row_block
from gossamer.ops.dispatch import dispatch
from gossamer.testing import random_expert_ids

# I is one block of 32 and half of another, so blocks have 16 columns; T·K/E is not a multiple of a block's rows.
H, I, E, K, T = 40, 48, 5, 2, 53


FORMS = [
    pytest.param({}, id="swiglu"),
    pytest.param({"activation": "relu2", "bias": True}, id="ungated"),
    pytest.param({"activation": "clamped_swiglu", "bias": True, "interleaved": True, "transposed": True}, id="gpt-oss"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("skew", ["zipf", "few"])
@pytest.mark.parametrize("options", FORMS)
def test_against_the_grouped_form(device, options, skew, dtype):
    """Outputs and all gradients, slots dropped too, are as near to float64 as the grouped form in plain torch is."""
    sparse = Experts(E, H, I, form="block_sparse", device=device, dtype=dtype, **options)
    for parameter in sparse.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    ids = random_expert_ids(T, E, K, skew=skew, dropped=0.1, device=device)

    def results(draw, layer=sparse):
        weights = torch.rand(T, K, generator=torch.Generator().manual_seed(draw)).to(device, layer.down_proj.dtype)
        x = randn(T, H, seed=2 * draw, device=device, dtype=dtype).to(weights.dtype).requires_grad_()
        dy = randn(T, H, seed=2 * draw + 1, device=device, dtype=dtype).to(weights.dtype)
        leaves = {"x": x, "weights": weights.to(dtype).to(weights.dtype).requires_grad_()}
        leaves |= dict(layer.named_parameters())
        y = layer(x, ids, leaves["weights"])
        grads = torch.autograd.grad(y, list(leaves.values()), dy)
        return {"y": y, **dict(zip(leaves, grads, strict=True))}

    def plain(draw, cast):
        grouped = Experts(E, H, I, device=device, dtype=cast, **options)
        grouped.load_state_dict(sparse.state_dict())
        with gossamer.backend("reference"):
            return results(draw, grouped)

    compare(results, lambda draw: plain(draw, dtype), lambda draw: plain(draw, torch.float64))


def test_the_products_are_block_sparse(device):
    layer = MoE(H, I, E, K, form="block_sparse", device=device)
    grouped = MoE(H, I, E, K, device=device)
    grouped.load_state_dict(layer.state_dict())
    x = randn(T, H, device=device)
    with OperatorLog() as log:
        y = layer(x)
    torch.testing.assert_close(y, grouped(x), rtol=1e-5, atol=1e-6)
    assert not log.named("expert_mlp") and not log.named("grouped_matmul")
    assert "form='block_sparse'" in repr(layer.experts) and "form" not in repr(grouped.experts)


def test_capacity_and_autocast(device):
    sparse, grouped = (
        MoE(H, I, E, K, capacity_factor=0.5, form=form, device=device) for form in ("block_sparse", "grouped")
    )
    grouped.load_state_dict(sparse.state_dict())
    x = randn(T, H, device=device)
    torch.testing.assert_close(sparse(x), grouped(x), rtol=1e-5, atol=1e-6)
    with torch.autocast(device, dtype=torch.bfloat16):
        narrow = sparse(x)
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.float(), grouped(x), rtol=0.05, atol=0.02)


def test_padded_rows(device):
    """Each expert's tokens in order and padded with zeros; summing them back takes each slot once."""
    ids = random_expert_ids(T, E, K, skew="zipf", dropped=0.2, device=device)
    routing = dispatch(ids, E)
    padded = PaddedExperts.of(routing, I, (16, 16))
    x = randn(T, H, device=device)
    rows = padded.spread(x)
    starts = padded.topology.padded_offsets.tolist()
    bias = randn(E, H, seed=1, device=device)
    biased = padded.add_bias(rows, bias)
    for e in range(E):
        tokens = (ids == e).any(1).nonzero().squeeze(1)
        mine = rows[starts[e] : starts[e + 1]]
        assert torch.equal(mine[: len(tokens)], x[tokens]) and not mine[len(tokens) :].any()
        assert torch.equal(biased[starts[e] : starts[e + 1]], mine + bias[e])
    assert not rows[starts[-1] :].any() and not biased[starts[-1] :].any()
    kept = (ids < E).sum(1, keepdim=True)
    torch.testing.assert_close(padded.collect(rows, torch.ones(T, K, device=device)), x * kept)


def test_row_blocks_keep_padding_small():
    sizes = (0, 4, 127, 128, 256, 512, 1024, 10**6)
    assert [_row_block(rows, 4, torch.device("cuda")) for rows in sizes] == [16, 16, 16, 16, 32, 64, 128, 128]
    assert {_row_block(rows, 4, torch.device("cpu")) for rows in sizes} == {16}


def test_traces_without_a_graph_break(device):
    moe = MoE(H, I, E, K, form="block_sparse", bias=True, device=device)
    compiled = torch.compile(moe, fullgraph=True, backend="aot_eager")
    for tokens in (T, 31):
        x = randn(tokens, H, device=device).requires_grad_()
        results = [torch.autograd.grad(f(x).square().sum(), [x, *moe.parameters()]) for f in (moe, compiled)]
        assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_no_tokens_and_one_token(device):
    layer = Experts(E, H, I, form="block_sparse", bias=True, device=device)
    x = torch.zeros(0, H, device=device, requires_grad=True)
    ids = torch.zeros(0, K, dtype=torch.long, device=device)
    layer(x, ids, x.new_zeros(0, K)).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in layer.parameters())
    grouped = Experts(E, H, I, bias=True, device=device)
    grouped.load_state_dict(layer.state_dict())
    one = randn(1, H, device=device), torch.tensor([[3, 1]], device=device), torch.ones(1, 2, device=device)
    torch.testing.assert_close(layer(*one), grouped(*one), rtol=1e-5, atol=1e-6)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"form must be one of \('grouped', 'block_sparse'\), got 'dense'"):
        Experts(E, H, I, form="dense")
    with pytest.raises(ValueError, match=r"intermediate_size must be a multiple of 16 for .*, got 40"):
        MoE(H, 40, E, K, form="block_sparse")
    with pytest.raises(ValueError, match="form must be 'grouped' for experts with low-rank updates"):
        LoRAExperts(E, H, I, rank=2, form="block_sparse")
