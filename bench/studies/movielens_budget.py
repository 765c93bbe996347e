"""Compressed embedding tables on MovieLens 100K: the study of planted clicks, repeated on real ratings."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from gossamer.bench.studies import embedding_budget
from gossamer.bench.studies.embedding_budget import Settings
from gossamer.bench.studies.movielens import HOW_TO_GET, MovieLens


def load(settings: Settings, folder: Path | None) -> Settings:
    """The settings with the ratings of a folder.

    Raises:
        ValueError: no folder is given, or it does not hold the ratings; the message says how to get them.
    """
    if folder is None:
        raise ValueError(f"study movielens_budget needs --data FOLDER; {HOW_TO_GET}")
    return dataclasses.replace(settings, source=MovieLens(folder))


STUDY = dataclasses.replace(
    embedding_budget.STUDY,
    name="movielens_budget",
    title="Compressed embedding tables on MovieLens 100K",
    question="Which compressed table predicts ratings of 4 and 5 best from a tenth of the dense tables' bytes?",
    settings={
        "quick": Settings(None, 16, 256, 300, 80, (0.1, 0.5, 0.25, 0.01)),
        "full": Settings(None, 16, 256, 940, 80, (0.1, 0.5, 0.25, 0.01)),
    },
    load=load,
)
