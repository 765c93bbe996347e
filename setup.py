"""Build script: the pybind11 extension ``gossamer._C`` from ``csrc/``.

The extension knows nothing of torch, so one build serves every torch version. Without a C++20 compiler the package
installs without it; with one, sources that do not compile fail the build. CUDA sources are compiled if ``nvcc`` is
found; ``GOSSAMER_CUDA=0|1`` forbids or requires them, and ``GOSSAMER_CUDA_ARCHS`` (such as ``80;90a``) names the
architectures. Sources in ``csrc/cuda/hopper/`` use instructions of sm_90a and are compiled for it only; stubs replace
them if it is not among the architectures. No GPU is queried.

The CPU's kernels, ``csrc/cpu/kernels/*.cpp``, are compiled once for each instruction set and chosen at run time. An
install compiles the generic kernels and those for this machine's best instruction set; an editable install, which the
tests use, compiles all. ``GOSSAMER_ISAS`` overrides this: ``all`` (for wheels), ``native``, or names such as
``avx2;avx512``; the generic kernels are always compiled.
"""

import glob
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext

DEFAULT_CUDA_ARCHS = ("80", "90a", "100a")
HOPPER_ARCH = "90a"
HOPPER_GENCODE = f"-gencode=arch=compute_{HOPPER_ARCH},code=sm_{HOPPER_ARCH}"
HOPPER_SOURCES = "csrc/cuda/hopper/*.cu"
# Environment variables that affect how the sources are compiled.
ENVIRONMENT = ("CXX", "CXXFLAGS", "CPPFLAGS", "GOSSAMER_CUDA_ARCHS")
# Instruction sets of x86-64, described by csrc/cpu/isa_NAME.h, the best one last, and their flags in /proc/cpuinfo.
ISAS = {
    "avx2": {"avx2", "fma", "f16c"},
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
    "avx512_bf16": {"avx512_bf16", "avx512_vnni"},
    "amx": {"amx_tile", "amx_bf16"},
}
# The files of csrc/cpu/kernels/, those that take longest to compile first, and those that have kernels for AMX.
KERNELS = ("experts", "structured", "rows", "tables")
AMX_KERNELS = ("experts", "structured")
# Where the sources are written that a build makes for its instruction sets.
GENERATED = Path("build", "kernels")
KERNEL_SOURCE = """#define GOSSAMER_TARGET "cpu/isa_{isa}.h"
#include "cpu/kernels/{part}.cpp"
"""


def find_nvcc():
    """The path of nvcc in CUDA_HOME, in CUDA_PATH, on the search path or in the usual folder; None if there is none."""
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")):
        if home and (path := Path(home, "bin", "nvcc")).is_file():
            return str(path)
    return shutil.which("nvcc") or next(iter(glob.glob("/usr/local/cuda/bin/nvcc")), None)


def cuda_requested():
    """The path of nvcc if CUDA sources are to be compiled, by GOSSAMER_CUDA and whether nvcc exists; else None."""
    wish = os.environ.get("GOSSAMER_CUDA", "auto")
    if wish not in ("0", "1", "auto"):
        raise SystemExit(f"GOSSAMER_CUDA must be 0, 1 or auto, got {wish!r}")
    if wish == "0":
        return None
    nvcc = find_nvcc()
    if nvcc is None and wish == "1":
        raise SystemExit("GOSSAMER_CUDA=1, but nvcc was not found; set CUDA_HOME or put nvcc on PATH")
    return nvcc


def cuda_gencodes(nvcc):
    """``-gencode`` flags for the wanted architectures that this nvcc supports, and for PTX of the newest one."""
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    known = set(re.findall(r"compute_(\d+)", listed))
    wanted = os.environ.get("GOSSAMER_CUDA_ARCHS")
    archs = [a for a in re.split(r"[;, ]+", wanted) if a] if wanted else list(DEFAULT_CUDA_ARCHS)
    bad = [a for a in archs if not re.fullmatch(r"\d+[af]?", a)]
    if bad:
        raise SystemExit(f"GOSSAMER_CUDA_ARCHS must list architectures as in '80;90a;100a', got {bad}")
    usable = [a for a in archs if a.rstrip("af") in known]
    if not usable:
        raise SystemExit(f"nvcc knows none of the architectures {archs}; it knows {sorted(known, key=int)}")
    flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in usable]
    newest = max((a.rstrip("af") for a in usable), key=int)
    return [*flags, f"-gencode=arch=compute_{newest},code=compute_{newest}"]


def cuda_root(nvcc):
    """The toolkit's folder as nvcc reports it: the nvcc on the search path may be a wrapper script."""
    command = [nvcc, "--dryrun", "-E", "-x", "cu", os.devnull]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    top = re.search(r"^#\$ TOP=(.+?)\s*$", told, re.MULTILINE)
    return Path(top[1]).resolve() if top else Path(nvcc).resolve().parent.parent


def cudart_static_dir(nvcc):
    """The folder of libcudart_static.a, or None."""
    root = cuda_root(nvcc)
    for sub in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib", "targets/aarch64-linux/lib"):
        if (root / sub / "libcudart_static.a").is_file():
            return root / sub
    return None


def out_of_date(target, source):
    """Whether an object is older than its source or than a header listed in the dependency file beside it.

    Headers outside of the project may be gone with the environment that pip made for an earlier build.
    """
    notes = Path(target).with_suffix(".d")
    if not Path(target).is_file() or not notes.is_file():
        return True
    made = os.stat(target).st_mtime
    # The dependency file is a make rule: "object: source header \\\n header".
    inputs = (source, *notes.read_text().replace("\\\n", " ").split(": ", 1)[-1].split())
    inputs = [name for name in inputs if os.path.isfile(name) or not os.path.isabs(name)]
    return any(not os.path.isfile(name) or os.stat(name).st_mtime >= made for name in inputs)


def nvcc_command(nvcc, source, target, gencodes):
    """The command that compiles one CUDA source to an object and writes a dependency file beside it."""
    command = [nvcc, "-c", source, "-o", str(target), "-O3", "-std=c++20", "-Icsrc"]
    command += ["-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xptxas", "-v", "--threads", "0", *gencodes]
    return [*command, "-MD", "-MF", str(target.with_suffix(".d"))]


def compile_cuda_source(nvcc, source, target, gencodes):
    """Compile a CUDA source if it has changed; ptxas' report of its kernels stays beside the object, as ``.txt``."""
    target.parent.mkdir(parents=True, exist_ok=True)
    log = target.with_suffix(".txt")
    if out_of_date(target, source) or not log.is_file():
        target.unlink(missing_ok=True)
        command = nvcc_command(nvcc, source, target, gencodes)
        print(" ".join(command), file=sys.stderr)
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise RuntimeError(f"{source} does not compile:\n{done.stderr}")
        log.write_text(done.stderr)


def generated(path, text):
    """The path of a source with this text. It is written only if it differs, as it would be compiled again."""
    path = GENERATED / path
    if not path.is_file() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return str(path)


def kernel_sources(isas, spare_generic):
    """Write a source for each instruction set and each of its files of kernels, and return the paths.

    Kernels are optimised less for ``generic`` if ``spare_generic``.
    """
    paths = []
    for part in KERNELS:
        for isa in isas:
            if isa == "amx" and part not in AMX_KERNELS:
                continue
            text = KERNEL_SOURCE.format(isa=isa, part=part)
            if isa == "generic" and spare_generic:
                paths.append(generated(f"spare_generic/{part}.cpp", f"#define GOSSAMER_SPARE_GENERIC 1\n{text}"))
            else:
                paths.append(generated(f"{isa}/{part}.cpp", text))
    return paths


def with_macros(source, macros):
    """The path of a source that defines macros and includes another; that one's if there are no macros.

    As flags, macros would go to all sources, and no objects could serve builds for different instruction sets.
    """
    if not macros:
        return source
    folder = "_".join(macro.removeprefix("GOSSAMER_").lower() for macro in macros)
    # In angle brackets: a quoted name is first looked up beside the generated source, which may have the same name.
    text = "".join(f"#define {macro} 1\n" for macro in macros) + f"#include <{Path(source).relative_to('csrc')}>\n"
    return generated(f"{folder}/{Path(source).name}", text)


class BuildExt(build_ext):
    """build_ext that compiles ``.cu`` files with nvcc and, without a C++20 compiler, leaves the extension out."""

    def build_extension(self, ext):
        ext.optional = ext.optional and not can_compile_extensions()
        # Objects are reused, so each set of flags has its own folder, which would be temporary in an editable install.
        flags = repr((pybind11.__version__, ext.extra_compile_args, *map(os.environ.get, ENVIRONMENT)))
        folder = f"objects.{sysconfig.get_config_var('SOABI') or sys.implementation.cache_tag}"
        self.build_temp = os.path.join("build", folder, hashlib.sha256(flags.encode()).hexdigest()[:12])
        # Only objects that are out of date are compiled; without force, a library made of other objects would be kept.
        self.force = True
        cuda_sources = [s for s in ext.sources if s.endswith(".cu")]
        # Kernels first, because they take longest.
        sources = [with_macros(s, ext.macros.get(s)) for s in ext.sources if not s.endswith(".cu")]
        ext.sources = [*kernel_sources(ext.isas, ext.spare_generic), *sources]
        if cuda_sources:
            ext.extra_objects = [*ext.extra_objects, *self.compile_cuda(cuda_sources)]
        super().build_extension(ext)

    def compile_cuda(self, sources):
        nvcc = cuda_requested()
        gencodes = cuda_gencodes(nvcc)
        hopper = set(glob.glob(HOPPER_SOURCES))

        def compile_one(source):
            target = Path(self.build_temp, source).with_suffix(".cu.o")
            compile_cuda_source(nvcc, source, target, [HOPPER_GENCODE] if source in hopper else gencodes)
            return str(target)

        with ThreadPoolExecutor(int(os.environ.get("GOSSAMER_BUILD_JOBS", 0)) or os.cpu_count()) as pool:
            return list(pool.map(compile_one, sources))


def compiles(source, *flags):
    """Whether the compiler compiles a source; None if it does not run."""
    try:
        compiler = shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++")
        command = [*compiler, *flags, "-x", "c++", "-c", "-o", os.devnull, "-"]
        return subprocess.run(command, input=source, text=True, capture_output=True).returncode == 0
    except (OSError, ValueError):
        return None


def can_compile_extensions():
    """Whether there is a C++20 compiler with OpenMP, and the headers of Python."""
    flags = ("-std=c++20", "-fopenmp", f"-I{sysconfig.get_paths()['include']}")
    return compiles("#include <Python.h>\n#include <omp.h>\n#include <span>\n", *flags)


def assembles(instruction):
    """Whether the compiler's assembler, which may be older than the compiler, knows an instruction."""
    return compiles(f'void f() {{ asm volatile("{instruction}"); }}') is not False


def native_isa(cpuinfo=Path("/proc/cpuinfo")):
    """The best instruction set among the processor flags that the system lists; None if it lists none."""
    try:
        flags = re.search(r"^flags\s*:(.*)$", cpuinfo.read_text(), re.MULTILINE)
    except OSError:
        return None
    if flags is None:
        return None
    best, there = "generic", set(flags[1].split())
    for isa, needed in ISAS.items():  # each builds on the ones before it
        if not needed <= there:
            break
        best = isa
    return best


def wanted_isas():
    """The names in GOSSAMER_ISAS, with ``native`` replaced by this machine's best instruction set."""
    wish = os.environ.get("GOSSAMER_ISAS") or ("all" if {"editable_wheel", "develop"} & set(sys.argv) else "native")
    wanted = set(re.split(r"[;, ]+", wish)) - {""}
    if not wanted or wanted - {"all", "native", "generic", *ISAS}:
        raise SystemExit(f"GOSSAMER_ISAS must be all, native, or some of {', '.join((*ISAS, 'generic'))}, got {wish!r}")
    if "native" in wanted:
        wanted.remove("native")
        if platform.machine() in ("x86_64", "AMD64"):
            best = native_isa() or "all"
            wanted.add("avx512_bf16" if best == "amx" and not assembles("tilerelease") else best)
        else:
            wanted.add("generic")
    return wanted


def compiled_isas(wanted):
    """The instruction sets to compile kernels for, best first: those wanted that machine and assembler support."""
    isas = ["generic"]
    if platform.machine() in ("x86_64", "AMD64"):
        if "amx" in wanted:
            wanted = wanted | {"avx512_bf16"}  # AMX has kernels only for some products and uses these for the rest
        isas += [isa for isa in ISAS if wanted & {isa, "all"}]
        if "all" in wanted and not assembles("tilerelease"):
            print("the assembler does not know AMX; building without its kernels", file=sys.stderr)
            isas.remove("amx")
    return isas[::-1]


def extension():
    """The description of ``gossamer._C``."""
    wanted = wanted_isas()
    isas = compiled_isas(wanted)
    # bindings.cpp includes the files in csrc/bindings/.
    sources = ["csrc/bindings.cpp", *sorted(glob.glob("csrc/cpu/*.cpp"))]
    macros = {"csrc/cpu/isa.cpp": [f"GOSSAMER_WITHOUT_{isa.upper()}" for isa in ISAS if isa not in isas]}
    libraries, library_dirs, link_args = [], [], ["-fopenmp"]
    nvcc = cuda_requested()
    cuda_sources = sorted(glob.glob("csrc/cuda/*.cu"))
    if nvcc and cuda_sources:
        cudart = cudart_static_dir(nvcc)
        if cudart is None:
            message = f"libcudart_static.a was not found beside {nvcc}"
            if os.environ.get("GOSSAMER_CUDA") == "1":
                raise SystemExit(message)
            print(f"{message}; building without CUDA", file=sys.stderr)
        else:
            sources += cuda_sources
            library_dirs.append(str(cudart))
            libraries += ["cudart_static", "dl", "rt", "pthread"]
            macros["csrc/bindings.cpp"] = ["GOSSAMER_WITH_CUDA"]
            hopper = HOPPER_GENCODE in cuda_gencodes(nvcc)
            sources += sorted(glob.glob(HOPPER_SOURCES)) if hopper else ["csrc/cuda/without_hopper.cpp"]
    ext = Pybind11Extension(
        "gossamer._C",
        sources,
        include_dirs=["csrc"],
        depends=sorted(f for kind in ("h", "cuh", "cpp") for f in glob.glob(f"csrc/**/*.{kind}", recursive=True)),
        cxx_std=20,
        libraries=libraries,
        library_dirs=library_dirs,
        extra_compile_args=["-O3", "-fopenmp", "-fno-math-errno", "-fvisibility=hidden", "-MMD"],
        extra_link_args=link_args,
    )
    ext.isas, ext.macros = isas, macros  # BuildExt adds the sources of kernels
    ext.spare_generic = "all" not in wanted and (native_isa() or "generic") in wanted - {"generic"}
    ext.optional = os.environ.get("GOSSAMER_CUDA") != "1"
    return ext


ParallelCompile("GOSSAMER_BUILD_JOBS", needs_recompile=out_of_date).install()
setup(
    packages=[
        "gossamer",
        "gossamer.commands",
        "gossamer.ops",
        "gossamer.nn",
        "gossamer.nn.delta_rule",
        "gossamer.nn.embeddings",
        "gossamer.nn.linear",
        "gossamer.nn.moe",
        "gossamer.nn.moe.experts",
        "gossamer.nn.moe.losses",
        "gossamer.nn.moe.routers",
        "gossamer.integrations",
        "gossamer.integrations.megablocks",
        "gossamer.integrations.megablocks.layers",
        "gossamer.integrations.scattermoe",
        "gossamer.integrations.scattermoe.kernels",
        "gossamer.parallel",
        "gossamer.parallel.planning",
        "gossamer.cpu_kernels",
        "gossamer.cuda_kernels",
        "gossamer.triton_kernels",
        "gossamer.bench",
        "gossamer.bench.distributed",
        "gossamer.bench.families",
        "gossamer.bench.harness",
        "gossamer.bench.studies",
    ],
    # Only what package_data names is installed; the rest of the manifest is for the source archive.
    include_package_data=False,
    package_dir={"": "python", "gossamer.triton_kernels": "triton_kernels", "gossamer.bench": "bench"},
    package_data={
        "gossamer": ["py.typed"],
        "gossamer.bench": ["results/*.json"],
        "gossamer.bench.families": ["*.json"],
        "gossamer.triton_kernels": ["measured_tiles/*.json"],
    },
    ext_modules=[extension()],
    cmdclass={"build_ext": BuildExt},
)
