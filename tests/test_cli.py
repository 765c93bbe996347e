"""The command line: its tables, its exit status, and what it says where something is missing or wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from gossamer import _backend
from gossamer.bench import harness
from gossamer.bench.ceilings import Ceilings
from gossamer.cli import app

SHAPE = "192,64,32,6,2"


@pytest.fixture
def invoke(monkeypatch):
    """Run the command in this process, with no time spent on ceilings."""
    monkeypatch.setattr(harness, "measure", lambda device, dtypes: Ceilings(dict.fromkeys(dtypes, 1e12), 1e10))
    monkeypatch.setitem(harness.BUDGET, "full", 0.05)
    return lambda *arguments: CliRunner().invoke(app, list(arguments), catch_exceptions=False)


def test_bench_prints_a_table_and_a_sentence(invoke, tmp_path):
    stored = tmp_path / "moe.json"
    result = invoke("bench", "moe", "--shape", SHAPE, "--dtype", "fp32", "--json", str(stored))
    assert result.exit_code == 0, result.output
    assert f"moe {SHAPE} (T=192 H=64 I=32 E=6 K=2) fp32 forward on " in result.output
    assert f"moe {SHAPE} (T=192 H=64 I=32 E=6 K=2) fp32 forward+backward on " in result.output
    for word in ("gossamer ", "equal-FLOP dense", "TFLOP/s", "ceiling", "peak MiB", "checked against float64"):
        assert word in result.output
    last = result.output.strip().splitlines()[-1]
    assert last.startswith("Over 2 cases, gossamer takes ") and "the time of equal-FLOP dense" in last
    cases = json.loads(stored.read_text())["cases"]
    assert [case["direction"] for case in cases] == ["forward", "both"]
    assert {"name", "median", "p20", "p80", "seconds", "error", "peak_bytes"} <= cases[0]["variants"][0].keys()


def test_bench_alone_is_the_moe_layer(invoke):
    result = invoke("bench", "--shape", SHAPE, "--dtype", "fp32", "--direction", "forward", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"moe {SHAPE}")
    assert "forward+backward" not in result.output


def test_a_wrong_result_prints_no_speed_and_fails(invoke, monkeypatch):
    import gossamer

    right = gossamer.expert_mlp
    monkeypatch.setattr(gossamer, "expert_mlp", lambda *args: right(*args) * 1.01)
    result = invoke("bench", "expert_mlp", "--shape", SHAPE, "--dtype", "fp32", "--direction", "forward")
    assert result.exit_code == 1
    row = next(line for line in result.output.splitlines() if line.startswith("gossamer "))
    assert row.split() == ["gossamer", "wrong", "1.0e-02"]
    assert "gossamer: wrong: y: relative RMS error 1.000e-02" in result.output
    assert result.output.strip().splitlines()[-1].startswith("Wrong or failed: gossamer (expert_mlp")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["attention"], "the benchmark must be one of moe, expert_mlp"),
        (["--shape", "1,2"], "--shape must be one of olmoe"),
        (["--dtype", "fp8"], "--dtype must be one of fp32, bf16, fp16, got 'fp8'"),
        (["--skew", "few"], "--skew must be one of uniform, zipf, one, got 'few'"),
        (["--device", "tpu"], "--device must be auto, cpu or cuda, got 'tpu'"),
    ],
)
def test_bad_options_are_explained_in_one_line(invoke, arguments, message):
    result = invoke("bench", *arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"gossamer bench: {message}")
    assert result.stderr.count("\n") == 1


def test_info_names_versions_and_backends(invoke, monkeypatch):
    plain = invoke("info")
    assert plain.exit_code == 0
    assert f"torch: {torch.__version__}" in plain.output
    assert f"{torch.get_num_threads()} threads" in plain.output
    serving = _backend.resolve("expert_mlp", torch.empty(0))
    assert f"expert_mlp on cpu: {serving}" in plain.output
    assert "cuda on cpu: no, CUDA kernels run on cuda, not on cpu" in plain.output
    stored = json.loads(invoke("info", "--json").output)
    assert stored["primitives"]["cpu"]["dispatch"]["serves"] == serving
    monkeypatch.setattr(_backend, "unavailable", lambda name, device: "no compiler" if name == "native" else None)
    assert "native on cpu: no, no compiler" in invoke("info").output


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_missing_extra_is_one_line_and_no_traceback(missing):
    code = f"import sys; sys.modules[{missing!r}] = None; from gossamer.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 1
    assert done.stderr == f"gossamer: the command line needs {missing}; pip install 'gossamer[bench]'\n"
