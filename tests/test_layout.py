"""Rules of the code's layout, read from its source: permitted imports, sizes of folders and functions.

The code is fastres/, kernels/ (imported as fastres_kernels) and bench/. An import counts anywhere in a module or in a
function, except under `if TYPE_CHECKING`.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from tests.commands import ROOT, run_worker

FOLDERS = {"fastres": "fastres", "kernels": "fastres_kernels", "bench": "bench"}

# Lowest first. A module imports from its own layer and from the lines above it.
LAYERS = (
    "fastres.utils",
    "fastres.models",
    "fastres.config",
    "fastres.distributed",
    "fastres.data",
    "fastres.training",
    "fastres.runs",
    "fastres.profiling",
    "fastres",  # the commands: fastres/*.py
)
# fastres.testing stands beside the layers, above this one.
BELOW_TESTING = "fastres.training"

NOT_FOR_PRODUCTS = (
    "fastres_kernels.experimental",
    "fastres_kernels.analysis",
    "fastres_kernels.report",
    "fastres.testing",
    "unittest.mock",
)
# (module, function, imported package): the reason.
PERMITTED = {
    ("fastres.models.registry", "build_model", "fastres_kernels.experimental"): (
        "the opt-in option fused_convolutions puts experimental convolutions into a network that it builds"
    )
}

MOST_MODULES = 11  # in a folder, without its __init__
MOST_LINES = 60  # of a function
MOST_LINES_OF = {("fastres.train", "train"): 120}  # the whole program on one page
# (module, function): the reason why it may be longer.
LONG_FUNCTIONS: dict[tuple[str, str], str] = {}


# ---- the source ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Import:
    """An import statement; `function` is the outermost function around it, or empty."""

    importer: str
    imported: str
    function: str
    line: int

    def __str__(self) -> str:
        return f"{self.importer}, line {self.line}, imports {self.imported}"


@cache
def modules() -> dict[str, Path]:
    """Return every module of the code by its import name."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = [package, *path.relative_to(ROOT / folder).with_suffix("").parts]
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(modules()[module].read_text(encoding="utf-8"))


@cache
def imports() -> tuple[Import, ...]:
    return tuple(one for module in modules() for one in _imports_in(tree_of(module), module))


def _imports_in(node: ast.AST, module: str, function: str = "") -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            for name in _imported(child, module):
                yield Import(module, name, function, child.lineno)
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for other in child.orelse:
                yield from _imports_in(other, module, function)
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _imports_in(child, module, function or child.name)
        else:
            yield from _imports_in(child, module, function)


def _imported(statement: ast.Import | ast.ImportFrom, module: str) -> Iterator[str]:
    """Yield the modules that a statement imports: `from a import b` is a.b if that is a module, and a otherwise."""
    if isinstance(statement, ast.Import):
        yield from (alias.name for alias in statement.names)
        return
    source = statement.module or ""
    if statement.level:
        package = module if modules()[module].name == "__init__.py" else module.rpartition(".")[0]
        for _ in range(statement.level - 1):
            package = package.rpartition(".")[0]
        source = f"{package}.{source}".rstrip(".")
    names = [f"{source}.{alias.name}" for alias in statement.names]
    yield from dict.fromkeys(name if name in modules() or name in NOT_FOR_PRODUCTS else source for name in names)


def is_in(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def layer_of(module: str) -> int | None:
    """Return the module's place in LAYERS, or None if it is in no layer."""
    for place, layer in enumerate(LAYERS[:-1]):
        if is_in(module, layer):
            return place
    is_command = module in modules() and modules()[module].parent == ROOT / "fastres"
    return len(LAYERS) - 1 if is_command else None


def is_product(module: str) -> bool:
    return not any(is_in(module, package) for package in ("bench", *NOT_FOR_PRODUCTS))


def listed(lines: list[str]) -> str:
    return "\n".join(["", *lines])


# ---- permitted imports ------------------------------------------------------------------------------------


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph: dict[str, set[str]] = {module: set() for module in modules()}
    for one in imports():
        if one.imported in graph and one.imported != one.importer:
            graph[one.importer].add(one.imported)
    while free := [module for module, needs in graph.items() if not needs & graph.keys()]:
        for module in free:
            del graph[module]
    # Each module that is left is in a cycle or imports one. A module that none of them imports is in no cycle.
    while unused := graph.keys() - set().union(*graph.values(), set()):
        for module in unused:
            del graph[module]
    assert not graph, listed([f"{module} -> {sorted(needs & graph.keys())}" for module, needs in graph.items()])


def test_packages_of_fastres_import_from_lower_ones_only() -> None:
    upwards = []
    for one in imports():
        importer, imported = layer_of(one.importer), layer_of(one.imported)
        if importer is not None and imported is not None and imported > importer:
            upwards.append(str(one))
    assert not upwards, listed(upwards)


def test_every_package_of_fastres_has_a_layer() -> None:
    homeless = [m for m in modules() if is_in(m, "fastres") and layer_of(m) is None]
    assert all(is_in(module, "fastres.testing") for module in homeless), homeless


def test_testing_stands_above_training() -> None:
    highest = LAYERS.index(BELOW_TESTING)
    above = [
        str(one)
        for one in imports()
        if is_in(one.importer, "fastres.testing") and (layer_of(one.imported) or 0) > highest
    ]
    assert not above, listed(above)


def test_the_kernels_know_nothing_of_fastres() -> None:
    wrong = [str(one) for one in imports()
             if is_in(one.importer, "fastres_kernels") and is_in(one.imported, "fastres")]  # fmt: skip
    assert not wrong, listed(wrong)


@pytest.mark.parametrize("package", ["bench", "tests"])
def test_neither_fastres_nor_the_kernels_import(package: str) -> None:
    wrong = [str(one) for one in imports()
             if not is_in(one.importer, "bench") and is_in(one.imported, package)]  # fmt: skip
    assert not wrong, listed(wrong)


def test_product_code_imports_no_experiments_reports_or_test_doubles() -> None:
    wrong = []
    for one in imports():
        for package in NOT_FOR_PRODUCTS:
            permitted = (one.importer, one.function, package) in PERMITTED
            if is_product(one.importer) and is_in(one.imported, package) and not permitted:
                wrong.append(str(one))
    assert not wrong, listed(wrong)


def test_every_permission_is_used() -> None:
    used = {
        (one.importer, one.function, package)
        for one in imports()
        for package in NOT_FOR_PRODUCTS
        if is_in(one.imported, package)
    }
    assert PERMITTED.keys() <= used, PERMITTED.keys() - used


# ---- sizes --------------------------------------------------------------------------------------------------


def test_no_folder_has_more_modules_than_the_limit() -> None:
    sizes: dict[Path, int] = {}
    for module, path in modules().items():
        if path.name != "__init__.py" and not is_in(module, "bench"):
            sizes[path.parent] = sizes.get(path.parent, 0) + 1
    crowded = [f"{folder}: {size}" for folder, size in sizes.items() if size > MOST_MODULES]
    assert not crowded, listed(crowded)


@dataclass(frozen=True)
class Function:
    """A function or method, with its name in the module, such as Class.method."""

    module: str
    name: str
    lines: int


def _functions_in(node: ast.AST, module: str, outer: str = "") -> Iterator[Function]:
    for child in ast.iter_child_nodes(node):
        name = outer
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            name = f"{outer}.{child.name}" if outer else child.name
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) and not _is_a_kernel(child):
            assert child.end_lineno is not None
            yield Function(module, name, child.end_lineno - child.lineno + 1)
        yield from _functions_in(child, module, name)


def _is_a_kernel(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Return True for a function that Triton compiles."""
    return any("triton.jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def test_no_function_is_longer_than_a_page() -> None:
    long = []
    for module in modules():
        for one in _functions_in(tree_of(module), module):
            key = (module, one.name)
            if one.lines > MOST_LINES_OF.get(key, MOST_LINES) and key not in LONG_FUNCTIONS:
                long.append(f"{module}.{one.name}: {one.lines} lines")
    assert not long, listed(long)


# ---- importing ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_importing_any_module_changes_neither_the_environment_nor_torchs_switches() -> None:
    """A conftest.py is left out, because pytest imports it in order to set up a session."""
    importable = [name for name in modules() if not name.endswith((".conftest", ".__main__"))]
    # The tests hide the GPU by a variable that a module might set to the same value.
    done = run_worker("import_everything", *importable, env={"CUDA_VISIBLE_DEVICES": None})
    assert done.returncode == 0, done.stderr
    changed = json.loads(done.stdout.splitlines()[-1])
    assert changed == {}
