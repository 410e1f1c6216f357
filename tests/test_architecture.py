"""The house's rules, read from its source: imports point one way, leaves are pure, one file is one component."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

from benchmark import registry

ROOT = Path(__file__).resolve().parents[1]
LEAVES = ("purifiers", "attacks", "classifiers")
OURS = {*LEAVES, "benchmark", "tests"}
LEAF_FILES = [p.relative_to(ROOT) for leaf in LEAVES for p in sorted((ROOT / leaf).rglob("*.py"))]
COMPONENTS = [p for p in LEAF_FILES if not p.name.startswith("_")]
FORBIDDEN_MODULES = {
    "argparse", "click", "glob", "http", "io", "json", "os", "pathlib", "pickle", "random", "requests", "shutil",
    "socket", "subprocess", "sys", "tempfile", "time", "tqdm", "urllib",
}  # fmt: skip
FORBIDDEN_CALLS = re.compile(
    r"^(print|open|input|exec|eval|exit)$|(^|\.)(manual_seed|seed|cuda|set_default_dtype|set_num_threads|set_rng_state)$"
    r"|^torch\.(load|save|hub\..*)$|^(np|numpy)\.random\."
)
SEEDS_IN_A_FORK = {"torch.manual_seed", "np.random.get_state", "np.random.seed", "np.random.set_state"}
"""Packages draw from the global generators: one file forks them around the call."""
GRADIENT_CUTS = re.compile(r"(^|\.)(no_grad|inference_mode|detach|detach_|set_grad_enabled)$")

every_leaf_file = pytest.mark.parametrize("path", LEAF_FILES, ids=str)


def tree(path: Path) -> ast.AST:
    return ast.parse((ROOT / path).read_text(), str(path))


def imports(node: ast.AST) -> set[str]:
    """All modules that a file imports, anywhere in it; relative imports count as the package they stay in."""
    found = set()
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            found |= {alias.name for alias in child.names}
        elif isinstance(child, ast.ImportFrom) and child.level == 0:
            found.add(child.module)
    return found


def calls(node: ast.AST) -> set[str]:
    """The dotted names of everything that a file calls or decorates with."""
    return {ast.unparse(child.func) for child in ast.walk(node) if isinstance(child, ast.Call)}


def names(node: ast.AST) -> set[str]:
    """The dotted names that a file mentions."""
    return {ast.unparse(child) for child in ast.walk(node) if isinstance(child, ast.Attribute | ast.Name)}


def test_the_leaves_are_where_this_test_looks():
    assert {p.parts[0] for p in COMPONENTS} == set(LEAVES)
    assert set(registry.BASES) == set(LEAVES)


@every_leaf_file
def test_imports_point_one_way(path):
    tops = {module.split(".")[0] for module in imports(tree(path))}
    assert not tops & (OURS - {path.parts[0]})


@every_leaf_file
def test_leaves_do_no_input_or_output(path):
    assert not {module.split(".")[0] for module in imports(tree(path))} & FORBIDDEN_MODULES
    allowed = SEEDS_IN_A_FORK if path.name == "_package.py" else set()
    assert {call for call in calls(tree(path)) if FORBIDDEN_CALLS.search(call)} == allowed


@pytest.mark.parametrize("path", [p for p in LEAF_FILES if p.parts[0] != "attacks"], ids=str)
def test_purifiers_and_classifiers_never_cut_a_gradient(path):
    """Training losses may: no purification calls them."""
    cuts = {name for name in names(tree(path)) if GRADIENT_CUTS.search(name)}
    assert not cuts or path.name == "_objectives.py"


@pytest.mark.parametrize("path", COMPONENTS, ids=str)
def test_a_component_file_defines_one_component_that_its_name_finds(path):
    package = path.parts[0]
    component = registry.load(package, path.stem.replace("_", "-"))
    assert component.__module__ == f"{package}.{path.stem}"
    public = [n.name for n in tree(path).body if isinstance(n, ast.ClassDef) and not n.name.startswith("_")]
    module = importlib.import_module(component.__module__)
    assert [n for n in public if issubclass(vars(module)[n], registry.base(package))] == [component.__name__]
    assert component.__doc__


def test_the_scanners_see_what_they_look_for():
    """Each rule fires on a line that breaks it."""
    bad = "import os", "from benchmark.data import load", "torch.manual_seed(0)", "print(x.cuda())"
    node = ast.parse("\n".join((*bad, "with torch.no_grad():", "  x.detach()")))
    assert {"os", "benchmark.data"} <= imports(node)
    assert {c for c in calls(node) if FORBIDDEN_CALLS.search(c)} == {"torch.manual_seed", "print", "x.cuda"}
    assert {n for n in names(node) if GRADIENT_CUTS.search(n)} == {"torch.no_grad", "x.detach"}
