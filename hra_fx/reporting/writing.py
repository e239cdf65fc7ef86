"""A file that is written whole, or not at all."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

from hra_fx.errors import VisualizeError


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
