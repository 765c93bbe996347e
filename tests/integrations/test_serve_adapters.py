"""Serving many adapters in one batch: every request gets what PEFT gives it alone."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch

import gossamer

peft = pytest.importorskip("peft")
safetensors_torch = pytest.importorskip("safetensors.torch")

from peft_models import MODELS, drawn, llama, tokens  # noqa: E402

from gossamer.testing import assert_close  # noqa: E402

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CASES = {
    "llama": {
        "small": {"r": 2, "target_modules": ["q_proj", "v_proj", "down_proj"]},
        "wide": {"r": 9, "lora_alpha": 5, "use_rslora": True, "target_modules": "all-linear"},
        "elsewhere": {"r": 3, "target_modules": ["gate_proj", "embed_tokens"], "alpha_pattern": {"layers.1.mlp.*": 2}},
        "beyond": {"r": 40, "target_modules": ["k_proj", "o_proj"], "rank_pattern": {"o_proj": 5}},
    },
    "gpt2": {
        "bias": {"r": 4, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "lora_bias": True},
        "plain": {"r": 3, "target_modules": ["c_attn", "wte"], "fan_in_fan_out": True},
    },
    "qwen3_moe": {
        "experts": {"r": 3, "target_modules": ["q_proj"], "target_parameters": EXPERTS},
        "down": {"r": 2, "lora_alpha": 9, "target_modules": [], "target_parameters": EXPERTS[1:]},
    },
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of each case's adapters, written by PEFT."""
    root, folders = tmp_path_factory.mktemp("adapters"), {}
    for name, adapters in CASES.items():
        torch.manual_seed(0)
        base = MODELS[name]()
        for adapter, options in adapters.items():
            model = drawn(peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**options)))
            model.save_pretrained(root / name / adapter)
        folders[name] = base, {adapter: root / name / adapter for adapter in adapters}
    return folders


def alone(base, folders, ids, names, dtype, **options):
    """The logits of PEFT with one adapter at a time, each row's taken from its own adapter's run."""
    rows = [None] * len(names)
    for adapter in dict.fromkeys(names):
        model = copy.deepcopy(base).to(dtype)
        model = model if adapter is None else peft.PeftModel.from_pretrained(model, folders[adapter], **options)
        mine = [row for row, name in enumerate(names) if name == adapter]
        with torch.no_grad():
            for row, logits in zip(mine, model.eval()(ids[mine]).logits, strict=True):
                rows[row] = logits
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_every_request_gets_what_peft_gives_it(name, dtype, saved, device):
    base, folders = saved[name]
    base = copy.deepcopy(base).to(device)
    names = [None, *folders, *reversed(folders), None]
    ids = tokens(device, rows=len(names))
    model = copy.deepcopy(base).to(dtype).eval()
    plain, state = model(ids).logits, list(model.state_dict())
    served = gossamer.serve_adapters(model, folders)
    assert list(model.state_dict()) == state and served.adapter_names == tuple(folders)
    with torch.no_grad():
        logits = served(ids, adapters=names).logits
        torch.testing.assert_close(served(ids.flip(0), adapters=names[::-1]).logits.flip(0), logits)
    truth = alone(base, folders, ids, names, torch.float64)
    # Factors are in the dtype of their layer here, as PEFT has them when asked to.
    options = {"autocast_adapter_dtype": False}
    assert_close(logits, truth, alone(base, folders, ids, names, dtype, **options))
    assert torch.equal(model(ids).logits, plain)  # called directly, the model is the base
    served.close()
    assert torch.equal(model(ids).logits, plain)
    with pytest.raises(ValueError, match="no longer serves adapters"):
        served(ids, adapters=names)


def test_generates(saved, device):
    base, folders = saved["llama"]
    base = copy.deepcopy(base).to(device).eval()
    names = ["wide", None, "elsewhere"]
    ids = tokens(device, rows=3, length=4)
    served = gossamer.serve_adapters(copy.deepcopy(base), folders)
    for given in ({"num_beams": 1}, {"num_beams": 3, "num_return_sequences": 2}):
        given |= {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        found = served.generate(input_ids=ids, adapters=names, **given).view(3, -1, 8)
        for row, adapter in enumerate(names):
            model = copy.deepcopy(base)
            model = model if adapter is None else peft.PeftModel.from_pretrained(model, folders[adapter]).eval()
            assert torch.equal(model.generate(input_ids=ids[row : row + 1], **given), found[row])


def test_bad_requests_are_named(saved, device):
    base, folders = saved["llama"]
    served = gossamer.serve_adapters(copy.deepcopy(base).to(device), folders)
    ids = tokens(device)
    with pytest.raises(ValueError, match=r"adapters must be among \['small', .*\] or None, got \['nobody'\]"):
        served(ids, adapters=["small", "nobody", None])
    with pytest.raises(ValueError, match="adapters must name one adapter for each of 3 requests, got 1"):
        served(ids, adapters=["small"])
    with pytest.raises(TypeError, match="adapters must be a sequence of str or None, got 'small'"):
        served(ids, adapters="small")
    with pytest.raises(TypeError, match="adapters must be a mapping"):
        gossamer.serve_adapters(base, [folders["small"]])
    with pytest.raises(ValueError, match="at least one adapter"):
        gossamer.serve_adapters(base, {})
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        gossamer.serve_adapters("llama", folders)
    with pytest.raises(ValueError, match="model must be without adapters of PEFT"):
        gossamer.serve_adapters(peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"])), folders)


def edited(folder, target, change_config=None, change_weights=None):
    """A copy of an adapter's folder with its config or tensors changed."""
    target.mkdir()
    config = json.loads((folder / "adapter_config.json").read_text())
    weights = safetensors_torch.load_file(folder / "adapter_model.safetensors")
    config |= change_config or {}
    (target / "adapter_config.json").write_text(json.dumps(config))
    safetensors_torch.save_file(
        change_weights(weights) if change_weights else weights, target / "adapter_model.safetensors"
    )
    return target


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
BAD = {
    "use_dora": ({"use_dora": True}, None, "sets options that cannot be served beside others: use_dora=True"),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, None, "modules_to_save="),
    "pissa": ({"init_lora_weights": "pissa"}, None, "init_lora_weights='pissa'"),
    "bias": ({"bias": "all"}, None, "bias='all'"),
    "unknown option": ({"use_tomorrow": 1}, None, "use_tomorrow=1"),
    "another method": ({"peft_type": "LOHA"}, None, "must be of peft_type 'LORA', got 'LOHA'"),
    "no alpha": ({"lora_alpha": None}, None, "lora_alpha of .* must be a number, got None"),
    "an alpha beyond floats": ({"lora_alpha": 10**400}, None, "lora_alpha of .* must be a number, got 1000"),
    "an alpha of a pattern": (
        {"alpha_pattern": {"q": "2"}},
        None,
        r"alpha_pattern\['q'\] of .* must be a number, got '2'",
    ),
    "unknown module": (
        {},
        lambda w: w | {KEY.replace("0", "7"): w[KEY].clone()},
        "layers.7.*belongs to no module of the model",
    ),
    "no partner": ({}, lambda w: {k: v for k, v in w.items() if k != KEY}, "got no lora_A.weight"),
    "wrong size": (
        {},
        lambda w: w | {KEY: w[KEY][:, 1:].clone()},
        r"must have shapes \(r, 36\) and \(36, r\), got \(2, 35\)",
    ),
    "other ranks": ({}, lambda w: w | {KEY: w[KEY][:1].clone()}, r"got \(1, 36\) and \(36, 2\)"),
    "no factors": ({}, lambda w: {}, "must hold LoRA factors, got none"),
    "integers": ({}, lambda w: w | {KEY: w[KEY].int()}, "must be floating point"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_adapters_are_named(case, saved, tmp_path):
    base, folders = saved["llama"]
    config, weights, message = BAD[case]
    folder = edited(folders["small"], tmp_path / "bad", config, weights)
    with pytest.raises(ValueError, match=f"adapter 'bad'.*{message}"):
        gossamer.serve_adapters(base, {"good": folders["small"], "bad": folder})
    assert not any(m._forward_hooks or "forward" in m.__dict__ for m in base.modules())


class Trap:
    """Shows that it was unpickled."""

    def __reduce__(self):
        return (pytest.fail, ("a pickle was read",))


def test_files_missing_damaged_and_pickled(saved, tmp_path):
    base, folders = saved["llama"]
    folder = edited(folders["small"], tmp_path / "a")
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match="is not a safetensors file"):
        gossamer.serve_adapters(base, {"a": folder})
    weights.unlink()
    with pytest.raises(ValueError, match=r"must hold adapter_model\.safetensors, which is missing"):
        gossamer.serve_adapters(base, {"a": folder})
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match=r"holds adapter_model\.bin, a pickle, which runs code when it is read"):
        gossamer.serve_adapters(base, {"a": folder})
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        gossamer.serve_adapters(base, {"a": folder})
    with pytest.raises(ValueError, match=r"must be a folder with adapter_config\.json, which is missing"):
        gossamer.serve_adapters(base, {"a": tmp_path / "nowhere"})


def test_a_base_of_its_own_is_refused(saved, tmp_path):
    base, folders = saved["llama"]
    key = "base_model.model.model.embed_tokens.base_layer.weight"

    def change(weights):
        assert key in weights  # PEFT saves the table beside its update
        return weights | {key: weights[key] + 1}

    folder = edited(folders["elsewhere"], tmp_path / "own", None, change)
    with pytest.raises(
        ValueError, match=r"brings its own weight of model\.embed_tokens, which differs from the model's"
    ):
        gossamer.serve_adapters(base, {"own": folder})


class Positions(torch.nn.Module):
    """A table of positions beside a linear layer, as in GPT-2 and BERT."""

    def __init__(self):
        super().__init__()
        self.positions, self.out = torch.nn.Embedding(12, 8), torch.nn.Linear(8, 3)

    def forward(self, x):
        return self.out(x + self.positions(torch.arange(x.shape[1], device=x.device)[None]))


class Parts(torch.nn.Module):
    """Two layers that see the rows of a batch flattened: all of them, or those that a mask leaves."""

    def __init__(self):
        super().__init__()
        self.whole, self.part = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

    def forward(self, x, mask):
        rows = self.whole(x.flatten(0, 1))
        out = rows.clone()
        out[mask.flatten()] = self.part(rows[mask.flatten()])
        return out.view(x.shape)


def served_with(make, target, tmp_path, device):
    torch.manual_seed(0)
    base, folders = make().to(device), {}
    for name in ("a", "b"):
        model = drawn(peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=[target])))
        model.save_pretrained(tmp_path / target / name)
        folders[name] = tmp_path / target / name
    return gossamer.serve_adapters(base, folders)


def test_rows_that_no_request_owns_are_refused(tmp_path, device):
    """Positions that all requests share, or some tokens of a flattened batch, are not silently given to one request."""
    names, x = ["a", "b", "a", "b"], torch.randn(4, 12, 8, device=device)
    served = served_with(Positions, "positions", tmp_path, device)
    with pytest.raises(ValueError, match=r"cannot be assigned to rows in a layer whose rows \(1, 12\)"):
        served(x, adapters=names)
    assert served(x[:1], adapters=["a"]).shape == (1, 12, 3)
    mask = torch.zeros(4, 12, dtype=torch.bool, device=device)
    mask[0, :8] = True
    served = served_with(Parts, "part", tmp_path, device)
    with pytest.raises(
        ValueError, match=r"cannot be assigned to rows in a layer of 8 rows: .* \[4, 48\] were expected"
    ):
        served(x, mask, adapters=names)
    served = served_with(Parts, "whole", tmp_path, device)
    found = served(x, mask, adapters=names)
    for row, name in enumerate(names):
        torch.testing.assert_close(found[row : row + 1], served(x[row : row + 1], mask[row : row + 1], adapters=[name]))
