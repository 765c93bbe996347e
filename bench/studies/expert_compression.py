"""Trained experts compressed to the same number of parameters: each matrix alone, by a shared latent, or by bases."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from gossamer.bench.harness.study import Case, Metric, Outcome, Report, Study, Unfit
from gossamer.bench.studies.byte_lm import (
    Balance,
    ByteLM,
    Sizes,
    after_step,
    balance_terms,
    cross_entropy,
    recipe_of,
    validate,
)
from gossamer.bench.studies.routers import PLAIN, corpus
from gossamer.bench.studies.text import learning_rate, windows
from gossamer.nn import BasisExperts, Experts, LatentExperts

ALONE = "each matrix alone"


@dataclass(frozen=True)
class Settings:
    """The amount of work.

    Attributes:
        sizes: sizes of the model whose experts are compressed.
        batch: windows per training step.
        steps: steps of training before compression.
        num_bases: M of the bases; with R = I it determines the number of parameters of every case.
        fit_steps: steps of Adam that fit the bases.
        lr: peak of the learning rate.
        eval_windows: windows per validation.
    """

    sizes: Sizes
    batch: int
    steps: int
    num_bases: int
    fit_steps: int
    lr: float = 3e-3
    eval_windows: int = 64

    @property
    def share(self) -> float:
        """Parameters of gate and up matrices after over before."""
        sizes = self.sizes
        return sizes.intermediate_size / sizes.hidden_size + self.num_bases / sizes.num_experts


@functools.cache
def trained(seed: int, settings: Settings) -> tuple[ByteLM, float]:
    """A model trained from a seed, and its bits per byte."""
    text, valid = corpus()
    sizes, recipe, balance = settings.sizes, recipe_of(PLAIN), Balance()
    torch.manual_seed(seed)
    model = ByteLM(sizes)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    generator = torch.Generator().manual_seed(seed)
    for step in range(settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings.steps, settings.lr)
        starts = torch.randint(text.numel() - sizes.sequence, (settings.batch,), generator=generator)
        loss, routings = cross_entropy(model, windows(text, starts, sizes.sequence))
        optimizer.zero_grad(set_to_none=True)
        (loss + balance_terms(model, routings, recipe, balance)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        after_step(model, routings, balance)
    return model, validate(model, valid, settings.eval_windows, settings.batch)


def alone(experts: Experts, settings: Settings) -> tuple[Experts, int]:
    """Replace each gate and up matrix by its own truncated SVD; return the layer and the factors' parameter count."""
    e, wide, h = experts.gate_up_proj.shape
    rank = round(settings.share * wide // 2 * h / (wide // 2 + h))
    u, s, vh = torch.linalg.svd(experts.gate_up_proj.detach().view(2 * e, wide // 2, h), full_matrices=False)
    plain = copy.deepcopy(experts)
    with torch.no_grad():
        plain.gate_up_proj.copy_(((u[..., :rank] * s[:, None, :rank]) @ vh[:, :rank]).view(e, wide, h))
    return plain, 2 * e * rank * (wide // 2 + h)


def latent(experts: Experts, settings: Settings, *, groups: int) -> tuple[Experts, int]:
    """Replace the gate and up matrices of each of ``groups`` groups of experts by factors that share a latent."""
    e, wide, h = experts.gate_up_proj.shape
    size = round(settings.share * e * wide * h / (e * wide + groups * h))
    layer = LatentExperts.from_experts(experts, min(size, h), group_size=e // groups, shared_output=False)
    return layer.to_experts(), layer.in_proj.numel() + layer.gate_up_proj.numel()


def bases(experts: Experts, settings: Settings, *, nonlinearity: str, note: Callable) -> tuple[Experts, int]:
    """Replace the gate and up matrices by mixtures of bases that are fitted to them."""
    layer = BasisExperts.from_experts(
        experts, settings.num_bases, nonlinearity=nonlinearity, steps=settings.fit_steps, lr=0.02, progress=note
    )
    return layer.expand(), layer.bases.numel() + layer.mix.numel() + layer.factor.numel()


CASES = {
    ALONE: (alone, ""),
    "one latent": (functools.partial(latent, groups=1), ""),
    "four latents": (functools.partial(latent, groups=4), ""),
    "bases, silu": (functools.partial(bases, nonlinearity="silu"), ""),
    "bases, tanh": (functools.partial(bases, nonlinearity="tanh"), ""),
    "bases, linear": (functools.partial(bases, nonlinearity="identity"), "bases without a nonlinearity"),
}


def run(name: str, seed: int, settings: Settings, report: Report) -> Outcome:
    """The experts of one trained model compressed, with no training after it."""
    if settings.share >= 1:
        raise Unfit(f"{settings.num_bases} bases have no fewer parameters than {settings.sizes.num_experts} experts")
    before, bits = trained(seed, settings)
    model, kept, error, size = copy.deepcopy(before), 0, 0.0, 0.0
    for number, block in enumerate(model.blocks):
        compress, _ = CASES[name]

        def note(step: int, now: float, number: int = number) -> None:
            report((number + step / settings.fit_steps) / len(model.blocks), f"relative error {now:.3f}")

        more = {"note": note} if name.startswith("bases") else {}
        made, parameters = compress(block.moe.experts, settings, **more)
        old = block.moe.experts.gate_up_proj.detach()
        kept += parameters
        error += float((made.gate_up_proj.detach() - old).square().sum())
        size += float(old.square().sum())
        block.moe.experts = made
    _, valid = corpus()
    after = validate(model, valid, settings.eval_windows, settings.batch)
    originals = sum(block.moe.experts.gate_up_proj.numel() for block in model.blocks)
    return Outcome(
        parameters=kept,
        metrics={"rise": after - bits, "error": error / size, "loss": after, "share": kept / originals},
    )


STUDY = Study(
    name="expert_compression",
    title="Gate and up matrices of trained experts with fewer parameters",
    question="Which factors come nearest to trained experts at one number of parameters, and what does the model lose?",
    baseline=ALONE,
    headline="rise",
    metrics=(
        Metric("rise", "rise of validation bits per byte", 4),
        Metric("error", "relative squared error of the weights", 4),
        Metric("loss", "validation bits per byte", 3),
        Metric("share", "parameters after over before", 3),
    ),
    x_label="",
    y_label="",
    cases=lambda: [Case(name, "compressed", note) for name, (_, note) in CASES.items()],
    settings={
        "quick": Settings(Sizes(1, 64, 2, 32, 8, 2, 64), batch=8, steps=100, num_bases=2, fit_steps=400),
        "full": Settings(Sizes(2, 128, 2, 64, 16, 4, 128), batch=16, steps=250, num_bases=2, fit_steps=3000),
    },
    seeds={"quick": 3, "full": 3},
    run=run,
)
