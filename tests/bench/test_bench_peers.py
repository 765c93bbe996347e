"""The benchmarks' peers: found by import, chosen by name, called in the layouts that they document."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from bench_requests import LARGER, SMALL, small_request

from gossamer.bench.families import expert_peers, experts
from gossamer.bench.harness import peers, runner
from gossamer.bench.harness.case import Variant


def test_missing_packages_are_skipped_by_name(monkeypatch):
    for module in ("transformers.models.qwen3_moe.modeling_qwen3_moe", "sonicmoe", "scattermoe.parallel_experts"):
        monkeypatch.setitem(sys.modules, module, None)
    case = runner.family("moe").build(small_request("cpu"))
    assert [v.name for v in case.variants][:2] == ["gossamer", "equal-FLOP dense"]
    for name, package in [
        ("transformers eager", "transformers"),
        ("SonicMoE", "sonic-moe"),
        ("ScatterMoE", "scattermoe"),
    ]:
        assert case.skipped[name] == f"{package} is not installed"


def test_peers_are_chosen_by_name(monkeypatch):
    known = expert_peers.PEERS
    assert peers.choose(known, "all") is None and peers.choose(known, "none") == ()
    assert peers.choose(known, "transformers") == ("transformers eager", "transformers grouped_mm")
    assert peers.choose(known, "SonicMoE-its-router,liger") == ("SonicMoE + its router", "Liger")
    assert peers.choose(known, "sonicmoe") == ("SonicMoE", "SonicMoE + its router")
    for bad in ("sonic", "", "all,none"):
        with pytest.raises(ValueError, match=r"--peers must be one of all, none, transformers-eager, .*got "):
            peers.choose(known, bad)
    moe, cpu = runner.family("moe"), torch.device("cpu")
    wanted = runner.requests(moe, cpu, shape="24,16,8,6,2", dtype="fp32", peers="transformers-eager")
    case = moe.build(wanted[0])
    assert [v.name for v in case.variants] == ["gossamer", "equal-FLOP dense", "transformers eager"]
    assert case.skipped == {}
    alone = moe.build(replace(wanted[0], peers=()))
    assert [v.name for v in alone.variants] == ["gossamer", "equal-FLOP dense"] and alone.skipped == {}
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with pytest.raises(ValueError, match="--peers liger: liger-kernel is not installed"):
        runner.requests(moe, cpu, peers="transformers,liger")


def test_a_peer_for_some_of_the_cases_is_skipped_in_the_others(device):
    def adapt(name, role, value):
        return Variant(name, role, lambda: torch.full((1,), value))

    half = peers.Peer("Half", None, "half-package", adapt, half_only=True)
    on_gpu = peers.Peer("On GPU", "json", "gpu-package", adapt, cuda_only=True)
    broken = peers.Peer("Old", "json", "old-package", lambda *_: peers.attribute(json, "experts", "old-package"))
    narrow = small_request("cpu", dtype="bf16")
    found, skipped = peers.gather((half, on_gpu, broken), narrow, 3.0)
    assert [(v.name, v.role, v.forward().item()) for v in found] == [("Half", "peer", 3.0)]
    assert skipped == {
        "On GPU": "gpu-package runs on CUDA only",
        "Old": "the installed old-package has no experts",
    }
    named = [replace(small_request("cpu", dtype=d), peers=("Half",)) for d in ("fp32", "bf16")]
    peers.require((half, on_gpu), named)
    with pytest.raises(ValueError, match="--peers half: half-package computes in 16 bits only"):
        peers.require((half, on_gpu), named[:1])


def test_interleaved_weights_are_put_back_in_halves(device):
    problem = experts.make_problem(small_request(device))
    mixed = expert_peers._interleaved(problem)
    assert torch.equal(mixed[:, 0], problem.gate_up[:, 0]) and torch.equal(mixed[:, 1], problem.gate_up[:, SMALL["I"]])
    assert torch.equal(expert_peers._separated({"dgate_up": mixed})["dgate_up"], problem.gate_up)


def test_peers_are_called_in_their_own_layouts(monkeypatch):
    """Stand-ins that compute, by plain torch, what each peer documents for the arguments that it is given."""

    def experts_of(x, weights, ids, gate, up, down):
        rows = torch.nn.functional.silu(torch.einsum("th,tkih->tki", x, gate[ids])) * torch.einsum(
            "th,tkih->tki", x, up[ids]
        )
        return torch.einsum("tki,tkhi,tk->th", rows, down[ids], weights)

    def sonic(x, scores, tokens, ids, w1, b1, w2, b2, num_experts, stream, activation, inference):
        assert (b1, b2, activation, num_experts) == (None, None, "swiglu", SMALL["E"])
        k = scores.numel() // x.shape[0]
        assert torch.equal(tokens, torch.arange(x.shape[0]).int().repeat_interleave(k))
        w1, w2 = w1.permute(2, 0, 1), w2.permute(2, 0, 1)
        shape = (x.shape[0], k)
        return experts_of(x, scores.view(shape), ids.view(shape).long(), w1[:, 0::2], w1[:, 1::2], w2), None

    def sonic_routed(x, router, w1, b1, w2, b2, k, stream, activation, inference):
        logits, ids = (x @ router.T).topk(k, dim=1)
        w1, w2 = w1.permute(2, 0, 1), w2.permute(2, 0, 1)
        return experts_of(x, logits.softmax(1), ids, w1[:, 0::2], w1[:, 1::2], w2), None, None

    class Fused(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, gate_up, down, ids, weights):
            assert ids.dtype == torch.int32
            with torch.enable_grad():
                ctx.inputs = [t.detach().requires_grad_() for t in (x, gate_up, down, weights)]
                x, gate_up, down, weights = ctx.inputs
                ctx.y = experts_of(x, weights, ids.long(), *gate_up.chunk(2, 1), down)
            return ctx.y.detach()

        @staticmethod
        def backward(ctx, dy):
            dx, dgate_up, ddown, dweights = torch.autograd.grad(ctx.y, ctx.inputs, dy)
            return dx, dgate_up, ddown, None, dweights

    def sort(ids, num_experts):
        experts_sorted, order = torch.sort(ids.flatten())
        return experts_sorted, order, ids.flatten().bincount(minlength=num_experts).cumsum(0)

    def parallel_linear(x, weight, k, expert, order, offsets, gates=None, grouped_in=False, grouped_out=False):
        rows = torch.einsum("rc,rcn->rn", x if grouped_in else x[order // k], weight[expert])
        if grouped_out:
            return rows
        slots = torch.zeros_like(rows).index_copy(0, order, rows)
        return torch.einsum("tkn,tk->tn", slots.view(*gates.shape, -1), gates)

    class Dropless:
        def __init__(self, arguments):
            assert (arguments.mlp_type, arguments.mlp_impl, arguments.bias) == ("glu", "grouped", False)
            self.arguments, self.mlp = arguments, SimpleNamespace()

        def forward_once(self, x, weights, ids):
            sizes = (self.arguments.moe_num_experts, self.arguments.ffn_hidden_size, self.arguments.hidden_size)
            gate, up, down = (w.view(sizes) for w in (self.mlp.w1, self.mlp.v1, self.mlp.w2))
            return experts_of(x, weights, ids, gate, up, down.transpose(1, 2)), None

    swiglu = SimpleNamespace(ActivationType=SimpleNamespace(SWIGLU="swiglu"))
    stand_ins = {
        "sonicmoe": SimpleNamespace(moe_general_routing_inputs=sonic, moe_TC_softmax_topk_layer=sonic_routed),
        "sonicmoe.enums": swiglu,
        "liger_kernel.ops.fused_moe": SimpleNamespace(LigerFusedMoEFunction=Fused),
        "scattermoe.parallel_experts": SimpleNamespace(flatten_sort_count=sort, parallel_linear=parallel_linear),
        "megablocks.layers.dmoe": SimpleNamespace(ParallelDroplessMLP=Dropless),
        "megablocks.layers.arguments": SimpleNamespace(Arguments=SimpleNamespace),
    }
    monkeypatch.setattr(peers.importlib, "import_module", lambda name: stand_ins[name])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    request = small_request("cpu", sizes=LARGER)
    problem = experts.make_problem(request)
    gates = experts.make_gates(problem, experts.make_sample(problem), request)
    called = []
    for peer in expert_peers.PEERS:
        name = peer.name
        if name.startswith("transformers"):
            continue
        variant = peer.adapt(name, peer.role, problem)
        for _ in range(2):
            verdict = gates[variant.gate]()(variant.outputs("both"))
            # A wrong layout is an error of order one; how well a stand-in rounds is not what is tested.
            assert verdict.error < 8 * torch.finfo(torch.float32).eps, name
        assert variant.outputs("forward")["y"].shape == problem.x.shape
        called.append(name)
    assert called == ["SonicMoE", "SonicMoE + its router", "ScatterMoE", "Liger", "MegaBlocks"]
