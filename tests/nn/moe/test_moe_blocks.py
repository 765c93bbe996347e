"""Mixture-of-experts layers that take over the weights of transformers' blocks compute what the blocks do."""

import copy

import pytest
import torch

from gossamer.nn import MoE
from gossamer.testing import assert_close

H, I, K, T = 40, 24, 3, 45


def hf_block(model, block, config, **sizes):
    transformers = pytest.importorskip("transformers", minversion="5")
    module = pytest.importorskip(f"transformers.models.{model}.modeling_{model}")
    theirs = getattr(module, block)(getattr(transformers, config)(hidden_size=H, num_attention_heads=4, **sizes))
    for index, (name, tensor) in enumerate(sorted(theirs.state_dict().items())):
        std = 0.05 if "correction" in name else 0.3
        tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(index)) * std)
    return theirs


SIZES = {"num_experts_per_tok": K}
MOE_I = {"moe_intermediate_size": I, **SIZES}
BLOCKS = [
    (
        ("mixtral", "MixtralSparseMoeBlock", "MixtralConfig"),
        {"num_local_experts": 8, "intermediate_size": I, **SIZES},
        {"router": "topk_softmax"},
    ),
    (
        ("olmoe", "OlmoeSparseMoeBlock", "OlmoeConfig"),
        {"num_experts": 8, "intermediate_size": I, **SIZES},
        {"router": "softmax_topk"},
    ),
    (
        ("qwen3_moe", "Qwen3MoeSparseMoeBlock", "Qwen3MoeConfig"),
        {"num_experts": 8, "norm_topk_prob": True, **MOE_I},
        {"router": "softmax_topk", "renormalize": True},
    ),
    (
        ("qwen2_moe", "Qwen2MoeSparseMoeBlock", "Qwen2MoeConfig"),
        {"num_experts": 8, "shared_expert_intermediate_size": 33, **MOE_I},
        {"router": "softmax_topk", "shared_intermediate_size": 33, "shared_gate": True},
    ),
    (
        ("deepseek_v3", "DeepseekV3MoE", "DeepseekV3Config"),
        {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, **MOE_I},
        {"router": "sigmoid_topk", "n_group": 4, "topk_group": 2, "scale": 2.5, "shared_intermediate_size": I},
    ),
    (
        ("gpt_oss", "GptOssMLP", "GptOssConfig"),
        {"num_local_experts": 8, "intermediate_size": I, **SIZES},
        {
            "router": "topk_softmax",
            "router_bias": True,
            "bias": True,
            "interleaved": True,
            "transposed": True,
            "activation": "clamped_swiglu",
        },
    ),
]


def load_from_block(moe, state):
    """Their tensors under our names: only the router's name, and the shared expert's joined product, differ."""
    renamed = {
        name.replace("gate.", "router.", 1) if name.startswith("gate.") else name: t for name, t in state.items()
    }
    renamed = {name.replace("shared_experts.", "shared_expert."): t for name, t in renamed.items()}
    shared = "shared_expert.{}_proj.weight".format
    if shared("gate") in renamed:
        renamed[shared("gate_up")] = torch.cat([renamed.pop(shared("gate")), renamed.pop(shared("up"))])
    moe.load_state_dict(renamed)


@pytest.mark.parametrize(("names", "config", "options"), BLOCKS, ids=[b[0][0] for b in BLOCKS])
def test_transformers_blocks(device, names, config, options):
    theirs = hf_block(*names, **config).to(device)
    moe = MoE(H, I, 8, K, device=device, **options)
    load_from_block(moe, theirs.state_dict())
    x = torch.randn(3, T // 3, H, generator=torch.Generator().manual_seed(0)).to(device)

    def block(module, value):
        out = module(value)
        return out[0] if isinstance(out, tuple) else out

    with torch.no_grad():
        assert_close(moe(x), block(copy.deepcopy(theirs).double(), x.double()), block(theirs, x), "y")
