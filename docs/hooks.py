"""Hooks of the site: every page is in the navigation, and files of the repository that pages link to come along."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"\]\(((?:\.\./)+[^)#\s]+)")


REST = "How to"
"""Section of pages that the navigation does not name."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Puts the pages of a folder where the navigation names the folder, and adds those that it does not name."""
    nav = [expanded(entry) for entry in config.nav or []]
    named = re.findall(r"[\w/-]+\.md", str(nav))
    pages = sorted(page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md"))
    for entry in nav:
        if isinstance(entry, dict) and REST in entry:
            entry[REST] += [page for page in pages if page not in named]
    config.nav = nav
    return config


def expanded(entry: object) -> object:
    """An entry of the navigation with its folders' pages."""
    if not isinstance(entry, dict):
        return entry
    ((title, inner),) = entry.items()
    if not isinstance(inner, list):
        return entry
    pages: list[object] = []
    for item in inner:
        if isinstance(item, str) and item.endswith("/"):
            found = sorted((ROOT / "docs" / item).glob("*.md"))
            pages += [{page.stem: page.relative_to(ROOT / "docs").as_posix()} for page in found]
        else:
            pages.append(expanded(item))
    return {title: pages}


def outside(page: str, target: str) -> str | None:
    """A link's place in the repository where that is a file outside the folder of pages."""
    path = (ROOT / "docs" / page).parent.joinpath(target).resolve()
    path = path / "__init__.py" if path.is_dir() else path
    if not path.is_file() or path.is_relative_to(ROOT / "docs") or not path.is_relative_to(ROOT):
        return None
    return path.relative_to(ROOT).as_posix()


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds what pages link to outside their folder."""
    for page in list(files.documentation_pages()):
        for target in LINK.findall(page.content_string):
            path = outside(page.src_uri, target)
            if path is not None and files.get_file_from_path(copied(path)) is None:
                files.append(File.generated(config, copied(path), content=(ROOT / path).read_text(encoding="utf-8")))
    return files


def copied(path: str) -> str:
    """Where a file of the repository lies in the site; as text, so that a browser shows it."""
    return f"repository/{path}.txt"


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Leads links to such files to their copies."""

    def led(found: re.Match[str]) -> str:
        path = outside(page.file.src_uri, found[1])
        up = "../" * page.file.src_uri.count("/")
        return found[0] if path is None else f"]({up}{copied(path)}"

    return LINK.sub(led, markdown)
