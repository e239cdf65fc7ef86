"""The file that a picture is written to: its ending says the format, its folder is there, and it is written whole."""

from __future__ import annotations

import os
import uuid
from collections.abc import Collection
from pathlib import Path

from hra_fx.errors import VisualizeError


def output_file(path: str | os.PathLike[str], formats: Collection[str], *, listed: str = "") -> Path:
    """The path of a file to be written.

    Args:
        path: as the user gave it.
        formats: the endings that can be written, such as `".svg"`; upper and lower case are the same.
        listed: how they are told to who gave another; the endings by themselves if it is empty.

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
            f"{listed or ', '.join(formats)}. Choose one of those endings."
        )
    if not file.parent.is_dir():
        raise VisualizeError(f"path: the folder {str(file.parent)!r} does not exist. Create it, or choose another one.")
    if file.is_dir():
        raise VisualizeError(f"path: {str(file)!r} is a folder. Give the name of a file.")
    return file


def put_whole(path: Path, data: bytes) -> None:
    """Write a file beside its place, and rename it once all of it is there; what was there is kept until then.

    Raises:
        VisualizeError: the disk refused.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     put_whole(Path(folder, "a.svg"), b"<svg/>")
    ...     os.listdir(folder)
    ['a.svg']
    """
    target = path.resolve()  # a link stays one
    beside = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        try:
            beside.write_bytes(data)
            os.replace(beside, target)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        way_out = "What was there is unchanged; give a file that can be written."
        raise VisualizeError(f"path: {path} could not be written ({error}). {way_out}") from error
