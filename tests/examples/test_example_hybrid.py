"""The example that trains a hybrid language model."""

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SMALL = "--steps 12 --eval-every 12 --eval-windows 4 --batch 2 --sequence 48 --hidden-size 32 --intermediate-size 16"


@pytest.fixture
def main(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import train_hybrid_lm

    yield train_hybrid_lm.main
    sys.modules.pop("train_hybrid_lm")


def test_trains_and_writes_with_constant_state(main, tmp_path):
    """Both models learn something, and the delta layers' state does not grow with what is written."""
    assert main(["--out", str(tmp_path / "out"), *SMALL.split(), "--generate", "16", "--layer", "kimi"]) == 0
    stored = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert [run["model"] for run in stored["runs"]] == ["attention", "hybrid"]
    for run in stored["runs"]:
        assert run["valid_bits"][-1] < run["valid_bits"][0] == pytest.approx(8.0, abs=1e-3)
    few, many = stored["runs"][1]["generation"]
    assert few["delta_state"] == many["delta_state"] > 0 and few["keys_values"] < many["keys_values"]
    assert len((tmp_path / "out" / "sample.txt").read_bytes()) == 16
    assert (tmp_path / "out" / "loss.png").stat().st_size > 1000


def test_bad_options_are_named(main, tmp_path, capsys):
    for option, value in (("--steps", "0"), ("--lr", "-1"), ("--top-k", "99"), ("--heads", "5")):
        with pytest.raises(SystemExit):
            main(["--out", str(tmp_path / "out"), option, value])
        assert option in capsys.readouterr().err
