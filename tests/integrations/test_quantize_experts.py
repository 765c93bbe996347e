"""gossamer.quantize_experts and load_quantized_experts: whole models of transformers and gossamer's own layers."""

import copy
import importlib

import pytest
import torch

import gossamer
from gossamer import QuantizedExpertWeight
from gossamer.nn import QuantizedExpertStack, QuantizedLinear
from gossamer.ops import quantized_expert_weight

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts_per_tok": 2,
}
FORMATS = ["fp8", "fp8_block", "int8", "int4", "mxfp4"]


def qwen():
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(**SIZES, moe_intermediate_size=128, num_experts=4, head_dim=32)
    return transformers.Qwen3MoeForCausalLM(config).eval()


def gpt_oss():
    torch.manual_seed(0)
    config = transformers.GptOssConfig(**SIZES, intermediate_size=96, num_local_experts=4, head_dim=32)
    model = transformers.GptOssForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if "bias" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def experts_of(model):
    return [m for m in model.modules() if hasattr(m, "gate_up_proj") and hasattr(m, "num_experts")]


def dequantized(model):
    """The same model with the floats that the codes stand for."""
    plain = copy.deepcopy(model)
    for module in plain.modules():
        for name in ("gate_up_proj", "down_proj"):
            held = module._modules.get(name)
            if isinstance(held, QuantizedExpertStack):
                del module._modules[name]
                dense = held.weight().dequantize()
                dense = dense.transpose(1, 2).contiguous() if module.is_transposed else dense
                setattr(module, name, torch.nn.Parameter(dense))
    for parent in list(plain.modules()):
        for name, module in parent.named_children():
            if isinstance(module, QuantizedLinear):
                setattr(parent, name, module.to_linear())
    gossamer.replace(plain)
    return plain


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("make", [qwen, gpt_oss])
def test_a_model_computes_what_its_codes_say(make, weight_format):
    """Logits are those of the model with dequantised floats; memory falls as the format promises."""
    model = make()
    ids = torch.randint(64, (2, 9))
    before = sum(p.nbytes for p in model.parameters())
    own = sum(e.gate_up_proj.nbytes + e.down_proj.nbytes for e in experts_of(model))
    report = gossamer.quantize_experts(model, weight_format)
    assert report.before == own and len(report.modules) == 2 and not report.skipped
    after = sum(t.nbytes for t in (*model.parameters(), *model.buffers()) if t.dtype != torch.float64)
    assert sum(p.nbytes for p in model.parameters()) == before - own
    assert report.after < own / (3 if weight_format in ("fp8", "fp8_block", "int8") else 6) and after < before
    assert f"{report.before} to {report.after} bytes" in str(report)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, dequantized(model)(ids).logits)


@pytest.mark.parametrize("weight_format", FORMATS)
def test_linear_layers_too(weight_format):
    """Attention and head by the same codes, a step and a prompt; routers and the head that is the embedding's stay."""
    model, ids = qwen(), torch.randint(64, (2, 9))
    report = gossamer.quantize_experts(model, weight_format, include_linears=True)
    paths = {m.name for m in report.modules}
    assert len(paths) == 2 * (1 + 4) + 1 and "lm_head" in paths and "model.layers.1.self_attn.q_proj" in paths
    assert not report.skipped and report.after < report.before / 3
    plain = dequantized(model)
    assert not any(isinstance(m, QuantizedLinear) for m in plain.modules())
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, plain(ids).logits)
        torch.testing.assert_close(model(ids[:1, :1]).logits, plain(ids[:1, :1]).logits)
    model = qwen()
    model.lm_head.weight = model.model.embed_tokens.weight
    report = gossamer.quantize_experts(model, weight_format, include_linears=True)
    assert [s.name for s in report.skipped] == ["lm_head"] and "another module's" in str(report)
    assert type(model.lm_head) is torch.nn.Linear


def test_rounded_activations(tmp_path):
    """Experts and linear layers round their rows on demand, which files of transformers keep and the state does not."""
    model, ids = qwen(), torch.randint(64, (2, 9))
    gossamer.quantize_experts(model, "int4", include_linears=True, activations="int8")
    stacks = [m for m in model.modules() if isinstance(m, QuantizedExpertStack)]
    assert {m.activations for m in stacks} == {"int8"} and "activations=int8" in repr(stacks[0])
    plain = dequantized(model)
    with torch.no_grad():
        rounded, exact = model(ids).logits, plain(ids).logits
    assert 1e-4 < (rounded - exact).norm() / exact.norm() < 0.05
    fresh = qwen()
    gossamer.load_quantized_experts(fresh, model.state_dict(), activations="int8")
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(ids).logits, rounded)
    importlib.import_module("gossamer.integrations.transformers")
    model.save_pretrained(tmp_path)
    assert torch.equal(transformers.Qwen3MoeForCausalLM.from_pretrained(tmp_path)(ids).logits, rounded)
    for stack in stacks:
        stack.activations = "float"
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, exact)
    other = qwen()
    gossamer.quantize_experts(other, "fp8")
    with pytest.raises(ValueError, match="activations can be 'int8' for the formats"):
        gossamer.quantize_experts(qwen(), "fp8", activations="int8")
    with pytest.raises(ValueError, match="activations can be 'int8' for the formats"):
        gossamer.load_quantized_experts(qwen(), other.state_dict(), activations="int8")


def test_chosen_linear_layers_saved_and_loaded(tmp_path):
    """A function chooses; a layer keeps its hooks; state and files hold the codes, and a part with gradients trains."""
    model, ids, calls = qwen(), torch.randint(64, (1, 5)), []
    layer = model.model.layers[0].self_attn.o_proj
    layer.register_forward_hook(lambda *_: calls.append(1))
    report = gossamer.quantize_experts(model, "int4", include_linears=lambda name, _: name.endswith(("o_proj", "head")))
    assert sum("experts" not in m.name for m in report.modules) == 3 and type(layer) is QuantizedLinear
    expected = model(ids).logits
    assert calls
    expected.sum().backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad.any()
    fresh = qwen()
    report = gossamer.load_quantized_experts(fresh, model.state_dict())
    assert len(report.used) == 2 * (2 * 2 + 3)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(ids).logits, expected)
    importlib.import_module("gossamer.integrations.transformers")
    model.save_pretrained(tmp_path)
    found = transformers.Qwen3MoeForCausalLM.from_pretrained(tmp_path)
    assert type(found.lm_head) is QuantizedLinear and torch.equal(found(ids).logits, expected)
    with pytest.raises(TypeError, match="include_linears must be a bool or a function, got str"):
        gossamer.quantize_experts(model, "int8", include_linears="all")


def test_saved_loaded_cast_and_moved(tmp_path):
    """Safetensors and back into a fresh model; casting the model leaves codes and scales as they are."""
    model, ids = gpt_oss(), torch.randint(64, (1, 5))
    gossamer.quantize_experts(model, "mxfp4")
    expected = model(ids).logits
    safetensors.save_file(model.state_dict(), tmp_path / "model.safetensors")
    tensors = safetensors.load_file(tmp_path / "model.safetensors")
    fresh = gpt_oss()
    report = gossamer.load_quantized_experts(fresh, tensors)
    assert len(report.used) == 8 and set(report.used) <= tensors.keys()
    missing = fresh.load_state_dict(tensors, strict=True)
    assert not missing.missing_keys and not missing.unexpected_keys
    assert torch.equal(fresh(ids).logits, expected)
    for weight_format in ("fp8", "int4"):
        model = qwen()
        gossamer.quantize_experts(model, weight_format)
        held = experts_of(model)[0].down_proj
        dtypes, data = (held.data.dtype, held.scale.dtype), held.data.clone()
        model.to(torch.bfloat16)
        assert (held.data.dtype, held.scale.dtype) == dtypes
        assert torch.equal(held.data.view(torch.uint8), data.view(torch.uint8))
        assert model(ids).logits.dtype == torch.bfloat16
        assert copy.deepcopy(model).to("meta").model.layers[0].mlp.experts.down_proj.data.is_meta


def test_gpt_oss_checkpoint():
    """Blocks and scales under gpt-oss's names, into experts that were never allocated."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    model, ids = gpt_oss(), torch.randint(64, (1, 7))
    tensors, shapes = {}, {"gate_up_proj": (4, 192, 2), "down_proj": (4, 64, 3)}
    for layer in range(2):
        experts = model.model.layers[layer].mlp.experts
        for name, (e, n, groups) in shapes.items():
            key = f"model.layers.{layer}.mlp.experts.{name}"
            tensors[f"{key}_blocks"] = torch.randint(256, (e, n, groups, 16), dtype=torch.uint8)
            tensors[f"{key}_scales"] = torch.randint(118, 124, (e, n, groups), dtype=torch.uint8)
            dense = convert_moe_packed_tensors(tensors[f"{key}_blocks"], tensors[f"{key}_scales"], dtype=torch.float32)
            getattr(experts, name).data.copy_(dense)
    with torch.no_grad():
        expected = model(ids).logits
    for layer in range(2):
        experts = model.model.layers[layer].mlp.experts
        experts.gate_up_proj = torch.nn.Parameter(torch.empty(4, 64, 192, device="meta"))
    report = gossamer.load_quantized_experts(model, tensors)
    assert set(report.used) == tensors.keys()
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected)


@pytest.mark.parametrize("names", [("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")])
def test_deepseek_checkpoint(names):
    """One fp8 matrix an expert with scales in blocks of 128, gate and up apart."""
    model, ids = qwen(), torch.randint(64, (1, 7))
    tensors = {}
    for layer in range(2):
        experts = model.model.layers[layer].mlp.experts
        parts = (*experts.gate_up_proj.data.chunk(2, dim=1), experts.down_proj.data)
        for name, part in zip(names, parts, strict=True):
            quantized = QuantizedExpertWeight.quantize(part, "fp8_block")
            part.copy_(quantized.dequantize())
            for e in range(4):
                key = f"model.layers.{layer}.mlp.experts.{e}.{name}"
                tensors[f"{key}.weight"], tensors[f"{key}.weight_scale_inv"] = quantized.data[e], quantized.scale[e]
    with torch.no_grad():
        expected = model(ids).logits
    report = gossamer.load_quantized_experts(model, tensors)
    assert {m.format for m in report.modules} == {"fp8_block"} and set(report.used) == tensors.keys()
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected)
    del tensors[f"model.layers.1.mlp.experts.3.{names[1]}.weight"]
    with pytest.raises(ValueError, match=f"3.{names[1]}.weight is missing"):
        gossamer.load_quantized_experts(qwen(), tensors)


def test_own_layers_and_adapters_over_codes():
    """MoE gives what its codes say; a LoRA layer over quantised experts trains its factors and nothing else."""
    x = torch.randn(5, 64)
    for transposed in (False, True):
        moe = gossamer.nn.MoE(64, 32, 4, 2, bias=True, transposed=transposed)
        plain = copy.deepcopy(moe)
        gossamer.quantize_experts(moe, "int4")
        for name in ("gate_up_proj", "down_proj"):
            dense = getattr(moe.experts, name).weight().dequantize()
            getattr(plain.experts, name).data.copy_(dense.transpose(1, 2) if transposed else dense)
        torch.testing.assert_close(moe(x), plain(x))
    lora = gossamer.nn.LoRAExperts.from_experts(gossamer.nn.Experts(4, 64, 32), 4)
    gossamer.quantize_experts(lora, "mxfp4")
    ids, weights = torch.randint(4, (5, 2)), torch.rand(5, 2)
    y = lora(x.requires_grad_(), ids, weights)
    y.square().sum().backward()
    assert x.grad.abs().sum() > 0
    trained = {name for name, p in lora.named_parameters() if p.grad is not None}
    assert trained == {f"{w}_lora_{f}" for w in ("gate_up_proj", "down_proj") for f in "AB"}


@pytest.mark.parametrize(("held", "given"), [("int4", "mxfp4"), ("fp8", "int8"), ("int8", "fp8"), ("mxfp4", "int4")])
def test_a_state_of_another_format_is_refused(held, given):
    """Codes of one format mean other numbers in another, although torch would copy them into its buffers."""
    first, second = gossamer.nn.MoE(64, 64, 4, 2), gossamer.nn.MoE(64, 64, 4, 2)
    gossamer.quantize_experts(first, held)
    gossamer.quantize_experts(second, given)
    x = torch.randn(5, 64)
    state = second.state_dict()
    with pytest.raises(RuntimeError, match=f"gate_up_proj.* must be torch.*, as {held} is held here, got torch"):
        first.load_state_dict(state)
    gossamer.load_quantized_experts(first, state)
    first.load_state_dict(state)
    assert torch.equal(first(x), second(x))


def packed_checkpoint():
    """Symmetric int4 of one layer, one matrix an expert."""
    tensors = {}
    for e in range(4):
        for name, (n, c) in {"gate_proj": (32, 64), "up_proj": (32, 64), "down_proj": (64, 32)}.items():
            tensors[f"experts.{e}.{name}.weight_packed"] = torch.randint(-(2**31), 2**31, (n, c // 8)).int()
            tensors[f"experts.{e}.{name}.weight_scale"] = torch.rand(n, c // 32)
    return tensors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"experts.0.up_proj.weight_zero_point": torch.zeros(4, 2)},
            "symmetric int4.* got experts.0.up_proj.weight_zero",
        ),
        (
            {"experts.0.down_proj.weight_g_idx": torch.arange(32)},
            "columns in order, got experts.0.down_proj.weight_g_idx",
        ),
        ({"experts.2.up_proj.weight_scale": torch.rand(32, 1)}, r"one shape and dtype: .*0.up_proj.* \(32, 1\)"),
        ({"experts.gate_up_proj_blocks": torch.zeros(4, 64, 2, 16)}, "hold experts.gate_up_proj_scales beside"),
        ({"experts.gate_up_proj.data": torch.zeros(4, 64, 64)}, "hold experts.gate_up_proj.scale beside"),
        ({"experts.down_proj_scale_inv": torch.zeros(4, 64)}, "hold experts.down_proj beside"),
    ],
)
def test_checkpoints_that_are_not_read(change, message):
    """The error names the tensor, and the layer is unchanged."""
    moe = gossamer.nn.MoE(64, 32, 4, 2)
    with pytest.raises(ValueError, match=message):
        gossamer.load_quantized_experts(moe, packed_checkpoint() | change)
    assert isinstance(moe.experts.gate_up_proj, torch.nn.Parameter)
    report = gossamer.load_quantized_experts(moe, packed_checkpoint())
    assert {module.format for module in report.modules} == {"int4"}


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_what_is_not_finite_is_refused_before_anything_changes(value):
    model = torch.nn.Sequential(gossamer.nn.MoE(64, 32, 4, 2), torch.nn.Linear(64, 64))
    down = model[0].experts.down_proj
    with torch.no_grad():
        down[1, :2, 3] = value
    message = rf"^0\.experts\.down_proj must hold finite values, got 2 of {down.numel():,} that are NaN or infinite$"
    with pytest.raises(ValueError, match=message):
        gossamer.quantize_experts(model, "int8", include_linears=True)
    assert model[0].experts.down_proj is down and type(model[1]) is torch.nn.Linear
    with torch.no_grad():
        down[1, :2, 3] = 0.0
        model[1].weight[0, 0] = value
    with pytest.raises(ValueError, match=r"^1\.weight must hold finite values, got 1 of 4,096 that"):
        gossamer.quantize_experts(model, "int8", include_linears=True)
    assert isinstance(model[0].experts.gate_up_proj, torch.nn.Parameter)


def test_weights_are_checked_once(monkeypatch):
    """All weights are checked for NaN and infinity before the first is quantised, each of them once."""
    read = []
    finite = quantized_expert_weight.check_finite
    monkeypatch.setattr(quantized_expert_weight, "check_finite", lambda *args: (read.append(args[0]), finite(*args)))
    model = torch.nn.Sequential(gossamer.nn.MoE(64, 32, 4, 2), torch.nn.Linear(64, 64))
    gossamer.quantize_experts(model, "int8", include_linears=True)
    assert sorted(read) == ["0.experts.down_proj", "0.experts.gate_up_proj", "1.weight"]


@pytest.mark.parametrize("size", [0, 16])
def test_group_sizes_are_checked_before_anything_changes(size):
    model = qwen()
    with pytest.raises(ValueError, match=rf"group_size must be .*, got {size}"):
        gossamer.quantize_experts(model, "int4", group_size=size)
    assert not any(isinstance(m, QuantizedExpertStack) for m in model.modules())


def test_errors():
    with pytest.raises(ValueError, match="format must be one of"):
        gossamer.quantize_experts(qwen(), "fp4")
    with pytest.raises(ValueError, match=r"model must hold gossamer\.nn\.Experts"):
        gossamer.quantize_experts(torch.nn.Linear(2, 2), "int8")
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got int"):
        gossamer.quantize_experts(1, "int8")
    moe = gossamer.nn.MoE(48, 32, 4, 2)
    state = {k: v.clone() for k, v in moe.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"experts \(Experts\): gate_up_proj has 48 input columns, not a multiple of 32"
    ):
        gossamer.quantize_experts(moe, "mxfp4")
    with pytest.raises(ValueError, match=r"not a multiple of 32; formats that take them: fp8, fp8_block, int8$"):
        gossamer.quantize_experts(moe, "int4")
    with pytest.raises(
        ValueError, match=r"64 input columns, not a multiple of 128; formats .*: int4 with group_size 32, int4"
    ):
        gossamer.quantize_experts(gossamer.nn.MoE(64, 128, 4, 2), "int4", group_size=128)
    report = gossamer.quantize_experts(moe, "mxfp4", strict=False)
    assert not report.modules and "left alone" in str(report)
    assert all(torch.equal(v, state[k]) for k, v in moe.state_dict().items())
    gossamer.quantize_experts(moe, "int8")
    with pytest.raises(ValueError, match="gate_up_proj is quantised already, as int8"):
        gossamer.quantize_experts(moe, "int8")
    with pytest.raises(ValueError, match="tensors must hold a quantised"):
        gossamer.load_quantized_experts(qwen(), {})
    model = qwen()
    gossamer.quantize_experts(model, "int8")
    with pytest.raises(ValueError, match="they were quantised"):
        gossamer.restore(model)


def test_generate_and_compile():
    """Greedy decoding by a quantised model, and its experts traced whole."""
    model = qwen()
    gossamer.quantize_experts(model, "fp8_block")
    ids = torch.randint(64, (1, 4))
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **options), dequantized(model).generate(ids, **options))
    experts = experts_of(model)[0]
    x, index, weights = torch.randn(5, 64), torch.randint(4, (5, 2)), torch.rand(5, 2)
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x, index, weights), experts(x, index, weights))
