"""Links in the documents lead to files and headings that exist, as GitHub and the site show them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from documents import DOCS, ROOT, anchors, links

DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md"))]


def broken(document: Path, text: str | None = None) -> list[str]:
    """What is wrong with the links of a document."""
    text = document.read_text(encoding="utf-8") if text is None else text
    found = []
    for link in links(text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        if path and not (target.is_relative_to(ROOT) and target.exists()):
            found.append(f"{link}: no such file")
        elif anchor and target.suffix == ".md":
            there = text if target == document else target.read_text(encoding="utf-8")
            if anchor not in anchors(there):
                found.append(f"{link}: no such heading")
    return found


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: str(document.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    assert not broken(document)


def test_the_usual_documents_are_there() -> None:
    names = {str(document.relative_to(ROOT)) for document in DOCUMENTS}
    assert names >= {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs/index.md", "docs/api/core.md"}


def test_broken_links_are_found() -> None:
    text = (
        "# A `b_c`, (d)\n[1](peft.md) [2](#a-b_c-d) [3](no.md) [4](#none) ![5](no.svg) [6](../README.md#none)\n"
        '[7](https://example.com/none) `[8](no.md)` <img src="no.png"> [9](../../outside.md)\n'
        "```\n[10](no.md)\n# None\n```\n"
    )
    assert broken(DOCS / "made_up.md", text) == [
        "no.md: no such file",
        "#none: no such heading",
        "no.svg: no such file",
        "../README.md#none: no such heading",
        "no.png: no such file",
        "../../outside.md: no such file",
    ]


def test_anchors_of_equal_headings_are_numbered() -> None:
    assert anchors("# A\n## A\n## A\n```\n# B\n```\n") == {"a", "a-1", "a-2"}


def test_every_page_is_in_the_navigation_once() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    pages = re.findall(r"[\w/-]+\.md$", navigation, re.MULTILINE)
    of_docs = {document.relative_to(DOCS).as_posix() for document in DOCS.rglob("*.md")}
    assert sorted(pages) == sorted({*of_docs, "changelog.md", "contributing.md"})
