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
from gossamer.bench.harness import runner, timing
from gossamer.bench.harness.ceilings import Ceilings
from gossamer.cli import app

SHAPE = "192,64,32,6,2"


@pytest.fixture
def invoke(monkeypatch):
    """Run the command in this process, with no time spent on ceilings."""
    monkeypatch.setattr(runner, "measure", lambda device, dtypes: Ceilings(dict.fromkeys(dtypes, 1e12), 1e10, 2e10))
    monkeypatch.setitem(runner.BUDGET, "full", 0.05)
    monkeypatch.setitem(timing.SETTLE_LIMIT, "cpu", 0.0)
    return lambda *arguments: CliRunner().invoke(app, list(arguments), catch_exceptions=False)


def test_bench_prints_a_table_and_a_sentence(invoke, tmp_path):
    stored = tmp_path / "moe.json"
    result = invoke("bench", "moe", "--shape", SHAPE, "--dtype", "fp32", "--json", str(stored))
    assert result.exit_code == 0, result.output
    assert f"moe {SHAPE} (T=192 H=64 I=32 E=6 K=2) fp32 forward on " in result.output
    assert f"moe {SHAPE} (T=192 H=64 I=32 E=6 K=2) fp32 forward+backward on " in result.output
    for word in ("gossamer ", "equal-FLOP dense", "TFLOP/s", "attainable", "host ms", "peak MiB"):
        assert word in result.output
    for word in ("ceilings in this run", "attainable here", "checked against float64", " threads"):
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
        (["--skew", "few"], "--skew must be one of uniform, zipf, one, trained, got 'few'"),
        (["gather_reduce", "--skew", "trained"], "--skew must be one of uniform, zipf, one, got 'trained'"),
        (["--device", "tpu"], "--device must be auto, cpu or cuda, got 'tpu'"),
        (["--shape", "8,8,8,2,3"], "--shape 8,8,8,2,3: K must be at most E, got K=3 and E=2"),
        (["--peers", "nobody"], "--peers must be one of all, none, transformers-eager"),
        (["--peers", "megablocks", "--device", "cpu"], "--peers megablocks: megablocks "),
        (
            ["--sweep", "rank"],
            "--sweep must name one of tokens, hidden, intermediate, experts, top-k, skew, got 'rank'",
        ),
        (["--sweep", "top-k=64", "--device", "cpu"], "--sweep top-k=64: K must be at most E, got K=64 and E=32"),
        (["--sweep", "tokens=1,x"], "--sweep tokens takes positive integers between commas, got '1,x'"),
        (["--sweep", "skew=few"], "--sweep skew must be among uniform, zipf, one, trained, got 'few'"),
        (["--sweep", "skew", "--skew", "one"], "--sweep skew and --skew one exclude each other"),
        (["--fail-below", "0"], "--fail-below must be above 0, got 0"),
        (["--json", "/no/such/folder/x.json"], "--json /no/such/folder/x.json: No such file or directory"),
        (["--csv", "/"], "--csv /: Is a directory"),
        (["--html", "/dev/null/x.html"], "--html /dev/null/x.html: Not a directory"),
        (["--plot", "/dev/null"], "--plot /dev/null: File exists"),
        (["--compare", "/no/such.json"], "--compare /no/such.json: No such file or directory"),
        (["--compare", __file__], f"--compare {__file__} is not JSON"),
    ],
)
def test_bad_options_are_explained_in_one_line_before_anything_is_measured(invoke, monkeypatch, arguments, message):
    monkeypatch.setattr(runner, "run", lambda *args, **kwargs: pytest.fail("measured"))
    result = invoke("bench", *arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"gossamer bench: {message}")
    assert result.stderr.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_asked_for_and_not_there_is_one_line(invoke):
    result = invoke("bench", "--device", "cuda")
    assert (result.exit_code, result.stderr) == (2, "gossamer bench: --device cuda: torch finds no CUDA device here\n")


def test_missing_matplotlib_is_one_line_before_anything_is_measured(invoke, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for option in ("--plot", "--html"):
        result = invoke("bench", option, str(tmp_path / "x"))
        expected = f"gossamer bench: {option} needs matplotlib; pip install 'gossamer[bench]'\n"
        assert (result.exit_code, result.stderr) == (2, expected)
    assert list(tmp_path.iterdir()) == []


def test_files_there_before_are_kept_until_there_is_something_to_write(invoke, monkeypatch, tmp_path):
    kept, new = tmp_path / "kept.json", tmp_path / "new.csv"
    kept.write_text("kept")
    result = invoke("bench", "--json", str(kept), "--csv", str(new), "--html", str(tmp_path / "no" / "x.html"))
    assert result.exit_code == 2 and "No such file" in result.stderr
    assert kept.read_text() == "kept" and not new.exists()


def test_sweep_compare_and_every_kind_of_file(invoke, tmp_path):
    import csv

    base = ["bench", "dispatch", "--shape", "64,8,2", "--device", "cpu"]
    earlier = tmp_path / "earlier.json"
    first = invoke(*base, "--sweep", "tokens=64,128", "--json", str(earlier))
    assert first.exit_code == 0, first.output
    record = json.loads(earlier.read_text())
    assert record["sweep"] == {"dimension": "tokens", "symbol": "T", "values": [64, 128]}
    # An earlier run that looks as if it was measured elsewhere, and a thousand times as fast.
    record["environment"]["cpu"] = "Another Processor"
    for case in record["cases"]:
        for variant in case["variants"]:
            variant |= {key: variant[key] / 1000 for key in ("p20", "median", "p80")}
    earlier.write_text(json.dumps(record))
    files = {name: tmp_path / f"now.{name}" for name in ("json", "csv", "html")}
    options = [text for name, path in files.items() for text in (f"--{name}", str(path))]
    now = invoke(
        *base, "--sweep", "T=128,256", *options, "--plot", str(tmp_path / "plots" / "here"), "--compare", str(earlier)
    )
    assert now.exit_code == 0, now.output
    assert "dispatch int forward: median ms against T" in now.output
    assert "warning: measured under different conditions: cpu: Another Processor then, " in now.output
    lines = [line for line in now.output.splitlines() if line.startswith("dispatch 64,8,2 T=128")]
    assert len([line for line in lines if line.endswith("slower")]) == 2
    with files["csv"].open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["T"], row["name"]) for row in rows] == [
        (size, name) for size in ("128", "256") for name in ("gossamer", "torch stable sort")
    ]
    stored = json.loads(files["json"].read_text())["cases"][1]["variants"][0]
    assert float(rows[2]["median"]) == stored["median"] and float(rows[2]["host_seconds"]) == stored["host_seconds"]
    page = files["html"].read_text()
    assert "Another Processor" in page and "slower" in page
    assert {path.name for path in (tmp_path / "plots" / "here").iterdir()} == {"scaling.png", "scaling.svg"}


def test_fail_below_has_an_exit_status_of_its_own(invoke):
    base = ["bench", "dispatch", "--shape", "64,8,2", "--device", "cpu", "--fail-below"]
    assert invoke(*base, "1e-9").exit_code == 0
    slow = invoke(*base, "1e9")
    assert slow.exit_code == 3
    assert "below --fail-below 1e+09: dispatch 64,8,2 (T=64 E=8 K=2) int forward on cpu" in slow.output
    assert slow.output.strip().endswith("x the speed of dense")


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


@pytest.mark.parametrize(("options", "status"), [((), 2), (("--fail-below", "0.5"), 3)])
def test_what_memory_cannot_hold_is_left_out(invoke, tmp_path, options, status):
    """A size that is too large does not end a sweep, and earlier results are kept; on its own it is a failure."""
    stored = tmp_path / "sweep.json"
    common = ("bench", "dispatch", "--direction", "forward", "--device", "cpu", "--quick")
    result = invoke(*common, "--shape", "64,8,2", "--sweep", f"tokens=64,{10**15}", "--json", str(stored))
    assert result.exit_code == 0, result.output
    record = json.loads(stored.read_text())
    assert len(record["cases"]) == 1 and "which does not fit into memory" in record["left_out"][0]
    alone = invoke(*common, "--shape", f"{10**15},8,2", *options)
    assert alone.exit_code == status and "which does not fit into memory" in alone.output


def test_files_are_written_though_nobody_reads_the_table(tmp_path):
    """The reader takes the first line and closes the pipe, as head does."""
    stored = tmp_path / "moe.json"
    command = [
        sys.executable,
        "-c",
        "from gossamer.cli import app; app()",
        "bench",
        "dispatch",
        "--shape",
        "64,8,2",
        "--quick",
        "--device",
        "cpu",
    ]
    process = subprocess.Popen([*command, "--json", str(stored)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    error = process.stderr.read().decode()
    assert process.wait() == 0 and "Traceback" not in error, error
    assert json.loads(stored.read_text())["cases"]


def test_a_full_disk_is_one_line(invoke):
    result = invoke("bench", "dispatch", "--shape", "64,8,2", "--quick", "--device", "cpu", "--json", "/dev/full")
    assert result.exit_code == 2
    assert "/dev/full: No space left on device" in result.output
