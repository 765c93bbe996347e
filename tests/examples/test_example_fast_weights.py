"""The example that learns letters of unseen scripts within a sequence."""

import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import fast_weights

    yield fast_weights
    sys.modules.pop("fast_weights")


def test_trains_every_model(example, tmp_path, monkeypatch):
    """Losses fall, and what is stored is what a run is made of; models have about as many parameters."""
    few = example.letters(("ARMENIAN",))[:20]
    monkeypatch.setattr(example, "letters", lambda scripts: few)
    options = "--seeds 1 --steps 20 --batch 8 --ways 2 --shots 2 --hidden-size 16 --heads 2 --layers 1 --eval-every 10"
    assert example.main(["--out", str(tmp_path / "out"), *options.split(), "--eval-batches", "1"]) == 0
    runs = json.loads((tmp_path / "out" / "metrics.json").read_text())["runs"]
    assert [run["model"] for run in runs] == ["srwm", "delta", "fixed"]
    parameters = [run["parameters"] for run in runs]
    assert max(parameters) < 1.05 * min(parameters)
    for run in runs:
        assert run["losses"][-1] < run["losses"][0] and run["eval_steps"] == [10, 20]
        assert all(0 <= value <= 1 for half in run["accuracy"][-1] for value in half)
    assert (tmp_path / "out" / "accuracy.png").stat().st_size > 1000


def test_episodes_ask_before_they_tell(example):
    """Each half shows every letter as often, under one label of its own that changes in between; a letter's image
    says which it is, and a model's score of a letter does not depend on that letter's own label.
    """
    pool = torch.arange(30.0).reshape(10, 3, 1).expand(10, 3, example.SIDE**2)
    settings = example.parse_arguments(["--out", "unused", "--ways", "3", "--shots", "2"])[1]
    episodes = example.draw(pool, 4, settings, torch.Generator().manual_seed(0))
    for row in range(4):
        middle = example.SIDE * (example.SIDE + 1) // 2
        letters, labels = episodes.images[row, :, middle].long() // 3, episodes.labels[row]
        halves = []
        for half in (0, 1):
            inside = episodes.half == half
            named = set(zip(letters[inside].tolist(), labels[inside].tolist(), strict=True))
            assert len(named) == 3 and {label for _, label in named} == {0, 1, 2}
            halves.append(dict(named))
            told = episodes.told[row][inside]
            for letter in halves[-1]:
                assert told[letters[inside] == letter].tolist() == [0, 1]
        assert halves[0].keys() == halves[1].keys()
        assert all(halves[0][letter] != halves[1][letter] for letter in halves[0])
    for kind in example.MODELS:
        torch.manual_seed(0)
        model = example.Learner(kind, settings)
        before = model(episodes)
        episodes.labels[:, 5] = (episodes.labels[:, 5] + 1) % 3
        after = model(episodes)
        assert torch.equal(before[:, :6], after[:, :6])
        assert torch.equal(before[:, 6:], after[:, 6:]) == (kind == "fixed")


def test_bad_options_are_named(example, tmp_path, capsys):
    for option, value in (("--steps", "0"), ("--lr", "-1"), ("--ways", "1"), ("--heads", "5")):
        with pytest.raises(SystemExit):
            example.main(["--out", str(tmp_path / "out"), option, value])
        assert option in capsys.readouterr().err
