"""Distributions of (token, expert) assignments: uniform, by Zipf's law, with one hot expert, or as in a trained router.

The counts of the trained router are those of the example's model, made by

    python examples/train_moe_lm.py --out runs/moe --steps 300 --eval-every 150 --eval-windows 16
    python -m gossamer.bench.families.skew runs/moe/metrics.json > bench/families/trained_routing.json
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path

import torch

from gossamer.testing import random_expert_ids

EXPERT_SKEWS = ("uniform", "zipf", "one", "trained")
COUNTS = Path(__file__).with_name("trained_routing.json")
STEPS = 50


def counts_of_training(metrics: dict, steps: int = STEPS) -> dict:
    """The assignments of each expert of each layer in the last steps of a run of ``examples/train_moe_lm.py``.

    Args:
        metrics: the contents of ``metrics.json`` of that example.
        steps: how many of the last steps to sum.
    """
    routing = metrics["routing"]
    counts = torch.tensor(routing["counts_step_layer_expert"])
    taken = counts[-steps:]
    return {
        "what": f"(token, expert) assignments, the last {len(taken)} of {len(counts)} training steps; a row a layer",
        "settings": metrics["settings"],
        "versions": metrics["versions"],
        "counts_layer_expert": taken.sum(0).tolist(),
    }


@functools.cache
def _relative_loads() -> tuple[float, ...]:
    """Each expert's count over its layer's mean, for all layers together, the most popular first."""
    counts = torch.tensor(json.loads(COUNTS.read_text())["counts_layer_expert"], dtype=torch.float64)
    return tuple((counts / counts.mean(1, keepdim=True)).flatten().sort(descending=True).values.tolist())


def trained_popularity(num_experts: int) -> torch.Tensor:
    """``(E,)`` relative loads: evenly spaced quantiles of the measured ones, the most popular expert first."""
    loads = torch.tensor(_relative_loads(), dtype=torch.float64)
    # Expert e stands for the quantiles from e/E to (e+1)/E.
    position = (torch.arange(num_experts) + 0.5) / num_experts * len(loads) - 0.5
    low = position.floor().long().clamp(0, len(loads) - 1)
    high = (low + 1).clamp(max=len(loads) - 1)
    return torch.lerp(loads[low], loads[high], (position - low).clamp(0, 1).double())


def expert_ids(num_tokens: int, num_experts: int, top_k: int, skew: str, seed: int = 0) -> torch.Tensor:
    """Draw ``(T, K)`` int64 ids on the CPU, distinct within a token.

    Args:
        num_tokens: T.
        num_experts: E.
        top_k: K.
        skew: a member of :data:`EXPERT_SKEWS`.
        seed: seed of the generator.
    """
    if skew != "trained":
        return random_expert_ids(num_tokens, num_experts, top_k, skew=skew, seed=seed)
    return random_expert_ids(num_tokens, num_experts, top_k, popularity=trained_popularity(num_experts), seed=seed)


if __name__ == "__main__":
    found = counts_of_training(json.loads(Path(sys.argv[1]).read_text()))
    rows = found.pop("counts_layer_expert")
    table = ",\n  ".join(map(json.dumps, rows))
    print(json.dumps(found, indent=1)[:-2] + f',\n "counts_layer_expert": [\n  {table}\n ]\n}}')
