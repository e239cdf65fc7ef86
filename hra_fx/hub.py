"""Find a folder, locally or in a repository of the Hugging Face Hub."""

from __future__ import annotations

import glob
import inspect
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hra_fx.errors import CheckpointError


def local_folder(
    source: str | os.PathLike[str], subfolder: str | None, files: Sequence[str], options: Mapping[str, Any]
) -> Path:
    """The local folder `source`; or the folder in the Hub cache to which these files in `subfolder` are downloaded.

    `options` are arguments of `huggingface_hub.snapshot_download`; others raise a `TypeError`.
    """
    if os.path.isdir(source) and not options:  # huggingface_hub imports slowly
        return Path(source)
    from huggingface_hub import snapshot_download

    chosen = ("repo_id", "allow_patterns")  # by the arguments above
    known = [name for name in inspect.signature(snapshot_download).parameters if name not in chosen]
    if unknown := [option for option in options if option not in known]:
        raise TypeError(f"unexpected keyword argument {unknown[0]!r}. Use subfolder, {', '.join(known)}.")
    if os.path.isdir(source):
        return Path(source)
    if not isinstance(source, str) or os.path.isfile(source):
        raise CheckpointError(f"{os.fspath(source)}: no such folder. Pass the folder of an adapter.")
    try:
        within = f"{glob.escape(subfolder)}/" if subfolder else ""
        return Path(snapshot_download(source, allow_patterns=[within + file for file in files], **options))
    # The Hub's errors and those of its transports have no common base class.
    except Exception as error:
        raise CheckpointError(
            f"{source}: no such folder, and the download from the Hub failed ({' '.join(str(error).split())}). Check "
            "the name, the revision, the network, and that your token may read the repository."
        ) from error
