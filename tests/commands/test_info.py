"""``gossamer info``: what a bug report needs, and which tables of tiles are in use."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import types

import pytest
import torch
from typer.testing import CliRunner

from gossamer import _backend, _environment
from gossamer.cli import app
from gossamer.triton_kernels import tile_tables


def info(*arguments):
    result = CliRunner().invoke(app, ["info", *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


@pytest.fixture
def h100(monkeypatch, tmp_path):
    """Torch says that there is an H100; no kernel is run."""
    card = types.SimpleNamespace(name="NVIDIA H100 80GB HBM3", major=9, minor=0, total_memory=80 << 30)
    card.multi_processor_count, card.shared_memory_per_block_optin = 132, 227 * 1024
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(_environment, "served_by", dict)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return card


def test_it_names_commit_instructions_and_threads():
    text, stored = info(), json.loads(info("--json"))
    assert f"commit: {stored['commit'] or 'not a checkout'}\n" in text
    assert stored["commit"] is None or re.fullmatch(r"[0-9a-f]{40}(\+changes)?", stored["commit"])
    assert f"; native kernels use {stored['native_isa'] or 'none'}\n" in text
    assert (stored["native_isa"] is None) == (_backend.native_unavailable() is not None)
    assert f"{stored['threads']} threads\n" in text and stored["threads"] == torch.get_num_threads()
    assert f"tiles: yours are kept in {tile_tables.cache_folder()}\n" in text


@pytest.mark.skipif(_backend.native_unavailable() is not None, reason="there are no native kernels")
def test_a_build_that_lacks_the_best_instruction_set_says_so(monkeypatch):
    """It says so in one warning when it is imported, and in what ``gossamer info`` prints."""
    from gossamer import _C

    assert _C.isa() in _C.compiled_isas and "generic" in _C.compiled_isas
    monkeypatch.setattr(_C, "best_isa", lambda: "avx2048")
    assert _backend.missing_isa() == "avx2048"
    assert "compiled without kernels for avx2048, the best instruction set of this processor" in info()
    assert json.loads(info("--json"))["missing_isa"] == "avx2048"
    monkeypatch.setattr(_C, "best_isa", lambda: "generic")
    assert _backend.missing_isa() is None and "compiled without" not in info()
    assert json.loads(info("--json"))["missing_isa"] is None


def test_the_warning_is_given_once_at_import():
    code = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import gossamer._C
    gossamer._C.best_isa = lambda: "avx2048"
    import gossamer
    import importlib, gossamer._backend
    importlib.reload(gossamer._backend)
found = [str(w.message) for w in caught if "avx2048" in str(w.message)]
assert len(found) == 1 and found[0].startswith("gossamer was compiled without kernels for avx2048"), found
"""
    if _backend.native_unavailable():
        pytest.skip("there are no native kernels")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_it_names_the_tables_in_use_and_why_one_is_not(h100):
    mine = tile_tables.cache_folder() / "nvidia-h100-80gb-hbm3.json"
    mine.parent.mkdir(parents=True)
    mine.write_text("{}")
    lines = [line for line in info().splitlines() if line.startswith("tiles of ")]
    shipped, ignored = lines
    assert shipped == f"tiles of {h100.name}: {tile_tables.SHIPPED / mine.name}: 20 entries"
    assert ignored.startswith(f"tiles of {h100.name}: {mine}: ignored, it must have the fields ")
    stored = json.loads(info("--json"))["tiles"]["tables"]
    assert [table["entries"] for table in stored] == [20, 0] and stored[0]["ignored"] is None


def test_it_says_where_there_is_no_table(h100):
    h100.name = "NVIDIA A100-SXM4-80GB"
    assert "tiles of NVIDIA A100-SXM4-80GB: no table; chosen from shape and architecture\n" in info()
