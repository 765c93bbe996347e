"""Train a small byte-level hybrid language model on the sources of Python's standard library.

    python examples/train_hybrid_lm.py --out runs/hybrid            # hybrid, and attention in every layer beside it
    python examples/train_hybrid_lm.py --out runs/hybrid --models hybrid --layer kimi

A hybrid has linear attention by the delta rule in three layers of four and attention in the fourth; every layer's
feed-forward part is a mixture of experts. Nothing is downloaded. The default is two runs of some minutes on 2 CPU
cores. It writes to the folder ``--out``:

- ``loss.png``: training loss and validation bits per byte of each model;
- ``metrics.json``: settings, losses, ms per step, ms of the same step with the delta rule in plain torch, and what
  generation held: seconds and bytes of state after few and after many tokens;
- ``sample.txt``: what the last model wrote.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
import sysconfig
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import gossamer
from gossamer.bench.studies.text import learning_rate, load_corpus, smooth, windows
from gossamer.nn import DeltaNet, DeltaRuleState, GatedDeltaNet, KimiDeltaAttention, MoE, load_balance_loss

try:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
except ImportError as error:
    sys.exit(f"this example needs {error.name}: pip install 'gossamer[bench]'")

VOCABULARY = 256
LAYERS = {"plain": DeltaNet, "gated": GatedDeltaNet, "kimi": KimiDeltaAttention}
COLORS = {"hybrid": "#1f6f8b", "attention": "#c2571a"}
# One layer in four is attention in a hybrid.
PERIOD = 4


@dataclass(frozen=True)
class Settings:
    """Everything that shapes a run."""

    layer: str
    layers: int
    hidden_size: int
    heads: int
    intermediate_size: int
    num_experts: int
    top_k: int
    sequence: int
    batch: int
    steps: int
    lr: float
    balance_weight: float
    eval_every: int
    eval_windows: int
    seed: int


@dataclass
class Run:
    """What one training run left behind."""

    model: str
    train_bits: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)
    eval_steps: list[int] = field(default_factory=list)
    valid_bits: list[float] = field(default_factory=list)
    reference_step_ms: float | None = None
    generation: list[dict[str, float]] = field(default_factory=list)


class Attention(nn.Module):
    """Causal self-attention without positions; the delta layers around it know the order."""

    def __init__(self, hidden_size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.out = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, x: torch.Tensor, *, state: list[torch.Tensor] | None = None) -> torch.Tensor:
        """``(B, S, H)`` to ``(B, S, H)``; ``state`` holds the keys and values of earlier calls, and gets these."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if state is not None:
            if state:
                k, v = torch.cat([state[0], k], 2), torch.cat([state[1], v], 2)
            state[:] = [k, v]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] == k.shape[2])
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A token mixer and experts, each behind a norm and added to the stream."""

    def __init__(self, settings: Settings, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer_norm, self.mixer = nn.RMSNorm(settings.hidden_size), mixer
        self.moe_norm = nn.RMSNorm(settings.hidden_size)
        self.moe = MoE(
            settings.hidden_size, settings.intermediate_size, settings.num_experts, settings.top_k, renormalize=True
        )

    def forward(self, x: torch.Tensor, state: object = None) -> tuple[torch.Tensor, gossamer.nn.Routing]:
        """The stream after this block, and the routing of its experts."""
        x = x + self.mixer(self.mixer_norm(x), state=state)
        y, routing = self.moe(self.moe_norm(x), return_routing=True)
        return x + y, routing


class ByteLM(nn.Module):
    """A decoder over bytes.

    Attention alone has no order of its own, so the attention-only model also learns a vector for each position.
    """

    def __init__(self, settings: Settings, kind: str) -> None:
        super().__init__()
        hidden, heads = settings.hidden_size, settings.heads
        self.embedding = nn.Embedding(VOCABULARY, hidden)
        self.positions = nn.Embedding(settings.sequence, hidden) if kind == "attention" else None
        self.blocks = nn.ModuleList()
        for i in range(settings.layers):
            attends = kind == "attention" or i % PERIOD == PERIOD - 1
            mixer = Attention(hidden, heads) if attends else LAYERS[settings.layer](hidden, heads, hidden // heads)
            self.blocks.append(Block(settings, mixer))
        self.norm, self.head = nn.RMSNorm(hidden), nn.Linear(hidden, VOCABULARY, bias=False)
        nn.init.zeros_(self.head.weight)  # every byte is equally likely at first: 8 bits

    def initial_state(self, batch_size: int) -> list[object]:
        """What generation carries: the delta layers' states, and lists of keys and values for attention."""
        return [[] if isinstance(b.mixer, Attention) else b.mixer.initial_state(batch_size) for b in self.blocks]

    def forward(
        self, tokens: torch.Tensor, state: list[object] | None = None
    ) -> tuple[torch.Tensor, list[gossamer.nn.Routing]]:
        """Logits ``(B, S, 256)`` for bytes ``(B, S)``, and each layer's routing."""
        x = self.embedding(tokens)
        if self.positions is not None:
            x = x + self.positions.weight[: tokens.shape[1]]
        routings = []
        for block, carried in zip(self.blocks, state or itertools.repeat(None, len(self.blocks)), strict=True):
            x, routing = block(x, carried)
            routings.append(routing)
        return self.head(self.norm(x)), routings


def build_model(settings: Settings, kind: str) -> ByteLM:
    """The model of a kind from the seed."""
    torch.manual_seed(settings.seed)
    return ByteLM(settings, kind)


def loss_of(model: ByteLM, batch: torch.Tensor, settings: Settings) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean loss in nats per byte, and with the balance loss of every layer."""
    logits, routings = model(batch[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
    uneven = sum(load_balance_loss(routing) for routing in routings) / (settings.layers * settings.top_k)
    return loss, loss + settings.balance_weight * uneven


@torch.no_grad()
def validate(model: ByteLM, valid: torch.Tensor, settings: Settings) -> float:
    """Bits per byte on windows spread evenly over the validation bytes."""
    starts = torch.linspace(0, valid.numel() - settings.sequence - 1, settings.eval_windows).long()
    losses = [
        loss_of(model, windows(valid, s, settings.sequence), settings)[0] * len(s) for s in starts.split(settings.batch)
    ]
    return float(sum(losses)) / settings.eval_windows / math.log(2)


def state_bytes(state: list[object]) -> tuple[int, int]:
    """Bytes that the delta layers carry, and bytes of keys and values."""
    delta = sum(t.nbytes for part in state if isinstance(part, DeltaRuleState) for t in part)
    return delta, sum(t.nbytes for part in state if isinstance(part, list) for t in part)


@torch.no_grad()
def generate(model: ByteLM, prompt: torch.Tensor, count: int, run: Run, seed: int) -> bytes:
    """Sample bytes one at a time; the delta layers' state does not grow with them."""
    generator = torch.Generator().manual_seed(seed)
    state = model.initial_state(1)
    logits, _ = model(prompt[None], state)
    written, begin = [], time.perf_counter()
    for i in range(count):
        drawn = torch.multinomial(logits[0, -1].div(0.8).softmax(-1), 1, generator=generator)
        written.append(int(drawn))
        logits, _ = model(drawn[None], state)
        if i + 1 in (count // 8, count):
            delta, cache = state_bytes(state)
            seconds = time.perf_counter() - begin
            run.generation.append({"bytes": i + 1, "seconds": seconds, "delta_state": delta, "keys_values": cache})
    return bytes(written)


def reference_ms(kind: str, batch: torch.Tensor, settings: Settings) -> float:
    """Median ms of a training step's forward and backward pass in plain torch."""
    model, times = build_model(settings, kind), []
    with gossamer.backend("reference"):
        for _ in range(3):
            begin = time.perf_counter()
            loss_of(model, batch, settings)[1].backward()
            times.append(1000 * (time.perf_counter() - begin))
    return statistics.median(times)


def train_one(
    kind: str, train: torch.Tensor, valid: torch.Tensor, settings: Settings, progress: Progress
) -> tuple[Run, ByteLM]:
    """Train one model from the seed; the order of the data does not depend on the model."""
    model, run = build_model(settings, kind), Run(kind)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    generator = torch.Generator().manual_seed(settings.seed)
    bar = progress.add_task(kind, total=settings.steps, note="")

    def evaluate(step: int) -> None:
        run.eval_steps.append(step)
        run.valid_bits.append(validate(model, valid, settings))
        progress.update(bar, note=f"{run.valid_bits[-1]:.3f} bits/byte")
        if not progress.console.is_terminal:
            progress.console.print(f"{kind}, step {step}: {run.valid_bits[-1]:.3f} bits per byte held out")

    evaluate(0)
    for step in range(settings.steps):
        starts = torch.randint(train.numel() - settings.sequence, (settings.batch,), generator=generator)
        batch = windows(train, starts, settings.sequence)
        begin = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings.steps, settings.lr)
        loss, total = loss_of(model, batch, settings)
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        run.train_bits.append(float(loss.detach()) / math.log(2))
        run.step_ms.append(1000 * (time.perf_counter() - begin))
        progress.advance(bar)
        if (step + 1) % settings.eval_every == 0 or step + 1 == settings.steps:
            evaluate(step + 1)
    if kind == "hybrid":
        run.reference_step_ms = reference_ms(kind, batch, settings)
    return run, model


def plot_loss(runs: list[Run], path: Path) -> None:
    """Training and validation curves of every model."""
    figure, axis = plt.subplots(figsize=(7.5, 4.6))
    for run in runs:
        steps, color = range(1, len(run.train_bits) + 1), COLORS[run.model]
        axis.plot(steps, run.train_bits, color=color, alpha=0.18, linewidth=0.8)
        axis.plot(steps, smooth(run.train_bits), color=color, label=f"{run.model}: training")
        label = f"{run.model}: validation, {run.valid_bits[-1]:.3f} at the end"
        axis.plot(run.eval_steps, run.valid_bits, "o", color=color, markerfacecolor="none", label=label)
    axis.set(xlabel="step", ylabel="bits per byte", title="Byte-level hybrid language model", ylim=(0, None))
    axis.legend(frameon=False, loc="lower left")
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def parse_arguments(arguments: list[str] | None) -> tuple[argparse.Namespace, Settings]:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the results")
    parser.add_argument("--models", choices=("hybrid", "attention", "both"), default="both")
    parser.add_argument("--layer", choices=tuple(LAYERS), default="gated", help="the linear attention of a hybrid")
    parser.add_argument("--data", type=Path, metavar="DIR", help="train on the *.py files of this folder instead")
    parser.add_argument("--generate", type=int, default=256, metavar="N", help="bytes to write at the end")
    sizes = {
        "steps": 300, "batch": 8, "sequence": 256, "layers": 4, "hidden-size": 128, "heads": 2,
        "intermediate-size": 128, "num-experts": 8, "top-k": 2, "eval-every": 50, "eval-windows": 32, "seed": 0,
    }  # fmt: skip
    rates = {"lr": 3e-3, "balance-weight": 0.02}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"default {default}")
    for name, default in rates.items():
        parser.add_argument(f"--{name}", type=float, default=default, metavar="X", help=f"default {default:g}")
    given = parser.parse_args(arguments)
    for name in (*sizes, "generate"):
        value, least = getattr(given, name.replace("-", "_")), 0 if name in ("seed", "generate") else 1
        if value < least:
            parser.error(f"--{name} must be at least {least}, got {value}")
    for name in rates:
        value = getattr(given, name.replace("-", "_"))
        if not 0 <= value < math.inf:
            parser.error(f"--{name} must be at least 0 and finite, got {value}")
    if given.hidden_size % given.heads:
        parser.error(f"--hidden-size must be a multiple of --heads, got {given.hidden_size} and {given.heads}")
    if given.top_k > given.num_experts:
        parser.error(f"--top-k must be at most --num-experts, got {given.top_k} of {given.num_experts}")
    if given.data is not None and not given.data.is_dir():
        parser.error(f"--data must be a folder, got {given.data}")
    if given.out.exists() and not given.out.is_dir():
        parser.error(f"--out must be a folder, got the file {given.out}")
    return given, Settings(**{name: getattr(given, name) for name in Settings.__dataclass_fields__})


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    given, settings = parse_arguments(arguments)
    console = Console()
    root = given.data or Path(sysconfig.get_paths()["stdlib"])
    train, valid = load_corpus(root)
    needed = settings.sequence + 2
    if min(train.numel(), valid.numel()) < needed:
        console.print(
            f"{root} holds {train.numel()} training and {valid.numel()} validation bytes of *.py files; at least "
            f"{needed} of each are needed",
            style="red",
        )
        return 2
    given.out.mkdir(parents=True, exist_ok=True)
    columns = (TextColumn("{task.description:>9}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    runs: list[Run] = []
    kinds = ("attention", "hybrid") if given.models == "both" else (given.models,)
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=console) as progress:
        for kind in kinds:
            run, model = train_one(kind, train, valid, settings, progress)
            runs.append(run)
    if given.generate and kinds[-1] == "hybrid":
        written = generate(model, valid[: settings.sequence].long(), given.generate, runs[-1], settings.seed)
        (given.out / "sample.txt").write_bytes(written)
    plot_loss(runs, given.out / "loss.png")
    content = {"settings": asdict(settings), "versions": {"torch": torch.__version__, "gossamer": gossamer.__version__}}
    content["runs"] = [asdict(run) for run in runs]
    (given.out / "metrics.json").write_text(json.dumps(content, allow_nan=False) + "\n", encoding="utf-8")
    for run in runs:
        plain = (
            ""
            if run.reference_step_ms is None
            else f"; forward and backward in plain torch {run.reference_step_ms:.0f} ms"
        )
        console.print(
            f"{run.model:>9}: {run.valid_bits[-1]:.3f} bits per byte held out, {statistics.median(run.step_ms):.0f} ms "
            f"a step{plain}"
        )
    for point in runs[-1].generation:
        console.print(
            f"{point['bytes']:>9} bytes written: {point['delta_state']} bytes of delta state, {point['keys_values']} "
            "of keys and values"
        )
    console.print(f"results in {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
