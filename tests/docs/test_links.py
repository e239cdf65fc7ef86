"""Links in the documents lead to files and headings that exist, and the reference has every public name once."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
from documents import DOCS, ROOT, anchors, links

import hra_fx
from hra_fx import integrations, passes

DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md"))]


def broken(document: Path) -> list[str]:
    """What is wrong with the links of a document."""
    text = document.read_text(encoding="utf-8")
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


def test_every_page_is_in_the_navigation_once() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    pages = re.findall(r"[\w/-]+\.md$", navigation, re.MULTILINE)
    pages_of_docs = [document for document in DOCS.rglob("*.md") if document.parent.name != "upstream"]
    of_docs = {document.relative_to(DOCS).as_posix() for document in pages_of_docs}
    assert sorted(pages) == sorted({*of_docs, "changelog.md", "contributing.md"})
    assert len([page for page in DOCS.rglob("*.md") if page.parent.name != "api"]) <= 20


def test_every_public_name_is_in_the_reference_once() -> None:
    pages = [page.read_text(encoding="utf-8") for page in (DOCS / "api").glob("*.md")]
    shown = Counter(re.findall(r"^::: (\S+)$", "\n".join(pages), re.MULTILINE))
    names = {f"hra_fx.{name}" for name in hra_fx.__all__}
    names |= {f"hra_fx.integrations.{name}" for name in integrations.__all__}
    names |= {f"{getattr(passes, name).__module__}.{name}" for name in passes.__all__}
    assert shown == Counter(names)
