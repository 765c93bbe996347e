"""A folder for dynamic embeddings whose ids are distributed over processes, with one part per process."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from gossamer._checks import check_path, check_positive, check_sizes
from gossamer.nn import DeltaGap, DynamicEmbedding, EmbeddingFolder, read_manifest
from gossamer.nn.embeddings import files
from gossamer.nn.embeddings.embedding_folder import CHECKPOINT, DELTA, Contents, digest
from gossamer.ops.hash_table import HashTableFull
from gossamer.parallel.exchange import raise_together
from gossamer.parallel.table_layers import ShardedDynamicEmbedding

_MANIFEST, _FORMAT = "shards.json", 1


class Committed(NamedTuple):
    """One checkpoint of all processes.

    Attributes:
        shards: number of processes that saved it.
        names: names of its files, one per process.
        sequence: number of the last delta that it includes.
        info: the ``info`` given to :meth:`ShardedEmbeddingFolder.save`.
    """

    shards: int
    names: list[str]
    sequence: int
    info: dict


class ShardedEmbeddingFolder:
    """:class:`gossamer.nn.EmbeddingFolder` for sharded layers: every process writes and reads its own ids.

    Each of W processes has its own ``EmbeddingFolder``, ``r-of-W``. A checkpoint is committed when ``shards.json``,
    replaced last, names the files of all processes; if a process is killed at any moment, the previous checkpoint stays
    valid. A delta is complete once every process has written its part. Every process must make the same calls, except a
    server of unsharded layers, which reads on its own.

    Another number of processes can load the checkpoints and apply the deltas. Each process then reads all parts and
    takes its own ids (exact admission counts are kept, a sketch's counts start over), and exports deltas again after
    its first :meth:`save`.

    Args:
        path: the folder, on a file system that all processes share.
        layers: layers by name, without ``/`` in names: all sharded over one mesh, or, to read from a single process,
            all unsharded.
        keep: checkpoints to keep, with the deltas after the oldest.

    Attributes:
        sequence: number of the last delta exported or applied.
        resharded: whether the loaded state was saved by another number of processes and has not been saved since.

    Raises:
        TypeError, ValueError: an argument is invalid.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        layers: Mapping[str, ShardedDynamicEmbedding] | Mapping[str, DynamicEmbedding],
        *,
        keep: int = 2,
    ) -> None:
        check_positive(keep=keep)
        check_path("path", path)
        if not isinstance(layers, Mapping):
            raise TypeError(f"layers must be a mapping, got {type(layers).__name__}")
        kinds = {type(layer) for layer in layers.values()}
        if kinds not in ({ShardedDynamicEmbedding}, {DynamicEmbedding}):
            names = sorted(kind.__name__ for kind in kinds)
            raise TypeError(f"layers must be ShardedDynamicEmbedding, or DynamicEmbedding to follow alone, got {names}")
        self.path, self.keep = Path(path), keep
        self._group, self._mine = None, {}
        if kinds == {ShardedDynamicEmbedding}:
            groups = {layer.group for layer in layers.values()}
            if len(groups) > 1:
                raise ValueError(f"layers must be sharded over one mesh, got {len(groups)}")
            self._group, self._mine = groups.pop(), {name: layer.mine for name, layer in layers.items()}
        self.rank = 0 if self._group is None else dist.get_rank(self._group)
        self.shards = 1 if self._group is None else dist.get_world_size(self._group)
        local = {name: layer if self._group is None else layer.local for name, layer in layers.items()}
        # One more than the common number, since this process may have saved a checkpoint that others have not.
        self._own = EmbeddingFolder(self._part(self.rank, self.shards), local, keep=keep + 1)
        self._lineages: dict[int, str | None] = {}
        self._saved_shards = self.shards
        self.sequence, self.resharded = 0, False

    def _part(self, rank: int, shards: int) -> Path:
        return self.path / f"{rank}-of-{shards}"

    def _together(self, call: Callable[[], object]) -> object:
        """Make a local call, and return its result if the calls of all processes succeeded."""
        if self._group is None:
            return call()
        result = error = None
        try:
            result = call()
        except Exception as problem:
            error = problem
        raise_together(error, self._group, kinds=(DeltaGap, HashTableFull))
        return result

    def _first(self, call: Callable[[], object]) -> object:
        """The first process's result, on all processes."""
        found = [self._together(call if self.rank == 0 else lambda: None)]
        if self._group is not None:
            dist.broadcast_object_list(found, src=dist.get_global_rank(self._group, 0), group=self._group)
        return found[0]

    def committed(self) -> list[Committed]:
        """:meth:`committed_in` this folder."""
        return self.committed_in(self.path)

    @staticmethod
    def committed_in(path: str | os.PathLike) -> list[Committed]:
        """The checkpoints in a folder that all processes have saved, newest first.

        Raises:
            ValueError: the manifest is corrupt.
        """
        path = Path(path) / _MANIFEST
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            files.check_header(content, {"format": _FORMAT}, str(path))
            return [Committed(**each) for each in content["checkpoints"]]
        except FileNotFoundError:
            return []
        except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a manifest of a ShardedEmbeddingFolder: {error!r}") from error

    def save(self, tensors: Mapping[str, torch.Tensor] | None = None, info: dict | None = None) -> None:
        """Write a checkpoint of all processes, then commit it; then remove obsolete files.

        Args:
            tensors: additional tensors to save, the same on every process; the first process writes them.
            info: what else; anything that JSON holds.

        Raises:
            ValueError: the layers are unsharded, so this process only reads.
        """
        if self._group is None:
            raise ValueError("layers must be sharded to be saved here; gossamer.nn.EmbeddingFolder saves others")
        before = self._first(self.committed)
        mine = self._together(lambda: self._own.save(tensors if self.rank == 0 else None, info).name)
        names: list[str] = [""] * self.shards
        dist.all_gather_object(names, mine, group=self._group)

        def commit() -> None:
            # Checkpoints of other numbers of processes are superseded by the first one of this number.
            older = [each for each in before if each.shards == self.shards]
            kept = [Committed(self.shards, names, self.sequence, info or {}), *older][: self.keep]
            content = {"format": _FORMAT, "checkpoints": [each._asdict() for each in kept]}
            with files.replacing(self.path / _MANIFEST) as part:
                part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            for folder in self.path.glob("*-of-*"):
                if not folder.name.endswith(f"-of-{self.shards}"):
                    shutil.rmtree(folder, ignore_errors=True)

        self._first(commit)
        self.resharded, self._saved_shards = False, self.shards
        self._lineages = {self.rank: self._own.lineage}

    def load(self, *, older: int = 0) -> Contents | None:
        """Load the newest checkpoint that all processes saved; returns None if there is none.

        With the same number of processes that saved it, training continues bit for bit.

        Args:
            older: load the checkpoint this many before the newest, out of the ``keep`` kept ones.

        Returns:
            The additional data, and the number of this process's rows.

        Raises:
            ValueError: manifest or files are corrupt or belong to other layers, or ``older`` exceeds the kept
                checkpoints.
        """
        check_sizes(older=older)
        kept = self._first(self.committed)
        if not kept and not older:
            return None
        if not 0 <= older < len(kept):
            raise ValueError(f"older must be in [0, {len(kept)}), the checkpoints kept, got {older}")
        chosen = Committed(*kept[older])
        same = chosen.shards == self.shards and self._group is not None
        contents = self._together(lambda: self._load_own(chosen) if same else self._load_all(chosen))
        self.sequence, self._saved_shards, self.resharded = chosen.sequence, chosen.shards, not same
        return contents._replace(tensors=self._first(lambda: contents.tensors))

    def _load_own(self, chosen: Committed) -> Contents:
        kept = [name for name, _ in read_manifest(self._own.path).checkpoints]
        if chosen.names[self.rank] not in kept:
            raise ValueError(f"{self._own.path} lacks {chosen.names[self.rank]}, which {_MANIFEST} names")
        contents = self._own.load(older=kept.index(chosen.names[self.rank]))
        self._lineages = {self.rank: self._own.lineage}
        return contents

    def _load_all(self, chosen: Committed) -> Contents:
        """Load this process's ids from the files of all processes that saved."""
        parts: dict[str, list] = {name: [] for name in self._own.layers}
        lineages, beside = {}, {}
        for shard in range(chosen.shards):
            path = self._part(shard, chosen.shards) / chosen.names[shard]
            tensors, header = files.read(path, CHECKPOINT)
            for name, part in self._own.unpack(tensors, header, f"checkpoint {path}").items():
                parts[name].append(part)
            lineages[shard] = header["lineage"] or digest(header)
            beside |= files.part(tensors, "beside/")
        for name, layer in self._own.layers.items():
            layer.merge(parts[name], self._mine.get(name, _all), f"layer {name!r} in {self.path}")
        self._lineages = lineages
        rows = sum(len(layer) for layer in self._own.layers.values())
        return Contents(beside, chosen.info, rows)

    def export_delta(
        self,
        tensors: Mapping[str, torch.Tensor] | None = None,
        info: dict | None = None,
        *,
        with_state: bool = False,
    ) -> int:
        """Write this process's rows that changed; returns their number.

        Args:
            tensors: additional tensors, the same on every process; the first process writes them.
            info: what else; anything that JSON holds.
            with_state: write optimizer state and ages too.

        Raises:
            ValueError: there is no checkpoint of this number of processes that the delta could follow.
        """
        if self._group is None or self.resharded:
            raise ValueError("deltas follow a checkpoint of the same number of processes: save() one first")
        given = tensors if self.rank == 0 else None
        rows = self._together(lambda: self._own.export_delta(given, info, with_state=with_state))
        self.sequence = self._own.sequence
        self._lineages = {self.rank: self._own.lineage}
        return rows

    def apply_next(self) -> Contents | None:
        """Apply the delta after :attr:`sequence` to all layers; returns None until every process has written its part.

        Raises:
            DeltaGap: the delta was removed, or does not follow the last applied one; call :meth:`load` and continue.
            ValueError: it is truncated, corrupt or of other layers.
            HashTableFull: a layer with ``evict=None`` has no room for its rows.
        """
        number = self.sequence + 1
        name = f"delta-{number:08d}.safetensors"
        paths = [self._part(shard, self._saved_shards) / name for shard in range(self._saved_shards)]

        def ready() -> bool:
            if all(path.is_file() for path in paths):
                return True
            newest = self.committed()
            if newest and (newest[0].sequence > self.sequence or newest[0].shards != self._saved_shards):
                raise DeltaGap(
                    f"delta {number} of {self.path} is gone, and the newest checkpoint stands at number "
                    f"{newest[0].sequence} of {newest[0].shards} processes"
                )
            return False

        if not self._first(ready):
            return None
        contents = self._together(lambda: self._apply(paths))
        self.sequence = number
        return contents._replace(tensors=self._first(lambda: contents.tensors))

    def _apply(self, paths: list[Path]) -> Contents:
        alone = self._saved_shards == self.shards and self._group is not None
        layers: dict[str, list] = {name: [] for name in self._own.layers}
        lineages, beside, info = {}, {}, {}
        for shard in [self.rank] if alone else range(len(paths)):
            tensors, header = files.read(paths[shard], DELTA)
            if header["lineage"] != self._lineages.get(shard):
                raise DeltaGap(f"delta {paths[shard]} does not follow the delta that was applied here")
            lineages[shard], info = digest(header), header["info"]
            beside |= files.part(tensors, "beside/")
            for name, part in self._own.unpack(tensors, header, f"delta {paths[shard]}").items():
                layers[name].append(part)
        own = {name: _joined(parts, self._mine.get(name, _all)) for name, parts in layers.items()}
        rows = self._own.apply_parts(own, f"delta {paths[0].name} of {self.path}")
        if alone:
            self._own.sequence, self._own.lineage = self.sequence + 1, lineages[self.rank]
        self._lineages = lineages
        return Contents(beside, info, rows)


def _all(ids: torch.Tensor) -> torch.Tensor:
    return torch.ones(ids.shape, dtype=torch.bool)


def _joined(parts: list[tuple[dict, dict]], keep: Callable[[torch.Tensor], torch.Tensor]) -> tuple[dict, dict]:
    """One delta with the ids that ``keep`` selects from the deltas of several processes."""
    found: dict[str, list[torch.Tensor]] = {}
    for tensors, _ in parts:
        rows, removed = keep(tensors["keys"]), keep(tensors["removed"])
        for name, tensor in tensors.items():
            chosen = tensor if name == "optimizer.step" else tensor[removed if name == "removed" else rows]
            found.setdefault(name, []).append(chosen)
    joined = {name: pieces[0] if name == "optimizer.step" else torch.cat(pieces) for name, pieces in found.items()}
    return joined, parts[0][1]
