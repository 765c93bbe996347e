"""The cases that the processes of tests/parallel/test_experts.py run.

Each function is a case. Every process runs all cases, in the same order.
"""

import copy
import functools
import os
import sys
import warnings
from pathlib import Path

import processes
import torch
import torch._inductor.lowering  # compiling imports this in each process otherwise
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from contracts import assert_near
from processes import all_ranks_raise
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import gossamer
from gossamer.nn import (
    BasisExperts,
    Experts,
    LatentExperts,
    LoRAExperts,
    MoE,
    Routing,
    expert_counts,
    load_balance_loss,
    update_expert_bias,
)
from gossamer.nn.moe.routers import ROUTERS
from gossamer.parallel import (
    check_overflow,
    clip_grad_norm_,
    count_traffic,
    gather_experts,
    overflow_counts,
    shard_experts,
)

FOLDER = Path(sys.argv[1])
RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
H = 16
# Tokens of each rank: many, one, none.
TOKENS = [9, 1, 0, 6][:WORLD]


def mesh():
    return init_device_mesh("cpu", (WORLD,), mesh_dim_names=("expert",))


def square_mesh(*names):
    return init_device_mesh("cpu", (2, WORLD // 2), mesh_dim_names=names)


def random(*shape, seed, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def inputs(rank, num_experts, top_k, dtype=torch.float64):
    """Tokens, ids and weights of a rank. Some ids are absent, and no token of rank 0 meets the last expert."""
    tokens = TOKENS[rank]
    scores = random(tokens, num_experts + 1, seed=10 + rank)
    if rank == 0:
        scores[:, num_experts - 1] = -100
    ids = scores.topk(top_k, dim=1).indices
    weights = random(tokens, top_k, seed=20 + rank).sigmoid().masked_fill(ids == num_experts, 0.0)
    return random(tokens, H, seed=rank, dtype=dtype), ids, weights.to(dtype)


def quantised(layer, form):
    gossamer.quantize_experts(nn.ModuleList([layer]), form)
    return layer


def trained(layer):
    """The layer with factors that are not zero."""
    for name, parameter in layer.named_parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3) if "magnitude" not in name else nn.init.uniform_(parameter, 0.5, 1)
    return layer


# E = 5 leaves the last of four ranks without an expert, and two with fewer than K.
KINDS = {
    "plain": (5, lambda **f: Experts(5, H, 8, **f)),
    "one each": (WORLD, lambda **f: Experts(WORLD, H, 8, bias=True, **f)),
    "transposed": (8, lambda **f: Experts(8, H, 8, bias=True, interleaved=True, transposed=True, **f)),
    "blocks": (5, lambda **f: Experts(5, H, 16, form="block_sparse", **f)),
    "lora": (5, lambda **f: trained(LoRAExperts(5, H, 8, 2, **f))),
    "dora": (8, lambda **f: trained(LoRAExperts(8, H, 8, 2, dora=True, **f))),
    "latent": (5, lambda **f: LatentExperts(5, H, 8, 4, **f)),
    "latent, wide output": (5, lambda **f: LatentExperts(5, H, 8, 4, shared_output=False, bias=True, **f)),
    "latent groups": (8, lambda **f: LatentExperts(8, H, 8, 4, group_size=2, bias=True, **f)),
    "separate latents": (8, lambda **f: LatentExperts(8, H, 8, 4, group_size=2, separate_latents=True, **f)),
    "basis": (5, lambda **f: BasisExperts(5, H, 8, 3, **f)),
    "int8": (5, lambda **f: quantised(Experts(5, H, 32, **f).requires_grad_(False), "int8")),
    "fp8": (5, lambda **f: quantised(Experts(5, H, 32, bias=True, **f).requires_grad_(False), "fp8")),
    "lora on int8": (5, lambda **f: trained(quantised(LoRAExperts(5, H, 32, 2, **f), "int8"))),
}
# Quantised weights multiply rows of at most float32.
NARROW = ("int8", "fp8", "lora on int8")


def layer_of(kind, dtype=torch.float64):
    torch.manual_seed(0)
    num_experts, make = KINDS[kind]
    return num_experts, make(dtype=torch.float32 if kind in NARROW else dtype)


def loss_of(y, rank):
    return (y * random(*y.shape, seed=30 + rank).to(y.dtype)).sum()


def sum_over_ranks(tensor):
    tensor = tensor.detach().clone()
    dist.all_reduce(tensor)
    return tensor


def stacked(layer, name, tensor):
    """A gradient of a plain layer, stacked by expert as in a divided layer."""
    if not name.endswith(("lora_A", "lora_B")):
        return tensor
    e, r = layer.num_experts, layer.rank
    if name.endswith("lora_A"):
        return tensor.view(e, r, -1)
    return tensor.view(-1, r, e).permute(2, 0, 1)


def compare(kind, divide, at):
    """Check that outputs and all gradients are those of one process with all ranks' tokens."""
    num_experts, whole = layer_of(kind)
    layer = divide(copy.deepcopy(whole))
    top_k = min(3, num_experts)
    dtype = torch.float32 if kind in NARROW else torch.float64
    for rank in range(WORLD):
        x, ids, weights = inputs(rank, num_experts, top_k, dtype)
        leaves = x.requires_grad_(), weights.requires_grad_()
        y = whole(x, Routing(ids, weights, num_experts))
        loss_of(y, rank).backward()
        if rank == RANK:
            expected = y.detach(), *(leaf.grad for leaf in leaves)
    x, ids, weights = inputs(RANK, num_experts, top_k, dtype)
    leaves = x.requires_grad_(), weights.requires_grad_()
    with count_traffic() as traffic:
        y = layer(x, Routing(ids, weights, num_experts))
        loss_of(y, RANK).backward()
    for name, found, right in zip(("y", "x", "weights"), (y, *(leaf.grad for leaf in leaves)), expected, strict=True):
        near(found, right, f"{at}: {kind}: {name}")
    compare_gradients(whole, layer, f"{at}: {kind}")
    return traffic, ids


def near(found, right, at):
    try:
        assert_near(found, right)
    except AssertionError as error:
        raise AssertionError(f"{at} is {found} and should be {right}") from error


def compare_gradients(whole, layer, at, scale=1.0):
    plain = dict(whole.named_parameters())
    for name, parameter in layer.named_parameters():
        right = plain[name].grad
        assert (right is None) == (parameter.grad is None), f"{at}: {name}"
        if right is None:
            continue
        if isinstance(parameter, DTensor):
            owner = layer.get_submodule(name.rpartition(".")[0])
            found, right = parameter.grad.full_tensor(), stacked(owner, name, right)
        else:
            # Parameters that all experts share are left to whatever averages dense parameters: each process holds only
            # its own part of the sum.
            found = sum_over_ranks(parameter.grad)
        near(found * scale, right, f"{at}: gradient of {name}")


def every_kind_gives_what_one_process_gives():
    for kind in KINDS:
        traffic, ids = compare(kind, lambda layer: shard_experts(layer, mesh(), gradients="sum"), "exact")
        e = KINDS[kind][0]
        share = -(-e // WORLD)
        pairs = {(t, i // share) for t, row in enumerate(ids.tolist()) for i in row if i < e}
        away = sum(rank != RANK for _, rank in pairs)
        slots = min(ids.shape[1], share)
        size = 4 if kind in NARROW else 8
        # Latents travel if all experts share them.
        there, back = {"latent": (4, 4), "latent, wide output": (4, H)}.get(kind, (H, H))
        flow = traffic.flows["expert tokens"]
        assert (flow.collectives, flow.rows) == (1, away)
        # One row per (token, rank) pair, and for each slot its id and weight, in whole words.
        assert flow.nbytes == away * -(-(there * size + slots * (size + 4)) // size) * size
        assert traffic.flows["expert outputs gradient"].nbytes == away * back * size
        assert traffic.flows["expert outputs"].rows == traffic.flows["expert tokens gradient"].rows
        assert list(traffic.flows) == [
            "expert tokens sizes",
            "expert tokens",
            "expert outputs",
            "expert outputs gradient",
            "expert tokens gradient",
        ]


def static_buffers_give_what_one_process_gives():
    for kind in ("plain", "lora", "latent groups"):
        traffic, _ = compare(
            kind,
            lambda layer: shard_experts(layer, mesh(), exchange="static", capacity=max(TOKENS), gradients="sum"),
            "static",
        )
        assert {label: flow.collectives for label, flow in traffic.flows.items()} == {
            "expert tokens": 1,
            "expert outputs": 1,
            "expert outputs gradient": 1,
            "expert tokens gradient": 1,
        }


def own_tokens_may_stay():
    """With overlap, a rank computes its own tokens during the exchange, and the shared expert while rows return."""
    for kind in ("plain", "lora", "basis", "one each"):
        for options in ({}, {"exchange": "static", "capacity": max(TOKENS)}):
            traffic, _ = compare(
                kind,
                lambda layer, o=options: shard_experts(layer, mesh(), gradients="sum", overlap=True, **o),
                "overlap",
            )
            assert traffic.flows["expert tokens"].collectives == 1
    whole = Block()
    y = whole(batch(RANK))[0]
    near(shard_experts(copy.deepcopy(whole), mesh(), overlap=True)(batch(RANK))[0], y, "with a shared expert")


def overflow_is_counted_and_left_out():
    torch.manual_seed(0)
    whole = Experts(WORLD, H, 8, dtype=torch.float64)
    x, ids = random(4, H, seed=RANK), torch.zeros(4, 1, dtype=torch.int64)
    weights = torch.ones(4, 1, dtype=torch.float64)
    for policy in ("drop", "raise"):
        layer = shard_experts(copy.deepcopy(whole), mesh(), exchange="static", capacity=3, overflow=policy)
        y = layer(x, ids, weights)
        near(y[:3], whole(x, ids, weights)[:3], policy)
        assert not y[3].any()
        assert overflow_counts(layer) == {"": 1}
        if policy == "drop":
            assert check_overflow(layer) == {"": WORLD}
        else:
            try:
                check_overflow(layer)
            except RuntimeError as error:
                assert f"(the layer itself): {WORLD} with (3,)" in str(error)
            else:
                raise AssertionError("nothing was raised")
        assert overflow_counts(layer) == {"": 0}


def one_rank_with_all_tokens_experts_gives_the_same_bits():
    torch.manual_seed(0)
    whole = Experts(2 * WORLD, H, 8)
    layer = shard_experts(copy.deepcopy(whole), mesh())
    x = random(7, H, seed=RANK).float()
    # Every token's experts are on one rank: all on the last, then each token's on another.
    for first in (torch.full((7,), 2 * WORLD - 2), torch.arange(7) % WORLD * 2):
        ids = torch.stack([first, first + 1], 1)
        weights = random(7, 2, seed=5).float()
        assert torch.equal(layer(x, ids, weights), whole(x, ids, weights))


def repeated_experts_add_up():
    torch.manual_seed(0)
    whole = Experts(WORLD, H, 8, dtype=torch.float64)
    layer = shard_experts(copy.deepcopy(whole), mesh())
    # Two slots of the same expert on a rank that has only one expert.
    ids = torch.tensor([[0, 0], [1, 1], [1, 0], [WORLD, 1]])
    leaves = [random(4, 2, seed=3).requires_grad_() for _ in range(2)]
    x = random(4, H, seed=RANK)
    found = [function(x, ids, weights) for function, weights in zip((whole, layer), leaves, strict=True)]
    near(found[1], found[0], "y")
    for y in found:
        y.square().sum().backward()
    near(leaves[1].grad, leaves[0].grad, "weights")


class Block(nn.Module):
    """A dense layer and a mixture of experts."""

    def __init__(self, num_experts=5, **options):
        super().__init__()
        torch.manual_seed(0)
        self.dense = nn.Linear(H, H, dtype=torch.float64)
        options = {"shared_intermediate_size": 8, "shared_gate": True} | options
        self.moe = MoE(H, 8, num_experts, 2, dtype=torch.float64, **options)

    def forward(self, x, **given):
        y, routing = self.moe(self.dense(x), return_routing=True, **given)
        return x + y, routing


def batch(rank, step=0, tokens=6):
    return random(tokens, H, seed=100 * step + rank)


def mean_loss(model, rank, step=0, group=None):
    y, routing = model(batch(rank, step))
    return y.square().mean() + 0.1 * load_balance_loss(routing, group=group)


def joined_loss(model, step=0):
    """The loss of all ranks' batches in one process."""
    y, routing = model(torch.cat([batch(rank, step) for rank in range(WORLD)]))
    return y.square().mean() + 0.1 * load_balance_loss(routing)


def every_router_serves():
    options = {"hash": {"vocabulary": 20}, "domain": {"num_domains": 4}}
    for name in sorted(ROUTERS):
        torch.manual_seed(0)
        whole = MoE(H, 8, 8, 2, router=name, dtype=torch.float64, **options.get(name, {}))
        layer = shard_experts(copy.deepcopy(whole).eval(), mesh(), gradients="sum")
        given = {"token_ids": torch.arange(6) % 4} if name in options else {}
        found = []
        for moe in (whole.eval(), layer):
            x = batch(RANK).requires_grad_()
            moe(x, **given).square().sum().backward()
            found.append((x.grad, [p.grad for p in moe.router.parameters()]))
        near(found[1][0], found[0][0], name)
        for mine, right in zip(found[1][1], found[0][1], strict=True):
            assert (mine is None) == (right is None), name
            if mine is not None:
                near(mine, right, name)


def ten_steps_of_copies_give_the_same_parameters():
    """Under DistributedDataParallel, with a balance loss over the whole batch and a clipped norm."""
    whole, model = Block(), Block()
    shard_experts(model, mesh())
    wrapped = DistributedDataParallel(model)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.01) for m in (whole, model)]
    for step in range(10):
        joined_loss(whole, step).backward()
        mean_loss(wrapped, RANK, step, dist.group.WORLD).backward()
        norms = nn.utils.clip_grad_norm_(whole.parameters(), 0.1), clip_grad_norm_(model.parameters(), 0.1)
        near(norms[1], norms[0], "norm")
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    same_parameters(whole, model)
    gather_experts(model)
    assert not any(isinstance(p, DTensor) for p in model.parameters())
    same_parameters(whole, model)
    near(model(batch(0))[0], whole(batch(0))[0], "gathered")


def same_parameters(whole, model):
    plain = dict(whole.named_parameters())
    for name, parameter in model.named_parameters():
        found = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        near(found.detach(), plain[name].detach(), name)


def copies_along_another_dimension():
    """Experts are divided along one dimension of the mesh and copied along the other."""
    if WORLD < 4:
        return
    square = square_mesh("data", "expert")
    whole, model = Block(4), Block(4)
    shard_experts(model, square, "expert", replicate="data")
    wrapped = DistributedDataParallel(model)
    joined_loss(whole).backward()
    # A part of the batch at a time, as in gradient accumulation.
    (mean_loss(wrapped, RANK, 0, dist.group.WORLD) / 2).backward()
    (mean_loss(wrapped, RANK, 0, dist.group.WORLD) / 2).backward()
    compare_dense_and_divided(whole, model)


def compare_dense_and_divided(whole, model):
    plain = dict(whole.named_parameters())
    for name, parameter in model.named_parameters():
        found = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
        near(found, plain[name].grad, f"gradient of {name}")


def fully_sharded_along_another_dimension():
    if WORLD < 4:
        return
    square = square_mesh("data", "expert")
    whole, model = Block(4), Block(4)
    shard_experts(model, square, "expert")
    fully_shard(model.moe.experts, mesh=square["data"])
    fully_shard(model, mesh=square["data", "expert"]._flatten("all"))
    with warnings.catch_warnings():
        # Changes in place of an output that is a view bypass FSDP2.
        warnings.filterwarnings("error", message=".*returned a view tensor")
        for _ in range(2):
            whole.zero_grad()
            model.zero_grad()
            joined_loss(whole).backward()
            mean_loss(model, RANK, 0, dist.group.WORLD).backward()
    compare_dense_and_divided(whole, model)


def two_hops_give_what_one_process_gives():
    if WORLD < 4:
        return
    square = square_mesh("node", "device")
    static = {"exchange": "static", "capacity": (max(TOKENS), 4 * max(TOKENS))}
    for options in ({}, static, {"overlap": True}):
        traffic, ids = compare(
            "transposed",
            lambda layer, o=options: shard_experts(layer, square, ("node", "device"), gradients="sum", **o),
            "two hops",
        )
        if not options:
            # A token crosses to the other node once, whichever experts it meets there.
            node = RANK // 2
            away = {t for t, row in enumerate(ids.tolist()) for i in row if i < 8 and i // 4 != node}
            assert traffic.flows["node tokens"].rows == len(away)


SLICED = {
    "plain": lambda: Experts(4, H, 8, dtype=torch.float64),
    "interleaved": lambda: Experts(4, H, 8, bias=True, interleaved=True, dtype=torch.float64),
    "transposed": lambda: Experts(4, H, 8, bias=True, transposed=True, dtype=torch.float64),
    "both": lambda: Experts(4, H, 8, interleaved=True, transposed=True, dtype=torch.float64),
    "ungated": lambda: Experts(4, H, 8, activation="gelu", bias=True, dtype=torch.float64),
}


def slices_of_experts_add_up():
    """The intermediate size is divided along one dimension of the mesh, and experts along the other."""
    square = square_mesh("tensor", "expert")
    place = RANK % (WORLD // 2)
    for name, make in SLICED.items():
        torch.manual_seed(0)
        whole = make()
        layer = shard_experts(copy.deepcopy(whole), square, "expert", tensor="tensor", gradients="sum")
        for rank in range(WORLD // 2):
            x, ids, weights = inputs(rank, 4, 2)
            leaves = x.requires_grad_(), weights.requires_grad_()
            y = whole(x, Routing(ids, weights, 4))
            loss_of(y, rank).backward()
            if rank == place:
                expected = y.detach(), *(leaf.grad for leaf in leaves)
        x, ids, weights = inputs(place, 4, 2)
        leaves = x.requires_grad_(), weights.requires_grad_()
        y = layer(x, Routing(ids, weights, 4))
        loss_of(y, place).backward()
        for what, found, right in zip(
            ("y", "x", "weights"), (y, *(leaf.grad for leaf in leaves)), expected, strict=True
        ):
            near(found, right, f"{name}: {what}")
        right = {key: parameter.grad for key, parameter in whole.named_parameters()}
        for key, parameter in layer.named_parameters():
            assert parameter.numel() == right[key].numel()
            near(parameter.grad.full_tensor().reshape(right[key].shape), right[key], f"{name}: {key}")
        norms = clip_grad_norm_(layer.parameters(), 1e9), nn.utils.clip_grad_norm_(whole.parameters(), 1e9)
        near(norms[0], norms[1], f"{name}: norm")
        gather_experts(layer)
        for key, parameter in layer.named_parameters():
            assert torch.equal(parameter, dict(whole.named_parameters())[key]), f"{name}: {key}"
    lora = LoRAExperts(4, H, 8, 2)
    divide = functools.partial(shard_experts, mesh=square, dim="expert", tensor="tensor")
    all_ranks_raise(ValueError, "LoRAExperts must hold plain float experts", lambda: divide(lora))
    all_ranks_raise(ValueError, "intermediate_size must be a multiple of 2", lambda: divide(Experts(4, H, 7)))
    all_ranks_raise(
        ValueError, "tensor must be another", lambda: shard_experts(lora, square, "expert", tensor="expert")
    )


def recomputed_activations_give_the_same_gradients():
    plain, model = Block(), Block()
    for m in (plain, model):
        shard_experts(m, mesh())
    for m, recompute in ((plain, False), (model, True)):
        x = batch(RANK).requires_grad_()
        y = checkpoint(lambda x, m=m: m(x)[0], x, use_reentrant=False) if recompute else m(x)[0]
        y.square().sum().backward()
    for (name, a), b in zip(plain.named_parameters(), model.parameters(), strict=True):
        a, b = (p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad for p in (a, b))
        assert torch.equal(a, b), name


def compiled_models_break_at_the_exchange():
    model = shard_experts(Block(), mesh())
    compiled = torch.compile(model, backend="aot_eager")
    found = []
    for function in (model, compiled):
        model.zero_grad()
        y = function(batch(RANK))[0]
        y.square().sum().backward()
        found.append([y, *(p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad for p in model.parameters())])
    for eager, other in zip(*found, strict=True):
        near(other, eager, "compiled")


def biases_move_alike_everywhere():
    whole = Block(router="sigmoid_topk")
    model = shard_experts(copy.deepcopy(whole), mesh())
    routings = [whole(batch(rank))[1] for rank in range(WORLD)]
    expected = whole.moe.router.e_score_correction_bias
    update_expert_bias(expected, sum(expert_counts(routing) for routing in routings), 0.01)
    bias = model.moe.router.e_score_correction_bias
    update_expert_bias(bias, expert_counts(model(batch(RANK))[1], group=dist.group.WORLD), 0.01)
    assert torch.equal(bias, expected)


def autocast_sends_narrow_rows():
    torch.manual_seed(0)
    whole = Experts(5, H, 8)
    layer = shard_experts(copy.deepcopy(whole), mesh())
    x, ids, weights = inputs(RANK, 5, 2, torch.float32)
    with count_traffic() as traffic, torch.autocast("cpu", torch.bfloat16):
        y, expected = layer(x, Routing(ids, weights, 5)), whole(x, Routing(ids, weights, 5))
    assert y.dtype == expected.dtype == torch.bfloat16
    near(y, expected, "y")
    outputs = traffic.flows["expert outputs"]
    assert outputs.nbytes == outputs.rows * H * 2


def checkpoints_serve_another_number_of_processes():
    model = Block()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    whole = copy.deepcopy(model)
    shard_experts(model, mesh())
    folder = FOLDER / "checkpoint"
    dcp.save(model.state_dict(), checkpoint_id=folder)
    loaded = [Block()]
    if WORLD == 4:
        loaded.append(shard_experts(Block(), square_mesh("data", "expert"), "expert"))
    for other in loaded:
        state = other.state_dict()
        dcp.load(state, checkpoint_id=folder)
        other.load_state_dict(state)
        same_parameters(whole, other)


def experts_too_large_for_one_process_are_never_whole():
    """Made on the meta device, divided, then given memory and loaded."""
    torch.manual_seed(0)
    whole = Experts(5, H, 8)
    folder = FOLDER / "large"
    dcp.save(shard_experts(copy.deepcopy(whole), mesh()).state_dict(), checkpoint_id=folder)
    layer = shard_experts(Experts(5, H, 8, device="meta"), mesh()).to_empty(device="cpu")
    state = layer.state_dict()
    dcp.load(state, checkpoint_id=folder)
    layer.load_state_dict(state)
    same_parameters(whole, layer)
    x, ids, weights = inputs(RANK, 5, 2, torch.float32)
    near(layer(x, ids, weights), whole(x, ids, weights), "y")


def bad_input_is_refused_on_every_rank():
    m = mesh()
    few = Experts(WORLD - 1, H, 8)
    all_ranks_raise(ValueError, "at most as many ranks as experts", lambda: shard_experts(few, m))
    layer = Experts(5, H, 8)
    all_ranks_raise(ValueError, "must be among the mesh's dimensions ('expert',)", lambda: shard_experts(layer, m, "x"))
    all_ranks_raise(TypeError, "mesh must be a torch.distributed.DeviceMesh", lambda: shard_experts(layer, WORLD))
    all_ranks_raise(ValueError, "replicate must be another", lambda: shard_experts(layer, m, replicate="expert"))
    all_ranks_raise(ValueError, "capacity must be given", lambda: shard_experts(layer, m, exchange="static"))
    all_ranks_raise(ValueError, "expert layers, got none", lambda: shard_experts(nn.Linear(2, 2), m))
    peer = gossamer.nn.ProductKeyExperts(H, 16, num_heads=1, top_k=2)
    all_ranks_raise(ValueError, "ProductKeyExperts must define stacks()", lambda: shard_experts(peer, m))
    odd = LatentExperts(6, H, 8, 4, group_size=2)
    all_ranks_raise(ValueError, "in_proj has 3 parts for groups", lambda: shard_experts(odd, m))
    other = Experts(5 + (RANK == 1), H, 8)
    all_ranks_raise(ValueError, "the same expert layers on every rank", lambda: shard_experts(other, m))
    apart = Experts(5, H, 8)
    if RANK == WORLD - 1:
        apart.down_proj = nn.Parameter(apart.down_proj.to("meta"))
    all_ranks_raise(ValueError, "Experts must have all experts on one device", lambda: shard_experts(apart, m))
    lost = Experts(5, H, 8) if RANK else nn.Linear(2, 2)
    all_ranks_raise(ValueError, "rank 0: module must hold gossamer's", lambda: shard_experts(lost, m))
    all_ranks_raise(ValueError, "must hold experts that shard_experts divided", lambda: gather_experts(layer))
    shard_experts(layer, m)
    all_ranks_raise(ValueError, "not divided yet", lambda: shard_experts(layer, m))
    all_ranks_raise(ValueError, "quantise it before it is divided", lambda: quantised(layer, "int8"))
    x, ids, weights = inputs(0, 5, 2, torch.float32)
    wrong = x if RANK else x[:, 1:]
    all_ranks_raise(ValueError, "rank 0: x must have shape", lambda: layer(wrong, ids, weights))
    # Nothing is left over for the next call.
    assert layer(x, ids, weights).shape == x.shape


CASES = (
    every_kind_gives_what_one_process_gives,
    static_buffers_give_what_one_process_gives,
    own_tokens_may_stay,
    overflow_is_counted_and_left_out,
    one_rank_with_all_tokens_experts_gives_the_same_bits,
    repeated_experts_add_up,
    every_router_serves,
    ten_steps_of_copies_give_the_same_parameters,
    copies_along_another_dimension,
    fully_sharded_along_another_dimension,
    two_hops_give_what_one_process_gives,
    slices_of_experts_add_up,
    recomputed_activations_give_the_same_gradients,
    compiled_models_break_at_the_exchange,
    biases_move_alike_everywhere,
    autocast_sends_narrow_rows,
    checkpoints_serve_another_number_of_processes,
    experts_too_large_for_one_process_are_never_whole,
    bad_input_is_refused_on_every_rank,
)

if __name__ == "__main__":
    processes.main(CASES)
