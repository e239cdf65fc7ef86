"""The model of a folder of transformers or diffusers, with its own class: without weights, or loaded."""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors.torch import load_file
from torch import nn

from hra_fx.errors import CheckpointError

#: A folder, or for adapters also a name on the Hub.
Source: TypeAlias = str | os.PathLike[str]
CONFIG = "config.json"
#: The file that describes a diffusers pipeline.
PIPELINE = "model_index.json"
IN_MEMORY = "Load the model yourself, then call hra_fx.load_adapter, and hra_fx.fold or hra_fx.save_as_lora."
_EXPECTED = (
    "Pass the folder of a transformers or diffusers model, such as `hf download NAME --local-dir FOLDER` writes."
)
#: Key that identifies the configuration of a library -> name of the library.
_LIBRARIES = {"model_type": "transformers", "_class_name": "diffusers"}

#: The files of weights that the libraries load, one or several with an index.
WEIGHTS = re.compile(r"(model|diffusion_pytorch_model)(-\d+-of-\d+)?\.safetensors(\.index\.json)?")


def build_model(path: Path) -> tuple[nn.Module, str]:
    """Build the model of a folder or of a `config.json` on the meta device; and name its library."""
    with _explained_errors(f"{path}: cannot build the model"):
        file, entries, library = read_config(path)
        # Import the class first, because modules that are imported may compute with tensors.
        cls, config = _class_of(file, entries, library)
        with torch.device("meta"):
            model: nn.Module = cls(config) if library == "transformers" else cls.from_config(config)
            return model.eval(), library


def load_model(folder: Path) -> nn.Module:
    """Load the model of a folder on the CPU, in the widest dtype of its files, whatever `config.json` says."""
    with _explained_errors(f"{folder}: cannot load the model"):
        file, entries, library = read_config(folder)
        if entries.get("quantization_config"):
            raise CheckpointError(f"{file}: the weights are quantized. Use the base model in 16 or 32 bits.")
        cls, config = _class_of(file, entries, library)
        floats = {dtype for dtype in stored_dtypes(folder).values() if dtype.is_floating_point}
        dtype = functools.reduce(torch.promote_types, floats or {torch.float32})
        settings: dict[str, Any] = {"local_files_only": True, "use_safetensors": True, "output_loading_info": True}
        settings |= {"torch_dtype": dtype} if library == "diffusers" else {"dtype": dtype, "config": config}
        model: nn.Module
        model, found = cls.from_pretrained(folder, **settings)
    if missing := sorted(found["missing_keys"]):
        raise CheckpointError(
            f"{folder}: the files have no {missing[0]}, which {type(model).__name__} needs. {IN_MEMORY}"
        )
    return model.eval()


def read_config(path: Path) -> tuple[Path, dict[str, Any], str]:
    """The `config.json` of a folder or with this path, its content, and the name of its library."""
    if (path / PIPELINE).is_file():
        parts = sorted(str(found.parent) for found in path.glob(f"*/{CONFIG}"))
        raise CheckpointError(f"{path}: is a diffusers pipeline. Pass the folder of one part: {', '.join(parts)}.")
    file = path / CONFIG if path.is_dir() else path
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file. {_EXPECTED} For any other model: {IN_MEMORY}")
    entries = json.loads(file.read_text(encoding="utf-8"))
    key = next((key for key in _LIBRARIES if entries.get(key)), None)
    if key is None:
        keys = ", ".join(_LIBRARIES)
        raise CheckpointError(f"{file}: has none of the keys {keys}. {_EXPECTED} For any other model: {IN_MEMORY}")
    return file, entries, _LIBRARIES[key]


@contextlib.contextmanager
def _explained_errors(what: str) -> Iterator[None]:
    """Convert any error: the constructors of hundreds of models raise many kinds."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise CheckpointError(f"{what} ({reason}).") from error


def _class_of(file: Path, entries: Mapping[str, Any], library: str) -> tuple[Any, Any]:
    """The class of the model, and its configuration."""
    if library == "diffusers":
        cls = getattr(importlib.import_module("diffusers"), str(entries["_class_name"]), None)
        if not hasattr(cls, "from_config"):
            raise CheckpointError(f"{file}: the installed diffusers has no model {entries['_class_name']!r}.")
        return cls, dict(entries)
    transformers: Any = importlib.import_module("transformers")
    found = [getattr(transformers, name, None) for name in entries.get("architectures") or []]
    models = (one for one in found if isinstance(one, type) and issubclass(one, transformers.PreTrainedModel))
    cls = next(models, None)
    if cls is None and entries.get("auto_map"):
        raise CheckpointError(f"{file}: the class of the model is code in its folder, which is not run. {IN_MEMORY}")
    # Without trust_remote_code, transformers asks in the terminal whether to run code. A file may have any name.
    folder = str(file.parent if file.name == CONFIG else file)
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    config.name_or_path = str(file.parent)  # not the file: adapters name the folder of their base model
    return cls or transformers.MODEL_MAPPING[type(config)], config


def stored_dtypes(folder: Path) -> dict[str, torch.dtype]:
    """Key -> dtype, for the safetensors files of the model in a folder; no data is read."""
    found: dict[str, torch.dtype] = {}
    for file in folder.glob("*.safetensors"):
        if WEIGHTS.fullmatch(file.name):
            found |= {key: tensor.dtype for key, tensor in load_file(file).items()}  # mapped, not read
    return found
