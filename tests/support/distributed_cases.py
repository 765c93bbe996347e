"""The cases that the two processes of tests/nn/test_distributed.py run, with RANK and WORLD_SIZE set.

Each function is a case. The argument of the script is a folder.
"""

import os
import sys
import warnings
from pathlib import Path

import processes
import torch
import torch.distributed as dist
import transformers
from contracts import assert_near
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeForCausalLM

import gossamer
from gossamer.integrations import transformers as integration  # noqa: F401, registers gossamer
from gossamer.nn import (
    expert_counts,
    gshard_balance_loss,
    importance_loss,
    load_balance_loss,
    load_loss,
    router_z_loss,
    routing_entropy_loss,
    sequence_balance_loss,
    slot_balance_loss,
    softmax_top_p,
    switch_balance_loss,
)
from gossamer.nn.replicas import EVALUATES_MODULES

FOLDER = Path(sys.argv[1])
RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def rows_of(rank):
    return torch.randn(5, 32, generator=torch.Generator().manual_seed(rank))


def ids_of(rank):
    # The ids of one process are not among the other's.
    return torch.randint(20, (6, 3), generator=torch.Generator().manual_seed(rank)) + 20 * rank


class Routed(nn.Module):
    """Experts with adapters, under a router in plain torch."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(32, 8)
        self.experts = gossamer.nn.LoRAExperts(8, 32, 48, 4)
        for parameter in self.experts.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.1)

    def forward(self, x):
        weights, ids = self.router(x).softmax(-1).topk(2)
        return self.experts(x, ids, weights)


LAYERS = {
    # Five tokens per process with two experts each leave some of sixteen without rows in one process or both.
    "MoE": lambda: gossamer.nn.MoE(32, 48, 16, 2),
    "MoE by blocks": lambda: gossamer.nn.MoE(32, 48, 16, 2, form="block_sparse", shared_intermediate_size=32),
    "LoRAExperts": Routed,
    "DoRA": lambda: gossamer.nn.LoRALinear(32, 24, 4, dora=True),
    "BlockSparseLinear": lambda: gossamer.nn.BlockSparseLinear.from_linear(nn.Linear(32, 128), density=0.5, block=16),
    "LowRankLinear": lambda: gossamer.nn.LowRankLinear(32, 24, 4),
    "EmbeddingBag": lambda: gossamer.nn.EmbeddingBag(40, 32),
}


def model_of(name):
    torch.manual_seed(0)
    layer = LAYERS[name]()
    # Another layer beside it, to be sharded on its own.
    return nn.Sequential(layer, nn.Linear(32, 4)) if name == "EmbeddingBag" else nn.Sequential(nn.Linear(32, 32), layer)


def loss_of(name, model, rank):
    y = model(ids_of(rank) if name == "EmbeddingBag" else rows_of(rank))
    return (y[0] if isinstance(y, tuple) else y).square().mean()


def mesh():
    return init_device_mesh("cpu", (WORLD,))


def shard(model):
    for child in model.children():
        fully_shard(child, mesh=mesh())
    return fully_shard(model, mesh=mesh())


def gradients(wrap):
    """Gradients of copies or shards are the mean of those of all processes' batches."""
    for name in LAYERS:
        whole = model_of(name)
        torch.stack([loss_of(name, whole, rank) for rank in range(WORLD)]).mean().backward()
        model = model_of(name)
        wrapped = wrap(model)
        with warnings.catch_warnings():
            # Changes in place of an output that is a view bypass FSDP2. A block-sparse product is a transposed view.
            if name != "BlockSparseLinear":
                warnings.filterwarnings("error", message=".*returned a view tensor")
            # Twice, since the second pass finds what the first one left in the buckets.
            for _ in range(2):
                model.zero_grad()
                loss_of(name, wrapped, RANK).backward()
        for (key, expected), found in zip(whole.named_parameters(), model.parameters(), strict=True):
            assert (expected.grad is None) == (found.grad is None), f"{name} {key}"
            if expected.grad is not None:
                grad = found.grad.full_tensor() if hasattr(found.grad, "full_tensor") else found.grad
                torch.testing.assert_close(grad, expected.grad, msg=lambda m, at=f"{name} {key}": f"{at}: {m}")


def copies_have_the_gradients_of_the_whole_batch():
    gradients(DistributedDataParallel)


def shards_have_the_gradients_of_the_whole_batch():
    gradients(shard)


def fused_model():
    torch.manual_seed(0)
    return nn.Sequential(gossamer.nn.EmbeddingBag(40, 32, optimizer=gossamer.optim.SGD(lr=0.5)), nn.Linear(32, 4))


def raises(words, function, *args):
    try:
        function(*args)
    except ValueError as error:
        assert words in str(error), str(error)
        return
    raise AssertionError(f"{words!r} was not raised")


def copies_of_a_stepping_table_are_refused():
    tables = {
        "EmbeddingBag": fused_model(),
        "Embedding": nn.Sequential(
            gossamer.nn.Embedding(40, 32, optimizer=gossamer.optim.SGD(lr=0.5)), nn.Linear(32, 4)
        ),
        "DynamicEmbedding": nn.Sequential(
            gossamer.nn.DynamicEmbedding(32, 64, pooling="sum", optimizer=gossamer.optim.SGD(lr=0.5)), nn.Linear(32, 4)
        ),
    }
    if EVALUATES_MODULES:
        tables["compiled"] = torch.compile(fused_model(), backend="eager")
    for name, model in tables.items():
        wrapped = DistributedDataParallel(model)
        raises("optimizer must be None under DistributedDataParallel", wrapped, ids_of(RANK))
        # A pass that takes no step is let through.
        with torch.no_grad():
            assert wrapped.eval()(ids_of(RANK)).isfinite().all(), name


def a_table_that_copies_leave_alone_steps():
    model, alone = fused_model(), fused_model()
    names = ["0.weight", *(f"0.{name}" for name, _ in model[0].named_buffers())]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    DistributedDataParallel(model)(ids_of(RANK)).square().mean().backward()
    alone(ids_of(RANK)).square().mean().backward()
    assert torch.equal(model[0].weight, alone[0].weight)
    assert not torch.equal(model[0].weight, fused_model()[0].weight)


def shards_of_a_stepping_table_are_refused():
    raises("optimizer must be None in a sharded model, got SGD", fully_shard, fused_model()[0])
    model = fused_model()
    fully_shard(model, mesh=mesh(), ignored_params={model[0].weight})
    model(ids_of(RANK)).square().mean().backward()
    assert not torch.equal(model[0].weight, fused_model()[0].weight)


def copies_move_the_same_blocks():
    model = model_of("BlockSparseLinear")
    wrapped, optimizer = DistributedDataParallel(model), torch.optim.AdamW(model.parameters(), lr=0.01)
    raises("rule 'rigl' needs one process", lambda: gossamer.nn.PruneAndRegrow(model, optimizer, until=10))
    moves = gossamer.nn.PruneAndRegrow(model, optimizer, rule="set", every=2, until=10, fraction=0.5)
    before = model[1].block_mask.clone()
    for _ in range(5):
        optimizer.zero_grad()
        loss_of("BlockSparseLinear", wrapped, RANK).backward()
        moves.step()
    assert not torch.equal(before, model[1].block_mask)
    for own in (model[1].block_mask.int(), model[1].values.detach()):
        found = [torch.empty_like(own) for _ in range(WORLD)]
        dist.all_gather(found, own.contiguous())
        assert all(torch.equal(own, each) for each in found)


def blocks_of_shards_do_not_move():
    model = shard(model_of("BlockSparseLinear"))
    optimizer = torch.optim.SGD(model.parameters())
    raises("must be whole to move", lambda: gossamer.nn.PruneAndRegrow(model, optimizer, rule="set", every=2, until=10))


def tensor_and_expert_parallel_models_give_the_same_logits():
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 32}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    torch.manual_seed(0)
    whole = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **heads, num_experts=8, num_experts_per_tok=2)).eval()
    if RANK == 0:
        whole.save_pretrained(FOLDER / "model")
    dist.barrier()
    tokens = torch.arange(24).view(2, 12)
    expected = whole(tokens).logits
    experts = {"distributed_config": DistributedConfig(enable_expert_parallel=True, tp_size=WORLD, tp_plan="auto")}
    for plan in ({"tp_plan": "auto"}, experts):
        model = AutoModelForCausalLM.from_pretrained(FOLDER / "model", experts_implementation="gossamer", **plan)
        found = model.eval()(tokens).logits
        found = found.full_tensor() if hasattr(found, "full_tensor") else found
        torch.testing.assert_close(found, expected, msg=lambda m, at=str(plan): f"{at}: {m}")


def transformers_exchanges_tokens_by_gossamer():
    """With a batch per process under FSDP2, and with one batch shared under tensor parallelism."""
    transformers.logging.set_verbosity_error()
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 32}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    torch.manual_seed(0)
    whole = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **heads, num_experts=8, num_experts_per_tok=3))
    if RANK == 0:
        whole.save_pretrained(FOLDER / "exchanged")
    dist.barrier()
    batches = [torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(rank)) for rank in range(WORLD)]
    layouts = {"fsdp": {"fsdp_size": WORLD}, "tp": {"tp_size": WORLD, "tp_plan": "auto"}}
    for layout, plan in layouts.items():
        mine = RANK if layout == "fsdp" else 0
        whole.zero_grad()
        expected = [whole(tokens, labels=tokens) for tokens in (batches if layout == "fsdp" else batches[:1])]
        torch.stack([output.loss for output in expected]).mean().backward()
        right = {name: parameter.grad for name, parameter in whole.named_parameters()}
        for experts in ("gossamer", "grouped_mm"):
            at = f"{layout}, {experts}"
            config = DistributedConfig(ep_size=WORLD, ep_implementation="gossamer", **plan)
            model = AutoModelForCausalLM.from_pretrained(
                FOLDER / "exchanged", experts_implementation=experts, distributed_config=config, dtype=torch.float32
            )
            output = model(batches[mine], labels=batches[mine])
            output.loss.backward()
            logits = output.logits.full_tensor() if hasattr(output.logits, "full_tensor") else output.logits
            torch.testing.assert_close(logits, expected[mine].logits, msg=lambda m, at=at: f"{at}: {m}")
            for name, parameter in model.named_parameters():
                grad = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
                torch.testing.assert_close(grad, right[name], msg=lambda m, at=f"{at} {name}": f"{at}: {m}")


def losses_are_those_of_the_whole_batch():
    """Processes have parts of one batch with different sizes and padding; the gradient is the mean of theirs."""
    generator = torch.Generator().manual_seed(0)
    logits, mask = 2 * torch.randn(30, 6, generator=generator, dtype=torch.float64), torch.arange(30) % 4 != 1
    mask[:6] = False  # a sequence without a token that counts
    part = slice(0, 18) if RANK == 0 else slice(18, 30)

    def losses_of(clean, mask, group):
        routing, noisy = softmax_top_p(clean, 0.6), clean + 0.1 * clean.detach().roll(1, 1)
        balance = (load_balance_loss, slot_balance_loss, switch_balance_loss, gshard_balance_loss, importance_loss)
        losses = [loss(routing, mask=mask, group=group) for loss in (*balance, router_z_loss, routing_entropy_loss)]
        losses.append(load_loss(clean, noisy, 0.5, 2, mask=mask, group=group))
        losses.append(sequence_balance_loss(routing, clean.shape[0] // 6, mask=mask, group=group))
        return losses, expert_counts(routing, mask=mask, group=group)

    mine, whole = logits[part].clone().requires_grad_(), logits.clone().requires_grad_()
    found, counts = losses_of(mine, mask[part], dist.group.WORLD)
    expected, expected_counts = losses_of(whole, mask, None)
    assert torch.equal(counts, expected_counts)
    for loss, truth in zip(found, expected, strict=True):
        assert_near(loss.detach(), truth.detach())
        (gradient,) = torch.autograd.grad(loss, mine, retain_graph=True)
        (true_gradient,) = torch.autograd.grad(truth, whole, retain_graph=True)
        assert_near(gradient / WORLD, true_gradient[part], slack=4096)


CASES = (
    copies_have_the_gradients_of_the_whole_batch,
    shards_have_the_gradients_of_the_whole_batch,
    copies_of_a_stepping_table_are_refused,
    a_table_that_copies_leave_alone_steps,
    shards_of_a_stepping_table_are_refused,
    copies_move_the_same_blocks,
    blocks_of_shards_do_not_move,
    tensor_and_expert_parallel_models_give_the_same_logits,
    transformers_exchanges_tokens_by_gossamer,
    losses_are_those_of_the_whole_batch,
)


if __name__ == "__main__":
    processes.main(CASES, timeout=300)
