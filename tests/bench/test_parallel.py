"""Benchmarks of several processes: what they count, how they judge, and what they refuse."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from typer.testing import CliRunner

from gossamer.bench.harness import parallel
from gossamer.bench.harness.traffic import SentBytes
from gossamer.cli import app

pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo")
SIZES = (192, 64, 32, 6, 2)


@pytest.fixture
def alone():
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_variants_agree_and_bytes_are_counted(monkeypatch):
    from gossamer.bench.distributed.experts import Problem, row_bytes

    monkeypatch.setitem(parallel.SECONDS, True, 0.2)
    wanted = parallel.request("experts", ",".join(map(str, SIZES)), None, "both", 2, quick=True)
    (run,) = parallel.run(wanted)["runs"]
    forward, both = ({v["name"]: v for v in case["variants"]} for case in run["cases"])
    problem = Problem.draw(SIZES, torch.float32, 2)
    assert run["one_row_a_rank_bytes"] == row_bytes(problem)
    # transformers sends a row for each (token, expert) pair, and a count for each of the other process's experts.
    pairs = max(int((problem.ids[rank] // 3 != rank).sum()) for rank in range(2))
    theirs = 2 * 64 * 4 * pairs + 3 * 8
    for name in ("transformers all_to_all", "transformers all_to_all, our experts"):
        # Rows come back to the process that sent them, which may be the other one than that which sends most.
        assert forward[name]["sent_bytes"] == pytest.approx(theirs, rel=0.05)
        assert both[name]["sent_bytes"] == pytest.approx(2 * theirs, rel=0.05)
    # Ours: one row for each (token, process) pair, there with two ids and weights, and back.
    ours = run["one_row_a_rank_bytes"]
    assert 2 * ours * 0.95 < forward["gossamer"]["sent_bytes"] < 2 * ours + ours // (64 * 4) * 16 + 64
    assert forward["gossamer"]["sent_bytes"] < forward["transformers all_to_all"]["sent_bytes"]
    assert forward["gossamer static"]["collectives"] == 2 and both["gossamer static"]["collectives"] == 4
    for case in (forward, both):
        assert all(0 < v["p20"] <= v["median"] <= v["p80"] for v in case.values())
    assert "| gossamer static |" in parallel.markdown({"runs": [run]})


def test_a_wrong_variant_is_an_error(alone):
    from gossamer.bench.distributed import experts

    problem = experts.Problem.draw(SIZES, torch.float32, 1)
    gate_up, down = nn.Parameter(problem.gate_up), nn.Parameter(problem.down)

    def layer(x, ids, weights, scale=1.0):
        import gossamer

        return scale * gossamer.expert_mlp(x, gate_up, down, gossamer.dispatch(ids, 6), weights)

    experts.check(problem, [experts.Variant("right", layer, (gate_up, down))])
    wrong = experts.Variant("wrong", lambda *given: layer(*given, scale=1.001), (gate_up, down))
    with pytest.raises(AssertionError, match="wrong: y: relative RMS error"):
        experts.check(problem, [wrong])


def test_what_collectives_send_is_counted(alone):
    x = torch.ones(6)
    with SentBytes() as sent:
        dist.all_to_all_single(torch.empty(6), x)
        dist.all_reduce(x)
        dist.barrier()
    # A process sends itself nothing, and a barrier carries nothing.
    assert (sent.nbytes, sent.collectives) == (0, 2)
    with SentBytes(), pytest.raises(NotImplementedError, match=r"how much c10d::broadcast_? sends is not known"):
        dist.broadcast(x, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "parallel needs a name, one of experts, got None"),
        (("tables",), "parallel needs a name, one of experts, got 'tables'"),
        (
            ("experts", "--shape", "1,2"),
            "--shape must be one of cpu-small, cpu-fine, or T,H,I,E,K as",
        ),
        (("experts", "--shape", "8,8,8,2,3"), "--shape 8,8,8,2,3: E must be at least K and a multiple of 2 processes"),
        (
            ("experts", "--processes", "3"),
            "--shape cpu-small: E must be at least K and a multiple of 3",
        ),
        (("experts", "--processes", "1"), "--processes must be from 2 to 64, got 1"),
        (("experts", "--dtype", "fp8"), "--dtype must be one of fp32, bf16, fp16, got 'fp8'"),
        (("experts", "--direction", "back"), "--direction must be one of forward, both, got 'back'"),
        (("experts", "--seeds", "2", "--sweep", "tokens"), "--sweep, --seeds must not be given with parallel"),
        (("experts", "--json", "/no/such/x.json"), "--json /no/such/x.json: No such file or directory"),
    ],
)
def test_bad_options_are_explained_in_one_line(monkeypatch, arguments, message):
    monkeypatch.setattr(parallel, "run", lambda *given: pytest.fail("measured"))
    result = CliRunner().invoke(app, ["bench", "parallel", *arguments])
    assert result.exit_code == 2
    assert result.stderr.startswith(f"gossamer bench: {message}") and result.stderr.count("\n") == 1


def test_other_benchmarks_refuse_processes():
    for family in ("moe", "study"):
        result = CliRunner().invoke(app, ["bench", family, "--processes", "2"])
        assert result.exit_code == 2 and "--processes" in result.stderr
