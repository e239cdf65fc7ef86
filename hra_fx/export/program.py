r"""The operator `hra_fx::rotate`, a node that rotates a weight (`W -> W Q`), and edits of programs that contain it.

    rotate(Tensor weight, Tensor vectors, Tensor? anchor, bool apply_GS, bool columns) -> Tensor

`weight` is `(out, d)`, a convolution's `(out, c / groups, ...)`, or `(d, out)` if `columns` (transformers' `Conv1D`);
`vectors` is `U: (d, r)`, `anchor` is `A: (d, k)`. Tracers do not see inside the operator: it stays one node in
`run_decompositions`, saving, loading and `torch.compile`, so `fold` can find it. Saved programs contain its argument
names, so these must not change.

The backward pass evaluates the formula again and differentiates it, so second derivatives exist.

    y = linear(x, w)        becomes        h = hra_fx.rotate(w, u, a, apply_GS, columns);  y = linear(x, h)
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from hra_fx.export.match import GraphLayer, group_tied
from hra_fx.functional import householder
from hra_fx.functional.chain import plain_chain
from hra_fx.functional.rotate import rotate_weight
from hra_fx.layers.target import REFLECTION

if TYPE_CHECKING:
    from torch.export import ExportedProgram
    from torch.export.graph_signature import ExportGraphSignature, InputSpec

# torch does not have types for its libraries.
_LIBRARY: Any = torch.library.Library("hra_fx", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(
    "rotate(Tensor weight, Tensor vectors, Tensor? anchor, bool apply_GS, bool columns) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)

#: The operator overload that graph nodes have as their target.
ROTATE = torch.ops.hra_fx.rotate.default


def rotated_weight(
    weight: Tensor,
    vectors: Tensor,
    anchor: Tensor | None,
    apply_GS: bool,
    columns: bool,
    *,
    exportable_ops: bool = False,
) -> Tensor:
    """The result of the operator, optionally with core ATen operators only."""
    chain = vectors.to(householder.working_dtype(torch.promote_types(weight.dtype, vectors.dtype)))
    if apply_GS and exportable_ops:
        chain, apply_GS = householder.basis_of_products(chain), False
    chain = plain_chain(chain, anchor, apply_GS=apply_GS)
    return rotate_weight(weight, chain, transposed=columns, exportable_ops=exportable_ops)


def _rotate(weight: Tensor, *rest: Any) -> Tensor:
    with _no_autocast(weight):
        return rotated_weight(weight, *rest)


def _fake(weight: Tensor, vectors: Tensor, anchor: Tensor | None, apply_GS: bool, columns: bool) -> Tensor:
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.apply_GS, ctx.columns = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight, vectors, anchor = ctx.saved_tensors
    again = torch.is_grad_enabled()  # create_graph=True
    with torch.enable_grad():
        inputs = weight.view_as(weight), vectors.view_as(vectors)
        rotated = _rotate(*inputs, anchor, ctx.apply_GS, ctx.columns)
    wanted = [tensor for tensor, needed in zip(inputs, ctx.needs_input_grad, strict=False) if needed]
    found = iter(torch.autograd.grad(rotated, wanted, grad, create_graph=again))
    return *(next(found) if needed else None for needed in ctx.needs_input_grad[:2]), None, None, None


def _no_autocast(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Disable autocast in any case, because torch does not report in a kernel whether it is on."""
    device = tensor.device.type
    return contextlib.nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


_LIBRARY.impl("rotate", _rotate, "CompositeExplicitAutograd")
torch.library.register_fake("hra_fx::rotate", _fake, lib=_LIBRARY)
torch.library.register_autograd("hra_fx::rotate", _backward, setup_context=_setup_context, lib=_LIBRARY)


def insert_rotation(
    graph: fx.Graph, layer: GraphLayer, weight: fx.Node, vectors: fx.Node, anchor: fx.Node | None, *, apply_GS: bool
) -> None:
    """Rotate the weight of a layer for all its uses, with one node before the first use."""
    users = {use.first_user for use in layer.uses}
    first = next(node for node in graph.nodes if node in users)
    consumer = next(use.consumer for use in layer.uses if use.first_user is first)
    with graph.inserting_before(first):
        arguments = (weight, vectors, anchor, apply_GS, layer.transposed)
        rotated = graph.create_node("call_function", ROTATE, arguments, {}, name=f"{weight.name}_rotated")
    rotated.meta = {key: consumer.meta[key] for key in ("nn_module_stack", "stack_trace") if key in consumer.meta}
    values = [argument.meta["val"] if isinstance(argument, fx.Node) else argument for argument in arguments]
    with torch.no_grad():
        rotated.meta["val"] = ROTATE(*values)
    for use in layer.uses:
        use.first_user.replace_input_with(use.weight, rotated)


def find_rotate_nodes(graph: fx.Graph) -> list[fx.Node]:
    """The nodes of `hra_fx::rotate`, in the order of the graph."""
    return list(graph.find_nodes(op="call_function", target=ROTATE))


def remove_rotation(graph: fx.Graph, rotated: fx.Node) -> list[fx.Node]:
    """Replace a rotated weight with the base weight. Returns the nodes of its vectors, which may now be unused."""
    weight, *adapter = rotated.args[:3]
    assert isinstance(weight, fx.Node)
    rotated.replace_all_uses_with(weight)
    graph.erase_node(rotated)
    return [node for node in adapter if isinstance(node, fx.Node)]


# --- programs ---------------------------------------------------------------------------------------------------------


def is_adapter_tensor(name: str) -> bool:
    """Whether a tensor of a graph belongs to an adapter, by its name."""
    return REFLECTION in name.split(".")[:-1]


class ProgramEditor:
    """A copy of a program's graph, input specifications and state that can be modified. Tensors are shared.

    Parameters are replaced with new objects and never written to.

    Attributes:
        state: name -> parameter or buffer.
        names: name of a node -> name of its tensor.
        weights: name of a parameter -> the nodes that read it.
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
        self.names = {spec.arg.name: spec.target for spec in self._specs if spec.target in self.state}
        self.weights = {
            target: [self._nodes[name]]
            for name, target in self.names.items()
            if isinstance(self.state[target], nn.Parameter)
        }

    @property
    def parameters(self) -> dict[str, Tensor]:
        """Name -> parameter, without added parameters."""
        return {name: tensor for name, tensor in self.state.items() if name in self.weights}

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

    def add(self, name: str, tensor: Tensor, like: fx.Node) -> fx.Node:
        """Add a tensor as a parameter or a buffer, and return its node. `like` is a node of another tensor."""
        from torch.export.graph_signature import InputKind, InputSpec, TensorArgument

        is_buffer = not isinstance(tensor, nn.Parameter)
        kinds = (InputKind.PARAMETER, InputKind.BUFFER) if is_buffer else (InputKind.PARAMETER,)
        last = max(index for index, spec in enumerate(self._specs) if spec.kind in kinds)
        with self.graph.inserting_after(self._nodes[self._specs[last].arg.name]):
            node = self.graph.placeholder(f"{'b' if is_buffer else 'p'}_{name}")
        node.target = node.name
        node.meta["val"] = like.meta["val"].fake_mode.from_tensor(tensor, static_shapes=True)
        persistent = True if is_buffer else None
        spec = InputSpec(kinds[-1], TensorArgument(name=node.name), name, persistent=persistent)
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
        for spec in self._specs:
            parameter, node = self.state.get(spec.target or ""), self._nodes[spec.arg.name]
            if isinstance(parameter, nn.Parameter) and node.meta["val"].requires_grad != parameter.requires_grad:
                # torch reads here which tensors a joint graph with a backward pass trains. Other programs have it too.
                node.meta["val"] = node.meta["val"].detach().requires_grad_(parameter.requires_grad)
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


def replace_weights(editor: ProgramEditor, tensors: Mapping[str, Tensor]) -> None:
    """Replace weights, including their tied names that no node reads."""
    for names in group_tied(editor.parameters):
        new = {name: nn.Parameter(tensors[name]) for name in names if name in tensors}
        if len(new) == 1:
            unread = [name for name in names if not any(node.users for node in editor.weights.get(name, ()))]
            new |= {name: weight for weight in new.values() for name in unread}
        for name, weight in new.items():
            editor.state[name] = weight


def set_trainable(editor: ProgramEditor, trainable: set[str]) -> None:
    """Set which of the original parameters require gradients. Changed ones are new objects that share the memory."""
    parameters = editor.parameters
    for names in group_tied(parameters):
        tensor, wanted = parameters[names[0]], not trainable.isdisjoint(names)
        if tensor.requires_grad != wanted:
            alias = nn.Parameter(tensor.detach(), requires_grad=wanted)
            for name in names:
                editor.state[name] = alias
