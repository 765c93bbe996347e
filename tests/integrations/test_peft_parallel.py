"""PEFT's adapters of experts that transformers divided among two and four processes, against one process."""

from pathlib import Path

import processes
import pytest

pytest.importorskip("peft")
pytest.importorskip("transformers.distributed.expert_parallel")

SCRIPT = Path(__file__).resolve().parents[1] / "support" / "peft_parallel_cases.py"

pytestmark = processes.needs_gloo


each, results = processes.fixtures(SCRIPT)


@pytest.mark.parametrize("case", processes.cases_of(SCRIPT))
def test_in_processes(results, case):
    failures = [found[case] for found in results if found[case]]
    assert not failures, "\n".join(failures)
