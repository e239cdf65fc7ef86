"""`freeze`: a captured graph whose adapters are constant factors, computed once and not at every call."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor, fx, nn

from hra_fx.errors import AdapterError
from hra_fx.export.lower import check_captured, lower
from hra_fx.export.program import is_program
from hra_fx.export.program_edit import Draft, is_of_adapter
from passes.freeze import FreezePass

if TYPE_CHECKING:
    from torch.export import ExportedProgram

P = TypeVar("P", bound="ExportedProgram | fx.GraphModule")
_FROZEN = "frozen"


def freeze(program: P) -> P:
    """Compute once what a captured graph makes of its adapters: for inference, and for exporters.

    A Linear is left with `x - (x U) A` before it, a convolution with two thin ones beside it, and a weight that others
    read with `W - (W U) A`: constants of rank k, buffers `<layer>.hra_u.frozen_<n>`, in the place of the vectors. The
    weights are those of the base model, so another adapter of the same rank needs other constants only. Nothing of it
    is trained any more.

    Args:
        program: an `ExportedProgram` of a transformed model, in eval mode, or of `hra_fx.transform(program, config)`,
            which is not changed; or a `GraphModule` of aten operators, which is.

    Returns:
        A new program. Of a `GraphModule`, the same object.

    Raises:
        AdapterError: it is neither of these, has no reflections, or has vectors without data.
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
    check_captured(program, "freeze")
    program = lower(program)
    captured: Any = program
    if is_program(program):
        captured = _frozen(captured)
    else:
        _freeze_module(captured)
    return captured  # type: ignore[no-any-return]


def _frozen(program: ExportedProgram) -> ExportedProgram:
    draft = Draft(program)
    named = {node: name for name, node in draft.unchanging.items()}
    tensors = {node: draft.tensor(name) for node, name in named.items()}
    vectors = _vectors(named, tensors)

    def place(value: Tensor, made_of: list[fx.Node]) -> fx.Node:
        return draft.hold(_name_of_constant(named[made_of[0]], draft.state_dict), value, made_of[0])

    FreezePass(tensors, vectors, place)(draft.graph_module)
    for node in (node for node, name in named.items() if is_of_adapter(name)):
        draft.discard(node)
    return draft.finish(program)


def _freeze_module(module: fx.GraphModule) -> None:
    held: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    held |= {name: tensor for name, tensor in module.named_buffers(remove_duplicate=False) if is_of_adapter(name)}
    named = {node: str(node.target) for node in module.graph.find_nodes(op="get_attr") if node.target in held}
    tensors = {node: held[name] for node, name in named.items()}
    vectors = _vectors(named, tensors)

    def place(value: Tensor, made_of: list[fx.Node]) -> fx.Node:
        name = _name_of_constant(named[made_of[0]], held)
        path, _, last = name.rpartition(".")
        held[name] = value
        module.get_submodule(path).register_buffer(last, value)
        with module.graph.inserting_before(next(iter(module.graph.nodes))):
            return module.graph.get_attr(name)

    adapters = [name for name in held if is_of_adapter(name)]
    FreezePass(tensors, vectors, place)(module)
    for node in (node for node, name in named.items() if name in adapters):
        module.graph.erase_node(node)
    for path, _, last in (name.rpartition(".") for name in adapters):
        delattr(module.get_submodule(path), last)
    module.recompile()


def _vectors(named: Mapping[fx.Node, str], tensors: Mapping[fx.Node, Tensor]) -> list[fx.Node]:
    """The nodes of vectors and anchors that the graph reads.

    Raises:
        AdapterError: there is none, or one without data.
    """
    vectors = [
        node
        for node, name in named.items()
        if is_of_adapter(name) and node.users and not _is_constant(name, tensors[node])
    ]
    if not vectors:
        raise AdapterError(
            "freeze: the graph reads no reflections. It is frozen already, or of a model that was folded, or not "
            "transformed: export that as it is."
        )
    for node in vectors:
        if tensors[node].is_meta:
            raise AdapterError(
                f"{named[node]}: it is on the meta device, and holds no data. Load it before the export."
            )
    return vectors


def _is_constant(name: str, tensor: Tensor) -> bool:
    """Whether a tensor is what an earlier `freeze` left; an adapter of that name has parameters."""
    return not isinstance(tensor, nn.Parameter) and bool(re.fullmatch(rf"{_FROZEN}_\d+", name.rpartition(".")[2]))


def _name_of_constant(vectors: str, taken: Collection[str]) -> str:
    container = vectors.rpartition(".")[0]
    return next(name for count in itertools.count() if (name := f"{container}.{_FROZEN}_{count}") not in taken)
