"""`freeze`: replace what depends only on the adapters of an exported program with constants."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from torch import Tensor, fx, nn

from hra_fx.compat import require
from hra_fx.errors import AdapterError
from hra_fx.export.program import ProgramEditor, is_adapter_tensor, is_program
from hra_fx.layers.containers import ANCHOR, SCALED
from hra_fx.passes.freeze import FreezePass

if TYPE_CHECKING:
    from torch.export import ExportedProgram

_FROZEN = "frozen"


def freeze(program: ExportedProgram) -> ExportedProgram:
    """Precompute everything in a program that depends only on its adapters, for inference and export.

    A Linear becomes `x - (x U) A` followed by the base layer; a convolution gets two thin parallel convolutions; a
    rotated weight becomes `W - (W U) A`. The constants have rank k, and are buffers `<layer>.hra_u.frozen_<n>` that
    replace the vectors. The weights are those of the base model, so another adapter of the same rank only needs other
    constants. The result cannot be trained.

    Args:
        program: an `ExportedProgram` of a transformed model in eval mode. It is not modified.

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
    if not is_program(program):
        raise AdapterError(
            f"freeze: expected an ExportedProgram, got {type(program).__name__}. Export the transformed model first: "
            "hra_fx.freeze(torch.export.export(model, args))."
        )
    require("a program of torch.export")
    editor = ProgramEditor(program)
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
        return editor.add_buffer(next(free), value, made_of[0])

    FreezePass(tensors, vectors, add_constant)(editor.graph_module)
    for node in (node for node, name in names.items() if is_adapter_tensor(name)):
        editor.remove_if_unused(node)
    return editor.build()
