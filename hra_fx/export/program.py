"""`transform` and `fold` of a `torch.export.ExportedProgram`: a new program each time, the given one stays as it is.

program = hra_fx.transform(torch.export.export(model, args), config)
module = program.module()                 # shares its parameters with the program: train it as ever
program = hra_fx.fold(program)            # the captured graph again, with what was trained in the weights
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from hra_fx.config import HRAConfig
from hra_fx.errors import UnsupportedLayerError
from hra_fx.export.fold import folded_weights
from hra_fx.export.insert import insert, remove, rotations, separate
from hra_fx.export.program_edit import Draft
from hra_fx.export.select import choose, is_done, note_of, start, with_note, without_note
from hra_fx.layers.adapters import check_adapter_name

if TYPE_CHECKING:
    from torch.export import ExportedProgram


def is_program(value: object) -> bool:
    """Whether a value is a `torch.export.ExportedProgram`; does not import torch.export.

    Example:
        >>> from torch import nn
        >>> is_program(nn.Linear(2, 2))
        False
    """
    exporting = sys.modules.get("torch.export")
    return exporting is not None and isinstance(value, exporting.ExportedProgram)


def transform_program(program: ExportedProgram, config: HRAConfig, adapter_name: str = "default") -> ExportedProgram:
    """An exported program with reflections: each selected weight acts as `W Q`, by one node `hra_fx::rotate`.

    Its parameters share the memory of the given program's, and are frozen; `state_dict` and `graph_signature` gain the
    parameter `<layer>.hra_u.<adapter>` of shape `(d, r)`, and the buffer `<layer>.hra_u.<adapter>_anchor` where
    `init_weights=True` takes one to start at the identity. Weights that were tied are separate names from now on, of
    which only the selected layers' are rotated.

    Args:
        program: a program of `torch.export.export`, decomposed or not. It is not changed.
        config: which layers, by the names that they had in the model, how many reflections, and how they start.
        adapter_name: name of the adapter, a part of its parameters' names.

    Returns:
        A new program; `program` itself where it has this adapter already.

    Raises:
        ConfigError: the configuration trains more than reflections.
        SelectionError: the configuration does not fit the program.
        UnsupportedLayerError: a selected layer cannot be adapted rightly.
        AdapterError: the program has another adapter.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> program = torch.export.export(nn.Sequential(nn.Linear(3, 2)), (torch.randn(1, 3),))
        >>> list(transform_program(program, HRAConfig(r=2, target_modules=["0"])).state_dict)
        ['0.weight', '0.bias', '0.hra_u.default']
    """
    check_adapter_name(adapter_name)
    if is_done(program.graph_module, config, adapter_name):
        return program
    if program.graph_signature.backward_signature is not None:
        raise UnsupportedLayerError(
            "the program: it holds a backward pass already, which knows nothing of reflections. Transform it before."
        )
    draft = Draft(program)
    sites = choose(draft.graph, draft.weights, draft.parameters, config)
    for site in sites:
        fresh = start(site, draft.parameters[site.name], config)
        tensors = draft.add(site, fresh, adapter_name)
        insert(draft.graph, site, draft.weights[site.source][0], tensors, apply_GS=config.apply_GS)
    separate(sites, lambda name: draft.weights[name][0])
    trainable = [name for name, parameter in draft.parameters.items() if parameter.requires_grad]
    draft.give_gradient(set())
    draft.graph_module.meta = with_note(draft.graph_module, config, adapter_name, trainable)
    return draft.finish(program)


def fold_program(program: ExportedProgram) -> ExportedProgram:
    """A program without its reflections, which are in its weights: the graph that was captured, node for node.

    What was trained through `program.module()` is seen, since the parameters are the same. Where weights were tied, and
    only some of the layers adapted, they stay apart.

    Args:
        program: a program of `transform_program`, decomposed, saved and loaded since or not. It is not changed.

    Returns:
        A new program; what was not adapted shares its memory with `program`.

    Raises:
        AdapterError: the program has no reflections.
        FoldError: a weight would not be finite.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> program = torch.export.export(nn.Sequential(nn.Linear(3, 2)), (torch.randn(1, 3),))
        >>> folded = fold_program(transform_program(program, HRAConfig(r=2, target_modules=["0"])))
        >>> [node.name for node in folded.graph.nodes] == [node.name for node in program.graph.nodes]
        True
    """
    draft = Draft(program)
    nodes = rotations(draft.graph)
    folded = folded_weights(nodes, draft.state_dict.__getitem__, lambda node: draft.names[node.name])
    draft.replace(folded)
    for node in nodes:
        for leftover in remove(draft.graph, node):
            draft.discard(leftover)
    note = note_of(draft.graph_module)
    if note is not None:
        draft.give_gradient(set(note["trainable"]))
    draft.graph_module.meta = without_note(draft.graph_module)
    return draft.finish(program)
