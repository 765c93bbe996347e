"""Ranks that die while tables are looked up or saved: an error in time for the others, and nothing that is lost."""

from pathlib import Path

import processes
import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "support" / "dying_rank_cases.py"


@processes.needs_gloo
def test_others_are_told_and_go_on_with_what_was_committed(tmp_path):
    pytest.importorskip("safetensors")
    assert processes.run(SCRIPT, 4, tmp_path, killed=(1, 2, 3)) == [{"steps": 2}]
