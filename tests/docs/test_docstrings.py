"""Every public name has an example in its docstring, and it does what it says; signatures read short."""

import doctest
import inspect

import pytest

import jax_native_flash_attn


@pytest.mark.parametrize("name", jax_native_flash_attn.__all__)
def test_examples(name: str):
    """In an empty namespace, as they are pasted."""
    docstring = inspect.getdoc(getattr(jax_native_flash_attn, name)) or ""
    assert "\nExamples:\n" in docstring
    example = doctest.DocTestParser().get_doctest(docstring, {}, name, None, None)
    assert any(x.want for x in example.examples)
    report: list[str] = []
    found = doctest.DocTestRunner().run(example, out=report.append)
    assert found.failed == 0, "".join(report)


@pytest.mark.parametrize("name", jax_native_flash_attn.__all__)
def test_signatures_name_types(name: str):
    """`help` prints the names of types, not the unions they stand for."""
    assert not any(text in str(inspect.signature(getattr(jax_native_flash_attn, name))) for text in ("Union", "_src"))
