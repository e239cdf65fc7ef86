"""`lower`: replace `hra_fx::rotate` in a captured graph by core ATen operators, for exporters."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hra_fx.export.captured import check_is_program
from hra_fx.export.editors import ProgramEditor
from hra_fx.export.metadata import without_metadata
from hra_fx.export.ops import ROTATE
from hra_fx.functional import exportable, householder
from hra_fx.functional.rotate import rotate_weight
from passes.lower import LowerPass

if TYPE_CHECKING:
    from torch.export import ExportedProgram


def lower(program: ExportedProgram) -> ExportedProgram:
    """Replace the reflections of a program by products, sums and comparisons of core ATen.

    For programs from `hra_fx.transform(program, config)`, whose reflections are operators `hra_fx::rotate`. Models that
    were transformed before `torch.export` do not need it. The vectors remain trainable parameters. `fold`, `report`
    and `visualize` do not work on a lowered program, because they look for the operator.

    Args:
        program: an `ExportedProgram`, which is not modified.

    Returns:
        A new program, or `program` itself if it has no such operator.

    Raises:
        AdapterError: the argument has another type.

    Example:
        >>> from torch import nn
        >>> import hra_fx
        >>> program = torch.export.export(nn.Sequential(nn.Linear(3, 2)), (torch.randn(1, 3),))
        >>> program = hra_fx.transform(program, hra_fx.HRAConfig(r=2, target_modules=["0"]))
        >>> "hra_fx.rotate" in str(program.graph), "hra_fx.rotate" in str(lower(program).graph)
        (True, False)
    """
    check_is_program(program, "lower")
    if not program.graph.find_nodes(op="call_function", target=ROTATE):
        return program
    editor = ProgramEditor(program)
    LowerPass({ROTATE: rotate_decomposition})(editor.graph_module)
    editor.graph_module.meta = without_metadata(editor.graph_module)
    return editor.build()


def rotate_decomposition(
    weight: Tensor, vectors: Tensor, anchor: Tensor | None, apply_GS: bool, columns: bool
) -> Tensor:
    """`hra_fx::rotate` in core ATen operators, with the arguments and the result of the operator.

    Example:
        >>> rotate_decomposition(torch.tensor([[2.0, 5.0]]), torch.tensor([[1.0], [0.0]]), None, False, False)
        tensor([[-2.,  5.]])
    """
    dtype = householder.working_dtype(torch.promote_types(weight.dtype, vectors.dtype))
    chain = vectors.to(dtype)
    if apply_GS:
        chain = exportable.gram_schmidt(householder.normalize(chain))
    if anchor is not None:
        chain = torch.cat([anchor.to(dtype), chain], dim=1)
    return rotate_weight(weight, chain, transposed=columns, exportable_ops=True)
