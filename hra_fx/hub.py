"""Download files from a repository of the Hugging Face Hub."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hra_fx.errors import CheckpointError


def check_options(options: Mapping[str, Any]) -> None:
    """Raise an error for keyword arguments that `huggingface_hub.snapshot_download` does not have."""
    if options:  # huggingface_hub imports slowly
        from huggingface_hub import snapshot_download

        known = inspect.signature(snapshot_download).parameters
        if unknown := [option for option in options if option not in known]:
            raise TypeError(f"unexpected keyword argument {unknown[0]!r}. Use subfolder, {', '.join(known)}.")


def download(source: str | os.PathLike[str], patterns: Sequence[str], options: Mapping[str, Any]) -> Path:
    """Download the files of a repository that match `patterns`, and return its folder in the Hub cache.

    `patterns` and `options` are arguments of `huggingface_hub.snapshot_download`.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    if not isinstance(source, str) or os.path.isfile(source):
        raise CheckpointError(f"{os.fspath(source)}: no such folder. Pass the folder of an adapter.")
    try:
        return Path(snapshot_download(source, allow_patterns=list(patterns), **options))
    except HFValidationError as error:
        raise CheckpointError(
            f"{source}: no such folder, and not a valid Hub repository name. Pass a folder, or a name such as "
            "'user/name'."
        ) from error
    # The Hub's errors and those of its transports have no common base class.
    except Exception as error:
        raise CheckpointError(
            f"{source}: no such folder, and the download from the Hub failed ({' '.join(str(error).split())}). Check "
            "the name, the revision, the network, and that your token may read the repository."
        ) from error
