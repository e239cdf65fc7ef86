"""A copy of a `torch.export.ExportedProgram` to be changed: the given program stays as it is."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx, nn

from hra_fx.export.insert import Tensors
from hra_fx.export.match import GraphSite, groups_of
from hra_fx.export.select import Start
from hra_fx.layers.adapters import ANCHOR
from hra_fx.layers.target import REFLECTION

if TYPE_CHECKING:
    from torch.export import ExportedProgram, ModuleCallEntry
    from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec


def is_of_adapter(name: str) -> bool:
    """Whether a tensor of a program belongs to an adapter, by its name.

    Example:
        >>> is_of_adapter("layer.hra_u.default"), is_of_adapter("layer.weight")
        (True, False)
    """
    return REFLECTION in name.split(".")[:-1]


class Draft:
    """A copy of a program to be changed: its graph, input specifications and state; tensors are shared.

    Attributes:
        graph_module: the copied graph.
        specs: the input specifications, in the order of the placeholders.
        state_dict: name -> tensor.
        constants: name -> what else the program holds.
        names: name of a placeholder -> name of its parameter or buffer.
        weights: name of a parameter -> its one placeholder.
    """

    def __init__(self, program: ExportedProgram) -> None:
        """A draft that is equal to `program`."""
        self.graph_module = fx.GraphModule(program.graph_module, copy.deepcopy(program.graph))
        # torch.export.unflatten keeps what it made there, which is of the given program only.
        self.graph_module.meta = {
            key: value for key, value in program.graph_module.meta.items() if key != "unflattened_module"
        }
        for node, copied in zip(program.graph.nodes, self.graph.nodes, strict=True):
            copied.name = node.name  # the copy avoids names of Python's own, such as "input"
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

    def add(self, site: GraphSite, fresh: Start, adapter_name: str) -> Tensors:
        """Give a site its vectors, as a parameter, and its anchor, as a buffer."""
        from torch.export.graph_signature import InputKind

        name = f"{site.path}.{REFLECTION}.{adapter_name}"
        beside = self.weights[site.name][0].meta["val"]
        vectors = self._add(name, nn.Parameter(fresh.vectors, fresh.trainable), InputKind.PARAMETER, beside)
        if fresh.anchor is None:
            return Tensors(vectors, None)
        return Tensors(vectors, self._add(name + ANCHOR, fresh.anchor, InputKind.BUFFER, beside))

    @property
    def unchanging(self) -> dict[str, fx.Node]:
        """Name -> node of what no call writes to: parameters, constants, and the buffers of adapters."""
        from torch.export.graph_signature import InputKind

        steady = (InputKind.PARAMETER, InputKind.CONSTANT_TENSOR)
        return {
            spec.target: self._nodes[spec.arg.name]
            for spec in self.specs
            if spec.target is not None and (spec.kind in steady or is_of_adapter(spec.target))
        }

    def tensor(self, name: str) -> Tensor:
        """The parameter, buffer or constant of a name."""
        found: Tensor = self.state_dict[name] if name in self.state_dict else self.constants[name]
        return found

    def hold(self, name: str, tensor: Tensor, beside: fx.Node) -> fx.Node:
        """Give the program a buffer more, and the graph its node."""
        from torch.export.graph_signature import InputKind

        return self._add(name, tensor, InputKind.BUFFER, beside.meta["val"])

    def _add(self, target: str, tensor: Tensor, kind: InputKind, beside: Any) -> fx.Node:
        from torch.export.graph_signature import InputKind, InputSpec, TensorArgument

        is_buffer = kind is InputKind.BUFFER
        kinds = (InputKind.PARAMETER, InputKind.BUFFER) if is_buffer else (InputKind.PARAMETER,)
        last = max(place for place, spec in enumerate(self.specs) if spec.kind in kinds)
        prefix = "b" if is_buffer else "p"
        with self.graph.inserting_after(self._nodes[self.specs[last].arg.name]):
            node = self.graph.placeholder(f"{prefix}_{target}")
        node.target = node.name
        node.meta["val"] = beside.fake_mode.from_tensor(tensor, static_shapes=True)
        spec = InputSpec(kind, TensorArgument(name=node.name), target, persistent=True if is_buffer else None)
        self.specs.insert(last + 1, spec)
        self.state_dict[target], self._nodes[node.name] = tensor, node
        return node

    def discard(self, node: fx.Node) -> None:
        """Take a parameter or buffer out, unless something still reads it."""
        if node.users:
            return
        for spec in self.specs:
            if spec.arg.name == node.name and spec.target is not None:
                held = self.state_dict if spec.target in self.state_dict else self.constants
                del held[spec.target]
        self.specs = [spec for spec in self.specs if spec.arg.name != node.name]
        self.graph.erase_node(node)

    def replace(self, tensors: Mapping[str, Tensor]) -> None:
        """Put other weights in place, also where the same tensor has names that nothing reads."""
        for names in groups_of(self.parameters):
            fresh = {name: nn.Parameter(tensors[name]) for name in names if name in tensors}
            if len(fresh) == 1:
                fresh |= {name: new for new in fresh.values() for name in names if not self.weights[name][0].users}
            self.state_dict |= fresh

    def give_gradient(self, trainable: set[str]) -> None:
        """Freeze all parameters that were there before but these; as new objects, so that the given program's stay."""
        for names in groups_of(self.parameters):
            tensor, wanted = self.state_dict[names[0]], not trainable.isdisjoint(names)
            if tensor.requires_grad != wanted:
                alias = nn.Parameter(tensor.detach(), requires_grad=wanted)
                self.state_dict |= dict.fromkeys(names, alias)

    def finish(self, program: ExportedProgram) -> ExportedProgram:
        """The draft as a program, verified."""
        from torch.export import ExportedProgram

        signature: ExportGraphSignature = dataclasses.replace(program.graph_signature, input_specs=self.specs)
        self.graph_module.recompile()
        return ExportedProgram(
            root=self.graph_module,
            graph=self.graph,
            graph_signature=signature,
            state_dict=self.state_dict,
            range_constraints=copy.deepcopy(program.range_constraints),
            module_call_graph=[_copied(entry) for entry in program.module_call_graph],
            example_inputs=program.example_inputs,
            constants=self.constants,
            verifiers=program.verifiers,
        )


def _copied(entry: ModuleCallEntry) -> ModuleCallEntry:
    """An entry whose names of nodes can change; the structure of arguments is shared, which torch warns of copying."""
    signature = entry.signature
    if signature is None:
        return dataclasses.replace(entry)
    inputs, outputs = copy.deepcopy(signature.inputs), copy.deepcopy(signature.outputs)
    return dataclasses.replace(entry, signature=dataclasses.replace(signature, inputs=inputs, outputs=outputs))
