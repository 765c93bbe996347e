"""What is shipped: sdist and wheel, an install without a compiler, imports, and the build script's decisions."""

from __future__ import annotations

import glob
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import setuptools

import gossamer

# As it was before any test ran: libraries write to it, and a compiler that they name need not link C++.
ENVIRONMENT = dict(os.environ)
SEARCH_PATH = ENVIRONMENT.get("PATH", "")
ROOT = Path(__file__).resolve().parent.parent
IGNORED = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "*.so", "__pycache__")


def run(*command: str, cwd: Path = ROOT, ok: bool = True, **environment: str) -> subprocess.CompletedProcess:
    clean = {k: v for k, v in ENVIRONMENT.items() if k not in ("TRITON_INTERPRET", "PYTHONPATH", "GOSSAMER_CUDA")}
    done = subprocess.run(command, cwd=cwd, env=clean | environment, capture_output=True, text=True)
    assert done.returncode == 0 or not ok, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def python(code: str, **options) -> subprocess.CompletedProcess:
    return run(sys.executable, "-c", code, **options)


def pip(*arguments: str, **options) -> subprocess.CompletedProcess:
    offline = ("--no-deps", "--no-build-isolation", "--no-index", "-v")
    return run(sys.executable, "-m", "pip", *arguments, *offline, **options)


def installed_python(target: Path, code: str) -> str:
    """What ``code`` prints with the gossamer in ``target``, and no other: an editable one would lend its modules."""
    alone = "import sys; sys.meta_path = [f for f in sys.meta_path if 'Editable' not in repr(f)]\n"
    return python(alone + code, cwd=target.parent, PYTHONPATH=str(target)).stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """The sdist of this tree, unpacked; made from a copy, so that the checkout stays clean."""
    folder = tmp_path_factory.mktemp("sdist")
    shutil.copytree(ROOT, folder / "tree", ignore=IGNORED)
    code = f"from setuptools.build_meta import build_sdist; build_sdist({str(folder)!r})"
    done = python(code, cwd=folder / "tree")
    assert "Deprecat" not in done.stderr
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


@pytest.fixture
def source(sdist, tmp_path) -> Path:
    """A copy that a test may build in."""
    return shutil.copytree(sdist, tmp_path / "source")


def test_sdist_holds_all_sources(sdist):
    folders = ("csrc", "bench", "triton_kernels", "python", "tests")
    kinds = (".py", ".h", ".cpp", ".cu", ".cuh", ".typed")
    wanted = [p.relative_to(ROOT) for f in folders for p in (ROOT / f).rglob("*.*") if p.suffix in kinds]
    wanted += [Path(name) for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md")]
    assert [str(p) for p in wanted if not (sdist / p).is_file()] == []


def test_wheel_from_sdist_has_native_kernels(source, tmp_path):
    compiler = shutil.which(ENVIRONMENT.get("CXX", "c++"), path=SEARCH_PATH)
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    # What is tested is that the sources are there and fit together, and those of one instruction set are those of all.
    # Objects that a build of this checkout made of them serve here too, as they do there; what else there is to compile
    # takes a fifth of the time unoptimised.
    sources = {p.relative_to(ROOT): p.read_bytes() for p in (ROOT / "csrc").rglob("*") if p.is_file()}
    assert sources == {p.relative_to(source): p.read_bytes() for p in (source / "csrc").rglob("*") if p.is_file()}
    for made in ("kernels", *(folder.name for folder in (ROOT / "build").glob("objects.*"))):
        if (ROOT / "build" / made).is_dir():
            shutil.copytree(ROOT / "build" / made, source / "build" / made)
    quick = tmp_path / "bin" / Path(shlex.split(ENVIRONMENT.get("CXX") or sysconfig.get_config_var("CXX"))[0]).name
    quick.parent.mkdir()
    # A compiler cache looks for the compiler on the search path, where it must not find this file.
    quick.write_text(f'#!/bin/sh\nPATH={shlex.quote(SEARCH_PATH)} exec {compiler} "$@" -O0\n')
    quick.chmod(0o755)
    options = {"GOSSAMER_CUDA": "0", "GOSSAMER_ISAS": "generic", "PATH": f"{quick.parent}{os.pathsep}{SEARCH_PATH}"}
    pip("wheel", "-w", str(tmp_path), str(source), cwd=tmp_path, **options)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "installed")
    assert any(re.fullmatch(r"gossamer/_C\..*so", name) for name in names)
    expected = (
        "bench/families/moe.py",
        "bench/results/moe-cpu-small-epyc-2-cores.json",
        "triton_kernels/common.py",
        "cpu_kernels/dispatch.py",
        "nn/moe/layer.py",
        "py.typed",
    )
    expected += ("triton_kernels/measured_tiles/nvidia-h100-80gb-hbm3.json",)
    assert [name for name in expected if f"gossamer/{name}" not in names] == []
    assert {name.split("/")[0] for name in names} == {"gossamer", f"gossamer-{gossamer.__version__}.dist-info"}
    code = """
import gossamer
from gossamer import _backend
print(gossamer.__file__, _backend.native_unavailable() or gossamer._C.isa())
"""
    where, found = installed_python(tmp_path / "installed", code).split(" ", 1)
    assert where.startswith(str(tmp_path)) and found == "generic\n"


def test_install_without_a_compiler_works_and_says_so(source, tmp_path):
    target = tmp_path / "installed"
    compilers = {"CC": "/nonexistent", "CXX": "/nonexistent"}
    # nvcc brings kernels for CUDA, which without the rest come to nothing, half a minute later.
    done = pip("install", "--target", str(target), str(source), cwd=tmp_path, GOSSAMER_CUDA="0", **compilers)
    assert "Deprecat" not in done.stdout + done.stderr
    assert not list(target.glob("gossamer/_C*"))
    info = installed_python(target, "from gossamer.cli import app; app(['info'])")
    assert "native on cpu: no, gossamer was installed without its compiled extension" in info
    assert "expert_mlp on cpu: reference" in info
    code = """
import gossamer, torch
routing = gossamer.dispatch(torch.tensor([[1], [0]]), 2)
y = gossamer.grouped_matmul(torch.eye(2), torch.arange(8.0).view(2, 2, 2), routing)
print(gossamer.__file__, y.flatten().tolist())
"""
    where, values = installed_python(target, code).split(" ", 1)
    assert where.startswith(str(target)) and values == "[4.0, 6.0, 1.0, 3.0]\n"


def test_sources_that_do_not_compile_fail_the_build(source, tmp_path):
    compiler = shutil.which(ENVIRONMENT.get("CXX", "c++"), path=SEARCH_PATH)
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    # It compiles what it reads from its standard input, but no file.
    picky = tmp_path / "c++"
    picky.write_text(f'#!/bin/sh\ncase "$*" in *.cpp*) echo "no such luck" >&2; exit 1;; esac\nexec {compiler} "$@"\n')
    picky.chmod(0o755)
    options = {"GOSSAMER_CUDA": "0", "GOSSAMER_ISAS": "generic", "CC": str(picky), "CXX": str(picky)}
    done = pip("wheel", "-w", str(tmp_path), str(source), cwd=tmp_path, ok=False, **options)
    assert done.returncode != 0 and "no such luck" in done.stdout + done.stderr
    assert not list(tmp_path.glob("*.whl"))


def test_import_is_quick_and_pulls_in_no_optional_package():
    code = """
import sys, time, torch
before, start = set(sys.modules), time.process_time()
import gossamer
print(time.process_time() - start)
print(sorted({name.split(".")[0] for name in set(sys.modules) - before} & {"triton", "transformers", "rich", "typer"}))
"""
    seconds, pulled_in = python(code).stdout.splitlines()
    assert float(seconds) < 2
    assert pulled_in == "[]"


def test_kernels_cannot_be_taken_for_another_package():
    done = python("import triton_kernels", ok=False)
    assert done.returncode == 1
    assert "ImportError: these are Gossamer's kernels, imported as gossamer.triton_kernels" in done.stderr
    python("import gossamer.triton_kernels, gossamer.bench.harness.runner", cwd=ROOT.parent)


def test_native_code_includes_nothing_of_torch():
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh")]
    include = re.compile(r'^\s*#\s*include\s*[<"]([^">]+)', re.M)
    includes = [(path.name, header) for path in sources for header in include.findall(path.read_text())]
    assert ("bindings.cpp", "pybind11/pybind11.h") in includes
    assert [found for found in includes if re.match(r"(torch|ATen|c10|caffe2)\b", found[1])] == []


def test_one_version_everywhere():
    (declared,) = re.findall(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M)
    assert gossamer.__version__ == declared


@pytest.mark.parametrize("tool", ["ruff", "clang-format"])
def test_one_formatter_everywhere(tool):
    (declared,) = re.findall(rf'"({tool}[<>=][^"]+)"', (ROOT / "pyproject.toml").read_text())
    assert f"pip install '{declared}'" in (ROOT / ".ci" / "run").read_text()


@pytest.fixture
def build_script(monkeypatch):
    """Runs setup.py with nothing built and no nvcc found; gives its functions and the arguments of its setup()."""
    arguments = {}
    monkeypatch.setattr(setuptools, "setup", arguments.update)
    monkeypatch.chdir(ROOT)
    for name in ("CUDA_HOME", "CUDA_PATH", "GOSSAMER_CUDA", "GOSSAMER_CUDA_ARCHS", "GOSSAMER_ISAS", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "/nonexistent")
    whole_glob = glob.glob

    def without_toolkits(pattern, **options):
        return [] if pattern.startswith("/usr/local/cuda") else whole_glob(pattern, **options)

    monkeypatch.setattr(glob, "glob", without_toolkits)

    def load(**environment: str) -> tuple[dict, dict]:
        for key, value in environment.items():
            monkeypatch.setenv(key, value)
        arguments.clear()
        return runpy.run_path(str(ROOT / "setup.py")), arguments

    return load


@pytest.fixture
def toolkit(tmp_path) -> str:
    """A CUDA home whose nvcc knows three architectures."""
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\nprintf 'compute_80\\ncompute_86\\ncompute_90\\n'\n")
    nvcc.chmod(0o755)
    return str(tmp_path)


def test_build_takes_cuda_when_nvcc_is_there(build_script, toolkit):
    functions, _ = build_script()
    assert functions["cuda_requested"]() is None
    functions, _ = build_script(CUDA_HOME=toolkit)
    assert functions["cuda_requested"]() == f"{toolkit}/bin/nvcc"
    functions, arguments = build_script(CUDA_HOME=toolkit, GOSSAMER_CUDA="0")
    assert functions["cuda_requested"]() is None
    assert arguments["ext_modules"][0].optional


def test_build_that_requires_cuda_fails_without_nvcc(build_script):
    with pytest.raises(SystemExit, match="GOSSAMER_CUDA=1, but nvcc was not found"):
        build_script(GOSSAMER_CUDA="1")
    with pytest.raises(SystemExit, match="GOSSAMER_CUDA must be 0, 1 or auto, got 'yes'"):
        build_script(GOSSAMER_CUDA="yes")


def test_instruction_sets_are_those_wanted(build_script, tmp_path, monkeypatch):
    """Those of this machine, or all for an editable install; the generic one always, and the program knows the rest."""

    def built(**environment):
        (extension,) = build_script(**environment)[1]["ext_modules"]
        return set(extension.isas), extension.macros["csrc/cpu/isa.cpp"]

    every = {p.stem.removeprefix("isa_") for p in (ROOT / "csrc" / "cpu").glob("isa_*.h")} - {"begin", "end", "target"}
    assert built(GOSSAMER_ISAS="all") == (every, [])
    monkeypatch.delenv("GOSSAMER_ISAS")
    best = build_script()[0]["native_isa"]()
    assert built() == built(GOSSAMER_ISAS="native")
    if platform.machine() == "x86_64" and best is not None:
        assert built()[0] == {"generic", best} | ({"avx512_bf16"} if best == "amx" else set())
    monkeypatch.delenv("GOSSAMER_ISAS")
    for command in ("editable_wheel", "develop"):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["setup.py", command])
            assert built() == (every, [])
    found = built(GOSSAMER_ISAS="avx2; avx512")
    assert found == ({"generic", "avx2", "avx512"}, ["GOSSAMER_WITHOUT_AVX512_BF16", "GOSSAMER_WITHOUT_AMX"])
    isas, macros = built(GOSSAMER_ISAS="generic")
    assert isas == {"generic"} and len(macros) == len(every) - 1
    assert all(f"#ifndef {macro}\n" in (ROOT / "csrc" / "cpu" / "isa.cpp").read_text() for macro in macros)
    old = tmp_path / "old-compiler"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    if platform.machine() == "x86_64":
        assert built(CXX=str(old), GOSSAMER_ISAS="all") == (every - {"amx"}, ["GOSSAMER_WITHOUT_AMX"])
        isas, _ = built(CXX=str(old), GOSSAMER_ISAS="amx")
        assert isas == {"generic", "avx512_bf16", "amx"}
    for wish in ("avx2;sse", ","):
        with pytest.raises(SystemExit, match=f"GOSSAMER_ISAS must be all, native, or some of avx2, .*, got '{wish}'"):
            build_script(GOSSAMER_ISAS=wish)


def test_kernels_have_a_source_for_each_instruction_set(build_script, tmp_path, monkeypatch):
    """Of every file in csrc/cpu/kernels/; a second build finds the first one's sources untouched."""
    functions, _ = build_script()
    kernels = [path.stem for path in (ROOT / "csrc" / "cpu" / "kernels").glob("*.cpp")]
    assert sorted(functions["KERNELS"]) == sorted(kernels) and set(functions["AMX_KERNELS"]) <= set(kernels)
    monkeypatch.chdir(tmp_path)
    found = functions["kernel_sources"](["amx", "avx512_bf16", "generic"], False)
    expected = [(isa, kernel) for isa in ("avx512_bf16", "generic") for kernel in kernels]
    expected += [("amx", kernel) for kernel in functions["AMX_KERNELS"]]
    assert sorted((Path(path).parent.name, Path(path).stem) for path in found) == sorted(expected)
    for path in found:
        text = Path(path).read_text()
        assert f'"cpu/isa_{Path(path).parent.name}.h"' in text and f'"cpu/kernels/{Path(path).name}"' in text
        os.utime(path, (0, 0))
    assert functions["kernel_sources"](["amx", "avx512_bf16", "generic"], False) == found
    assert {os.stat(path).st_mtime for path in found} == {0}


def test_objects_are_as_old_as_what_they_are_made_of(build_script, tmp_path, monkeypatch):
    out_of_date = build_script()[0]["out_of_date"]
    monkeypatch.chdir(tmp_path)
    outside = tmp_path / "outside.h"
    for path in ("a.cpp", "a.h", "a.o", outside):
        Path(path).touch()
        os.utime(path, (1, 1))
    assert out_of_date("a.o", "a.cpp")
    Path("a.d").write_text(f"a.o: a.cpp \\\n a.h {outside} /gone/with/an/environment.h\n")
    os.utime("a.o", (2, 2))
    assert not out_of_date("a.o", "a.cpp")
    for path in ("a.cpp", "a.h", outside):
        os.utime(path, (3, 3))
        assert out_of_date("a.o", "a.cpp")
        os.utime(path, (1, 1))
    Path("a.h").unlink()
    assert out_of_date("a.o", "a.cpp")


@pytest.mark.parametrize(
    ("flags", "isa"),
    [
        ("fpu sse2", "generic"),
        ("fpu avx2 fma", "generic"),
        ("fpu avx2 fma f16c", "avx2"),
        ("avx2 fma f16c avx512f avx512bw", "avx2"),
        ("avx2 fma f16c avx512f avx512bw avx512dq avx512vl amx_tile amx_bf16", "avx512"),
        ("avx2 fma f16c avx512f avx512bw avx512dq avx512vl avx512_vnni avx512_bf16", "avx512_bf16"),
        ("avx2 fma f16c avx512f avx512bw avx512dq avx512vl avx512_vnni avx512_bf16 amx_tile amx_bf16", "amx"),
    ],
)
def test_the_instruction_set_of_this_machine(build_script, tmp_path, flags, isa):
    """By the flags that the system lists, of the first processor."""
    listed = tmp_path / "cpuinfo"
    listed.write_text(f"processor\t: 0\nflags\t\t: {flags}\nbugs\t\t: none\n\nprocessor\t: 1\nflags\t\t: avx2\n")
    native_isa = build_script()[0]["native_isa"]
    assert native_isa(listed) == isa
    assert native_isa(tmp_path / "absent") is None
    listed.write_text("processor : 0\n")
    assert native_isa(listed) is None


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a compiler")
def test_assembler_is_asked(build_script):
    """The compiler's assembler knows some instructions and not others."""
    path = {"PATH": SEARCH_PATH, "CXX": "g++"}
    assembles = build_script(**path)[0]["assembles"]
    assert assembles("nop") and not assembles("nosuchinstruction")


def test_kernels_for_hopper_need_its_architecture(build_script, toolkit):
    folder = Path(toolkit, "lib64")
    folder.mkdir()
    (folder / "libcudart_static.a").touch()

    def sources(**environment):
        _, arguments = build_script(CUDA_HOME=toolkit, **environment)
        return {name for name in arguments["ext_modules"][0].sources if "hopper" in name and "bindings" not in name}

    kernels = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / "cuda" / "hopper").glob("*.cu")}
    assert len(kernels) == 3
    assert sources() == kernels
    assert sources(GOSSAMER_CUDA_ARCHS="80;90") == {"csrc/cuda/without_hopper.cpp"}
    assert sources(GOSSAMER_CUDA="0") == set()


def test_architectures_are_those_wanted_that_nvcc_knows(build_script, toolkit, monkeypatch):
    functions, _ = build_script(GOSSAMER_CUDA="0")
    gencodes, nvcc = functions["cuda_gencodes"], f"{toolkit}/bin/nvcc"
    assert gencodes(nvcc) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90,code=compute_90",
    ]
    monkeypatch.setenv("GOSSAMER_CUDA_ARCHS", "86")
    assert gencodes(nvcc)[-1] == "-gencode=arch=compute_86,code=compute_86"
    monkeypatch.setenv("GOSSAMER_CUDA_ARCHS", "120")
    with pytest.raises(SystemExit, match=r"nvcc knows none of the architectures \['120'\]"):
        gencodes(nvcc)
    monkeypatch.setenv("GOSSAMER_CUDA_ARCHS", "hopper")
    with pytest.raises(SystemExit, match=r"GOSSAMER_CUDA_ARCHS must list architectures .*, got \['hopper'\]"):
        gencodes(nvcc)
