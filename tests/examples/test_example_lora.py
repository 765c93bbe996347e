"""The example that fine-tunes two adapters in one step: both ways learn the same, and its files are whole."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("peft")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TINY = {
    "--layers": 1, "--hidden-size": 32, "--heads": 2, "--rank": 4, "--sequence": 32, "--batch": 8, "--base-steps": 24,
    "--steps": 24, "--eval-windows": 12, "--corpus-bytes": 300_000, "--lr": 0.02, "--base-lr": 0.02,
}  # fmt: skip


@pytest.fixture(scope="module")
def example():
    """The example's module."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        yield importlib.import_module("finetune_lora")
    finally:
        sys.path.remove(str(EXAMPLES))


def arguments(out, **changed):
    """The command line of a tiny run."""
    settings = TINY | {f"--{name.replace('_', '-')}": value for name, value in changed.items()}
    return ["--out", str(out), *(str(part) for pair in settings.items() for part in pair)]


def test_two_adapters_learn_their_texts(example, tmp_path, device):
    assert example.main([*arguments(tmp_path), "--device", device]) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    ours, theirs = metrics["runs"]
    assert (ours["way"], theirs["way"]) == ("gossamer", "PEFT")
    for text in ("docstrings", "code"):
        curve, other = ours["bits_per_byte"][text], theirs["bits_per_byte"][text]
        # Same start and data, so only float32 rounding differs; it grows with the steps.
        assert curve[:3] == pytest.approx(other[:3], rel=1e-5) and curve == pytest.approx(other, rel=1e-2)
        assert sum(curve[-5:]) < sum(curve[:5])
        valid = metrics["held_out_bits_per_byte"][text]
        assert valid[text] == min(valid.values()) < valid["base"] < 8  # the text's own adapter is its best
    assert all(run["median_step_ms"] > 0 for run in metrics["runs"])
    assert (tmp_path / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    for name in ("docstrings", "code"):
        assert (tmp_path / name / "adapter_model.safetensors").stat().st_size > 1000


def test_a_source_file_is_split(example):
    docstrings, code = example.split_source('"""Top."""\nx = 1  # one\ndef f():\n    """Inner."""\n')
    assert docstrings == "Top.\n\nInner.\n\n" and code == "x = 1\n\ndef f():\n    pass\n"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"batch": 7}, "--batch must be even, a half for each adapter, got 7"),
        ({"rank": 33}, "--rank must be at most --hidden-size, got 33 and 32"),
        ({"steps": 0}, "--steps must be at least 1, got 0"),
        ({"hidden_size": 30}, "--hidden-size must be a multiple of 4 times --heads, got 30 and 2"),
        ({"lr": "nan"}, "--lr must be at least 0 and finite, got nan"),
        ({"data": "no/such/folder"}, "--data must be a folder, got no/such/folder"),
    ],
)
def test_bad_arguments_are_named(example, changed, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        example.main(arguments(tmp_path / "out", **changed))
    assert stop.value.code == 2 and message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_too_little_text_is_named(example, tmp_path, capsys):
    (tmp_path / "one.py").write_text("x = 1\n")
    assert example.main(arguments(tmp_path / "out", data=tmp_path)) == 2
    assert "holds too little text" in " ".join(capsys.readouterr().out.split())
