"""Quantised experts through save_pretrained and from_pretrained of transformers."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

pytest.importorskip("transformers", minversion="5")

import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import gossamer
import gossamer.integrations.transformers
from gossamer.integrations.hf_quantizer import QuantizedExpertsConfig
from gossamer.nn import QuantizedExpertStack

FORMATS = [("int4", 32), ("int4", 64), ("int8", 32), ("mxfp4", 32), ("fp8", 32), ("fp8_block", 32)]
SIZES = dict(
    hidden_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, vocab_size=64, head_dim=16,
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
# Their files hold experts one by one, under another path, and whole; gpt-oss has biases and transposed weights.
MODELS = {
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **SIZES, moe_intermediate_size=192, num_experts=3, num_experts_per_tok=2
    ),
    "mixtral": lambda: transformers.MixtralConfig(
        **SIZES, intermediate_size=192, num_local_experts=3, num_experts_per_tok=2
    ),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **SIZES, intermediate_size=64, num_local_experts=3, num_experts_per_tok=2,
        rope_parameters=dict(rope_type="default", rope_theta=10000.0),
    ),
}  # fmt: skip
IDS = torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(1))


def make(name, dtype=torch.float32):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(MODELS[name](), dtype=dtype).eval()


def stacks(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantizedExpertStack)}


def same(one, other):
    """Whether the models hold the same stacks, bit for bit, and give the same logits."""
    ours, theirs = stacks(one), stacks(other)
    assert ours.keys() == theirs.keys() and ours
    for name, stack in ours.items():
        assert stack.format == theirs[name].format
        for part in ("data", "scale"):
            a, b = getattr(stack, part), getattr(theirs[name], part)
            assert a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    with torch.no_grad():
        assert torch.equal(one(IDS).logits, other(IDS).logits)


@pytest.mark.parametrize(("weight_format", "group_size"), FORMATS)
@pytest.mark.parametrize("name", MODELS)
def test_round_trip(name, weight_format, group_size, tmp_path):
    """Saved, loaded, saved and loaded again: the same bits; every tensor of the first file is in the second."""
    model = make(name, torch.bfloat16 if weight_format == "int8" else torch.float32)
    gossamer.quantize_experts(model, weight_format, group_size=group_size)
    model.save_pretrained(tmp_path / "first")
    config = json.loads((tmp_path / "first" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "gossamer" and {e["format"] for e in config["experts"].values()} == {weight_format}
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "first", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert loaded.config._experts_implementation == "gossamer"
    same(loaded.eval(), model)
    loaded.save_pretrained(tmp_path / "second")
    first, second = (load_file(tmp_path / folder / "model.safetensors") for folder in ("first", "second"))
    assert first.keys() == second.keys()
    same(AutoModelForCausalLM.from_pretrained(tmp_path / "second").eval(), model)


@pytest.mark.parametrize("name", MODELS)
def test_own_files_are_read_by_load_quantized_experts(name, tmp_path):
    model = make(name)
    gossamer.quantize_experts(model, "int8")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    other = make(name)
    report = gossamer.load_quantized_experts(other, tensors)
    assert len(report.used) == 8 and set(report.used) < tensors.keys()
    same(other, model)


def test_float_models_are_quantised_when_they_are_loaded(tmp_path):
    model = make("qwen3_moe")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=QuantizedExpertsConfig("int4"))
    gossamer.quantize_experts(model, "int4")
    same(loaded.eval(), model)
    loaded.save_pretrained(tmp_path / "quantised")
    same(AutoModelForCausalLM.from_pretrained(tmp_path / "quantised").eval(), model)


def test_dequantised_models_are_float_models_again(tmp_path):
    model = make("gpt_oss")
    gossamer.quantize_experts(model, "int8")
    with torch.no_grad():
        wanted = model(IDS).logits
    model.dequantize(torch.float32)
    assert not stacks(model)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, wanted)
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    with torch.no_grad():
        torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path).eval()(IDS).logits, wanted)


def test_files_that_lack_experts_are_refused(tmp_path):
    """The error is raised instead of leaving the experts with random weights."""
    model = make("qwen3_moe")
    gossamer.quantize_experts(model, "mxfp4")
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.experts.quantized_scale_down_proj"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"must hold model\.layers\.1\.mlp\.experts\.down_proj\.scale"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["experts"]["model.layers.9.mlp.experts.down_proj"] = config["quantization_config"][
        "experts"
    ]["model.layers.1.mlp.experts.down_proj"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"names the experts model\.layers\.9\.mlp\.experts\.down_proj, which"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must have a format or a description of the experts, got neither"):
        QuantizedExpertsConfig()
    with pytest.raises(TypeError, match="experts must be a mapping or None, got int"):
        QuantizedExpertsConfig(experts=-1)


@pytest.mark.parametrize(
    "change", [{"data": [-4, 8, 8]}, {"scale": None}, {"scale_dtype": "nope"}, {"scale_dtype": 5}, {"format": None}]
)
def test_a_damaged_description_is_refused_by_name(tmp_path, change):
    model = make("mixtral")
    gossamer.quantize_experts(model, "int8")
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    described = config["quantization_config"]["experts"]
    name = min(described)
    described[name] |= change
    path.write_text(json.dumps(config))
    message = "format must be one of" if "format" in change else f"of the experts {name}, got .*"
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    described[name] = "text"
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"quantization_config must give .* of the experts {name}, got 'text'"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_copy_and_a_part_are_saved_too(tmp_path):
    model = make("mixtral")
    gossamer.quantize_experts(model, "int8")
    copy.deepcopy(model).save_pretrained(tmp_path / "copy")
    same(AutoModelForCausalLM.from_pretrained(tmp_path / "copy").eval(), model)
    model.model.save_pretrained(tmp_path / "part")
    part = transformers.AutoModel.from_pretrained(tmp_path / "part").eval()
    with torch.no_grad():
        assert torch.equal(part(IDS).last_hidden_state, model.model(IDS).last_hidden_state)


def test_another_process_needs_the_integration_alone(tmp_path):
    model = make("qwen3_moe")
    gossamer.quantize_experts(model, "int4")
    model.save_pretrained(tmp_path)
    code = (
        "import sys, torch, gossamer.integrations.transformers as _, transformers\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "print(model(torch.arange(3, 9)[None]).logits.sum().item())"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    with torch.no_grad():
        assert float(done.stdout.split()[-1]) == pytest.approx(model(torch.arange(3, 9)[None]).logits.sum().item())


def test_two_quantisations_are_not_saved_as_one(tmp_path):
    """The config has room for one, so the other's weights would be read as floats."""
    model = make("qwen3_moe")

    class Other:
        quantization_config = type("Config", (), {"quant_method": "other"})

    model.hf_quantizer = Other()
    gossamer.quantize_experts(model, "int8")
    with pytest.raises(ValueError, match="quantised by gossamer and other besides cannot be saved"):
        model.save_pretrained(tmp_path)
