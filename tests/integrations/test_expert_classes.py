"""Expert classes of transformers that do not use an experts implementation, in whole models against the originals."""

import copy
import importlib.util
import os
import pickle
import re
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from contracts import assert_near

import gossamer

if importlib.util.find_spec("transformers") is None:
    pytest.skip("transformers is not installed", allow_module_level=True)

import transformers
from transformers import AutoModelForCausalLM

from gossamer.integrations.expert_classes import LAYOUTS, LEFT

MODELS = Path(transformers.__file__).parent / "models"
SHARED = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
CONFIGS = {
    "jetmoe": ("JetMoeConfig", dict(kv_channels=8, num_local_experts=5, num_experts_per_tok=2)),
    "dbrx": (
        "DbrxConfig",
        dict(
            d_model=32,
            n_heads=4,
            n_layers=2,
            max_seq_len=64,
            attn_config=dict(kv_n_heads=2, clip_qkv=8.0, rope_theta=10000.0),
            ffn_config=dict(hidden_size=32, ffn_hidden_size=24, moe_num_experts=5, moe_top_k=2),
        ),
    ),
    "llama4": (
        "Llama4TextConfig",
        dict(
            intermediate_size_mlp=24,
            num_local_experts=5,
            num_experts_per_tok=2,
            head_dim=8,
            interleave_moe_layer_step=1,
            attention_chunk_size=16,
        ),
    ),
    "longcat_flash": (
        "LongcatFlashConfig",
        dict(
            num_hidden_layers=4,
            ffn_hidden_size=24,
            expert_ffn_hidden_size=16,
            q_lora_rank=8,
            kv_lora_rank=8,
            qk_nope_head_dim=8,
            qk_rope_head_dim=8,
            v_head_dim=8,
            head_dim=8,
            num_key_value_heads=4,
            moe_topk=3,
            n_routed_experts=4,
            zero_expert_num=3,
        ),
    ),
    "doge": ("DogeConfig", dict(is_moe=True, num_experts=40, num_experts_per_tok=4, keep_window_size=64)),
}
SWITCHED = {
    "jetmoe": {"JetMoeMoA", "JetMoeMoE"},
    "dbrx": {"DbrxExperts"},
    "llama4": {"Llama4TextMoe"},
    "longcat_flash": {"LongcatFlashExperts"},
    "doge": {"DogeCDMoE"},
}


def make_model(name, device, dtype=torch.float64):
    """A model whose weights depend on its name alone, large enough that experts and routing matter."""
    class_name, own = CONFIGS[name]
    config = getattr(transformers, class_name)(**(SHARED | own))
    model = AutoModelForCausalLM.from_config(config).double()
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(0.3 * noise if parameter.dim() > 1 or "bias" in key else 1 + 0.1 * noise)
    return model.to(dtype).to(device).train()


def make_ids(device, batch=2, length=11, draw=1):
    return torch.randint(3, 96, (batch, length), generator=torch.Generator().manual_seed(draw)).to(device)


def logits_and_gradients(model, ids, mask=None):
    model.zero_grad(set_to_none=True)
    out = model(ids, attention_mask=mask, labels=ids, use_cache=False)
    out.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": out.logits.detach(), "loss": out.loss.detach()} | gradients


# The routing weights of these models, and their gradients, are float32 even in a float64 model.
FLOAT32_WEIGHTS = {"longcat_flash"}


def assert_same_results(found, expected, dtype):
    """Equal to rounding in ``dtype``."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert_near(found[name].to(dtype), value.to(dtype), slack=2**16 if dtype == torch.float64 else 64)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_model_equals_the_original(name, device):
    """Logits and every gradient, with padding too; restored, the same bits as before."""
    model = make_model(name, device)
    ids, mask = make_ids(device), torch.ones(2, 11, dtype=torch.int64, device=device)
    mask[1, :3] = 0
    expected = [logits_and_gradients(model, ids, m) for m in (None, mask)]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    report = gossamer.replace(model)
    assert {m.class_name for m in report.switched} == SWITCHED[name] and not report.skipped
    assert len(report.switched) == 2 * len(SWITCHED[name])
    for m, results in zip((None, mask), expected, strict=True):
        dtype = torch.float32 if name in FLOAT32_WEIGHTS else torch.float64
        assert_same_results(logits_and_gradients(model, ids, m), results, dtype)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    gossamer.restore(model)
    for key, value in logits_and_gradients(model, ids).items():
        assert torch.equal(value, expected[0][key]), key


@pytest.mark.parametrize("name", list(CONFIGS))
def test_generate_is_token_for_token_equal(name, device):
    model = make_model(name, device, torch.float32).eval()
    ids = make_ids(device, length=6)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    settings = dict(max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0, attention_mask=mask)
    expected = model.generate(ids, **settings)
    gossamer.replace(model)
    assert torch.equal(model.generate(ids, **settings), expected)
    assert expected.shape == (2, 18)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_bfloat16(name, device):
    """In 16 bits the layers give their own dtype, near the original's."""
    model = make_model(name, device, torch.bfloat16).eval()
    ids = make_ids(device)
    with torch.no_grad():
        truth = copy.deepcopy(model).double()(ids, use_cache=False).logits
        plain = model(ids, use_cache=False).logits
        gossamer.replace(model)
        ours = model(ids, use_cache=False).logits
    assert ours.dtype == plain.dtype
    error, baseline = ((x.double() - truth).square().mean().sqrt() for x in (ours, plain))
    # Rounding changes which experts some tokens get, in either model.
    assert error <= 2 * baseline


def test_jetmoe_records_its_logits(device):
    model = make_model("jetmoe", device).eval()
    ids = make_ids(device)
    with torch.no_grad():
        before = model(ids, output_router_logits=True, use_cache=False)
        gossamer.replace(model)
        after = model(ids, output_router_logits=True, use_cache=False)
    assert len(before.router_logits) == len(after.router_logits) == 4
    for left, right in zip(before.router_logits, after.router_logits, strict=True):
        assert_near(right, left)
    assert_near(after.aux_loss, before.aux_loss)


def test_jetmoe_compiles(device):
    """The original cannot be compiled whole, for it reads counts on the host."""
    torch._dynamo.reset()
    model = make_model("jetmoe", device, torch.float32).eval()
    gossamer.replace(model)
    ids = make_ids(device)
    with torch.no_grad():
        expected = model.model(ids, use_cache=False).last_hidden_state
        layer = model.model.layers[0]
        compiled = torch.compile(layer.mlp, fullgraph=True, backend="aot_eager")
        x = model.model.embed_tokens(ids)
        assert_near(compiled(x), layer.mlp(x))
        model.model.layers[0].mlp = compiled
        assert_near(model.model(ids, use_cache=False).last_hidden_state, expected)


def test_copies_and_pickles(device):
    """Copies and pickles of a switched model are switched, and restored by themselves."""
    model = make_model("jetmoe", device).eval()
    ids = make_ids(device)
    with torch.no_grad():
        plain = model(ids, use_cache=False).logits
        gossamer.replace(model)
        expected = model(ids, use_cache=False).logits
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert type(other.model.layers[0].mlp) is type(model.model.layers[0].mlp)
            assert torch.equal(other(ids, use_cache=False).logits, expected)
            gossamer.restore(other)
            assert torch.equal(other(ids, use_cache=False).logits, plain)
    assert torch.equal(model(ids, use_cache=False).logits, expected)
    with pytest.raises(ValueError, match="must hold experts modules"):
        gossamer.replace(model)


@pytest.mark.parametrize("limit", [None, 0.6])
def test_step3p7(device, limit):
    """Its experts alone, with and without the clamp; ids of no expert are dropped."""
    from transformers.models.step3p7.modeling_step3p7 import Step3p7Experts

    config = transformers.PreTrainedConfig(
        num_local_experts=5, hidden_size=32, moe_intermediate_size=24, hidden_act="silu"
    )
    plain = Step3p7Experts(config, swiglu_limit=limit).double().to(device)
    torch.nn.init.normal_(plain.gate_up_proj, std=0.3)
    torch.nn.init.normal_(plain.down_proj, std=0.3)
    ours = copy.deepcopy(plain)
    (switched,) = gossamer.replace(ours).switched
    assert switched.fused == (limit is None)
    ids = torch.rand(13, 6, device=device).argsort(1)[:, :3]
    results = []
    for experts in (plain, ours):
        x = torch.randn(13, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(device)
        weights = torch.rand(13, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).to(device)
        leaves = x.requires_grad_(), weights.requires_grad_(), *experts.parameters()
        y = experts(leaves[0], ids, leaves[1])
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for found, expected in zip(*reversed(results), strict=True):
        assert_near(found, expected)


def test_longcat_with_more_slots_than_experts(device):
    """A token may have more slots than there are routed experts, the rest being the identity."""
    from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashExperts

    config = transformers.PreTrainedConfig(
        expert_ffn_hidden_size=16, hidden_size=32, n_routed_experts=2, zero_expert_num=4, hidden_act="gelu"
    )
    plain = LongcatFlashExperts(config).double().to(device)
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ours = copy.deepcopy(plain)
    gossamer.replace(ours)
    x = torch.randn(13, 32, dtype=torch.float64, device=device)
    ids = torch.rand(13, 6, device=device).argsort(1)[:, :4]
    weights = torch.rand(13, 4, dtype=torch.float64, device=device)
    assert_near(ours(x, ids, weights), plain(x, ids, weights))


def test_left_alone(device):
    """Layers made of separate modules, or with hooks inside, are left alone and listed with the reason."""
    config = transformers.SwitchTransformersConfig(
        vocab_size=40, d_model=16, d_ff=24, num_layers=2, num_heads=2, d_kv=8, num_experts=3, decoder_start_token_id=0
    )
    model = transformers.SwitchTransformersForConditionalGeneration(config)
    with pytest.raises(ValueError, match=r"SwitchTransformersExperts.*form no stack"):
        gossamer.replace(model)
    report = gossamer.replace(model, strict=False)
    assert not report.switched and all("form no stack" in m.reason for m in report.skipped) and report.skipped
    model = make_model("jetmoe", device)
    handle = model.model.layers[1].mlp.input_linear.register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match=r"layers.1.mlp \(JetMoeMoE\): its input_linear has hooks"):
        gossamer.replace(model)
    assert type(model.model.layers[0].mlp).__module__.startswith("transformers")
    report = gossamer.replace(model, strict=False)
    assert [m.name for m in report.skipped] == ["model.layers.1.mlp"] and len(report.switched) == 3
    handle.remove()


def undecorated_classes():
    """Folder and name of every expert class that does not use an experts implementation, read from the sources."""
    decorated = re.compile(r"^@use_experts_implementation(?:\([^)]*\))?\n(?:@.*\n)*class (\w+)", re.MULTILINE)
    experts = re.compile(r"^class (\w*(?:Experts|ParallelExperts|NaiveMoe|CDMoE|MoA)\w*)\(", re.MULTILINE)
    for path in sorted(MODELS.glob("*/modeling_*.py")):
        text = path.read_text(encoding="utf-8")
        for name in set(experts.findall(text)) - set(decorated.findall(text)):
            yield path.parent.name, name


def test_every_class_is_known():
    """A class of the installed transformers is computed, left with a reason, or a part of one of these."""
    parts = {
        ("aria", "AriaSharedExpertsMLP"),  # dense
        ("inkling", "InklingSharedExperts"),  # dense
        ("jetmoe", "JetMoeParallelExperts"),  # weights of JetMoeMoE and JetMoeMoA
        ("llama4", "Llama4TextExperts"),  # weights of Llama4TextMoe
    }
    found = set(undecorated_classes())
    assert len(found) >= 10
    assert found - set(LAYOUTS) - set(LEFT) - parts == set()


def test_every_folder_with_experts_is_known():
    """No model has experts by any other name: folders that speak of several experts use the interface or are listed."""
    known = {folder for folder, _ in (*LAYOUTS, *LEFT)}
    for path in sorted(MODELS.glob("*/modeling_*.py")):
        text = path.read_text(encoding="utf-8")
        speaks = len(re.findall(r"num_experts\b|num_local_experts|n_routed_experts", text)) > 2
        if speaks and "use_experts_implementation" not in text:
            assert path.parent.name in known, path.parent.name
    for folder, name in (*LAYOUTS, *LEFT):
        assert re.search(rf"^class {name}\(", (MODELS / folder / f"modeling_{folder}.py").read_text(), re.MULTILINE)
