"""Every Triton kernel compiles with no GPU for sm_80 to sm_120, within shared memory and without spills."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "support" / "aot_triton.py"
# Minutes of compiling on two cores, which another worker's tests share.
pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def rows():
    """Rows of the script's table, from a process of its own: this one may run kernels in the interpreter."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, SCRIPT, "--json", "--brief"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_kernels_compile_within_limits(rows):
    """No case fails to compile, spills or passes the shared memory limit, and no kernel lacks a case."""
    failures = [f"{r['kernel']} sm_{r['arch']} {r['case']}: {r['error']}" for r in rows if r["error"]]
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize(
    "module",
    [
        "dispatch",
        "block_sparse",
        "block_sparse_sampled",
        "gather_reduce",
        "gather_compose",
        "gather_compose_gradient",
        "gather_matmul",
        "gather_max",
        "sparse_update",
        "grouped_matmul",
        "expert_mlp",
        "split_matmul",
        "multi_low_rank",
        "topk_routing",
        "tree_routing",
        "product_key_topk",
        "activate",
        "map_ids",
        "low_rank",
        "causal_conv1d",
        "delta_rule_forward",
        "delta_rule_backward",
        "delta_rule_chunks",
        "delta_rule_gradients",
    ],
)
@pytest.mark.parametrize("arch", [80, 89, 90, 100, 120])
def test_every_primitive_is_compiled(rows, module, arch):
    """Each primitive has compiled cases for each architecture, so that an empty table does not pass."""
    assert any(r["module"] == module and r["arch"] == arch and "registers" in r for r in rows)


def test_no_triton_function_returns_none():
    """Triton 3.6, the oldest that is supported, compiles none that does; the one at hand may."""
    for path in (SCRIPT.parents[2] / "triton_kernels").glob("*.py"):
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in function.decorator_list):
                values = [n.value for n in ast.walk(function) if isinstance(n, ast.Return)]
                empty = [v for v in values if isinstance(v, ast.Constant) and v.value is None]
                assert not empty, f"{path.name}: {function.name}"
