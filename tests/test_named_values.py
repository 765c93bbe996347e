"""Dtypes, devices, sizes and numbers of functions and methods: those that cannot be are refused by name.

``nn/test_constructor_arguments.py`` does the same for the constructors of layers.
"""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

import gossamer
from gossamer import nn, optim, testing
from gossamer.integrations import scattermoe
from gossamer.integrations.megablocks import Arguments
from gossamer.integrations.megablocks import ops as megablocks

HUGE = 10**400
IDS = torch.tensor([0, 1])


def topology():
    return gossamer.BlockTopology.random((32, 32), 16, 1.0)


def expert_weight():
    return gossamer.QuantizedExpertWeight.quantize(torch.ones(1, 4, 32), "int8")


def low_rank(scale):
    x, a, b = torch.ones(2, 4), torch.ones(1, 4), torch.ones(3, 1)
    return gossamer.low_rank_linear(x, torch.ones(3, 4), a, b, scale=scale)


DTYPES = {
    "out_dtype": lambda dtype: gossamer.gather_reduce(torch.ones(3, 2), IDS.unsqueeze(1), out_dtype=dtype),
    "value_dtype": lambda dtype: gossamer.HashTable(2, 8, value_dtype=dtype),
    "weights_dtype": lambda dtype: nn.TableBatchedEmbeddingBags([(3, 2)], weights_dtype=dtype),
    "output_dtype": lambda dtype: nn.TableBatchedEmbeddingBags([(3, 2)], output_dtype=dtype),
    "dtype of a state": lambda dtype: optim.Adam().state(3, 2, dtype=dtype),
    "dtype of an accumulator": lambda dtype: optim.Adagrad(0.1).state(3, 2, dtype=dtype),
    "dtype of tables": lambda dtype: gossamer.TableLayout([(3, 2)]).state(optim.Adam(), dtype=dtype),
    "dtype of experts": lambda dtype: expert_weight().dequantize(dtype),
    "dtype of a weight": lambda dtype: gossamer.NF4Weight.quantize(torch.ones(2, 64)).dequantize(dtype),
    "dtype of blocks": lambda dtype: gossamer.BlockSparseTensor(torch.ones(4, 16, 16), topology()).to(dtype=dtype),
    "dtype of a layer": lambda dtype: nn.QuantizedLinear(expert_weight()).to_linear(dtype),
    "dtype of a budget": lambda dtype: nn.HashEmbedding.from_budget(9, 4, 64, dtype=dtype),
    "dtype of a router": lambda dtype: nn.HashRouter.from_top_k(2, 3, 1, vocabulary=3, dtype=dtype),
}


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.float8_e4m3fn, "float32", 5], ids=str)
def test_a_dtype_that_nothing_is_computed_in(name, dtype):
    with pytest.raises(TypeError, match=rf"^{name.split()[0]} must be "):
        DTYPES[name](dtype)


DEVICES = {
    "a hash table": lambda device: gossamer.HashTable(2, 8, device=device),
    "a topology": lambda device: topology().to(device),
    "a random topology": lambda device: gossamer.BlockTopology.random((32, 32), 16, 1.0, device=device),
    "blocks": lambda device: gossamer.BlockSparseTensor(torch.ones(4, 16, 16), topology()).to(device),
    "batched tables": lambda device: nn.TableBatchedEmbeddingBags([(3, 2)], device=device),
    "a state": lambda device: optim.Adam().state(3, 2, device),
    "a router": lambda device: nn.HashRouter.from_top_k(2, 3, 1, vocabulary=3, device=device),
    "a router around another": lambda device: nn.DomainRouter.from_top_k(2, 3, 1, device=device),
    "loaded experts": lambda device: gossamer.load_quantized_experts(nn.MoE(4, 4, 2, 1), {}, device=device),
    "drawn experts": lambda device: testing.random_expert_ids(4, 4, 1, device=device),
    "layers of MegaBlocks": lambda device: Arguments(device=device),
}


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("device", ["nonsense", "cuda:99", "xla", torch.device("cuda", 99), -1, 5.5], ids=str)
def test_a_device_that_this_machine_does_not_have(name, device):
    with pytest.raises((TypeError, ValueError), match=r"^device must be "):
        DEVICES[name](device)


VALUES = {
    "a fraction beyond floats": (lambda: low_rank(Fraction(HUGE, 3)), "scale must fit a float, got Fraction"),
    "a factor of weights": (
        lambda: nn.sigmoid_topk(torch.ones(2, 3), 1, scale=HUGE),
        "scale must be a float or an int of 64 bits, got an int of 1329 bits",
    ),
    "an int beyond 64 bits": (
        lambda: nn.frobenius_decay_(torch.nn.Linear(2, 2), 2**70),
        f"decay must be a float or an int of 64 bits, got {2**70}",
    ),
    "a fraction": (
        lambda: nn.softmax_top_p(torch.ones(2, 3), Fraction(1, 3)),
        "top_p must be a float or an int, got Fraction",
    ),
    "a rate beyond floats": (lambda: optim.SGD(HUGE), "lr must fit a float, got an int of 1329 bits"),
    "an initial value": (
        lambda: optim.Adagrad(0.1, initial_accumulator=1e39).state(3, 2),
        r"initial_accumulator must fit torch\.float32, got 1e\+39",
    ),
    "an alpha": (lambda: nn.LoRALinear(4, 4, 2, alpha=1e308, dora=True), r"alpha must fit torch\.float32, got 1e\+308"),
    "rates": (
        lambda: nn.SelfReferentialLinear(4, 2, rate_init=1e308),
        r"rate_init must fit torch\.float32, got 1e\+308",
    ),
    "digits that Python does not print": (
        lambda: nn.Experts(1, 10**5000, 16),
        "hidden_size must be at most 9223372036854775807, got an int of 16610 bits",
    ),
    "experts of two halves": (
        lambda: scattermoe.GLUMLP(4, 2**62, 2, 1, torch.nn.SiLU()),
        rf"input_size · hidden_size must be at most 2\*\*60, got 4 · {2**62}",
    ),
    "columns": (
        lambda: megablocks.replicate(torch.ones(1, 2), IDS, 2**63 - 1),
        f"num_outputs must be at most {2**60}, got",
    ),
    "a table of MegaBlocks": (lambda: megablocks.histogram(IDS, 2**63 - 1), f"max_val must be at most {2**60}"),
    "padded rows": (
        lambda: megablocks.padded_gather(torch.ones(2, 1), IDS, IDS, 1 + IDS, 1 + IDS, 1, 2**63 - 1),
        f"output_rows must be at most {2**60}",
    ),
    "layers of MegaBlocks": (
        lambda: Arguments(ffn_hidden_size=2**62),
        r"hidden_size · ffn_hidden_size must be at most 2\*\*60",
    ),
    "codes of levels": (
        lambda: nn.SemanticIdEmbedding(2, 4, torch.zeros(2, 3).long(), num_codes=2**62),
        r"levels · num_codes must be at most 2\*\*60, got 3 · ",
    ),
    "columns of a topology": (
        lambda: gossamer.BlockTopology.from_dispatch(gossamer.dispatch(IDS.unsqueeze(1), 2), 2**70, 16),
        "ffn_size must be at most",
    ),
}


@pytest.mark.parametrize("name", VALUES)
def test_a_size_or_number_that_nothing_holds(name):
    call, message = VALUES[name]
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        call()


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_clipping_beyond_the_range_of_a_gradient_changes_nothing(backend):
    """Torch clamps to no such number, and no gradient exceeds it."""
    if reason := gossamer._backend.unavailable(backend, "cpu"):
        pytest.skip(reason)
    tables = []
    for clip_value in (1e308, None):
        tables.append(torch.ones(3, 2))
        optimizer = optim.SGD(Fraction(1, 2), clip_value=clip_value)
        with gossamer.backend(backend):
            dout, state = torch.full((2, 2), 3.0), optimizer.state(3, 2)
            gossamer.sparse_update_(tables[-1], IDS.unsqueeze(1), dout, optimizer=optimizer, state=state)
    assert torch.equal(*tables) and tables[0].tolist() == [[-0.5, -0.5], [-0.5, -0.5], [1, 1]]


def test_any_capacity_is_all_tokens():
    """Of a factor that would overflow times the tokens per expert."""
    assert nn.expert_choice(torch.zeros(6, 2), 1e308).counts.tolist() == [6, 6]
    logits = torch.tensor([[1.0, 0.0]]).expand(33, 2)
    assert nn.softmax_prototypes(logits, 1, capacity_factor=1e308).expert_ids.tolist() == [[0]] * 33
    router = nn.ClusterRouter(4, 2, 1, capacity_factor=1e308)
    assert router(torch.randn(9, 4)).counts.sum() == 9


def test_more_experts_than_ids_take_no_time():
    """Only as many are drawn as there are slots."""
    table = nn.frequency_table(torch.ones(3), 2**62, 2)
    assert len(table.unique()) == 6 and int(table.min()) >= 0 and int(table.max()) < 2**62


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_a_fraction_scales_as_its_float(backend):
    """Torch multiplies by no fraction."""
    if reason := gossamer._backend.unavailable(backend, "cpu"):
        pytest.skip(reason)
    x, a, b = torch.randn(2, 4), torch.randn(2, 2, 4), torch.randn(2, 5, 2)
    calls = (
        lambda scale: gossamer.low_rank_linear(x, torch.ones(5, 4), a[0], b[0], scale=scale),
        lambda scale: gossamer.multi_low_rank(x, a, b, IDS, scale=scale),
    )
    with gossamer.backend(backend):
        for call in calls:
            assert torch.equal(call(Fraction(1, 3)), call(1 / 3))
