"""Borders between modules, by their source: which private names a module uses, and who imports whom."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from benchmarks._compat import TRL_OVERRIDES
from sdft._compat import OVERRIDES

ROOT = Path(__file__).parent.parent
PACKAGES = ("sdft_kernels", "sdft", "benchmarks")
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}
INHERITED = {*OVERRIDES, *TRL_OVERRIDES}


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(FILES[module].read_text(encoding="utf-8"))


def is_private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__")) and name != "_"


def defined_in(module: str) -> set[str]:
    """Names that a module gives to functions, classes, variables and attributes."""
    found = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found |= {node.attr} if ast.unparse(node.value) in ("self", "cls") else set()
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found


def foreign_private_names(module: str) -> Iterator[str]:
    """Private names that a module takes from elsewhere: imports, attributes, names in getattr and its like."""
    own = defined_in(module) | INHERITED
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.ImportFrom):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            names = [name for name in names if name != "_compat"]
        elif isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.Attribute):
            names = [] if node.attr in own else [node.attr]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr", "delattr"):
            names = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
        else:
            continue
        yield from (f"line {node.lineno}: {name}" for name in names if is_private(name))


@pytest.mark.parametrize("module", [name for name in FILES if not name.endswith("._compat")])
def test_private_names_of_others_are_in_compat_alone(module: str) -> None:
    found = list(foreign_private_names(module))
    assert not found, f"{module} uses private names of other modules: {found}"


def imported(module: str, *, everywhere: bool) -> set[str]:
    """Our modules that a module imports: at its top, or `everywhere` in functions and for types too."""
    nodes = list(ast.walk(tree(module))) if everywhere else list(at_the_top(tree(module).body))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in FILES else node.module for name in names}
    return {name for name in found if name.split(".")[0] in PACKAGES}


def at_the_top(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that an import of the module runs, without those for types alone."""
    for node in body:
        yield node
        if isinstance(node, ast.If) and ast.unparse(node.test) != "TYPE_CHECKING":
            yield from at_the_top([*node.body, *node.orelse])
        elif isinstance(node, ast.Try):
            yield from at_the_top([*node.body, *node.orelse, *node.finalbody])


@pytest.mark.parametrize(("package", "knows"), [("sdft_kernels", set()), ("sdft", {"sdft_kernels"})])
def test_a_package_imports_only_what_is_below_it(package: str, knows: set[str]) -> None:
    for module in FILES:
        if module.split(".")[0] == package:
            others = {name.split(".")[0] for name in imported(module, everywhere=True)} - {package}
            assert others <= knows, f"{module} imports {others - knows}"


def test_no_module_imports_itself_by_way_of_others() -> None:
    imports = {module: imported(module, everywhere=False) for module in FILES}
    finished: set[str] = set()

    def follow(module: str, path: list[str]) -> None:
        assert module not in path, f"a circle of imports: {' → '.join([*path[path.index(module) :], module])}"
        if module not in finished:
            for other in imports.get(module, ()):
                follow(other, [*path, module])
            finished.add(module)

    for module in FILES:
        follow(module, [])
