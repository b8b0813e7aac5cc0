"""What MkDocs does not do itself: pages from outside of docs/, links to the repository, notebooks, the navigation.

Sources are written for readers of the repository: README links to `docs/design.md`, a guide to `../../examples/x.py`.
"""

import base64
import re
import textwrap
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath
from typing import Any

import jupytext
import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbclient import NotebookClient
from traitlets.config import Config

ROOT = Path(__file__).parents[1]
# Pages that do not lie in docs/, by their place in the repository.
OUTSIDE = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
# What comes first in a folder; all else follows by name.
FIRST = {
    "guides": "first_steps which_path packed_sequences decoding models dropout derivatives biases score_mod "
    "long_context exporting quantisation warnings flax keras equinox haiku arguments coming_from_jax_nn",
    "notebooks": "first_steps masks memory_and_speed",
}
# The tabs, with pages or folders of each.
TABS = {
    "Home": ["index.md"],
    "Guides": ["guides"],
    "Notebooks": ["notebooks"],
    "Reference": ["api.md", "transformations.md"],
    "Benchmarks": ["benchmarks.md", "benchmarks_gpu.md", "measurements"],
    "Design": ["design.md", "context_parallel.md"],
    "Limits": ["limits.md"],
    "Project": ["changelog.md", "contributing.md"],
}
LINK = re.compile(r"""(\]\(|(?:src|href|srcset)=")([^)\s"#]+)([^)\s"]*)""")


def on_files(files: Files, config: MkDocsConfig) -> None:
    for source, page in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    for path in sorted((ROOT / "docs/notebooks").glob("*.py")):
        for name, content in execute(path).items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))
    config.nav = navigation(sorted(file.src_uri for file in files.documentation_pages()))


def navigation(pages: list[str]) -> list[Any]:
    """Tabs of the pages that there are; one that no tab names is in the last tab."""
    tabs = {tab: [page for place in places for page in below(place, pages)] for tab, places in TABS.items()}
    named = {page for found in tabs.values() for page in found}
    tabs["Project"] += [page for page in pages if page not in named]
    return [{tab: found[0] if len(found) == 1 else found} for tab, found in tabs.items() if found]


def below(place: str, pages: Iterable[str]) -> list[str]:
    """A page, or those of a folder: its index, then in the order of FIRST."""
    order = ["README", "index", *FIRST.get(place, "").split()]

    def rank(page: str) -> tuple[int, str]:
        stem = PurePosixPath(page).stem
        return (order.index(stem) if stem in order else len(order)), stem

    return sorted((page for page in pages if page == place or page.startswith(f"{place}/")), key=rank)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links between places of the repository become links between pages, or into the repository on the web.

    And a page that has a tab for itself has no list of pages beside it.
    """
    if page.parent is None:
        page.meta["hide"] = ["navigation"]
    sources = {page: source for source, page in OUTSIDE.items()}
    here = page.file.src_uri
    folder = PurePosixPath(sources.get(here, f"docs/{here}")).parent

    def moved(match: re.Match[str]) -> str:
        before, link, anchor = match.groups()
        if ":" in link or link.startswith("/"):
            return match[0]
        target = normpath(folder / link)
        in_site = OUTSIDE.get(target, target.removeprefix("docs/"))
        if (target in OUTSIDE or target.startswith("docs/")) and files.get_file_from_path(in_site):
            return f"{before}{relpath(in_site, PurePosixPath(here).parent)}{anchor}"
        if (ROOT / target).exists():
            kind = "tree" if (ROOT / target).is_dir() else "blob"
            return f"{before}{config.extra['repository']}/{kind}/HEAD/{target}{anchor}"
        return match[0]

    return LINK.sub(moved, markdown)


def execute(path: Path) -> dict[str, Any]:
    """A notebook in Jupytext's percent format, run: its page, its pictures, and itself as a file of Jupyter.

    An error in a cell, and a word on stderr, stop the build.
    """
    notebook = jupytext.read(path)
    settings = Config(KernelManager={"transport": "ipc"})  # a kernel warns of TCP
    NotebookClient(notebook, timeout=300, kernel_name="python3", coalesce_streams=True, config=settings).execute()
    parts, pictures = [], {}
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
            continue
        code = f"```python\n{cell.source.strip()}\n```"
        if "hide-input" in cell.metadata.get("tags", ()):
            code = f'??? note "The code of this cell"\n\n{textwrap.indent(code, "    ")}'
        parts.append(code)
        for output in cell.outputs:
            data = output.get("data", {})
            if output.get("name") == "stderr":
                raise RuntimeError(f"{path}: a cell printed on stderr: {output.text}")
            if "image/png" in data:
                name = f"{path.stem}_{len(pictures) + 1}.png"
                pictures[name] = base64.b64decode(data["image/png"])
                parts.append(f"![Output of the cell above]({name})")
            else:
                text = output.get("text") or data["text/plain"]
                parts.append(f"```{{ .text .output }}\n{text.rstrip()}\n```")
    title, _, text = "\n\n".join(parts).partition("\n")
    page = f"{title}\n\n[This page as a Jupyter notebook]({path.stem}.ipynb){{ download }}\n{text}"
    return {f"{path.stem}.md": page, f"{path.stem}.ipynb": nbformat.writes(notebook), **pictures}
