"""Folders of dynamic tables: checkpoints and deltas, whole, cut short or of something else."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import torch
from draws import ids, size
from subjects_tables import optimizer

from gossamer import nn


def embedding_folder(rng):
    """A trainer's folder, and a server that follows it; some files spoiled between."""
    made, dim = rng.choice((None, optimizer(rng))), size(rng, 1, 6)
    layer = nn.DynamicEmbedding(dim, capacity=32, pooling=None, optimizer=made, seed=1)
    args = {"layers": {"users": layer}, "keep": size(rng, 1, 3), "older": 0, "info": rng.choice((None, {"step": 3}))}
    args |= {"tensors": rng.choice((None, {"dense": torch.ones(2)})), "with_state": rng.random() < 0.5}
    args |= {"ids": ids(rng, 60, size(rng, 0, 8)), "path": "run"}
    cut, at = rng.choice((None, "manifest.json", "checkpoint-00000000.safetensors", "delta")), rng.random()

    def call(layers, path, keep, tensors, info, older, with_state, ids):
        with tempfile.TemporaryDirectory() as root:
            where = Path(root, path) if isinstance(path, str) else path
            layers = copy.deepcopy(layers)
            folder = nn.EmbeddingFolder(where, layers, keep=keep)
            for _ in range(2):
                for table in layers.values():
                    y = table(ids)
                    if y.requires_grad and y.numel():
                        y.square().sum().backward()
                folder.save(tensors, info)
                folder.export_delta(tensors, info, with_state=with_state)
            for file in where.glob(f"{cut}*") if cut else ():
                content = file.read_bytes()
                file.write_bytes(content[: int(at * len(content))])
            servers = {
                name: nn.DynamicEmbedding(table.dim, capacity=32, pooling=None, optimizer=made, seed=1)
                for name, table in layers.items()
            }
            follower = nn.EmbeddingFolder(where, servers, keep=keep)
            found = follower.load(older=older)
            follower.apply_next()
            rows = [table.table.export() for table in servers.values()]
        return torch.tensor(found is None), *(values[keys.argsort()] for keys, values, _ in rows)

    call.__qualname__ = "EmbeddingFolder"
    call.signature = ["checkpoint", "delta", "manifest", "header", "users", "dtype"]
    return call, args


SUBJECTS = (embedding_folder,)
