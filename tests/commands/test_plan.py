"""``gossamer plan``: its tables, files, exit status, and what it says where something is missing or wrong."""

from __future__ import annotations

import json
import sys

import pytest
from typer.testing import CliRunner

from gossamer.bench.harness import processes
from gossamer.cli import app
from gossamer.parallel.planning.rates import device_memory

MODEL = {
    "model_type": "mixtral", "hidden_size": 512, "vocab_size": 1000, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "intermediate_size": 1024, "num_local_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip
TABLES = {"tables": [{"name": f"t{n}", "rows": 10**n, "dim": 16, "bag": n} for n in range(1, 7)]}
LINKS = ("--bandwidth", "100,10", "--latency", "2,10", "--per-node", "4")
H100 = ("--device", "H100", "--memory-rate", "3000")


@pytest.fixture
def invoke():
    return lambda *arguments: CliRunner().invoke(app, ["plan", *arguments], catch_exceptions=False)


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "small" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(MODEL))
    return str(path)


@pytest.fixture
def described(tmp_path):
    path = tmp_path / "tables.json"
    path.write_text(json.dumps(TABLES))
    return str(path)


def test_a_model_is_planned_shown_stored_and_drawn(invoke, config, tmp_path):
    stored, plots = tmp_path / "plan.json", tmp_path / "plots"
    result = invoke(
        "parallel", config, "--gpus", "16", *LINKS, *H100, "--memory", "80", "--tokens", "4096", "--top", "3",
        "--json", str(stored), "--plot", str(plots),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    record = json.loads(stored.read_text())
    best = record["layouts"][0]
    lines = result.stdout.splitlines()
    assert lines[0].split()[:3] == ["layout", "step", "ms"] and len(lines[2:5]) == 3
    assert lines[2].startswith(best["layout"]) and lines[2].endswith("yes")
    assert "(h100-expert-kernels.json: expert kernels of olmoe in a row, forward and backward)." in result.stdout
    assert "copies in memory: 3000 GB/s (--memory-rate)." in result.stdout
    assert best["step_seconds"] == min(layout["step_seconds"] for layout in record["layouts"] if layout["fits"])
    assert {point["devices"] for point in record["growth"]} == {2**n for n in range(13)}
    assert (plots / "plan-small.svg").read_text().count("<path") > 50


def test_tables_are_planned_with_the_rates_of_the_device(invoke, described, tmp_path):
    stored = tmp_path / "plan.json"
    arguments = ("--gpus", "8", *LINKS, "--batch", "512", "--device", "AMD EPYC:avx512_bf16", "--json", str(stored))
    result = invoke("parallel", described, *arguments)
    assert result.exit_code == 0, result.output
    record = json.loads(stored.read_text())
    assert {layout["layout"].split(":")[0] for layout in record["layouts"]} >= {"replicate", "table", "row", "column"}
    assert set(record["layouts"][0]["where"]) == {f"t{n}" for n in range(1, 7)}
    assert "embedding-cpu-epyc-2-cores.json: embedding cpu-bag fp32" in result.stdout


def test_what_does_not_fit_is_an_exit_status(invoke, config):
    result = invoke("parallel", config, "--gpus", "4", *LINKS, *H100, "--tokens", "4096", "--memory", "0.01")
    assert result.exit_code == 1
    assert "0 of " in result.stdout and "layouts fit" in result.stdout
    assert "No layout fits: the smallest needs " in result.stdout


def test_the_memory_of_a_known_device_is_the_limit(invoke, tmp_path):
    path, stored = tmp_path / "mixtral.json", tmp_path / "plan.json"
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    path.write_text(json.dumps(MODEL | sizes | {"vocab_size": 32000}))
    arguments = ("parallel", str(path), "--gpus", "64", *LINKS, "--tokens", "8192", "--json", str(stored))
    rates = ("--memory-rate", "3000", "--expert-rate", "400", "--dense-rate", "500")
    result = invoke(*arguments, *rates, "--device", "H100")
    record, limit = json.loads(stored.read_text()), 80 * 2**30
    fitting = [layout for layout in record["layouts"] if layout["memory_bytes"] <= limit]
    assert 0 < len(fitting) < len(record["layouts"]) and record["cluster"]["memory"] == limit
    assert result.exit_code == 0 and record["layouts"][: len(fitting)] == fitting
    assert "80.0 GiB each, the memory of H100;" in " ".join(result.stdout.split())
    result = invoke(*arguments, *rates, "--device", "H100", "--memory", "100")
    assert "100 GiB each;" in " ".join(result.stdout.split())
    result = invoke(*arguments, *rates, "--device", "A100")
    assert json.loads(stored.read_text())["cluster"]["memory"] is None
    assert "No memory limit was given" in result.stdout


@pytest.mark.parametrize(
    ("device", "gib"),
    [
        ("NVIDIA H100 80GB HBM3", 80), ("NVIDIA H100 NVL", 94), ("h200", 141), ("A100-SXM4-40GB", 40), ("A100", None),
        ("GH200", None), ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None), ("AMD EPYC:avx2", None),
    ],
)  # fmt: skip
def test_the_memory_of_a_device_is_known_by_its_name(device, gib):
    assert device_memory(device) == gib


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpus", "0"), "--gpus must be from 1 to 65536, got 0"),
        (("--gpus", "12", "--per-node", "8"), "--gpus must be a multiple of --per-node, got 12 and 8"),
        (
            ("--bandwidth", "fast"),
            "--bandwidth must be one number or two between commas, finite and above 0, got 'fast'",
        ),
        (
            ("--latency", "-1,2"),
            "--latency must be one number or two between commas, finite and at least 0, got '-1,2'",
        ),
        (("--bandwidth", "1"), "--bandwidth and --latency must have as many numbers, got '1' and '2,10'"),
        (("--bandwidth", "1", "--latency", "1"), "--bandwidth, --latency or --links must have a second value"),
        (("--links", "x"), "--links and --bandwidth or --latency exclude each other"),
        (("--memory", "0"), "--memory must be finite and above 0, got 0"),
        (("--top", "0"), "--top must be at least 1, got 0"),
        (("--batch", "4"), "--batch must not be given with a model"),
        (("--device", "A100"), "--expert-rate must be given in TFLOP/s: no run in "),
        (("--device", ":avx2"), "--device must be part of a name, got ':avx2'"),
        (("--device", "H100", "--expert-rate", "-1"), "--expert-rate must be finite and above 0, got -1"),
        (("--device", "H100"), "--memory-rate must be given in GB/s: no run in "),
        (("--dtype", "int8"), "dtype must be one of fp32, bf16, fp16, got 'int8'"),
        (("--json", "/no/such/folder/x.json"), "--json /no/such/folder/x.json: No such file or directory"),
    ],
)
def test_bad_options_are_explained_in_one_line(invoke, config, arguments, message):
    result = invoke("parallel", config, "--gpus", "8", *LINKS, "--tokens", "64", *arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"gossamer plan: {message}") and result.stderr.count("\n") == 1


def test_what_is_missing_is_named(invoke, config, described, monkeypatch, tmp_path):
    for arguments, message in (
        ((config, "--gpus", "8", *LINKS), "--tokens must be given for a model"),
        ((described, "--gpus", "8", *LINKS), "--batch must be given for a description of tables"),
        (
            (described, "--gpus", "8", *LINKS, "--tokens", "3"),
            "--tokens must not be given with a description of tables",
        ),
        ((config, "--gpus", "8", "--bandwidth", "1"), "--latency must be given, or --links with a file of"),
        ((config, "--gpus", "8", "--links", config), f"{config} must be a file of gossamer plan measure --json"),
        ((str(tmp_path / "no.json"), "--gpus", "1", *LINKS), f"{tmp_path}/no.json: No such file or directory"),
    ):
        result = invoke("parallel", *arguments)
        assert result.exit_code == 2 and result.stderr.startswith(f"gossamer plan: {message}"), result.output
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = invoke("parallel", config, "--gpus", "8", *LINKS, "--tokens", "3", "--plot", str(tmp_path / "p"))
    expected = "gossamer plan: --plot needs matplotlib; pip install 'gossamer[bench]'\n"
    assert (result.exit_code, result.stderr) == (2, expected)
    assert not (tmp_path / "p").exists()


def test_two_processes_are_measured_and_a_plan_uses_their_link(invoke, config, tmp_path):
    stored = tmp_path / "links.json"
    result = invoke("measure", "--processes", "2", "--seconds", "0.3", "--json", str(stored))
    assert result.exit_code == 0, result.output
    record = json.loads(stored.read_text())
    (run,) = record["runs"]
    assert run["processes"] == 2 and run["backend"] == "gloo" and record["environment"]["versions"]["torch"]
    fitted = [sample["nbytes"] for sample in run["samples"] if sample["fitted"]]
    assert len(fitted) == 4 and len(run["samples"]) == 17
    for sample in run["samples"]:
        assert 0 < sample["p20"] <= sample["seconds"] <= sample["p80"]
        assert sample["ratio"] == pytest.approx(sample["predicted"] / sample["seconds"])
    assert result.stdout.splitlines()[2].split()[:4] == ["all-to-all", "*", "1", "KiB"]
    assert "2 processes, gloo, 1 thread each: latency " in result.stdout
    planned = tmp_path / "plan.json"
    arguments = ("--gpus", "2", "--links", str(stored), *H100, "--tokens", "64", "--json", str(planned))
    assert invoke("parallel", config, *arguments).exit_code == 0
    assert json.loads(planned.read_text())["cluster"]["intra"] == run["link"]


def test_counts_of_processes_are_checked(invoke):
    for text in ("1", "2,x", "", "65"):
        result = invoke("measure", "--processes", text)
        expected = f"gossamer plan: --processes must be numbers from 2 to 64 between commas, got {text!r}\n"
        assert (result.exit_code, result.stderr) == (2, expected)
    result = invoke("measure", "--seconds", "0")
    assert (result.exit_code, result.stderr) == (2, "gossamer plan: --seconds must be finite and above 0, got 0\n")


def test_a_process_that_fails_ends_the_others():
    with pytest.raises(RuntimeError, match=r"process \d of 2 ended with 1: .*No module named gossamer_absent"):
        processes.run("gossamer_absent", [], 2, timeout=60)
    with pytest.raises(RuntimeError, match=r"process 0 of 2 did not end within 0\.2 s"):
        processes.run("timeit", ["-n", "1", "import time; time.sleep(60)"], 2, timeout=0.2)
