"""`lower` and `freeze`: convert programs with adapters for exporters, to core ATen operators or constant factors."""

from __future__ import annotations

import itertools
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor, fx, nn

from hra_fx.errors import AdapterError
from hra_fx.export.captured import check_is_program, drop_metadata
from hra_fx.export.program import ROTATE, ProgramEditor, find_rotate_nodes, is_adapter_tensor, rotated_weight
from hra_fx.layers.containers import ANCHOR, SCALED
from passes.freeze import FreezePass
from passes.lower import LowerPass

if TYPE_CHECKING:
    from torch.export import ExportedProgram

_FROZEN = "frozen"


def lower(program: ExportedProgram) -> ExportedProgram:
    """Replace the reflections of a program with products, sums and comparisons in core ATen operators.

    Use this for programs from `hra_fx.transform(program, config)`, which have operators `hra_fx::rotate`. Models that
    were transformed before `torch.export` do not need it. The vectors remain trainable parameters. `fold`, `report`
    and `visualize` do not work on a lowered program, because they search for the operator.

    Args:
        program: an `ExportedProgram`; it is not modified.

    Returns:
        A new program, or `program` itself if it does not have such an operator.

    Raises:
        AdapterError: `program` is not an `ExportedProgram`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import hra_fx
        >>> program = torch.export.export(nn.Sequential(nn.Linear(3, 2)), (torch.randn(1, 3),))
        >>> program = hra_fx.transform(program, hra_fx.HRAConfig(r=2, target_modules=["0"]))
        >>> "hra_fx.rotate" in str(program.graph), "hra_fx.rotate" in str(lower(program).graph)
        (True, False)
    """
    check_is_program(program, "lower")
    if not find_rotate_nodes(program.graph):
        return program
    editor = ProgramEditor(program)
    LowerPass({ROTATE: partial(rotated_weight, exportable_ops=True)})(editor.graph_module)
    drop_metadata(editor.graph_module)
    return editor.build()


def freeze(program: ExportedProgram) -> ExportedProgram:
    """Precompute everything in a program that depends only on its adapters, for inference and export.

    A Linear becomes `x - (x U) A` followed by the base layer; a convolution gets two thin parallel convolutions; a
    rotated weight becomes `W - (W U) A`. The constants have rank k, and are buffers `<layer>.hra_u.frozen_<n>` that
    replace the vectors. The weights are those of the base model, so another adapter of the same rank only needs other
    constants. The result cannot be trained.

    Args:
        program: an `ExportedProgram` of a transformed model in eval mode, or a program from
            `hra_fx.transform(program, config)`. It is not modified.

    Returns:
        A new program.

    Raises:
        AdapterError: `program` is not an `ExportedProgram`, has no reflections, or has vectors on the meta device.
        GraphInvariantError: a reflection depends on more than its vectors and weights.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import hra_fx
        >>> model = hra_fx.transform(nn.Sequential(nn.Linear(3, 2)), hra_fx.HRAConfig(r=2, target_modules=["0"]))
        >>> program = freeze(torch.export.export(model.eval(), (torch.randn(1, 3),)))
        >>> {name: tuple(tensor.shape) for name, tensor in program.state_dict.items() if ".hra_u." in name}
        {'0.hra_u.frozen_0': (3, 2), '0.hra_u.frozen_1': (2, 3)}
    """
    check_is_program(program, "freeze")
    editor = ProgramEditor(lower(program))
    names = editor.constant_nodes
    tensors = {node: editor.tensor(name) for node, name in names.items()}
    found = [node for node, name in names.items() if is_adapter_tensor(name) and node.users]
    # The constants of an earlier `freeze` are buffers with other names.
    vectors = [
        node for node in found if isinstance(tensors[node], nn.Parameter) or names[node].endswith((ANCHOR, SCALED))
    ]
    if not vectors:
        raise AdapterError(
            "freeze: the graph has no reflections. It is already frozen, or comes from a model that was folded or not "
            "transformed. Export it without freeze."
        )
    for node in vectors:
        if tensors[node].is_meta:
            raise AdapterError(f"{names[node]} is on the meta device. Load the adapter before exporting the model.")

    def add_constant(value: Tensor, made_of: list[fx.Node]) -> fx.Node:
        container = names[made_of[0]].rpartition(".")[0]
        free = (name for count in itertools.count() if (name := f"{container}.{_FROZEN}_{count}") not in editor.state)
        return editor.add(next(free), value, made_of[0])

    FreezePass(tensors, vectors, add_constant)(editor.graph_module)
    for node in (node for node, name in names.items() if is_adapter_tensor(name)):
        editor.remove_if_unused(node)
    return editor.build()
