"""Read the two files of an adapter (vectors of each layer, and trained tensors), and fit it to a model."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from hra_fx.checkpoint.folder import PREFIX, copy_key, reflection_key
from hra_fx.checkpoint.read import Adapter, read_adapter
from hra_fx.compat import non_persistent_buffers, state_modules
from hra_fx.config import HRAConfig
from hra_fx.errors import CheckpointError, HRAWarning, SelectionError
from hra_fx.layers.adapters import AdapterSpec, get_adapters
from hra_fx.layers.classes import adapters_for
from hra_fx.model.setup import valid_config
from hra_fx.model.trainable import to_copy
from hra_fx.selection.check import select_checked
from hra_fx.selection.select import saved_modules, select, without_unmatched
from hra_fx.selection.suggestions import some_of

#: Keys that PEFT writes but does not read: with bias="all", each bias of a module in `modules_to_save` once more; and
#: those of 0.4 of vectors that are in the file a second time.
_UNREAD = re.compile(r"\.(original_module|modules_to_save)\.(.*\.)?bias$|\.hra_vectors$")
_SHOWN = 5
_OTHER_BASE = "Was the adapter trained on another base model, or its configuration edited?"


@dataclass(frozen=True)
class Fitted:
    """An adapter from a file that fits a model: its layers by path, its configuration for training, and its values.

    `vectors` maps the path of a layer to `U: (d, r)`. `copies` maps (path of a module, name of its tensor) to a tensor.
    """

    layers: dict[str, nn.Module]
    config: HRAConfig
    vectors: dict[str, Tensor]
    copies: dict[tuple[str, str], Tensor]

    def spec(self, path: str) -> AdapterSpec:
        """The rank, Gram-Schmidt setting and initialization of a layer."""
        config = self.config
        return AdapterSpec(config.rank_of(path), config.apply_GS, config.init_weights, config.trains_pairs(path))


def fit(folder: Path, model: nn.Module, given: HRAConfig | None, *, is_new: bool, is_trainable: bool) -> Fitted:
    """Read an adapter and check that it fits a base model or a transformed model.

    `given` replaces the configuration in the folder; the vectors are then used as stored. If the model does not have
    the adapter yet (`is_new`), everything that `transform` checks is checked.
    """
    adapter = read_adapter(folder, None if given is None else valid_config(given))
    config = dataclasses.replace(without_unmatched(model, adapter.config), inference_mode=not is_trainable)
    adapter = dataclasses.replace(adapter, config=config)
    try:
        layers = select_checked(model, config) if is_new else select(model, config)
    except SelectionError as error:
        raise CheckpointError(
            f"{folder}: the configuration does not fit {type(model).__name__}: {error} Is this the right base model?"
        ) from error
    copies = {
        (path, name): (copy_key(path, name, adapted=path in layers), getattr(owner, name).shape)
        for path, (owner, names) in to_copy(model, config, layers).items()
        for name in names
        if name not in non_persistent_buffers(owner)
    }
    shapes = {
        reflection_key(path): (get_adapters(layer) or adapters_for(layer)).vectors_shape(config.rank_of(path))
        for path, layer in layers.items()
    }
    shapes |= {key: tuple(shape) for key, shape in copies.values()}
    _check_keys(adapter, model, shapes.keys())
    for key, expected in shapes.items():
        if (shape := tuple(adapter.tensors[key].shape)) != expected:
            raise CheckpointError(f"{adapter.file}: {key} must have shape {expected}, got {shape}. {_OTHER_BASE}")
    adapter.check_not_in(model, layers)
    vectors = {path: adapter.tensors[reflection_key(path)] for path in layers}
    values = {place: adapter.tensors[key] for place, (key, _) in copies.items()}
    return Fitted(layers, config, vectors, values)


def _check_keys(adapter: Adapter, model: nn.Module, expected: Set[str]) -> None:
    tensors = adapter.tensors
    allowed = set()
    for path, part in saved_modules(model, adapter.config).items():  # also other names of a shared module
        allowed |= {f"{PREFIX}{path}.{key}" for key in part.state_dict()}
    missing = sorted(expected - tensors.keys())
    extra = sorted(key for key in tensors.keys() - expected - allowed if not _UNREAD.search(key))
    copied = [key for key in extra if _is_embedding(model, key)]
    extra = [key for key in extra if key not in copied]
    if missing or extra:
        found = [
            f"missing keys {some_of(missing, _SHOWN)}" if missing else "",
            f"unexpected keys {some_of(extra, _SHOWN)}" if extra else "",
        ]
        raise CheckpointError(
            f"{adapter.file}: does not fit {type(model).__name__}: {'; '.join(filter(None, found))}. {_OTHER_BASE}"
        )
    if copied:
        text = (
            f"{adapter.file}: {some_of(copied, _SHOWN)} are copies of the base model's embeddings, which are not "
            "loaded. Make sure that this model has the same ones."
        )
        warnings.warn(text, HRAWarning, stacklevel=4)


def _is_embedding(model: nn.Module, key: str) -> bool:
    """Whether a tensor is a copy of the base model's embeddings. PEFT adds it to the file if they are adapted."""
    path, _, entry = key.removeprefix(PREFIX).replace(".base_layer.", ".").rpartition(".")
    owner = dict(state_modules(model, remove_duplicate=False)).get(path)
    return entry == "weight" and (isinstance(owner, nn.Embedding) or path.rpartition(".")[2] == "lm_head")
