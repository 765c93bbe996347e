"""The scripts for owners of a GPU, with commands in the place of theirs that write down how they are called."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gossamer import _backend
from gossamer.bench.harness import runner

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ("gpu_check", "hopper_check")
COMMANDS = ("python3", "pip", "pytest", "gossamer", "compute-sanitizer")

if not (ROOT / "bench" / "gpu_check.sh").is_file() or shutil.which("bash") is None:
    pytest.skip("there is no checkout, or no bash", allow_module_level=True)


def run(script, folder, failing="no command"):
    """The exit status, what was printed, and the commands that a script runs, of which one may fail."""
    log = folder / "log"
    log.write_text("")
    for name in COMMANDS:
        path = folder / name
        # Quoted as a shell reads it; the programs that python3 reads from its input are not its arguments.
        path.write_text(
            f"""#!/bin/bash
printf '%q ' {name} "$@" >> {log}; echo >> {log}
case "{name} $*" in
  *get_device_name*) echo some-card ;;
  *"{failing}"*) exit 1 ;;
esac
"""
        )
        path.chmod(0o755)
    environment = {"PATH": f"{folder}:/usr/bin:/bin"}
    command = ["bash", str(ROOT / "bench" / f"{script}.sh"), str(folder / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout + done.stderr, [shlex.split(line) for line in log.read_text().splitlines()]


def option(command, name):
    """The value that follows an option, or None."""
    return command[command.index(name) + 1] if name in command else None


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_command_is_one(script, tmp_path):
    """The tests that a script names exist, its benchmark commands parse, and no file is written twice."""
    status, printed, commands = run(script, tmp_path)
    assert status == 0, printed
    named = [word for command in commands for word in command if word.startswith("tests/") and word.endswith(".py")]
    named += [word for command in commands for word in command if re.match(r"tests/[\w/]+\.py::", word)]
    assert len(named) > 10
    for name in named:
        path, _, function = name.partition("::")
        assert (ROOT / path).is_file(), name
        assert not function or re.search(rf"^def {function}\(", (ROOT / path).read_text(), re.MULTILINE), name
    # This includes commands that python3 runs with a setting of its own.
    benchmarks = [["gossamer", *command[command.index("bench") :]] for command in commands if "bench" in command]
    assert len(benchmarks) >= 8
    for command in benchmarks:
        chosen = runner.family(command[2])
        wanted = "none" if option(command, "--peers") == "SonicMoE" else option(command, "--peers") or "all"
        asked = {name: option(command, f"--{name}") for name in ("shape", "dtype", "skew")}
        asked["skew"] = asked["skew"] or "uniform"
        assert runner.requests(chosen, torch.device("cuda"), peers=wanted, **asked), command
        assert option(command, "--device") == "cuda"
        assert option(command, "--peers") != "SonicMoE" or "SonicMoE" in {peer.name for peer in chosen.peers}
    files = [option(command, "--json") for command in benchmarks]
    assert len(set(files)) == len(files) and all(name.endswith("some-card.json") for name in files)


def test_steps_go_on_after_one_that_fails(tmp_path):
    """One shape of four fails: the others are measured, the checks run, and the exit status tells."""
    failing = "bench moe --shape fine-grained --dtype bf16 --device cuda --peers none"
    status, printed, commands = run("hopper_check", tmp_path, failing)
    assert status == 1
    assert printed.endswith("failed: layer, fine-grained\n")
    assert sum(command[:2] == ["gossamer", "bench"] for command in commands) == 8
    tools = [command[2] for command in commands if command[0] == "compute-sanitizer"]
    assert tools == ["memcheck"] * 2 + ["racecheck"] * 2


def test_the_command_line_with_blocks_alone():
    """What the script has python3 run is gossamer's command line, after a setting that the compiled module has."""
    if reason := _backend.cuda_kernels_unavailable():
        pytest.skip(reason)
    text = (ROOT / "bench" / "hopper_check.sh").read_text()
    program = re.search(r"^alone='(.*)'$", text, re.MULTILINE)[1]
    command = [sys.executable, "-c", program, "bench", "moe", "--shape", "no-such"]
    done = subprocess.run(command, env={**os.environ, "PYTHONSAFEPATH": "1"}, capture_output=True, text=True)
    assert done.returncode != 0 and "--shape must be one of" in done.stderr, done.stderr
