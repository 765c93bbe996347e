"""The second process of online_ctr.py: serves the model in a trainer's folder, and follows its deltas as they come."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

from click_stream import HELD_OUT
from ctr_model import Settings, Trainer, auc, newest, open_folder

from gossamer.nn import DeltaGap

STALENESS = (0, 1, 3, 9)  # ages of the served model when it is scored, in intervals between deltas


class Server:
    """A model that is kept up to date from a folder, and scores events that no trainer sees.

    Args:
        path: a trainer's folder that has a checkpoint.
        say: called with each line of the log.

    Raises:
        ValueError: there is no checkpoint, it is corrupt, or its tables are not dynamic.
    """

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        manifest = newest(path)
        if manifest is None:
            raise ValueError(f"{path} holds no checkpoint")
        settings = Settings(**manifest.info["settings"])
        if settings.tables == "hashing":
            raise ValueError(f"{path} holds fixed tables, which have no deltas to follow")
        self.say, self.model = say, Trainer(settings)
        self.folder = open_folder(path, self.model.dynamic)
        self.aucs: dict[int, list[float]] = {distance: [] for distance in STALENESS}
        self.lags: list[float] = []
        self.applied = self.rows = self.refused = 0
        self._complaint = ""
        self._load()

    def _load(self) -> None:
        contents = self.folder.load()
        self.info = contents.info
        self.model.take(contents.tensors, self.info["step"])
        self.say(f"step {self.info['step']}: loaded the checkpoint, {contents.rows} rows")

    @property
    def finished(self) -> bool:
        """Whether the served model is the trainer's final one."""
        return self.info["step"] >= self.info["steps"]

    def _refuse(self, error: ValueError) -> bool:
        """Report an error once; return whether it was reported before."""
        known, self._complaint = str(error) == self._complaint, str(error)
        if not known:
            self.refused += 1
            self.say(f"refused, still serving step {self.info['step']}: {error}")
        return known

    def _checkpoint_ahead(self) -> bool:
        try:
            manifest = newest(self.folder.path)
        except ValueError:
            return False
        return manifest is not None and manifest.sequence > self.folder.sequence

    def _reload(self) -> bool:
        try:
            self._load()
            return True
        except ValueError as error:
            self._refuse(error)
            return False

    def apply_next(self) -> bool:
        """Apply the next delta, if it has come and is complete; a delta that cannot be applied changes nothing."""
        try:
            contents = self.folder.apply_next()
        except ValueError as error:
            # A gap may mean that the trainer resumed from its checkpoint and wrote other deltas since. Reloading is
            # tried once: if it does not close the gap now, it never will.
            known = self._refuse(error)
            return (self._checkpoint_ahead() or (isinstance(error, DeltaGap) and not known)) and self._reload()
        if contents is None:
            return False
        self.info = contents.info
        self.model.take(contents.tensors, self.info["step"])
        self.applied, self.rows = self.applied + 1, self.rows + contents.rows
        return True

    def answer(self) -> None:
        """Score held-out events of the served step, and of later steps with the model of this step."""
        step, found = self.info["step"], []
        for distance in STALENESS:
            events = self.model.stream.events(step + distance * self.info["delta_every"], HELD_OUT)
            found.append(auc(self.model.score(events).cpu(), events.clicks))
            self.aucs[distance].append(found[-1])
        shown = ", ".join(
            f"{distance * self.info['delta_every']}: {a:.4f}" for distance, a in zip(STALENESS, found, strict=True)
        )
        self.say(f"step {step}: delta {self.folder.sequence}; AUC by steps of staleness {shown}")

    def follow(self, patience: float) -> None:
        """Apply deltas and answer until the trainer has finished, or no delta came for ``patience`` seconds."""
        news = time.monotonic()
        while not self.finished and time.monotonic() - news < patience:
            before = self.folder.sequence
            if not self.apply_next():
                time.sleep(0.1)
                continue
            news = time.monotonic()
            written = self.folder.path / f"delta-{self.folder.sequence:08d}.safetensors"
            if self.folder.sequence == before + 1 and written.exists():
                self.lags.append(time.time() - written.stat().st_mtime)
            self.answer()
        self.say(f"step {self.info['step']}: " + ("the trainer has finished" if self.finished else "no more news"))

    def report(self) -> dict[str, object]:
        """The results of serving, as values for JSON."""
        batch, every = self.model.settings.batch, self.info["delta_every"]
        return {
            "step": self.info["step"],
            "deltas_applied": self.applied,
            "deltas_refused": self.refused,
            "rows_set": self.rows,
            "median_seconds_behind": statistics.median(self.lags) if self.lags else None,
            "auc_by_events_of_staleness": {
                str(distance * every * batch): statistics.fmean(found) for distance, found in self.aucs.items() if found
            },
        }
