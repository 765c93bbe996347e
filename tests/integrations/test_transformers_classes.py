"""Every experts class of the installed transformers: gossamer's forward against the class's own eager one."""

import copy
import importlib
import importlib.util
import inspect
import os
import re
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from eager_draws import compare

from gossamer.testing import random_expert_ids

if importlib.util.find_spec("transformers") is None:
    pytest.skip("transformers is not installed", allow_module_level=True)

E, K, T, H, I = 6, 3, 17, 24, 16

# What runs as one fused operator: every class with transformers' own gate, and of those with a gate of their own these.
# A class that should and does not would silently lose its speed.
FUSED_GATES = {"BeamExperts", "GptOssExperts", "MiniMaxM3VLExperts", "OpenAIPrivacyFilterExperts"}

# Their eager forward computes in float32 whatever its dtype, so transformers' batched implementation is the truth.
EAGER_IS_FLOAT32 = {"OpenAIPrivacyFilterExperts"}


def find_classes():
    """``(module, class)`` names of every decorated class, read from the sources so that collection imports nothing."""
    models = Path(importlib.util.find_spec("transformers").origin).parent / "models"
    pattern = re.compile(r"^@use_experts_implementation(?:\([^)]*\))?\n(?:@.*\n)*class (\w+)", re.MULTILINE)
    found = []
    for path in sorted(models.glob("*/modeling_*.py")):
        for name in pattern.findall(path.read_text(encoding="utf-8")):
            found.append((f"transformers.models.{path.parent.name}.{path.stem}", name))
    return found


CLASSES = find_classes()


def shrink(config):
    """The config with every size that an experts class reads made small, wherever the model family calls it so."""
    sizes = {
        "hidden_size": H,
        "moe_hidden_size": H,
        "moe_latent_size": None,
        "intermediate_size": I,
        "moe_intermediate_size": I,
        "num_experts": E,
        "num_local_experts": E,
        "n_routed_experts": E,
        "moe_num_experts": E,
        "swiglu_limit": 1.0,
    }
    for name, size in sizes.items():
        if hasattr(config, name):
            current = getattr(config, name)
            setattr(config, name, [size] * len(current) if isinstance(current, (list, tuple)) else size)
    return config


def build(module_name, class_name):
    """A small instance with random weights, from the first config class of its model that it accepts."""
    module = importlib.import_module(module_name)
    cls = getattr(module, class_name)
    configs = [c for n, c in vars(module).items() if n.endswith("Config") and isinstance(c, type)]
    own = {"intermediate_size": I} if "intermediate_size" in inspect.signature(cls.__init__).parameters else {}
    refused = []
    for config_class in configs:
        try:
            experts = cls(shrink(config_class()), **own)
        except (AttributeError, TypeError) as error:
            refused.append(f"{config_class.__name__}: {error}")
            continue
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in experts.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        return experts
    raise AssertionError(f"{class_name} accepts none of its model's configs: {refused}")


def results(function, experts, dtype, draw, device):
    """Output and gradients of one call on inputs that depend on ``draw`` alone."""
    experts.to(dtype).zero_grad(set_to_none=True)
    ids = random_expert_ids(T, E, K, skew="zipf", seed=draw, device=device)
    generator = torch.Generator().manual_seed(draw)
    width = experts.down_proj.shape[1 if not experts.is_transposed else 2]
    x, weights, dy = (
        torch.randn(s, generator=generator, dtype=torch.float64) for s in ((T, width), (T, K), (T, width))
    )
    x, weights = (t.to(ids.device, dtype).requires_grad_() for t in (x, weights.abs()))
    y = function(experts, x, ids, weights)
    y.backward(dy.to(y))
    grads = {name: parameter.grad for name, parameter in experts.named_parameters()}
    return {"y": y.detach(), "x": x.grad, "weights": weights.grad} | grads


@pytest.mark.parametrize(("module_name", "class_name"), CLASSES, ids=[name for _, name in CLASSES])
def test_forward_and_gradients_equal_eager(module_name, class_name, device):
    from transformers.integrations.moe import _default_apply_gate, batched_mm_experts_forward

    from gossamer.integrations.transformers import experts_forward, replace

    experts = build(module_name, class_name).to(device)
    eager = type(experts).forward.__wrapped__
    exact = batched_mm_experts_forward if class_name in EAGER_IS_FLOAT32 else eager
    wide = copy.deepcopy(experts)
    compare(
        lambda draw: results(experts_forward, experts, torch.float32, draw, device),
        lambda draw: results(eager, experts, torch.float32, draw, device),
        lambda draw: results(exact, wide, torch.float64, draw, device),
    )
    switched = replace(experts).switched[0]
    plain = type(experts)._apply_gate is _default_apply_gate and not getattr(experts, "has_post_expert_norm", False)
    assert switched.fused or not (plain or class_name in FUSED_GATES), switched.detail


def test_the_walk_finds_the_classes():
    names = {name for _, name in CLASSES}
    assert {"MixtralExperts", "Qwen3MoeExperts", "OlmoeExperts", "GptOssExperts"} <= names
