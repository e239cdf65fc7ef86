"""`lower`: a captured graph without `hra_fx::rotate`, for exporters, which know the operators of aten alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, fx

from hra_fx.errors import AdapterError
from hra_fx.export.ops import ROTATE
from hra_fx.export.program import is_program
from hra_fx.export.program_edit import Draft
from hra_fx.export.select import without_note
from hra_fx.functional import exportable as products, householder
from hra_fx.layers.target import as_rows
from passes.lower import LowerPass

if TYPE_CHECKING:
    from torch.export import ExportedProgram

P = TypeVar("P", bound="ExportedProgram | fx.GraphModule")


def lower(program: P) -> P:
    """Write out the reflections of a captured graph as products, sums and comparisons of core aten.

    For a program of `hra_fx.transform(program, config)`, whose reflections are operators `hra_fx::rotate`. A model that
    was transformed before its capture needs no such step: torch.export gets it in these operators already. The vectors
    stay parameters, and have their gradients; but `fold`, `report` and the pictures look for the operators.

    Args:
        program: an `ExportedProgram`, which is not changed; or a `GraphModule` of aten operators, which is.

    Returns:
        A new program; `program` itself where it has no such operators. Of a `GraphModule`, the same object.

    Raises:
        AdapterError: it is neither of these.
        GraphInvariantError: a `GraphModule` has lost the shapes of its values.

    Example:
        >>> from torch import nn
        >>> import hra_fx
        >>> program = torch.export.export(nn.Sequential(nn.Linear(3, 2)), (torch.randn(1, 3),))
        >>> program = hra_fx.transform(program, hra_fx.HRAConfig(r=2, target_modules=["0"]))
        >>> "hra_fx.rotate" in str(program.graph), "hra_fx.rotate" in str(lower(program).graph)
        (True, False)
    """
    check_captured(program, "lower")
    if not program.graph.find_nodes(op="call_function", target=ROTATE):
        return program
    step = LowerPass({ROTATE: written_out})
    if not is_program(program):
        captured: Any = program
        step(captured)
        captured.meta = without_note(captured)
        return program
    exported: Any = program
    draft = Draft(exported)
    step(draft.graph_module)
    draft.graph_module.meta = without_note(draft.graph_module)
    lowered: Any = draft.finish(exported)
    return lowered  # type: ignore[no-any-return]


def check_captured(program: object, function: str) -> None:
    """Refuse what is no captured graph.

    Raises:
        AdapterError: it is none.
    """
    if not is_program(program) and not isinstance(program, fx.GraphModule):
        raise AdapterError(
            f"{function}: {type(program).__name__} is no captured graph. Export the model first, transformed as it is: "
            f"hra_fx.{function}(torch.export.export(model, args))."
        )


def written_out(weight: Tensor, vectors: Tensor, anchor: Tensor | None, apply_GS: bool, columns: bool) -> Tensor:
    """What `hra_fx::rotate` computes, in products alone. Arguments and value are those of the operator.

    Example:
        >>> written_out(torch.tensor([[2.0, 5.0]]), torch.tensor([[1.0], [0.0]]), None, False, False)
        tensor([[-2.,  5.]])
    """
    wide = householder.working_dtype(torch.promote_types(weight.dtype, vectors.dtype))
    chain = householder.normalize(vectors.to(wide))
    if apply_GS:
        chain = products.gram_schmidt(chain)
    if anchor is not None:
        chain = torch.cat([householder.normalize(anchor.to(wide)), chain], dim=1)
    rows = as_rows(weight, columns=columns).to(wide)
    rotated = householder.rotate(rows, chain, products.inverse_factor(chain)).to(weight.dtype)
    return rotated.mT.contiguous() if columns else rotated.reshape(weight.shape)
