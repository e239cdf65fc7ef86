"""The names of tensors in an adapter's file, as PEFT gives them, and in the model."""

from __future__ import annotations

from torch import nn

from hra_fx.layers.adapters import ANCHOR
from hra_fx.layers.target import REFLECTION, SAVED
from hra_fx.layers.trained_copies import BASE, copies_of
from hra_fx.model.state import sites_of

PREFIX = "base_model.model."
#: Beside a chain that stands for Gram-Schmidt, the vectors that it was made of: training goes on from them.
VECTORS = "hra_vectors"


def reflection_key(path: str) -> str:
    """The key of a site's chain.

    Example:
        >>> reflection_key("encoder.query")
        'base_model.model.encoder.query.hra_u'
    """
    return f"{PREFIX}{path}.{REFLECTION}"


def vectors_key(path: str) -> str:
    """The key of what Gram-Schmidt makes a site's chain of; PEFT ignores it."""
    return f"{PREFIX}{path}.{VECTORS}"


def copy_key(path: str, name: str, *, in_site: bool) -> str:
    """The key of a trained copy; that of a bias in an adapted layer goes through PEFT's wrapper.

    Example:
        >>> copy_key("encoder.query", "bias", in_site=True)
        'base_model.model.encoder.query.base_layer.bias'
    """
    return f"{PREFIX}{path}.base_layer.{name}" if in_site else f"{PREFIX}{path}.{name}"


def vectors_entry(path: str, name: str) -> str:
    """The entry of an adapter's vectors in the model's `state_dict`.

    Example:
        >>> vectors_entry("encoder.query", "default")
        'encoder.query.hra_u.default'
    """
    return f"{path}.{REFLECTION}.{name}"


def anchor_entry(path: str, name: str) -> str:
    """The entry of an adapter's anchor."""
    return f"{path}.{REFLECTION}.{name}{ANCHOR}"


def copy_entry(path: str, name: str, tensor: str, *, in_place: bool) -> str:
    """The entry of an adapter's copy of a tensor, in its place or waiting."""
    return (f"{path}.{tensor}" if in_place else f"{path}.{SAVED}.{name}.{tensor}").lstrip(".")


def adapter_entries(model: nn.Module) -> list[str]:
    """The entries of the model's `state_dict` that belong to adapters, trained copies in place included."""
    entries = [
        f"{path}.{REFLECTION}.{name}"
        for path, layer in sites_of(model).items()
        for name in layer.hra_u.state_dict()
        if name != "unmerged"
    ]
    for path, (_, copies) in copies_of(model).items():
        entries += [f"{path}.{name}".lstrip(".") for name, whose in copies.in_place.items() if whose != BASE]
        entries += [
            f"{path}.{SAVED}.{key}".lstrip(".") for key in copies.state_dict() if not key.startswith(f"{BASE}.")
        ]
    return entries
