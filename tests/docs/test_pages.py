"""Every Python block of README and of the guides runs as it is pasted, and recipes give what they say."""

from pathlib import Path

import pytest

from tests.docs import pages
from tests.docs.recipes import RECIPES
from tests.support.grids import thinned


@pytest.mark.parametrize("page", thinned(pages.PAGES, 2))
def test_page(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    document = pages.parse(page)
    if missing := pages.missing_libraries(document):
        pytest.skip(f"{page} needs {', '.join(missing)}, not installed")
    names = pages.run(document)
    for name, check in RECIPES.items():
        if name in names:
            check(names)


def test_every_recipe_is_on_one_page():
    assigned = {page: pages.assigned_names(pages.parse(page)) for page in pages.PAGES}
    found = {name: [page for page, names in assigned.items() if name in names] for name in RECIPES}
    assert not {name: where for name, where in found.items() if len(where) != 1}
