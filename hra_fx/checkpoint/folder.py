"""The folder of an adapter: found here or on the Hub, and written so that it is always whole.

Source of the layout: PEFT 0.21, `PeftModel.save_pretrained`: `adapter_config.json` beside `adapter_model.safetensors`.
"""

from __future__ import annotations

import contextlib
import glob
import os
import posixpath
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from hra_fx.checkpoint.weights import non_finite
from hra_fx.config import CONFIG_NAME
from hra_fx.errors import CheckpointError

__all__ = ["WEIGHTS_NAME", "find", "write", "write_weights"]

WEIGHTS_NAME = "adapter_model.safetensors"
_PICKLE_NAME = "adapter_model.bin"
_HUB_OPTIONS = (
    "cache_dir",
    "endpoint",
    "etag_timeout",
    "force_download",
    "headers",
    "local_files_only",
    "max_workers",
    "revision",
    "token",
    "user_agent",
)
_LISTED = 10


def find(source: str | os.PathLike[str], subfolder: str | None = None, **hub: Any) -> Path:
    """The local folder that holds `adapter_config.json` and `adapter_model.safetensors`.

    Args:
        source: a local folder, or else a string that names a repository on the Hub, which is fetched into its cache.
        subfolder: where in `source` the adapter is, with "/" between names.
        hub: for `huggingface_hub.snapshot_download`, such as `revision`, `token`, `cache_dir`, `local_files_only`.

    Raises:
        CheckpointError: nothing is there, or a file of the two is missing; it names the folder or the file.
        TypeError: an unknown keyword.

    >>> find("runs/of/mine")
    Traceback (most recent call last):
    hra_fx.errors.CheckpointError: runs/of/mine: there is no such folder, and it is no name of a repository...
    """
    for option in hub:
        if option not in _HUB_OPTIONS:
            raise TypeError(f"{option}: is no option of loading. There are subfolder, {', '.join(_HUB_OPTIONS)}.")
    inside = _inside(source, subfolder)
    root = Path(source) if os.path.isdir(source) else _fetch(source, inside, hub)
    folder = root / inside
    if not os.path.isdir(folder):
        raise CheckpointError(f"{folder}: there is no such folder. {_way_out(root, root)}")
    if not os.path.isfile(folder / CONFIG_NAME):
        raise CheckpointError(f"{folder / CONFIG_NAME}: there is no such file. {_way_out(root, folder)}")
    if os.path.isfile(folder / WEIGHTS_NAME):
        return folder
    if os.path.isfile(folder / _PICKLE_NAME):
        way_out = "Open it with PEFT and save it again with safe_serialization=True."
        raise CheckpointError(f"{folder / _PICKLE_NAME}: is a pickle, which is never read. {way_out}")
    raise CheckpointError(f"{folder / WEIGHTS_NAME}: there is no such file. {_way_out(root, folder)}")


def _inside(source: str | os.PathLike[str], subfolder: str | None) -> str:
    """`subfolder` without detours, which cannot lead out of the folder."""
    inside = posixpath.normpath((subfolder or "").replace("\\", "/"))
    if PureWindowsPath(inside).anchor or inside.split("/")[0] == "..":
        way_out = "Give the path of a folder in it, such as 'adapters/first'."
        raise CheckpointError(f"{os.fspath(source)}: the subfolder {subfolder!r} is not in the folder. {way_out}")
    return inside


def _way_out(root: Path, folder: Path) -> str:
    """What to do about a folder without an adapter: its subfolders that have one are named."""
    configs = [config for config in folder.glob(f"*/{CONFIG_NAME}") if os.path.isfile(config.with_name(WEIGHTS_NAME))]
    if not configs:
        return "Give the folder that an adapter was saved in, by PEFT with safe_serialization=True."
    found = sorted(repr(config.parent.relative_to(root).as_posix()) for config in configs)
    names = ", ".join(found[:_LISTED]) + (", ..." if len(found) > _LISTED else "")
    return f"Adapters are in its subfolders {names}: give the path of one of them."


def _fetch(source: str | os.PathLike[str], inside: str, hub: Mapping[str, Any]) -> Path:
    """The folder in the Hub's cache that the files of the repository were fetched to."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    if os.path.isfile(source):
        raise CheckpointError(f"{os.fspath(source)}: is a file. Give the folder that it is in.")
    if not isinstance(source, str):
        raise CheckpointError(f"{os.fspath(source)}: there is no such folder. Give the folder of an adapter.")
    within = "" if inside == "." else glob.escape(inside) + "/"
    try:
        fetched = snapshot_download(source, allow_patterns=[within + CONFIG_NAME, within + WEIGHTS_NAME], **hub)
    except HFValidationError as error:
        reason = "there is no such folder, and it is no name of a repository on the Hub"
        raise CheckpointError(f"{source}: {reason}. Give a folder, or a name such as 'user/name'.") from error
    # The Hub's errors, and those of its transports, have no common base.
    except Exception as error:
        reason = f"is no folder here and could not be fetched from the Hub ({' '.join(str(error).split())})"
        way_out = "Check the name, the revision, the network, and that your token may read it."
        raise CheckpointError(f"{source}: {reason}. {way_out}") from error
    return Path(fetched)


def write(
    directory: str | os.PathLike[str], config_text: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write an adapter into `directory`, which is made where it does not exist.

    Whatever happens, the folder holds the old adapter or the new one: both files are written to the disk beside the
    old ones, then renamed. Killed between the renames it has the new configuration with the old weights; where the
    configuration is the one that is there, only the weights are renamed.

    Args:
        directory: the folder.
        config_text: what `adapter_config.json` is to hold.
        tensors: floating ones must be finite. They may be on any device, strided in any way, and share memory.
        metadata: entries of the safetensors file besides PEFT's `format: pt`.

    Raises:
        CheckpointError: a tensor cannot be saved, and nothing was written; or the disk refused, and the old adapter is
            as it was. It names the key or the folder.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write(folder, "{}", {"base_model.model.0.hra_u": torch.ones(3, 2)}, {})
    ...     sorted(os.listdir(folder))
    ['adapter_config.json', 'adapter_model.safetensors']
    """
    folder = Path(directory)
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise CheckpointError(f"{folder}: is a file. Give a folder to save in.")
    data = _serialized(folder / WEIGHTS_NAME, tensors, metadata)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _put(folder, config_text.encode(), data)
    except OSError as error:
        way_out = "What was there is unchanged; give a folder that can be written to."
        raise CheckpointError(f"{folder}: could not be saved to ({error}). {way_out}") from error


def write_weights(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write one safetensors file as `write` does: beside, then renamed. Errors as there."""
    data = _serialized(path, tensors, metadata)
    try:
        with _beside(path, data) as new:
            os.replace(new, path)
    except OSError as error:
        raise CheckpointError(f"{path}: could not be saved ({error}). What was there is unchanged.") from error


def _serialized(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The content of the weights' file."""
    if not tensors:
        raise CheckpointError(f"{path}: there are no tensors to save. Save an adapter that has vectors.")
    plain: dict[str, Tensor] = {}
    storages: set[int] = set()
    for key, tensor in tensors.items():
        _check(path, key, tensor)
        # safetensors writes the bytes as they lie there: a pending sign would be lost, and it refuses shared memory.
        own = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        if own.untyped_storage().data_ptr() in storages:
            own = own.clone()
        storages.add(own.untyped_storage().data_ptr())
        plain[key] = own
    try:
        return save(plain, {**metadata, "format": "pt"})
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: safetensors cannot hold this ({error}). Use plain tensors and text.") from error


def _check(path: Path, key: str, tensor: Tensor) -> None:
    if tensor.is_meta:
        raise CheckpointError(f"{path}: {key!r} is on the meta device and has no values. Load the model first.")
    if tensor.layout is not torch.strided:
        raise CheckpointError(f"{path}: {key!r} is {tensor.layout}, a file holds dense tensors. Save it to_dense().")
    count = non_finite(tensor.detach())
    if count:
        reason = f"{key!r} has {count} of {tensor.numel()} values that are infinite or NaN"
        raise CheckpointError(f"{path}: {reason}. Nothing was written; go back to before the training diverged.")


def _put(folder: Path, config_text: bytes, data: bytes) -> None:
    """Replace both files, or neither where an exception comes between."""
    config, weights = folder / CONFIG_NAME, folder / WEIGHTS_NAME
    try:
        before = config.read_bytes()
    except FileNotFoundError:
        before = None
    with _beside(weights, data) as new_weights:
        if before == config_text:
            os.replace(new_weights, weights)
            return
        # The way back is laid before it is needed, when the disk may be full.
        with _beside(config, config_text) as new_config, _beside(config, before or b"") as old_config:
            try:
                os.replace(new_config, config)
                os.replace(new_weights, weights)
            except BaseException:
                # An interrupt can also arrive after the last rename, when all is done.
                if new_weights.exists():
                    _put_back(config, None if before is None else old_config)
                raise


def _put_back(config: Path, old: Path | None) -> None:
    if old is None:
        config.unlink(missing_ok=True)
    else:
        os.replace(old, config)


@contextlib.contextmanager
def _beside(target: Path, data: bytes) -> Iterator[Path]:
    """A new file in the folder of `target`, on the disk with all of `data`; removed at the end if it still is there.

    Opened as any file is, for its permissions are to be those that the umask gives.
    """
    path = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(path, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield path
    finally:
        path.unlink(missing_ok=True)
