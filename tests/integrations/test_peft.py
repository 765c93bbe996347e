"""PEFT models computed by gossamer: outputs, gradients, names, files and methods are PEFT's."""

from __future__ import annotations

import copy
import subprocess
import sys
import types

import pytest
import torch
from torch import nn

import gossamer

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from peft_models import check_switched, drawn, llama, run, tokens, wrapped  # noqa: E402

from gossamer.integrations import peft as integration  # noqa: E402
from gossamer.integrations._peft_tuner import nf4_weight  # noqa: E402

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CONFIGS = {
    "linear": ("llama", {}),
    "rslora and patterns": (
        "llama",
        {"use_rslora": True, "rank_pattern": {"q_proj": 7}, "alpha_pattern": {"layers.1.self_attn.v_proj": 3}},
    ),
    "dora": ("llama", {"target_modules": "all-linear", "use_dora": True}),
    "pissa": ("llama", {"init_lora_weights": "pissa"}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding dora": ("llama", {"target_modules": ["embed_tokens"], "use_dora": True}),
    "conv1d with biases": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "lora_bias": True}),
    "conv1d dora": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": True}),
    "trained biases": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "lora_only"}),
    "rank beyond the matrix": ("llama", {"r": 48}),
    "experts": ("qwen3_moe", {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "one parameter of the experts": ("qwen3_moe", {"target_modules": [], "target_parameters": EXPERTS[1:]}),
    "a linear layer's parameter": ("llama", {"target_modules": [], "target_parameters": ["v_proj.weight"]}),
    "a router's parameter": ("qwen3_moe", {"target_modules": [], "target_parameters": ["mlp.gate.weight"]}),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_outputs_and_gradients_are_pefts(case, device):
    name, options = CONFIGS[case]
    model = wrapped(name, device, **options)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    report, actual = check_switched(model, gossamer.replace, tokens(device))
    assert any("lora_" in key for key in actual)
    general = [m for m in report.switched if not m.fused]
    assert bool(general) == (case == "a router's parameter") and not report.skipped
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)


def test_without_peft_the_package_works_and_says_what_to_install():
    code = (
        "import sys; sys.modules['peft'] = None; import gossamer\n"
        "try:\n    import gossamer.integrations.peft\nexcept ImportError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "gossamer's PEFT integration needs peft: pip install 'gossamer[peft]'\n", done.stderr


def test_report_and_restore(device):
    model = wrapped("qwen3_moe", device, target_modules=["q_proj"], target_parameters=EXPERTS)
    ids = tokens(device)
    before, classes = run(model, ids), [type(m) for m in model.modules()]
    text = str(gossamer.replace(model))
    assert text.startswith("gossamer computes 8 of 8 LoRA layers and experts modules\n")
    assert "layers.0.self_attn.q_proj: Linear, fused: low_rank_linear" in text
    assert "layers.1.mlp.experts: ParamWrapper, fused: expert_mlp" in text
    twin = copy.deepcopy(model)
    gossamer.restore(model)
    assert [type(m) for m in model.modules()] == classes
    assert integration.restore(twin) and [type(m) for m in twin.modules()] == classes
    assert all(torch.equal(value, before[key]) for key, value in run(model, ids).items())
    with pytest.raises(ValueError, match=r"model must be one that gossamer\.replace switched"):
        gossamer.restore(model)


def autocast_run(model, ids):
    """A training step under autocast to bfloat16, of the model in float64 without."""
    enabled = next(model.parameters()).dtype != torch.float64
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=enabled):
        return run(model, ids)


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("adapters", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_bfloat16_base(use_dora, adapters, device):
    # PEFT keeps adapters of a bfloat16 model in float32 unless told otherwise. Their gradients are float32 here too,
    # but products take them in bfloat16, as PEFT's do under autocast.
    wide = adapters == torch.float32
    model = wrapped("llama", device, dtype=torch.bfloat16, autocast_adapter_dtype=wide, use_dora=use_dora)
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {adapters}
    check_switched(model, gossamer.replace, tokens(device, rows=4), run, autocast_run if wide else run)


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_autocast(use_dora, device):
    model = wrapped("llama", device, target_modules=["q_proj", "o_proj", "up_proj"], use_dora=use_dora)
    check_switched(model, gossamer.replace, tokens(device), autocast_run)


def test_several_active_adapters_share_one_product(device):
    model = wrapped("llama", device)
    model.add_adapter("second", peft.LoraConfig(r=6, lora_alpha=3, target_modules=["q_proj", "o_proj"]))
    drawn(model).base_model.set_adapter(["default", "second"])
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.set_scale("default", 0.0)  # PEFT lets anyone turn an adapter down
    _, off = check_switched(copy.deepcopy(model), gossamer.replace, tokens(device))
    assert not off["base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight"].any()
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.set_scale("default", 1.0)
    _, actual = check_switched(model, gossamer.replace, tokens(device))
    assert any("second" in key for key in actual) and any("default" in key for key in actual)


def test_switching_disabling_and_later_adapters(device):
    model = wrapped("llama", device).eval()
    ids = tokens(device)
    plain = copy.deepcopy(model)
    gossamer.replace(model)
    config = peft.LoraConfig(r=3, target_modules=["v_proj", "up_proj"], init_lora_weights=False)
    for one in (model, plain):
        torch.manual_seed(5)
        one.add_adapter("late", config)
    assert type(model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")) is not integration.Linear
    assert len(gossamer.replace(model).switched) == 8  # takes in the layers that were added since
    with torch.no_grad():
        for name in ("late", "default"):
            model.set_adapter(name), plain.set_adapter(name)
            torch.testing.assert_close(model(ids).logits, plain(ids).logits)
        with model.disable_adapter(), plain.disable_adapter():
            assert torch.equal(model(ids).logits, plain(ids).logits)
        model.delete_adapter("late"), plain.delete_adapter("late")
        torch.testing.assert_close(model(ids).logits, plain(ids).logits)
    with pytest.raises(ValueError, match="adapter 'bad' sets options that gossamer does not compute: alora_invocation"):
        model.add_adapter("bad", peft.LoraConfig(target_modules=["v_proj"], alora_invocation_tokens=[3]))


def test_peft_saves_and_loads(tmp_path, device):
    model = wrapped("qwen3_moe", device, target_modules=["q_proj", "embed_tokens"], target_parameters=EXPERTS).eval()
    ids = tokens(device)
    model.save_pretrained(tmp_path / "before")
    gossamer.replace(model)
    wanted = model(ids).logits
    model.save_pretrained(tmp_path / "after")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()
    model.load_adapter(tmp_path / "before", "again")
    model.set_adapter("again")
    drawn_again = model(ids).logits
    assert torch.equal(drawn_again, wanted)


MIX = ["default", "__base__", "wide", "default", "elsewhere"]


def mixed_model(device, **options):
    """Adapters of two ranks on the same layers, and one on other layers."""
    model = wrapped("llama", device, **options)
    lora = {"lora_bias": options.get("lora_bias", False)}
    targets = options.get("target_modules", ["q_proj", "v_proj", "down_proj"])
    model.add_adapter("wide", peft.LoraConfig(r=9, lora_alpha=2, target_modules=targets, **lora))
    model.add_adapter("elsewhere", peft.LoraConfig(r=2, target_modules=["gate_proj"]))
    return drawn(model)


@pytest.mark.parametrize("options", [{}, {"target_modules": ["embed_tokens", "k_proj"]}], ids=["linear", "embedding"])
def test_mixed_batches_are_pefts(options, device):
    model = mixed_model(device, **options).eval()
    ids = tokens(device, rows=5)

    @torch.no_grad()
    def step(model, ids):
        return {"logits": model(ids, adapter_names=MIX).logits}

    check_switched(model, gossamer.replace, ids, step)
    with torch.no_grad():
        again = model(ids, adapter_names=MIX).logits
        for row, name in enumerate(MIX):  # each row as if it were alone
            model.set_adapter("default" if name == "__base__" else name)
            with model.disable_adapter() if name == "__base__" else torch.no_grad():
                torch.testing.assert_close(model(ids[row : row + 1]).logits[0], again[row])
    model.set_adapter("default")
    with pytest.raises(ValueError, match="non-existing adapter"):
        model(ids, adapter_names=["default"] * 4 + ["nobody"])
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        model(ids, adapter_names=["default"] * 4)


def test_experts_mix_adapters_too(device):
    # PEFT refuses mixed batches on target_parameters, so each row is held against its own adapter alone.
    model = wrapped("qwen3_moe", device, target_modules=["q_proj"], target_parameters=EXPERTS)
    model.add_adapter("wide", peft.LoraConfig(r=7, lora_alpha=3, target_modules=["q_proj"], target_parameters=EXPERTS))
    drawn(model).eval()
    ids, names = tokens(device, rows=4), ["wide", "default", "__base__", "wide"]
    wanted, grads = [], {}
    for row, name in enumerate(names):
        model.set_adapter("default" if name == "__base__" else name)
        with model.disable_adapter() if name == "__base__" else torch.enable_grad():
            logits = model(ids[row : row + 1]).logits
        wanted.append(logits.detach()[0])
        if name != "__base__":
            model.zero_grad()
            logits.square().sum().backward()
            for key, parameter in model.named_parameters():
                if parameter.grad is not None:
                    grads[key] = grads.get(key, 0) + parameter.grad
    gossamer.replace(model)
    with torch.no_grad():
        torch.testing.assert_close(model(ids, adapter_names=names).logits, torch.stack(wanted), rtol=1e-4, atol=1e-5)
    model.base_model.set_adapter(["default", "wide"])
    model.zero_grad()
    with integration.mixed_adapters(model, [None if name == "__base__" else name for name in names]):
        model(ids).logits.square().sum().backward()
    found = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == grads.keys()
    torch.testing.assert_close(found, grads, rtol=1e-4, atol=1e-4)


def test_mixed_generation_with_beams(device):
    model = mixed_model(device).eval()
    ids = tokens(device, rows=5, length=4)
    given = {"max_new_tokens": 4, "num_beams": 2, "do_sample": False, "pad_token_id": 0}
    wanted = model.generate(input_ids=ids, adapter_names=MIX, **given)
    gossamer.replace(model)
    assert torch.equal(model.generate(input_ids=ids, adapter_names=MIX, **given), wanted)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_several_adapters_train_in_one_step(checkpointing, device):
    model = mixed_model(device, target_modules=["embed_tokens", "q_proj", "down_proj"])
    ids = tokens(device, rows=4)
    wanted = {}
    for name, rows in (("default", [0, 3]), ("wide", [1])):  # PEFT: one adapter at a time, losses summed
        model.set_adapter(name)
        model.zero_grad()
        logits = model(ids[rows]).logits
        nn.functional.cross_entropy(logits.flatten(0, 1), ids[rows].flatten(), reduction="sum").backward()
        wanted |= {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    gossamer.replace(model)
    model.base_model.set_adapter(["default", "wide"])
    model.zero_grad()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
        model.train()
    with integration.mixed_adapters(model, ["default", "wide", None, "default"]):
        logits = model(ids).logits
        nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="sum").backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-5)
    with pytest.raises(
        ValueError, match=r"adapter_names must be among \['default', 'elsewhere', 'wide'\], got \['x'\]"
    ):
        with integration.mixed_adapters(model, ["x"]):
            pass
    with pytest.raises(TypeError, match="must be a sequence of str or None"):
        with integration.mixed_adapters(model, "default"):
            pass


@pytest.mark.parametrize("case", ["linear", "dora", "embedding", "experts"])
def test_merging_and_unloading(case, device):
    name, options = CONFIGS[case]
    model = wrapped(name, device, **options).eval()
    ids = tokens(device)
    plain = copy.deepcopy(model)
    gossamer.replace(model)
    with torch.no_grad():
        wanted = model(ids).logits
        model.merge_adapter()
        torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-4, atol=1e-5)
        model.unmerge_adapter()
        torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-4, atol=1e-5)
        merged = copy.deepcopy(model).merge_and_unload()
        assert not any(isinstance(m, peft.tuners.tuners_utils.BaseTunerLayer) for m in merged.modules())
        torch.testing.assert_close(merged(ids).logits, wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(merged.state_dict(), copy.deepcopy(plain).merge_and_unload().state_dict())
        base = model.unload()
        torch.testing.assert_close(base(ids).logits, plain.unload()(ids).logits)


def test_dropout_is_drawn_again_alike_under_checkpointing(device):
    model = wrapped("llama", device, lora_dropout=0.3)
    gossamer.replace(model)
    ids, results = tokens(device), []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        torch.manual_seed(7)
        results.append(run(model, ids))
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])
    model.eval()
    assert not torch.equal(run(model, ids)["logits"], results[0]["logits"])


@pytest.mark.parametrize("use_dora", [False, True])
def test_dropout_has_pefts_mean(use_dora, device):
    layer = wrapped("llama", device, lora_dropout=0.5, use_dora=use_dora)
    layer = layer.get_submodule("base_model.model.model.layers.0.self_attn.q_proj").train()
    x = torch.randn(400, 36, device=device)[:1].expand(4000, 36)  # 4000 draws for one row
    with torch.no_grad():
        theirs = layer(x).double()
        layer.__class__ = integration.Linear
        ours = layer(x).double()
    spread = (theirs.var(0) + ours.var(0)).div(4000).sqrt()
    assert ((ours.mean(0) - theirs.mean(0)).abs() < 5 * spread).all()
    assert (ours.std(0) / theirs.std(0) - 1).abs().max() < 0.15


def test_compiles(device):
    torch.manual_seed(1)
    model = drawn(
        peft.get_peft_model(llama(1).to(device), peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    )
    ids = tokens(device)
    gossamer.replace(model)
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.down_proj")
    x = torch.randn(5, 50, device=device)
    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(y, layer(x))
    eager = run(model, ids)
    compiled = run(torch.compile(model, backend="aot_eager"), ids)
    for key, value in eager.items():
        torch.testing.assert_close(compiled[key if key == "logits" else f"_orig_mod.{key}"], value)


def state_of(quantized, nested):
    """The fields of bitsandbytes' QuantState that hold an NF4 weight."""
    state2 = types.SimpleNamespace(
        absmax=quantized.nested_absmax, code=quantized.nested_code, blocksize=quantized.nested_block_size
    )
    return types.SimpleNamespace(
        absmax=quantized.absmax, shape=torch.Size(quantized.shape), code=quantized.code, blocksize=64, quant_type="nf4",
        nested=nested, offset=quantized.offset if nested else None, state2=state2 if nested else None,
    )  # fmt: skip


@pytest.mark.parametrize("nested", [False, True])
def test_fields_of_a_4bit_base(nested):
    quantized = gossamer.NF4Weight.quantize(torch.randn(24, 40), double=nested)
    data = quantized.packed.view(-1, 1)
    weight = types.SimpleNamespace(data=data, quant_state=state_of(quantized, nested))
    found = nf4_weight(types.SimpleNamespace(weight=weight))
    assert torch.equal(found.dequantize(), quantized.dequantize())
    weight.quant_state.packing_format_for_cpu = True  # bitsandbytes reorders the codes for its own CPU kernel
    assert nf4_weight(types.SimpleNamespace(weight=weight)) is None
    weight.quant_state = types.SimpleNamespace(quant_type="fp4")
    assert nf4_weight(types.SimpleNamespace(weight=weight)) is None


@pytest.mark.parametrize("use_dora", [False, True])
def test_4bit_base(use_dora, device):
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    base = bnb.nn.Linear4bit(72, 40, compute_dtype=torch.float32, quant_type="nf4", compress_statistics=True)
    model = nn.Sequential(base.to(device))
    model.is_loaded_in_4bit = True
    model = drawn(peft.get_peft_model(model, peft.LoraConfig(r=5, target_modules=["0"], use_dora=use_dora)))
    layer = model.base_model.model[0]
    x = torch.randn(9, 72, device=device, requires_grad=True)
    dy = torch.randn(9, 40, device=device)

    def step():
        model.zero_grad(), setattr(x, "grad", None)
        y = model(x)
        y.backward(dy)
        return {"y": y.detach(), "x": x.grad} | {
            n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
        }

    theirs = step()
    report = gossamer.replace(model)
    assert report.switched[0].fused and isinstance(layer, bnb_class(peft))
    ours = step()
    assert ours.keys() == theirs.keys()
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        model.eval()
        mixed = model(x, adapter_names=["default", "__base__"] * 4 + ["default"]) if not use_dora else None
        for row in range(9 if mixed is not None else 0):
            with model.disable_adapter() if row % 2 else torch.no_grad():
                torch.testing.assert_close(model(x[row : row + 1])[0], mixed[row], rtol=1e-4, atol=1e-4)


def test_adapters_without_a_peft_model(device):
    # PEFT's layers in a model of its own class, as transformers' add_adapter leaves them.
    torch.manual_seed(1)
    model = llama(1).to(device)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = peft.inject_adapter_in_model(config, model)
    report, actual = check_switched(model, gossamer.replace, tokens(device))
    assert len(report.switched) == 2 and any("lora_B" in key for key in actual)


def test_8bit_base_keeps_its_own_product(device):
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    model = nn.Sequential(bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False).to(device))
    model.is_loaded_in_8bit = True
    model = drawn(peft.get_peft_model(model, peft.LoraConfig(r=5, target_modules=["0"]))).eval()
    x = torch.randn(4, 64, device=device, dtype=torch.float16)
    with torch.no_grad():
        theirs = model(x), model(x, adapter_names=["default", "__base__"] * 2)
        report = gossamer.replace(model)
        assert report.switched[0].class_name == "Linear8bitLt" and not report.switched[0].fused
        ours = model(x), model(x, adapter_names=["default", "__base__"] * 2)
    assert torch.equal(ours[0], theirs[0])
    torch.testing.assert_close(ours[1], theirs[1], rtol=2e-3, atol=2e-3)


def bnb_class(peft):
    """PEFT's layer over bitsandbytes' 4-bit base."""
    from peft.tuners.lora.bnb import Linear4bit

    return Linear4bit


REFUSED = {
    "alora_invocation_tokens": {"alora_invocation_tokens": [1]},
    "velora_config": {"velora_config": {}},
    "use_bdlora": {"use_bdlora": "config"},
    "arrow_config": {"arrow_config": "config"},
    "init_lora_weights='mica'": {"init_lora_weights": "mica"},
    "lora_bias=True with use_dora=True": {"lora_bias": True, "use_dora": True},
}


@pytest.mark.parametrize("option", REFUSED)
def test_options_that_are_not_computed_are_named(option, device):
    model = wrapped("llama", device)
    for key, value in REFUSED[option].items():
        setattr(model.peft_config["default"], key, value or {"rank": 1})
    with pytest.raises(ValueError, match=f"adapter 'default' sets options that gossamer does not compute: {option}"):
        gossamer.replace(model)
    assert not any(isinstance(m, integration.Linear) for m in model.modules())


def test_layers_that_are_not_computed_are_named(device):
    conv = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2)).to(device)
    model = peft.get_peft_model(conv, peft.LoraConfig(target_modules=["0", "2"]))
    with pytest.raises(ValueError, match=r"0 \(lora.Conv2d\): there is no forward for it"):
        gossamer.replace(model)
    report = gossamer.replace(model, strict=False)
    assert [m.class_name for m in report.skipped] == ["Conv2d"] and len(report.switched) == 1
    other = peft.get_peft_model(llama(), peft.LoHaConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="adapter 'default' must be of a LoraConfig, got LOHA"):
        gossamer.replace(other)


@pytest.mark.parametrize("config", [{"modules_to_save": ["1"]}, {"target_modules": ["0", "2"]}], ids=["saved", "conv"])
def test_a_mixed_batch_refuses_what_peft_alone_computes(config, device):
    """It would give every row the active adapter's; adapters without such a part mix as ever."""
    layers = nn.Linear(8, 8), nn.Linear(8, 8), nn.Conv1d(4, 4, 1)
    options = {"target_modules": ["0"], "r": 2}
    model = peft.get_peft_model(nn.Sequential(*layers).to(device), peft.LoraConfig(**(options | config)), "one").eval()
    model.add_adapter("two", peft.LoraConfig(**options))
    model.add_adapter("three", peft.LoraConfig(**options))
    gossamer.replace(model, strict=False)
    x = torch.randn(2, 4, 8, device=device)
    with pytest.raises(ValueError, match=r"adapter 'one' has a .* which gossamer does not compute"):
        with integration.mixed_adapters(model, ["one", "two"]):
            model(x)
    with integration.mixed_adapters(model, ["two", "three"]):
        model(x)


@pytest.mark.parametrize("part", ["lora_A", "lora_B", "lora_dropout"])
def test_hooks_on_parts_of_an_adapter_are_called(part, device):
    """By a layer of one adapter; a mixed batch, which has no such call, refuses."""
    torch.manual_seed(0)
    options = {"target_modules": ["0"], "r": 2, "init_lora_weights": False}
    model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 8)).to(device), peft.LoraConfig(**options), "one").eval()
    model.add_adapter("two", peft.LoraConfig(**options))
    x, plain = torch.randn(2, 8, device=device), copy.deepcopy(model)
    for each in (model, plain):
        getattr(each.base_model.model[0], part)["one"].register_forward_hook(lambda module, args, out: out * 2)
    gossamer.replace(model)
    torch.testing.assert_close(model(x), plain(x))
    with integration.mixed_adapters(model, ["two", "two"]):
        model(x)
    with pytest.raises(ValueError, match="adapter 'one' has hooks on its factors or dropout"):
        with integration.mixed_adapters(model, ["one", "two"]):
            model(x)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_bias": True}], ids=["lora", "dora", "bias"])
@pytest.mark.parametrize("target_rank", [7, 50])
def test_factors_padded_for_hot_swapping(options, target_rank, device, tmp_path):
    """PEFT pads them beyond ``r``, and beyond the layer, and keeps scales as tensors; then another adapter moves in."""
    from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

    model = wrapped("llama", device, **options).eval()
    other = wrapped("llama", device, **options | {"r": 6, "lora_alpha": 3})
    drawn(other).save_pretrained(tmp_path)
    ids = tokens(device)
    mixed = ["default", "__base__", "default"]
    with torch.no_grad():
        prepare_model_for_compiled_hotswap(model, target_rank=target_rank)
        plain, before = copy.deepcopy(model), model(ids).logits
        gossamer.replace(model)
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-5)
        if options.get("use_dora"):
            return  # Which PEFT pads, but does not swap.
        for one in (model, plain):
            hotswap_adapter(one, tmp_path, adapter_name="default", torch_device=str(device))
        after = plain(ids).logits
        assert (after - before).abs().max() > 1e-2
        torch.testing.assert_close(model(ids).logits, after, rtol=1e-4, atol=1e-5)
        wanted = plain(ids, adapter_names=mixed).logits
        torch.testing.assert_close(model(ids, adapter_names=mixed).logits, wanted, rtol=1e-4, atol=1e-5)
