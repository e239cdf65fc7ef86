"""The metadata of an adapter in a captured graph: name, configuration, and which parameters were trainable before.

It is stored in `graph_module.meta["custom"]`, the only entry that `torch.export.save` keeps.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from hra_fx.config import HRAConfig
from hra_fx.errors import AdapterError
from hra_fx.export.ops import ROTATE

_KEY = "hra_fx"


def get_metadata(graph_module: fx.GraphModule) -> Any:
    """The metadata of the adapter, a dict with `adapter`, `config` and `trainable`; `None` if there is none."""
    return graph_module.meta.get("custom", {}).get(_KEY)


def with_metadata(
    graph_module: fx.GraphModule, config: HRAConfig, adapter_name: str, trainable: list[str]
) -> dict[str, Any]:
    """The `meta` of a graph plus the metadata of its adapter, which JSON can represent.

    Args:
        graph_module: the graph; not modified.
        config: the configuration of the adapter.
        adapter_name: its name.
        trainable: names of the parameters that required gradients before.
    """
    metadata = {"adapter": adapter_name, "config": config.to_dict(), "trainable": trainable}
    return {**graph_module.meta, "custom": {**graph_module.meta.get("custom", {}), _KEY: metadata}}


def without_metadata(graph_module: fx.GraphModule) -> dict[str, Any]:
    """The `meta` of a graph without what `with_metadata` added."""
    custom = {key: value for key, value in graph_module.meta.get("custom", {}).items() if key != _KEY}
    rest = {key: value for key, value in graph_module.meta.items() if key != "custom"}
    return {**rest, "custom": custom} if custom else rest


def has_adapter(graph_module: fx.GraphModule, config: HRAConfig, adapter_name: str) -> bool:
    """Whether a graph already has this adapter.

    Raises:
        AdapterError: it has another adapter, or another configuration.
    """
    metadata = get_metadata(graph_module)
    if metadata is None and not graph_module.graph.find_nodes(op="call_function", target=ROTATE):
        return False
    if metadata is not None and metadata["adapter"] == adapter_name and metadata["config"] == config.to_dict():
        return True
    present = "reflections" if metadata is None else f"the adapter {metadata['adapter']!r}"
    same_name = metadata is not None and metadata["adapter"] == adapter_name
    raise AdapterError(
        f"adapter {adapter_name!r}: the graph already has {present}{' with another configuration' * same_name}; a "
        "captured graph can have only one adapter. Fold it first (hra_fx.fold), or transform the original graph."
    )
