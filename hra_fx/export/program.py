"""`transform` and `fold` of a `torch.export.ExportedProgram`; both return a new program.

program = hra_fx.transform(torch.export.export(model, args), config)
module = program.module()                 # shares its parameters with the program: train it as usual
program = hra_fx.fold(program)            # the original graph, with the trained adapter in its weights
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from hra_fx.config import HRAConfig
from hra_fx.errors import UnsupportedLayerError
from hra_fx.export.metadata import has_adapter
from hra_fx.export.program_edit import ProgramEditor
from hra_fx.export.rewrite import add_reflections, fold_reflections
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
    module = sys.modules.get("torch.export")
    return module is not None and isinstance(value, module.ExportedProgram)


def transform_program(program: ExportedProgram, config: HRAConfig, adapter_name: str = "default") -> ExportedProgram:
    """Add reflections to an exported program: each selected weight is replaced by `W Q`, one node `hra_fx::rotate`.

    The parameters of the new program share memory with those of the original, and are frozen. `state_dict` and
    `graph_signature` have in addition the parameter `<layer>.hra_u.<adapter>` of shape `(d, r)`, and the buffer
    `<layer>.hra_u.<adapter>_anchor` if `init_weights=True` needs one. Tied weights are read by separate names, of which
    only those of the selected layers are rotated.

    Args:
        program: a program of `torch.export.export`, decomposed or not; not modified.
        config: which layers, by their names in the model, how many reflections, and the initialization.
        adapter_name: name of the adapter, part of its parameters' names.

    Returns:
        A new program; `program` itself if it has this adapter already.

    Raises:
        ConfigError: the configuration trains more than reflections.
        SelectionError: the configuration does not fit the program.
        UnsupportedLayerError: a selected layer does not support reflections.
        AdapterError: the program has another adapter.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> program = torch.export.export(nn.Sequential(nn.Linear(3, 2)), (torch.randn(1, 3),))
        >>> list(transform_program(program, HRAConfig(r=2, target_modules=["0"])).state_dict)
        ['0.weight', '0.bias', '0.hra_u.default']
    """
    check_adapter_name(adapter_name)
    if has_adapter(program.graph_module, config, adapter_name):
        return program
    if program.graph_signature.backward_signature is not None:
        raise UnsupportedLayerError(
            "the program contains a backward pass, which would not compute gradients of the reflections. Transform it "
            "before adding the backward pass."
        )
    editor = ProgramEditor(program)
    add_reflections(editor, config, adapter_name)
    return editor.build(program)


def fold_program(program: ExportedProgram) -> ExportedProgram:
    """Fold the reflections of a program into its weights: the original graph, node for node.

    Training through `program.module()` is included, because the parameters are shared. Weights that were tied stay
    separate if only some of their layers are adapted.

    Args:
        program: a program of `transform_program`, possibly decomposed, or saved and loaded; not modified.

    Returns:
        A new program; parameters that were not adapted share memory with `program`.

    Raises:
        AdapterError: the program has no reflections.
        FoldError: a folded weight would not be finite.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> program = torch.export.export(nn.Sequential(nn.Linear(3, 2)), (torch.randn(1, 3),))
        >>> folded = fold_program(transform_program(program, HRAConfig(r=2, target_modules=["0"])))
        >>> [node.name for node in folded.graph.nodes] == [node.name for node in program.graph.nodes]
        True
    """
    editor = ProgramEditor(program)
    fold_reflections(editor)
    return editor.build(program)
