"""The benchmark harness: what may be timed, how time and memory are taken, and that its truths are true."""

from __future__ import annotations

import itertools
import json
import math
import weakref
from dataclasses import replace

import pytest
import torch
from bench_requests import LARGER, SMALL, small_request

from gossamer.bench.families import experts
from gossamer.bench.families.skew import EXPERT_SKEWS
from gossamer.bench.harness import ceilings, peers, record, report, runner, timing
from gossamer.bench.harness.case import DENSE, OURS, REFERENCE, Case, Family, FloatGate, Request, Variant
from gossamer.bench.harness.ceilings import Ceilings
from gossamer.ops.dispatch import dispatch
from gossamer.ops.expert_mlp import expert_mlp_reference


def run_variants(*variants: Variant, direction: str = "forward", **options) -> record.Results:
    truth = torch.arange(4.0).double()
    gates = {"truth": lambda: FloatGate({"y": truth}, {"y": truth.float()})}

    def build(request: Request) -> Case:
        return Case("fake", "s", {"N": 4}, "fp32", request.device, direction, variants, {}, 8.0, 8.0, gates, "all")

    family = Family("fake", {"s": (4,)}, ("N",), {"cpu": ("s",)}, {"cpu": "s"}, build)
    wanted = [Request("s", {"N": 4}, "fp32", torch.device("cpu"), direction, "uniform")]
    return runner.run(family, wanted, budget=0.05, **options)


@pytest.fixture(autouse=True)
def _cheap_ceilings(monkeypatch):
    monkeypatch.setitem(timing.SETTLE_LIMIT, "cpu", 0.0)
    monkeypatch.setattr(runner, "measure", lambda device, dtypes: Ceilings(dict.fromkeys(dtypes, 1e12), 1e10))


def test_wrong_variant_gets_an_error_and_no_speed():
    right = Variant("right", DENSE, lambda: torch.arange(4.0))
    wrong = Variant("wrong", OURS, lambda: torch.arange(4.0) * 1.001)
    results = run_variants(wrong, right)
    bad, good = results.cases[0].rows
    assert (bad.status, bad.seconds, bad.peak_bytes) == ("wrong", [], None)
    assert bad.error == pytest.approx(1e-3, rel=1e-3)
    assert "y: relative RMS error 1.0" in bad.message
    assert good.status == "ok" and len(good.seconds) >= timing.MIN_ROUNDS
    assert not results.correct


@pytest.mark.parametrize(
    ("off", "cost", "drawn", "passes"),
    [
        # Errors in units of the baseline's by draw: the rule allows 1.5 and two epsilons, 3 are beyond luck.
        ([2.0, 1.0, 2.0, 0.1, 1.0], 8.0, 5, True),
        ([2.0, 2.0, 1.0, 2.0, 1.0], 8.0, 5, False),
        ([2.0, 4.0, 1.0, 1.0, 1.0], 8.0, 2, False),
        ([4.0, 1.0, 1.0, 1.0, 1.0], 8.0, 1, False),
        ([2.0, 1.0, 1.0, 1.0, 1.0], 1e9, 1, False),
        ([1.0, 4.0, 4.0, 4.0, 4.0], 8.0, 1, True),
    ],
    ids=["luck", "most draws", "far off elsewhere", "far off", "large", "right at once"],
)
def test_a_narrow_failure_is_confirmed_by_other_draws(off, cost, drawn, passes):
    truth = torch.ones(64).double()
    plain = truth.float() + 1e-5 * (torch.arange(64) == 3)
    seeds = []

    def build(request: Request) -> Case:
        seeds.append(request.seed)
        by = off[len(seeds) - 1]
        ours = Variant("ours", OURS, lambda: truth.float() + by * 1e-5 * (torch.arange(64) == 5))
        gates = {"truth": lambda: FloatGate({"y": truth}, {"y": plain})}
        return Case("fake", "s", {"N": 4}, "fp32", request.device, "forward", (ours,), {}, 8.0, cost, gates, "all")

    family = Family("fake", {"s": (4,)}, ("N",), {"cpu": ("s",)}, {"cpu": "s"}, build)
    request = Request("s", {"N": 4}, "fp32", torch.device("cpu"), "forward", "uniform")
    case = build(request)
    verdict = runner.judge_fairly(case, case.variants[0], {}, family, request)
    assert (verdict.failures == ()) is passes
    assert len(set(seeds)) == len(seeds) == drawn


def test_a_gate_may_allow_a_multiple_of_the_baselines_errors():
    truth = torch.ones(64).double()
    plain = truth.float() + 1e-5 * (torch.arange(64) == 3)
    strict, lenient = (FloatGate({"y": truth}, {"y": plain}, multiple=m) for m in (1.0, 3.0))
    for by, passes in ((1.0, (True, True)), (2.8, (False, True)), (3.2, (False, False)), (math.nan, (False, False))):
        found = {"y": truth.float() + by * 1e-5 * (torch.arange(64) == 5)}
        assert (not strict(found).failures, not lenient(found).failures) == passes


def test_a_wrong_peer_is_shown_and_does_not_fail_the_run(device):
    """A wrong result of gossamer or its baseline fails the run; one of another package only shows in the table."""
    right, ours = (Variant(role, role, lambda: torch.arange(4.0)) for role in (DENSE, OURS))

    def adapt(name, role):
        return Variant(name, role, lambda: torch.arange(4.0) * 1.001)

    for package, correct in (("torch", True), ("gossamer", False)):
        peer = peers.Peer("another", None, package, adapt)
        variants, _ = peers.gather([peer], small_request(device))
        results = run_variants(ours, right, *variants)
        assert [row.status for row in results.cases[0].rows] == ["ok", "ok", "wrong"]
        assert results.correct is correct
        assert ("another" in report.summary(results)) is not correct


def test_cases_take_turns_while_there_is_memory_for_them(monkeypatch):
    """Two cases in three visits; with no memory to spare, one after the other. Neither keeps its tensors.

    Where the time for rounds beyond what is owed is over before they begin, there are none.
    """
    monkeypatch.setattr(runner, "VISITS", 3)
    monkeypatch.setattr(timing, "PRECISE", 0.0)

    def order_of_calls(rounds=timing.ROUNDS, stretch=math.inf):
        monkeypatch.setattr(runner, "STRETCH", stretch)
        order = []

        def build(request: Request) -> Case:
            def forward():
                order.append(request.shape)
                return torch.arange(4.0)

            both = (Variant("ours", OURS, forward, gate=None), Variant("dense", DENSE, forward, gate=None))
            return Case("fake", "s", {"N": 4}, "fp32", request.device, "forward", both, {}, 8.0, 8.0, {}, "all")

        family = Family("fake", {"s": (4,)}, ("N",), {"cpu": ("s",)}, {"cpu": "s"}, build)
        wanted = [Request(s, {"N": 4}, "fp32", torch.device("cpu"), "forward", "uniform") for s in "ab"]
        results = runner.run(family, wanted, budget=1e-9)
        assert all(r.case.variants == () and len(r.row(OURS).seconds) == rounds for r in results.cases)
        return "".join(name for name, before in zip(order, [None, *order], strict=False) if name != before)

    assert order_of_calls() == "ab" + "ab" * 3 + "ab"  # checks, visits, host latency
    order_of_calls(timing.MIN_ROUNDS, stretch=0.0)
    growing = itertools.count(0, runner.TOGETHER_BYTES)
    monkeypatch.setattr(runner, "resident_bytes", lambda: next(growing))
    assert order_of_calls() == "ab"


def test_ratio_is_of_the_rounds_with_cores_near_each_other():
    """If five or more rounds have near cores for both calls, only those count; the table says how many do not."""

    def row(name, role, seconds, near):
        return record.Row(name, role, "ok", None, "", seconds, list(range(len(seconds))), near)

    dense = row("dense", DENSE, [1.0] * 7, [True] * 6 + [False])
    times = [1.0, 2.0, 2.0, 2.0, 2.0, 3.0, 9.0]
    peer = row("peer", REFERENCE, times, [False] + [True] * 6)
    assert peer.times(dense) == 2.0 and peer.times_interval(dense) == (2.0, 3.0)
    far = row("far", REFERENCE, [9.0, 2.0, 2.5, 2.5, 2.5, 3.0, 9.0], [False] * 2 + [True] * 5)
    assert far.times(dense) == 2.5 and far.times_interval(dense) == (2.0, 3.0)
    case = Case("fake", "s", {"N": 4}, "fp32", torch.device("cpu"), "forward", (), {}, 8.0, 8.0, {}, "all")
    request = Request("s", {}, "fp32", case.device, "forward", "uniform")
    result = record.CaseResult(case, [dense, peer], 1.0, request, core_distance=95e-9)
    method = report._method(result)
    assert "threads whose cores are 95 ns apart; in 14% of the samples the system had moved them" in method


def test_raising_reference_is_reported_and_the_rest_goes_on():
    def broken():
        raise RuntimeError("strides must be 16-byte aligned\nand more")

    results = run_variants(Variant("ours", OURS, lambda: torch.arange(4.0)), Variant("theirs", REFERENCE, broken))
    ours, theirs = results.cases[0].rows
    assert theirs.status == "failed" and theirs.message == "RuntimeError: strides must be 16-byte aligned"
    assert ours.seconds and results.correct
    assert not run_variants(Variant("ours", OURS, broken)).correct


@pytest.mark.parametrize(("direction", "left_out"), [("forward", False), ("both", True)])
def test_case_that_torch_is_slow_in_is_left_out_and_named(monkeypatch, direction, left_out):
    # 8 FLOPs: two seconds where the weight lies the slower way, as it does in a backward pass.
    found = Ceilings({"fp32": 8.0}, 1e10, slow_gemm={"fp32": 4.0})
    monkeypatch.setattr(runner, "measure", lambda device, dtypes: found)
    y = torch.arange(4.0)
    results = run_variants(Variant("ours", OURS, lambda: y, {}, y), direction=direction, patience=1.5)
    assert len(results.cases) == 1 - left_out
    assert results.as_json()["left_out"] == list(results.left_out)
    if left_out:
        assert "takes about 2 s here" in results.left_out[0]
        assert f"Left out: {results.left_out[0]}" in report.summary(results)
    else:
        assert results.left_out == () and "Left out" not in report.summary(results)


def test_ceilings_are_the_faster_of_before_and_after_the_timing(monkeypatch):
    """A core was elsewhere during the first measurement; the second has a slower copy."""
    found = iter(
        [Ceilings({"fp32": 8.0}, 2e10, 1e10, {"fp32": 4.0}), Ceilings({"fp32": 16.0}, 1e10, 3e10, {"fp32": 2.0})]
    )
    monkeypatch.setattr(runner, "measure", lambda device, dtypes: next(found))
    y = torch.arange(4.0)
    results = run_variants(Variant("ours", OURS, lambda: y, {}, y))
    assert results.ceilings == Ceilings({"fp32": 16.0}, 2e10, 3e10, {"fp32": 4.0})
    assert results.cases[0].floor == 8.0 / 16.0
    assert Ceilings({}, 1.0).best(Ceilings({}, 2.0)) == Ceilings({}, 2.0)


@pytest.mark.parametrize(("disturbed", "slowing", "idle"), [(1.04, 0.02, True), (1.2, 0.1, False)])
def test_report_says_whether_the_machine_was_idle(disturbed, slowing, idle):
    """Five of ten rounds take a second and the others longer; with nine rounds nothing is said."""
    rows = [
        record.Row(role, role, "ok", None, "", [1.0] * 5 + [disturbed] * 5, list(range(10)), [True] * 10)
        for role in (OURS, DENSE)
    ]
    case = Case("fake", "s", {"N": 4}, "fp32", torch.device("cpu"), "forward", (), {}, 8.0, 8.0, {}, "all")
    request = Request("s", {}, "fp32", case.device, "forward", "uniform")
    results = record.Results({}, Ceilings({}, 1.0), [record.CaseResult(case, rows, 1.0, request)])
    assert results.slowing == results.as_json()["slowing"] == pytest.approx(slowing)
    found = report.summary(results)
    assert f"Calls took {100 * slowing:.1f}% longer in the median than in their shortest samples" in found
    assert ("the machine was not idle" in found) is not idle
    few = [replace(row, seconds=row.seconds[1:]) for row in rows]
    assert record.Results({}, Ceilings({}, 1.0), [replace(results.cases[0], rows=few)]).slowing is None


@pytest.mark.parametrize(("long", "largest"), [(0.0, 8), (60.0, 32)])
def test_ceiling_of_a_slow_product_is_that_of_a_small_one(monkeypatch, long, largest):
    monkeypatch.setattr(ceilings, "LONG", long)
    monkeypatch.setitem(ceilings.GEMM_SIZES, "cpu", (8, 16, 32))
    monkeypatch.setitem(ceilings.COPY_BYTES, "cpu", 1 << 12)
    sizes, mm = set(), torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out: sizes.add(a.shape[0]) or mm(a, b, out=out))
    found = ceilings.measure(torch.device("cpu"), ["fp32", "bf16"])
    assert max(sizes) == largest
    assert all(0 < found.slow_gemm[name] <= found.gemm[name] for name in ("fp32", "bf16"))


def test_wrong_gradient_alone_is_caught(device):
    request = small_request(device, sizes=LARGER)
    problem = experts.make_problem(request)
    gate = experts.make_gates(problem, experts.make_sample(problem), request)["truth"]()
    names = {"dx": "x", "dgate_up": "gate_up", "ddown": "down", "dweights": "weights"}
    leaves = {gradient: problem.leaf(name) for gradient, name in names.items()}

    def forward():
        routing = dispatch(problem.ids, problem.num_experts)
        return expert_mlp_reference(leaves["dx"], leaves["dgate_up"], leaves["ddown"], routing, leaves["dweights"])

    variant = Variant("loop", OURS, forward, leaves, problem.dy)
    outputs = variant.outputs("both")
    assert gate(outputs).failures == ()
    for name in leaves:
        bad = outputs[name].clone()
        bad.view(-1)[-1] += 0.01 * outputs[name].abs().max()
        assert [f.split(":")[0] for f in gate(outputs | {name: bad}).failures] == [name]


@pytest.mark.parametrize("skew", EXPERT_SKEWS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_router_of_a_problem_routes_to_its_ids(device, dtype, skew):
    problem = experts.make_problem(Request("s", SMALL | {"T": 300}, dtype, torch.device(device), "forward", skew))
    values, ids = (problem.x @ problem.router.T).topk(problem.top_k, dim=1)
    assert torch.equal(ids, problem.ids)
    assert torch.equal(torch.softmax(values.float(), 1).to(problem.x.dtype), problem.weights)
    assert 0.7 < problem.x.float().square().mean().sqrt() < 1.3


def test_more_experts_than_columns_has_no_router(device):
    sizes = SMALL | {"H": 4}
    problem = experts.make_problem(Request("s", sizes, "fp32", torch.device(device), "forward", "uniform"))
    assert problem.router is None
    assert problem.weights.sum(1).tolist() == pytest.approx([1.0] * SMALL["T"])


def test_sampled_truth_is_autograd_of_the_reference(device):
    problem = experts.make_problem(small_request(device, skew="one"))
    inputs = [getattr(problem, n).double().requires_grad_() for n in ("x", "gate_up", "down", "weights")]
    y = expert_mlp_reference(*inputs[:3], dispatch(problem.ids, SMALL["E"]), inputs[3])
    dx, dgate_up, ddown, dweights = torch.autograd.grad(y, inputs, problem.dy.double())
    chosen = experts.Sample(torch.tensor([0, 7, 23], device=device), torch.tensor([0, 5], device=device), "")
    whole = experts.make_sample(problem)
    assert whole.words == "every output, whole"
    for sample in (chosen, whole):
        found = experts.sampled_outputs(problem, sample, "both", torch.float64, torch.float64, problem.weights.double())
        t, e = sample.tokens, sample.experts
        whole_outputs = {"y": y, "dx": dx, "dweights": dweights, "dgate_up": dgate_up, "ddown": ddown}
        expected = {"y": y[t], "dx": dx[t], "dweights": dweights[t], "dgate_up": dgate_up[e], "ddown": ddown[e]}
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-12)
            assert torch.equal(sample.picks[name](whole_outputs[name]), value)


def test_costs_count_products_and_single_passes(device):
    problem = experts.make_problem(Request("s", SMALL, "fp32", torch.device(device), "forward", "uniform"))
    rows, token, expert = 24 * 2, 24 * 16 * 4, 3 * 16 * 8 * 4
    routing = 24 * 2 * 4 + 24 * 2 * 8
    assert experts.costs(problem, "forward") == (rows * 6 * 16 * 8, 2 * token + 6 * expert + routing)
    flops, moved = experts.costs(problem, "both")
    assert (flops, moved) == (3 * rows * 6 * 16 * 8, 4 * token + 12 * expert + routing + 24 * 2 * 4)


def test_bytes_of_a_training_step_count_each_tensor_once(device):
    """The frozen weight is read once, however often it is multiplied; a gradient is as large as its tensor."""
    m, n, c, r, adapters = 6, 10, 12, 2, 3
    sizes = {"M": m, "N": n, "C": c, "r": r}
    plain = runner.family("low_rank").build(small_request(device, sizes=sizes))
    assert plain.bytes == 4 * (2 * m * c + 2 * m * n + n * c + 2 * r * (n + c))
    many = runner.family("multi_low_rank")
    case = many.build(small_request(device, sizes={s: (sizes | {"A": adapters, "R": r})[s] for s in many.symbols}))
    used = (case.bytes - 4 * (2 * m * c + 2 * m * n + n * c) - m * 8) / (4 * 2 * r * (n + c))
    assert used in range(1, adapters + 1)


def test_a_profile_of_block_sparse_layers_has_a_reference_with_a_backward_pass(device):
    sizes = {"M": 16, "N": 32, "K": 32, "BLOCK": 16, "SPARSE": 50}
    case = runner.family("block_sparse").build(small_request(device, sizes=sizes))
    reference = next(variant for variant in case.variants if variant.role == REFERENCE)
    reference.call("both")
    assert reference.name == "masked dense"


# The number of cases of each family that does not have two dtypes in two directions.
COUNTS = dict.fromkeys(("dispatch", "expert_topology"), 1)
COUNTS |= dict.fromkeys(("sparse_update", "hash_table", "quantized_experts", "product_key_experts"), 2)
COUNTS |= dict.fromkeys(("topk_routing", "tree_routing"), 2)
COUNTS["compressed_embedding"] = 2


def requests_of(family: Family, device: str, **options) -> list[Request]:
    """Requests for a family's cases in small sizes."""
    sizes = {"N": 50, "D": 32, "B": 24, "J": 5, "T": 3, "L": 100} if "N" in family.symbols else LARGER
    sizes = {"B": 2, "W": 4} | sizes | {"M": 40, "C": 48, "r": 4, "A": 3, "R": 40}
    if "HK" in family.symbols:
        sizes = {"B": 1, "T": 80, "HK": 1, "H": 2, "D": 16, "G": 1, "N": 3}
    if "BLOCK" in family.symbols:
        sizes = {"M": 40, "N": 96, "K": 64, "BLOCK": 16, "SPARSE": 60}
    if "h" in family.symbols:
        sizes = {"T": 40, "D": 32, "N": 196, "h": 2, "K": 4}
    shape = ",".join(str(sizes[s]) for s in family.symbols)
    return runner.requests(family, runner.resolve_device(device), shape=shape, **options)


@pytest.mark.parametrize("name", runner.FAMILIES)
def test_every_family_runs_and_is_right(device, name):
    family = runner.family(name)
    wanted = requests_of(family, device, skew="zipf" if "zipf" in family.skews else "uniform")
    results = runner.run(family, wanted, budget=0.05)
    assert len(results.cases) == len(wanted) == COUNTS.get(name, 4)
    assert results.correct
    for result in results.cases:
        assert result.row(OURS) and result.row(DENSE)
        # Where a reference has no kernel for the dtype it may fail, which is not the case's fault.
        assert {row.status for row in result.rows if row.role != REFERENCE} == {"ok"}
    stored = json.loads(json.dumps(results.as_json()))
    assert stored["environment"]["versions"]["torch"] and stored["environment"]["threads"] >= 1
    first = stored["cases"][0]["variants"][0]
    assert 0 < first["host_seconds"] < 60 and first["timed_by"]
    assert first["fraction_of_ceiling"] == pytest.approx(stored["cases"][0]["floor_seconds"] / first["median"])
    assert first["p20"] <= first["median"] <= first["p80"] and len(first["seconds"]) >= timing.MIN_ROUNDS


@pytest.mark.parametrize("name", runner.FAMILIES)
def test_another_seed_is_another_problem_of_the_same_sizes(device, name):
    family = runner.family(name)
    request = requests_of(family, device, peers="none")[-1]
    first, second = (family.build(replace(request, seed=seed)) for seed in (0, 100))
    assert first.sizes == second.sizes
    found = [case.variants[0].outputs(case.direction) for case in (first, second)]
    assert any(not torch.equal(found[0][key], found[1][key]) for key in found[0])


def test_large_problems_are_checked_on_a_sample(monkeypatch, device):
    monkeypatch.setattr(experts, "WHOLE", 0)
    monkeypatch.setattr(experts, "SAMPLE_TOKENS", 50)
    monkeypatch.setattr("gossamer.bench.families.grouped_matmul.WHOLE", 0)
    for name, words in (
        ("moe", "y, dx and dweights of 50 of 192 tokens"),
        ("grouped_matmul", "gradient of 2 of 6 experts"),
    ):
        family = runner.family(name)
        case = family.build(small_request(device, sizes=LARGER))
        assert words in case.checked
        gates = {}
        for variant in case.variants:
            verdict = runner.judge(case, variant, gates)
            assert verdict is None or verdict.failures == ()


def test_shapes_by_name_and_by_size():
    moe = runner.family("moe")
    assert moe.sizes("mixtral") == {"T": 8192, "H": 4096, "I": 14336, "E": 8, "K": 2}
    assert moe.sizes("16,64,32,8,2") == {"T": 16, "H": 64, "I": 32, "E": 8, "K": 2}
    for bad in ("mixtrel", "16,64,32,8", "16,64,32,8,0", "16,64,32,8,x"):
        with pytest.raises(ValueError, match=f"--shape must be one of olmoe.*got '{bad}'"):
            moe.sizes(bad)
    for name in ("moe", "expert_mlp", "grouped_matmul", "dispatch", "topk_routing"):
        family = runner.family(name)
        shape = ",".join("9" if symbol == "K" else "8" for symbol in family.symbols)
        with pytest.raises(ValueError, match=f"--shape {shape}: K must be at most E, got K=9 and E=8"):
            family.sizes(shape)


def test_requests_of_a_quick_and_a_full_run():
    moe, cpu = runner.family("moe"), torch.device("cpu")
    quick = runner.requests(moe, cpu, quick=True)
    assert [(r.shape, r.dtype, r.direction) for r in quick] == [
        ("cpu-small", dtype, way) for dtype in ("fp32", "bf16") for way in ("forward", "both")
    ]
    assert {r.shape for r in runner.requests(moe, cpu)} == {"cpu-small", "cpu-fine", "cpu-decode"}
    only = runner.requests(moe, cpu, shape="cpu-fine", dtype="fp16", direction="forward")
    assert [(r.shape, r.dtype, r.direction) for r in only] == [("cpu-fine", "fp16", "forward")]
    for option, value in (("dtype", "fp8"), ("direction", "backward"), ("skew", "few")):
        with pytest.raises(ValueError, match=f"--{option} must be one of .*got '{value}'"):
            runner.requests(moe, cpu, **{option: value})


def test_host_latency_is_of_the_same_call_with_next_to_no_work():
    moe = runner.family("moe")
    sizes = {"T": 300, "H": 20, "I": 8, "E": 40, "K": 3}
    assert moe.host_sizes(sizes) == {"T": 16, "H": 16, "I": 8, "E": 40, "K": 3}
    assert runner.family("gather_reduce").host_sizes({"N": 99, "D": 64, "B": 8, "J": 20}) == {
        "N": 16, "D": 16, "B": 8, "J": 16
    }  # fmt: skip
    request = small_request("cpu", direction="forward", sizes=LARGER)
    found = runner._host_latency(moe, replace(request, peers=()))
    assert found.keys() == {"gossamer", "equal-FLOP dense"} and all(0 < s < 1 for s in found.values())


def test_tables_of_a_case_are_freed_before_its_host_latency_is_measured(monkeypatch):
    tables, alive = [], []

    class Adam(torch.optim.Adam):
        def __init__(self, params, *rest, **options):
            super().__init__(params, *rest, **options)
            tables.extend(weakref.ref(parameter) for parameter in params)

    monkeypatch.setattr(torch.optim, "Adam", Adam)
    monkeypatch.setattr(runner, "_host_latency", lambda *_: alive.append([ref() is not None for ref in tables]) or {})
    monkeypatch.setattr(runner, "measure", lambda device, dtypes: Ceilings(dict.fromkeys(dtypes, 1e12), 1e10, 2e10))
    family = runner.family("product_key_experts")
    results = runner.run(family, requests_of(family, "cpu", direction="both")[1:], budget=0.01)
    assert [row.status for row in results.cases[0].rows] == ["ok", "ok"]
    assert alive == [[False, False]]


def test_quantiles_interpolate():
    assert [timing.quantile([4.0, 1.0, 3.0, 2.0], q) for q in (0.0, 0.2, 0.5, 1.0)] == pytest.approx([1, 1.6, 2.5, 4])
    assert timing.quantile([7.0], 0.8) == 7.0


def test_peak_memory_is_the_peak_of_the_call(device):
    device = torch.device(device)
    n = 8 * 2**20

    def call():
        temporary = [torch.ones(n, device=device) for _ in range(3)]
        kept = temporary[0] + 1
        del temporary
        return kept + torch.ones(1, device=device)

    call()
    assert timing.peak_memory(call, device) == pytest.approx(4 * 4 * n, rel=0.05)


def test_device_names():
    assert runner.resolve_device("cpu") == torch.device("cpu")
    assert runner.resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ValueError, match=r"--device must be auto, cpu or cuda, got 'gpu'"):
        runner.resolve_device("gpu")
    with pytest.raises(ValueError, match=r"the benchmark must be one of moe, .*got 'attention'"):
        runner.family("attention")
