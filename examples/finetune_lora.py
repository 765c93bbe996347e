"""Fine-tune a small transformers model with two LoRA adapters in one step, on the text of Python's standard library.

    python examples/finetune_lora.py --out runs/lora

Nothing is downloaded. A small byte-level Llama is trained first, on whole source files. Then two PEFT adapters learn
two kinds of text, docstrings and code without docstrings: half of each batch's rows use one adapter, half the other.
This is done twice from the same start: by gossamer, with both adapters in one forward and backward pass, and by PEFT,
with one adapter after the other. The default takes about 3 minutes on 2 CPU cores and writes to the folder ``--out``:

- ``loss.png``: training curves of both adapters in both ways, and ms per step;
- ``metrics.json``: settings, losses and times, and the bits per byte of each adapter on each text, served from one
  model;
- ``docstrings/`` and ``code/``: the adapters as saved by PEFT; ``base/``: the model.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import platform
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F

import gossamer
from gossamer.bench.studies.options import check_folders, choose_device
from gossamer.bench.studies.text import VALIDATION_EVERY, as_bytes, learning_rate, python_files, smooth

try:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from peft import LoraConfig, PeftModel, get_peft_model
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from transformers import LlamaConfig, LlamaForCausalLM
except ImportError as error:
    sys.exit(f"this example needs {error.name}: pip install 'gossamer[bench,peft]'")

from gossamer.integrations.peft import mixed_adapters

VOCABULARY = 256
TEXTS = ("docstrings", "code")
WAYS = ("gossamer", "PEFT")
COLORS = {"docstrings": "#1f6f8b", "code": "#c2571a"}


@dataclass(frozen=True)
class Settings:
    """All settings of a run."""

    layers: int
    hidden_size: int
    heads: int
    sequence: int
    batch: int
    base_steps: int
    steps: int
    rank: int
    eval_windows: int
    corpus_bytes: int
    seed: int
    base_lr: float
    lr: float
    device: str


@dataclass
class Run:
    """The results of fine-tuning in one way."""

    way: str
    bits: dict[str, list[float]] = field(default_factory=lambda: {text: [] for text in TEXTS})
    step_ms: list[float] = field(default_factory=list)

    @property
    def median_ms(self) -> float:
        """Median time of a step, without the first few."""
        return statistics.median(self.step_ms[min(3, len(self.step_ms) - 1) :])


def split_source(source: str) -> tuple[str, str]:
    """The docstrings of a file, and its code without docstrings and comments."""
    tree, docstrings = ast.parse(source), []
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        text = ast.get_docstring(node)
        if text is not None:
            docstrings.append(text + "\n\n")
            node.body = node.body[1:] or [ast.Pass()]
    return "".join(docstrings), ast.unparse(tree) + "\n"


def load_texts(root: Path, limit: int, least: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Training and validation bytes of whole files (``"files"``), of docstrings and of code, from ``limit`` bytes of
    source.

    More source is used if it does not hold ``least`` bytes of each. Files that this Python cannot parse are left out.
    """
    parts = {name: ([], []) for name in ("files", *TEXTS)}
    paths = python_files(root)
    order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(0)).tolist()
    number = total = 0
    for index in order:
        if total >= limit and all(sum(map(len, texts)) >= least for both in parts.values() for texts in both):
            break
        try:
            source = paths[index].read_text(encoding="utf-8")
            docstrings, code = split_source(source)
        except (SyntaxError, ValueError, RecursionError):
            continue
        held_out = number % VALIDATION_EVERY == VALIDATION_EVERY - 1
        for name, text in zip(("files", *TEXTS), (source, docstrings, code), strict=True):
            parts[name][held_out].append(text.encode())
        number, total = number + 1, total + len(source)
    return {name: (as_bytes(train), as_bytes(valid)) for name, (train, valid) in parts.items()}


def windows(data: torch.Tensor, starts: torch.Tensor, settings: Settings) -> torch.Tensor:
    """``(B, S+1)`` bytes from the given starts, on the device."""
    return data[starts[:, None] + torch.arange(settings.sequence + 1)].long().to(settings.device)


def draw(data: torch.Tensor, rows: int, settings: Settings, generator: torch.Generator) -> torch.Tensor:
    """Random windows."""
    return windows(data, torch.randint(data.numel() - settings.sequence, (rows,), generator=generator), settings)


def row_losses(logits: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
    """Mean loss of each row, in nats per byte."""
    return F.cross_entropy(logits.float().transpose(1, 2), batch[:, 1:], reduction="none").mean(1)


def train(
    parameters: list[torch.nn.Parameter], loss_of: Callable, steps: int, lr: float, progress: Progress, name: str
) -> list[float]:
    """Take ``steps`` steps of AdamW on the gradients that ``loss_of(step)`` leaves; return the ms of each step."""
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=0.0)
    bar, times = progress.add_task(name, total=steps, note=""), []
    for step in range(steps):
        begin = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, lr)
        optimizer.zero_grad(set_to_none=True)
        note = loss_of(step)  # reads the losses, so the device is done when the clock is read
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - begin))
        progress.update(bar, advance=1, note=note)
    if not progress.console.is_terminal:
        progress.console.print(f"{name}: {steps} steps, {note}")
    return times


def train_base(texts: dict[str, tuple[torch.Tensor, torch.Tensor]], settings: Settings, progress: Progress):
    """Train a Llama over bytes on whole files."""
    torch.manual_seed(settings.seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.hidden_size * 11 // 4,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=settings.sequence,
        bos_token_id=0,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).to(settings.device)
    generator = torch.Generator().manual_seed(settings.seed)

    def loss_of(step: int) -> str:
        batch = draw(texts["files"][0], settings.batch, settings, generator)
        loss = row_losses(model(batch[:, :-1]).logits, batch).mean()
        loss.backward()
        return f"{float(loss.detach()) / math.log(2):.3f} bits/byte"

    train(list(model.parameters()), loss_of, settings.base_steps, settings.base_lr, progress, "base")
    return model.eval()


def with_adapters(model: LlamaForCausalLM, settings: Settings) -> PeftModel:
    """The model with one adapter per text; every call draws the same adapters."""
    torch.manual_seed(settings.seed + 1)
    config = LoraConfig(r=settings.rank, lora_alpha=2 * settings.rank, target_modules="all-linear")
    wrapped = get_peft_model(model, config, adapter_name=TEXTS[0])
    wrapped.add_adapter(TEXTS[1], config)
    wrapped.base_model.set_adapter(list(TEXTS))
    return wrapped


def finetune(
    way: str, wrapped: PeftModel, texts: dict[str, tuple[torch.Tensor, torch.Tensor]], settings: Settings, progress
) -> Run:
    """Train both adapters; data order and start do not depend on ``way``."""
    run, half = Run(way), settings.batch // 2
    parameters = [p for p in wrapped.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(settings.seed + 2)
    names = [name for name in TEXTS for _ in range(half)]

    def together(batch: torch.Tensor) -> list[torch.Tensor]:
        with mixed_adapters(wrapped, names):
            losses = row_losses(wrapped(batch[:, :-1]).logits, batch).view(len(TEXTS), half).mean(1)
            losses.sum().backward()
        return list(losses)

    def in_turn(batch: torch.Tensor) -> list[torch.Tensor]:
        losses = []
        for name, rows in zip(TEXTS, batch.chunk(len(TEXTS)), strict=True):
            wrapped.set_adapter(name)
            losses.append(row_losses(wrapped(rows[:, :-1]).logits, rows).mean())
            losses[-1].backward()
        return losses

    def loss_of(step: int) -> str:
        batch = torch.cat([draw(texts[name][0], half, settings, generator) for name in TEXTS])
        losses = (together if way == "gossamer" else in_turn)(batch)
        for name, loss in zip(TEXTS, losses, strict=True):
            run.bits[name].append(float(loss.detach()) / math.log(2))
        return ", ".join(f"{name} {run.bits[name][-1]:.3f}" for name in TEXTS)

    run.step_ms = train(parameters, loss_of, settings.steps, settings.lr, progress, way)
    wrapped.base_model.set_adapter(list(TEXTS))
    return run


@torch.no_grad()
def served_bits(
    model: LlamaForCausalLM, folders: dict[str, Path], texts: dict[str, tuple[torch.Tensor, torch.Tensor]], settings
) -> dict[str, dict[str, float]]:
    """Bits per byte of held-out text, by text and by adapter: every batch mixes both adapters and none."""
    served = gossamer.serve_adapters(model, folders)
    adapters, found = [None, *folders], {}
    for text in TEXTS:
        valid = texts[text][1]
        starts = torch.linspace(0, valid.numel() - settings.sequence - 1, settings.eval_windows).long()
        sums = torch.zeros(len(adapters), dtype=torch.float64)
        for part in starts.split(max(settings.batch // len(adapters), 1)):
            batch = windows(valid, part, settings).repeat(len(adapters), 1)
            names = [name for name in adapters for _ in range(part.numel())]
            sums += row_losses(served(batch[:, :-1], adapters=names).logits, batch).view(len(adapters), -1).sum(1).cpu()
        bits = (sums / settings.eval_windows / math.log(2)).tolist()
        found[text] = {"base" if name is None else name: value for name, value in zip(adapters, bits, strict=True)}
    served.close()
    return found


def plot(runs: list[Run], valid: dict[str, dict[str, float]], path: Path) -> None:
    """Plot the curves of both adapters in both ways, and the time of a step."""
    figure, (curves, times) = plt.subplots(1, 2, figsize=(10.5, 4.6), width_ratios=[3, 1])
    for run, style in zip(runs, ({"linestyle": "-"}, {"linestyle": (0, (1, 2.5)), "linewidth": 3.2}), strict=True):
        for text in TEXTS:
            steps = range(1, len(run.bits[text]) + 1)
            curves.plot(steps, smooth(run.bits[text]), color=COLORS[text], label=f"{text}, {run.way}", **style)
    for text in TEXTS:
        curves.axhline(valid[text]["base"], color=COLORS[text], linestyle="--", linewidth=0.9)
        place = {"transform": curves.get_yaxis_transform(), "ha": "right", "va": "bottom", "color": COLORS[text]}
        curves.text(0.995, valid[text]["base"], f"{text}, held out, without adapter", fontsize=8, **place)
    curves.set(xlabel="step", ylabel="bits per byte", title="Two LoRA adapters trained in one step")
    curves.legend(frameon=False, loc="lower left", fontsize=8, ncols=2)
    curves.margins(y=0.25)
    bars = times.bar([r.way for r in runs], [r.median_ms for r in runs], color=["#1f6f8b", "0.6"], width=0.6)
    times.bar_label(bars, [f"{run.median_ms:.0f} ms" for run in runs], padding=3)
    times.set(ylabel="median ms per training step", title="Time of a step")
    times.margins(y=0.12)
    for axis in (curves, times):
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def write_metrics(
    runs: list[Run], valid: dict[str, dict[str, float]], sizes: dict[str, int], settings: Settings, path: Path
) -> None:
    """Settings, curves and times as JSON."""
    device = torch.cuda.get_device_name() if settings.device == "cuda" else settings.device
    content = {
        "settings": asdict(settings),
        "train_bytes": sizes,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "gossamer": gossamer.__version__},
        "machine": {"device": device, "processor": platform.machine(), "threads": torch.get_num_threads()},
        "runs": [
            {"way": r.way, "median_step_ms": r.median_ms, "bits_per_byte": r.bits, "step_ms": r.step_ms} for r in runs
        ],
        "held_out_bits_per_byte": valid,
    }
    path.write_text(json.dumps(content, allow_nan=False) + "\n", encoding="utf-8")


def parse_arguments(arguments: list[str] | None) -> tuple[argparse.Namespace, Settings]:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the results")
    parser.add_argument("--data", type=Path, metavar="DIR", help="use the *.py files of this folder instead")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    sizes = {
        "steps": 150, "base-steps": 300, "batch": 16, "sequence": 128, "layers": 4, "hidden-size": 160, "heads": 4,
        "rank": 16, "eval-windows": 60, "corpus-bytes": 3_000_000, "seed": 0,
    }  # fmt: skip
    rates = {"lr": 2e-3, "base-lr": 3e-3}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"default {default}")
    for name, default in rates.items():
        parser.add_argument(f"--{name}", type=float, default=default, metavar="X", help=f"default {default:g}")
    given = parser.parse_args(arguments)
    for name in sizes:
        value, least = getattr(given, name.replace("-", "_")), 0 if name == "seed" else 1
        if value < least:
            parser.error(f"--{name} must be at least {least}, got {value}")
    for name in rates:
        value = getattr(given, name.replace("-", "_"))
        if not 0 <= value < math.inf:
            parser.error(f"--{name} must be at least 0 and finite, got {value}")
    if given.hidden_size % (4 * given.heads):
        parser.error(f"--hidden-size must be a multiple of 4 times --heads, got {given.hidden_size} and {given.heads}")
    if given.batch % 2:
        parser.error(f"--batch must be even, a half for each adapter, got {given.batch}")
    if given.rank > given.hidden_size:
        parser.error(f"--rank must be at most --hidden-size, got {given.rank} and {given.hidden_size}")
    choose_device(parser, given)
    check_folders(parser, given)
    return given, Settings(**{name: getattr(given, name) for name in Settings.__dataclass_fields__})


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    given, settings = parse_arguments(arguments)
    console = Console()
    root = given.data or Path(sysconfig.get_paths()["stdlib"])
    needed = settings.sequence + 2
    texts = load_texts(root, settings.corpus_bytes, needed)
    sizes = {name: train_text.numel() for name, (train_text, _) in texts.items()}
    short = {name: min(part.numel() for part in parts) for name, parts in texts.items()}
    if min(short.values()) < needed:
        console.print(f"{root} holds too little text: {short} bytes, and {needed} of each are needed", style="red")
        return 2
    given.out.mkdir(parents=True, exist_ok=True)
    columns = (TextColumn("{task.description:>8}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=console) as progress:
        model, runs = train_base(texts, settings, progress), []
        for way in WAYS:
            wrapped = with_adapters(model, settings).train()
            if way == "gossamer":
                gossamer.replace(wrapped)
            runs.append(finetune(way, wrapped, texts, settings, progress))
            if way == "gossamer":
                wrapped.save_pretrained(given.out)
            model = wrapped.unload()
    model.eval().save_pretrained(given.out / "base")
    valid = served_bits(model, {name: given.out / name for name in TEXTS}, texts, settings)
    plot(runs, valid, given.out / "loss.png")
    write_metrics(runs, valid, sizes, settings, given.out / "metrics.json")
    for text, by_adapter in valid.items():
        console.print(
            f"{text:>10} held out: " + ", ".join(f"{n} {v:.3f}" for n, v in by_adapter.items()) + " bits/byte"
        )
    for run in runs:
        console.print(f"{run.way:>10}: {run.median_ms:.1f} ms a step of both adapters")
    console.print(f"results in {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
