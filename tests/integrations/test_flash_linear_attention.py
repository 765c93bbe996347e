"""flash-linear-attention's operators on the CPU, served by gossamer through its registry."""

import pytest
import torch
import torch.nn.functional as F

# Where it is installed transformers calls its kernels, which the other tests on the CPU cannot.
pytest.importorskip("fla.backends", reason="needs the extra flash-linear-attention, in an environment of its own")

from fla.ops.gated_delta_rule import chunk_gated_delta_rule
from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule
from fla.ops.kda import chunk_kda, fused_recurrent_kda
from fla.ops.kda.naive import naive_recurrent_kda

import gossamer
from gossamer.integrations import flash_linear_attention
from gossamer.testing import errors

if torch.cuda.is_available():
    pytest.skip("the package has kernels of its own here", allow_module_level=True)


@pytest.fixture(autouse=True)
def registered():
    served = flash_linear_attention.register()
    assert served == ("chunk_gated_delta_rule", "chunk_kda", "fused_recurrent_kda_fwd")
    assert flash_linear_attention.register() == served


def draw(by_channel, t=70, heads=2, size=9, values=7):
    """Arguments of both operators by name, in float32."""
    q, k = (F.normalize(torch.randn(2, t, heads, size), dim=-1) for _ in range(2))
    g = F.logsigmoid(torch.randn(2, t, heads, size) if by_channel else torch.randn(2, t, heads))
    v, beta, state = torch.randn(2, t, heads, values), torch.rand(2, t, heads), torch.randn(2, heads, size, values)
    return {"q": q, "k": k, "v": v, "g": g, "beta": beta, "initial_state": state}


@pytest.mark.parametrize(
    ("operator", "naive"),
    [(chunk_gated_delta_rule, naive_recurrent_gated_delta_rule), (chunk_kda, naive_recurrent_kda)],
)
def test_operators_equal_the_packages_own_recurrence(operator, naive):
    """Outputs, states and every gradient, by the package's plain-torch formula."""
    given = draw(operator is chunk_kda)
    results = []
    for function in (operator, naive):
        leaves = {name: x.clone().requires_grad_() for name, x in given.items()}
        o, state = function(**leaves, output_final_state=True)
        gradients = torch.autograd.grad(o.sin().sum() + state.sin().sum(), list(leaves.values()))
        results.append([o, state, *gradients])
    for ours, theirs in zip(*results, strict=True):
        assert errors(ours, theirs.double())[0] < 1e-5


@pytest.mark.parametrize("operator", [chunk_gated_delta_rule, chunk_kda])
def test_options_of_the_kernels(operator):
    """Norms, raw gates and rates, states stored with values first, and packs are gossamer's own."""
    given = draw(operator is chunk_kda)
    given["g"], given["beta"] = torch.randn_like(given["g"]), torch.randn_like(given["beta"])
    state = given.pop("initial_state")
    gate = {"A_log": torch.randn(2), "dt_bias": torch.randn(given["g"].shape[2:])}
    flags = ("use_qk_l2norm_in_kernel", "use_gate_in_kernel", "use_beta_sigmoid_in_kernel", "allow_neg_eigval")
    options = dict.fromkeys((*flags, "output_final_state", "state_v_first"), True)
    o, last = operator(**given, **gate | {"dt_bias": gate["dt_bias"].flatten()}, **options, initial_state=state.mT)
    given["beta"] = 2 * given["beta"].sigmoid()
    expected, last_expected = gossamer.delta_rule(
        **given, **gate, initial_state=state, output_final_state=True, use_qk_l2norm=True
    )
    assert errors(o, expected)[0] < 1e-6 and errors(last.mT, last_expected)[0] < 1e-6
    pack = {name: x[:1] for name, x in draw(operator is chunk_kda).items() if name != "initial_state"}
    ends = torch.tensor([0, 5, 5, 70])
    o, last = operator(**pack, cu_seqlens=ends, output_final_state=True)
    expected, last_expected = gossamer.delta_rule(**pack, cu_seqlens=ends, output_final_state=True)
    assert torch.equal(o, expected) and torch.equal(last, last_expected)


@torch.no_grad()
def test_decoding_of_kda():
    """Token by token the chunked operator's outputs; the state goes from call to call."""
    given = draw(True, t=4)
    state = given.pop("initial_state")
    expected, last = chunk_kda(**given, initial_state=state, output_final_state=True)
    outputs = []
    for t in range(4):
        token = {name: x[:, t : t + 1] for name, x in given.items()}
        o, state = fused_recurrent_kda(**token, initial_state=state, output_final_state=True)
        outputs.append(o)
    assert errors(torch.cat(outputs, 1), expected)[0] < 1e-6 and errors(state, last)[0] < 1e-6


def test_what_is_not_served_is_refused():
    given = draw(True, t=4)
    assert flash_linear_attention._obstacle(given) is None
    assert "serve use_graph" in flash_linear_attention._obstacle(given | {"use_graph": True})
    assert "serve new_option" in flash_linear_attention._obstacle(given | {"new_option": None})
    assert "on the CPU" in flash_linear_attention._obstacle(given | {"q": given["q"].to("meta")})
