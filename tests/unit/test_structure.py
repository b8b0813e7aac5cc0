"""The rooms of the source: who imports whom, and how large they are."""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import jax_native_flash_attn
from tests.support.grids import in_part

pytestmark = in_part(0)

ROOT = Path(jax_native_flash_attn.__file__).parent
# From the ground up: a floor imports floors before it, and itself.
FLOORS = (
    "_semantics",
    "_kernels",
    "_sharding",
    "_autodiff",
    "_keywords",
    "_warnings",
    "_shapes",
    "_convert",
    "_mod_arguments",
    "_arguments",
    "_attention",
    "_strategies",
    "_merge",
    "_options",
    "_implementations",
    "_api",
    "_context_parallel",
    "_explanation",
    "_explain",
    "mods",
    "adapters",
)
MAX_LINES, MAX_FUNCTION_LINES = 300, 120


@functools.cache
def modules() -> dict[str, ast.Module]:
    paths = (path for path in ROOT.rglob("*.py") if path.name != "__init__.py")
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): ast.parse(path.read_text()) for path in paths}


def imports(module: str, tree: ast.Module, known: set[str]) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = module.split(".")[: -node.level]
            origin = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            for alias in node.names:
                inner = f"{origin}.{alias.name}".strip(".")
                yield inner if inner in known else origin


@functools.cache
def edges() -> dict[str, set[str]]:
    trees = modules()
    return {name: set(imports(name, tree, set(trees))) for name, tree in trees.items()}


def drawn(graph: dict[str, set[str]]) -> str:
    return "\n".join(f"{name} -> {', '.join(sorted(targets))}" for name, targets in sorted(graph.items()) if targets)


def test_imports_go_down():
    floor = {name: FLOORS.index(name.split(".")[0]) for name in modules()}
    upward = {name: {x for x in targets if floor[x] > floor[name]} for name, targets in edges().items()}
    assert not drawn(upward)


def test_imports_have_no_cycle():
    left = edges()
    while ground := {name for name, targets in left.items() if not targets & left.keys()}:
        left = {name: targets for name, targets in left.items() if name not in ground}
    assert not drawn(left)


def test_kernel_families_do_not_know_each_other():
    """Only `select` knows them all."""

    def family(name: str) -> str | None:
        _, family, *_ = [*name.split("."), None]
        return family if name.startswith("_kernels.") and family in ("xla", "hopper", "cudnn", "tpu") else None

    across = {
        name: {x for x in targets if family(x) not in (None, family(name))}
        for name, targets in edges().items()
        if name != "_kernels.select"
    }
    assert not drawn(across)


def test_modules_and_functions_are_short():
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in ROOT.rglob("*.py")}
    assert {name: n for name, n in lines.items() if n > MAX_LINES} == {}
    functions = {
        f"{name}.{node.name}": node.end_lineno - node.lineno + 1
        for name, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.end_lineno
    }
    assert {name: n for name, n in functions.items() if n > MAX_FUNCTION_LINES} == {}
