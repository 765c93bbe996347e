"""Routers and expert layers in one small language model, at equal training FLOPs and equal parameters."""

from __future__ import annotations

import functools
import statistics
import sysconfig
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from gossamer.bench.harness.study import Case, Metric, Outcome, Report, Study, Unfit
from gossamer.bench.studies.byte_lm import (
    EXPERT_LAYERS,
    FORWARD_AND_BACKWARD,
    OWN_ROUTERS,
    Balance,
    ByteLM,
    Recipe,
    Sizes,
    after_step,
    balance_terms,
    counts_of,
    cross_entropy,
    forward_flops,
    live,
    recipe_of,
    router_names,
    validate,
)
from gossamer.bench.studies.text import learning_rate, load_corpus, windows

ROUTERS, EXPERTS = "routers", "expert layers"
PLAIN = "softmax_topk"


@dataclass(frozen=True)
class Settings:
    """The amount of work.

    Attributes:
        sizes: sizes of the model.
        batch: windows per step.
        steps: steps of the baseline; every case may spend as many FLOPs.
        lr: peak of the learning rate.
        looks: validations per run, spread evenly over its FLOPs.
        eval_windows: windows per validation.
        balance: coefficients of terms added to the loss.
    """

    sizes: Sizes
    batch: int
    steps: int
    lr: float = 3e-3
    looks: int = 6
    eval_windows: int = 64
    balance: Balance = field(default_factory=Balance)


def cases() -> list[Case]:
    """Every router over plain experts, then every expert layer under the plain router."""
    found = [Case(name, ROUTERS, recipe_of(name).note) for name in router_names()]
    notes = {
        "latent": "a latent of size H/2; I is chosen for an equal number of parameters",
        "basis": "E/4 bases; I is chosen for an equal number of parameters; each step computes the matrices from the "
        "bases",
        "cartesian": "two sub-layers of E experts each, with an intermediate size of about I/2",
        "product_key": "experts are single neurons found by product keys, as many as the number of parameters allows",
    }
    found += [Case(name, EXPERTS, notes[name]) for name in EXPERT_LAYERS if name in notes]
    return found


@functools.cache
def corpus() -> tuple[torch.Tensor, torch.Tensor]:
    """Training and validation bytes: the Python files of the standard library."""
    return load_corpus(Path(sysconfig.get_paths()["stdlib"]))


@functools.cache
def budget(settings: Settings) -> float:
    """The training FLOPs of the plain model's steps, with K experts per token."""
    sizes = settings.sizes
    model = ByteLM(sizes)
    with torch.no_grad():
        _, routings = model(torch.zeros(1, sizes.sequence, dtype=torch.int64))
    return FORWARD_AND_BACKWARD * settings.steps * settings.batch * forward_flops(model, routings, sizes.sequence)


def build(name: str, settings: Settings) -> tuple[ByteLM, Recipe]:
    """The model of a case, and how its router is balanced.

    Raises:
        Unfit: the router or layer does not take these sizes.
    """
    is_router = name in router_names()
    router, experts = (name, "grouped") if is_router else (PLAIN, name)
    try:
        model = ByteLM(settings.sizes, router, experts, steps=settings.steps)
    except (TypeError, ValueError) as error:
        raise Unfit(str(error)) from error
    return model, Recipe(balanced=False) if experts in OWN_ROUTERS else recipe_of(router)


def train(name: str, seed: int, settings: Settings, report: Report) -> Outcome:
    """Train a case once, until the budget is spent; all cases of a seed see the same windows in the same order."""
    text, valid = corpus()
    sizes, allowed = settings.sizes, budget(settings)
    torch.manual_seed(seed)
    model, recipe = build(name, settings)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    generator = torch.Generator().manual_seed(seed)
    tokens, spent, milliseconds = settings.batch * sizes.sequence, 0.0, []
    x, y, counts, rows, counted = [0.0], [validate(model, valid, settings.eval_windows, settings.batch)], [], 0, 0
    while spent < allowed:
        starts = torch.randint(text.numel() - sizes.sequence, (settings.batch,), generator=generator)
        batch = windows(text, starts, sizes.sequence)
        begin = time.perf_counter()
        share = spent / allowed
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(int(share * settings.steps), settings.steps, settings.lr)
        loss, routings = cross_entropy(model, batch)
        loss = loss + balance_terms(model, routings, recipe, settings.balance)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        after_step(model, routings, settings.balance)
        milliseconds.append(1000 * (time.perf_counter() - begin))
        with torch.no_grad():
            spent += FORWARD_AND_BACKWARD * forward_flops(model, routings, tokens)
            if share >= 0.75 or spent >= allowed:
                counts.append([counts_of(routing) for routing in routings])
                rows += sum(live(routing) for routing in routings)
                counted += tokens * sizes.layers
        if spent >= allowed * len(x) / settings.looks:
            x.append(spent)
            y.append(validate(model, valid, settings.eval_windows, settings.batch))
            report(min(spent / allowed, 1.0), f"{y[-1]:.3f} bits per byte")
    of_layers = [torch.stack(layer).sum(0).double() for layer in zip(*counts, strict=True)]
    return Outcome(
        parameters=sum(p.numel() for p in model.parameters()),
        metrics={
            "loss": y[-1],
            "experts": rows / counted,
            "load": statistics.fmean(float(c.max() / c.mean()) for c in of_layers),
            "dead": statistics.fmean(float((c == 0).double().mean()) for c in of_layers),
            "step_ms": statistics.median(milliseconds),
            "steps": float(len(milliseconds)),
        },
        x=x,
        y=y,
    )


STUDY = Study(
    name="routers",
    title="Routers and expert layers of a byte-level language model",
    question="Which router, and which expert layer, learns most from the same training FLOPs and parameters?",
    baseline=PLAIN,
    headline="loss",
    metrics=(
        Metric("loss", "validation bits per byte", 3),
        Metric("experts", "experts per token", 2),
        Metric("load", "busiest expert over mean", 2),
        Metric("dead", "share of experts without a token", 3),
        Metric("step_ms", "ms per step", 1),
        Metric("steps", "steps", 0),
    ),
    x_label="training FLOPs",
    y_label="validation bits per byte",
    cases=cases,
    settings={
        "quick": Settings(Sizes(2, 64, 2, 64, 8, 2, 64), batch=8, steps=80, looks=4, eval_windows=32),
        "full": Settings(Sizes(2, 96, 2, 96, 16, 2, 128), batch=16, steps=200, eval_windows=128),
    },
    seeds={"quick": 3, "full": 3},
    run=train,
)
