"""`resize_token_embeddings` of a transformed model: move the reflections of the output layer to the resized layer.

The vectors of an output layer are as long as a hidden state, so they fit any number of tokens. transformers may create
a new layer or replace a tensor of the old layer, so the output layers are plain layers during the resize.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from hra_fx.errors import AdapterError
from hra_fx.layers.adapted_layer import AdaptedLayer, layer_class_for
from hra_fx.layers.adapters import HouseholderAdapters
from hra_fx.layers.class_swap import original_class, swap, unswap
from hra_fx.layers.target import REFLECTION
from hra_fx.layers.trained_copies import all_copies
from hra_fx.model.state import adapted_layers, check_no_foreign_class


@contextmanager
def plain_output_layers(model: nn.Module) -> Iterator[None]:
    """Context manager that removes the reflections of the output layers, and adds the same objects again at the end."""
    ends = _embeddings_and_heads(model)
    layers = adapted_layers(model)
    _check(model, layers, ends)
    held = {path: _detach(layer) for path, layer in layers.items() if layer in ends}
    try:
        yield
    finally:
        for path, reflection in held.items():
            layer = model.get_submodule(path).train(layers[path].training)
            layer.add_module(REFLECTION, reflection)
            swap(layer, layer_class_for(layer))


def _detach(layer: AdaptedLayer) -> HouseholderAdapters:
    reflection = layer.hra_u
    unswap(layer, layer_class_for(layer))
    del layer._modules[REFLECTION]
    return reflection


def _check(model: nn.Module, layers: dict[str, AdaptedLayer], ends: list[nn.Module]) -> None:
    check_no_foreign_class(dict(model.named_modules()))
    rows = getattr(ends[0], "num_embeddings", None) if ends else None
    for path, (owner, _) in all_copies(model).items():
        if owner in ends or (isinstance(owner, nn.Embedding) and owner.num_embeddings == rows):
            raise AdapterError(
                f"{path}: an adapter has a trained copy of it (modules_to_save or bias), which resize_token_embeddings "
                "does not resize. Resize before hra_fx.transform, or fold or unload first."
            )
    resizes_more = _overrides_resize(model)
    for path, layer in layers.items():
        if layer in ends and layer.hra_u.unmerged is not None:
            raise AdapterError(
                f"{path}: an adapter is merged into it, and its stored base weight has the old number of tokens. Call "
                "hra_fx.unmerge_adapter, resize, and merge again."
            )
        if resizes_more and layer not in ends and layer.hra_u.width == rows:
            raise AdapterError(
                f"{path}: its vectors have length {rows}, the number of tokens, and would not fit after "
                "resize_token_embeddings. Resize before hra_fx.transform, or fold or unload first."
            )


def _embeddings_and_heads(model: Any) -> list[nn.Module]:
    """The input embeddings and the output layers, the embeddings first."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return [part for end in ends if isinstance(end, nn.Module) for part in end.modules()]


def _overrides_resize(model: nn.Module) -> bool:
    """Whether a class resizes more layers than transformers' base class, such as MobileBERT."""
    own: Any = original_class(model)
    base: Any = next((cls for cls in own.__mro__ if cls.__name__ == "PreTrainedModel"), None)
    return base is None or own.resize_token_embeddings is not base.resize_token_embeddings
