"""Checkpoints by torch.distributed.checkpoint that stay intact if a process is killed at any moment."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch.distributed as dist

from gossamer._checks import check_path, check_positive, check_sizes
from gossamer.nn.embeddings import files
from gossamer.parallel.exchange import check_group, raise_together

_MANIFEST, _FORMAT = "checkpoints.json", 1


def _entries(folder: Path) -> list[dict]:
    """The committed checkpoints of a folder, newest first; empty if nothing was committed yet.

    Raises:
        ValueError: the manifest is invalid, or is missing although there are checkpoints.
    """
    path = folder / _MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        files.check_header(content, {"format": _FORMAT}, str(path))
        return [{"name": str(each["name"]), "info": dict(each["info"])} for each in content["checkpoints"]]
    except FileNotFoundError:
        return []
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a manifest of gossamer.parallel.save_checkpoint: {error!r}") from error


def _from_first(group: dist.ProcessGroup, find) -> object:
    """Call ``find()`` on the first rank, and return its result, or raise its error, on all ranks."""
    found, error = [None], None
    if dist.get_rank(group) == 0:
        try:
            found = [find()]
        except Exception as problem:
            error = problem
    raise_together(error, group)
    dist.broadcast_object_list(found, src=dist.get_global_rank(group, 0), group=group)
    return found[0]


def _check_state(state: object, folder: object) -> None:
    if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
        raise TypeError(f"state must be a mapping of names to values, got {type(state).__name__}")
    check_path("folder", folder)


def save_checkpoint(
    state: Mapping[str, object],
    folder: str | os.PathLike,
    *,
    info: dict | None = None,
    keep: int = 2,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Write a checkpoint of all ranks to a new subfolder, then commit it; every rank must make the call.

    ``torch.distributed.checkpoint.save`` writes the parts, each rank its own. The checkpoint is committed when the
    first rank replaces the folder's ``checkpoints.json``, by renaming a file that is complete on disk. Checkpoints
    older than the ``keep`` newest are removed after that. So if a process is killed at any moment, committed
    checkpoints stay intact.

    Args:
        state: what to save, by name: modules and optimizers (anything with ``state_dict`` and ``load_state_dict``),
            tensors, or dicts of these.
        folder: a folder on a file system that all ranks share.
        info: additional data that JSON can represent; the first rank's is saved.
        keep: checkpoints to keep.
        group: the ranks; None for all.

    Returns:
        The subfolder.

    Raises:
        ValueError: ``keep`` is below 1, or the manifest is corrupt; on every rank.
        RuntimeError: a rank ended during the call; raised within the group's timeout.
        CheckpointException: torch's error, on every rank, if writing failed on one.
    """
    # Slow to import, so only where it is used.
    import torch.distributed.checkpoint as dcp

    check_positive(keep=keep)
    _check_state(state, folder)
    files.check_info(info)
    folder, group = Path(folder), check_group(group)

    def begin() -> tuple[str, list[dict]]:
        folder.mkdir(parents=True, exist_ok=True)
        before = _entries(folder)
        number = 1 + max([int(each["name"].rpartition("-")[2]) for each in before], default=-1)
        name = f"checkpoint-{number:08d}"
        # Remains of an interrupted call.
        shutil.rmtree(folder / name, ignore_errors=True)
        return name, before

    name, before = _from_first(group, begin)
    dcp.save(dict(state), checkpoint_id=folder / name, process_group=group)

    def commit() -> None:
        kept = [{"name": name, "info": info or {}}, *before][:keep]
        for path in [*(folder / name).iterdir(), folder / name]:
            files.sync(path)
        with files.replacing(folder / _MANIFEST) as part:
            part.write_text(json.dumps({"format": _FORMAT, "checkpoints": kept}, indent=1) + "\n", encoding="utf-8")
        names = {each["name"] for each in kept}
        for path in folder.glob("checkpoint-*"):
            if path.name not in names:
                shutil.rmtree(path, ignore_errors=True)

    _from_first(group, commit)
    return folder / name


def load_checkpoint(
    state: Mapping[str, object],
    folder: str | os.PathLike,
    *,
    older: int = 0,
    group: dist.ProcessGroup | None = None,
) -> dict | None:
    """Load the newest committed checkpoint into ``state``; every rank must make the call.

    The number of ranks and the plans of sharded tables may differ from those that saved.

    Args:
        state: as for :func:`save_checkpoint`, of the same names; modules and tensors are changed in place.
        folder: as given to :func:`save_checkpoint`.
        older: load the checkpoint this many before the newest, out of the kept ones.
        group: the ranks; None for all.

    Returns:
        The saved ``info``; None if nothing was committed yet, and ``state`` is unchanged.

    Raises:
        ValueError: ``older`` exceeds the kept checkpoints, or the manifest is corrupt; on every rank.
        CheckpointException: torch's error, on every rank, if reading failed on one.
    """
    import torch.distributed.checkpoint as dcp

    _check_state(state, folder)
    check_sizes(older=older)
    folder, group = Path(folder), check_group(group)

    def find() -> dict | None:
        entries = _entries(folder)
        if not entries and not older:
            return None
        if not 0 <= older < len(entries):
            raise ValueError(f"older must be in [0, {len(entries)}), the checkpoints kept, got {older}")
        return entries[older]

    entry = _from_first(group, find)
    if entry is None:
        return None
    dcp.load(dict(state), checkpoint_id=folder / entry["name"], process_group=group)
    return entry["info"]
