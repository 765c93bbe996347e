"""Compressed embedding tables in two click models, at shares of the dense tables' bytes."""

from __future__ import annotations

import functools
import itertools
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from gossamer.bench.harness.study import Case, Metric, Outcome, Report, Study, Unfit
from gossamer.bench.studies.clicks import MODELS, Batch, Population, auc, clicks
from gossamer.integrations.compress import METHODS, compress_embeddings
from gossamer.nn import (
    MaskedEmbedding,
    PrunedEmbedding,
    SearchedDimensionEmbedding,
    choose_widths,
    graph_clusters,
    resize_clusters,
)

DENSE = "dense"
# Methods that start from trained tables replace dense ones after half of the training.
LATE = ("deduplicated", "masked", "product_quantized", "pruned", "semantic_id")
# Name of a variant -> the name of its method, and options of the method's class.
FORMS = {"quantized_learned": ("quantized", {"step": "learned"})}
# Budgets for methods that cannot reach a tenth of the bytes, and for one whose codes cannot fill half of the bytes.
OTHERS = {"quantized": (0.26, 0.51), "quantized_learned": (0.32, 0.57), "product_quantized": (0.1, 0.25)}
# Similar blocks are searched for among at most this many blocks of a table.
BLOCKS = 4000
# The finest resolution at which clusters are searched for.
FINEST = 1e5
# Tables with fewer rows are not compressed.
MIN_ROWS = 64
GROUP, COARSE_GROUP = "at a tenth of the bytes", "at a larger budget, which the codes or maps require"
CASES = [DENSE, *METHODS, *FORMS]
_HALFWAY = "built from the dense tables halfway through training"
NOTES = {
    "clustered": "clusters of ids that occur together in training, at the resolution whose number of clusters fits the "
    "budget",
    "deduplicated": f"{_HALFWAY}: at most {BLOCKS} blocks of at least 4 rows, at the smallest tolerance that meets the "
    "budget",
    "deep_hash": "256 hashes and three layers",
    "masked": _HALFWAY,
    "product_quantized": f"{_HALFWAY}, which stay in memory until its end; not run at half of the bytes, which its "
    "codes for a million ids cannot fill",
    "pruned": f"{_HALFWAY}, which stay in memory until its end",
    "quantized": "at 0.26 of the bytes, in codes of 8 bits",
    "quantized_learned": "at 0.32 of the bytes, in codes of 8 bits with one step size per row",
    "searched_dimension": "searches for widths during the first two fifths of training, then divides the budget "
    "accordingly and trains the chosen widths",
    "semantic_id": f"{_HALFWAY}: codes and rows are their residual k-means",
}


def group(name: str) -> str:
    """The group of cases in which the table lists a case."""
    return GROUP if OTHERS.get(name, (0.1,))[0] == 0.1 else COARSE_GROUP


class Source(Protocol):
    """Impressions of some fields.

    Attributes:
        rows: rows of the table of each field.
        partners: the field whose ids each field's ids are clustered by.
    """

    rows: dict[str, int]
    partners: dict[str, str]

    def training(self, seed: int, steps: int, size: int) -> Iterator[Batch]:
        """The impressions that a seed trains on, in the order of the seed."""

    def validation(self, count: int, size: int) -> Iterator[Batch]:
        """At most ``count`` batches that no seed trains on."""

    def requests(self, count: int, size: int) -> Iterator[Batch]:
        """Batches to time lookups with."""


@dataclass(frozen=True)
class Settings:
    """The amount of work.

    Attributes:
        population: numbers of ids of planted clicks; None if ``source`` is given.
        dim: D.
        batch: impressions per step.
        steps: steps of training.
        eval_batches: batches per validation.
        budgets: shares of the dense tables' bytes; the first one counts for the verdict.
        lr: learning rate of the tables.
        source: impressions to use in place of planted ones.
    """

    population: Population | None
    dim: int
    batch: int
    steps: int
    eval_batches: int
    budgets: tuple[float, ...]
    lr: float = 0.05
    source: Source | None = None

    def impressions(self) -> Source:
        """The impressions that models are trained on and judged by."""
        return clicks(self.population, 0) if self.source is None else self.source


@dataclass(frozen=True)
class Result:
    """The result of one model at one budget."""

    loss: float
    auc: float
    served: int
    training: int
    step_ms: float
    lookup_us: float


def options(method: str, budget: float, seed: int, settings: Settings) -> dict[str, object]:
    """A method's options other than the budget: how often ids occur in training, and which ids occur together.

    Raises:
        Unfit: the method's maps alone are larger than the budget.
    """
    if method in FORMS:
        return FORMS[method][1]
    if method == "deep_hash":
        return {"num_hashes": 256, "num_layers": 3}
    source = settings.impressions()
    rows = {name: count for name, count in source.rows.items() if count >= MIN_ROWS}
    if method == "deduplicated":
        own = {f"tables.{name}": {"block_rows": max(4, -(-count // BLOCKS))} for name, count in rows.items()}
        return {"tolerance": None, "bands": 16, "field_options": own}
    met = source, seed, settings.steps, settings.batch
    if method == "frequency":
        counts = {name: _met(*met, name).bincount(minlength=count) for name, count in rows.items()}
        return {"frequencies": {f"tables.{name}": count for name, count in counts.items()}}
    if method != "clustered":
        return {}
    found = {}
    for name in rows:
        # A row takes 4·D bytes, the map 4 bytes per id, and the seed of the class 8.
        most = int(rows[name] * (budget - 1 / settings.dim)) - 1
        if most < 1:
            raise Unfit(f"its maps hold 1/{settings.dim} of the dense bytes")
        found[f"tables.{name}"] = {"clusters": clusters_of(*met, name, most)}
    return {"field_options": found}


def clusters_of(source: Source, seed: int, steps: int, size: int, name: str, most: int) -> torch.Tensor:
    """``most`` clusters of a field's ids.

    Searches for a resolution that gives at least this many clusters, and joins the smallest ones. If even the
    finest resolution gives fewer, because too few ids occur together with others, it splits the largest clusters.
    """
    resolution = 200.0
    while True:
        found = _clusters(source, seed, steps, size, name, resolution)
        if int(found.max()) + 1 >= most or resolution > FINEST:
            return resize_clusters(found, most)
        resolution *= 4


@functools.lru_cache(32)
def _clusters(source: Source, seed: int, steps: int, size: int, name: str, resolution: float) -> torch.Tensor:
    """Clusters of a field's ids by the ids that they occur together with in training."""
    partner = source.partners[name]
    ids, others = (_met(source, seed, steps, size, field) for field in (name, partner))
    # An id of a bag occurs together with the first id of its partner field's bag.
    others = others.view(steps * size, -1)[:, :1].expand(-1, len(ids) // (steps * size)).flatten()
    return graph_clusters(ids, others, source.rows[name], source.rows[partner], resolution=resolution, seed=seed).users


def _met(source: Source, seed: int, steps: int, size: int, name: str) -> torch.Tensor:
    """The ids of a field in training, in order."""
    return torch.cat([batch.ids[name] for batch in _training(source, seed, steps, size)]).flatten()


def train(kind: str, method: str, budget: float, seed: int, settings: Settings, report: Report) -> Result:
    """Train one model with one method at one budget.

    Raises:
        Unfit: the method cannot reach the budget.
    """
    source = settings.impressions()
    torch.manual_seed(seed)
    model = MODELS[kind](source.rows, settings.dim, settings.lr)
    start = settings.steps // 2 if method in LATE else 0
    optimizers, training, milliseconds = None, 0, []
    for step, batch in enumerate(_training(source, seed, settings.steps, settings.batch)):
        if step == start and method != DENSE:
            given = options(method, budget, seed, settings)
            try:
                name = FORMS.get(method, (method,))[0]
                training = compress_embeddings(model, name, budget, min_rows=MIN_ROWS, **given).training
            except ValueError as error:
                raise Unfit(str(error)) from error
            for table in model.tables.values():
                if isinstance(table, PrunedEmbedding):
                    table.sparsify()
                if isinstance(table, MaskedEmbedding):
                    table.threshold.requires_grad_(False)
            optimizers = None
        if method == "searched_dimension" and step == settings.steps * 2 // 5:
            choose_widths([t for t in model.tables.values() if isinstance(t, SearchedDimensionEmbedding)])
            optimizers = None
        if optimizers is None:
            optimizers = _optimizers(model)
        begin = time.thread_time()
        # Shares of widths learn from every fourth batch, all other parameters from the rest.
        chosen = optimizers[1] if optimizers[1] is not None and step % 4 == 3 else optimizers[0]
        chosen.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(model(batch.ids), batch.clicks).backward()
        chosen.step()
        milliseconds.append(1000 * (time.thread_time() - begin))
        if step % 50 == 0:
            report(step / settings.steps, "")
    held = [table.nbytes() for table in model.tables.values()]
    for table in model.tables.values():
        table.freeze()
    model.eval()
    scores, clicked = [], []
    with torch.no_grad():
        for batch in _validation(source, settings.eval_batches, settings.batch):
            scores.append(model(batch.ids))
            clicked.append(batch.clicks)
        scores, clicked = torch.cat(scores), torch.cat(clicked)
        loss = float(nn.functional.binary_cross_entropy_with_logits(scores, clicked))
        lookups = []
        for batch in _requests(source):
            begin = time.thread_time()
            for name, table in model.tables.items():
                table(batch.ids[name])
            lookups.append(1e6 * (time.thread_time() - begin))
    served = sum(table.nbytes() for table in model.tables.values())
    return Result(
        loss,
        auc(scores, clicked),
        served,
        training or sum(held),
        statistics.median(milliseconds),
        statistics.median(lookups),
    )


@functools.lru_cache(2)
def _training(source: Source, seed: int, steps: int, size: int) -> list[Batch]:
    """The batches of a seed, which all methods are trained on."""
    return list(source.training(seed, steps, size))


@functools.lru_cache(2)
def _validation(source: Source, count: int, size: int) -> list[Batch]:
    return list(source.validation(count, size))


@functools.lru_cache(2)
def _requests(source: Source) -> list[Batch]:
    return list(source.requests(6, 4096))


def _optimizers(model: nn.Module) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer | None]:
    """Adam for parameters that no table steps itself, and another for the shares of searched widths."""
    alphas = [p for name, p in model.named_parameters() if name.endswith("alpha") and p.requires_grad]
    rest = [p for name, p in model.named_parameters() if not name.endswith("alpha") and p.requires_grad]
    return torch.optim.Adam(rest, lr=1e-3), torch.optim.Adam(alphas, lr=1e-2) if alphas else None


def run(name: str, seed: int, settings: Settings, report: Report) -> Outcome:
    """Run a method at every budget that it can reach, in both models; return the mean over the models."""
    budgets = settings.budgets[:1] if name == DENSE else OTHERS.get(name, settings.budgets)
    dense = 4 * settings.dim * sum(settings.impressions().rows.values())
    found: dict[float, list[Result]] = {}
    unreached: dict[float, str] = {}
    for number, (budget, kind) in enumerate(itertools.product(budgets, MODELS)):

        def note(share: float, text: str, number: int = number, budget: float = budget) -> None:
            report((number + share) / (len(budgets) * len(MODELS)), f"budget {budget:g}")

        try:
            found.setdefault(budget, []).append(train(kind, name, budget, seed, settings, note))
        except Unfit as error:
            unreached.setdefault(budget, str(error))
    reached = {budget: results for budget, results in found.items() if budget not in unreached}
    if budgets[0] not in reached:
        raise Unfit(unreached[budgets[0]])
    first = reached[budgets[0]]

    def mean(results: list[Result], field: str) -> float:
        return statistics.fmean(getattr(result, field) for result in results)

    points = sorted((mean(results, "served") / dense, mean(results, "loss")) for results in reached.values())
    metrics = {
        "loss": mean(first, "loss"),
        "auc": mean(first, "auc"),
        "served": mean(first, "served") / 1e6,
        "training": mean(first, "training") / 1e6,
        "step_ms": mean(first, "step_ms"),
        "lookup_us": mean(first, "lookup_us"),
        "least": min(share for share, _ in points),
    }
    # Pictures omit the first point of a curve, so it is stored twice.
    x, y = zip(points[0], *points, strict=True)
    fields = ("loss", "auc", "served", "training", "step_ms", "lookup_us")
    at_budgets = {
        "all" if name == DENSE else f"{budget:g}": {field: mean(results, field) for field in fields}
        | {"share": mean(results, "served") / dense}
        for budget, results in reached.items()
    }
    return Outcome(round(mean(first, "served") / 4), metrics, list(map(math.log10, x)), list(y), at_budgets)


STUDY = Study(
    name="embedding_budget",
    title="Compressed embedding tables of click models",
    question="Which compressed table predicts clicks best from a tenth of the dense tables' bytes?",
    baseline=DENSE,
    headline="loss",
    metrics=(
        Metric("loss", "log loss", 4),
        Metric("auc", "AUC", 4),
        Metric("served", "MB served", 3),
        Metric("training", "MB in training", 3),
        Metric("step_ms", "ms of thread time per step", 2),
        Metric("lookup_us", "us of thread time to look up 4096 impressions", 0),
        Metric("least", "smallest share reached", 4),
    ),
    x_label="log10 of the share of the dense bytes",
    y_label="validation log loss",
    cases=lambda: [Case(name, group(name), NOTES.get(name, "")) for name in CASES],
    run=run,
    settings={
        "quick": Settings(Population(6_000, 2_500, 700), 16, 256, 120, 8, (0.1, 0.5, 0.25, 0.01)),
        "full": Settings(Population(600_000, 180_000, 40_000), 16, 1024, 1500, 40, (0.1, 0.5, 0.25, 0.01)),
    },
    seeds={"quick": 3, "full": 3},
)
