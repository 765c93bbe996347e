"""Train a small byte-level mixture-of-experts language model on the sources of Python's standard library.

    python examples/train_moe_lm.py --out runs/moe                    # the experts are gossamer.nn.MoE
    python examples/train_moe_lm.py --out runs/moe --experts both     # and again with a loop over experts, same seed
    python examples/train_moe_lm.py --out runs/moe --router top_p --experts latent      # any router, any expert layer
    torchrun --nproc-per-node 2 examples/train_moe_lm.py --out runs/moe --expert-parallel     # experts over processes

Nothing is downloaded. The default is one run of about 3 minutes on 2 CPU cores. It writes to the folder ``--out``:

- ``loss.png``: training loss and validation bits per byte; with ``--experts both``, of both runs, with ms per step;
- ``expert_load.png``: the number of slots of each expert of each layer, over training;
- ``metrics.json``: settings, losses, times, and the routing counts themselves (per step and layer);
- ``model.safetensors``: the weights, with the configuration in the file's metadata.

With ``--expert-parallel``, each process has a part of every layer's experts and of the batch, and the loss curve is
that of a single process on the whole batch. The first process reports and writes; ``metrics.json`` has the bytes that
it sent and the time that it waited, by part of the exchange.

The validation loss has a floor to beat: the entropy of single bytes, which a model without context can reach.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import platform
import statistics
import sys
import sysconfig
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import gossamer
import gossamer.parallel
from gossamer.bench.studies.byte_lm import (
    EXPERT_LAYERS,
    VOCABULARY,
    Balance,
    ByteLM,
    Sizes,
    after_step,
    balance_terms,
    counts_of,
    cross_entropy,
    recipe_of,
    validate,
)
from gossamer.bench.studies.options import check_folders, choose_device
from gossamer.bench.studies.text import VALIDATION_EVERY, learning_rate, load_corpus, smooth, windows
from gossamer.nn import Routing
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

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
EAGER, OURS = "#c2571a", "#1f6f8b"
# More experts than these are counted by the rows of their square, as product keys arrange them.
COUNTED = 256


@dataclass(frozen=True)
class Settings:
    """All settings of a run."""

    layers: int
    hidden_size: int
    heads: int
    intermediate_size: int
    num_experts: int
    top_k: int
    sequence: int
    router: str
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

    @property
    def sizes(self) -> Sizes:
        """The sizes of the model."""
        return Sizes(**{name: getattr(self, name) for name in Sizes.__dataclass_fields__})

    @property
    def terms(self) -> Balance:
        """The coefficients of the terms added to the loss, and of the moving bias."""
        by_loss = self.balance == "loss"
        return Balance(
            self.balance_weight, self.z_weight * by_loss, self.entropy_weight, 0.0 if by_loss else self.bias_rate
        )


@dataclass
class Run:
    """The results of one training run."""

    experts: str
    train_bits: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)
    eval_steps: list[int] = field(default_factory=list)
    valid_bits: list[float] = field(default_factory=list)
    counts: list[list[list[int]]] = field(default_factory=list)
    exchange: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def median_ms(self) -> float:
        """Median time of a step, without the first few."""
        return statistics.median(self.step_ms[min(3, len(self.step_ms) - 1) :])


@dataclass(frozen=True)
class Ranks:
    """The processes that train together; one by default."""

    group: dist.ProcessGroup | None = None
    rank: int = 0
    size: int = 1

    @staticmethod
    def join(device: str) -> Ranks:
        """Connect to the other processes that torchrun started."""
        if device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
        return Ranks(dist.group.WORLD, dist.get_rank(), dist.get_world_size())

    def share(self, model: ByteLM) -> nn.Module:
        """Divide the model's experts in place and replicate the rest; return the module to train."""
        if self.group is None:
            return model
        device = next(model.parameters()).device.type
        gossamer.parallel.shard_experts(model, init_device_mesh(device, (self.size,), mesh_dim_names=("expert",)))
        return nn.parallel.DistributedDataParallel(model)

    def own(self, starts: torch.Tensor) -> torch.Tensor:
        """The windows of the batch for this process."""
        return starts.chunk(self.size)[self.rank]

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over the processes."""
        if self.group is not None:
            dist.all_reduce(tensor, group=self.group)
        return tensor


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


def build_model(settings: Settings, experts: str) -> ByteLM:
    """The model; its weights depend only on the seed, not on whether a loop computes the plain experts."""
    torch.manual_seed(settings.seed)
    plain = experts in ("eager", "gossamer")
    model = ByteLM(settings.sizes, settings.router, "grouped" if plain else experts, steps=settings.steps)
    if experts == "eager":
        for block in model.blocks:
            loop = LoopExperts(settings.num_experts, settings.hidden_size, settings.intermediate_size)
            loop.load_state_dict(block.moe.experts.state_dict())
            block.moe.experts = loop
    return model.to(settings.device)


def unigram_bits(train: torch.Tensor, valid: torch.Tensor) -> float:
    """Bits per byte of ``valid`` under the byte frequencies of ``train``."""
    frequency = torch.bincount(train.int(), minlength=VOCABULARY).double() + 1
    bits = -(frequency / frequency.sum()).log2()
    return float((torch.bincount(valid.int(), minlength=VOCABULARY).double() @ bits) / valid.numel())


def autocast(settings: Settings) -> torch.autocast | nullcontext:
    """Products in the chosen dtype; weights and optimizer stay in float32."""
    dtype = DTYPES[settings.dtype]
    return nullcontext() if dtype == torch.float32 else torch.autocast(torch.device(settings.device).type, dtype)


def slots_of(routing: Routing) -> torch.Tensor:
    """The number of slots of each expert, or of each row of experts if there are many."""
    counts = counts_of(routing)
    side = math.isqrt(counts.numel())
    return counts.view(side, side).sum(1) if counts.numel() > COUNTED and side * side == counts.numel() else counts


def train_one(
    experts: str, train: torch.Tensor, valid: torch.Tensor, settings: Settings, progress: Progress, ranks: Ranks
) -> tuple[Run, ByteLM]:
    """Train one model from the seed; data order and weights do not depend on ``experts`` or the number of processes."""
    model, run, recipe = build_model(settings, experts), Run(experts), recipe_of(settings.router)
    trained = ranks.share(model)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    generator = torch.Generator().manual_seed(settings.seed)
    bar = progress.add_task(experts, total=settings.steps, note="")

    def evaluate(step: int) -> None:
        run.eval_steps.append(step)
        with autocast(settings):
            bits = validate(model, valid, settings.eval_windows, settings.batch, settings.device, ranks.group)
        run.valid_bits.append(bits)
        progress.update(bar, note=f"{run.valid_bits[-1]:.3f} bits/byte")
        if not progress.console.is_terminal:
            progress.console.print(f"{experts}, step {step}: {run.valid_bits[-1]:.3f} bits per byte held out")

    evaluate(0)
    traffic = gossamer.parallel.Traffic()
    for step in range(settings.steps):
        starts = torch.randint(train.numel() - settings.sequence, (settings.batch,), generator=generator)
        batch = windows(train, ranks.own(starts), settings.sequence).to(settings.device)
        begin = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings.steps, settings.lr)
        with gossamer.parallel.count_traffic() as sent:
            with autocast(settings):
                loss, routings = cross_entropy(trained, batch)
            total = loss + balance_terms(model, routings, recipe, settings.terms, ranks.group)
            optimizer.zero_grad(set_to_none=True)
            total.backward()
        gossamer.parallel.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        after_step(model, routings, settings.terms, ranks.group)
        counts = ranks.total(torch.stack([slots_of(routing) for routing in routings]))
        # Reading the loss waits for the device, so the step has ended.
        run.train_bits.append(float(ranks.total(loss.detach().clone())) / ranks.size / math.log(2))
        run.step_ms.append(1000 * (time.perf_counter() - begin))
        run.counts.append(counts.tolist())
        for label, flow in sent.flows.items():
            traffic.add(label, **asdict(flow))
        progress.advance(bar)
        if (step + 1) % settings.eval_every == 0 or step + 1 == settings.steps:
            evaluate(step + 1)
    run.exchange = {
        label: {"bytes_per_step": flow.nbytes / settings.steps, "ms_per_step": 1000 * flow.seconds / settings.steps}
        for label, flow in traffic.flows.items()
    }
    if ranks.group is not None:
        gossamer.parallel.gather_experts(model)
    return run, model


def plot_loss(runs: list[Run], unigram: float, path: Path) -> None:
    """Plot the loss curves, and the time of a step beside them if there are two runs to compare."""
    both = len(runs) > 1
    size = {"figsize": (10.5, 4.6), "width_ratios": [3, 1]} if both else {"figsize": (7.5, 4.6)}
    figure, axes = plt.subplots(1, 1 + both, squeeze=False, **size)
    curve = axes[0, 0]
    for run, line, marker in zip(runs, ("-", "--"), ("o", "x"), strict=False):
        steps, color = range(1, len(run.train_bits) + 1), EAGER if run.experts == "eager" else OURS
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
        bars = axes[0, 1].bar(names, [r.median_ms for r in runs], color=(EAGER, OURS), width=0.6)
        axes[0, 1].bar_label(bars, [f"{r.median_ms:.0f} ms" for r in runs], padding=3)
        axes[0, 1].set(ylabel="median ms per training step", title="Time of a whole step")
        axes[0, 1].margins(y=0.12)
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def experts_per_token(run: Run, settings: Settings) -> float:
    """The mean number of experts per token over layers, in the last tenth of training."""
    last = torch.tensor(run.counts[-max(len(run.counts) // 10, 1) :], dtype=torch.float64)
    return float(last.sum(2).mean()) / (settings.batch * settings.sequence)


def plot_load(run: Run, settings: Settings, path: Path) -> None:
    """Plot a heat map per layer: experts against training steps, with the load over its even share as colour."""
    counts = torch.tensor(run.counts, dtype=torch.float64)
    columns = min(120, settings.steps)
    edges = torch.linspace(0, settings.steps, columns + 1).round().long().tolist()
    share = torch.stack([counts[a:b].sum(0) / counts[a:b].sum((0, 2))[:, None] for a, b in itertools.pairwise(edges)])
    _, layers, num_experts = counts.shape
    load = (share * num_experts).clamp(min=1 / 8).log2()
    size = (8.5, 1.0 + 1.5 * layers)
    figure, axes = plt.subplots(layers, 1, figsize=size, sharex=True, squeeze=False, layout="constrained")
    style = {"cmap": "RdBu_r", "vmin": -3, "vmax": 3, "aspect": "auto", "interpolation": "nearest"}
    extent = (0, settings.steps, num_experts - 0.5, -0.5)
    for layer, axis in enumerate(axes[:, 0]):
        image = axis.imshow(load[:, layer].T, extent=extent, **style)
        axis.set_ylabel(f"layer {layer}\nexpert")
        axis.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5, integer=True))
    axes[0, 0].set_title(
        f"Load of each expert over training ({num_experts} experts, "
        f"{experts_per_token(run, settings):.2g} per token, {settings.router})"
    )
    axes[-1, 0].set_xlabel("step")
    bar = figure.colorbar(image, ax=axes[:, 0].tolist(), ticks=range(-3, 4), label="load / even share")
    bar.ax.set_yticklabels(["≤ 1/8", "1/4", "1/2", "1", "2", "4", "≥ 8"])
    figure.savefig(path, dpi=150)
    plt.close(figure)


def write_metrics(runs: list[Run], settings: Settings, corpus: dict[str, object], path: Path, ranks: int) -> None:
    """Settings, curves and routing counts as JSON."""
    machine = {"device": settings.device, "processor": platform.machine(), "threads": torch.get_num_threads()}
    machine["processes"] = ranks
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
                "exchange": run.exchange,
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
    layers = [name for name in EXPERT_LAYERS if name != "grouped"]
    parser.add_argument(
        "--experts",
        choices=("eager", "gossamer", "both", *layers),
        default="gossamer",
        help="plain experts by a loop, by gossamer or both, or another expert layer with as many parameters",
    )
    parser.add_argument(
        "--router",
        choices=sorted(ROUTERS),
        help="softmax_topk, or sigmoid_topk with --balance bias; hash goes by bytes, domain by their kind",
    )
    parser.add_argument(
        "--expert-parallel",
        action="store_true",
        help="experts and batch divided among torchrun's processes",
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="train on the *.py files of this folder instead")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32", help="of the products, under autocast")
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
    if given.hidden_size % (2 * given.heads):
        parser.error(f"--hidden-size must be a multiple of twice --heads, got {given.hidden_size} and {given.heads}")
    if given.router is None:
        given.router = "softmax_topk" if given.balance == "loss" else "sigmoid_topk"
    if given.balance == "bias" and given.router != "sigmoid_topk":
        parser.error(f"--balance bias needs --router sigmoid_topk, got {given.router}")
    if given.expert_parallel:
        world = int(os.environ.get("WORLD_SIZE", "0"))
        if "RANK" not in os.environ:
            parser.error("--expert-parallel needs processes: torchrun --nproc-per-node N examples/train_moe_lm.py ...")
        if given.experts in ("eager", "both", "product_key"):
            parser.error(f"--expert-parallel needs experts that processes can divide, got {given.experts}")
        for name in ("batch", "eval_windows"):
            if (value := getattr(given, name)) % world:
                parser.error(f"--{name.replace('_', '-')} must be a multiple of {world} processes, got {value}")
    choose_device(parser, given)
    check_folders(parser, given)
    return given, Settings(**{name: getattr(given, name) for name in Settings.__dataclass_fields__})


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    given, settings = parse_arguments(arguments)
    root = given.data or Path(sysconfig.get_paths()["stdlib"])
    train, valid = load_corpus(root)
    ranks = Ranks.join(settings.device) if given.expert_parallel else Ranks()
    # One process prints and writes for all.
    console = Console(quiet=ranks.rank > 0)
    status = run_all(given, settings, root, train, valid, console, ranks)
    if ranks.group is not None:
        gossamer.parallel.shutdown()
    return status


def run_all(
    given: argparse.Namespace,
    settings: Settings,
    root: Path,
    train: torch.Tensor,
    valid: torch.Tensor,
    console: Console,
    ranks: Ranks,
) -> int:
    """Train the requested models and write the results; return the exit status."""
    needed = settings.sequence + 2
    if min(train.numel(), valid.numel()) < needed:
        console.print(
            f"{root} holds {train.numel()} training and {valid.numel()} validation bytes of *.py files (each "
            f"{VALIDATION_EVERY}th file is held out); at least {needed} of each are needed",
            style="red",
        )
        return 2
    if ranks.rank == 0:
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
            run, model = train_one(experts, train, valid, settings, progress, ranks)
            runs.append(run)
    if ranks.rank > 0:
        return 0
    plot_loss(runs, unigram, given.out / "loss.png")
    plot_load(runs[-1], settings, given.out / "expert_load.png")
    corpus = {"train_bytes": train.numel(), "valid_bytes": valid.numel(), "unigram_bits_per_byte": unigram}
    write_metrics(runs, settings, corpus, given.out / "metrics.json", ranks.size)
    weights = {name: tensor.contiguous().cpu() for name, tensor in model.state_dict().items()}
    save_file(weights, given.out / "model.safetensors", metadata={"settings": json.dumps(asdict(settings))})
    for run in runs:
        console.print(
            f"{run.experts:>8}: {run.valid_bits[-1]:.3f} bits per byte held out, {run.median_ms:.1f} ms a step"
        )
        for label, flow in run.exchange.items():
            console.print(
                f"{label}: {flow['bytes_per_step'] / 1e3:.1f} kB sent a step, {flow['ms_per_step']:.1f} ms of waiting"
            )
    console.print(f"results in {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
