"""Find weights that share memory, and untie them when one of them gets its own values.

If `config.tie_word_embeddings` is set, transformers ties weights when it loads a model and whenever `tie_weights` is
called, and saves only one of them. One setting may tie several pairs (T5 and BART: the embeddings of encoder and
decoder; BERT: the bias of the head). So when one weight gets its own values, the setting is turned off, and everything
else that it tied gets its own memory.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from hra_fx.compat import is_traceable_wrapper_subclass, state_modules, tied_names
from hra_fx.layers.accelerate_hooks import stored
from hra_fx.layers.class_swap import original_class
from hra_fx.layers.readers import chains_of
from hra_fx.layers.trained_copies import BASE, get_copies
from hra_fx.model.state import base_model_view


def tied_to(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, list[str]]:
    """Find the other parameters and buffers that overlap a weight in memory: name -> names, for weights that are tied.

    A layer with several paths is one layer, and is not tied to itself.
    """
    by_storage: dict[object, list[tuple[str, range]]] = {}
    for name, tensor in _tensors(model) if weights else ():
        by_storage.setdefault(_storage(tensor), []).append((name, _elements(tensor)))
    found: dict[str, list[str]] = {}
    for name, weight in weights.items():
        plain = _unwrap(weight)
        own = _elements(plain)
        for other, theirs in by_storage.get(_storage(plain), []):
            if other != name and own.start < theirs.stop and theirs.start < own.stop:
                found.setdefault(name, []).append(other)
    return found


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for path, module in state_modules(model):
        for registered in (module._parameters, module._buffers):
            for name, tensor in registered.items():
                if tensor is not None and not is_lazy(tensor):
                    yield f"{path}.{name}".lstrip("."), _unwrap(stored(module, name, tensor))


def _unwrap(tensor: Any) -> Tensor:
    """Return a tensor that has memory. A wrapper subclass (a quantized weight) has its memory in inner tensors."""
    while is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        tensor = getattr(tensor, names[0])
    return tensor  # type: ignore[no-any-return]


def _storage(tensor: Tensor) -> object:
    if tensor.is_meta:  # tensors on the meta device do not have an address; tied parameters are one object
        return tensor.device, id(tensor)
    try:
        return tensor.device, tensor.untyped_storage().data_ptr()
    except RuntimeError:  # lazy and XLA tensors have no storage; tied parameters are one object
        return id(tensor)


def _elements(tensor: Tensor) -> range:
    """The range of bytes in the storage from the first to the last element; two halves of a buffer are not tied."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    length = 1 + sum((size - 1) * stride for size, stride in steps) if tensor.numel() else 0
    start = int(tensor.storage_offset()) * tensor.element_size()
    return range(start, start + int(length) * tensor.element_size())


#: (module, name of its tensor).
TensorRef: TypeAlias = tuple[nn.Module, str]
#: The setting of a configuration that makes transformers tie weights.
TIE_SETTING = "tie_word_embeddings"


class Tie(NamedTuple):
    """The weights that one transformers model ties because of its configuration.

    Attributes:
        path: path of the transformers model within the whole model.
        configs: the configurations with the setting turned on: those of the model and of its text model, which
            transformers reads when it loads a file.
        pairs: (name of the tied tensor, name of the tensor that it is tied to), within the whole model.
    """

    path: str
    configs: tuple[Any, ...]
    pairs: tuple[tuple[str, str], ...]


def find_ties(model: nn.Module, tensors: Collection[TensorRef]) -> list[Tie]:
    """Find the ties of all settings that are turned on and tie at least one of these tensors."""
    found = _all_ties(model) if tensors else []
    touched = [tie for tie in found if any(tensor_ref(model, name) in tensors for pair in tie.pairs for name in pair)]
    # BART and its inner model share one configuration, and both use it to tie weights.
    settings = {id(config) for tie in touched for config in tie.configs}
    return [tie for tie in found if any(id(config) in settings for config in tie.configs)]


def _all_ties(model: nn.Module) -> list[Tie]:
    found = []
    # Some classes find tied weights by patterns of parameter names, so these must be the names of the base model.
    with base_model_view(model):
        for path, module in model.named_modules():
            if keys := tied_names(module):
                pairs = ((f"{path}.{a}".lstrip("."), f"{path}.{b}".lstrip(".")) for a, b in keys.items())
                found.append(Tie(path, _configs(module), tuple(pairs)))
    return found


def tensor_ref(model: nn.Module, name: str) -> TensorRef:
    """The module that has a tensor, and the name of the tensor in this module."""
    path, _, last = name.rpartition(".")
    return model.get_submodule(path), last


def why_not_untie(model: nn.Module, ties: Iterable[Tie]) -> str | None:
    """Return why one of these settings cannot be turned off; `None` if all can."""
    for tie in ties:
        part = model.get_submodule(tie.path)
        if reads_tie_setting(part):
            return (
                f"{tie.path or 'the model'} ({type(part).__name__}): its forward depends on config.{TIE_SETTING}, so "
                "its output layer cannot be untied from the embeddings"
            )
    return None


def reads_tie_setting(model: nn.Module) -> bool:
    """Whether a forward in the model reads the setting: Switch Transformers scales its output depending on it."""
    classes = set(map(original_class, model.modules()))
    return any(TIE_SETTING in chain for cls in classes for chain in chains_of(cls))


def set_tied(ties: Iterable[Tie], wanted: bool) -> None:
    """Turn the settings on or off."""
    for tie in ties:
        for config in tie.configs:
            setattr(config, TIE_SETTING, wanted)


def always_tied(ties: Iterable[Tie]) -> list[str]:
    """Names of configuration classes that turn the setting on again when they are loaded, such as T5's."""
    configs = [config for tie in ties for config in tie.configs]
    return list(dict.fromkeys(type(config).__name__ for config in configs if ties_when_loaded(config)))


def ties_when_loaded(config: Any) -> bool:
    """Whether a configuration turns the setting on again when it is loaded."""
    return bool(getattr(type(config).from_dict({**config.to_dict(), TIE_SETTING: False}), TIE_SETTING, False))


def is_tied(model: nn.Module, tie: Tie) -> bool:
    """Whether everything that the setting ties is one tensor, and none of it has trained copies."""
    for pair in tie.pairs:
        (owner, name), (source, other) = (tensor_ref(model, end) for end in pair)
        if owner._parameters.get(name) is not source._parameters.get(other) or get_copies(owner) or get_copies(source):
            return False
    return True


def untied_copies(
    model: nn.Module, ties: Iterable[Tie], written: Collection[TensorRef], folded: Collection[str]
) -> dict[str, tuple[nn.Module, str, nn.Parameter]]:
    """Create separate tensors for everything that some settings tie, except for `written`, which get their own anyway.

    `folded` are adapters with trained copies that become the model's own tensors. Returns name -> (module, name of its
    tensor, its own parameter).
    """
    # The source tensors come first and keep their memory.
    names = dict.fromkeys(pair[end] for end in (1, 0) for tie in ties for pair in tie.pairs)
    kept: set[int] = set()
    copies: dict[str, tuple[nn.Module, str, nn.Parameter]] = {}
    for full in names:
        owner, name = tensor_ref(model, full)
        held = get_copies(owner)
        tensor: Tensor | None = owner._parameters.get(name)
        if held is not None and name in held.in_place:
            tensor = held.get(owner, next((a for a in folded if name in held.copied.get(a, ())), BASE), name)
        if (owner, name) in written or not isinstance(tensor, nn.Parameter):
            continue
        if id(tensor) in kept and (held is None or held.copied.keys() <= set(folded)):
            own = nn.Parameter(torch.empty_like(tensor).copy_(tensor), requires_grad=tensor.requires_grad)
            copies[full] = (owner, name, own)
        kept.add(id(tensor))
    return copies


def _configs(module: Any) -> tuple[Any, ...]:
    try:
        text = module.config.get_text_config()
    except ValueError:  # it has several text models
        text = module.config
    configs = (module.config,) if text is module.config else (module.config, text)
    return tuple(config for config in configs if getattr(config, TIE_SETTING, False))
