"""Add reflections to a captured graph, and fold them, by the editor of a program or of a module."""

from __future__ import annotations

from typing import TypeAlias

from hra_fx.config import HRAConfig
from hra_fx.export.fold import compute_folded_weights
from hra_fx.export.insert import find_rotate_nodes, insert_rotation, remove_rotation, split_shared_uses
from hra_fx.export.metadata import get_metadata, with_metadata, without_metadata
from hra_fx.export.module_edit import ModuleEditor
from hra_fx.export.program_edit import ProgramEditor
from hra_fx.export.select import init_adapter, select_layers

Editor: TypeAlias = ProgramEditor | ModuleEditor


def add_reflections(editor: Editor, config: HRAConfig, adapter_name: str) -> None:
    """Rotate the weights that a configuration selects, freeze the other parameters, and store the metadata.

    Raises:
        ConfigError, SelectionError, UnsupportedLayerError: see `select_layers`; nothing was modified.
    """
    graph = editor.graph_module.graph
    layers = select_layers(graph, editor.weights, editor.parameters, config)
    initials = [init_adapter(layer, editor.parameters[layer.name], config) for layer in layers]
    for layer, initial in zip(layers, initials, strict=True):
        weight = editor.weight_node(layer.source)
        adapter = editor.add_adapter(layer, initial, adapter_name)
        insert_rotation(graph, layer, weight, adapter, apply_GS=config.apply_GS)
    split_shared_uses(layers, editor.weight_node)
    trainable = [name for name, parameter in editor.parameters.items() if parameter.requires_grad]
    editor.set_trainable(set())
    editor.graph_module.meta = with_metadata(editor.graph_module, config, adapter_name, trainable)


def fold_reflections(editor: Editor) -> None:
    """Remove all rotations, and write them into the weights.

    Raises:
        AdapterError, FoldError: see `compute_folded_weights`; nothing was modified.
    """
    graph = editor.graph_module.graph
    nodes = find_rotate_nodes(graph)
    editor.replace_weights(compute_folded_weights(nodes, editor.tensor, editor.name_of))
    for node in nodes:
        for leftover in remove_rotation(graph, node):
            editor.remove_if_unused(leftover)
    metadata = get_metadata(editor.graph_module)
    if metadata is not None:
        editor.set_trainable(set(metadata["trainable"]))
    editor.graph_module.meta = without_metadata(editor.graph_module)
