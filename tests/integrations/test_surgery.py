"""Every kind of surgery on one model: surveys come before changes, and restore undoes them all, in copies too."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import gossamer
from gossamer.integrations import surgery
from gossamer.nn import BlockSparseLinear, Embedding

peft = pytest.importorskip("peft")

from peft_models import drawn, qwen3_moe, tokens  # noqa: E402


def adapted(device):
    """Embeddings, LoRA layers, experts of transformers and plain linear layers in one model."""
    torch.manual_seed(3)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    return drawn(peft.get_peft_model(qwen3_moe(), config)).to(device)


def classes(model):
    return [type(module) for module in model.modules()]


def implementations(model):
    return [m.config._experts_implementation for m in model.modules() if "config" in m.__dict__]


def test_one_restore_undoes_every_adapter(device):
    model = adapted(device)
    ids = tokens(device)
    before = classes(model), implementations(model), model(input_ids=ids).logits
    report = gossamer.replace(model, embeddings=True)
    assert report.kind == "embedding modules and LoRA layers and experts modules"
    assert {adapter for _, _, adapter in surgery.marked(model)} == {"embeddings", "peft", "transformers"}
    twin = copy.deepcopy(model)
    for changed in (model, nn.Sequential(twin)):
        gossamer.restore(changed)
        inner = changed[0] if isinstance(changed, nn.Sequential) else changed
        assert (classes(inner), implementations(inner)) == before[:2]
        assert torch.equal(inner(input_ids=ids).logits, before[2])
        assert surgery.marked(changed) == []
        with pytest.raises(ValueError, match=r"gossamer\.replace switched, or that sparsify or compress_embeddings"):
            gossamer.restore(changed)


def test_what_one_adapter_refuses_changes_nothing(device):
    """Every adapter looks at the model before the first one changes it."""
    model = adapted(device)
    experts = next(m for m in model.modules() if "has_bias" in m.__dict__)
    experts.down_proj = nn.Parameter(experts.down_proj.to(torch.float8_e4m3fn), requires_grad=False)
    before = classes(model), implementations(model)
    with pytest.raises(ValueError, match="model has experts modules that gossamer cannot compute"):
        gossamer.replace(model, embeddings=True)
    assert (classes(model), implementations(model)) == before and surgery.marked(model) == []


def test_parts_that_cannot_be_undone_keep_the_rest(device):
    """Quantised experts have no float weights to restore, so the embeddings beside them stay switched too."""
    model = nn.ModuleDict({"table": nn.Embedding(8, 4), "experts": gossamer.nn.Experts(2, 32, 32)}).to(device)
    gossamer.replace(model, embeddings=True)
    gossamer.quantize_experts(model, "int8")
    with pytest.raises(ValueError, match="experts must hold its float weights to be restored, they were quantised"):
        gossamer.restore(model)
    assert type(model["table"]) is Embedding
    gossamer.restore(model["table"])
    assert type(model["table"]) is nn.Embedding


def test_block_sparse_layers_become_dense_again(device):
    """They keep the values that training left in their blocks, wherever the model holds the layer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48, device=device), nn.ReLU(), nn.Linear(48, 32, bias=False, device=device))
    model.again = model[2]
    model[2].weight.requires_grad_(False)
    gossamer.sparsify(model, 0.5, 16)
    with torch.no_grad():
        model[0].values.mul_(3)
    x = torch.randn(5, 64, device=device)
    expected, masks = model[:3](x), [model[i].block_mask.clone() for i in (0, 2)]
    loaded = pickle.loads(pickle.dumps(model))
    for changed in (model, loaded):
        assert [type(changed[i]) for i in (0, 2)] == [BlockSparseLinear, BlockSparseLinear]
        gossamer.restore(changed)
        assert [type(changed[i]) for i in (0, 2)] == [nn.Linear, nn.Linear] and changed.again is changed[2]
        assert [changed[i].weight.requires_grad for i in (0, 2)] == [True, False]
        for layer, mask in zip((changed[0], changed[2]), masks, strict=True):
            blocks = layer.weight.unfold(0, 16, 16).unfold(1, 16, 16).abs().amax((2, 3))
            assert torch.equal(blocks > 0, mask)
        torch.testing.assert_close(changed[:3](x), expected)


def test_a_copy_keeps_its_own_marks():
    """A shallow copy shares what its attributes hold, and is restored by itself nevertheless."""
    model = nn.Sequential(nn.Embedding(8, 4))
    gossamer.replace(model, embeddings=True)
    shallow = copy.copy(model[0])
    gossamer.restore(model)
    assert type(model[0]) is nn.Embedding and type(shallow) is Embedding
    gossamer.restore(shallow)
    assert type(shallow) is nn.Embedding


def test_models_that_are_none():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got int"):
        gossamer.restore(3)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        gossamer.replace("model", embeddings=True)
