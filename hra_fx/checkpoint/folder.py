"""The folder of an adapter: find it locally or on the Hub, read its weights, and write it atomically.

Source of the layout: PEFT 0.21, `PeftModel.save_pretrained`: `adapter_config.json` and `adapter_model.safetensors`.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import posixpath
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from hra_fx.atomic_write import atomic_write, temporary_file
from hra_fx.checkpoint.keys import VECTORS
from hra_fx.config import CONFIG_NAME
from hra_fx.errors import CheckpointError
from hra_fx.hub import check_options, download
from hra_fx.layers.target import REFLECTION
from hra_fx.selection.suggestions import some_of

WEIGHTS_NAME = "adapter_model.safetensors"
_PICKLE_NAME = "adapter_model.bin"
_MAX_LISTED = 10
_SAVED_BY = "Pass the folder that an adapter was saved in (in PEFT, with safe_serialization=True)."


def find(source: str | os.PathLike[str], subfolder: str | None = None, **hub: Any) -> Path:
    """Find the local folder that contains `adapter_config.json` and `adapter_model.safetensors`.

    Args:
        source: a local folder; otherwise the name of a Hub repository, which is downloaded to the cache.
        subfolder: path of the adapter in `source`, with "/" between names.
        hub: passed to `huggingface_hub.snapshot_download`, such as `revision`, `token`, `cache_dir`,
            `local_files_only`.

    Raises:
        CheckpointError: the folder or one of the two files is missing; the message says which.
        TypeError: an unknown keyword argument.

    >>> find("runs/of/mine")
    Traceback (most recent call last):
    hra_fx.errors.CheckpointError: runs/of/mine: no such folder, and not a valid Hub repository name. ...
    """
    check_options(hub)
    inside = posixpath.normpath((subfolder or "").replace("\\", "/"))
    root = Path(source) if os.path.isdir(source) else _download(source, inside, hub)
    folder = root / inside
    if not os.path.isdir(folder):
        raise CheckpointError(f"{folder}: no such folder. {_suggestion(root, root)}")
    if not os.path.isfile(folder / CONFIG_NAME):
        raise CheckpointError(f"{folder / CONFIG_NAME}: no such file. {_suggestion(root, folder)}")
    if os.path.isfile(folder / WEIGHTS_NAME):
        return folder
    if os.path.isfile(folder / _PICKLE_NAME):
        raise CheckpointError(
            f"{folder / _PICKLE_NAME}: pickle files are never read. Load the adapter with PEFT and save it again with "
            "safe_serialization=True."
        )
    raise CheckpointError(f"{folder / WEIGHTS_NAME}: no such file. {_suggestion(root, folder)}")


def _suggestion(root: Path, folder: Path) -> str:
    """Suggest what to do with a folder without an adapter: list its subfolders that have one."""
    configs = [config for config in folder.glob(f"*/{CONFIG_NAME}") if os.path.isfile(config.with_name(WEIGHTS_NAME))]
    if not configs:
        return _SAVED_BY
    found = sorted(repr(Path(os.path.relpath(config.parent, root)).as_posix()) for config in configs)
    return f"There are adapters in the subfolders {some_of(found, _MAX_LISTED)}: pass the path of one of them."


def _download(source: str | os.PathLike[str], inside: str, hub: Mapping[str, Any]) -> Path:
    """Download the adapter's files. Returns the repository's folder in the Hub cache."""
    within = "" if inside == "." else glob.escape(inside) + "/"
    return download(source, [within + CONFIG_NAME, within + WEIGHTS_NAME], hub)


def write(
    directory: str | os.PathLike[str], config_text: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write an adapter into `directory`, which is created if needed.

    The folder always contains the old adapter or the new one: both files are written to disk with temporary names and
    then renamed. If the process is killed between the two renames, the folder contains the new configuration and the
    old weights. If the configuration does not change, only the weights are renamed.

    Args:
        directory: the folder.
        config_text: content of `adapter_config.json`.
        tensors: on any device, with any strides; they may share memory. Floating-point values must be finite.
        metadata: entries of the safetensors file in addition to PEFT's `format: pt`.

    Raises:
        CheckpointError: a tensor cannot be saved, or the files cannot be written; the old adapter is unchanged. The
            message names the key or the folder.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write(folder, "{}", {"base_model.model.0.hra_u": torch.ones(3, 2)}, {})
    ...     sorted(os.listdir(folder))
    ['adapter_config.json', 'adapter_model.safetensors']
    """
    folder = Path(directory)
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise CheckpointError(f"{folder}: is a file. Pass a folder to save in.")
    data = _serialize(folder / WEIGHTS_NAME, tensors, metadata)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _replace_both(folder, config_text.encode(), data)
    except OSError as error:
        raise CheckpointError(
            f"{folder}: cannot write the adapter ({error}). The old files, if any, are unchanged. Choose another "
            "folder."
        ) from error


def write_weights(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write one safetensors file atomically, in a folder that is created if needed; raises the errors of `write`."""
    data = _serialize(path, tensors, metadata)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, data)
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot write the file ({error}). The old file, if any, is unchanged."
        ) from error


def _serialize(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    if not tensors:
        raise CheckpointError(f"{path}: there are no tensors to save. Save an adapter that has vectors.")
    plain: dict[str, Tensor] = {}
    storages: set[int] = set()
    for key, tensor in tensors.items():
        _check(path, key, tensor)
        # safetensors writes raw memory, so resolve lazy conjugation and negation. It does not accept shared memory.
        own = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        if own.untyped_storage().data_ptr() in storages:
            own = own.clone()
        storages.add(own.untyped_storage().data_ptr())
        plain[key] = own
    try:
        return _sorted_metadata(save(plain, {**metadata, "format": "pt"}))
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"{path}: safetensors cannot store this ({error}). Use plain tensors and text."
        ) from error


def _sorted_metadata(data: bytes) -> bytes:
    """Sort the metadata of a safetensors file. safetensors writes it in random order, so hashes would differ."""
    end = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data[end:]


def _check(path: Path, key: str, tensor: Tensor) -> None:
    if tensor.is_meta:
        raise CheckpointError(f"{path}: {key!r} is on the meta device and has no values. Load the model first.")
    if tensor.layout is not torch.strided:
        raise CheckpointError(f"{path}: {key!r} must be dense, got {tensor.layout}. Call to_dense() on it first.")
    remedy = "Nothing was written. Save a state from before the training diverged."
    _check_finite(path, key, tensor.detach(), remedy)


def _replace_both(folder: Path, config_text: bytes, data: bytes) -> None:
    """Replace both files, or neither of them if an exception is raised."""
    config, weights = folder / CONFIG_NAME, folder / WEIGHTS_NAME
    try:
        before = config.read_bytes()
    except FileNotFoundError:
        before = None
    with temporary_file(weights, data) as new_weights:
        if before == config_text:
            os.replace(new_weights, weights)
            return
        # Write the backup first, because the disk may be full when it is needed.
        with temporary_file(config, config_text) as new_config, temporary_file(config, before or b"") as old_config:
            try:
                os.replace(new_config, config)
                os.replace(new_weights, weights)
            except BaseException:
                # An interrupt can also arrive after the last rename, when everything is done.
                if new_weights.exists():
                    _restore(config, None if before is None else old_config)
                raise


def _restore(config: Path, backup: Path | None) -> None:
    if backup is None:
        config.unlink(missing_ok=True)
    else:
        os.replace(backup, config)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors of a safetensors file, copied to CPU memory, and its metadata.

    Raises:
        CheckpointError: the file cannot be read, is damaged, empty or not a safetensors file; vectors (keys that end in
            "hra_u" or "hra_vectors") are not floating point; a value is infinite or NaN. The message names the file
            and the key.

    >>> read(Path("nowhere", "adapter_model.safetensors"))
    Traceback (most recent call last):
    hra_fx.errors.CheckpointError: nowhere/adapter_model.safetensors: cannot read the file (No such file or directory...
    """
    with opened(path) as file:
        metadata = dict(file.metadata() or {})
        # Clone the tensors. Otherwise they would keep the file mapped and change with it.
        tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118, not a dict
    if not tensors:
        raise CheckpointError(f"{path}: the file has no tensors. Save the adapter again.")
    for key, tensor in tensors.items():
        if key.endswith((REFLECTION, VECTORS)) and not tensor.is_floating_point():
            raise CheckpointError(
                f"{path}: {key!r} must have a floating-point dtype, got {tensor.dtype}. Save the adapter again."
            )
        _check_finite(path, key, tensor, "Use a file from before the training diverged.")
    return tensors, metadata


@contextlib.contextmanager
def opened(path: Path, framework: str = "pt") -> Iterator[Any]:
    """Open a safetensors file with `safetensors.safe_open`, which checks its header and size.

    Raises:
        CheckpointError: the file cannot be read, is damaged, or not a safetensors file.
    """
    try:
        file = safe_open(path, framework=framework)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read the file ({error}).") from error
    except SafetensorError as error:
        raise CheckpointError(
            f"{path}: truncated, damaged, or not a safetensors file ({error}). Save or download it again."
        ) from error
    with file as reader:
        yield reader


def _check_finite(path: Path, key: str, tensor: Tensor, remedy: str) -> None:
    if count := non_finite(tensor):
        raise CheckpointError(
            f"{path}: {key!r} has {count} of {tensor.numel()} values that are infinite or NaN. {remedy}"
        )


def non_finite(tensor: Tensor) -> int:
    """Count the values that are infinite or NaN, for a tensor of any dtype.

    >>> import torch
    >>> non_finite(torch.tensor([1.0, float("nan"), float("inf")]))
    2
    """
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return 0
    # isfinite is not implemented for every 8-bit float.
    wide = tensor.float() if tensor.dtype.itemsize == 1 else tensor
    return int(wide.isfinite().logical_not().sum())
