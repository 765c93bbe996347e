"""PEFT's variants of LoRA: those that replace computes go through an adapter's whole life, the others are named."""

from __future__ import annotations

import copy
import os
from unittest import mock

import pytest
import torch

import gossamer

peft = pytest.importorskip("peft")

from peft_models import check_switched, drawn, llama, run, tokens  # noqa: E402


@pytest.fixture(autouse=True)
def environment():
    """PEFT's BOFT leaves CXX=gcc behind where its own kernels do not compile, and gcc links no C++ library."""
    with mock.patch.dict(os.environ):
        yield


LAYERS = ["q_proj", "v_proj", "down_proj"]
# Initialisations that start from a decomposition of the weight keep the factors that it gave.
KEPT = {"pissa", "pissa_niter_4", "olora", "orthogonal"}
VARIANTS = {
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa by iteration": {"init_lora_weights": "pissa_niter_4"},
    "olora": {"init_lora_weights": "olora"},
    "rslora": {"use_rslora": True},
    "dora with rslora": {"use_dora": True, "use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 7, "layers.0.mlp.down_proj": 1}, "alpha_pattern": {"v_proj": 1}},
    "layer replication": {"layer_replication": [(0, 1), (0, 1)]},
    "some layers": {"layers_to_transform": [0], "exclude_modules": ["v_proj"]},
    "saved modules": {"modules_to_save": ["lm_head"]},
    "all biases": {"bias": "all"},
}


def made(options):
    """A model with one adapter, and the base that it was made from."""
    torch.manual_seed(1)
    base = llama(1)
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": LAYERS} | options)
    model = peft.get_peft_model(copy.deepcopy(base), config)
    return model if options.get("init_lora_weights") in KEPT else drawn(model), base


@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_gradients_merging_and_files_are_pefts(variant, device, tmp_path):
    """Before and after replace, merged and not, saved, loaded over a fresh base, and restored."""
    model, base = made(VARIANTS[variant])
    model, ids = model.to(device), tokens(device, rows=2, length=5)
    plain = copy.deepcopy(model).eval()
    report, found = check_switched(model, gossamer.replace, ids)
    assert report.switched and not report.skipped and any("lora_" in name for name in found)
    model.eval()
    with torch.no_grad():
        wanted = plain(ids).logits
        # Replicated layers share a base weight, into which PEFT merges the adapters of all of them.
        for change in ("merge_adapter", "unmerge_adapter"):
            getattr(model, change)(), getattr(plain, change)()
            torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-4, atol=1e-5)
        if VARIANTS[variant].get("init_lora_weights") not in KEPT:
            # The others change the base, which the file does not hold.
            model.save_pretrained(tmp_path)
            loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base).to(device), tmp_path).eval()
            gossamer.replace(loaded)
            torch.testing.assert_close(loaded(ids).logits, wanted, rtol=1e-4, atol=1e-5)
        gossamer.restore(model)
        torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-4, atol=1e-5)


def test_trained_tokens_stay_with_peft(device):
    """Rows of the table that are trained whole have no low-rank form: an error names them, or PEFT keeps the layer."""
    model, _ = made({"trainable_token_indices": [3, 5]})
    model, ids = model.to(device), tokens(device, rows=2, length=5)
    with pytest.raises(ValueError, match=r"token_adapter \(lora\.TrainableTokensLayer\): there is no forward for it"):
        gossamer.replace(model)
    report, found = check_switched(model, lambda one: gossamer.replace(one, strict=False), ids)
    assert [m.class_name for m in report.skipped] == ["TrainableTokensLayer"] and len(report.switched) == 3
    assert any("trainable_tokens" in name for name in found)


def test_lora_fa_takes_pefts_steps(device):
    """LoRA-FA is an optimizer: A is frozen, and the gradient of B is corrected by it."""
    from peft.optimizers import create_lorafa_optimizer

    def trained(switch):
        model, _ = made({})
        model = model.to(device)
        if switch:
            gossamer.replace(model)
        optimizer = create_lorafa_optimizer(model, r=4, lora_alpha=6, lr=1e-2)
        for seed in range(3):
            run(model, tokens(device, rows=2, length=5, seed=seed))
            optimizer.step()
        return {name: p.detach() for name, p in model.named_parameters() if "lora_" in name}

    ours, theirs = trained(True), trained(False)
    moved = made({})[0].state_dict()
    assert any(not torch.equal(value.cpu(), moved[name]) for name, value in ours.items() if "lora_B" in name)
    assert all(torch.equal(value.cpu(), moved[name]) for name, value in ours.items() if "lora_A" in name)
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=2e-3, atol=2e-5)


ON_LAYERS = {
    "ADALORA": (peft.AdaLoraConfig, {"total_step": 4}),
    "BOFT": (peft.BOFTConfig, {}),
    "HRA": (peft.HRAConfig, {}),
    "IA3": (peft.IA3Config, {"feedforward_modules": []}),
    "LN_TUNING": (peft.LNTuningConfig, {"target_modules": ["input_layernorm"]}),
    "LOHA": (peft.LoHaConfig, {}),
    "LOKR": (peft.LoKrConfig, {}),
    "OFT": (peft.OFTConfig, {}),
    "RANDLORA": (peft.RandLoraConfig, {}),
    "TRAINABLE_TOKENS": (peft.TrainableTokensConfig, {"target_modules": ["embed_tokens"], "token_indices": [1]}),
    "VERA": (peft.VeraConfig, {}),
}


@pytest.mark.parametrize("method", ON_LAYERS)
def test_other_methods_are_refused_by_name(method, device):
    """Their updates are other formulas than LoRA's; the model stays as it was."""
    config, options = ON_LAYERS[method]
    model = (
        peft.get_peft_model(llama(1), config(**{"target_modules": ["q_proj", "v_proj"]} | options)).to(device).eval()
    )
    ids, classes = tokens(device, rows=2, length=5), [type(module) for module in model.modules()]
    with torch.no_grad():
        before = model(ids).logits
        with pytest.raises(ValueError, match=f"adapter 'default' must be of a LoraConfig, got {method}"):
            gossamer.replace(model)
        assert [type(module) for module in model.modules()] == classes
        assert torch.equal(model(ids).logits, before)
