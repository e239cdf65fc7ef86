"""The file that a picture is written to: its ending says the format, and its folder is there."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from hra_fx.errors import VisualizeError


def output_file(path: str | os.PathLike[str], formats: Collection[str]) -> Path:
    """The path of a file to be written.

    Args:
        path: as the user gave it.
        formats: the endings that can be written, such as `".svg"`; upper and lower case are the same.

    Raises:
        VisualizeError: another ending, no such folder, or a folder of that name.

    Example:
        >>> output_file("strip.gif", [".svg", ".png"])
        Traceback (most recent call last):
        hra_fx.errors.VisualizeError: path: 'strip.gif' ends in '.gif', and the formats that can be written are ...
    """
    file = Path(path)
    if file.suffix.lower() not in formats:
        raise VisualizeError(
            f"path: {file.name!r} ends in {file.suffix or 'nothing'!r}, and the formats that can be written are "
            f"{', '.join(formats)}. Choose one of those endings."
        )
    if not file.parent.is_dir():
        raise VisualizeError(f"path: the folder {str(file.parent)!r} does not exist. Create it, or choose another one.")
    if file.is_dir():
        raise VisualizeError(f"path: {str(file)!r} is a folder. Give the name of a file.")
    return file
