"""An extension of Griffe, which reads the docstrings: every doctest is shown as code.

Griffe knows the section `Examples:`. Ours have `Example:`, or a doctest at the end without a heading.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

HEADING = re.compile(r"^Example:$", re.MULTILINE)
#: A paragraph that begins with a prompt, up to the end of the docstring.
BARE = re.compile(r"\n\n(>>> .*)\Z", re.DOTALL)


class Doctests(griffe.Extension):
    """Puts the doctests of all docstrings into a section `Examples:`."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change the text of a docstring before it is parsed."""
        if obj.docstring:
            text = HEADING.sub("Examples:", obj.docstring.value)
            obj.docstring.value = BARE.sub(lambda found: f"\n\nExamples:\n{_indented(found[1])}", text)


def _indented(text: str) -> str:
    return "\n".join(f"    {line}".rstrip() for line in text.splitlines())
