"""Edit a captured `fx.GraphModule` in place. Parameters are replaced by new objects, never written to."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, fx, nn

from hra_fx.export.insert import AdapterNodes
from hra_fx.export.match import GraphLayer, group_tied, parent_path
from hra_fx.export.program_edit import is_adapter_tensor
from hra_fx.export.select import InitialAdapter
from hra_fx.layers.adapters import ANCHOR
from hra_fx.layers.target import REFLECTION


class ModuleEditor:
    """The graph and the parameters of a captured module, whose submodules only hold tensors.

    Attributes:
        graph_module: the module.
        weights: name of a parameter -> the `get_attr` nodes that read it.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        """Edit `module`."""
        self.graph_module = module
        self._original = set(self._named_parameters())
        self.weights: dict[str, list[fx.Node]] = {}
        for node in weight_nodes(module):
            self.weights.setdefault(str(node.target), []).append(node)

    @property
    def parameters(self) -> dict[str, Tensor]:
        """Name -> parameter, without those that were added."""
        return {name: tensor for name, tensor in self._named_parameters().items() if name in self._original}

    @property
    def constant_nodes(self) -> dict[fx.Node, str]:
        """Node -> name of each tensor that no call writes to: parameters, and the buffers of adapters."""
        graph, parameters = self.graph_module.graph, self._named_parameters()
        buffers = dict(self.graph_module.named_buffers(remove_duplicate=False))
        constant = [*parameters, *filter(is_adapter_tensor, buffers)]
        read = {str(node.target) for node in graph.find_nodes(op="get_attr")}
        for name in filter(is_adapter_tensor, constant):
            if name not in read:  # an adapter that is not active
                self._read(name)
        return {node: str(node.target) for node in graph.find_nodes(op="get_attr") if node.target in constant}

    def tensor(self, name: str) -> Tensor:
        """The parameter or buffer of a name."""
        owner, last = self._locate(name)
        found: Tensor = getattr(owner, last)
        return found

    def has(self, name: str) -> bool:
        """Whether the module has a tensor of this name."""
        owner, last = self._locate(name)
        return hasattr(owner, last)

    def name_of(self, node: fx.Node) -> str:
        """The name of the tensor of a node."""
        return str(node.target)

    def weight_node(self, name: str) -> fx.Node:
        """The first node that reads a parameter; created if there is none (tied names, dead code elimination)."""
        if name not in self.weights:
            self.weights[name] = [self._read(name)]
        return self.weights[name][0]

    def add_adapter(self, layer: GraphLayer, initial: InitialAdapter, adapter_name: str) -> AdapterNodes:
        """Add the vectors of a layer as a parameter, and its anchor as a buffer."""
        owner = self.graph_module.get_submodule(layer.path)
        if REFLECTION not in owner._modules:
            owner.add_module(REFLECTION, nn.Module())
        container = owner.get_submodule(REFLECTION)
        container.register_parameter(adapter_name, nn.Parameter(initial.vectors, requires_grad=initial.trainable))
        name = f"{layer.path}.{REFLECTION}.{adapter_name}"
        if initial.anchor is None:
            return AdapterNodes(self._read(name), None)
        container.register_buffer(adapter_name + ANCHOR, initial.anchor)
        return AdapterNodes(self._read(name), self._read(name + ANCHOR))

    def add_buffer(self, name: str, tensor: Tensor, like: fx.Node) -> fx.Node:
        """Add a buffer; returns its node."""
        owner, last = self._locate(name)
        owner.register_buffer(last, tensor)
        return self._read(name)

    def remove_if_unused(self, node: fx.Node) -> None:
        """Remove the tensor of a node that has no users, and its container with the last one."""
        if node.users:
            return
        name = str(node.target)
        container, last = self._locate(name)
        self.graph_module.graph.erase_node(node)
        if last in container._parameters or last in container._buffers:
            delattr(container, last)
        if not [*container.parameters(), *container.buffers()]:
            self.graph_module.get_submodule(parent_path(parent_path(name)))._modules.pop(REFLECTION, None)

    def replace_weights(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace weights, and also tied names of them that no node reads."""
        read = {str(node.target) for node in weight_nodes(self.graph_module) if node.users}
        for names in group_tied(self.parameters):
            new = {name: nn.Parameter(tensors[name]) for name in names if name in tensors}
            if len(new) == 1:
                new |= {name: weight for weight in new.values() for name in names if name not in read}
            for name, weight in new.items():
                self._set(name, weight)

    def set_trainable(self, trainable: set[str]) -> None:
        """Set which of the original parameters require gradients. Changed ones are new objects on the same memory."""
        parameters = self.parameters
        for names in group_tied(parameters):
            tensor, wanted = parameters[names[0]], not trainable.isdisjoint(names)
            if tensor.requires_grad != wanted:
                alias = nn.Parameter(tensor.detach(), requires_grad=wanted)
                for name in names:
                    self._set(name, alias)

    def _named_parameters(self) -> dict[str, Tensor]:
        return dict(self.graph_module.named_parameters(remove_duplicate=False))

    def _locate(self, name: str) -> tuple[nn.Module, str]:
        path, _, last = name.rpartition(".")
        return self.graph_module.get_submodule(path), last

    def _set(self, name: str, parameter: nn.Parameter) -> None:
        owner, last = self._locate(name)
        owner._parameters[last] = parameter

    def _read(self, name: str) -> fx.Node:
        """A new node that reads a tensor, at the top of the graph."""
        with self.graph_module.graph.inserting_before(next(iter(self.graph_module.graph.nodes))):
            return self.graph_module.graph.get_attr(name)


def weight_nodes(module: fx.GraphModule) -> list[fx.Node]:
    """The nodes that read a parameter."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    return [node for node in module.graph.find_nodes(op="get_attr") if node.target in parameters]
