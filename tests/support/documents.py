"""The Markdown documents of the repository: their programs, links and headings."""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
#: What shows as code: blocks between fences, and text between backticks.
_FENCED = re.compile(r"^( *)(```+).*?^\1\2 *$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"(`+)(?!`).+?(?<!`)\1(?!`)", re.DOTALL)
_LINK = re.compile(r"\]\(<?([^)>\s]+)>?(?:\s+\"[^\"]*\")?\)|(?:src|srcset|href)=\"([^\"\s]+)\"")
_HEADING = re.compile(r"^#{1,6} +(.*?) *#*$", re.MULTILINE)
_NAMED = re.compile(r"<[^>]+ (?:id|name)=\"([^\"]+)\"")


class Block(NamedTuple):
    """A Python program of a document, and the comment before it that says why it is not run, if it has one.

    The comment is "as in FILE", where FILE of the tests or examples has the same lines, or "not run: REASON".
    """

    text: str
    comment: str


def python_blocks(document: Path) -> list[Block]:
    """The Python programs of a document, in their order."""
    found = re.findall(
        r"^( *)(?:<!-- ((?:as in|not run:) [^\n]+) -->\n *)?```python\n(.*?)^\1```$",
        document.read_text(encoding="utf-8"),
        re.MULTILINE | re.DOTALL,
    )
    return [Block(textwrap.dedent(text), comment) for _, comment, text in found]


def run_blocks(document: Path, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Run the programs of a document one after another as one program, with given names; returns all names."""
    names: dict[str, Any] = {"__name__": "__main__", **(given or {})}
    for block in python_blocks(document):
        if not block.comment:
            exec(compile(block.text, str(document), "exec"), names)
    return names


def links(text: str) -> Iterator[str]:
    """The targets of the links and pictures of a document."""
    for found in _LINK.finditer(_INLINE.sub("``", _FENCED.sub("", text))):
        yield found[1] or found[2]


def anchors(text: str) -> set[str]:
    """The anchors of a document, as GitHub makes them of headings, and those that its HTML names."""
    plain = _FENCED.sub("", text)
    names = [_anchor(heading) for heading in _HEADING.findall(plain)]
    before = Counter[str]()
    found = set(_NAMED.findall(plain))
    for name in names:
        found.add(f"{name}-{before[name]}" if before[name] else name)
        before[name] += 1
    return found


def _anchor(heading: str) -> str:
    """The anchor of a heading: its text in lower case, without punctuation, and with hyphens for spaces.

    >>> _anchor("FSDP2 (`fully_shard`, [accelerate](x.md), Trainer)")
    'fsdp2-fully_shard-accelerate-trainer'
    """
    text = re.sub(r"!?\[([^]]*)\]\([^)]*\)", r"\1", heading)
    return re.sub(r"[^\w\- ]", "", text).strip().lower().replace(" ", "-")
