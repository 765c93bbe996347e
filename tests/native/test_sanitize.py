"""The sanitizer build's compiler, which ``.ci/sanitize`` puts in front of the one that the extension is built with."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = """
#include <climits>
#include <vector>
int main(int argc, char**) {
  std::vector<int> numbers(2, INT_MAX);
  if (argc == 2) return numbers.data()[argc];
  if (argc == 3) return 1 << (argc + 40);
  return 0;
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_errors_end_a_program_that_it_compiled(tmp_path):
    """A read beyond an allocation, or a shift beyond a number's bits, ends a program at any optimisation level."""
    made = subprocess.run([ROOT / ".ci/sanitize", "--compiler"], capture_output=True, text=True, check=True)
    (tmp_path / "source.cpp").write_text(SOURCE)
    program = tmp_path / "program"
    flags = ["-std=c++20", "-O3", "-fwrapv", "-fno-math-errno", "-o", program]
    subprocess.run([made.stdout.strip(), tmp_path / "source.cpp", *flags], check=True)
    for arguments, message in (((), ""), (("a",), "heap-buffer-overflow"), (("a", "b"), "shift exponent")):
        run = subprocess.run([program, *arguments], capture_output=True, text=True)
        assert bool(run.returncode) == bool(message) and message in run.stderr, run.stderr
