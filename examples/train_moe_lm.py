"""Train a small byte-level mixture-of-experts language model on the sources of Python's standard library.

    python examples/train_moe_lm.py --out runs/moe                    # the experts are gossamer.nn.MoE
    python examples/train_moe_lm.py --out runs/moe --experts both     # and again with a loop over experts, same seed
    python examples/train_moe_lm.py --out runs/top_p --router top_p   # with another of gossamer's routers

Nothing is downloaded. The default is one run of about 3 minutes on 2 CPU cores. It writes to the folder ``--out``:

- ``loss.png``: training loss and validation bits per byte; with ``--experts both`` of both runs, and ms per step;
- ``expert_load.png``: how many slots each expert of each layer got, over training;
- ``metrics.json``: settings, losses, times, and the routing counts themselves (per step and layer);
- ``model.safetensors``: the weights, with the configuration in the file's metadata.

The validation loss has a floor to beat: the entropy of single bytes, which a model without context can reach.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import platform
import statistics
import sys
import sysconfig
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from shared import VALIDATION_EVERY, learning_rate, load_corpus, smooth, windows
from torch import nn

import gossamer
from gossamer.nn import (
    ExpertChoiceRouter,
    MoE,
    Routing,
    cluster_variance_loss,
    router_losses,
    router_z_loss,
    routing_entropy_loss,
    slot_balance_loss,
    step_routers,
    update_expert_bias,
)
from gossamer.nn.moe.routers import ROUTERS

try:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from safetensors.torch import save_file
except ImportError as error:
    sys.exit(f"this example needs {error.name}: pip install 'gossamer[bench]' safetensors")

VOCABULARY = 256
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
COLORS = {"eager": "#c2571a", "gossamer": "#1f6f8b"}
# Routers that find by themselves how many experts a token gets, so that --top-k says nothing to them.
VARYING = ("top_p", "threshold")
# Routers whose papers train them without a balance loss.
UNBALANCED = ("expert_choice", "prototype", "tree", "dselect_k", "hash", "cluster")
# Coefficients of the terms that routers bring themselves.
OWN_TERMS = {
    "tree_entropy": 0.1,
    "selector_entropy": 0.1,
    "selector_unreachable": 1e-3,
    "permutation": 1e-4,
    "domain": 0.1,
}


@dataclass(frozen=True)
class Settings:
    """Everything that shapes a run."""

    layers: int
    hidden_size: int
    heads: int
    intermediate_size: int
    num_experts: int
    top_k: int
    router: str
    sequence: int
    batch: int
    steps: int
    lr: float
    balance: str
    balance_weight: float
    entropy_weight: float
    z_weight: float
    bias_rate: float
    eval_every: int
    eval_windows: int
    seed: int
    device: str
    dtype: str


@dataclass
class Run:
    """What one training run left behind."""

    experts: str
    train_bits: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)
    eval_steps: list[int] = field(default_factory=list)
    valid_bits: list[float] = field(default_factory=list)
    counts: list[list[list[int]]] = field(default_factory=list)

    @property
    def median_ms(self) -> float:
        """Median time of a step, the first few left out."""
        return statistics.median(self.step_ms[min(3, len(self.step_ms) - 1) :])


class LoopExperts(gossamer.nn.Experts):
    """The same parameters as :class:`gossamer.nn.Experts`, computed by a loop over experts in plain torch."""

    def forward(self, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        """``y[t] = Σ_k weights[t,k] · expert_{ids[t,k]}(x[t])``."""
        tokens = x.reshape(-1, self.hidden_size)
        y = torch.zeros_like(tokens)
        for e in range(self.num_experts):
            token, slot = torch.where(routing.expert_ids == e)
            if token.numel() == 0:
                continue
            gate, up = F.linear(tokens[token], self.gate_up_proj[e]).chunk(2, dim=-1)
            out = F.linear(F.silu(gate) * up, self.down_proj[e])
            y.index_add_(0, token, (out * routing.weights[token, slot, None]).to(y.dtype))
        return y.view(x.shape)


class Attention(nn.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self, hidden_size: int, heads: int, sequence: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.out = nn.Linear(hidden_size, hidden_size, bias=False)
        half = hidden_size // heads // 2
        angles = torch.arange(sequence)[:, None] * 10000.0 ** (-torch.arange(half) / half)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """Turn each pair of channels by its position's angle."""
        first, second = x.chunk(2, dim=-1)
        cos, sin = self.cos[: x.shape[-2]].to(x.dtype), self.sin[: x.shape[-2]].to(x.dtype)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(B, S, H)`` to ``(B, S, H)``."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(self.rotate(q), self.rotate(k), v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


def router_options(settings: Settings) -> dict[str, object]:
    """What the router of this name is made with."""
    return {
        "softmax_topk": {"renormalize": True},
        "sigmoid_topk": {"renormalize": True},
        "hash": {"vocabulary": VOCABULARY},
        "domain": {"num_domains": 4},
        "cluster": {"resample_every": max(settings.steps // 10, 1)},
        "token_rounding": {"tile": 16, "router_options": {"renormalize": True}},
        "learned_permutation": {"phase_steps": max(settings.steps // 10, 1)},
    }.get(settings.router, {})


def byte_classes() -> torch.Tensor:
    """``(256,)``: whether a byte is a letter, a digit, white space or something else."""
    kinds = (str.isalpha, str.isdigit, str.isspace)
    return torch.tensor([next((k for k, test in enumerate(kinds) if test(chr(b))), 3) for b in range(VOCABULARY)])


class Block(nn.Module):
    """Attention and experts, each behind a norm and added to the stream."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(settings.hidden_size)
        self.attention = Attention(settings.hidden_size, settings.heads, settings.sequence)
        self.moe_norm = nn.RMSNorm(settings.hidden_size)
        self.moe = MoE(
            settings.hidden_size,
            settings.intermediate_size,
            settings.num_experts,
            None if settings.router in VARYING else settings.top_k,
            router=settings.router,
            **router_options(settings),
        )

    def forward(self, x: torch.Tensor, token_ids: torch.Tensor) -> tuple[torch.Tensor, Routing]:
        """The stream after this block, and the routing its experts used."""
        x = x + self.attention(self.attention_norm(x))
        y, routing = self.moe(self.moe_norm(x), token_ids=token_ids, return_routing=True)
        return x + y, routing


class ByteLM(nn.Module):
    """A decoder over bytes whose feed-forward layers are mixtures of experts."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, settings.hidden_size)
        self.blocks = nn.ModuleList(Block(settings) for _ in range(settings.layers))
        self.norm = nn.RMSNorm(settings.hidden_size)
        self.head = nn.Linear(settings.hidden_size, VOCABULARY, bias=False)
        # Every byte is equally likely at first: 8 bits.
        nn.init.zeros_(self.head.weight)
        self.register_buffer("classes", byte_classes() if settings.router == "domain" else None, persistent=False)

    def train(self, mode: bool = True) -> ByteLM:
        """As of any module; experts do not choose among bytes to come where the model is judged."""
        for block in self.blocks:
            if isinstance(block.moe.router, ExpertChoiceRouter):
                block.moe.router.causal = not mode
        return super().train(mode)

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, list[Routing]]:
        """Logits ``(B, S, 256)`` for bytes ``(B, S)``, and each layer's routing."""
        x = self.embedding(tokens)
        token_ids = tokens if self.classes is None else self.classes[tokens]
        routings = []
        for block in self.blocks:
            x, routing = block(x, token_ids)
            routings.append(routing)
        return self.head(self.norm(x)), routings


def build_model(settings: Settings, experts: str) -> ByteLM:
    """The model; its weights depend on the seed alone, not on how the experts are computed."""
    torch.manual_seed(settings.seed)
    model = ByteLM(settings)
    if experts == "eager":
        for block in model.blocks:
            loop = LoopExperts(settings.num_experts, settings.hidden_size, settings.intermediate_size)
            loop.load_state_dict(block.moe.experts.state_dict())
            block.moe.experts = loop
    return model.to(settings.device)


def router_terms(routings: list[Routing], model: ByteLM, settings: Settings) -> torch.Tensor:
    """What is added to the loss for the routers, layer by layer.

    Given all layers at once, one layer's idle experts would make up for another's.
    """
    total = torch.zeros((), device=settings.device)
    for block, routing in zip(model.blocks, routings, strict=True):
        for name, term in router_losses(routing).items():
            total = total + OWN_TERMS[name] * term
        if settings.router == "cluster":
            router = block.moe.router
            spread = cluster_variance_loss(routing, router.num_clusters, survivors=router.survivors)
            total = total + settings.balance_weight * spread
        elif settings.balance == "loss" and settings.router not in UNBALANCED:
            total = total + settings.balance_weight * slot_balance_loss(routing)
        if settings.router in VARYING:
            total = total + settings.entropy_weight * routing_entropy_loss(routing)
        if settings.balance == "loss" and routing.logits is not None:
            total = total + settings.z_weight * router_z_loss(routing)
    return total / settings.layers


def after_step(routings: list[Routing], model: ByteLM, settings: Settings) -> torch.Tensor:
    """The steps that routers take beside the optimizer's; returns each layer's counts."""
    step_routers(model)
    counts = torch.stack([routing.counts for routing in routings])
    for block, routing, layer_counts in zip(model.blocks, routings, counts, strict=True):
        if settings.balance == "bias":
            update_expert_bias(block.moe.router.e_score_correction_bias, layer_counts, settings.bias_rate)
        if isinstance(block.moe.router, ExpertChoiceRouter):
            block.moe.router.update_thresholds(routing, momentum=0.9)
    return counts


def unigram_bits(train: torch.Tensor, valid: torch.Tensor) -> float:
    """Bits per byte of ``valid`` under the byte frequencies of ``train``."""
    frequency = torch.bincount(train.int(), minlength=VOCABULARY).double() + 1
    bits = -(frequency / frequency.sum()).log2()
    return float((torch.bincount(valid.int(), minlength=VOCABULARY).double() @ bits) / valid.numel())


def autocast(settings: Settings) -> torch.autocast | nullcontext:
    """Products in the chosen dtype; weights and optimizer stay in float32."""
    dtype = DTYPES[settings.dtype]
    return nullcontext() if dtype == torch.float32 else torch.autocast(torch.device(settings.device).type, dtype)


def cross_entropy(model: ByteLM, batch: torch.Tensor, settings: Settings) -> tuple[torch.Tensor, list[Routing]]:
    """Mean loss in nats per byte, and each layer's routing."""
    with autocast(settings):
        logits, routings = model(batch[:, :-1])
    return F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten()), routings


@torch.no_grad()
def validate(model: ByteLM, valid: torch.Tensor, settings: Settings) -> float:
    """Bits per byte on windows spread evenly over the validation bytes."""
    model.eval()
    starts = torch.linspace(0, valid.numel() - settings.sequence - 1, settings.eval_windows).long()
    losses = [
        cross_entropy(model, windows(valid, part, settings.sequence).to(settings.device), settings)[0] * part.numel()
        for part in starts.split(settings.batch)
    ]
    model.train()
    return float(sum(losses)) / settings.eval_windows / math.log(2)


def train_one(
    experts: str, train: torch.Tensor, valid: torch.Tensor, settings: Settings, progress: Progress
) -> tuple[Run, ByteLM]:
    """Train one model from the seed; data order and weights do not depend on ``experts``."""
    model, run = build_model(settings, experts), Run(experts)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    generator = torch.Generator().manual_seed(settings.seed)
    bar = progress.add_task(experts, total=settings.steps, note="")

    def evaluate(step: int) -> None:
        run.eval_steps.append(step)
        run.valid_bits.append(validate(model, valid, settings))
        progress.update(bar, note=f"{run.valid_bits[-1]:.3f} bits/byte")
        if not progress.console.is_terminal:
            progress.console.print(f"{experts}, step {step}: {run.valid_bits[-1]:.3f} bits per byte held out")

    evaluate(0)
    for step in range(settings.steps):
        starts = torch.randint(train.numel() - settings.sequence, (settings.batch,), generator=generator)
        batch = windows(train, starts, settings.sequence).to(settings.device)
        begin = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings.steps, settings.lr)
        loss, routings = cross_entropy(model, batch, settings)
        total = loss + router_terms(routings, model, settings)
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        counts = after_step(routings, model, settings)
        # Reading the loss waits for the device, so the step has really ended.
        run.train_bits.append(float(loss.detach()) / math.log(2))
        run.step_ms.append(1000 * (time.perf_counter() - begin))
        run.counts.append(counts.tolist())
        progress.advance(bar)
        if (step + 1) % settings.eval_every == 0 or step + 1 == settings.steps:
            evaluate(step + 1)
    return run, model


def plot_loss(runs: list[Run], unigram: float, path: Path) -> None:
    """Loss curves, and beside them the time of a step when there is something to compare."""
    both = len(runs) > 1
    size = {"figsize": (10.5, 4.6), "width_ratios": [3, 1]} if both else {"figsize": (7.5, 4.6)}
    figure, axes = plt.subplots(1, 1 + both, squeeze=False, **size)
    curve = axes[0, 0]
    for run, line, marker in zip(runs, ("-", "--"), ("o", "x"), strict=False):
        steps, color = range(1, len(run.train_bits) + 1), COLORS[run.experts]
        curve.plot(steps, run.train_bits, color=color, alpha=0.18, linewidth=0.8)
        curve.plot(steps, smooth(run.train_bits), line, color=color, label=f"{run.experts}: training")
        label = f"{run.experts}: validation, {run.valid_bits[-1]:.3f} at the end"
        curve.plot(
            run.eval_steps, run.valid_bits, marker, color=color, markersize=7, markerfacecolor="none", label=label
        )
    curve.axhline(unigram, color="0.4", linestyle=":", linewidth=1.2)
    place = {"transform": curve.get_yaxis_transform(), "ha": "right", "va": "bottom"}
    curve.text(0.995, unigram, f"single bytes without context: {unigram:.2f}", color="0.3", **place)
    curve.set(xlabel="step", ylabel="bits per byte", title="Byte-level MoE language model", ylim=(0, None))
    curve.legend(frameon=False, loc="lower left")
    if both:
        names = [run.experts for run in runs]
        bars = axes[0, 1].bar(names, [r.median_ms for r in runs], color=[COLORS[n] for n in names], width=0.6)
        axes[0, 1].bar_label(bars, [f"{r.median_ms:.0f} ms" for r in runs], padding=3)
        axes[0, 1].set(ylabel="median ms per training step", title="Time of a whole step")
        axes[0, 1].margins(y=0.12)
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def experts_per_token(run: Run, settings: Settings) -> float:
    """The mean over layers in the last tenth of training."""
    last = torch.tensor(run.counts[-max(len(run.counts) // 10, 1) :], dtype=torch.float64)
    return float(last.sum(2).mean()) / (settings.batch * settings.sequence)


def plot_load(run: Run, settings: Settings, path: Path) -> None:
    """One heat map a layer: experts against training steps, colour the load over its even share."""
    counts = torch.tensor(run.counts, dtype=torch.float64)
    columns = min(120, settings.steps)
    edges = torch.linspace(0, settings.steps, columns + 1).round().long().tolist()
    share = torch.stack([counts[a:b].sum(0) / counts[a:b].sum((0, 2))[:, None] for a, b in itertools.pairwise(edges)])
    load = (share * settings.num_experts).clamp(min=1 / 8).log2()
    size = (8.5, 1.0 + 1.5 * settings.layers)
    figure, axes = plt.subplots(settings.layers, 1, figsize=size, sharex=True, squeeze=False, layout="constrained")
    style = {"cmap": "RdBu_r", "vmin": -3, "vmax": 3, "aspect": "auto", "interpolation": "nearest"}
    extent = (0, settings.steps, settings.num_experts - 0.5, -0.5)
    for layer, axis in enumerate(axes[:, 0]):
        image = axis.imshow(load[:, layer].T, extent=extent, **style)
        axis.set_ylabel(f"layer {layer}\nexpert")
        axis.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5, integer=True))
    axes[0, 0].set_title(
        f"Load of each expert over training ({settings.num_experts} experts, "
        f"{experts_per_token(run, settings):.2g} per token, {settings.router})"
    )
    axes[-1, 0].set_xlabel("step")
    bar = figure.colorbar(image, ax=axes[:, 0].tolist(), ticks=range(-3, 4), label="load / even share")
    bar.ax.set_yticklabels(["≤ 1/8", "1/4", "1/2", "1", "2", "4", "≥ 8"])
    figure.savefig(path, dpi=150)
    plt.close(figure)


def write_metrics(runs: list[Run], settings: Settings, corpus: dict[str, object], path: Path) -> None:
    """Settings, curves and routing counts as JSON."""
    machine = {"device": settings.device, "processor": platform.machine(), "threads": torch.get_num_threads()}
    if settings.device == "cuda":
        machine["device"] = torch.cuda.get_device_name()
    content = {
        "settings": asdict(settings),
        "corpus": corpus,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "gossamer": gossamer.__version__},
        "machine": machine,
        "runs": [
            {
                "experts": run.experts,
                "median_step_ms": run.median_ms,
                "final_valid_bits_per_byte": run.valid_bits[-1],
                "train_bits_per_byte": run.train_bits,
                "step_ms": run.step_ms,
                "eval_steps": run.eval_steps,
                "valid_bits_per_byte": run.valid_bits,
            }
            for run in runs
        ],
        "routing": {
            "experts": runs[-1].experts,
            "tokens_per_step": settings.batch * settings.sequence,
            "router": settings.router,
            "top_k": settings.top_k,
            "experts_per_token": experts_per_token(runs[-1], settings),
            "num_experts": settings.num_experts,
            "counts_step_layer_expert": runs[-1].counts,
        },
    }
    path.write_text(json.dumps(content, allow_nan=False) + "\n", encoding="utf-8")


def parse_arguments(arguments: list[str] | None) -> tuple[argparse.Namespace, Settings]:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for the results, made if missing"
    )
    parser.add_argument("--experts", choices=("eager", "gossamer", "both"), default="gossamer")
    parser.add_argument("--data", type=Path, metavar="DIR", help="train on the *.py files of this folder instead")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32", help="of the products, under autocast")
    parser.add_argument(
        "--router",
        choices=sorted(ROUTERS),
        help="softmax_topk, or sigmoid_topk with --balance bias; hash goes by bytes, domain by their kind",
    )
    parser.add_argument("--balance", choices=("loss", "bias"), default="loss", help="auxiliary loss, or a moving bias")
    sizes = {
        "steps": 500, "batch": 16, "sequence": 256, "layers": 4, "hidden-size": 128, "heads": 4,
        "intermediate-size": 128, "num-experts": 16, "top-k": 2, "eval-every": 50, "eval-windows": 64, "seed": 0,
    }  # fmt: skip
    rates = {"lr": 3e-3, "balance-weight": 0.02, "entropy-weight": 1e-2, "z-weight": 1e-3, "bias-rate": 1e-3}
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
    if given.top_k > given.num_experts:
        parser.error(f"--top-k must be at most --num-experts, got {given.top_k} of {given.num_experts}")
    if given.router is None:
        given.router = "softmax_topk" if given.balance == "loss" else "sigmoid_topk"
    if given.balance == "bias" and given.router != "sigmoid_topk":
        parser.error(f"--balance bias needs --router sigmoid_topk, got {given.router}")
    if given.hidden_size % (2 * given.heads):
        parser.error(f"--hidden-size must be a multiple of twice --heads, got {given.hidden_size} and {given.heads}")
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device")
    if given.device == "auto":
        given.device = "cuda" if torch.cuda.is_available() else "cpu"
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
            f"{root} holds {train.numel()} training and {valid.numel()} validation bytes of *.py files (each "
            f"{VALIDATION_EVERY}th file is held out); at least {needed} of each are needed",
            style="red",
        )
        return 2
    given.out.mkdir(parents=True, exist_ok=True)
    unigram = unigram_bits(train, valid)
    console.print(
        f"{train.numel() / 1e6:.1f} MB to train on, {valid.numel() / 1e6:.1f} MB held out; bytes without context need "
        f"{unigram:.3f} bits each"
    )
    columns = (TextColumn("{task.description:>8}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    runs: list[Run] = []
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=console) as progress:
        for experts in ("eager", "gossamer") if given.experts == "both" else (given.experts,):
            run, model = train_one(experts, train, valid, settings, progress)
            runs.append(run)
    plot_loss(runs, unigram, given.out / "loss.png")
    plot_load(runs[-1], settings, given.out / "expert_load.png")
    corpus = {"train_bytes": train.numel(), "valid_bytes": valid.numel(), "unigram_bits_per_byte": unigram}
    write_metrics(runs, settings, corpus, given.out / "metrics.json")
    weights = {name: tensor.contiguous().cpu() for name, tensor in model.state_dict().items()}
    save_file(weights, given.out / "model.safetensors", metadata={"settings": json.dumps(asdict(settings))})
    for run in runs:
        console.print(
            f"{run.experts:>8}: {run.valid_bits[-1]:.3f} bits per byte held out, {run.median_ms:.1f} ms a step"
        )
    console.print(f"results in {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
