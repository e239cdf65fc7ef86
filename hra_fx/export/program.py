"""Exported programs: what they are, and edits of their graphs and tensors."""

from __future__ import annotations

import copy
import dataclasses
import sys
from typing import TYPE_CHECKING

from torch import Tensor, fx

from hra_fx.compat import OpOverload, is_higher_order
from hra_fx.errors import AdapterError
from hra_fx.layers.target import REFLECTION, find_kind

if TYPE_CHECKING:
    from torch.export import ExportedProgram
    from torch.export.graph_signature import ExportGraphSignature, InputSpec


def is_program(value: object) -> bool:
    """Whether a value is a `torch.export.ExportedProgram`. This does not import torch.export."""
    module = sys.modules.get("torch.export")
    return module is not None and isinstance(value, module.ExportedProgram)


def refuse_operators(model: object) -> None:
    """Raise an error for a program, or a `GraphModule` of ATen operators that read parameters, without layer calls."""
    if is_program(model) or (isinstance(model, fx.GraphModule) and _consists_of_operators(model)):
        raise AdapterError(
            f"`model` is {'an ExportedProgram' if is_program(model) else 'a GraphModule'} of operators, without calls "
            "of layers. Convert the program to a GraphModule with layers first: "
            "hra_fx.transform(hra_fx.lift(program), config)."
        )


def _consists_of_operators(value: fx.GraphModule) -> bool:
    called = (value.get_submodule(str(node.target)) for node in value.graph.find_nodes(op="call_module"))
    if any(find_kind(part) for part in called):
        return False
    parameters = dict(value.named_parameters(remove_duplicate=False))
    nodes = [node for node in value.graph.find_nodes(op="get_attr") if node.target in parameters]
    users = [user.target for node in nodes for user in node.users]
    # All layers may be in nested graphs, for example under torch.autocast.
    return any(isinstance(target, OpOverload) or is_higher_order(target) for target in users)


def is_adapter_tensor(name: str) -> bool:
    """Whether a tensor of a graph belongs to an adapter, by its name."""
    return REFLECTION in name.split(".")[:-1]


class ProgramEditor:
    """A copy of a program's graph, input specifications and state that can be modified. Tensors are shared.

    Attributes:
        state: name -> parameter or buffer.
    """

    def __init__(self, program: ExportedProgram) -> None:
        """Copy `program`, which is not modified."""
        self._program = program
        self.graph_module = fx.GraphModule(program.graph_module, copy.deepcopy(program.graph))
        # torch.export.unflatten caches a module there, but that module belongs to the original program.
        self.graph_module.meta = {
            key: value for key, value in program.graph_module.meta.items() if key != "unflattened_module"
        }
        self.graph = self.graph_module.graph
        for node, copied in zip(program.graph.nodes, self.graph.nodes, strict=True):
            copied.name = node.name  # the copy renames nodes with names of Python builtins, such as "input"
        self._specs: list[InputSpec] = list(program.graph_signature.input_specs)
        self.state: dict[str, Tensor] = dict(program.state_dict)
        self._constants = dict(program.constants)
        self._nodes = {node.name: node for node in self.graph.find_nodes(op="placeholder")}

    @property
    def constant_nodes(self) -> dict[fx.Node, str]:
        """Node -> name, for tensors that no call writes to: parameters, constants, and the buffers of adapters."""
        from torch.export.graph_signature import InputKind

        constant_kinds = (InputKind.PARAMETER, InputKind.CONSTANT_TENSOR)
        return {
            self._nodes[spec.arg.name]: spec.target
            for spec in self._specs
            if spec.target is not None and (spec.kind in constant_kinds or is_adapter_tensor(spec.target))
        }

    def tensor(self, name: str) -> Tensor:
        """The parameter, buffer or constant with this name."""
        found: Tensor = self.state[name] if name in self.state else self._constants[name]
        return found

    def add_buffer(self, name: str, tensor: Tensor, like: fx.Node) -> fx.Node:
        """Add a buffer, and return its node. `like` is a node of another tensor."""
        from torch.export.graph_signature import InputKind, InputSpec, TensorArgument

        kinds = (InputKind.PARAMETER, InputKind.BUFFER)
        last = max(index for index, spec in enumerate(self._specs) if spec.kind in kinds)
        with self.graph.inserting_after(self._nodes[self._specs[last].arg.name]):
            node = self.graph.placeholder(f"b_{name}")
        node.target = node.name
        node.meta["val"] = like.meta["val"].fake_mode.from_tensor(tensor, static_shapes=True)
        spec = InputSpec(InputKind.BUFFER, TensorArgument(name=node.name), name, persistent=True)
        self._specs.insert(last + 1, spec)
        self.state[name], self._nodes[node.name] = tensor, node
        return node

    def remove_if_unused(self, node: fx.Node) -> None:
        """Remove the parameter or buffer of a node that has no users."""
        if node.users:
            return
        for spec in self._specs:
            if spec.arg.name == node.name and spec.target is not None:
                tensors = self.state if spec.target in self.state else self._constants
                del tensors[spec.target]
        self._specs = [spec for spec in self._specs if spec.arg.name != node.name]
        self.graph.erase_node(node)

    def build(self) -> ExportedProgram:
        """A new program, verified by torch."""
        from torch.export import ExportedProgram

        program = self._program
        signature: ExportGraphSignature = dataclasses.replace(program.graph_signature, input_specs=self._specs)
        self.graph_module.recompile()
        return ExportedProgram(
            root=self.graph_module,
            graph=self.graph,
            graph_signature=signature,
            state_dict=self.state,
            range_constraints=copy.deepcopy(program.range_constraints),
            module_call_graph=list(program.module_call_graph),
            example_inputs=program.example_inputs,
            constants=self._constants,
            verifiers=program.verifiers,
        )
