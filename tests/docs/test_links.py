"""Links of the documents that are not pages lead to files, and the reference has every public name once.

`make docs` checks links, headings and the navigation of all pages.
"""

from __future__ import annotations

import re
from collections import Counter

from documents import DOCS, ROOT

import hra_fx
from hra_fx import integrations, passes


def test_links_lead_to_files() -> None:
    found = {
        link
        for document in ROOT.glob("*.md")
        for link in re.findall(r"(?:\]\(|src=\"|href=\")([^)#\"\s]+)", document.read_text(encoding="utf-8"))
        if not re.match(r"[a-z]+:", link)
    }
    assert len(found) > 5
    assert [link for link in found if not (ROOT / link).exists()] == []


def test_every_public_name_is_in_the_reference_once() -> None:
    pages = [page.read_text(encoding="utf-8") for page in (DOCS / "api").glob("*.md")]
    shown = Counter(re.findall(r"^::: (\S+)$", "\n".join(pages), re.MULTILINE))
    names = {f"hra_fx.{name}" for name in hra_fx.__all__}
    names |= {f"hra_fx.integrations.{name}" for name in integrations.__all__}
    names |= {f"{getattr(passes, name).__module__}.{name}" for name in passes.__all__}
    assert shown == Counter(names)
