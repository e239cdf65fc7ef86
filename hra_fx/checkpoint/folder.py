"""The folder of an adapter: find it locally or on the Hub, read its weights, write it, and name its tensors.

Source of the layout: PEFT 0.21, `PeftModel.save_pretrained`: `adapter_config.json` and `adapter_model.safetensors`.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor, nn

from hra_fx.atomic_write import Content, temporary_file
from hra_fx.config import CONFIG_NAME
from hra_fx.errors import CheckpointError
from hra_fx.hub import local_folder
from hra_fx.layers.target import REFLECTION
from hra_fx.layers.trained_copies import BASE, all_copies
from hra_fx.model.state import adapted_layers
from hra_fx.selection.suggestions import some_of

PREFIX = "base_model.model."
WEIGHTS_NAME = "adapter_model.safetensors"
_MAX_LISTED = 10
_SAVED_BY = (
    "Pass the folder that an adapter was saved in (in PEFT, with safe_serialization=True). load_adapter and "
    "fold_checkpoint take the model first, then the adapter."
)


def find(source: str | os.PathLike[str], subfolder: str | None = None, **hub: Any) -> Path:
    """Find the folder with both files of an adapter, in a local folder or in a repository of the Hub.

    `hub` are arguments of `huggingface_hub.snapshot_download`.
    """
    root = local_folder(source, subfolder, [CONFIG_NAME, WEIGHTS_NAME], hub)
    folder = root / (subfolder or "")
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not os.path.isfile(folder / name):
            raise CheckpointError(f"{folder / name}: no such file. {_suggestion(root, folder)}")
    return folder


def _suggestion(root: Path, folder: Path) -> str:
    """Suggest what to do with a folder without an adapter: list its subfolders that have one."""
    found = (folder if os.path.isdir(folder) else root).glob(f"*/{CONFIG_NAME}")
    configs = [config for config in found if os.path.isfile(config.with_name(WEIGHTS_NAME))]
    if not configs:
        return _SAVED_BY
    paths = sorted(repr(Path(os.path.relpath(config.parent, root)).as_posix()) for config in configs)
    return f"There are adapters in the subfolders {some_of(paths, _MAX_LISTED)}: pass the path of one of them."


def output_folder(directory: str | os.PathLike[str]) -> Path:
    """The path of a folder to write to. An empty path would be the current folder."""
    if not os.fspath(directory):
        raise CheckpointError("the path of the folder is empty (''). Pass the folder to write, or '.' for this one.")
    return Path(directory)


def write(directory: str | os.PathLike[str], config_text: str, tensors: Mapping[str, Tensor], **metadata: str) -> None:
    """Write an adapter into `directory`, which is created if needed.

    Both files are written to disk with temporary names and then renamed, so an error while writing, such as a full
    disk, leaves an old adapter unchanged. If the process is killed between the two renames, the folder contains the new
    configuration and the old weights.
    """
    folder = output_folder(directory)
    data = _serialize(folder / WEIGHTS_NAME, tensors, **metadata)
    write_files(folder, {CONFIG_NAME: config_text.encode(), WEIGHTS_NAME: data})


def write_weights(path: Path, tensors: Mapping[str, Tensor], **metadata: str) -> None:
    """Write one safetensors file like `write`."""
    write_files(path.parent, {path.name: _serialize(path, tensors, **metadata)})


def write_files(folder: Path, contents: Mapping[str, Content]) -> None:
    """Write several files like `write`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            new = {name: stack.enter_context(temporary_file(folder / name, data)) for name, data in contents.items()}
            for name, file in new.items():
                os.replace(file, folder / name)
    except OSError as error:
        raise CheckpointError(
            f"{folder}: cannot write the adapter ({error}). The old files, if any, are unchanged. Choose another "
            "folder."
        ) from error


def _serialize(path: Path, tensors: Mapping[str, Tensor], **metadata: str) -> bytes:
    for key, tensor in tensors.items():
        if tensor.is_meta:
            raise CheckpointError(f"{path}: {key!r} is on the meta device and has no values. Load the model first.")
    _check_finite(path, tensors)
    # safetensors does not accept shared memory.
    plain = {key: one.detach().cpu().clone(memory_format=torch.contiguous_format) for key, one in tensors.items()}
    data = save(plain, {**metadata, "format": "pt"})
    # safetensors writes the metadata in a random order, so the hashes of equal files would differ.
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[end:]


def read(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file, copied to CPU memory."""
    try:
        # From bytes. Otherwise the tensors would keep the file mapped and change with it.
        tensors = load(path.read_bytes())
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: truncated, damaged, or not a safetensors file ({error}). Save or download it again."
        ) from error
    _check_finite(path, tensors)
    return tensors


def read_metadata(path: Path) -> dict[str, str]:
    """Read the metadata of a safetensors file."""
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


def _check_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        wide = tensor.float() if tensor.dtype.itemsize == 1 else tensor  # not implemented for 8-bit floats
        if not bool(wide.isfinite().all()):
            raise CheckpointError(f"{path}: {key!r} is not finite. Use a state from before the training diverged.")


def reflection_key(path: str) -> str:
    """Key of an adapted layer's vectors."""
    return f"{PREFIX}{path}.{REFLECTION}"


def copy_key(path: str, name: str, *, adapted: bool) -> str:
    """Key of a trained copy. For a bias in an adapted layer (`adapted`), it contains the name of PEFT's wrapper."""
    return f"{PREFIX}{path}.base_layer.{name}" if adapted else f"{PREFIX}{path}.{name}"


def adapter_entries(model: nn.Module) -> list[str]:
    """Entries of the model's `state_dict` that belong to adapters, including active trained copies."""
    entries = [
        f"{path}.{REFLECTION}.{name}"
        for path, layer in adapted_layers(model).items()
        for name in layer.hra_u.state_dict()
        if name != "unmerged"
    ]
    for path, (owner, copies) in all_copies(model).items():
        entries += [f"{path}.{key}".lstrip(".") for (name, _), key in copies.entries(owner).items() if name != BASE]
    return entries
