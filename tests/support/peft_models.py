"""Tiny transformers models with PEFT adapters, and the error rule over a whole model's logits and gradients."""

from __future__ import annotations

import copy

import torch
from helpers import DRAWS
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from gossamer.testing import MAX_EPS, MAX_FACTOR, RMS_EPS, RMS_FACTOR, errors

VOCABULARY = 61


def llama(num_hidden_layers=2):
    """Sizes that are not multiples of a block; grouped keys."""
    sizes = {"hidden_size": 36, "intermediate_size": 50, "num_attention_heads": 3, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=num_hidden_layers, **sizes))


def gpt2():
    """Linear layers stored transposed, with biases; tied embeddings."""
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=24, n_layer=2, n_head=2, n_positions=64)
    config.attn_pdrop = config.embd_pdrop = config.resid_pdrop = 0.0
    return GPT2LMHeadModel(config)


def qwen3_moe():
    """Experts of transformers, by its loop over them, which computes in float64 too."""
    sizes = {"hidden_size": 32, "moe_intermediate_size": 20, "num_experts": 5, "num_experts_per_tok": 2}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=VOCABULARY, **sizes, **heads))
    model.set_experts_implementation("eager")
    return model


MODELS = {"llama": llama, "gpt2": gpt2, "qwen3_moe": qwen3_moe}


def wrapped(name, device, *, dtype=None, autocast_adapter_dtype=True, **options):
    """A PEFT model with a ``LoraConfig`` of these options; all its factors are drawn, so that none is zero."""
    torch.manual_seed(1)
    model = MODELS[name]().to(device=device, dtype=dtype)
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"]} | options
    return drawn(get_peft_model(model, LoraConfig(**options), autocast_adapter_dtype=autocast_adapter_dtype))


@torch.no_grad()
def drawn(model):
    """The model with newly drawn low-rank factors."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            scale = 0.2 * parameter.square().mean().sqrt() if "magnitude" in name else 0.2
            noise = torch.randn(parameter.shape, device=parameter.device) * scale
            parameter.copy_(parameter + noise if "magnitude" in name else noise)
    return model


def tokens(device, rows=3, length=9, seed=2):
    """``(rows, length)`` ids."""
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed)).to(device)


def run(model, ids, **given):
    """The logits of a training step and the gradients of all parameters that have one, by name."""
    model.zero_grad()
    out = model(input_ids=ids, labels=ids, **given)
    out.loss.backward()
    return {"logits": out.logits.detach()} | {
        n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None
    }


def check_switched(model, switch, ids, step=run, baseline_step=None):
    """Compare ``model`` after ``switch(model)`` with itself before, by the rule of gossamer.testing.assert_close.

    The baseline is PEFT in the model's own dtypes; if one run does not settle it, the largest error over several runs
    with other ids, which are other draws of the same sums. ``baseline_step`` is the step that PEFT runs, if not
    ``step``.
    """
    baseline_step = baseline_step or step
    theirs, wide = copy.deepcopy(model), copy.deepcopy(model).double()
    truth = step(wide, ids)
    baseline = baseline_step(model, ids)
    bounds = {name: errors(value, truth[name]) for name, value in baseline.items()}
    report = switch(model)
    actual = step(model, ids)
    assert actual.keys() == baseline.keys()
    for name, value in actual.items():
        assert value.dtype == baseline[name].dtype and value.shape == baseline[name].shape, name
    for draw in range(DRAWS):
        bad = [name for name, value in actual.items() if _violates(value, truth[name], bounds[name])]
        if not bad:
            break
        other = tokens(ids.device, *ids.shape, seed=100 + draw)
        other_truth = step(wide, other)
        for name, value in baseline_step(theirs, other).items():
            bounds[name] = tuple(map(max, bounds[name], errors(value, other_truth[name])))
    assert not bad, {name: (errors(actual[name], truth[name]), bounds[name]) for name in bad}
    return report, actual


def _violates(value, truth, bound):
    rms, worst = errors(value, truth)
    eps = torch.finfo(value.dtype).eps
    return rms > RMS_FACTOR * bound[0] + RMS_EPS * eps or worst > MAX_FACTOR * bound[1] + MAX_EPS * eps
