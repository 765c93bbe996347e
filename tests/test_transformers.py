"""The transformers integration: whole models and every experts class, against transformers' own eager forward."""

import copy
import json
import os
import subprocess
import sys
from types import MethodType, SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", minversion="5")

import transformers
from transformers import AutoModelForCausalLM
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

import gossamer
from gossamer.integrations.transformers import experts_forward
from gossamer.testing import assert_close, random_expert_ids

SHARED = dict(
    hidden_size=32,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=96,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
LATENT = dict(
    num_key_value_heads=4,
    first_k_dense_replace=1,
    moe_intermediate_size=16,
    n_shared_experts=1,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
)
# E is never a power of two where the model allows, so that no expert count hides behind a tile; K from 2 to 3.
CONFIGS = {
    "mixtral": ("MixtralConfig", dict(num_local_experts=5, num_experts_per_tok=2)),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        dict(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=24, shared_expert_intermediate_size=24),
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        dict(head_dim=8, num_experts=7, num_experts_per_tok=3, moe_intermediate_size=24, norm_topk_prob=True),
    ),
    "olmoe": ("OlmoeConfig", dict(num_experts=7, num_experts_per_tok=3)),
    "deepseek_v2": (
        "DeepseekV2Config",
        LATENT | dict(q_lora_rank=None, n_routed_experts=7, num_experts_per_tok=2, n_group=1, topk_group=1),
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        LATENT | dict(q_lora_rank=16, n_routed_experts=8, num_experts_per_tok=3, n_group=2, topk_group=1),
    ),
    "glm4_moe": (
        "Glm4MoeConfig",
        dict(
            head_dim=8,
            first_k_dense_replace=1,
            n_routed_experts=7,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            n_shared_experts=1,
            n_group=1,
            topk_group=1,
        ),
    ),
    # The small limit makes both clamps act on many values.
    "gpt_oss": (
        "GptOssConfig",
        dict(
            head_dim=8,
            num_local_experts=5,
            num_experts_per_tok=2,
            swiglu_limit=1.5,
            rope_parameters=dict(rope_type="default", rope_theta=10000.0),
        ),
    ),
}
MODELS = list(CONFIGS)


def make_config(name):
    """The small config of a model."""
    class_name, own = CONFIGS[name]
    return getattr(transformers, class_name)(**(SHARED | own))


def make_model(name, device, dtype=torch.float32, implementation="eager"):
    """A model whose weights depend on its name alone, large enough that experts and routing matter."""
    model = AutoModelForCausalLM.from_config(make_config(name), experts_implementation=implementation).double()
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(0.25 * noise if parameter.dim() > 1 or "bias" in name else 1 + 0.1 * noise)
    return model.to(dtype).to(device).train()


def make_ids(device, batch=2, length=11):
    """Token ids without the special ones."""
    return torch.randint(3, 96, (batch, length), generator=torch.Generator().manual_seed(1)).to(device)


def loss_and_gradients(model, ids):
    """Logits and the gradient of every parameter."""
    model.zero_grad(set_to_none=True)
    out = model(ids, labels=ids, use_cache=False)
    out.loss.backward()
    return {"logits": out.logits.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def compare(actual, truth, baseline):
    """assert_close over two dicts of tensors with the same keys."""
    assert actual.keys() == truth.keys() == baseline.keys()
    for name, value in actual.items():
        assert_close(value, truth[name], baseline[name], name)


def compare_pooled(actual, truth, baseline):
    """Like compare, but all gradients at once, each in units of its own size.

    A bias of four values is too small a sample of rounding noise where every sum is taken in another order.
    """
    dtype = actual["logits"].dtype
    assert_close(actual.pop("logits"), truth.pop("logits"), baseline.pop("logits"), "logits")
    assert actual.keys() == truth.keys() == baseline.keys()

    def pool(gradients):
        return torch.cat([(g.double() / truth[n].square().mean().sqrt()).flatten() for n, g in gradients.items()])

    assert_close(pool(actual).to(dtype), pool(truth), pool(baseline).to(dtype), "gradients")


@pytest.mark.parametrize("name", MODELS)
def test_model_equals_eager(name, device):
    ids = make_ids(device)
    truth = loss_and_gradients(make_model(name, device, torch.float64), ids)
    model = make_model(name, device)
    baseline = loss_and_gradients(model, ids)
    report = gossamer.replace(model)
    assert all(m.fused for m in report.switched)
    compare(loss_and_gradients(model, ids), truth, baseline)
    assert any("experts" in n for n in truth)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_model_equals_eager_in_bfloat16(name, device):
    ids = make_ids(device)
    model = make_model(name, device, torch.bfloat16)
    # The truth has the rounded weights, so that only the arithmetic differs.
    truth = loss_and_gradients(copy.deepcopy(model).double(), ids)
    baseline = loss_and_gradients(model, ids)
    gossamer.replace(model)
    compare_pooled(loss_and_gradients(model, ids), truth, baseline)


@pytest.mark.parametrize("name", MODELS)
def test_generate_is_token_for_token_equal(name, device):
    model = make_model(name, device).eval()
    ids = make_ids(device, batch=1, length=5)
    settings = dict(max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    expected = model.generate(ids, **settings)
    gossamer.replace(model)
    assert torch.equal(model.generate(ids, **settings), expected)
    assert expected.shape == (1, 17)


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_gradient_checkpointing_gives_the_same_gradients(name, device):
    model = make_model(name, device, implementation="gossamer")
    ids = make_ids(device)
    expected = loss_and_gradients(model, ids)
    model.gradient_checkpointing_enable()
    actual = loss_and_gradients(model, ids)
    assert all(torch.equal(actual[n], expected[n]) for n in expected)


@pytest.mark.parametrize(
    ("name", "backend"),
    [("mixtral", "inductor"), *((n, "aot_eager") for n in ("qwen3_moe", "deepseek_v3", "gpt_oss"))],
)
def test_compile_without_graph_breaks(name, backend, device):
    model = make_model(name, device, implementation="gossamer")
    ids = make_ids(device)
    truth = loss_and_gradients(make_model(name, device, torch.float64), ids)
    baseline = loss_and_gradients(model, ids)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    out = compiled(ids, labels=ids, use_cache=False)
    model.zero_grad(set_to_none=True)
    out.loss.backward()
    actual = {"logits": out.logits.detach()}
    actual |= {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    compare_pooled(actual, truth, baseline)


def test_save_and_load(tmp_path, device):
    model = make_model("gpt_oss", device, implementation="gossamer").eval()
    assert "gossamer" not in json.dumps(model.config.to_dict())
    model.save_pretrained(tmp_path)
    assert "gossamer" not in (tmp_path / "config.json").read_text()
    ids = make_ids(device)
    expected = model(ids).logits
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="gossamer").to(device)
    assert loaded.config._experts_implementation == "gossamer"
    assert torch.equal(loaded(ids).logits, expected)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert plain.config._experts_implementation != "gossamer"


def test_replace_and_restore_leave_the_state_alone(device):
    model = make_model("deepseek_v2", device)
    before = {n: (t.data_ptr(), t.clone()) for n, t in model.state_dict().items()}
    ids = make_ids(device)
    expected = model(ids).logits
    report = gossamer.replace(model)
    assert model.get_experts_implementation() == {"": "gossamer"}
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(t.data_ptr() == before[n][0] and torch.equal(t, before[n][1]) for n, t in after.items())
    assert str(report) == (
        "gossamer computes 1 of 1 experts modules\n  model.layers.1.mlp.experts: DeepseekV2Experts, fused: swiglu"
    )
    gossamer.replace(model)
    gossamer.restore(model)
    assert model.get_experts_implementation() == {"": "eager"}
    assert torch.equal(model(ids).logits, expected)
    with pytest.raises(ValueError, match=r"model must be one that gossamer\.replace switched"):
        gossamer.restore(model)
    model.set_experts_implementation("gossamer")
    model.set_experts_implementation("eager")
    assert torch.equal(model(ids).logits, expected)


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


def layer_inputs(device, dtype, num_experts=5, top_k=2, num_tokens=19, **routing):
    """Hidden states, ids (popular and empty experts) and weights, differentiable where they can be."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(num_tokens, 16, generator=generator, dtype=torch.float64)
    ids = random_expert_ids(num_tokens, num_experts, top_k, skew="zipf", device=device, **routing)
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


def check_layer(module, device, **inputs):
    """Our forward against eager in float32, with float64 eager as truth."""
    truth = layer_results(eager_forward, module.double(), *layer_inputs(device, torch.float64, **inputs))
    args = layer_inputs(device, torch.float32, **inputs)
    single = module.float()
    compare(layer_results(experts_forward, single, *args), truth, layer_results(eager_forward, single, *args))


@pytest.mark.parametrize("top_k", [2, 5])
def test_expert_parallel_sentinels_are_dropped(top_k, device):
    # Nonzero weights on the dropped slots: nothing but the id says that they are foreign.
    check_layer(make_experts(MixtralExperts, device), device, top_k=top_k, dropped=0.4)


@pytest.mark.parametrize("hidden_act", ["silu", "tanh"])
def test_fewer_local_experts_than_slots(hidden_act, device):
    module = make_experts(MixtralExperts, device, num_experts=2, hidden_act=hidden_act)
    x, ids, weights = layer_inputs(device, torch.float64, num_experts=6, top_k=4)
    ids = torch.where(ids < 2, ids, 2)
    truth = layer_results(eager_forward, module, x, ids, weights)
    single = module.float()
    args = (single, x.float(), ids, weights.float())
    compare(layer_results(experts_forward, *args), truth, layer_results(eager_forward, *args))


@pytest.mark.parametrize("hidden_act", ["gelu", "gelu_pytorch_tanh", "gelu_new", "relu", "swish", "tanh", "quick_gelu"])
def test_activations(hidden_act, device):
    module = make_experts(MixtralExperts, device, hidden_act=hidden_act)
    fused = gossamer.replace(module).switched[0].fused
    assert fused == (hidden_act not in ("tanh", "quick_gelu"))
    check_layer(module, device)


@pytest.mark.parametrize("hidden_act", ["relu2", "silu", "gelu", "sigmoid"])
def test_ungated_experts(hidden_act, device):
    module = make_experts(NemotronHExperts, device, mlp_hidden_act=hidden_act)
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


def test_the_path_follows_the_module_as_it_is_now(device):
    module = make_experts(GptOssExperts, device)
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


def test_import_of_gossamer_needs_no_transformers():
    code = """
import sys, types
import gossamer
assert not any(name.split(".")[0] == "transformers" for name in sys.modules), "gossamer imported transformers"
old = types.ModuleType("transformers")
old.__version__ = "4.57.0"
for stand_in in (None, old):
    sys.modules["transformers"] = stand_in
    try:
        gossamer.replace(None)
    except ImportError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    missing, old = done.stdout.splitlines()
    assert missing == "gossamer's transformers integration needs transformers 5: pip install 'gossamer[transformers]'"
    assert old.startswith("gossamer's transformers integration needs transformers 5 or later, got 4.57.0")
