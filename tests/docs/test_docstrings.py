"""Every public name has an example, which does what it says, and a place in the reference; help reads short."""

import doctest
import inspect
import operator
import pydoc
import re
from pathlib import Path

import pytest

import jax_native_flash_attn
from jax_native_flash_attn import mods
from tests.support.grids import thinned

_MODS = [f"mods.{name}" for name in mods.__all__ if "Examples:" in (getattr(mods, name).__doc__ or "")]


@pytest.mark.parametrize("name", thinned([*jax_native_flash_attn.__all__, *_MODS], 2))
def test_examples(name: str, monkeypatch: pytest.MonkeyPatch):
    """In an empty namespace, as they are pasted, with warnings as users have them."""
    monkeypatch.delenv("JAX_NATIVE_FLASH_ATTN_WARNINGS", raising=False)
    docstring = inspect.getdoc(operator.attrgetter(name)(jax_native_flash_attn)) or ""
    assert "\nExamples:\n" in docstring
    example = doctest.DocTestParser().get_doctest(docstring, {}, name, None, None)
    assert any(x.want for x in example.examples)
    report: list[str] = []
    found = doctest.DocTestRunner().run(example, out=report.append)
    assert found.failed == 0, "".join(report)


@pytest.mark.parametrize("name", jax_native_flash_attn.__all__)
def test_help_names_types(name: str):
    """And not the unions that they stand for."""
    text = pydoc.plain(pydoc.render_doc(getattr(jax_native_flash_attn, name)))
    assert not any(part in text for part in ("Union[", "._src."))


def test_reference_has_every_name():
    page = (Path(__file__).parents[2] / "docs/api.md").read_text()
    named = re.findall(r"^::: jax_native_flash_attn\.(\w+)$", page, re.MULTILINE)
    assert sorted(named) == sorted(jax_native_flash_attn.__all__)
    assert sorted(re.findall(r"^::: jax_native_flash_attn\.mods\.(\w+)$", page, re.MULTILINE)) == sorted(mods.__all__)
