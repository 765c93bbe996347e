"""Imports point from applications to layers to primitives to kernels, and to no private name of another package."""

import ast
import functools
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {
    "gossamer": ROOT / "python" / "gossamer",
    "gossamer.triton_kernels": ROOT / "triton_kernels",
    "gossamer.bench": ROOT / "bench",
}
KERNELS = {"cpu_kernels", "cuda_kernels", "triton_kernels"}
LAYERS = {"nn", "optim"}
APPLICATIONS = {"integrations", "convert", "parallel", "models", "bench", "commands", "cli"}
# Package -> packages that it must not import.
FORBIDDEN = {
    **{name: LAYERS | APPLICATIONS for name in KERNELS},
    "ops": {"nn"} | APPLICATIONS,
    "optim": {"nn"} | APPLICATIONS,
    "nn": KERNELS | APPLICATIONS,
    "integrations": KERNELS | {"bench", "commands", "cli"},
    "parallel": KERNELS | {"bench", "commands", "cli"},
}


def imports(path):
    """Pairs of module and name that a file imports of gossamer; the name is empty where a module is imported whole."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "gossamer":
            yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names if alias.name.split(".")[0] == "gossamer")


@functools.cache
def found():
    """``(importing module, its package, imported module, name, imported package)`` of every import of gossamer."""
    return [
        (importer, importer.split(".")[1], module, name, (target.split(".") + [""])[1])
        for prefix, folder in SOURCES.items()
        for path in sorted(folder.rglob("*.py"))
        for importer in [".".join([prefix, *path.relative_to(folder).with_suffix("").parts])]
        for module, name in imports(path)
        for target in [f"{module}.{name}" if module == "gossamer" and name else module]
    ]


def test_files_are_found():
    importers = {package for _, package, *_ in found()}
    assert {"nn", "ops", "integrations", "bench", *KERNELS} <= importers


@pytest.mark.parametrize("package", sorted(FORBIDDEN))
def test_imports_point_one_way(package):
    wrong = [
        f"{importer} imports {module}"
        for importer, of, module, _, target in found()
        if of == package and target in FORBIDDEN[package]
    ]
    assert wrong == []


@pytest.mark.parametrize("package", ["integrations", "nn", "ops", "optim", "parallel"])
def test_no_private_names_of_another_package(package):
    private = [
        f"{importer} imports {module}.{name}"
        for importer, of, module, name, target in found()
        if of == package and target != package
        # gossamer._checks and its like lie below every package and are shared by all.
        for part in [*module.split(".")[2:], name if module.count(".") else ""]
        if part.startswith("_") and not part.startswith("__")
    ]
    assert private == []


def test_layers_register_no_operator():
    assert [
        importer for importer, of, module, *_ in found() if of in LAYERS and module.endswith("._registration")
    ] == []


def test_integrations_import_each_other_one_way():
    """Imports inside functions count: a cycle that closes only during a call is still a cycle."""
    edges = {}
    for importer, of, module, name, target in found():
        if of == target == "integrations":
            whole = f"{module}.{name}"
            named = {other for other, *_ in found()}
            edges.setdefault(importer, set()).add(whole if whole in named else module)
    order = graphlib.TopologicalSorter(edges)
    order.prepare()
