"""Errors of the replacements for ScatterMoE and MegaBlocks name those libraries' arguments, not inner ones."""

from __future__ import annotations

import pytest
import torch

from gossamer.integrations import scattermoe
from gossamer.integrations.megablocks import Arguments, dMoE
from gossamer.integrations.megablocks import ops as megablocks
from gossamer.integrations.scattermoe.kernels import ops as products
from gossamer.integrations.scattermoe.kernels import single

CHOSEN = torch.tensor([[0], [1]])


def _scattered(**changes):
    experts, slots, offsets = scattermoe.flatten_sort_count(torch.tensor([[0, 1], [1, 0]]), 2)
    args = {"inputs": torch.ones(2, 3), "expert_weights": torch.ones(2, 3, 5), "k": 2, "sorted_expert_idxs": experts}
    args |= {"sorted_scattered_idxs": slots, "expert_offsets": offsets, "gates": torch.ones(2, 2)}
    return scattermoe.parallel_linear(**args | {name: change(args.get(name)) for name, change in changes.items()})


SCATTERED = {
    "sorted_scattered_idxs": (lambda t: t * 0, ValueError, "sorted_scattered_idxs must have every slot once"),
    "expert_offsets": (lambda t: t.flip(0), ValueError, "expert_offsets must ascend to at most R=4, got"),
    "inputs": (lambda t: t[:, :2], ValueError, r"inputs must have shape \(R/k, C\) = \(any, 3\), got \(2, 2\)"),
    "gates": (lambda t: t.long(), TypeError, "gates must be floating point, got torch.int64"),
    "expert_biases": (lambda t: torch.ones(5), ValueError, r"expert_biases must have shape \(E, N\)"),
    "expert_weights": (
        lambda t: t.to("meta"),
        ValueError,
        "expert_weights must be on the device of inp",
    ),
    "k": (lambda k: 2**63, ValueError, "k must be at most 9223372036854775807, got 9223372036854775808"),
    "grouped_in": (lambda t: 1, TypeError, "grouped_in must be a bool, got int"),
}


@pytest.mark.parametrize("name", SCATTERED)
def test_scattermoe_names_its_own_arguments(name):
    """Errors do not name the arguments of the product that it calls."""
    change, error, message = SCATTERED[name]
    with pytest.raises(error, match=message):
        _scattered(**{name: change})


@pytest.mark.parametrize("kind", [scattermoe.MLP, scattermoe.GLUMLP])
def test_layers_of_scattermoe_name_their_own_arguments(kind):
    """Errors do not name the arguments of the products inside the layers."""
    layer, x, gates, ids = kind(3, 4, 2, 1, activation=torch.nn.SiLU()), torch.ones(2, 3), torch.ones(2, 1), CHOSEN
    for given, error, message in (
        ((None, gates, ids), TypeError, "x must be a torch.Tensor, got NoneType"),
        ((x.to("meta"), gates, ids), ValueError, "x must be on the device of the parameters, cpu, got meta"),
        ((x, gates.long(), ids), TypeError, "expert_p must be floating point, got torch.int64"),
        ((x, gates[:1], ids), ValueError, r"expert_p must have shape \(T, top_k\) = \(2, 1\), got \(1, 1\)"),
        ((x, gates, ids[:1]), ValueError, r"expert_idxs must have shape \(T, top_k\) = \(2, 1\), got \(1, 1\)"),
        ((x, gates.to("meta"), ids), ValueError, "expert_p must be on the device of x, cpu, got meta"),
    ):
        with pytest.raises(error, match=message):
            layer(*given)
    for sizes, message in (((3, None, 2, 1), "hidden_size must be an int"), ((3, 4, 2, [1]), "top_k must be an int")):
        with pytest.raises(TypeError, match=message):
            kind(*sizes)
    with pytest.raises(TypeError, match="activation must be callable or None, got list"):
        kind(3, 4, 2, 1, activation=[1])


KERNELS = {
    "X": (lambda: products.group_bwd_W(torch.ones(2, 3), torch.ones(1, 4), CHOSEN[:, 0] + 1, 2), r"X must have shape"),
    "W": (
        lambda: single.single2scatter(torch.ones(1, 3), torch.ones(0, 3, 4), CHOSEN.T),
        "W must hold at least one ex",
    ),
    "coeff": (
        lambda: products.group(torch.ones(2, 3), CHOSEN[:, 0], [1.0, 2.0]),
        "coeff must be a torch.Tensor, got li",
    ),
    "fan_out": (lambda: products.group(torch.ones(2, 3), CHOSEN[:, 0], fan_out=0), "fan_out must be at least 1, got 0"),
    "out": (
        lambda: products.group(torch.ones(2, 3), CHOSEN[:, 0], out=torch.ones(2, 3).double()),
        "out must have the dtype of result, torch.float32, got torch.float64",
    ),
    "end_bit": (lambda: megablocks.sort(CHOSEN[:, 0], "text"), "end_bit must be an int, got str"),
    "max_val": (lambda: megablocks.histogram(CHOSEN[:, 0], None), "max_val must be an int, got NoneType"),
    "dim": (lambda: megablocks.inclusive_cumsum(CHOSEN[:, 0], 1), r"dim must be in \[-1, 1\) for x of shape \(2,\)"),
    "tiling": (lambda: megablocks.repeat(CHOSEN, (2,)), "tiling must have a number for each dimension of x"),
    "num_outputs": (
        lambda: megablocks.replicate(torch.ones(1, 2), CHOSEN[:, 0], -1),
        "num_outputs must be at least 0, got -1",
    ),
    "output_block_rows": (
        lambda: megablocks.topology(CHOSEN[:, 0], 1, -1, 1),
        "output_block_rows must be at least 0, got -1",
    ),
}


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_of_others_name_their_own_arguments(name):
    """The functions that either library calls kernels or operators name their own arguments."""
    call, message = KERNELS[name]
    with pytest.raises((TypeError, ValueError, IndexError), match=message):
        call()


def test_layers_of_megablocks_name_their_own_arguments():
    """Options and hidden states."""
    options = {"hidden_size": 4, "ffn_hidden_size": 16, "moe_num_experts": 2, "fp16": False, "device": "cpu"}
    for name in ("moe_loss_weight", "moe_zloss_weight", "moe_jitter_eps", "moe_normalize_expert_weights"):
        with pytest.raises(TypeError, match=f"{name} must be a number"):
            Arguments(**options, **{name: "text"})
    layer = dMoE(Arguments(**options))
    for x, error, message in (
        (None, TypeError, "x must be a torch.Tensor, got NoneType"),
        (torch.ones(2, 4, device="meta"), ValueError, "x must be on the device of the parameters, cpu, got meta"),
        (torch.ones(2, 4).double(), TypeError, "x must have the dtype of the parameters, torch.float32, got torch.fl"),
    ):
        with pytest.raises(error, match=message):
            layer(x)


def test_scattermoe_with_gates_of_no_slots():
    """Without tokens, or with tokens that have no slots, the result is zeros."""
    empty = torch.zeros(0, dtype=torch.int64)
    weights, offsets = torch.ones(2, 3, 5), torch.zeros(2, dtype=torch.int64)
    for tokens, slots in ((0, 2), (4, 0)):
        y = scattermoe.parallel_linear(
            torch.ones(0, 3), weights, max(slots, 1), empty, empty, offsets, gates=torch.ones(tokens, slots)
        )
        assert torch.equal(y, torch.zeros(tokens, 5))


def test_megablocks_names_ids_out_of_range():
    """Bins and slots outside their ranges would be read as other rows."""
    bins, one = torch.tensor([1, 2]), torch.tensor([0, 1])
    for name, bad in (("indices", {"indices": one + 1}), ("bin_ids", {"bin_ids": one - 1})):
        args = {"indices": one, "bin_ids": one, "bins": bins, "padded_bins": bins, "top_k": 1} | bad
        with pytest.raises(ValueError, match=rf"{name} must be in \[0, 2\)"):
            megablocks.padded_gather(torch.ones(2, 3), **args)
    with pytest.raises(ValueError, match=r"padded_bins must ascend from 0 or more, got \[5, 2\]"):
        megablocks.padded_gather(torch.ones(2, 3), one, one, bins, torch.tensor([5, 2]), 1)
    with pytest.raises(TypeError, match=r"padded_bins must be a torch\.Tensor, got NoneType"):
        megablocks.padded_gather(torch.ones(2, 3), one, one, bins, None, 1)
