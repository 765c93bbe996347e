"""pytest-benchmark over the benchmark files: storage, comparison, regression limits and histograms."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

from gossamer.bench.harness import runner

ROOT = Path(__file__).resolve().parents[2]
RUNS = """
import json, sys, pytest
from pytest_benchmark.session import PerformanceRegression
root, store = sys.argv[1:]
common = ["-q", "-p", "no:cacheprovider", "--rootdir", root, root + "/bench/families/dispatch.py", "--benchmark-only",
          "--benchmark-max-time=0.01", "--benchmark-min-rounds=3", "--benchmark-storage=" + store + "/runs"]
limit = ["--benchmark-compare=0001", "--benchmark-compare-fail=min:1000000%"]
def run(*more):
    try:
        print("status", int(pytest.main(common + list(more))), flush=True)
    except PerformanceRegression as error:
        print("status 1", error, flush=True)
run("--benchmark-save=first")
try:
    import pygal
    run(*limit, "--benchmark-histogram=" + store + "/plot")
except ImportError:
    run(*limit)
from pathlib import Path
(stored,) = Path(store, "runs").glob("*/0001_first.json")
record = json.loads(stored.read_text())
for benchmark in record["benchmarks"]:
    for key in ("min", "max", "mean", "median", "q1", "q3"):
        benchmark["stats"][key] /= 1e9
stored.write_text(json.dumps(record))
run(*limit)
"""


def test_a_run_is_stored_compared_and_held_to_a_limit(tmp_path):
    # If this test runs in one of several workers, pytest-benchmark would take these runs for workers too.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    command = [sys.executable, "-c", RUNS, str(ROOT), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    statuses = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("status ")]
    assert statuses == [0, 0, 1], done.stdout + done.stderr
    (stored,) = (tmp_path / "runs").glob("*/0001_first.json")
    benchmarks = json.loads(stored.read_text())["benchmarks"]
    assert [b["name"] for b in benchmarks] == ["bench_dispatch[int-forward-ours]", "bench_dispatch[int-forward-dense]"]
    for benchmark in benchmarks:
        assert benchmark["extra_info"]["bytes"] > 0 and benchmark["extra_info"]["timed_by"]
        assert benchmark["group"].startswith("dispatch 1024,32,4")
    assert "(0001_first)" in done.stdout and "(NOW)" in done.stdout
    assert "Performance has regressed" in done.stdout
    try:
        import pygal  # noqa: F401
    except ImportError:
        return
    assert len(list(tmp_path.glob("plot*.svg"))) == 1


def test_every_family_has_small_sizes():
    spec = importlib.util.spec_from_file_location("bench_conftest", ROOT / "bench" / "conftest.py")
    conftest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)
    families = [runner.family(name) for name in runner.FAMILIES]
    assert {family.symbols for family in families} == conftest.SMALL.keys()
    for family in families:
        sizes = dict(zip(family.symbols, conftest.SMALL[family.symbols], strict=True))
        assert family.rule(sizes) is None, family.name
