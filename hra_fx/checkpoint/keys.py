"""Names of an adapter's tensors: keys in its file (PEFT's keys) and entries in a model's `state_dict`."""

from __future__ import annotations

import re

from torch import nn

from hra_fx.layers.containers import ANCHOR
from hra_fx.layers.target import REFLECTION, SAVED
from hra_fx.layers.trained_copies import BASE, all_copies
from hra_fx.model.state import adapted_layers

PREFIX = "base_model.model."
#: The key of the vectors before Gram-Schmidt, which are stored with their orthonormal chain to resume training.
VECTORS = "hra_vectors"
#: Other keys that PEFT writes with bias="all" for each bias of a module in `modules_to_save`, but does not read.
EXTRA_BIASES = re.compile(r"\.(original_module|modules_to_save)\.(.*\.)?bias$")


def reflection_key(path: str) -> str:
    """Key of an adapted layer's vectors.

    Example:
        >>> reflection_key("encoder.query")
        'base_model.model.encoder.query.hra_u'
    """
    return f"{PREFIX}{path}.{REFLECTION}"


def vectors_key(path: str) -> str:
    """Key of an adapted layer's vectors before Gram-Schmidt; PEFT ignores it."""
    return f"{PREFIX}{path}.{VECTORS}"


def copy_key(path: str, name: str, *, adapted: bool) -> str:
    """Key of a trained copy. For a bias in an adapted layer (`adapted`), it contains the name of PEFT's wrapper.

    Example:
        >>> copy_key("encoder.query", "bias", adapted=True)
        'base_model.model.encoder.query.base_layer.bias'
    """
    return f"{PREFIX}{path}.base_layer.{name}" if adapted else f"{PREFIX}{path}.{name}"


def vectors_entry(path: str, name: str) -> str:
    """Entry of an adapter's vectors in the model's `state_dict`.

    Example:
        >>> vectors_entry("encoder.query", "default")
        'encoder.query.hra_u.default'
    """
    return f"{path}.{REFLECTION}.{name}"


def anchor_entry(path: str, name: str) -> str:
    """Entry of an adapter's anchor."""
    return f"{path}.{REFLECTION}.{name}{ANCHOR}"


def copy_entry(path: str, name: str, tensor: str, *, in_place: bool) -> str:
    """Entry of an adapter's copy of a tensor, which is in use (`in_place`) or not."""
    return (f"{path}.{tensor}" if in_place else f"{path}.{SAVED}.{name}.{tensor}").lstrip(".")


def adapter_entries(model: nn.Module) -> list[str]:
    """Entries of the model's `state_dict` that belong to adapters, including active trained copies."""
    entries = [
        f"{path}.{REFLECTION}.{name}"
        for path, layer in adapted_layers(model).items()
        for name in layer.hra_u.state_dict()
        if name != "unmerged"
    ]
    for path, (_, copies) in all_copies(model).items():
        entries += [f"{path}.{name}".lstrip(".") for name, whose in copies.in_place.items() if whose != BASE]
        entries += [
            f"{path}.{SAVED}.{key}".lstrip(".") for key in copies.state_dict() if not key.startswith(f"{BASE}.")
        ]
    return entries
