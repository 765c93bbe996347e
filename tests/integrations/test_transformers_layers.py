"""Single experts layers of transformers: sentinels, activations, gates, dtypes, what replace accepts and refuses."""

import copy
import os
from types import MethodType, SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
import torch.nn.functional as F
from eager_draws import compare
from torch import nn

pytest.importorskip("transformers", minversion="5")

from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import gossamer
from gossamer._activation import activate_reference
from gossamer.integrations.transformers import experts_forward
from gossamer.testing import assert_close, random_expert_ids


def make_experts(cls, device, dtype=torch.float64, num_experts=5, **overrides):
    """A standalone experts module with random weights."""
    config = SimpleNamespace(
        hidden_size=16,
        intermediate_size=24,
        moe_intermediate_size=24,
        moe_latent_size=None,
        num_local_experts=num_experts,
        n_routed_experts=num_experts,
        hidden_act="silu",
        mlp_hidden_act="relu2",
        swiglu_alpha=1.7,
        swiglu_limit=1.0,
        _experts_implementation="eager",
    )
    vars(config).update(overrides)
    module = cls(config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return module.to(device, dtype)


def layer_inputs(device, dtype, num_experts=5, top_k=2, num_tokens=19, draw=0, **routing):
    """Hidden states, ids (popular and empty experts) and weights, differentiable where they can be."""
    generator = torch.Generator().manual_seed(draw)
    x = torch.randn(num_tokens, 16, generator=generator, dtype=torch.float64)
    ids = random_expert_ids(num_tokens, num_experts, top_k, skew="zipf", seed=draw, device=device, **routing)
    weights = torch.rand(ids.shape, generator=generator, dtype=torch.float64)
    return x.to(device, dtype).requires_grad_(), ids, weights.to(device, dtype).requires_grad_()


def layer_results(function, module, x, ids, weights):
    """Output and all gradients of one experts layer."""
    module.zero_grad(set_to_none=True)
    x, weights = x.detach().requires_grad_(), weights.detach().requires_grad_()
    y = function(module, x, ids, weights)
    (y * torch.linspace(-1, 1, y.shape[1], dtype=y.dtype, device=y.device)).sum().backward()
    grads = {n: p.grad for n, p in module.named_parameters()}
    return {"y": y.detach(), "x": x.grad, "weights": weights.grad} | grads


def eager_forward(module, *args):
    """The class's own forward, whatever the config says."""
    return type(module).forward.__wrapped__(module, *args)


def eager_with_sentinels(module, x, ids, weights):
    """Eager with each foreign slot as expert 0 at weight 0: not every release's eager takes sentinels."""
    foreign = ids >= module.num_experts
    return eager_forward(module, x, ids.masked_fill(foreign, 0), weights.masked_fill(foreign, 0.0))


def check_layer(module, device, local=None, **inputs):
    """Our forward against eager in float32, with float64 eager as truth; ids from ``local`` on are foreign."""
    single, wide = copy.deepcopy(module).float(), copy.deepcopy(module).double()

    def results(function, model):
        def call(draw):
            x, ids, weights = layer_inputs(device, next(model.parameters()).dtype, draw=draw, **inputs)
            return layer_results(function, model, x, ids if local is None else ids.clamp(max=local), weights)

        return call

    compare(
        results(experts_forward, single), results(eager_with_sentinels, single), results(eager_with_sentinels, wide)
    )


@pytest.mark.parametrize("top_k", [2, 5])
def test_expert_parallel_sentinels_are_dropped(top_k, device):
    # Nonzero weights on the dropped slots: nothing but the id says that they are foreign.
    check_layer(make_experts(MixtralExperts, device), device, top_k=top_k, dropped=0.4)


@pytest.mark.parametrize("hidden_act", ["silu", "tanh"])
def test_fewer_local_experts_than_slots(hidden_act, device):
    module = make_experts(MixtralExperts, device, num_experts=2, hidden_act=hidden_act)
    check_layer(module, device, local=2, num_experts=6, top_k=4)


@pytest.mark.parametrize("hidden_act", ["gelu", "gelu_pytorch_tanh", "gelu_new", "relu", "swish", "tanh", "quick_gelu"])
def test_activations(hidden_act, device):
    module = make_experts(MixtralExperts, device, hidden_act=hidden_act)
    fused = gossamer.replace(module).switched[0].fused
    assert fused == (hidden_act not in ("tanh", "quick_gelu"))
    check_layer(module, device)


@pytest.mark.parametrize("hidden_act", ["relu2", "silu", "gelu", "sigmoid"])
def test_ungated_experts(hidden_act, device):
    # The first releases of transformers 5 have no experts without a gate.
    nemotron_h = pytest.importorskip("transformers.models.nemotron_h.modeling_nemotron_h")
    module = make_experts(nemotron_h.NemotronHExperts, device, mlp_hidden_act=hidden_act)
    assert gossamer.replace(module).switched[0].fused == (hidden_act != "sigmoid")
    check_layer(module, device)


class ScaledGate(MixtralExperts):
    """A gate that equals SwiGLU until its scale is trained."""

    def __init__(self, config):
        super().__init__(config)
        self.scale = nn.Parameter(torch.ones(()))

    def _apply_gate(self, gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate) * up * self.scale


class SwappedGate(MixtralExperts):
    """Up first, gate second."""

    def _apply_gate(self, gate_up):
        up, gate = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate) * up


class RareClamp(GptOssExperts):
    """gpt-oss's gate with one more clamp that only large values meet."""

    def _apply_gate(self, gate_up):
        return super()._apply_gate(gate_up).clamp(max=40.0)


def probe_path(module):
    """Whether replace would fuse the module, and why not."""
    switched = gossamer.replace(module).switched[0]
    return switched.fused, switched.detail


@pytest.mark.parametrize("cls", [ScaledGate, SwappedGate, RareClamp])
def test_gates_that_only_look_fused_go_the_general_way(cls, device):
    assert probe_path(make_experts(cls, device)) == (False, "no fused kernel for its _apply_gate")


GATES = {
    "swiglu": lambda self, gate_up: F.silu(gate_up.chunk(2, dim=-1)[0]) * gate_up.chunk(2, dim=-1)[1],
    "swiglu, interleaved": lambda self, x: x[..., 1::2] * (x[..., 0::2].sigmoid() * x[..., 0::2]),
    "geglu, interleaved": lambda self, x: torch.mul(*(F.gelu(x[..., ::2]), x[..., 1::2])),
    "geglu_tanh": lambda self, x: x.chunk(2, -1)[1].mul(F.gelu(x.chunk(2, -1)[0], approximate="tanh")),
    "clamped_swiglu(alpha=1.7, limit=1)": lambda self, x: (
        (1.0 + torch.clamp(x.chunk(2, -1)[1], min=-self.top, max=self.top))
        * (torch.sigmoid(self.steep * x.chunk(2, -1)[0].clamp(max=self.top)) * x.chunk(2, -1)[0].clamp(max=self.top))
    ),
    # What looks alike and is something else.
    "unlike 1": lambda self, x: F.silu(x.chunk(2, -1)[0]) * x[..., 1::2],
    "unlike 2": lambda self, x: (
        (1.0 + x.chunk(2, -1)[1].clamp(-self.top, self.top))
        * x.chunk(2, -1)[0].clamp(max=self.steep)
        * torch.sigmoid(x.chunk(2, -1)[0].clamp(max=self.top) * self.steep)
    ),
    "unlike 3": lambda self, x: F.silu(x.chunk(2, -1)[0], inplace=True) * x.chunk(2, -1)[1],
    "unlike 4": lambda self, x: self.act_fn(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1] * 1.000001,
    "unlike 5": lambda self, x: self.act_fn(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1] if self.steep else x,
    "unlike 6": lambda self, x: self.act_fn(x.chunk(2, 0)[0]) * x.chunk(2, 0)[1],
    "unlike 7": lambda self, x: F.gelu(x.chunk(2, -1)[0], approximate="other") * x.chunk(2, -1)[1],
}


@pytest.mark.parametrize("formula", GATES)
def test_gates_are_known_by_their_formula(formula, device):
    """However a known formula is spelled it is fused, and computes what its own code does."""
    cls = type("Spelled", (MixtralExperts,), {"_apply_gate": GATES[formula], "top": 1.0, "steep": 1.7})
    module = make_experts(cls, device)
    if formula.startswith("unlike"):
        assert probe_path(module) == (False, "no fused kernel for its _apply_gate")
        return
    assert probe_path(module) == (True, formula)
    x = torch.randn(7, 48, dtype=torch.float64, device=device) * 3
    kind, _, layout = formula.partition("(")[0].partition(", ")
    activation = gossamer.Activation(kind, 1.7, 1.0) if kind == "clamped_swiglu" else gossamer.Activation(kind)
    torch.testing.assert_close(activate_reference(x, activation, bool(layout)), module._apply_gate(x))


def test_the_path_follows_the_module_as_it_is_now(device):
    module = make_experts(GptOssExperts, device)
    module.alpha, module.limit = 1.7, 1.0
    assert probe_path(module) == (True, "clamped_swiglu(alpha=1.7, limit=1), interleaved")
    module.limit = 0.5
    check_layer(module, device)
    module.alpha = nn.Parameter(torch.tensor(1.1, dtype=torch.float64, device=device))
    assert probe_path(module)[0] is False

    module = make_experts(MixtralExperts, device)
    seen = []
    handle = module.act_fn.register_forward_hook(lambda *_: seen.append(1))
    check_layer(module, device)
    assert probe_path(module)[0] is False
    assert seen
    handle.remove()
    assert probe_path(module)[0] is True
    module._apply_gate = MethodType(SwappedGate._apply_gate, module)
    assert probe_path(module) == (False, "its _apply_gate was replaced on the instance")


@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_routing_weight_dtypes(weights_dtype, device):
    module = make_experts(MixtralExperts, device, torch.bfloat16)
    x, ids, weights = (t.detach() for t in layer_inputs(device, torch.float64))
    x, weights = x.bfloat16(), weights.to(weights_dtype)
    truth = eager_forward(copy.deepcopy(module).double(), x.double(), ids, weights.double())
    y = experts_forward(module, x, ids.int(), weights)
    assert_close(y, truth, eager_forward(module, x, ids, weights))


@pytest.mark.parametrize("hidden_act", ["silu", "tanh"])
def test_autocast(hidden_act, device):
    module = make_experts(MixtralExperts, device, torch.float32, hidden_act=hidden_act)
    x, ids, weights = (t.detach() for t in layer_inputs(device, torch.float32))
    truth = eager_forward(copy.deepcopy(module).double(), x.double(), ids, weights.double())
    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
        y = experts_forward(module, x, ids, weights)
        baseline = eager_forward(module, x, ids, weights)
    assert y.dtype == torch.float32
    # Products run in bfloat16, so that is the epsilon of the comparison.
    assert_close(y.bfloat16(), truth, baseline.bfloat16())


def test_modules_outside_a_pretrained_model(device):
    first, second = make_experts(MixtralExperts, device), make_experts(GptOssExperts, device)
    model = nn.ModuleDict({"first": first, "second": second})
    report = gossamer.replace(model)
    assert [m.name for m in report.switched] == ["first", "second"]
    assert first.config._experts_implementation == second.config._experts_implementation == "gossamer"
    x, ids, weights = layer_inputs(device, torch.float64)
    assert torch.equal(first(x, ids, weights), experts_forward(first, x, ids, weights))
    gossamer.restore(model)
    assert first.config._experts_implementation == second.config._experts_implementation == "eager"


def test_quantised_and_foreign_modules_are_refused(device):
    good, bad = make_experts(MixtralExperts, device), make_experts(MixtralExperts, device)
    bad.down_proj = nn.Parameter(bad.down_proj.to(torch.float8_e4m3fn), requires_grad=False)
    model = nn.ModuleDict({"good": good, "bad": bad})
    with pytest.raises(ValueError, match=r"bad \(MixtralExperts\): it is quantised: down_proj is torch\.float8_e4m3fn"):
        gossamer.replace(model)
    assert good.config._experts_implementation == "eager"
    report = gossamer.replace(model, strict=False)
    assert [m.name for m in report.switched] == ["good"]
    assert "bad: MixtralExperts, left alone: it is quantised" in str(report)
    assert bad.config._experts_implementation == "eager"

    bad.config = good.config
    gossamer.restore(model)
    report = gossamer.replace(model, strict=False)
    assert not report.switched
    assert [m.reason for m in report.skipped if m.name == "good"] == [
        "it shares its config with bad, which cannot be switched"
    ]

    class DenseMoE(nn.Module):
        pass

    with pytest.raises(ValueError, match=r"got none in Sequential; DenseMoE do not use that interface"):
        gossamer.replace(nn.Sequential(nn.Linear(2, 2), DenseMoE()))
    assert gossamer.replace(nn.Linear(2, 2), strict=False).switched == ()
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        gossamer.replace("mixtral")


@pytest.mark.parametrize("cls", [MixtralExperts, RareClamp, GptOssExperts])
def test_compiled_layer_follows_the_module(cls, device):
    module = make_experts(cls, device, torch.float32)
    x, ids, weights = (t.detach() for t in layer_inputs(device, torch.float32))
    torch.compiler.reset()
    compiled = torch.compile(experts_forward, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(module, x, ids, weights), experts_forward(module, x, ids, weights))
    before = experts_forward(module, x, ids, weights)
    if hasattr(module, "limit"):
        module.limit = 0.4
    else:
        module.act_fn = nn.Tanh()
    after = experts_forward(module, x, ids, weights)
    assert not torch.equal(after, before)
    assert torch.equal(compiled(module, x, ids, weights), after)


def test_export(device):
    module = make_experts(GptOssExperts, device, torch.float32, _experts_implementation="gossamer")
    x, ids, weights = (t.detach() for t in layer_inputs(device, torch.float32))
    exported = torch.export.export(module, (x, ids, weights))
    assert torch.equal(exported.module()(x, ids, weights), module(x, ids, weights))


@pytest.mark.skipif(gossamer._backend.native_unavailable() is not None, reason="needs the compiled extension")
@pytest.mark.parametrize("weight_format", [None, "int8"])
@pytest.mark.parametrize("cls", [GptOssExperts, MixtralExperts])
def test_inference_in_one_native_call(monkeypatch, cls, weight_format):
    """Without gradients the bits are the same, whatever changes between calls, and errors too."""
    from gossamer.integrations import transformers as integration

    served, original = [], integration.run_chosen

    def run_chosen(prepared, ids, weights, x):
        y = original(prepared, ids, weights, x)
        served.append(y is not None)
        return y

    monkeypatch.setattr(integration, "run_chosen", run_chosen)
    module = make_experts(cls, "cpu", torch.bfloat16, hidden_size=32, intermediate_size=32).requires_grad_(False)
    if weight_format is not None:
        gossamer.quantize_experts(module, weight_format)

    def check(tokens, **routing):
        _, ids, weights = layer_inputs("cpu", torch.bfloat16, num_tokens=tokens, **routing)
        x = torch.randn(tokens, 32).bfloat16()
        ids, weights = ids.int(), weights.detach().T.contiguous().T
        with torch.no_grad():
            found = experts_forward(module, x, ids, weights)
        assert served == [True]
        served.clear()
        assert torch.equal(found, experts_forward(module, x, ids, weights)) and not served
        return found

    assert torch.isfinite(check(1)).all()
    check(9, dropped=0.3)
    if weight_format is None:
        module.down_proj.mul_(2)
        check(1)
        module.down_proj = nn.Parameter(module.down_proj.flip(0), requires_grad=False)
    else:
        module.down_proj.scale.mul_(2)
    check(2)
    module.act_fn = nn.ReLU()
    check(1)
    with torch.no_grad(), pytest.raises(ValueError, match="must not be negative"):
        experts_forward(module, torch.randn(1, 32).bfloat16(), torch.tensor([[0, -1]]), torch.rand(1, 2))
    assert served == [False]
