"""A folder that stores several dynamic embeddings and the other tensors of a model together: checkpoints and deltas."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from gossamer._checks import (
    check_flag,
    check_has_numbers,
    check_path,
    check_positive,
    check_sizes,
    check_strided,
    check_tensor,
)
from gossamer.nn.embeddings import files
from gossamer.nn.embeddings.dynamic_embedding import DynamicEmbedding

CHECKPOINT, DELTA = "joint checkpoint", "joint delta"
_FORMAT, _MANIFEST = 1, "manifest.json"
# The checkpoint number in a manifest while the folder's first checkpoint is being written.
_FIRST_PENDING = -1


class DeltaGap(ValueError):
    """The next delta is missing or does not follow the last applied one; load a checkpoint to continue."""


class Manifest(NamedTuple):
    """The contents of a folder's ``manifest.json``: its newest checkpoint.

    Attributes:
        sequence: number of the last delta that the checkpoint includes.
        info: the ``info`` given to :meth:`EmbeddingFolder.save`.
        checkpoints: ``(file name, sequence)`` of the kept checkpoints, newest first.
        number: number of checkpoints saved before.
    """

    sequence: int
    info: dict
    checkpoints: list[tuple[str, int]]
    number: int


class Contents(NamedTuple):
    """The data saved together with the layers' rows.

    Attributes:
        tensors: by name, on the CPU.
        info: the dict that was given.
        rows: number of rows that were set in all layers.
    """

    tensors: dict[str, torch.Tensor]
    info: dict
    rows: int


class EmbeddingFolder:
    """A folder that one trainer writes and resumes from, and that any number of servers read.

    A checkpoint or delta is one file for all layers and additional tensors (dense weights, their optimizer's state), so
    they always match. Files are written atomically, and ``manifest.json``, replaced last, names the newest checkpoint,
    so a process killed at any moment leaves a folder to resume from. Deltas are numbered, and each names its
    predecessor by a digest of its contents. A trainer that resumes and repeats the same steps writes the same deltas
    again, so its servers are not affected; if it takes different steps, servers detect it.

    Args:
        path: the folder, made by the first :meth:`save`.
        layers: layers by name; a name must not contain ``/``. Only this folder may export their deltas.
        keep: number of checkpoints to keep, with the deltas after the oldest one, for servers that are behind.

    Attributes:
        sequence: number of the last delta exported or applied.
        lineage: the digest that the next delta names; None before the first checkpoint.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """

    def __init__(self, path: str | os.PathLike, layers: Mapping[str, DynamicEmbedding], *, keep: int = 2) -> None:
        check_path("path", path)
        if not isinstance(layers, Mapping):
            raise TypeError(f"layers must be a mapping, got {type(layers).__name__}")
        check_positive(keep=keep)
        for name, layer in layers.items():
            if not isinstance(layer, DynamicEmbedding):
                raise TypeError(f"layers[{name!r}] must be a DynamicEmbedding, got {type(layer).__name__}")
            if "/" in name:
                raise ValueError(f"names of layers must not hold '/', got {name!r}")
        if len({id(layer) for layer in layers.values()}) != len(layers):
            raise ValueError("layers must be distinct")
        self.path, self.layers, self.keep = Path(path), dict(layers), keep
        self.sequence, self.lineage = 0, None
        self._passed_over: set[str] = set()  # newer checkpoints than the one that was loaded

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with ExitStack() as stack:
            for layer in self.layers.values():
                stack.enter_context(layer.table.lock)
            yield

    def _delta_path(self, sequence: int) -> Path:
        return self.path / f"delta-{sequence:08d}.safetensors"

    def _pack(
        self, parts: Mapping[str, tuple[dict, dict]], tensors: Mapping[str, torch.Tensor] | None, info: dict | None
    ) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
        files.check_info(info)
        if tensors is not None and not isinstance(tensors, Mapping):
            raise TypeError(f"tensors must be a mapping or None, got {type(tensors).__name__}")
        for name, tensor in (tensors or {}).items():
            check_tensor(f"tensors[{name!r}]", tensor)
            check_strided(f"tensors[{name!r}]", tensor)
            check_has_numbers(f"tensors[{name!r}]", tensor)
        packed = {f"beside/{name}": tensor for name, tensor in (tensors or {}).items()}
        for layer, (rows, _) in parts.items():
            packed |= {f"layers/{layer}/{name}": tensor for name, tensor in rows.items()}
        headers = {layer: header for layer, (_, header) in parts.items()}
        own = {"format": _FORMAT, "sequence": self.sequence, "lineage": self.lineage}
        return packed, own | {"layers": headers, "info": info or {}}

    def unpack(self, tensors: Mapping[str, torch.Tensor], header: Mapping[str, object], what: str) -> dict:
        """Tensors and header of each layer in a file's.

        Raises:
            ValueError: the file is of another format or of other layers.
        """
        files.check_header(header, {"format": _FORMAT}, what)
        layers = header.get("layers")
        if not isinstance(layers, dict) or layers.keys() != self.layers.keys():
            raise ValueError(f"{what} is of the layers {sorted(layers or ())}, but these are {sorted(self.layers)}")
        return {name: (files.part(tensors, f"layers/{name}/"), layers[name]) for name in layers}

    def save(self, tensors: Mapping[str, torch.Tensor] | None = None, info: dict | None = None) -> Path:
        """Write a checkpoint, then the manifest that names it; then remove obsolete files.

        Obsolete files are checkpoints older than the ``keep`` newest, deltas before the oldest of these, deltas with
        higher numbers than :attr:`sequence` (from a run that got further before it was stopped), and unfinished files.

        Args:
            tensors: additional tensors to save, by name.
            info: additional data that JSON can represent; also stored in the manifest.

        Returns:
            The checkpoint's path.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        before = read_manifest(self.path)
        if before is None:
            # From here on, every folder that has a checkpoint also has a manifest.
            self._write_manifest(_FIRST_PENDING, [], {})
        number = 0 if before is None else before.number + 1
        path = self.path / f"checkpoint-{number:08d}.safetensors"
        with self._locked():
            parts = {name: layer._snapshot() for name, layer in self.layers.items()}
        packed, header = self._pack(parts, tensors, info)
        header = files.write(path, packed, header | {"kind": CHECKPOINT})
        older = [entry for entry in (before.checkpoints if before else []) if entry[0] not in self._passed_over]
        kept = [(path.name, self.sequence), *older][: self.keep]
        self._write_manifest(number, kept, info or {})
        self.lineage = self.lineage or digest(header)
        names = {name for name, _ in kept}
        stale = [p for p in self.path.glob("checkpoint-*.safetensors") if p.name not in names]
        stale += [p for n, p in self._deltas() if not kept[-1][1] < n <= self.sequence]
        for unneeded in stale + list(self.path.glob(".*.part")):
            unneeded.unlink(missing_ok=True)
        return path

    def _write_manifest(self, number: int, checkpoints: list[tuple[str, int]], info: dict) -> None:
        content = {"format": _FORMAT, "number": number, "checkpoints": checkpoints, "info": info}
        with files.replacing(self.path / _MANIFEST) as part:
            part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    def load(self, *, older: int = 0) -> Contents | None:
        """Load the newest checkpoint, from which training continues bit for bit; return None before the first one.

        Args:
            older: load the checkpoint this many before the newest, out of the ``keep`` kept ones. The next :meth:`save`
                removes the newer ones.

        Raises:
            ValueError: the manifest or the checkpoint is corrupt, or of other layers, or ``older`` exceeds the kept
                checkpoints; nothing was changed. The message names an older checkpoint if there is one.
        """
        check_sizes(older=older)
        while True:
            manifest = read_manifest(self.path)
            if manifest is None:
                return None
            if older >= len(manifest.checkpoints):
                raise ValueError(f"older must be below {len(manifest.checkpoints)}, the checkpoints kept, got {older}")
            path = self.path / manifest.checkpoints[older][0]
            try:
                tensors, header = files.read(path, CHECKPOINT)
                break
            except (FileNotFoundError, ValueError) as error:
                # A trainer may have replaced the file in the meantime; then the manifest has changed too.
                if isinstance(error, ValueError) or read_manifest(self.path) == manifest:
                    if older + 1 == len(manifest.checkpoints):
                        raise
                    name, sequence = manifest.checkpoints[older + 1]
                    raise type(error)(
                        f"{error}; the checkpoint before it is {name} at number {sequence}: load(older={older + 1})"
                    ) from error
        what = f"checkpoint {path}"
        parts = self.unpack(tensors, header, what)
        with self._locked():
            for name, part in parts.items():
                self.layers[name]._check_snapshot(*part, f"{what}, layer {name!r}")
            for name, part in parts.items():
                self.layers[name]._restore(*part)
            self.sequence, self.lineage = header["sequence"], header["lineage"] or digest(header)
            self._passed_over = {name for name, _ in manifest.checkpoints[:older]}
        rows = sum(len(layer) for layer in self.layers.values())
        return Contents(files.part(tensors, "beside/"), header["info"], rows)

    def export_delta(
        self,
        tensors: Mapping[str, torch.Tensor] | None = None,
        info: dict | None = None,
        *,
        with_state: bool = False,
    ) -> int:
        """Write the rows that changed in all layers since the last export; returns their number.

        If writing fails, nothing changes, and the next export includes these rows.

        Args:
            tensors: additional tensors to export, complete.
            info: additional data that JSON can represent.
            with_state: write optimizer state and ages too.

        Raises:
            ValueError: no checkpoint was saved or loaded, so the delta would have nothing to follow.
        """
        check_flag("with_state", with_state)
        if self.lineage is None:
            raise ValueError("deltas follow a checkpoint: save() or load() one first")
        with self._locked():
            parts = {name: layer._delta(False, with_state) for name, layer in self.layers.items()}
            packed, header = self._pack(parts, tensors, info)
            number = self.sequence + 1
            header = files.write(self._delta_path(number), packed, header | {"kind": DELTA, "sequence": number})
            for name, (_, part) in parts.items():
                self.layers[name]._shipped(part["sequence"])
            self.sequence, self.lineage = number, digest(header)
        return sum(rows["keys"].numel() for rows, _ in parts.values())

    def apply_next(self) -> Contents | None:
        """Apply the delta after :attr:`sequence` to all layers; return None if it has not been written yet.

        Raises:
            DeltaGap: the delta was removed, or does not follow the last applied one; call :meth:`load` and continue.
            ValueError: it is truncated, corrupt or of other layers; no layer was changed. Loading a later checkpoint
                skips it.
            HashTableFull: a layer with ``evict=None`` has no room for its rows; no layer was changed.
        """
        path = self._delta_path(self.sequence + 1)
        try:
            tensors, header = files.read(path, DELTA)
        except FileNotFoundError:
            manifest = read_manifest(self.path)
            if manifest is not None and manifest.sequence > self.sequence:
                raise DeltaGap(
                    f"delta {path} is gone, and the newest checkpoint stands at number {manifest.sequence}"
                ) from None
            return None
        what = f"delta {path}"
        parts = self.unpack(tensors, header, what)
        if header["lineage"] != self.lineage:
            raise DeltaGap(f"{what} does not follow the delta with number {self.sequence} that was applied here")
        with self._locked():
            rows = self.apply_parts(parts, what)
            self.sequence, self.lineage = header["sequence"], digest(header)
        return Contents(files.part(tensors, "beside/"), header["info"], rows)

    def apply_parts(self, parts: Mapping[str, tuple[dict, dict]], what: str) -> int:
        """Apply a delta's tensors and header to all layers if all fit; return the number of rows that were set."""
        with self._locked():
            for name, part in parts.items():
                self.layers[name]._check_delta(*part, f"{what}, layer {name!r}")
            return sum(self.layers[name]._take_delta(*part) for name, part in parts.items())

    def _deltas(self) -> list[tuple[int, Path]]:
        paths = self.path.glob("delta-*.safetensors")
        return [(int(p.stem.removeprefix("delta-")), p) for p in paths if p.stem.removeprefix("delta-").isdigit()]


def digest(header: Mapping[str, object]) -> str:
    """The checksum of a file's header, which contains the checksums of its tensors."""
    return hashlib.blake2b(json.dumps(header, sort_keys=True).encode(), digest_size=16).hexdigest()


def read_manifest(path: str | os.PathLike) -> Manifest | None:
    """The manifest of an :class:`EmbeddingFolder`; None before the first checkpoint.

    Raises:
        TypeError: ``path`` is not a path.
        ValueError: the file is not a manifest of this kind, or it is missing although the folder has checkpoints.
    """
    check_path("path", path)
    path = Path(path) / _MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        files.check_header(content, {"format": _FORMAT}, str(path))
        if content.get("number") == _FIRST_PENDING:
            return None
        kept = [(str(name), int(sequence)) for name, sequence in content["checkpoints"]]
        return Manifest(kept[0][1], content["info"], kept, content["number"])
    except FileNotFoundError:
        if orphans := sorted(path.parent.glob("checkpoint-*.safetensors")):
            raise ValueError(
                f"{path.parent} holds {len(orphans)} checkpoints, such as {orphans[-1].name}, and no {_MANIFEST}: "
                "restore it, or move them away to start over"
            ) from None
        return None
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"{path} is not a manifest of a gossamer.nn.EmbeddingFolder: {error!r}") from error
