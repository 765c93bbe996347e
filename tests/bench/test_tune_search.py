"""``gossamer tune``: the whole search with a stand-in stopwatch, and the launches that its entries are for."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from helpers import check, make_dispatch
from typer.testing import CliRunner

import gossamer
from gossamer.bench.families import experts
from gossamer.bench.harness import tune, tune_targets
from gossamer.bench.harness.case import Request
from gossamer.cli import app
from gossamer.ops.expert_mlp import expert_mlp_reference
from gossamer.triton_kernels import common, expert_mlp, expert_mlp_backward, grouped_matmul, tile_tables
from gossamer.triton_kernels.tiles import Tile, choose

# Odd sizes, several experts, fewer rows than a tile has.
SHAPE = "37,24,40,3,2"
SIZES = dict(zip(experts.SYMBOLS, map(int, SHAPE.split(",")), strict=True))
SOUND, FASTEST_BUT_WRONG, TOO_LARGE, BARELY = (Tile(16, 64, 64, 4, stages) for stages in (2, 3, 4, 5))


def request(dtype="fp16"):
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    return Request(SHAPE, SIZES, dtype, device, "both", "uniform")


class OutOfResources(Exception):
    """Stands for the error of that name that Triton raises."""


@pytest.fixture
def stand_ins(monkeypatch, tmp_path):
    """Four candidates, one that launches nowhere and one with wrong numbers; times that the tile alone decides."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tune, "FINAL_ROUNDS", (4, 4))
    monkeypatch.setattr(tune, "candidates", lambda *_: [FASTEST_BUT_WRONG, TOO_LARGE, BARELY, SOUND])
    seconds = {FASTEST_BUT_WRONG: 0.1, TOO_LARGE: 0.2, SOUND: 0.5, BARELY: 0.98}
    timed = []

    def stopwatch(device):
        return lambda call: timed.append(call.tile) or seconds.get(call.tile, 1.0)

    def broken(target):
        def launch(tile):
            if tile == TOO_LARGE:
                raise OutOfResources("shared memory")
            outputs = target.launch(tile)
            return {k: v * 1.01 for k, v in outputs.items()} if tile == FASTEST_BUT_WRONG else outputs

        return dataclasses.replace(target, launch=launch)

    real = tune.targets
    monkeypatch.setattr(tune, "targets", lambda *arguments: map(broken, real(*arguments)))
    monkeypatch.setattr(tune, "stopwatch", stopwatch)
    return timed


def card():
    return (
        tile_tables.cuda_device(torch.cuda.current_device()) if torch.cuda.is_available() else tile_tables.INTERPRETER
    )


def run_command(*arguments):
    return CliRunner().invoke(app, ["tune", *arguments], catch_exceptions=False)


def test_the_fastest_right_tile_is_written_and_no_wrong_one_is_timed(stand_ins, tmp_path):
    result = run_command("--shape", SHAPE, "--dtype", "fp16", "--budget", "1000")
    assert result.exit_code == 0, result.output
    assert FASTEST_BUT_WRONG not in stand_ins and TOO_LARGE not in stand_ins
    path = tile_tables.cache_folder() / card().file_name
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [path]
    entries = tile_tables.read(path, card(), pinned=True)
    assert [entry.tile for entry in entries] == [SOUND] * 6
    assert {(entry.milliseconds, entry.default_milliseconds) for entry in entries} == {(500.0, 1000.0)}
    stored = json.loads(path.read_text())
    assert stored["command"] == f"gossamer tune --family expert_mlp --shape {SHAPE} --dtype fp16 --budget 1000"
    assert stored["versions"]["torch"] == torch.__version__
    first = result.stdout.splitlines()[0]
    assert "1 is wrong" in first and "1 passes the shared memory limit" in first and "(4 of 4 tiles tried" in first
    # In turns: each round has the present choice once.
    assert stand_ins.count(SOUND) == 6 * (tune.SCREENING_ROUNDS + 4)


def test_what_no_longer_wins_is_removed_and_other_shapes_stay(stand_ins, monkeypatch, tmp_path):
    output = tmp_path / "mine.json"
    arguments = ["--family", "grouped_matmul", "--dtype", "fp16", "--budget", "1000", "--output", str(output)]
    assert run_command("--shape", SHAPE, *arguments).exit_code == 0
    assert run_command("--shape", "9,16,16,2,1", *arguments).exit_code == 0
    assert len(tile_tables.read(output, card(), pinned=True)) == 6
    monkeypatch.setattr(tune, "candidates", lambda *_: [BARELY])
    assert run_command("--shape", SHAPE, *arguments).exit_code == 0
    left = tile_tables.read(output, card(), pinned=True)
    assert {entry.problem.experts for entry in left} == {2} and len(left) == 3
    assert list(tmp_path.iterdir()) == [output]


def test_within_no_budget_nothing_is_searched_or_written(stand_ins, tmp_path):
    result = run_command("--shape", SHAPE, "--dtype", "fp16", "--budget", "1e-9")
    assert result.exit_code == 0
    assert result.stdout.count("not reached within the budget") == 6
    assert "nothing is written: no tile is 3% faster" in result.stdout
    assert stand_ins == [] and not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_a_present_choice_that_is_wrong_fails_the_command(stand_ins, monkeypatch):
    monkeypatch.setattr(tune, "choose", lambda *_: FASTEST_BUT_WRONG)
    result = run_command("--shape", SHAPE, "--dtype", "fp16", "--budget", "1000", "--family", "grouped_matmul")
    assert result.exit_code == 1
    assert result.stdout.count("the present choice, 16x64x64, 4 warps, 3 stages, is wrong: ") == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--family", "attention"], "--family must be one of expert_mlp, grouped_matmul, got 'attention'"),
        (["--shape", "1,2"], "--shape must be one of olmoe"),
        (["--dtype", "fp8"], "--dtype must be one of fp32, bf16, fp16, got 'fp8'"),
        (["--device", "tpu"], "--device must be auto or cuda, got 'tpu'"),
        (["--budget", "-1"], "--budget must be a positive number of seconds, got -1"),
        (["--shape", SHAPE, "--output", "/proc/none/tiles.json"], "/proc/none"),
        (["--shape", SHAPE, "--output", "/"], "/ is a folder"),
    ],
)
def test_bad_options_are_one_line(stand_ins, arguments, message):
    result = run_command(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("gossamer tune: ") and message in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "native CPU kernels choose their tiles from the cache sizes; tuning needs a CUDA device"),
     (["--device", "cuda"], "no CUDA device")],
)  # fmt: skip
def test_without_a_gpu_it_says_so(monkeypatch, arguments, message):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    result = run_command(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr and result.stderr.count("\n") == 1


def test_candidates_are_near_valid_and_never_the_present_choice():
    for target in tune_targets.targets("expert_mlp", request()):
        offered = tune.candidates(target.problem, 90, 227 * 1024)
        present = choose(target.problem, 90)
        assert len(offered) == len(set(offered)) > 100 and present not in offered
        changed = [f.name for f in dataclasses.fields(Tile) if getattr(offered[0], f.name) != getattr(present, f.name)]
        assert len(changed) == 1


@pytest.mark.parametrize("family", tune_targets.FAMILIES)
def test_tuned_problems_are_those_that_launches_ask_for(family, monkeypatch):
    """Forward and backward of the operator look up the very keys that the search writes."""
    asked = set()
    monkeypatch.setattr(common, "choose", lambda problem, *rest: asked.add(problem.key) or choose(problem, *rest))
    wanted = request()
    made = experts.make_problem(wanted)
    dispatch = gossamer.dispatch(made.ids, made.num_experts)
    with gossamer.backend("triton"):
        if family == "expert_mlp":
            leaves = [made.leaf(name) for name in ("x", "gate_up", "down")]
            gossamer.expert_mlp(*leaves, dispatch, made.weights).sum().backward()
        else:
            leaves = [made.leaf(name) for name in ("x", "gate_up")]
            gossamer.grouped_matmul(*leaves, dispatch, y_grouped=True).sum().backward()
    problems = [target.problem for target in tune_targets.targets(family, wanted)]
    assert {problem.key for problem in problems} == asked
    assert len(problems) == len(asked) == tune_targets.COUNT[family]


def test_launches_take_the_tiles_of_a_table_and_stay_right(monkeypatch, device):
    """Every product of the layer in tiles that no heuristic chooses: results obey the error rule, twice to the bit."""
    odd = Tile(32, 32, 16, 4, 2, group_m=2, persistent=True)
    blocks = []
    monkeypatch.setattr(common, "choose", lambda problem, arch, table: choose(problem, arch, {problem.key: odd}))
    for module in (expert_mlp, expert_mlp_backward, grouped_matmul):

        def spy(offsets, rows, block_m, tables=None, real=module.row_tiles):
            blocks.append(block_m)
            return real(offsets, rows, block_m, tables)

        monkeypatch.setattr(module, "row_tiles", spy)
    t, h, i, e, k = SIZES.values()
    dispatch = make_dispatch(t, e, k, device)
    shapes = {"x": (t, h), "gate_up": (e, 2 * i, h), "down": (e, h, i), "weights": (t, k)}
    inputs = {name: (torch.randn(shape) * shape[-1] ** -0.5).half().to(device) for name, shape in shapes.items()}

    def call(function):
        return lambda x, gate_up, down, weights: function(x, gate_up, down, dispatch, weights)

    with gossamer.backend("triton"):
        results = []
        for _ in range(2):
            torch.manual_seed(1)  # for the gradient that check draws
            results.append(check(call(gossamer.expert_mlp), call(expert_mlp_reference), inputs))
    assert set(blocks) == {32} and len(blocks) == 2 * 4
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_the_message_of_a_process_without_triton():
    code = "import sys; sys.modules['triton'] = None; sys.argv = ['gossamer', 'tune']; "
    code += "from gossamer.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
