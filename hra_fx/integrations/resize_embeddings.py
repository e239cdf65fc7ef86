"""Another vocabulary under an adapted model: the layer in the old output layer's place takes over its reflections.

`U` of an output layer is as long as a hidden state, whatever the number of tokens. transformers may put a new layer in
the old one's place, or another tensor into the old layer, and sets flags on all that it finds in it: so it is given
plain layers, and what stands in their places afterwards carries what they carried.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from hra_fx.errors import AdapterError
from hra_fx.layers.adapted_layer import SiteCarrier, carrier_for
from hra_fx.layers.adapters import Reflection
from hra_fx.layers.class_swap import original_class, swap, unswap
from hra_fx.layers.target import REFLECTION
from hra_fx.layers.trained_copies import copies_of
from hra_fx.model.defer_interrupt import uninterrupted
from hra_fx.model.state import Record, require_outermost, sites_of


@contextmanager
def resizable(model: nn.Module, record: Record) -> Iterator[None]:
    """Plain layers inside the block; then every site's place carries its reflections again, the very same objects.

    Args:
        model: a transformed model of transformers.
        record: its record.

    Raises:
        AdapterError: the vocabulary cannot change under what the model carries.
    """
    _check(model)
    sites = sites_of(model)
    with uninterrupted():
        held = {path: _undress(layer) for path, layer in sites.items()}
        try:
            yield
        finally:
            misfits = [path for path, old in sites.items() if not _dress(old, model.get_submodule(path), *held[path])]
        if misfits:
            raise AdapterError(
                f"{misfits[0]}: a layer over another number of inputs came into its place, and its reflections are "
                "lost. Load the model anew, and resize it before hra_fx.transform."
            )


def _undress(layer: SiteCarrier) -> tuple[Reflection, list[str]]:
    """Make a layer plain for a moment; its reflections, and the order of its children."""
    order = list(layer._modules)
    unswap(layer, carrier_for(layer))
    reflection: Any = layer._modules.pop(REFLECTION)
    return reflection, order


def _dress(old: nn.Module, new: nn.Module, reflection: Reflection, order: list[str]) -> bool:
    """Put reflections on the layer that stands in the place now; whether they fit it."""
    if getattr(new, "in_features", reflection.width) != reflection.width:
        return False
    if new is not old:
        new.train(old.training)
        order = [*new._modules, REFLECTION]
    new.add_module(REFLECTION, reflection)
    for name in order:
        new._modules[name] = new._modules.pop(name)
    swap(new, carrier_for(new))
    return True


def _check(model: nn.Module) -> None:
    require_outermost(model)
    ends = _ends(model)
    embedding: Any = ends[0] if ends else None
    rows = getattr(embedding, "num_embeddings", None)
    for path, (owner, _) in copies_of(model).items():
        if owner in ends or (isinstance(owner, nn.Embedding) and owner.num_embeddings == rows):
            raise AdapterError(
                f"{path}: an adapter has a trained copy of it (modules_to_save or bias), and resize_token_embeddings "
                "would resize only what is in place. Resize before hra_fx.transform, or fold or unload first."
            )
    by_itself = _resizes_by_itself(model)
    for path, layer in sites_of(model).items():
        if layer in ends and layer.hra_u.unmerged is not None:
            raise AdapterError(
                f"{path}: an adapter is merged into it, and what an unmerge restores has the old number of tokens. "
                "Call hra_fx.unmerge_adapter, resize, and merge again."
            )
        if by_itself and layer not in ends and layer.hra_u.width == rows:
            raise AdapterError(
                f"{path}: its reflections are of width {rows}, the number of tokens, and would not fit after "
                "resize_token_embeddings. Resize before hra_fx.transform, or fold or unload first."
            )


def _ends(model: Any) -> list[nn.Module]:
    """The input embeddings and the output layers, the embeddings first."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return [part for end in ends if isinstance(end, nn.Module) for part in end.modules()]


def _resizes_by_itself(model: nn.Module) -> bool:
    """Whether a class resizes more layers than every model of transformers does, as MobileBERT's."""
    own: Any = original_class(model)
    base: Any = next((kind for kind in own.__mro__ if kind.__name__ == "PreTrainedModel"), None)
    return base is None or own.resize_token_embeddings is not base.resize_token_embeddings
