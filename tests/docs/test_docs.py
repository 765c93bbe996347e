"""Documents do what they say: their Python runs, and what they link to exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"
DOCUMENTS = sorted(DOCS.glob("*.md"))
# Others have blocks that build on one another, and are run by the tests of what they are about.
ALONE = ("block-sparse", "block-sparse-layers", "migrating", "online-training")
BLOCKS = [
    pytest.param(source, id=f"{path.stem} {number}")
    for path in DOCUMENTS
    if path.stem in ALONE
    for number, source in enumerate(re.findall(r"^```python\n(.*?)^```", path.read_text(), re.M | re.S))
]


@pytest.mark.parametrize("source", BLOCKS)
def test_python_blocks_run(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a block may write a file beside it
    exec(compile(source, "docs", "exec"), {})


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_relative_links_resolve(path):
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text())
    assert [t for t in targets if not re.match(r"https?://", t) and not (path.parent / t).exists()] == []
