"""Delta-rule layers of the installed transformers: gossamer's computation against transformers' own."""

import copy
import importlib
import importlib.util
import inspect
import io
import os
import re
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

import gossamer
from gossamer.testing import assert_close

if importlib.util.find_spec("transformers") is None:
    pytest.skip("transformers is not installed", allow_module_level=True)

from gossamer.integrations import linear_attention

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_hidden_layers": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_head_dim": 8,
    "linear_num_heads": 3,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}


# What a config's own validation wants otherwise.
EXCEPTIONS = {"Glm5NextTextConfig": {"qk_rope_head_dim": 0}}


def find_classes():
    """``(module, class)`` names of every delta-rule layer, read from the sources so that collection imports nothing."""
    models = Path(importlib.util.find_spec("transformers").origin).parent / "models"
    pattern = re.compile(r"^@use_kernelized_func\(\s*\[([^\]]*)\]\s*\)\nclass (\w+)", re.MULTILINE)
    return [
        (f"transformers.models.{path.parent.name}.{path.stem}", name)
        for path in sorted(models.glob("*/modeling_*.py"))
        for functions, name in pattern.findall(path.read_text(encoding="utf-8"))
        if "delta" in functions
    ]


CLASSES = find_classes()


def config_for(module, cls):
    """A small config that a layer's class accepts: of the config classes that its module knows, the first."""
    refused = []
    for config_class in dict.fromkeys(
        c for n, c in vars(module).items() if n.endswith("Config") and isinstance(c, type)
    ):
        fields = {
            *inspect.signature(config_class.__init__).parameters,
            *getattr(config_class, "__dataclass_fields__", ()),
        }
        try:
            sizes = SIZES | EXCEPTIONS.get(config_class.__name__, {})
            config = config_class(**{name: size for name, size in sizes.items() if name in fields})
            return config, cls(config, layer_idx=0)
        except Exception as error:  # of some other model part, whatever it is
            refused.append(f"{config_class.__name__}: {error}")
    raise AssertionError(refused)


def build_layer(module_name, class_name):
    module = importlib.import_module(module_name)
    torch.manual_seed(0)
    config, layer = config_for(module, getattr(module, class_name))
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.endswith("A_log"):
                parameter.uniform_(-1, 1)
            else:
                parameter.normal_(0, 0.5 if parameter.dim() > 1 else 1)
    return config, layer


def switched(layer):
    copied = copy.deepcopy(layer)
    report = gossamer.replace(copied)
    assert [m.fused for m in report.switched] == [True] and not report.skipped
    return copied


def outputs_and_gradients(layer, x, dy, mask=None):
    x = x.clone().requires_grad_()
    y = layer(x, attention_mask=mask)
    layer.zero_grad()
    y.backward(dy)
    return {"y": y.detach(), "x": x.grad, **{name: p.grad for name, p in layer.named_parameters()}}


def test_classes_are_found():
    assert {name for _, name in CLASSES} >= {"Qwen3NextGatedDeltaNet", "KimiLinearDeltaAttention"}


@pytest.mark.parametrize(("module_name", "class_name"), CLASSES, ids=[name for _, name in CLASSES])
def test_every_layer(module_name, class_name, device):
    """Outputs and every gradient of every class, masked left padding included, more tokens than a chunk."""
    _, layer = build_layer(module_name, class_name)
    layer = layer.to(device)
    x, dy = torch.randn(2, 70, 32, device=device), torch.randn(2, 70, 32, device=device)
    mask = torch.ones(2, 70, device=device)
    mask[1, :9] = 0
    with gossamer.backend("reference"):
        truth = outputs_and_gradients(switched(layer).double(), x.double(), dy.double(), mask)
    baseline = outputs_and_gradients(layer, x, dy, mask)
    ours = outputs_and_gradients(switched(layer), x, dy, mask)
    assert ours.keys() == baseline.keys()
    for name, value in ours.items():
        assert_close(value, truth[name], baseline=baseline[name], name=name)


def causal_models():
    seen = {}
    for module_name, _ in CLASSES:
        seen.setdefault(module_name.split(".")[2], module_name)
    # Of the others a small whole model is no matter of sizes alone.
    return {name: path for name, path in seen.items() if name not in ("glm5_next", "qwen4_exp")}


MODELS = causal_models()


def build_model(module_name):
    module = importlib.import_module(module_name)
    cls = next(c for n, c in vars(module).items() if n.endswith("ForCausalLM") and c.__module__ == module_name)
    fields = {*inspect.signature(cls.config_class.__init__).parameters, *cls.config_class.__dataclass_fields__}
    sizes = {name: size for name, size in SIZES.items() if name in fields}
    if module_name.split(".")[2] in ("bailing_hybrid", "kimi_linear"):
        # So few layers would all be linear, which generation's cache does not take.
        sizes["layer_types"] = ["linear_attention"] * 3 + ["full_attention"]
    torch.manual_seed(1)
    return cls(cls.config_class(**sizes)).eval()


@pytest.mark.parametrize("name", MODELS)
def test_whole_models(name):
    """Logits, greedy generation token for token from a padded prompt, and back again."""
    model = build_model(MODELS[name])
    ids = torch.randint(1, 64, (2, 11))
    mask = torch.ones_like(ids)
    ids[1, :4], mask[1, :4] = 0, 0
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        before, generated = model(ids, attention_mask=mask).logits, model.generate(ids, **options)
        report = gossamer.replace(model)
        assert any("delta rule" in m.detail for m in report.switched)
        torch.testing.assert_close(model(ids, attention_mask=mask).logits, before, rtol=2e-4, atol=2e-5)
        assert torch.equal(model.generate(ids, **options), generated)
        gossamer.restore(model)
        assert torch.equal(model(ids, attention_mask=mask).logits, before)


@pytest.fixture
def qwen():
    return build_layer("transformers.models.qwen3_next.modeling_qwen3_next", "Qwen3NextGatedDeltaNet")[1]


def test_packed_sequences(qwen):
    """A pack that transformers' own code refuses gives each sequence's own output."""
    ours = switched(qwen).double()
    lengths = [5, 1, 8]
    x = torch.randn(1, sum(lengths), 32, dtype=torch.float64)
    ends = torch.tensor([0, *lengths]).cumsum(0)
    alone = torch.cat([ours(part) for part in x.split(lengths, 1)], 1)
    torch.testing.assert_close(ours(x, cu_seq_lens_q=ends), alone, rtol=1e-9, atol=1e-11)
    numbers = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths)).unsqueeze(0)
    torch.testing.assert_close(ours(x, cu_seq_lens_q=ends, seq_idx=numbers), alone, rtol=1e-9, atol=1e-11)
    with pytest.raises(ValueError, match="packed sequences apart"):
        qwen(x.float(), cu_seq_lens_q=ends)


def test_copies_pickles_and_restores(qwen):
    """A switched layer is copied, pickled and restored with its class; the original is not touched."""
    theirs = type(qwen)
    ours = switched(qwen)
    assert type(qwen) is theirs and type(ours) is not theirs and isinstance(ours, theirs)
    assert type(copy.deepcopy(ours)) is type(ours)
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    x = torch.randn(1, 4, 32)
    assert type(loaded) is type(ours) and torch.equal(loaded(x), ours(x))
    assert list(ours.state_dict()) == list(qwen.state_dict())
    gossamer.restore(ours)
    assert type(ours) is theirs
    with pytest.raises(ValueError, match=r"gossamer\.replace switched"):
        gossamer.restore(ours)


def test_compiled(qwen):
    """torch.compile traces gossamer's functions, not those of transformers' module."""
    ours = switched(qwen)
    x = torch.randn(2, 6, 32)
    torch._dynamo.reset()
    seen = []

    def inspect_graph(graph, inputs):
        seen.append(graph.print_readable(print_output=False))
        return graph.forward

    y = torch.compile(ours, backend=inspect_graph)(x)
    torch.testing.assert_close(y, ours(x))
    assert "gossamer.delta_rule" in "".join(seen)


def test_left_alone(qwen):
    """A layer with a forward of its own is named with the reason."""
    qwen.forward = lambda *args, **kwargs: None
    with pytest.raises(ValueError, match="its forward is overridden on the instance"):
        gossamer.replace(qwen)
    with pytest.raises(ValueError, match="must be a batch of one for packed sequences, got 2"):
        linear_attention._convolve(torch.randn(2, 4, 5), torch.randn(4, 3), cu_seqlens=torch.tensor([0, 5]))
