"""The training example, run as its users run it."""

import importlib
import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gossamer.nn.moe.routers import ROUTERS

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
safetensors_torch = pytest.importorskip("safetensors.torch")

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "train_moe_lm.py"
TINY = {
    "--layers": 2,
    "--hidden-size": 32,
    "--heads": 2,
    "--intermediate-size": 24,
    "--num-experts": 6,
    "--batch": 4,
    "--sequence": 48,
    "--steps": 30,
    "--eval-every": 15,
    "--eval-windows": 6,
    "--lr": 0.01,
}


def run(*arguments, settings=TINY, processes=0):
    """The finished process of the example, or torchrun's with several."""
    flat = [str(part) for pair in settings.items() for part in pair]
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes else []
    command = [sys.executable, *several, str(SCRIPT), *flat, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def example():
    """The example's module."""
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        yield importlib.import_module("train_moe_lm")
    finally:
        sys.path.remove(str(SCRIPT.parent))


def run_here(example, *arguments, settings=TINY):
    """The exit status of the command in this process, which has imported what a new one would take seconds for."""
    flat = [str(part) for pair in settings.items() for part in pair]
    return example.main([*flat, *map(str, arguments)])


def png_size(path):
    """Width and height of a PNG file."""
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:24])


def test_both_ways_learn_the_same(tmp_path, device):
    done = run("--out", tmp_path / "out", "--experts", "both", "--device", device)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    metrics = json.loads((out / "metrics.json").read_text())
    eager, ours = metrics["runs"]
    assert (eager["experts"], ours["experts"]) == ("eager", "gossamer")
    for one in (eager, ours):
        curve = one["train_bits_per_byte"]
        assert one["valid_bits_per_byte"][0] == pytest.approx(8.0, abs=1e-5)
        assert sum(curve[-5:]) / 5 < 6.0
        assert one["valid_bits_per_byte"][-1] < one["valid_bits_per_byte"][1] < 8.0
        assert one["median_step_ms"] > 0
    # Same seed, weights and data, so only float32 rounding differs: some 2e-7 by the last of these steps.
    assert ours["train_bits_per_byte"] == pytest.approx(eager["train_bits_per_byte"], rel=1e-4)
    assert ours["train_bits_per_byte"][:3] == pytest.approx(eager["train_bits_per_byte"][:3], rel=1e-6)

    counts = torch.tensor(metrics["routing"]["counts_step_layer_expert"])
    assert counts.shape == (30, 2, 6)
    assert (counts.sum(2) == 4 * 48 * metrics["routing"]["top_k"]).all()
    weights = safetensors_torch.load_file(out / "model.safetensors")
    assert weights["blocks.1.moe.experts.gate_up_proj"].shape == (6, 48, 32)
    assert all(w.isfinite().all() for w in weights.values())
    assert min(png_size(out / "loss.png")) > 500
    assert min(png_size(out / "expert_load.png")) > 500


@pytest.mark.parametrize("router", sorted(ROUTERS))
def test_every_router_learns(example, tmp_path, monkeypatch, router):
    """In the command's own process: the held-out loss falls, every layer's experts get tokens, the files are there."""
    monkeypatch.setattr(example, "load_corpus", lambda root: corpus(root))
    settings = TINY | {"--steps": 14, "--eval-every": 7, "--layers": 1, "--router": router, "--device": "cpu"}
    assert run_here(example, "--out", tmp_path, settings=settings) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    bits = metrics["runs"][0]["valid_bits_per_byte"]
    assert bits[0] == pytest.approx(8.0, abs=1e-5) and bits[-1] < bits[1] < 8
    counts = torch.tensor(metrics["routing"]["counts_step_layer_expert"])
    assert (counts.sum((0, 2)) > 0).all() and metrics["routing"]["router"] == router
    assert 0 < metrics["routing"]["experts_per_token"] <= 6
    assert min(png_size(tmp_path / "expert_load.png")) > 300


def corpus(root):
    """Bytes that are quick to load."""
    text = b"".join(f"value_{n} = {n * n} # ({n})\n".encode() for n in range(2000))
    return torch.frombuffer(bytearray(text), dtype=torch.uint8), torch.frombuffer(
        bytearray(text[:9000]), dtype=torch.uint8
    )


def test_another_router_over_another_layer(example, tmp_path):
    """A number of experts that varies, over two half layers a block; and single neurons, counted by rows of keys."""
    for number in range(25):
        (tmp_path / f"{number}.py").write_text(f"value_{number} = {number}\n" * 40)
    settings = TINY | {"--steps": 6, "--num-experts": 8}
    for out, *given in (("a", "--router", "top_p", "--experts", "cartesian"), ("b", "--experts", "product_key")):
        assert run_here(example, "--out", tmp_path / out, "--data", tmp_path, *given, settings=settings) == 0
        metrics = json.loads((tmp_path / out / "metrics.json").read_text())
        assert metrics["runs"][0]["valid_bits_per_byte"][-1] < metrics["runs"][0]["valid_bits_per_byte"][0]
        counts = torch.tensor(metrics["routing"]["counts_step_layer_expert"])
        assert counts.shape[:2] == (6, 4 if out == "a" else 2)
        assert min(png_size(tmp_path / out / "expert_load.png")) > 500
        per_token = counts.sum(2) / (4 * 48)
        assert bool((per_token >= 1).all()) if out == "a" else bool((per_token == 32).all())


def test_bias_balancing_on_own_files(example, tmp_path):
    for number in range(25):
        (tmp_path / f"{number}.py").write_text(f"value_{number} = {number}\n" * 40)
    settings = TINY | {"--steps": 40, "--bias-rate": 0.02}
    given = ("--out", tmp_path / "out", "--data", tmp_path, "--balance", "bias", "--seed", 3)
    assert run_here(example, *given, settings=settings) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["corpus"]["train_bytes"] + metrics["corpus"]["valid_bytes"] == sum(
        p.stat().st_size + 1 for p in tmp_path.glob("*.py")
    )
    weights = safetensors_torch.load_file(tmp_path / "out" / "model.safetensors")
    assert weights["blocks.0.moe.router.e_score_correction_bias"].abs().max() > 0.02
    assert metrics["runs"][0]["train_bits_per_byte"][-1] < 4


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no process groups")
def test_two_processes_learn_what_one_does(tmp_path):
    for number in range(25):
        (tmp_path / f"{number}.py").write_text(f"value_{number} = {number}\n" * 40)
    settings = TINY | {"--steps": 8, "--eval-every": 4, "--layers": 1, "--device": "cpu"}
    given = ("--data", tmp_path, "--balance", "bias")
    found = []
    for out, *parallel in (("one",), ("two", "--expert-parallel")):
        done = run("--out", tmp_path / out, *given, *parallel, settings=settings, processes=2 * len(parallel))
        assert done.returncode == 0, done.stderr
        # One process speaks for both.
        assert done.stdout.count("step 4:") == 1
        weights = safetensors_torch.load_file(tmp_path / out / "model.safetensors")
        found.append((json.loads((tmp_path / out / "metrics.json").read_text()), weights))
    (one, alone), (two, divided) = found
    assert (one["machine"]["processes"], two["machine"]["processes"]) == (1, 2)
    for curve in ("train_bits_per_byte", "valid_bits_per_byte"):
        assert two["runs"][0][curve] == pytest.approx(one["runs"][0][curve], rel=1e-5)
    assert two["routing"]["counts_step_layer_expert"][:4] == one["routing"]["counts_step_layer_expert"][:4]
    assert alone.keys() == divided.keys()
    for name, weight in alone.items():
        assert divided[name].shape == weight.shape
        assert float((divided[name] - weight).norm()) <= 1e-3 * float(weight.norm())
    assert not one["runs"][0]["exchange"]
    sent = two["runs"][0]["exchange"]
    assert set(sent) == {f"expert {part}" for part in ("tokens sizes", "tokens", "outputs")} | {
        f"expert {part} gradient" for part in ("tokens", "outputs")
    }
    # Half the tokens, each at most once to the other process, and back.
    assert 0 < sent["expert outputs"]["bytes_per_step"] <= 4 * 48 * 32 * 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--expert-parallel"], "--expert-parallel needs processes: torchrun --nproc-per-node N"),
        (["--top-k", "7"], "--top-k must be at most --num-experts, got 7 of 6"),
        (["--balance", "bias", "--router", "tree"], "--balance bias needs --router sigmoid_topk, got tree"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--lr", "nan"], "--lr must be at least 0 and finite, got nan"),
        (["--hidden-size", "30"], "--hidden-size must be a multiple of twice --heads, got 30 and 2"),
        (["--data", "no/such/folder"], "--data must be a folder, got no/such/folder"),
        (["--experts", "dense"], "invalid choice: 'dense'"),
    ],
)
def test_bad_arguments_are_named(example, arguments, message, tmp_path):
    with pytest.raises(SystemExit) as stop, pytest.MonkeyPatch.context() as patch:
        lines = []
        patch.setattr(sys.stderr, "write", lines.append)
        run_here(example, "--out", tmp_path / "out", *arguments)
    assert stop.value.code == 2
    assert message in "".join(lines)
    assert not (tmp_path / "out").exists()


def test_too_little_data_is_named(example, tmp_path, capsys):
    (tmp_path / "one.py").write_text("x = 1\n")
    assert run_here(example, "--out", tmp_path / "out", "--data", tmp_path) == 2
    assert "holds 7 training and 1 validation bytes" in " ".join(capsys.readouterr().out.split())
