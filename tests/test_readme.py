"""The README does what it says: its Python runs, its commands and links exist, and CI runs its two commands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from gossamer.cli import app

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"^```python\n(.*?)^```", TEXT, re.M | re.S)
SHELL = re.findall(r"^```sh\n(.*?)^```", TEXT, re.M | re.S)
COMMANDS = [line.split(" #")[0].strip() for block in SHELL for line in block.splitlines()]
COMMANDS += [code for code in re.findall(r"`([^`\n]+)`", TEXT) if code.startswith("gossamer ")]
GOSSAMER = [part.strip() for line in COMMANDS for part in line.split("&&") if part.strip().startswith("gossamer ")]


def test_there_is_something_to_check():
    assert len(PYTHON) >= 2 and len(GOSSAMER) >= 3


@pytest.mark.parametrize("source", PYTHON, ids=lambda source: f"{len(source.splitlines())} lines")
def test_python_blocks_run(source):
    for package in ("peft", "transformers"):
        if f"from {package} import" in source:
            pytest.importorskip(package)
    exec(compile(source, str(ROOT / "README.md"), "exec"), {})


@pytest.mark.parametrize("command", sorted(set(GOSSAMER)))
def test_commands_and_their_options_exist(command):
    """Parsed by the command line itself, without running it; an unknown command or option raises."""
    _, name, *arguments = shlex.split(command)
    found = typer.main.get_command(app).commands[name]
    found.make_context(name, arguments)


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_relative_links_resolve(document):
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / document).read_text())
    missing = [t for t in targets if not re.match(r"https?://", t) and not (ROOT / t).exists()]
    assert missing == []


def test_ci_runs_the_two_commands_of_the_readme():
    ci = (ROOT / ".ci" / "run").read_text()
    two = [c for c in COMMANDS if c.startswith("pip install")]
    assert len(two) == 2
    for command in two:
        assert f'step "{command}"\n' in ci


def test_no_text_waits_to_be_filled_in():
    for document in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        assert not re.search(r"TODO|TBD|FIXME|XXX|coming soon", (ROOT / document).read_text())
