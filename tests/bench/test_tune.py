"""Tiles: the choice as a pure function, tables read and written, and the tables that ship."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gossamer.triton_kernels import tile_tables
from gossamer.triton_kernels.tiles import FORMS, Problem, Tile, choose, row_bucket, shared_bytes, shared_limit

ROOT = Path(__file__).resolve().parents[2]
H100 = tile_tables.Device("NVIDIA H100 80GB HBM3", 90, shared_limit(90))


def problem(kernel="grouped_matmul", form="sorted", precision="bf16", rows=1000.0, experts=8, n=512, c=256):
    return Problem(kernel, form, precision, rows, experts, n, c)


@pytest.mark.parametrize(
    ("arch", "asked", "tile"),
    [
        (80, problem(), Tile(128, 128, 64, 8, 3)),
        (90, problem(), Tile(128, 256, 64, 8, 4, persistent=True)),
        (100, problem(), Tile(128, 256, 64, 8, 4)),
        (90, problem(n=128), Tile(128, 128, 64, 8, 3)),
        (90, problem(rows=97), Tile(128, 256, 64, 8, 4, persistent=True)),
        (90, problem(rows=96), Tile(64, 128, 64, 4, 4)),
        (80, problem(rows=32), Tile(32, 128, 64, 4, 3)),
        (80, problem(rows=0.5), Tile(16, 128, 64, 4, 3)),
        (90, problem(precision="fp32"), Tile(64, 64, 16, 4, 3)),
        (90, problem(precision="tf32", rows=16), Tile(16, 64, 16, 4, 3)),
        (90, problem("expert_mlp_up", "gated"), Tile(128, 128, 64, 8, 4, persistent=True)),
        (90, problem("expert_mlp_up", "ungated"), Tile(128, 256, 64, 8, 4, persistent=True)),
        (80, problem("expert_mlp_up", "interleaved", rows=20), Tile(32, 64, 64, 4, 3)),
        (80, problem("expert_mlp_up", "gated", "fp32"), Tile(64, 32, 16, 4, 3)),
        (90, problem("expert_mlp_down_backward", "gated"), Tile(128, 256, 64, 8, 3)),
        (90, problem("expert_mlp_down_backward", "interleaved"), Tile(128, 128, 64, 8, 3)),
        (100, problem("expert_mlp_down_backward", "gated"), Tile(128, 128, 64, 8, 3)),
        (90, problem("expert_mlp_down_backward", "gated", "fp32"), Tile(32, 64, 16, 4, 3)),
        (90, problem("grouped_matmul_dweight", "gathered"), Tile(128, 256, 64, 8, 6)),
        (90, problem("grouped_matmul_dweight", "padded"), Tile(128, 256, 64, 8, 3)),
        (80, problem("grouped_matmul_dweight", "gathered"), Tile(128, 128, 64, 8, 3)),
        (80, problem("grouped_matmul_dweight", "gathered", "fp32"), Tile(64, 64, 32, 4, 3)),
    ],
)
def test_choice_without_a_table(arch, asked, tile):
    """Each branch of each heuristic, on both sides of its bounds."""
    assert choose(asked, arch) == tile


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 103, 120])
def test_every_choice_fits_its_architecture(arch):
    """No heuristic asks for more shared memory than a program may have, even on consumer cards."""
    for kernel, forms in FORMS.items():
        for form in forms:
            for precision in ("bf16", "fp32"):
                for rows in (4, 40, 4000):
                    asked = problem(kernel, form, precision, rows)
                    if form != "padded" or (arch >= 90 and precision == "bf16"):
                        assert shared_bytes(asked, choose(asked, arch)) <= shared_limit(arch)


def test_a_table_goes_before_the_heuristic_for_its_bucket_alone():
    tile = Tile(64, 64, 32, 4, 2)
    table = {problem(rows=1024).key: tile}
    assert choose(problem(rows=513), 90, table) == choose(problem(rows=1024), 90, table) == tile
    others = [problem(rows=512), problem(rows=1025), problem(n=513), problem(c=255), problem(experts=9)]
    others += [problem(form="gathered"), problem(precision="fp16")]
    for other in others:
        assert choose(other, 90, table) == choose(other, 90)


def test_buckets_are_powers_of_two():
    assert [row_bucket(rows) for rows in (0, 1, 16, 16.5, 32, 33, 1000, 1024)] == [16, 16, 16, 32, 32, 64, 1024, 1024]


@pytest.fixture
def stored():
    """A table of one entry, as plain values, for the H100 and these versions."""
    entry = tile_tables.Entry(problem(rows=1024), Tile(128, 128, 64, 8, 3), 0.5, 0.6)
    versions = {name: tile_tables.version(name) for name in tile_tables.PINNED}
    provenance = {"date": "2026-01-01", "versions": versions, "commit": None, "command": "gossamer tune"}
    return tile_tables.as_json(H100, [entry], provenance)


def test_a_table_is_written_and_read_back(stored, tmp_path):
    path = tmp_path / "new" / "table.json"
    tile_tables.write(path, stored)
    tile_tables.write(path, stored)
    (entry,) = tile_tables.read(path, H100, pinned=True)
    assert (entry.problem, entry.tile) == (problem(rows=1024), Tile(128, 128, 64, 8, 3))
    assert [p.name for p in path.parent.iterdir()] == ["table.json"]


def _set(*path_and_value):
    *path, last, value = path_and_value

    def change(table):
        for step in path:
            table = table[step]
        table[last] = value

    return change


ENTRY = ("entries", 0)
FAULTS = {
    "schema": (_set("schema", 2), "its schema is 2, not 1"),
    "device": (_set("device", "NVIDIA A100"), "it was measured on 'NVIDIA A100'"),
    "capability": (_set("capability", "8.0"), "of capability '8.0'"),
    "triton": (_set("versions", "triton", "3.0.0"), "it was measured with triton 3.0.0, not"),
    "gossamer": (_set("versions", "gossamer", "0.0.1"), "run gossamer tune again"),
    "extra field": (_set("comment", "hello"), "it must have the fields"),
    "entries": (_set("entries", {}), "its entries a list"),
    "kernel": (_set(*ENTRY, "kernel", "__import__"), "there is no kernel '__import__'"),
    "form": (_set(*ENTRY, "form", ["sorted"]), "there is no kernel"),
    "precision": (_set(*ENTRY, "precision", "int8"), "precision must be one of"),
    "rows": (_set(*ENTRY, "rows", 1000), "rows must be a power of two"),
    "size": (_set(*ENTRY, "n", True), "n must be a positive integer, got True"),
    "time": (_set(*ENTRY, "milliseconds", float("nan")), "milliseconds must be a positive number"),
    "tile field": (_set(*ENTRY, "tile", {"block_m": 64}), "tile must have the fields"),
    "tile type": (_set(*ENTRY, "tile", "block_m", "64"), "block_m must be of type int, got '64'"),
    "tile range": (_set(*ENTRY, "tile", "block_m", 96), "block_m must be a power of two from 16 to 256, got 96"),
    "stages": (_set(*ENTRY, "tile", "num_stages", 0), "num_stages must be from 1 to 8"),
    "shared memory": (_set(*ENTRY, "tile", "num_stages", 8), "bytes of shared memory are more than 232448"),
    "accumulators": (_set(*ENTRY, "tile", "num_warps", 2), "accumulators a thread are more than 128"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_table_is_ignored_with_a_warning_that_names_it(name, stored, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tile_tables, "SHIPPED", tmp_path / "none")
    path = tile_tables.cache_folder() / H100.file_name
    change, message = FAULTS[name]
    tile_tables.write(path, stored)
    assert len(tile_tables.table_of(H100)) == 1
    change(stored)
    tile_tables.write(path, stored)
    with pytest.warns(UserWarning, match="gossamer ignores the table of tiles") as caught:
        assert tile_tables.table_of(H100) == {}
    assert str(path) in str(caught[0].message) and message in str(caught[0].message)


@pytest.mark.parametrize("content", [b"", b"\x80\x04K\x01.", b"[1]", b"[" * 100000, b" " * (5 << 20)])
def test_a_file_that_is_no_table_is_refused(content, tmp_path):
    path = tmp_path / "table.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"not JSON|must have the fields|bytes are more than"):
        tile_tables.read(path, H100, pinned=True)


def test_the_cache_folder_follows_the_convention(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert tile_tables.cache_folder() == Path("/somewhere/gossamer/tiles")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", "/home/someone")
    assert tile_tables.cache_folder() == Path("/home/someone/.cache/gossamer/tiles")


def test_the_users_entries_go_before_those_that_ship(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (shipped,) = tile_tables.shipped(H100)
    mine = tile_tables.Entry(shipped.entries[0].problem, Tile(64, 64, 64, 4, 2), 0.1, 0.2)
    versions = {name: tile_tables.version(name) for name in tile_tables.PINNED}
    provenance = {"date": "", "versions": versions, "commit": None, "command": ""}
    path = tile_tables.cache_folder() / H100.file_name
    tile_tables.write(path, tile_tables.as_json(H100, [mine], provenance))
    table = tile_tables.table_of(H100)
    assert len(table) == len(shipped.entries)
    assert choose(mine.problem, 90, table) == mine.tile


@pytest.mark.parametrize("path", sorted(tile_tables.SHIPPED.glob("*.json")), ids=lambda path: path.stem)
def test_tables_that_ship_are_what_was_measured(path):
    """Each loads for its card, and each entry's time is in the results that it names, at its tile."""
    table = json.loads(path.read_text())
    arch = int(table["capability"].replace(".", ""))
    device = tile_tables.Device(table["device"], arch, shared_limit(arch))
    assert device.file_name == path.name
    (source,) = tile_tables.shipped(device)
    assert source.fault is None and source.entries
    for entry in source.entries:
        assert choose(entry.problem, arch, tile_tables.table_of(device)) == entry.tile
        file, rest = entry.source.split(", run ")
        run, rest = rest.split(", ", 1)
        shape, label = rest.split(": ")
        results = json.loads((ROOT / file).read_text())
        assert results["device"] == device.name
        assert entry.milliseconds == min(results["runs"][int(run) - 1]["ms"][shape][label])
        tile = entry.tile
        words = f"{tile.block_m}x{tile.block_n}x{tile.block_k} warps {tile.num_warps} stages {tile.num_stages} "
        assert words + f"group {tile.group_m}" + " persistent" * tile.persistent in label
        assert entry.tile == choose(entry.problem, arch) or entry.milliseconds < 0.97 * entry.default_milliseconds


COMPILE = """
import json
from gossamer.bench.harness import tune, tune_targets
from gossamer.triton_kernels import ahead_of_time, tile_tables
from gossamer.triton_kernels.tiles import Problem, Tile, choose
device = tile_tables.Device("NVIDIA H100 80GB HBM3", 90, 227 * 1024)
for source in tile_tables.shipped(device):
    for entry in source.entries:
        if entry.tile != choose(entry.problem, 90):
            print(json.dumps([str(entry), tune.unfit(entry.problem, entry.tile, device)]))
tight = Problem("expert_mlp_down_backward", "interleaved", "bf16", 1024, 8, 512, 512)
print(json.dumps(["tight", tune.unfit(tight, Tile(128, 256, 64, 8, 3), device)]))
"""


def test_entries_that_ship_compile_and_a_tile_that_spills_is_found_out():
    """In a process that compiles; entries that are the heuristic's choice are compiled with the kernels' own cases."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *entries, tight = map(json.loads, done.stdout.splitlines())
    assert len(entries) >= 1
    assert [reason for _, reason in entries] == [None] * len(entries), entries
    assert tight == ["tight", "spills registers"]


def test_a_device_reads_its_table_once(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked = []
    monkeypatch.setattr(tile_tables, "cuda_device", lambda index: asked.append(index) or H100)
    tile_tables.device_table.cache_clear()
    try:
        assert tile_tables.device_table(7) is tile_tables.device_table(7)
        assert asked == [7] and tile_tables.device_table(7)
    finally:
        tile_tables.device_table.cache_clear()
