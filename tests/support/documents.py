"""The Markdown documents of the repository: their programs."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


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
