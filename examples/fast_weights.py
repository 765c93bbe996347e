"""Learn letters of unseen scripts within a sequence: compares self-modifying, fast and fixed weights.

    python examples/fast_weights.py --out runs/fast            # three models, three seeds each
    python examples/fast_weights.py --out runs/fast --models srwm --seeds 1

A sequence shows letters one at a time, asks for each one's label, and then tells the label. Each sequence draws new
labels, and in its second half every letter gets another label: a model has to learn the labels that it was told, and
then to overwrite them. Letters are rendered in the twelve DejaVu faces that matplotlib ships; models train on Latin and
Greek letters, and are measured on Armenian and Georgian ones. A sequence uses one face, and shifts a letter by up to a
pixel each time. Nothing is downloaded.

The models share everything but one part of each layer, which has about as many parameters in each of them:
``gossamer.nn.SelfReferentialLinear`` (``srwm``, Irie et al., 2022), ``gossamer.nn.DeltaNet`` (``delta``) or a
feed-forward part with fixed weights (``fixed``).
The default takes some minutes on 2 CPU cores. It writes to the folder ``--out``:

- ``accuracy.png``: accuracy on unseen scripts during training, and by how often a letter has been told;
- ``metrics.json``: settings, parameters, losses and accuracies of every run.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
import unicodedata
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import gossamer
from gossamer.bench.studies.options import check_folders
from gossamer.bench.studies.text import learning_rate, smooth

try:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ft2font import FT2Font
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
except ImportError as error:
    sys.exit(f"this example needs {error.name}: pip install 'gossamer[bench]'")

MODELS = ("srwm", "delta", "fixed")
COLORS = {"srwm": "#1f6f8b", "delta": "#6a994e", "fixed": "#c2571a"}
TRAINED, HELD_OUT = ("LATIN", "GREEK"), ("ARMENIAN", "GEORGIAN")
SIDE = 16  # pixels of an image's side
# Initial weight of norms: with inputs of this scale the softmax keys of SelfReferentialLinear differ from the
# beginning.
GAIN = 3.0


@dataclass(frozen=True)
class Settings:
    """All settings of a run."""

    steps: int
    batch: int
    ways: int
    shots: int
    hidden_size: int
    heads: int
    layers: int
    lr: float
    eval_every: int
    eval_batches: int


@dataclass
class Run:
    """The results of one training run; accuracies are by half and by how often the letter's label was told before."""

    model: str
    seed: int
    parameters: int
    losses: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)
    eval_steps: list[int] = field(default_factory=list)
    accuracy: list[list[list[float]]] = field(default_factory=list)

    def learned(self, index: int = -1) -> float:
        """Mean accuracy on letters that were told at least once since their label was drawn."""
        return statistics.mean(told for half in self.accuracy[index] for told in half[1:])


def faces() -> list[FT2Font]:
    """The text faces of DejaVu."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return [FT2Font(str(path)) for path in sorted(folder.glob("DejaVu*.ttf")) if "Display" not in path.name]


def render(font: FT2Font, letter: str) -> torch.Tensor:
    """``(SIDE, SIDE)`` in [0, 1], the letter in the middle."""
    font.set_size(2 * SIDE, 48)
    font.set_text(letter)
    font.draw_glyphs_to_bitmap()
    ink = torch.from_numpy(np.array(font.get_image(), dtype=np.float32))[: 2 * SIDE, : 2 * SIDE] / 255
    rows, columns = (2 * SIDE - size for size in ink.shape)
    canvas = F.pad(ink, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
    return F.avg_pool2d(canvas[None], 2)[0]


def letters(scripts: tuple[str, ...]) -> torch.Tensor:
    """Images ``(letters, faces, SIDE · SIDE)`` of all letters of some scripts, as far as every face has them."""
    fonts = faces()
    codes = set.intersection(*(set(font.get_charmap()) for font in fonts))
    known = [chr(c) for c in sorted(codes) if unicodedata.category(chr(c)) in ("Lu", "Ll", "Lo")]
    chosen = [c for c in known if unicodedata.name(c).split()[0] in scripts]
    return torch.stack([torch.stack([render(font, c).flatten() for font in fonts]) for c in chosen])


@dataclass
class Episodes:
    """A batch of sequences of B × S letters.

    Attributes:
        images: ``(B, S, SIDE · SIDE)``.
        labels: ``(B, S)``.
        half: ``(S,)``, 0 in the first half and 1 in the second.
        told: ``(B, S)``, how often the letter's label has been told in this half.
    """

    images: torch.Tensor
    labels: torch.Tensor
    half: torch.Tensor
    told: torch.Tensor


def draw(pool: torch.Tensor, batch: int, settings: Settings, generator: torch.Generator) -> Episodes:
    """Sequences of letters from the pool in one face each; each half shows every letter ``shots`` times, mixed.

    Each time, a letter is shifted by up to a pixel in both directions.
    """
    ways, shots = settings.ways, settings.shots

    def shuffled(rows: int, size: int) -> torch.Tensor:
        return torch.rand(rows, size, generator=generator).argsort(-1)

    classes = shuffled(batch, len(pool))[:, :ways]
    first = shuffled(batch, ways)
    # Another label for every letter.
    second = (first + torch.randint(1, ways, (batch, 1), generator=generator)) % ways if ways > 1 else first
    order = torch.cat([shuffled(batch, ways * shots) for _ in range(2)], 1) % ways
    half = torch.arange(2).repeat_interleave(ways * shots)
    labels = torch.where(half == 0, first.gather(1, order), second.gather(1, order))
    seen = F.one_hot(order, ways).unflatten(1, (2, -1)).cumsum(2).flatten(1, 2)
    told = seen.gather(2, order[..., None])[..., 0] - 1
    face = torch.randint(pool.shape[1], (batch, 1), generator=generator).expand_as(order)
    images = F.pad(pool[classes.gather(1, order), face].unflatten(-1, (SIDE, SIDE)), (1, 1, 1, 1))
    down, right = (torch.randint(3, (*order.shape, 1), generator=generator) + torch.arange(SIDE) for _ in range(2))
    images = images.gather(2, down[..., None].expand(-1, -1, -1, SIDE + 2))
    images = images.gather(3, right[..., None, :].expand(-1, -1, SIDE, -1))
    return Episodes(images.flatten(2), labels, half, told)


class FixedBlock(nn.Module):
    """The residual block of SelfReferentialLinear with weights that do not change."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(hidden_size, width, bias=False), nn.Linear(width, hidden_size, bias=False)
        self.norm = nn.LayerNorm(hidden_size)
        nn.init.constant_(self.norm.weight, GAIN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(B, T, hidden)`` to the same."""
        return self.norm(x + self.down(F.gelu(self.up(x))))


class DeltaBlock(nn.Module):
    """The residual block of SelfReferentialLinear around a DeltaNet."""

    def __init__(self, hidden_size: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.delta = gossamer.nn.DeltaNet(hidden_size, heads, head_dim, conv_size=2)
        self.norm = nn.LayerNorm(hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(B, T, hidden)`` to the same."""
        return self.norm(x + self.delta(x))


def build_mixer(kind: str, hidden: int, heads: int) -> nn.Module:
    """The part of a layer that differs between models; it has about the same number of parameters in each."""
    if kind == "srwm":
        return gossamer.nn.SelfReferentialLinear(hidden, heads, rate_init=0.0)
    wanted = sum(p.numel() for p in build_mixer("srwm", hidden, heads).parameters())
    if kind == "delta":
        return DeltaBlock(hidden, heads, max(1, round(wanted / (4 * heads * hidden))))
    return FixedBlock(hidden, max(1, round(wanted / (2 * hidden))))


class Learner(nn.Module):
    """Reads images with or without labels, and scores labels."""

    def __init__(self, kind: str, settings: Settings) -> None:
        super().__init__()
        hidden = settings.hidden_size
        self.encoder = nn.Sequential(nn.Linear(SIDE * SIDE, 2 * hidden), nn.GELU(), nn.Linear(2 * hidden, hidden))
        self.label = nn.Linear(settings.ways, hidden)
        self.norm = nn.LayerNorm(hidden)
        nn.init.constant_(self.norm.weight, GAIN)
        self.layers = nn.ModuleList()
        for _ in range(settings.layers):
            self.layers += [build_mixer(kind, hidden, settings.heads), FixedBlock(hidden, 2 * hidden)]
        self.head = nn.Linear(hidden, settings.ways)

    def forward(self, episodes: Episodes) -> torch.Tensor:
        """Logits ``(B, S, ways)``: each letter is shown without its label, where it is scored, and then with it."""
        images = self.encoder(episodes.images)
        told = F.one_hot(episodes.labels, self.head.out_features).to(images.dtype)
        asked = images + self.label(torch.zeros_like(told))
        x = self.norm(torch.stack([asked, images + self.label(told)], 2).flatten(1, 2))
        for layer in self.layers:
            x = layer(x)
        return self.head(x[:, ::2])


@torch.no_grad()
def measure(model: Learner, pool: torch.Tensor, settings: Settings) -> list[list[float]]:
    """Accuracy by half and by how often the letter's label was told, on the same sequences each time."""
    generator = torch.Generator().manual_seed(1)
    right, count = torch.zeros(2, settings.shots), torch.zeros(2, settings.shots)
    for _ in range(settings.eval_batches):
        episodes = draw(pool, settings.batch, settings, generator)
        hits = (model(episodes).argmax(-1) == episodes.labels).float()
        cell = (episodes.half * settings.shots + episodes.told).flatten()
        right.view(-1).index_add_(0, cell, hits.flatten())
        count.view(-1).index_add_(0, cell, torch.ones_like(hits).flatten())
    return (right / count).tolist()


def train_one(
    kind: str, seed: int, pools: tuple[torch.Tensor, torch.Tensor], settings: Settings, progress: Progress
) -> Run:
    """Train one model from a seed; the order of the data does not depend on the model."""
    torch.manual_seed(seed)
    model = Learner(kind, settings)
    run = Run(kind, seed, sum(p.numel() for p in model.parameters()))
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed)
    bar = progress.add_task(f"{kind} {seed}", total=settings.steps, note="")
    for step in range(settings.steps):
        episodes = draw(pools[0], settings.batch, settings, generator)
        begin = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings.steps, settings.lr)
        loss = F.cross_entropy(model(episodes).flatten(0, 1), episodes.labels.flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        run.step_ms.append(1000 * (time.perf_counter() - begin))
        run.losses.append(float(loss.detach()))
        progress.advance(bar)
        if (step + 1) % settings.eval_every == 0 or step + 1 == settings.steps:
            run.eval_steps.append(step + 1)
            run.accuracy.append(measure(model, pools[1], settings))
            progress.update(bar, note=f"{run.learned():.1%}")
            if not progress.console.is_terminal:
                progress.console.print(f"{kind}, seed {seed}, step {step + 1}: {run.learned():.1%} of told letters")
    return run


def plot(runs: list[Run], settings: Settings, path: Path) -> None:
    """Plot accuracy during training, and at its end by how often labels were told; each seed is a thin line."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2))
    shots = settings.shots
    for kind in dict.fromkeys(run.model for run in runs):
        same = [run for run in runs if run.model == kind]
        for run in same:
            curve = [run.learned(i) for i in range(len(run.accuracy))]
            left.plot(run.eval_steps, curve, color=COLORS[kind], alpha=0.7, label=kind if run is same[0] else None)
            for h in range(2):
                right.plot(
                    range(h * shots, (h + 1) * shots),
                    run.accuracy[-1][h],
                    "o-",
                    color=COLORS[kind],
                    alpha=0.7,
                    label=kind if run is same[0] and h == 0 else None,
                )
    left.set(xlabel="step", ylabel="accuracy on letters told before", title="Unseen scripts, during training")
    right.set(xlabel="times told (labels change in the middle)", ylabel="accuracy", title="Unseen scripts, at the end")
    right.set_xticks(range(2 * shots), [*range(shots)] * 2)
    right.axvline(shots - 0.5, color="0.7", linewidth=0.8)
    for axis in (left, right):
        axis.axhline(1 / settings.ways, color="0.7", linewidth=0.8, linestyle="--")
        axis.set_ylim(0, 1.02)
        axis.legend(frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def parse_arguments(arguments: list[str] | None) -> tuple[argparse.Namespace, Settings]:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the results")
    parser.add_argument("--models", choices=MODELS, nargs="+", default=list(MODELS))
    sizes = {
        "seeds": 3, "steps": 2000, "batch": 16, "ways": 5, "shots": 4, "hidden-size": 64, "heads": 4, "layers": 2,
        "eval-every": 200, "eval-batches": 8,
    }  # fmt: skip
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"default {default}")
    parser.add_argument("--lr", type=float, default=3e-3, metavar="X", help="default 0.003")
    given = parser.parse_args(arguments)
    for name in sizes:
        value, least = getattr(given, name.replace("-", "_")), 2 if name in ("ways", "shots") else 1
        if value < least:
            parser.error(f"--{name} must be at least {least}, got {value}")
    if not 0 <= given.lr < math.inf:
        parser.error(f"--lr must be at least 0 and finite, got {given.lr}")
    if given.hidden_size % given.heads:
        parser.error(f"--hidden-size must be a multiple of --heads, got {given.hidden_size} and {given.heads}")
    check_folders(parser, given)
    return given, Settings(**{name: getattr(given, name) for name in Settings.__dataclass_fields__})


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    given, settings = parse_arguments(arguments)
    console = Console()
    pools = letters(TRAINED), letters(HELD_OUT)
    mean, deviation = pools[0].mean((0, 1)), pools[0].std((0, 1)) + 0.1
    pools = tuple((pool - mean) / deviation for pool in pools)
    if settings.ways > min(map(len, pools)):
        console.print(f"--ways must be at most {min(map(len, pools))}, the letters of a pool", style="red")
        return 2
    given.out.mkdir(parents=True, exist_ok=True)
    console.print(f"{len(pools[0])} letters to train on, {len(pools[1])} of other scripts to measure on")
    columns = (TextColumn("{task.description:>8}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=console) as progress:
        runs = [
            train_one(kind, seed, pools, settings, progress) for kind in given.models for seed in range(given.seeds)
        ]
    plot(runs, settings, given.out / "accuracy.png")
    content = {"settings": asdict(settings), "versions": {"torch": torch.__version__, "gossamer": gossamer.__version__}}
    content["runs"] = [asdict(run) | {"losses": smooth(run.losses)} for run in runs]
    (given.out / "metrics.json").write_text(json.dumps(content, allow_nan=False) + "\n", encoding="utf-8")
    for kind in given.models:
        same = [run for run in runs if run.model == kind]
        found = [run.learned() for run in same]
        by_half = (statistics.mean(run.accuracy[-1][h][1] for run in same) for h in range(2))
        ms = statistics.median(ms for run in same for ms in run.step_ms)
        console.print(
            f"{kind:>6}: {same[0].parameters} parameters, {statistics.mean(found):.1%} of told letters "
            f"({min(found):.1%} to {max(found):.1%}); told once {next(by_half):.1%}, once since labels changed "
            f"{next(by_half):.1%}; {ms:.0f} ms a step"
        )
    console.print(f"results in {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
