"""A process that writes an EmbeddingFolder is killed by SIGKILL at random moments: nothing committed is lost."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from gossamer import optim
from gossamer.nn import DynamicEmbedding, EmbeddingFolder, read_manifest

pytest.importorskip("safetensors")
if not hasattr(os, "fork"):
    pytest.skip("this system has no fork", allow_module_level=True)

KILLS = 100


def make() -> dict[str, DynamicEmbedding]:
    return {name: DynamicEmbedding(4, 64, seed=1, optimizer=optim.RowwiseAdagrad(lr=0.1)) for name in ("a", "b")}


def digest(layers: dict[str, DynamicEmbedding]) -> str:
    """Of all keys and rows."""
    found = hashlib.sha256()
    for _, layer in sorted(layers.items()):
        keys, values, _ = layer.table.export()
        order = keys.argsort()
        found.update(keys[order].numpy().tobytes() + values.detach()[order].numpy().tobytes())
    return found.hexdigest()


def train(layers: dict[str, DynamicEmbedding], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for layer in layers.values():
        layer(torch.randint(40, (16,), generator=generator)).square().sum().backward()


def write(path: Path, report: int) -> None:
    """Train and write for ever, from where the folder is; one line for each thing written that has returned."""
    folder = EmbeddingFolder(path, make())
    if folder.load() is None:
        folder.save(info={"digest": digest(folder.layers)})
    os.write(report, b"begin\n")
    for step in range(folder.sequence, sys.maxsize):
        train(folder.layers, step)
        now = digest(folder.layers)
        folder.export_delta(info={"digest": now})
        os.write(report, f"delta {folder.sequence} {now}\n".encode())
        if step % 2:
            folder.save(info={"digest": now})
            os.write(report, f"checkpoint {folder.sequence} {now}\n".encode())


def killed(path: Path, writes: int, share: float) -> list[list[str]]:
    """What a writer reported before it was killed: after so many writes, and a share of the time that one takes."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            write(path, writing)
        finally:
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading) as stream:
        first, start = stream.readline(), time.perf_counter()
        lines = [stream.readline() for _ in range(writes)]
        time.sleep(share * (time.perf_counter() - start) / writes)
        os.kill(child, signal.SIGKILL)
        lines += stream.readlines()
    _, status = os.waitpid(child, 0)
    assert first == "begin\n" and os.WTERMSIG(status) == signal.SIGKILL
    return [line.split() for line in lines]


def test_nothing_committed_is_lost(tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked process has none of the others
    try:
        chance, path = random.Random(0), tmp_path / "folder"
        committed, unfinished = {"delta": 0, "checkpoint": -1}, 0
        seen: dict[int, str] = {}
        for _ in range(KILLS):
            for kind, sequence, found in killed(path, chance.randint(1, 3), 1.2 * chance.random()):
                assert seen.setdefault(int(sequence), found) == found, "a resumed run went another way"
                committed[kind] = max(committed[kind], int(sequence))
            unfinished += bool(list(path.glob(".*.part")))
            reader = EmbeddingFolder(path, make())
            contents = reader.load()
            assert reader.sequence >= committed["checkpoint"]
            assert digest(reader.layers) == contents.info["digest"]
            while (after := reader.apply_next()) is not None:
                assert digest(reader.layers) == after.info["digest"]
            assert reader.sequence >= committed["delta"]
            for name, sequence in read_manifest(path).checkpoints:
                assert (path / name).is_file() and sequence <= reader.sequence
        assert committed["delta"] >= KILLS / 2 and committed["checkpoint"] > 0
        assert unfinished > 0, "no kill met a write"
    finally:
        torch.set_num_threads(threads)
