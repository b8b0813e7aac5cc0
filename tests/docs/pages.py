"""The pages for readers: README and the guides, their Python blocks and what these need."""

import ast
import contextlib
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
from sybil import Document
from sybil.parsers.markdown import PythonCodeBlockParser

from tests.support.environment import lenient_promotion

ROOT = Path(__file__).parents[2]
PAGES = {
    str(path.relative_to(ROOT).with_suffix("")): path
    for path in [ROOT / "README.md", *sorted((ROOT / "docs" / "guides").glob("*.md"))]
    if "```python" in path.read_text()
}
# A page about a library that is not installed is skipped; any other import must succeed.
OPTIONAL = {"equinox", "flax", "haiku", "keras", "optax"}


def parse(page: str) -> Document:
    return Document.parse(str(PAGES[page]), PythonCodeBlockParser())


def missing_libraries(document: Document) -> list[str]:
    """Those of `OPTIONAL` that the page imports and this environment lacks."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source(document))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    libraries = {name.partition(".")[0] for name in names} & OPTIONAL
    return sorted(name for name in libraries if importlib.util.find_spec(name) is None)


def assigned_names(document: Document) -> set[str]:
    """The variables that the blocks of a page set."""
    nodes = ast.walk(ast.parse(source(document)))
    return {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}


def source(document: Document) -> str:
    return "\n".join(str(example.parsed) for example in document)


def run(document: Document) -> dict[str, Any]:
    """Run the blocks in order, as in one script, and return what they define. A failure names the line of the page."""
    document.namespace["__name__"] = "__main__"
    with _undone():
        for example in document:
            example.evaluate()
    return document.namespace


@contextlib.contextmanager
def _undone() -> Iterator[None]:
    """Restore what a page may change: JAX's options and attention function, and the environment."""
    options, variables = dict(jax.config.values), dict(os.environ)
    with (
        lenient_promotion(),
        mock.patch.object(jax.nn, "dot_product_attention", jax.nn.dot_product_attention),
    ):
        try:
            yield
        finally:
            for name, value in options.items():
                if jax.config.values[name] != value:
                    jax.config.update(name, value)
            # Not all of them, as `mock.patch.dict` does: a thread of XLA that reads one meanwhile would crash.
            for name in os.environ.keys() - variables.keys():
                del os.environ[name]
            for name, value in variables.items():
                if os.environ.get(name) != value:
                    os.environ[name] = value
