"""Edit a copy of a `torch.export.ExportedProgram`; the original is not modified."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx, nn

from hra_fx.export.insert import AdapterNodes
from hra_fx.export.match import GraphLayer, group_tied
from hra_fx.export.select import InitialAdapter
from hra_fx.layers.adapters import ANCHOR
from hra_fx.layers.target import REFLECTION

if TYPE_CHECKING:
    from torch.export import ExportedProgram, ModuleCallEntry
    from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec


def is_adapter_tensor(name: str) -> bool:
    """Whether a tensor of a program belongs to an adapter, by its name.

    Example:
        >>> is_adapter_tensor("layer.hra_u.default"), is_adapter_tensor("layer.weight")
        (True, False)
    """
    return REFLECTION in name.split(".")[:-1]


class ProgramEditor:
    """A copy of a program's graph, input specifications and state, which can be modified; tensors are shared.

    Attributes:
        graph_module: the copied graph.
        specs: the input specifications, in the order of the placeholders.
        state_dict: name -> parameter or buffer.
        constants: name -> other constant.
        names: name of a placeholder -> name of its parameter or buffer.
        weights: name of a parameter -> a list of its placeholder.
    """

    def __init__(self, program: ExportedProgram) -> None:
        """Copy `program`."""
        self.graph_module = fx.GraphModule(program.graph_module, copy.deepcopy(program.graph))
        # torch.export.unflatten caches a module there, which belongs to the original program.
        self.graph_module.meta = {
            key: value for key, value in program.graph_module.meta.items() if key != "unflattened_module"
        }
        for node, copied in zip(program.graph.nodes, self.graph.nodes, strict=True):
            copied.name = node.name  # the copy renames nodes with names of Python builtins, such as "input"
        self.specs: list[InputSpec] = list(program.graph_signature.input_specs)
        self.state_dict: dict[str, Tensor] = dict(program.state_dict)
        self.constants = dict(program.constants)
        self._nodes = {node.name: node for node in self.graph.find_nodes(op="placeholder")}
        self.names = {spec.arg.name: spec.target for spec in self.specs if spec.target in self.state_dict}
        self.weights = {
            target: [self._nodes[name]]
            for name, target in self.names.items()
            if isinstance(self.state_dict[target], nn.Parameter)
        }

    @property
    def graph(self) -> fx.Graph:
        """The copied graph."""
        return self.graph_module.graph

    @property
    def parameters(self) -> dict[str, Tensor]:
        """Name -> parameter."""
        return {name: self.state_dict[name] for name in self.state_dict if name in self.weights}

    @property
    def constant_nodes(self) -> dict[fx.Node, str]:
        """Node -> name of each tensor that no call writes to: parameters, constants, and the buffers of adapters."""
        from torch.export.graph_signature import InputKind

        constant_kinds = (InputKind.PARAMETER, InputKind.CONSTANT_TENSOR)
        return {
            self._nodes[spec.arg.name]: spec.target
            for spec in self.specs
            if spec.target is not None and (spec.kind in constant_kinds or is_adapter_tensor(spec.target))
        }

    def tensor(self, name: str) -> Tensor:
        """The parameter, buffer or constant of a name."""
        found: Tensor = self.state_dict[name] if name in self.state_dict else self.constants[name]
        return found

    def has(self, name: str) -> bool:
        """Whether the program has a tensor of this name."""
        return name in self.state_dict

    def name_of(self, node: fx.Node) -> str:
        """The name of the tensor of a node."""
        return self.names[node.name]

    def weight_node(self, name: str) -> fx.Node:
        """The node of a parameter."""
        node: fx.Node = self.weights[name][0]
        return node

    def add_adapter(self, layer: GraphLayer, initial: InitialAdapter, adapter_name: str) -> AdapterNodes:
        """Add the vectors of a layer as a parameter, and its anchor as a buffer."""
        from torch.export.graph_signature import InputKind

        name = f"{layer.path}.{REFLECTION}.{adapter_name}"
        like = self.weight_node(layer.name).meta["val"]
        vectors = self._add(name, nn.Parameter(initial.vectors, initial.trainable), InputKind.PARAMETER, like)
        if initial.anchor is None:
            return AdapterNodes(vectors, None)
        return AdapterNodes(vectors, self._add(name + ANCHOR, initial.anchor, InputKind.BUFFER, like))

    def add_buffer(self, name: str, tensor: Tensor, like: fx.Node) -> fx.Node:
        """Add a buffer; returns its node. Its fake tensor is created in the mode of the node `like`."""
        from torch.export.graph_signature import InputKind

        return self._add(name, tensor, InputKind.BUFFER, like.meta["val"])

    def _add(self, target: str, tensor: Tensor, kind: InputKind, like: Any) -> fx.Node:
        from torch.export.graph_signature import InputKind, InputSpec, TensorArgument

        is_buffer = kind is InputKind.BUFFER
        kinds = (InputKind.PARAMETER, InputKind.BUFFER) if is_buffer else (InputKind.PARAMETER,)
        last = max(index for index, spec in enumerate(self.specs) if spec.kind in kinds)
        prefix = "b" if is_buffer else "p"
        with self.graph.inserting_after(self._nodes[self.specs[last].arg.name]):
            node = self.graph.placeholder(f"{prefix}_{target}")
        node.target = node.name
        node.meta["val"] = like.fake_mode.from_tensor(tensor, static_shapes=True)
        spec = InputSpec(kind, TensorArgument(name=node.name), target, persistent=True if is_buffer else None)
        self.specs.insert(last + 1, spec)
        self.state_dict[target], self._nodes[node.name] = tensor, node
        return node

    def remove_if_unused(self, node: fx.Node) -> None:
        """Remove the parameter or buffer of a node that has no users."""
        if node.users:
            return
        for spec in self.specs:
            if spec.arg.name == node.name and spec.target is not None:
                tensors = self.state_dict if spec.target in self.state_dict else self.constants
                del tensors[spec.target]
        self.specs = [spec for spec in self.specs if spec.arg.name != node.name]
        self.graph.erase_node(node)

    def replace_weights(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace weights, and also tied names of them that no node reads."""
        for names in group_tied(self.parameters):
            new = {name: nn.Parameter(tensors[name]) for name in names if name in tensors}
            if len(new) == 1:
                new |= {name: weight for weight in new.values() for name in names if not self.weights[name][0].users}
            self.state_dict |= new

    def set_trainable(self, trainable: set[str]) -> None:
        """Set which of the original parameters require gradients. Changed ones are new objects on the same memory."""
        for names in group_tied(self.parameters):
            tensor, wanted = self.state_dict[names[0]], not trainable.isdisjoint(names)
            if tensor.requires_grad != wanted:
                alias = nn.Parameter(tensor.detach(), requires_grad=wanted)
                self.state_dict |= dict.fromkeys(names, alias)

    def build(self, program: ExportedProgram) -> ExportedProgram:
        """The edited program, verified by torch; everything else is taken from the original `program`."""
        from torch.export import ExportedProgram

        signature: ExportGraphSignature = dataclasses.replace(program.graph_signature, input_specs=self.specs)
        self.graph_module.recompile()
        return ExportedProgram(
            root=self.graph_module,
            graph=self.graph,
            graph_signature=signature,
            state_dict=self.state_dict,
            range_constraints=copy.deepcopy(program.range_constraints),
            module_call_graph=[_copy_entry(entry) for entry in program.module_call_graph],
            example_inputs=program.example_inputs,
            constants=self.constants,
            verifiers=program.verifiers,
        )


def _copy_entry(entry: ModuleCallEntry) -> ModuleCallEntry:
    """A copy whose node names can change. The tree specs are shared: torch warns when they are copied."""
    signature = entry.signature
    if signature is None:
        return dataclasses.replace(entry)
    inputs, outputs = copy.deepcopy(signature.inputs), copy.deepcopy(signature.outputs)
    return dataclasses.replace(entry, signature=dataclasses.replace(signature, inputs=inputs, outputs=outputs))
