"""The README does what it says: its Python runs, its commands and links exist, and CI runs its two commands."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import typer

from gossamer.bench.harness import readme
from gossamer.cli import app

ROOT = Path(__file__).resolve().parents[2]
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


def test_every_document_with_measured_tables_is_listed():
    marked = [p for p in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")] if readme.MARKED.search(p.read_text())]
    assert sorted(p.relative_to(ROOT).as_posix() for p in marked) == sorted(readme.DOCUMENTS)


def test_the_table_of_a_sweep():
    def case(tokens, direction, scale):
        times = {"a": tokens * scale * 1e-6, "b": tokens * scale * 2e-6}
        variants = [
            {"name": name, "status": "ok", "median": time, "peak_bytes": tokens * size}
            for (name, time), size in zip(times.items(), (1024, 4096), strict=True)
        ]
        return {"sizes": {"T": tokens}, "direction": direction, "dtype": "fp32", "variants": variants}

    directions = (("forward", 1), ("both", 3))
    cases = [case(tokens, direction, scale) for tokens in (1024, 4096) for direction, scale in directions]
    found = {"sweep": {"dimension": "tokens", "symbol": "T", "values": [1024, 4096]}, "cases": cases}
    head, _, first, second = readme.sweep(found).splitlines()
    times = " | ".join(f"{name}, {words}, ms" for words in ("forward", "forward+backward") for name in "ab")
    assert head == f"| tokens | {times} | a, MiB | b, MiB |"
    assert first == "| 1,024 | 1.02 | 2.05 | 3.07 | 6.14 | 1.00 | 4.00 |"
    assert second == "| 4,096 | 4.10 | 8.19 | 12 | 25 | 4.00 | 16 |"
    cases[0]["dtype"] = "bf16"
    with pytest.raises(ValueError, match="one dtype"):
        readme.sweep(found)


def test_the_table_of_compressed_tables():
    times = {"hash": ("ours", 2e-4), "dense": ("dense", 3e-4), "hash, plain torch": ("reference", 1e-3)}
    cases = [
        {
            "direction": direction,
            "variants": [
                {"name": name, "role": role, "status": "ok", "median": scale * time}
                for name, (role, time) in times.items()
            ],
        }
        for direction, scale in (("forward", 1), ("both", 10))
    ]
    head, _, row = readme.compressed({"cases": cases}).splitlines()
    each = "{0}, ms | {0}, times as fast | {0}, ratio to dense"
    assert head == f"| table | {each.format('forward')} | {each.format('step')} |"
    assert row == "| hash | 0.200 | 5.00 | 0.67 | 2.00 | 5.00 | 0.67 |"


@pytest.mark.parametrize("document", readme.DOCUMENTS)
def test_measured_tables_are_those_of_the_results(document):
    """The documents hold exactly what ``python -m gossamer.bench.harness.readme`` would write."""
    text = (ROOT / document).read_text()
    assert readme.MARKED.search(text)
    assert readme.rendered(text, ROOT) == text


def test_a_table_out_of_date_is_found_and_rewritten(tmp_path, capsys):
    results = {"cases": [{"family": "moe", "shape": "s", "dtype": "bf16", "direction": "both", "variants": []}]}
    results["cases"][0]["variants"] = [
        {"name": "gossamer", "status": "ok", "median": 0.0123456},
        {"name": "broken", "status": "wrong"},
        {"name": "dense", "status": "ok", "median": 0.00123456},
    ]
    (tmp_path / "r.json").write_text(json.dumps(results))
    stale = "before\n<!-- measured: r.json layer -->\nold\n<!-- end -->\nafter\n"
    (tmp_path / "D.md").write_text(stale)
    arguments = ["D.md", "--root", str(tmp_path)]
    assert readme.main([*arguments, "--check"]) == 1 and (tmp_path / "D.md").read_text() == stale
    assert readme.main(arguments) == 0 and readme.main([*arguments, "--check"]) == 0
    table = "| ms | gossamer | dense |\n|---|---|---|\n| bfloat16 forward+backward | 12 | 1.23 |\n"
    assert (tmp_path / "D.md").read_text() == stale.replace("old\n", table)
    capsys.readouterr()
    for wrong in (
        stale.replace("r.json", "none.json"),
        stale.replace("layer", "cake"),
        stale.replace("<!-- end", "<!--"),
    ):
        (tmp_path / "D.md").write_text(wrong)
        assert readme.main(arguments) == 2
        assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("path", sorted((ROOT / "bench" / "results").glob("*.json")), ids=lambda path: path.stem)
def test_results_say_where_they_come_from(path):
    """Every stored run names its commit, device and versions."""
    stored = json.loads(path.read_text())
    found = stored.get("environment", stored)
    assert re.fullmatch(r"[0-9a-f]{40}(\+changes)?", found["commit"]), "no commit"
    assert found.get("cpu") or found["device"]
    assert {"torch", "triton"} <= (found.get("versions") or found).keys()
