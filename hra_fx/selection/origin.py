"""What a graph must know of the model that it was traced from: its class, name, configuration and output layer.

A `GraphModule` has another class and none of these attributes, but `target_modules="all-linear"`, the defaults of an
architecture and the files of adapters depend on them.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from hra_fx.layers.class_swap import original_class
from hra_fx.layers.graph_notes import read_notes, write_note

_KEY = "_hra_origin"


@dataclass(frozen=True)
class Origin:
    """The facts about a model.

    Attributes:
        class_name, library: the name of its class, and the module that defines it.
        is_pretrained: whether it is a model of transformers.
        name: its name or folder.
        config: its configuration, or `None`.
        output: the path of its output layer, or `None`.
    """

    class_name: str
    library: str
    is_pretrained: bool = False
    name: str | None = None
    config: Any = None
    output: str | None = None


def origin_of(model: nn.Module) -> Origin:
    """The facts about a model, or about the one that a graph was traced from.

    Example:
        >>> origin_of(nn.Sequential()).class_name
        'Sequential'
    """
    if isinstance(model, fx.GraphModule):
        known = read_notes(model).get(_KEY)
        if isinstance(known, Origin):
            return known
    kind, name = original_class(model), getattr(model, "name_or_path", None)
    # If transformers is not loaded, no object can be of its classes.
    pretrained = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", None)
    is_pretrained = pretrained is not None and isinstance(model, pretrained)
    head = getattr(model, "get_output_embeddings")() if is_pretrained else None  # noqa: B009  (typed as a tensor)
    output = None if head is None else next((path for path, part in model.named_modules() if part is head), None)
    return Origin(
        kind.__name__,
        kind.__module__,
        is_pretrained,
        name if isinstance(name, str) else None,
        getattr(model, "config", None),
        output,
    )


def keep_origin(graph: fx.GraphModule, origin: Origin) -> None:
    """Record the facts about the model of a graph."""
    write_note(graph, _KEY, origin)
