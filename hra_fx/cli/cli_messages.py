"""Ways out that errors give in Python, as a shell takes them."""

from __future__ import annotations

import re

_AS_OPTIONS = (
    (r"\boverwrite=True\b", "--overwrite"),
    (r"\bcolumns=\[\] if every weight is \(out, in\), or columns=\[names of layers that are not\]", "--rows if every "
     "weight is (out, in), or --columns NAME for each layer that is not"),
    (r"\bLeave columns out\b", "Leave --rows and --columns out"),
    (r"\bout_dir: ", ""),
    (r"\bgive out_dir on another disk", "give a folder on another disk"),
    (r"\bgive another out_dir", "give another folder"),
    (r"\badapter_dir: ", ""),
    (r"\badapter_dir=\{'(\w+)': .+?\}", r"--part \1"),
    (r"\badapter_dir=\{subfolder: adapter\}", "--part SUBFOLDER"),
)  # fmt: skip


def for_a_shell(words: str) -> str:
    """An error's words, with options in place of arguments.

    >>> for_a_shell("out_dir: folded is there and not empty. Give another folder, or overwrite=True.")
    'folded is there and not empty. Give another folder, or --overwrite.'
    """
    for pattern, option in _AS_OPTIONS:
        words = re.sub(pattern, option, words)
    return words
