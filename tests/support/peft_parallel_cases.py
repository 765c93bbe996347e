"""The cases that the processes of tests/integrations/test_peft_parallel.py run.

Each function is a case. Every process runs all cases, in the same order.
"""

import os
import sys
from pathlib import Path

import processes
import torch
import torch.distributed as dist
import transformers
from contracts import assert_near
from peft import LoraConfig, PeftModel, get_peft_model
from processes import all_ranks_raise
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers.distributed import DistributedConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeForCausalLM

import gossamer
from gossamer.integrations.peft import mixed_adapters
from gossamer.parallel import clip_grad_norm_

FOLDER = Path(sys.argv[1])
RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
# With four processes there are two copies of each expert.
LAYOUTS = {"fsdp": {"fsdp_size": WORLD}, "tp": {"tp_size": WORLD, "tp_plan": "auto"}}


def base():
    """A model of one process, the same on all, saved once."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 24}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8}
    torch.manual_seed(0)
    config = Qwen3MoeConfig(**sizes, **heads, num_experts=8, num_experts_per_tok=3, dtype=torch.float64)
    model = Qwen3MoeForCausalLM(config).double()
    if not (FOLDER / "base").exists():
        dist.barrier()
        if RANK == 0:
            model.save_pretrained(FOLDER / "base")
        dist.barrier()
    model.set_experts_implementation("eager")
    return model


def divided(layout, experts="gossamer", ep_implementation="gossamer"):
    """The same model, divided by transformers."""
    transformers.logging.set_verbosity_error()
    base()
    config = DistributedConfig(
        ep_size=2 if layout == "fsdp" else WORLD, ep_implementation=ep_implementation, **LAYOUTS[layout]
    )
    model = Qwen3MoeForCausalLM.from_pretrained(
        FOLDER / "base", experts_implementation=experts, distributed_config=config, dtype=torch.float64
    )
    # PEFT would look them up, although they do not apply to experts that are divided whole.
    for name in [name for name in model.tp_plan if ".experts." in name]:
        del model.tp_plan[name]
    return model


def adapter_config(**options):
    return LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": [], "target_parameters": EXPERTS} | options)


@torch.no_grad()
def draw(model, adapter):
    """Give the adapter's factors new values, the same in every process and however they are divided."""
    generator = torch.Generator().manual_seed(1)
    state = {
        name: 0.2 * torch.randn(value.shape, generator=generator, dtype=torch.float64)
        for name, value in model.state_dict().items()
        if "lora_" in name and f".{adapter}." in name
    }
    assert state and not model.load_state_dict(state, strict=False).unexpected_keys


def adapted(model, **options):
    """With adapters whose factors are drawn."""
    model = get_peft_model(model, adapter_config(**options))
    draw(model, "default")
    return model


def batch(rank, step=0):
    return torch.randint(64, (2, 7), generator=torch.Generator().manual_seed(100 * step + rank))


def batches(layout, step=0):
    return [batch(rank, step) for rank in range(WORLD if layout == "fsdp" else 1)]


def mine(layout, step=0):
    return batch(RANK if layout == "fsdp" else 0, step)


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def near(found, right, at):
    try:
        assert_near(whole(found.detach()), right.detach(), slack=4096)
    except AssertionError as error:
        raise AssertionError(f"{at} is {whole(found)} and should be {right}") from error


def factors(model):
    """The divided factors by PEFT's names, flat, as a state dict holds them."""
    return {name: value for name, value in model.state_dict().items() if "lora_" in name}


def train(model, steps, data, clip):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for step in range(steps):
        torch.stack([model(tokens, labels=tokens).loss for tokens in data(step)]).mean().backward()
        clip(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()


def logits_and_gradients_are_those_of_one_process():
    one = adapted(base())
    for layout, experts in (("fsdp", "gossamer"), ("fsdp", "grouped_mm"), ("tp", "gossamer")):
        one.zero_grad()
        expected = [one(tokens, labels=tokens) for tokens in batches(layout)]
        torch.stack([output.loss for output in expected]).mean().backward()
        right = {name: p.grad for name, p in one.named_parameters() if p.grad is not None}
        assert right and all("experts" in name for name in right)
        at = f"{layout}, {experts}"
        model = adapted(divided(layout, experts))
        gossamer.replace(model)
        if experts == "grouped_mm":
            # The backward pass recomputes the layers, exchange and all.
            model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        tokens = mine(layout)
        output = model(tokens, labels=tokens)
        output.loss.backward()
        near(output.logits, expected[RANK if layout == "fsdp" else 0].logits, at)
        found = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert found.keys() == right.keys()
        for name, parameter in found.items():
            # By expert, each process with those of its own.
            assert parameter.to_local().shape[0] * parameter.device_mesh.size() == parameter.shape[0] == 8
            factor = model.get_submodule(name.removesuffix(".weight"))
            near(factor.flat(whole(parameter.grad)), right[name], f"{at}: gradient of {name}")


def ten_steps_give_the_same_parameters():
    """Adapters of attention are dense: DistributedDataParallel averages them, and leaves all DTensors alone."""
    options = {"target_modules": ["q_proj"]}
    one, model = adapted(base(), **options), adapted(divided("fsdp"), **options)
    gossamer.replace(model)
    before = {name: value.clone() for name, value in factors(model).items()}
    train(one, 10, lambda step: batches("fsdp", step), nn.utils.clip_grad_norm_)
    train(DistributedDataParallel(model), 10, lambda step: [mine("fsdp", step)], clip_grad_norm_)
    right, found = factors(one), factors(model)
    assert list(found) == list(right) and any("q_proj" in name for name in right)
    for name, value in found.items():
        near(value, right[name], name)
        assert not torch.equal(value, before[name]), name


def files_are_those_of_one_process():
    one, model = adapted(base()), adapted(divided("fsdp"))
    gossamer.replace(model)
    # Every process calls it, and one writes.
    model.save_pretrained(FOLDER / "divided", is_main_process=RANK == 0)
    if RANK == 0:
        one.save_pretrained(FOLDER / "one")
    dist.barrier()
    one_file, file = (load_file(FOLDER / name / "adapter_model.safetensors") for name in ("one", "divided"))
    assert file.keys() == one_file.keys() and all(torch.equal(file[name], one_file[name]) for name in file)
    tokens = mine("fsdp")
    right = one(tokens).logits
    near(PeftModel.from_pretrained(base(), FOLDER / "divided")(tokens).logits, right, "read by one process")
    read = PeftModel.from_pretrained(divided("fsdp"), FOLDER / "one")
    gossamer.replace(read)
    near(read(tokens).logits, right, "read by all")
    # A second adapter, of another rank, read into a switched model with and without memory for its first values.
    with torch.no_grad():
        for parameter in (p for n, p in one.named_parameters() if "lora_" in n):
            parameter.mul_(-1)
    right = one(tokens).logits
    if RANK == 0:
        one.save_pretrained(FOLDER / "negative")
    dist.barrier()
    for low_cpu_mem_usage in (False, True):
        name = f"second {low_cpu_mem_usage}"
        read.load_adapter(FOLDER / "negative", name, low_cpu_mem_usage=low_cpu_mem_usage)
        read.set_adapter(name)
        assert isinstance(read.base_model.model.model.layers[0].mlp.experts.lora_A[name].weight, DTensor)
        near(read(tokens).logits, right, name)


def adapters_are_switched_merged_and_undone():
    for layout in LAYOUTS:
        one, model = adapted(base()), adapted(divided(layout))
        plain = list(model.state_dict())
        assert gossamer.replace(model).switched
        assert gossamer.replace(model).switched  # once more changes nothing
        assert list(model.state_dict()) == plain
        tokens = mine(layout)
        right, without = one(tokens).logits, base()(tokens).logits
        with model.disable_adapter():
            near(model(tokens).logits, without, f"{layout}, disabled")
        model.merge_adapter()
        near(model(tokens).logits, right, f"{layout}, merged")
        model.unmerge_adapter()
        near(model(tokens).logits, right, f"{layout}, unmerged")
        for tuned in (one, model):
            tuned.add_adapter("more", adapter_config(r=2))
            draw(tuned, "more")
            tuned.base_model.set_adapter(["default", "more"])
        right = one(tokens).logits
        near(model(tokens).logits, right, f"{layout}, two at once")
        all_ranks_raise(ValueError, "safe_merge must be False", model.merge_adapter, safe_merge=True)
        all_ranks_raise(ValueError, "adapter_names must be None", mixed, model, tokens)
        inner = model.base_model.model.model.layers[0].mlp.experts.base_layer
        hook = inner.register_forward_hook(lambda *_: None)
        all_ranks_raise(ValueError, "without hooks", model, tokens)
        hook.remove()
        gossamer.restore(model)
        found = factors(model)
        for name, value in factors(one).items():
            assert type(found[name]) is torch.Tensor
            near(found[name], value, name)
        gossamer.replace(model)
        near(model.merge_and_unload()(tokens).logits, right, f"{layout}, unloaded")


def mixed(model, tokens):
    with mixed_adapters(model, ["default"] * len(tokens)):
        model(tokens)


def a_rank_without_rows_takes_part():
    """All tokens meet experts of the first rank."""
    one, model = adapted(base()), adapted(divided("tp"))
    gossamer.replace(model)
    experts = [m.base_model.model.model.layers[0].mlp.experts for m in (one, model)]
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    ids, weights = torch.tensor([[0], [1], [0]]), torch.ones(3, 1, dtype=torch.float64)
    found = []
    for module in experts:
        y = module(x, ids, weights)
        y.square().sum().backward()
        found.append((y, module.lora_A["default"].weight.grad, module.lora_B["default"].weight.grad))
    near(found[1][0], found[0][0], "y")
    for index, factor in ((1, experts[1].lora_A["default"]), (2, experts[1].lora_B["default"])):
        near(factor.flat(whole(found[1][index])), found[0][index], "gradient")


def other_divisions_are_refused():
    """With what to do instead."""
    words = 'ep_implementation="gossamer"'
    for layout in LAYOUTS:
        model = adapted(divided(layout, ep_implementation="all_to_all"))
        all_ranks_raise(ValueError, words, gossamer.replace, model)
        report = gossamer.replace(model, strict=False)
        assert report.skipped and all(
            words in skipped.reason for skipped in report.skipped if "experts" in skipped.name
        )
    one = adapted(base())
    if RANK == 0:
        one.save_pretrained(FOLDER / "served")
    dist.barrier()
    all_ranks_raise(
        ValueError, "divided among processes", gossamer.serve_adapters, divided("fsdp"), {"a": FOLDER / "served"}
    )


CASES = (
    logits_and_gradients_are_those_of_one_process,
    ten_steps_give_the_same_parameters,
    files_are_those_of_one_process,
    adapters_are_switched_merged_and_undone,
    a_rank_without_rows_takes_part,
    other_divisions_are_refused,
)


if __name__ == "__main__":
    processes.main(CASES, timeout=300)
