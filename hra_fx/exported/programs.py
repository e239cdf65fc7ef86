"""`transform` and `fold` of a `torch.export.ExportedProgram`: a new program each time, the given one stays as it is.

program = hra_fx.transform(torch.export.export(model, args), config)
module = program.module()                 # shares its parameters with the program: train it as ever
program = hra_fx.fold(program)            # the captured graph again, with what was trained in the weights
"""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx, nn

from hra_fx.config import HRAConfig
from hra_fx.errors import UnsupportedLayerError
from hra_fx.exported.choosing import Start, choose, is_done, note_of, start, with_note, without_note
from hra_fx.exported.folding import folded_weights
from hra_fx.exported.inserting import Tensors, insert, remove, rotations, separate
from hra_fx.exported.matching import GraphSite, groups_of
from hra_fx.reflection import ANCHOR, check_adapter_name
from hra_fx.site import REFLECTION

if TYPE_CHECKING:
    from torch.export import ExportedProgram, ModuleCallEntry
    from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec


def is_program(value: object) -> bool:
    """Whether a value is a `torch.export.ExportedProgram`; does not import torch.export.

    Example:
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
    draft = _Draft(program)
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
        >>> program = torch.export.export(nn.Sequential(nn.Linear(3, 2)), (torch.randn(1, 3),))
        >>> folded = fold_program(transform_program(program, HRAConfig(r=2, target_modules=["0"])))
        >>> [node.name for node in folded.graph.nodes] == [node.name for node in program.graph.nodes]
        True
    """
    draft = _Draft(program)
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


class _Draft:
    """A copy of a program to be changed: its graph, input specifications and state; tensors are shared.

    Attributes:
        graph_module: the copied graph.
        specs: the input specifications, in the order of the placeholders.
        state_dict: name -> tensor.
        names: name of a placeholder -> name of its parameter or buffer.
        weights: name of a parameter -> its one placeholder.
    """

    def __init__(self, program: ExportedProgram) -> None:
        self.graph_module = fx.GraphModule(program.graph_module, copy.deepcopy(program.graph))
        # torch.export.unflatten keeps what it made there, which is of the given program only.
        self.graph_module.meta = {
            key: value for key, value in program.graph_module.meta.items() if key != "unflattened_module"
        }
        for node, copied in zip(program.graph.nodes, self.graph.nodes, strict=True):
            copied.name = node.name  # the copy avoids names of Python's own, such as "input"
        self.specs: list[InputSpec] = list(program.graph_signature.input_specs)
        self.state_dict: dict[str, Tensor] = dict(program.state_dict)
        self._nodes = {node.name: node for node in self.graph.find_nodes(op="placeholder")}
        self.names = {spec.arg.name: spec.target for spec in self.specs if spec.target in self.state_dict}
        self.weights = {
            target: [self._nodes[name]]
            for name, target in self.names.items()
            if isinstance(self.state_dict[target], nn.Parameter)
        }

    @property
    def graph(self) -> fx.Graph:
        return self.graph_module.graph

    @property
    def parameters(self) -> dict[str, Tensor]:
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
        del self.state_dict[self.names[node.name]]
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
            constants=program.constants,
            verifiers=program.verifiers,
        )


def _copied(entry: ModuleCallEntry) -> ModuleCallEntry:
    """An entry whose names of nodes can change; the structure of arguments is shared, which torch warns of copying."""
    signature = entry.signature
    if signature is None:
        return dataclasses.replace(entry)
    inputs, outputs = copy.deepcopy(signature.inputs), copy.deepcopy(signature.outputs)
    return dataclasses.replace(entry, signature=dataclasses.replace(signature, inputs=inputs, outputs=outputs))
