"""The transformers integration in whole models, against transformers' own eager experts."""

import copy
import functools
import json
import os
import subprocess
import sys

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from eager_draws import compare

pytest.importorskip("transformers", minversion="5")

import transformers
from transformers import AutoModelForCausalLM

import gossamer
import gossamer.integrations.transformers

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


def make_config(name, **changes):
    """The small config of a model."""
    class_name, own = CONFIGS[name]
    return getattr(transformers, class_name)(**(SHARED | own | changes))


def make_model(name, device, dtype=torch.float32, implementation="eager", **changes):
    """A model whose weights depend on its name alone, large enough that experts and routing matter."""
    config = make_config(name, **changes)
    model = AutoModelForCausalLM.from_config(config, experts_implementation=implementation).double()
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(0.25 * noise if parameter.dim() > 1 or "bias" in name else 1 + 0.1 * noise)
    return model.to(dtype).to(device).train()


def make_ids(device, batch=2, length=11, draw=1):
    """Token ids without the special ones."""
    return torch.randint(3, 96, (batch, length), generator=torch.Generator().manual_seed(draw)).to(device)


def loss_and_gradients(model, ids):
    """Logits and the gradient of every parameter."""
    model.zero_grad(set_to_none=True)
    out = model(ids, labels=ids, use_cache=False)
    out.loss.backward()
    gradients = {n.removeprefix("_orig_mod."): p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": out.logits.detach()} | gradients


def compare_models(ours, plain, wide, device):
    """Logits and all gradients of models, each parameter's in units of its own size; ``wide`` is the float64 truth.

    Gradients are compared together: that of a key bias, say, is what is left when larger numbers cancel, and a few
    numbers of that kind are too small a sample of rounding noise.
    """

    @functools.cache
    def exact(draw):
        return loss_and_gradients(wide, make_ids(device, draw=draw))

    def results(model):
        def call(draw):
            gradients = loss_and_gradients(model, make_ids(device, draw=draw))
            assert gradients.keys() == exact(draw).keys()
            logits = gradients.pop("logits")
            scaled = [g.double() / exact(draw)[n].square().mean().sqrt() for n, g in gradients.items()]
            return {"logits": logits, "gradients": torch.cat([g.flatten() for g in scaled]).to(logits.dtype)}

        return call

    compare(results(ours), results(plain), results(wide))


@pytest.mark.parametrize("name", MODELS)
def test_model_equals_eager(name, device):
    wide, plain, ours = (make_model(name, device, dtype) for dtype in (torch.float64, torch.float32, torch.float32))
    report = gossamer.replace(ours)
    assert report.switched
    assert all(m.fused for m in report.switched)
    compare_models(ours, plain, wide, device)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_model_equals_eager_in_bfloat16(name, device):
    plain, ours = (make_model(name, device, torch.bfloat16) for _ in range(2))
    gossamer.replace(ours)
    # The truth has the rounded weights, so that only the arithmetic differs.
    compare_models(ours, plain, copy.deepcopy(plain).double(), device)


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
    # Inductor compiles every layer to C++; they are all alike.
    changes = {"num_hidden_layers": 1} if backend == "inductor" else {}
    model = make_model(name, device, implementation="gossamer", **changes)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    plain, wide = (make_model(name, device, dtype, **changes) for dtype in (torch.float32, torch.float64))
    compare_models(compiled, plain, wide, device)


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
    assert model.config._experts_implementation == "gossamer"
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(t.data_ptr() == before[n][0] and torch.equal(t, before[n][1]) for n, t in after.items())
    assert str(report) == (
        "gossamer computes 1 of 1 experts modules\n  model.layers.1.mlp.experts: DeepseekV2Experts, fused: swiglu"
    )
    gossamer.replace(model)
    gossamer.restore(model)
    assert model.config._experts_implementation == "eager"
    assert torch.equal(model(ids).logits, expected)
    with pytest.raises(ValueError, match=r"model must be one that gossamer\.replace switched"):
        gossamer.restore(model)
    model.set_experts_implementation("gossamer")
    model.set_experts_implementation("eager")
    assert torch.equal(model(ids).logits, expected)


def test_copies_and_models_around_are_restored(device):
    """Restoring a copy leaves the model that was copied unchanged."""
    model = make_model("qwen3_moe", device)
    before = model.config._experts_implementation
    gossamer.replace(model)
    for other in (copy.deepcopy(model), torch.nn.Sequential(copy.deepcopy(model))):
        gossamer.restore(other)
        inner = other if other.__class__ is model.__class__ else other[0]
        assert inner.config._experts_implementation == before
        assert model.config._experts_implementation == "gossamer"
        with pytest.raises(ValueError, match=r"model must be one that gossamer\.replace switched"):
            gossamer.restore(other)
    gossamer.restore(torch.nn.Sequential(model))
    assert model.config._experts_implementation == before


def test_a_forward_of_ones_own_is_left_alone(device):
    """A subclass with its own forward does not use the implementation; one whose forward calls its base's does."""
    base = transformers.models.mixtral.modeling_mixtral.MixtralExperts

    class Own(base):
        def forward(self, hidden_states, top_k_index, top_k_weights):
            return torch.zeros_like(hidden_states)

    class Watched(base):
        def forward(self, *args):
            return super().forward(*args)

    config = transformers.MixtralConfig(hidden_size=16, intermediate_size=8, num_local_experts=4)
    with pytest.raises(ValueError, match=r"\(Own\): Own.forward does not use an experts implementation"):
        gossamer.replace(torch.nn.ModuleList([Own(config)]).to(device))
    assert "computes 1 of 1" in str(gossamer.replace(torch.nn.ModuleList([Watched(config)]).to(device)))


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
