"""Check that an adapter's files fit a model, before the model is changed."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from hra_fx.checkpoint.adapter import Adapter, Resume, read_adapter
from hra_fx.checkpoint.base_model import compare_names, first_row, is_same, other_embeddings
from hra_fx.checkpoint.keys import EXTRA_BIASES, PREFIX, copy_key, reflection_key, vectors_key
from hra_fx.compat import non_persistent_buffers
from hra_fx.config import HRAConfig
from hra_fx.errors import CheckpointError, SelectionError
from hra_fx.functional.chain import plain_chain
from hra_fx.layers.adapters import AdapterSpec, get_adapters
from hra_fx.layers.variants import adapters_for
from hra_fx.model.setup import valid_config
from hra_fx.model.trainable import to_copy
from hra_fx.selection.check import select_checked
from hra_fx.selection.select import saved_modules, select, without_unmatched
from hra_fx.selection.suggestions import some_of

_SHOWN = 5
_OTHER_BASE = "Was the adapter trained on another base model, or its configuration edited?"
#: Names of layers that PEFT treats as embeddings.
_EMBEDDINGS = re.compile(r"(^|\.)(embed_tokens|lm_head)\.weight$")


@dataclass(frozen=True)
class Fitted:
    """An adapter from a file that fits a model.

    Attributes:
        layers: the layers by path.
        resume: the configuration for further training, with ranks that exclude the anchors.
        vectors: path of a layer -> (`U: (d, r)`, anchor `A: (d, k)` or `None`).
        written: path of a layer -> (vectors as stored in the file, `None`).
        written_GS: whether Gram-Schmidt applies to `written`.
        copies: (path of a module, name of its tensor) -> tensor.
    """

    layers: dict[str, nn.Module]
    resume: Resume
    vectors: dict[str, tuple[Tensor, Tensor | None]]
    written: dict[str, tuple[Tensor, None]]
    written_GS: bool
    copies: dict[tuple[str, str], Tensor]

    def spec(self, path: str) -> AdapterSpec:
        """The rank, Gram-Schmidt setting and initialization of a layer."""
        config = self.resume.config
        return AdapterSpec(config.rank_of(path), config.apply_GS, init_weights=self.resume.has_anchors)


def fit(folder: Path, model: nn.Module, given: HRAConfig | None, *, is_new: bool, is_trainable: bool) -> Fitted:
    """Read an adapter and check that it fits a model.

    Args:
        folder: the folder with both files.
        model: the base model or a transformed model.
        given: replaces the configuration in the folder; the vectors are then used as stored.
        is_new: whether the adapter will be added. If so, everything that `transform` checks is checked.
        is_trainable: whether the adapter will be trained.

    Raises:
        ConfigError: the configuration is invalid.
        UnsupportedLayerError: the adapter is new, and one of its layers cannot be adapted.
        CheckpointError: the weights are damaged, or do not fit the model; missing and unexpected keys are listed.

    Warns:
        HRAWarning: the configuration names another base model, and nothing shows that it is this model.
    """
    adapter = read_adapter(folder, None if given is None else valid_config(given))
    adapter = dataclasses.replace(adapter, config=without_unmatched(model, adapter.config))
    config, resume = adapter.config, adapter.resume
    resume = dataclasses.replace(resume, config=dataclasses.replace(resume.config, inference_mode=not is_trainable))
    try:
        layers = select_checked(model, resume.config) if is_new else select(model, config)
    except SelectionError as error:
        raise CheckpointError(
            f"{folder}: the configuration does not fit {type(model).__name__}: {error} Is this the right base model?"
        ) from error
    copies = _copy_keys(adapter, model, layers)
    _check_keys(adapter, model, layers, copies)
    _check_shapes(adapter, model, layers, copies)
    _check_base(adapter, model, layers)
    vectors = {path: _split(adapter, path, resume) for path in layers}
    written: dict[str, tuple[Tensor, None]] = {path: (adapter.tensors[reflection_key(path)], None) for path in layers}
    values = {place: adapter.tensors[key] for place, key in copies.items()}
    return Fitted(layers, resume, vectors, written, config.apply_GS, values)


def _copy_keys(adapter: Adapter, model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[tuple[str, str], str]:
    """(module, tensor) -> key in the file. PEFT has two names for a bias, depending on its other adapters."""
    keys: dict[tuple[str, str], str] = {}
    for path, (owner, names) in to_copy(model, adapter.config, layers).items():
        for name in names:
            if name not in non_persistent_buffers(owner):
                spellings = [copy_key(path, name, adapted=adapted) for adapted in (path in layers, path not in layers)]
                keys[path, name] = next((key for key in spellings if key in adapter.tensors), spellings[0])
    return keys


def _check_keys(
    adapter: Adapter, model: nn.Module, layers: Iterable[str], copies: Mapping[tuple[str, str], str]
) -> None:
    config, tensors = adapter.config, adapter.tensors
    expected = {*(reflection_key(path) for path in layers), *copies.values()}
    # Other names of a shared module.
    allowed = {
        f"{PREFIX}{path}.{key}" for path, part in saved_modules(model, config).items() for key in part.state_dict()
    }
    allowed |= {vectors_key(path) for path in layers}
    missing = sorted(expected - tensors.keys())
    ignored = EXTRA_BIASES.search if config.bias == "all" else (lambda key: None)
    others = sorted(key for key in tensors.keys() - expected - allowed if not ignored(key))
    extra = [key for key in others if not _is_embedding(adapter, model, key)]
    if missing or extra:
        found = [
            f"missing keys {some_of(missing, _SHOWN)}" if missing else "",
            f"unexpected keys {some_of(extra, _SHOWN)}" if extra else "",
        ]
        raise CheckpointError(
            f"{adapter.file}: does not fit {type(model).__name__}: {'; '.join(filter(None, found))}. {_OTHER_BASE}"
        )


def _is_embedding(adapter: Adapter, model: nn.Module, key: str) -> bool:
    """Whether a tensor is a copy of the base model's embeddings. PEFT adds it to the file if they are adapted."""
    name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
    path, _, entry = name.rpartition(".")
    try:
        owner = model.get_submodule(path)
    except AttributeError:
        return False
    own = owner._parameters.get(entry)
    if own is None or not (isinstance(owner, nn.Embedding) or _EMBEDDINGS.search(name)):
        return False
    if not is_same(own, adapter.tensors[key]):
        place = f"this model's {name} of shape {tuple(own.shape)}"
        raise other_embeddings(adapter.file, key, adapter.tensors[key], place)
    return True


def _check_shapes(
    adapter: Adapter, model: nn.Module, layers: Mapping[str, nn.Module], copies: Mapping[tuple[str, str], str]
) -> None:
    for path, layer in layers.items():
        own = get_adapters(layer)
        adapters = adapters_for(layer) if own is None else own
        _check_shape(adapter, reflection_key(path), adapters.vectors_shape(adapter.config.rank_of(path)))
    for (path, name), key in copies.items():
        tensor: Tensor = getattr(model.get_submodule(path), name)
        _check_shape(adapter, key, tuple(tensor.shape))
        dtype = adapter.tensors[key].dtype
        if dtype.is_floating_point is not tensor.is_floating_point():
            raise CheckpointError(
                f"{adapter.file}: {key} must have a dtype like the model's {tensor.dtype}, got {dtype}. Is this the "
                "right base model?"
            )


def _check_shape(adapter: Adapter, key: str, expected: tuple[int, ...]) -> None:
    if (shape := tuple(adapter.tensors[key].shape)) != expected:
        raise CheckpointError(f"{adapter.file}: {key} must have shape {expected}, got {shape}. {_OTHER_BASE}")


def _split(adapter: Adapter, path: str, resume: Resume) -> tuple[Tensor, Tensor | None]:
    chain, anchor = adapter.tensors[reflection_key(path)], resume.anchor(path)
    if not anchor:
        return chain, None
    if not resume.config.apply_GS:
        return chain[..., anchor:].contiguous(), chain[..., :anchor].contiguous()
    key = vectors_key(path)
    if key not in adapter.tensors:
        raise CheckpointError(
            f"{adapter.file}: missing key {key}, the vectors before Gram-Schmidt. Save the adapter again."
        )
    _check_shape(adapter, key, (*chain.shape[:-1], resume.config.rank_of(path)))
    return adapter.tensors[key], chain[..., :anchor].contiguous()


def _check_base(adapter: Adapter, model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Check that the model does not contain the adapter. Warn about another name unless the model is known to fit."""
    row, state = adapter.base_row, "unknown"
    if row is not None and row.path in layers:
        chain = plain_chain(adapter.tensors[reflection_key(row.path)], None, apply_GS=adapter.config.apply_GS)
        state = row.state(chain, first_row(layers[row.path]))
        if state == "folded":
            raise row.folded_error(adapter.file, f"This {type(model).__name__}")
    if state == "unknown":
        compare_names(adapter.file, adapter.config, getattr(model, "name_or_path", None))
