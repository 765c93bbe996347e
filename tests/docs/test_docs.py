"""Documents do what they say: their Python runs, and what they link to exists."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).resolve().parents[2] / "docs"
DOCUMENTS = sorted(DOCS.glob("*.md"))
BLOCKS = {path: re.findall(r"^```python\n(.*?)^```", path.read_text(), re.M | re.S) for path in DOCUMENTS}
FENCES = {path: len(re.findall(r"^ *```[ \t]*(?:python|py)\b", path.read_text(), re.M)) for path in DOCUMENTS}


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if FENCES[path]], ids=lambda path: path.stem)
def test_python_blocks_run(path, tmp_path, monkeypatch):
    """Run all blocks of a page in order, in one namespace."""
    monkeypatch.chdir(tmp_path)  # a block may write a file beside it
    assert len(BLOCKS[path]) == FENCES[path]
    names: dict = {}
    for number, source in enumerate(BLOCKS[path], 1):
        exec(compile(source, f"{path.name}, block {number}", "exec"), names)


@pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="this torch has no gloo"
)
def test_the_page_on_processes_runs_in_two(tmp_path):
    program = tmp_path / "program.py"
    program.write_text("\n".join(BLOCKS[DOCS / "parallel.md"]))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(program)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    # Both ranks have loaded what they saved together.
    assert done.stdout.count("{'step': 1}") == 2


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_relative_links_resolve(path):
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text())
    assert [t for t in targets if not re.match(r"https?://", t) and not (path.parent / t).exists()] == []
