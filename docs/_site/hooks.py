"""Hooks of mkdocs: pages from outside of docs/, links to files of the repository, and formulas.

The pages are read on GitHub too, so they link to files of the repository by relative paths. The site has pages only:
there, such a link goes to the repository whose address is in pyproject.toml.
"""

from __future__ import annotations

import html
import os
import re
import tomllib
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File
from pymdownx.slugs import slugify

DOCS = Path(__file__).resolve().parent.parent
ROOT = DOCS.parent
URL = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Repository"]
#: Files beside docs/ that are pages of the site.
PAGES = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s#]+)")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_config(config: Any) -> None:
    """Make the anchors of headings as GitHub does."""
    config.mdx_configs["toc"]["slugify"] = slugify(case="lower")


def on_files(files: Any, *, config: Any) -> None:
    """Add the pages from outside of docs/."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=_linked(text, ROOT)))


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Resolve the links that leave docs/."""
    return _linked(markdown, (DOCS / page.file.src_uri).parent)


def on_page_content(content: str, **_: Any) -> str:
    """Formulas as MathML, which browsers draw without a script."""
    return FORMULA.sub(
        lambda found: convert(html.unescape(found[2]), display="inline" if found[1] == "span" else "block"), content
    )


def _linked(text: str, folder: Path) -> str:
    """The text of a page in `folder`, with links between pages, and links to files of the repository."""

    def link(found: re.Match[str]) -> str:
        target = Path(os.path.normpath(folder / found[1]))
        if folder == ROOT and found[1] in PAGES:
            return PAGES[found[1]]
        if target.is_relative_to(DOCS):
            return target.relative_to(DOCS).as_posix() if folder == ROOT else found[1]
        if not target.is_relative_to(ROOT):
            return found[1]
        return f"{URL}/{'tree' if target.is_dir() else 'blob'}/main/{target.relative_to(ROOT).as_posix()}"

    return LINK.sub(link, text)
