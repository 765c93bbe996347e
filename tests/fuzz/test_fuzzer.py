"""A few hundred hostile calls; ``python tests/fuzz/fuzzer.py --cases N`` runs more."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import fuzzer


def test_hostile_calls_end_in_a_named_error_or_the_right_result():
    """No signal, no result that plain torch contradicts, no error without the name of an argument."""
    assert fuzzer.fuzz(0, 300) == []


def test_a_process_that_dies_is_a_finding(monkeypatch):
    """And the cases after it run."""
    died = "import json, os, sys; print(json.dumps({'begin': int(sys.argv[-2])}), flush=True); os.abort()"
    started = fuzzer.subprocess.Popen

    def popen(command, **options):
        return started([sys.executable, "-c", died, *command[-2:]], **options)

    monkeypatch.setattr(fuzzer.subprocess, "Popen", popen)
    findings = fuzzer.fuzz(7, 2)
    assert [(f["seed"], f["kind"], f["what"]) for f in findings] == [(s, "died", "exit status -6") for s in (7, 8)]
