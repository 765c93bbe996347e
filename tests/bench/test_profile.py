"""The profiler: exact costs, times that add up, traces, memory, and its errors."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import make_dispatch
from torch import nn
from typer.testing import CliRunner

import gossamer
from gossamer import _backend
from gossamer.bench.harness import nsight, profile_memory, profile_report
from gossamer.bench.harness import profile as profiling
from gossamer.bench.harness.ceilings import Ceilings
from gossamer.bench.harness.cost import Cost, CostRecorder, declared
from gossamer.bench.harness.profile_events import REST, Phase, fraction, kernel_rows, launches
from gossamer.bench.harness.runner import FAMILIES, family
from gossamer.cli import app

SHAPE = "192,64,32,6,2"
CEILINGS = Ceilings({"fp32": 1e12, "bf16": 1e12, "fp16": 1e12}, 1e10)

needs_native = pytest.mark.skipif(
    _backend.native_unavailable() is not None or torch.cuda.is_available(), reason="stages are of native CPU kernels"
)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """No time spent on ceilings, and next to none on timing."""
    monkeypatch.setattr(profiling, "measure", lambda device, dtypes: CEILINGS)
    monkeypatch.setattr(profiling, "TIMING_BUDGET", 0.01)
    monkeypatch.setattr(profiling, "MAX_CALLS", 3)


def invoke(*arguments):
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False)


def recorded(function):
    with CostRecorder() as recorder:
        function()
    return recorder.called


def test_costs_of_torch_operators_count_products_and_what_is_read_and_written():
    a, b = torch.randn(5, 7), torch.randn(7, 3)
    called = recorded(lambda: (a @ b).relu_())
    assert called["aten::mm"].cost == Cost(2.0 * 5 * 7 * 3, 4.0 * (35 + 21 + 15))
    assert called["aten::mm"].dtype is torch.float32
    assert called["aten::relu_"].cost.bytes == 4.0 * 15 * 2
    assert called["aten::relu_"].cost.flops is None
    called = recorded(lambda: a.t().expand(4, 7, 5).sum())
    assert called["aten::expand"].cost.bytes == 0
    assert called["aten::sum"].cost.bytes == 4.0 * (35 + 1)
    called = recorded(lambda: (a @ b, a @ b))
    assert called["aten::mm"].calls == 2 and called["aten::mm"].cost.flops == 2 * 2.0 * 5 * 7 * 3


def test_costs_of_gathers_count_rows_and_not_the_table():
    table, ids = torch.randn(1000, 4), torch.tensor([3, 3, 8])
    called = recorded(lambda: (table[ids], table.index_add_(0, ids, torch.ones(3, 4))))
    assert called["aten::index"].cost.bytes == 8 * 3 + 2 * 4 * 12
    assert called["aten::index_add_"].cost.bytes == 8 * 3 + 3 * 4 * 12
    called = recorded(lambda: nn.functional.embedding_bag(ids, table, torch.tensor([0])))
    assert called["aten::_embedding_bag_forward_only"].cost.bytes is None


def test_costs_of_the_expert_layer_count_live_rows_and_touched_experts(device):
    t, h, i, e, k = 6, 16, 8, 5, 2
    # Expert 3 has no row, and one slot is dropped.
    ids = torch.tensor([[0, 1], [0, 2], [4, 1], [0, 4], [2, 1], [0, e]])
    rows, touched = t * k - 1, 4
    x = torch.randn(t, h, device=device, requires_grad=True)
    gate_up = torch.randn(e, 2 * i, h, device=device)
    down = torch.randn(e, h, i, device=device, requires_grad=True)
    weights = torch.rand(t, k, device=device)
    routing = make_dispatch(t, e, k, device, ids=ids)
    y = []
    forward = recorded(lambda: y.append(gossamer.expert_mlp(x, gate_up, down, routing, weights)))[
        "gossamer::expert_mlp"
    ]
    assert forward.cost.flops == 6 * rows * h * i
    routed = 4 * (t * k + 2 * t * k + e + 1)
    assert forward.cost.bytes == 4 * (2 * t * h + touched * 3 * i * h + rows * 2 * i) + routed
    assert sum(p.flops or 0 for name, p in forward.cost.parts.items() if not name.startswith("_")) == 6 * rows * h * i
    (backward,) = (
        found
        for name, found in recorded(lambda: torch.autograd.grad(y[0].sum(), [x, down])).items()
        if name.startswith("gossamer::expert_mlp_backward")
    )
    # dA, dX and dW2, and no dW1.
    assert backward.cost.flops == 2 * rows * h * (i + 2 * i + i)


def test_costs_of_quantised_experts_count_codes_of_touched_experts(device):
    t, h, i, e, k = 6, 64, 32, 5, 2
    ids = torch.tensor([[0, 1], [0, 2], [4, 1], [0, 4], [2, 1], [0, e]])
    rows, touched = t * k - 1, 4
    x = torch.randn(t, h, device=device)
    gate_up = gossamer.QuantizedExpertWeight.quantize(torch.randn(e, 2 * i, h, device=device), "mxfp4")
    down = gossamer.QuantizedExpertWeight.quantize(torch.randn(e, h, i, device=device), "int8")
    weights, routing = torch.rand(t, k, device=device), make_dispatch(t, e, k, device, ids=ids)
    lists = 4 * (t * k + e + 1)
    codes = touched * (2 * i * (h // 2 + h // 32) + h * (i + 4))
    layer = recorded(lambda: gossamer.expert_mlp(x, gate_up, down, routing, weights))["gossamer::expert_mlp"]
    assert layer.cost.flops == 6 * rows * h * i
    assert layer.cost.bytes == codes + 4 * 2 * t * h + lists + 4 * 2 * t * k
    assert layer.cost.parts["down"] == Cost(2.0 * rows * h * i, float(touched * h * (i + 4)), label="down GEMM")
    product = recorded(lambda: gossamer.grouped_matmul(x, gate_up, routing))["gossamer::grouped_matmul"]
    assert product.cost.flops == 2 * rows * h * 2 * i
    assert product.cost.bytes == touched * 2 * i * (h // 2 + h // 32) + 4 * (t * h + t * k * 2 * i) + lists


def test_costs_of_a_trained_table_count_touched_rows_and_states(device):
    """Row 3 is there twice; Adam keeps two states, and all three are read and written."""
    table, ids = torch.randn(50, 8, device=device), torch.tensor([[3, 3], [7, 9]], device=device)
    optimizer = gossamer.optim.Adam(lr=0.1)
    state, handle = optimizer.state(50, 8, device), torch.zeros(0, device=device, requires_grad=True)
    y = []

    def lookup():
        y.append(gossamer.gather_reduce_step(table, ids, handle=handle, optimizer=optimizer, state=state))

    step = recorded(lookup)["gossamer::gather_reduce_step"]
    assert step.cost == Cost(4.0 * 8, 8.0 * 4 + 4 * (3 * 8 + 2 * 8))
    update = recorded(lambda: y[0].sum().backward())["gossamer::sparse_update_"]
    # The gradient of a sum is one number in memory.
    assert update.cost == Cost(None, 8.0 * 4 + 4 + 2 * 3 * 3 * 8 * 4)
    maxima = recorded(lambda: gossamer.gather_reduce(table, ids, mode="max"))["gossamer::gather_max"]
    assert maxima.cost == Cost(0.0, 8.0 * 4 + 4 * (3 * 8 + 2 * 8))


def test_every_declared_cost_belongs_to_an_operator():
    assert {"gossamer::dispatch", "gossamer::grouped_matmul", "gossamer::gather_reduce"} <= declared().keys()
    for name in declared():
        assert hasattr(torch.ops.gossamer, name.removeprefix("gossamer::")), name


def test_fraction_is_of_the_nearer_ceiling_and_unknown_is_not_guessed():
    assert fraction(Cost(5e11, 1e9), 1.0, torch.float32, CEILINGS) == (0.5, "compute")
    assert fraction(Cost(1e11, 5e9), 1.0, torch.bfloat16, CEILINGS) == (0.5, "memory")
    assert fraction(Cost(None, None), 1.0, torch.float32, CEILINGS) == (None, None)
    assert fraction(Cost(5e11, None), 1.0, torch.float64, CEILINGS) == (None, None)


def _event(name, start, end, parent=None, kernels=(), kind="DeviceType.CPU"):
    return SimpleNamespace(
        name=name,
        time_range=SimpleNamespace(start=start, end=end),
        cpu_time_total=end - start,
        cpu_parent=parent,
        kernels=[SimpleNamespace(name=n, duration=d) for n, d in kernels],
        device_type=kind,
    )


def test_device_kernels_are_put_under_the_operators_that_launched_them():
    label = Phase.label("ours", "forward")
    span = _event(label, 0, 1000)
    op = _event("gossamer::expert_mlp", 10, 50, span, [("_up_kernel", 300.0), ("gather_reduce_kernel", 100.0)])
    inner = _event("aten::copy_", 20, 30, op, [("memcpy", 50.0)])
    foreign = _event("SomeFunction", 60, 70, span, [("their_kernel", 200.0)])
    twice = _event("aten::mm", 80, 90, span, [("sgemm", 10.0)])
    on_device = _event(label, 0, 1000, kind="DeviceType.CUDA")
    costs = {
        "gossamer::expert_mlp": (1, Cost(2e8, 1e6, {"_up_kernel": Cost(1.5e8, 5e5, label="_up_kernel: up")})),
        "aten::mm": (2, Cost(1.0, 1.0)),
    }
    called = {name: SimpleNamespace(calls=n, cost=c, dtype=torch.float32) for name, (n, c) in costs.items()}
    rows, times = kernel_rows(
        [span, op, inner, foreign, twice, on_device],
        ["ours"],
        {"ours": 1},
        {("ours", "forward"): called},
        {},
        CEILINGS,
        torch.device("cuda"),
    )
    assert times == {"ours": {"forward": pytest.approx(1e-3)}}
    by_name = {row.name: row for row in rows}
    assert by_name["gossamer::expert_mlp"].seconds == pytest.approx(450e-6)
    assert by_name["gossamer::expert_mlp"].share == pytest.approx(0.45)
    up = by_name["_up_kernel: up"]
    assert (up.part_of, up.flops, up.seconds) == ("gossamer::expert_mlp", 1.5e8, pytest.approx(300e-6))
    assert (up.fraction, up.bound) == (pytest.approx(0.5), "compute")
    assert by_name["memcpy"].flops is None and by_name["memcpy"].bytes is None
    assert by_name["SomeFunction"].flops is None
    # A call that was recorded twice and profiled once: its cost cannot be attributed.
    assert by_name["aten::mm"].flops is None
    assert by_name["no kernel running"].seconds == pytest.approx((1000 - 450 - 200 - 10) * 1e-6)
    assert launches(rows, "ours", torch.device("cuda")) == 5
    assert launches(rows, "theirs", torch.device("cuda")) == 0
    assert launches(rows, "ours", torch.device("cpu")) is None
    time = profiling.SubjectTime("ours", 1e-3, times["ours"], 1, 5.0)
    shown = profiling.ProfileResult("title", "cuda:0", (time,), tuple(rows), (), CEILINGS, {})
    assert re.search(r"kernels and copies launched +5\n", str(shown))


@needs_native
def test_native_stages_are_recorded_only_when_asked_and_change_no_bit():
    from gossamer.cpu_kernels.recorder import record

    routing = make_dispatch(64, 4, 2, "cpu")
    x, gate_up, down = torch.randn(64, 32), torch.randn(4, 32, 32), torch.randn(4, 32, 16)
    weights = torch.rand(64, 2)
    plain = gossamer.expert_mlp(x, gate_up, down, routing, weights)
    with record() as nothing:
        pass
    assert nothing.stages == {} and nothing.memory == []
    with record() as recording:
        assert torch.equal(gossamer.expert_mlp(x, gate_up, down, routing, weights), plain)
    stages = recording.stages["expert_mlp"]
    assert {"pack", "gate_up", "activation", "down", "combine", "wait"} <= stages.keys()
    # Nothing is saved, since no backward pass will run.
    assert "save" not in stages
    assert all(seconds >= 0 and pieces > 0 for seconds, pieces in stages.values())
    taken, given = recording.memory
    assert taken[1] == -given[1] > 0 and taken[0] <= given[0]


@needs_native
@pytest.mark.parametrize("threads", [1, 3])
def test_stages_of_the_delta_rule(threads):
    """Forward and backward, where each thread has heads of its own and where a team shares them."""
    from gossamer.cpu_kernels.recorder import record

    q, k = torch.randn(2, 1, 70, 1, 8)
    v, beta = torch.randn(1, 70, 1, 8, requires_grad=True), torch.rand(1, 70, 1)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        plain, _ = gossamer.delta_rule(q, k, v, beta)
        with record() as recording:
            o, _ = gossamer.delta_rule(q, k, v, beta)
            o.sum().backward()
    finally:
        torch.set_num_threads(before)
    assert torch.equal(o, plain)
    forward, backward = (recording.stages[name].keys() - {"wait"} for name in ("delta_rule", "delta_rule_backward"))
    assert forward == {"keys", "gates", "states"} and backward == forward | {"dstates", "gradients"}


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    """One run of the command on the small layer, with all its files."""
    folder = tmp_path_factory.mktemp("profile")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profiling, "measure", lambda device, dtypes: CEILINGS)
        patch.setattr(profiling, "TIMING_BUDGET", 0.01)
        patch.setattr(profiling, "MAX_CALLS", 3)
        files = ["--trace", folder / "t.json", "--plot", folder / "m.svg", "--json", folder / "p.json"]
        result = invoke("profile", "moe", "--shape", SHAPE, "--dtype", "fp32", *map(str, files))
    assert result.exit_code == 0, result.output
    return SimpleNamespace(result=result, folder=folder, stored=json.loads((folder / "p.json").read_text()))


def test_profile_prints_both_layers_kernels_within_100_columns(moe):
    lines = moe.result.stdout.splitlines()
    assert lines[0].startswith(f"moe {SHAPE} (T=192 H=64 I=32 E=6 K=2) fp32 forward+backward on ")
    assert max(map(len, lines)) <= 100
    for words in ("gossamer::expert_mlp", "whole call, not profiled", "outside operators", "GFLOP"):
        assert any(words in line for line in lines), words
    rows = [line for line in lines if line.startswith("gossamer")]
    assert len(rows) >= 4, "forward, backward, memory, and its picture"


def test_times_of_operators_and_stages_add_up_to_the_phase(moe):
    for subject in moe.stored["subjects"]:
        for phase, seconds in subject["profiled_seconds"].items():
            rows = [r for r in moe.stored["rows"] if (r["subject"], r["phase"]) == (subject["name"], phase)]
            assert sum(r["seconds"] for r in rows if r["part_of"] is None) == pytest.approx(seconds, rel=1e-3)
            for operator in {r["part_of"] for r in rows} - {None}:
                (whole,) = (r["seconds"] for r in rows if r["name"] == operator)
                parts = [r for r in rows if r["part_of"] == operator]
                assert sum(r["seconds"] for r in parts) == pytest.approx(whole, rel=1e-3)
        shares = [r["share"] for r in moe.stored["rows"] if r["subject"] == subject["name"] and r["part_of"] is None]
        assert sum(shares) == pytest.approx(1, rel=1e-3)


@needs_native
def test_the_native_layer_is_broken_into_its_stages_and_the_costs_match(moe):
    rows = [r for r in moe.stored["rows"] if r["subject"] == "gossamer"]
    stages = {(r["phase"], r["name"]): r for r in rows if r["part_of"]}
    for phase, name in [
        ("forward", "gather and pack x"),
        ("forward", "gate_up GEMM"),
        ("forward", "GLU"),
        ("forward", "down GEMM"),
        ("forward", "combine into y"),
        ("backward", "dA = dY·W2"),
        ("backward", "dX = dH·W1"),
        ("backward", "dW1 = dHᵀ·X"),
        ("backward", "dW2 = dYᵀ·A"),
        ("backward", REST),
    ]:
        assert (phase, name) in stages
    product = 2.0 * 192 * 2 * 64 * 32
    assert stages["forward", "gate_up GEMM"]["flops"] == 2 * product
    assert stages["backward", "dW1 = dHᵀ·X"]["flops"] == 2 * product
    assert sum(r["flops"] or 0 for r in rows if r["part_of"] is None) == 9 * product
    assert any(r["name"] == "gossamer::dispatch" for r in rows)


def test_the_trace_is_json_and_names_our_operators(moe):
    events = json.loads((moe.folder / "t.json").read_text())["traceEvents"]
    names = {event.get("name") for event in events}
    assert {"gossamer::dispatch", "gossamer::expert_mlp", Phase.label("gossamer", "backward")} <= names
    assert any(str(name).startswith("gossamer::expert_mlp_backward") for name in names)


def test_memory_is_of_the_three_phases_and_drawn(moe):
    ours, reference = moe.stored["memory"]
    assert [p["name"] for p in ours["phases"]] == ["forward", "backward", "step"]
    parameters = 4 * 6 * 3 * 32 * 64
    for timeline in (ours, reference):
        backward, step = timeline["phases"][1:]
        assert backward["peak"] >= parameters, "the weights' gradients"
        assert step["peak"] >= parameters
        # The state of AdamW is there before the step begins, and gradients are freed in it.
        assert step["at_end"] == pytest.approx(0, abs=1024)
    assert (moe.folder / "m.svg").read_text().lstrip().startswith("<?xml")


@needs_native
def test_memory_counts_what_native_kernels_take_for_themselves():
    e, h, i = 8, 512, 1024
    routing = make_dispatch(8, e, 2, "cpu")
    x, weights = torch.randn(8, h), torch.rand(8, 2)
    parameters = {"up": torch.randn(e, 2 * i, h, requires_grad=True), "down": torch.randn(e, h, i)}

    def forward():
        return gossamer.expert_mlp(x, parameters["up"], parameters["down"], routing, weights)

    subject = profiling.Subject(
        "layer", forward, lambda y: torch.autograd.grad(y.sum(), [parameters["up"]]), {"up": parameters["up"]}, ("up",)
    )
    found = profile_memory.timeline(subject, torch.device("cpu"))
    gradient = 4 * e * 2 * i * h
    assert gradient >= 32 << 20, "large enough for kept blocks, which torch's profiler does not see"
    assert gradient <= found.phases[1].at_end < gradient + (1 << 20)
    assert found.phases[2].at_end == pytest.approx(0, abs=1024)


def test_sparkline_shows_peaks_and_phases():
    phases = tuple(
        profile_memory.MemoryPhase(n, s, s + 1.0, 0, 0) for n, s in (("forward", 0.0), ("backward", 1.0), ("step", 2.0))
    )
    found = profile_memory.MemoryTimeline("x", (0.0, 0.55, 1.55, 1.56, 2.55), (0.0, 4.0, 8.0, 2.0, 0.0), phases)
    line = profile_report.sparkline(found, 8.0, width=26)
    forward, backward, step = line.split("|")
    assert forward.startswith("▁") and forward.endswith("▅")
    assert backward.count("█") == 1 and backward.endswith("▃")
    assert step.startswith("▃") and step.endswith("▁")


class Net(nn.Module):
    """A layer over our operator and a plain one."""

    def __init__(self):
        super().__init__()
        self.moe = gossamer.nn.MoE(32, 16, num_experts=4, top_k=2)
        self.head = nn.Linear(32, 3)

    def forward(self, x, scale=1.0):
        return {"logits": self.head(self.moe(x)) * scale, "note": "text"}


def test_a_users_module_is_profiled_and_left_as_it_was(device, tmp_path):
    module = Net().to(device)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    x = torch.randn(24, 32, device=device, requires_grad=True)
    trace = tmp_path / "trace.json"
    result = gossamer.profile(module, x, kwargs={"scale": 2.0}, reference=Net().to(device), trace=trace, budget=0.01)
    assert all(torch.equal(before[name], p) and p.grad is None for name, p in module.named_parameters())
    assert x.grad is None
    assert [s.name for s in result.subjects] == ["Net", "Net (reference)"]
    names = {row.name for row in result.rows if row.subject == "Net" and row.part_of is None}
    assert "gossamer::expert_mlp" in names and "aten::addmm" in names
    shown = str(result)
    assert "Net and Net (reference) forward+backward" in shown and max(map(len, shown.splitlines())) <= 100
    assert json.loads(json.dumps(result.to_json()))["rows"][0]["subject"] == "Net"
    assert json.loads(trace.read_text())["traceEvents"]
    forward = gossamer.profile(module, x, backward=False, budget=0.01)
    assert {row.phase for row in forward.rows} == {"forward"} and forward.memory == ()


def test_any_callable_is_profiled(device):
    x = torch.randn(8, 8, device=device, requires_grad=True)
    result = gossamer.profile(torch.tanh, x, memory=False, budget=0.01)
    assert result.subjects[0].name == "tanh"
    assert any(row.phase == "backward" and row.name == "aten::tanh_backward" for row in result.rows)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((3,), {}, TypeError, "module must be a torch.nn.Module or another callable, got int"),
        ((torch.tanh, torch.ones(2)), {}, ValueError, "needs a parameter or an input that requires a gradient"),
        ((torch.tanh,), {"reference": 3}, TypeError, "reference must be"),
        ((torch.tanh,), {"budget": 0}, ValueError, "budget must be a positive number of seconds, got 0"),
        ((torch.tanh,), {"trace": "/nonexistent/t.json"}, ValueError, "there is no folder '/nonexistent'"),
        ((torch.tanh,), {"trace": "t.txt"}, ValueError, "trace must end in .json or .gz"),
        ((torch.tanh,), {"plot": "m.jpg"}, ValueError, "plot must end in .png or .svg"),
    ],
)
def test_bad_arguments_are_explained_before_any_work(arguments, options, error, message):
    with pytest.raises(error, match=message):
        gossamer.profile(*arguments, **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["attention"], "the benchmark must be one of moe, expert_mlp"),
        (["moe", "--shape", "1,2"], "--shape must be one of olmoe"),
        (["moe", "--dtype", "fp8"], "--dtype must be one of fp32, bf16, fp16, got 'fp8'"),
        (["moe", "--trace", "/nonexistent/t.json"], "--trace: there is no folder '/nonexistent'"),
        (["moe", "--json", "/"], "--json must be a file, '/' is a folder"),
        (["moe", "--plot", "m.svg", "--direction", "forward"], "--plot needs a training step"),
        (["moe", "--ncu", "sgemm"], "--ncu must be one of _"),
        (["moe", "--shape", SHAPE, "--against", "SonicMoE"], "--against must be one of equal-FLOP dense"),
        *([] if torch.cuda.is_available() else [(["moe", "--device", "cuda"], "--device cuda: torch finds no CUDA")]),
    ],
)
def test_bad_options_are_one_line_and_no_traceback(arguments, message):
    result = invoke("profile", *arguments)
    assert result.exit_code == 2
    *_, last = result.stderr.splitlines()
    assert last.startswith(f"gossamer profile: {message}")


@pytest.mark.skipif(_backend.triton_unavailable() is not None, reason="the kernels are Triton's")
def test_nsight_command_line_is_complete_and_quoted():
    result = invoke("profile", "moe", "--ncu", "_up_kernel", "--shape", "olmoe", "--skew", "zipf")
    assert result.exit_code == 0
    words = shlex.split(result.stdout)
    assert words[0] == "ncu" and words[words.index("--kernel-name") + 1] == "_up_kernel"
    inner = words[words.index("gossamer") :]
    assert inner[:3] == ["gossamer", "profile", "moe"]
    for option, value in {"--shape": "olmoe", "--dtype": "bf16", "--device": "cuda", "--skew": "zipf"}.items():
        assert inner[inner.index(option) + 1] == value
    skipped, made = (int(words[words.index(option) + 1]) for option in ("--launch-skip", "--calls"))
    assert made == skipped + 1
    assert "needs" not in result.stdout and "NVIDIA GPU" in result.stderr
    assert "_dweight_kernel" in nsight.triton_kernels(("dispatch", "expert_mlp"))
    assert "_histogram_kernel" not in nsight.triton_kernels(("gather_reduce",))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_can_be_run_bare_and_looked_at(name, monkeypatch):
    chosen = family(name)
    assert nsight.primitives(chosen)
    sizes = {"T": 16, "H": 64, "I": 32, "E": 4, "K": 2, "N": 50, "D": 8, "B": 4, "J": 3}
    sizes |= {"M": 12, "C": 24, "r": 4, "A": 3, "L": 50, "R": 16, "W": 4}
    if "HK" in chosen.symbols:
        sizes = {"B": 1, "T": 16, "HK": 1, "H": 2, "D": 8, "G": 1, "N": 1}
    if "BLOCK" in chosen.symbols:
        sizes |= {"N": 64, "K": 32, "BLOCK": 16, "SPARSE": 50}
    if "h" in chosen.symbols:
        sizes |= {"N": 49, "h": 2}
    shape = ",".join(str(sizes[symbol]) for symbol in chosen.symbols)
    assert invoke("profile", name, "--shape", shape, "--calls", "1").exit_code == 0


def test_missing_extra_is_named():
    code = "import sys; sys.modules['rich'] = None\nimport gossamer\ngossamer.profile(print)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "ImportError: gossamer.profile needs rich: pip install 'gossamer[bench]'" in done.stderr
