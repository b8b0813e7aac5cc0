"""Links of the Markdown pages point to what exists, here and on a package index, and lines stay short."""

import functools
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

from markdown_it import MarkdownIt
from markdown_it.token import Token
from mdit_py_plugins.anchors import anchors_plugin

ROOT = Path(__file__).parents[2]
FILES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("findings/*.md")])
LONGEST = 160


def tokens(text: str) -> Iterator[Token]:
    markdown = MarkdownIt().use(anchors_plugin, max_level=6)
    for token in markdown.parse(text):
        yield token
        yield from token.children or ()


def links(text: str) -> set[str]:
    found = {str(t.attrs.get("href") or t.attrs.get("src")) for t in tokens(text) if t.type in ("link_open", "image")}
    html = "".join(t.content for t in tokens(text) if t.type in ("html_block", "html_inline"))
    return found | set(re.findall(r'(?:href|src(?:set)?)="([^"]+)"', html))


@functools.cache
def anchors(path: Path) -> set[str]:
    return {str(token.attrs["id"]) for token in tokens(path.read_text()) if token.type == "heading_open"}


def is_absolute(link: str) -> bool:
    return re.match(r"[a-z]+:", link) is not None


def broken(path: Path) -> list[str]:
    """The relative links of a page that point nowhere."""
    found: list[str] = []
    for link in links(path.read_text()):
        if is_absolute(link):
            continue
        name, _, anchor = unquote(link).partition("#")
        target = path.parent / name if name else path
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            found.append(link)
    return sorted(found)


def test_relative_links():
    assert not {str(path.relative_to(ROOT)): found for path in FILES if (found := broken(path))}


def test_lines():
    long = {
        f"{path.relative_to(ROOT)}:{number}"
        for path in FILES
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if len(line) > LONGEST
    }
    assert not long


def test_readme_names_every_example():
    named = set(re.findall(r"uv run (examples/\w+\.py)", (ROOT / "README.md").read_text()))
    assert named == {f"examples/{path.name}" for path in ROOT.glob("examples/[a-z]*.py")}


def test_readme_on_a_package_index():
    """Its relative links become links to the repository's files, by the substitutions of pyproject.toml."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    readme = (ROOT / "README.md").read_text()
    relative = {link for link in links(readme) if not is_absolute(link)}
    for change in settings["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]:
        readme = re.sub(change["pattern"], change["replacement"], readme)
    home = settings["project"]["urls"]["Homepage"]
    images = {str(token.attrs["src"]) for token in tokens(readme) if token.type == "image"}
    expected = {link if link.startswith("#") else f"{home}/blob/HEAD/{link}" for link in relative}
    found = {link.replace(f"{home}/raw/", f"{home}/blob/") for link in links(readme)}
    assert expected <= found
    assert all(link.startswith("#") or is_absolute(link) for link in found)
    assert images
    assert all(image.startswith(f"{home}/raw/HEAD/") for image in images)
