"""Who may import whom, and what every module owes its reader."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "signlattice"

# Each layer imports from itself and from the layers above it in this list, never downwards.
LAYERS = (
    ("errors",),
    ("files",),
    ("beta", "densities", "centering", "rotations", "bits"),
    ("kernels",),
    ("checkpoints", "sources", "shards", "learn", "spread", "lattice"),
    ("curvature",),
    ("codec", "vector_codes", "gauges", "two_bits"),
    ("stores",),
    (
        "models",
        "corpus",
        "capture",
        "attention",
        "packed_layer",
        "cache",
        "hub",
        "texts",
        "fullsize",
    ),
    ("evaluate", "train", "coded", "peers"),
    (
        "ablation",
        "solvers",
        "convergence",
        "scores",
        "compounding",
        "snapshots",
        "fidelity",
        "kernel_times",
        "architectures",
        "calibrate",
        "cache_quality",
        "comparison",
    ),
    ("cache_lab", "ladder", "second_code", "query_codes", "values", "sensitivity", "gauge_lab"),
    ("cli",),
    ("__main__",),
)
# Leaves know nothing of the layers but errors and files, so that every layer may use them.
LEAVES = ("records", "memory", "notebooks", "roofline", "scale", "timing")
# What shows results reads records, closed forms and the sign convention; it runs no model.
READERS = ("figures", "explorer", "tables", "claims", "theorems", "four_models")
READABLE = (
    "errors",
    "files",
    "records",
    "memory",
    "roofline",
    "beta",
    "densities",
    "bits",
    *READERS,
)
# Stands above all, since it compares labs, records and models; nothing imports it but `cli`.
AUDITORS = ("provenance",)

WITH_MODELS = (
    "models",
    "corpus",
    "capture",
    "attention",
    "packed_layer",
    "cache",
    "evaluate",
    "train",
    "kernel_times",
    "fullsize",
    "peers",
)
EXTERNAL = {
    "transformers": WITH_MODELS,
    "tokenizers": WITH_MODELS,
    "accelerate": ("fullsize",),
    "huggingface_hub": ("hub", "texts", "fullsize"),
    "datasets": ("texts",),
    "triton": ("kernels",),
    "numba": ("kernels",),
    "llvmlite": ("kernels",),
    "fast_hadamard_transform": ("kernel_times",),
    "flash_attn": ("kernel_times",),
    "matplotlib": ("figures", "explorer"),
    "ipywidgets": ("figures", "explorer"),
    "anywidget": ("explorer",),
    "traitlets": ("explorer",),
    "IPython": ("claims", "tables", "theorems", "explorer", "four_models"),
    "yaml": ("claims", "notebooks"),
    "papermill": ("notebooks",),
    "nbformat": ("notebooks",),
    "nbclient": ("notebooks",),
    "ipykernel": ("notebooks",),
}
ANYWHERE = ("torch", "numpy", "scipy", "safetensors", "tqdm")
# Rivals that are timed where somebody has built them: they need a CUDA compiler.
OPTIONAL = {"fast_hadamard_transform", "flash_attn"}
EMPTY_NAMES = {"utils", "util", "helpers", "helper", "misc", "common", "tools", "core"}


@dataclass(frozen=True)
class Module:
    """A source file: its name inside the package, its first word, and its syntax tree."""

    name: str
    tree: ast.Module
    source: str

    @property
    def part(self) -> str:
        """The top-level module or subpackage, by which layers are told."""
        return self.name.partition(".")[0]


def read_module(name: str, source: str) -> Module:
    return Module(name, ast.parse(source), source)


def modules() -> list[Module]:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        found.append(read_module(name, path.read_text(encoding="utf-8")))
    return [module for module in found if module.name != "__init__"]


def imports(module: Module) -> Iterator[tuple[str, bool]]:
    """(name, ours) of everything a module imports, also inside functions and for typing."""
    package = ["signlattice", *module.name.split(".")[:-1]]
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _told(alias.name.split("."))
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            path = base + (node.module.split(".") if node.module else [])
            if path == ["signlattice"]:
                for alias in node.names:
                    yield from _told([*path, alias.name])
            else:
                yield from _told(path)


def _told(path: list[str]) -> Iterator[tuple[str, bool]]:
    if path[0] != "signlattice":
        yield path[0], False
    elif len(path) > 1:
        yield path[1], True


def allowed(part: str) -> set[str]:
    """What of ours a module may import; KeyError if it has no place yet."""
    if part in LEAVES:
        return {"errors", "files", *LEAVES} - {"notebooks"}
    if part in READERS:
        return set(READABLE)
    if part in AUDITORS:
        return {*LEAVES, *READERS, *(name for layer in LAYERS for name in layer)}
    for height, layer in enumerate(LAYERS):
        if part in layer:
            below = {name for lower in LAYERS[: height + 1] for name in lower}
            return below | (set(LEAVES) - {"notebooks"} if height > 1 else set())
    raise KeyError(part)


def wrong_imports(module: Module) -> list[str]:
    wrong = []
    for name, ours in imports(module):
        if ours and name != "__version__" and name not in allowed(module.part) | {module.part}:
            wrong.append(f"{module.name} imports signlattice.{name}")
        if not ours and name not in sys.stdlib_module_names:
            if module.part not in EXTERNAL.get(name, ()) and name not in ANYWHERE:
                wrong.append(f"{module.name} imports {name}")
            if name == "triton" and not module.name.endswith((".triton", "kernels.runtime")):
                wrong.append(f"{module.name} imports triton, only kernels/*/triton.py may")
    return wrong


def undocumented(module: Module) -> list[str]:
    """Public modules, functions, classes and methods that say nothing."""
    missing = [] if ast.get_docstring(module.tree) else [module.name]
    for node in module.tree.body:
        missing += _undocumented(node, module.name)
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for child in node.body:
                missing += _undocumented(child, f"{module.name}.{node.name}")
    return missing


def _undocumented(node: ast.stmt, where: str) -> list[str]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    if not isinstance(node, kinds) or node.name.startswith("_") or ast.get_docstring(node):
        return []
    return [f"{where}.{node.name}"]


MODULES = modules()
BY_NAME = pytest.mark.parametrize("module", MODULES, ids=[module.name for module in MODULES])


@BY_NAME
def test_module_has_a_place_and_imports_only_what_is_below_it(module: Module) -> None:
    try:
        allowed(module.part)
    except KeyError:
        pytest.fail(f"{module.part} stands in no layer: say in this test where it belongs")
    assert wrong_imports(module) == []


@BY_NAME
def test_public_names_are_documented(module: Module) -> None:
    assert undocumented(module) == []


@BY_NAME
def test_module_is_typed_short_of_line_and_well_named(module: Module) -> None:
    assert not EMPTY_NAMES & set(module.name.split(".")), "the name says nothing of what it holds"
    assert not re.search(r"_?v\d+$", module.name), "one version: the old one is in git"
    if module.tree.body[1:]:
        assert "from __future__ import annotations" in module.source
    long = [i for i, line in enumerate(module.source.splitlines(), 1) if len(line) > 100]
    assert long == [], "lines of more than 100 characters"


def test_imports_have_no_cycle() -> None:
    graph = {module.part: set() for module in MODULES}
    for module in MODULES:
        graph[module.part] |= {n for n, ours in imports(module) if ours and n != module.part}
    settled: set[str] = set()
    while ready := {part for part in set(graph) - settled if graph[part] & set(graph) <= settled}:
        settled |= ready
    assert set(graph) - settled == set(), "these import each other"


@pytest.mark.parametrize(
    ("name", "source", "wrong"),
    [
        ("beta", "from .learn import x", ["beta imports signlattice.rotations.solvers"]),
        ("beta", "from signlattice import codec", ["beta imports signlattice.quantizers.codec"]),
        (
            "records",
            "def f():\n    from .codec import x",
            ["records imports signlattice.quantizers.codec"],
        ),
        (
            "figures",
            "import signlattice.models.loading",
            ["figures imports signlattice.models.loading"],
        ),
        ("codec", "import transformers", ["codec imports transformers"]),
        ("codec", "import pandas", ["codec imports pandas"]),
        ("codec", "import os\nimport torch\nfrom .learn import x\nfrom .records import y", []),
        ("kernels.pack.triton", "import triton\nfrom ...bits import x", []),
        (
            "kernels.pack.reference",
            "import triton",
            ["kernels.pack.reference imports triton, only kernels/*/triton.py may"],
        ),
        (
            "kernels.pack.triton",
            "from ...codec import x",
            ["kernels.pack.triton imports signlattice.quantizers.codec"],
        ),
    ],
)
def test_the_rule_tells_wrong_imports(name: str, source: str, wrong: list[str]) -> None:
    assert wrong_imports(read_module(name, source)) == wrong


def test_the_rule_tells_undocumented_names() -> None:
    source = '"""M."""\ndef f(): ...\ndef _g(): ...\nclass C:\n    """C."""\n    def m(self): ...'
    assert undocumented(read_module("beta", source)) == ["beta.f", "beta.C.m"]


# The requirements belong to the architecture: what is imported is pinned, and nothing floats.

PINS = {
    line.partition("==")[0].lower().replace("_", "-"): line.partition("==")[2].partition(";")[0]
    for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
}


def test_every_requirement_is_pinned_and_without_an_address() -> None:
    assert [name for name, version in PINS.items() if not re.fullmatch(r"[\w.]+", version)] == []


def test_what_the_package_imports_is_pinned() -> None:
    names = {name for module in MODULES for name, ours in imports(module) if not ours}
    distributions = {"yaml": "pyyaml", "huggingface_hub": "huggingface-hub"}
    names -= sys.stdlib_module_names | OPTIONAL
    external = {distributions.get(name, name).lower() for name in names}
    assert external - set(PINS) == set()


def test_corpus_packages_are_pinned_to_the_text_that_was_read() -> None:
    from signlattice.data.corpus import PACKAGES

    for package in PACKAGES:
        assert PINS.get(package.name.lower()) == package.version, package.name
