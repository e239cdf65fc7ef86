"""`lift`: convert an exported program to a GraphModule that calls layers, using only its names and operators.

    y = aten.linear(x, encoder.0.weight, encoder.0.bias)        becomes        y = encoder.0(x)

Operators that use a weight in another form still read it, by its name in the layer that contains the operator.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, fx, nn

from hra_fx.compat import non_persistent_buffers, require
from hra_fx.errors import AdapterError, CaptureError, UnsupportedLayerError
from hra_fx.export.layer_calls import GraphLayer, LayerCall, arguments_of, find_layers, group_tied, module_classes, uses
from hra_fx.export.program import is_adapter_tensor, is_program
from hra_fx.layers.target import LayerKind
from hra_fx.selection.origin import keep_origin, origin_of_program
from hra_fx.tracing.canonical import CHECKS, call_nested, captured_module, name_constants, open_program, simplify
from hra_fx.tracing.compare import compare_call
from hra_fx.tracing.graph_module import module_path, replace_node
from hra_fx.tracing.inputs import InputChecks

if TYPE_CHECKING:
    from torch.export import ExportedProgram

_aten = torch.ops.aten
_CONVOLUTIONS: dict[str, type[nn.Conv1d | nn.Conv2d | nn.Conv3d]] = {
    "conv1d": nn.Conv1d,
    "conv2d": nn.Conv2d,
    "conv3d": nn.Conv3d,
}
_TRANSFORM = "Transform the model before you export it"


def lift(program: ExportedProgram) -> fx.GraphModule:
    """Convert an exported program to a `GraphModule` that calls layers and supports all functions for adapters.

    The code of the model is not needed: the program may come from `torch.export.load`. A linear operator or a
    convolution that reads `<path>.weight` becomes the call of an `nn.Linear`, of transformers' `Conv1D`, or of an
    `nn.Conv1d` to `nn.Conv3d` at `<path>`. All other operators do not change. This includes attention's joint
    `in_proj_weight`, and operators that use a weight in another form or in a block with a separate graph. Their layers
    cannot be adapted, and `target_modules="all-linear"` does not select them.

    The module takes the same arguments as the program, and raises an error for inputs that the program does not
    support. It computes the same as the program, in the mode that the model had when it was exported: `train()` and
    `eval()` do not change dropout or batch norm. The `state_dict` has the names of the program.

    Parameters and buffers share memory with the program, and with the exported model if it still exists. So after
    training, `hra_fx.fold(module)` also writes the new weights into the program. But if it replaces a tensor, the
    program keeps the old one: fold gives tied weights their own memory (with a warning), and copies trained by `bias`
    and `modules_to_save` replace the originals. To get a program with these tensors, export the folded module again:
    `torch.export.export(module, args)`.

    Args:
        program: a program of `torch.export`. It is not changed. After `run_decompositions`, only those layers are found
            that are decomposed into a single product.

    Returns:
        A new module, to pass to `transform` or `load_adapter`.

    Raises:
        AdapterError: `program` is not an `ExportedProgram`; it has adapters; it does not have an operator that a layer
            can replace; or it has inputs or outputs of types that a graph does not support.
        UnsupportedLayerError: the program contains a backward pass.

    Example:
        >>> import torch, hra_fx
        >>> program = torch.export.export(nn.Sequential(nn.Linear(3, 2)), (torch.ones(1, 3),))
        >>> module = hra_fx.transform(lift(program), hra_fx.HRAConfig(r=2, target_modules=["0"]))
        >>> list(module.state_dict())
        ['0.weight', '0.bias', '0.hra_u.default']
        >>> folded = hra_fx.fold(module)
        >>> torch.equal(folded(torch.ones(1, 3)), program.module()(torch.ones(1, 3)))
        True
    """
    _check(program)
    try:
        lifted = _lifted(program)
        if program.example_inputs is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # torch's own, when such a module is copied
                compare_call(program.module(check_guards=False), lifted, program.example_inputs, None)
        return lifted
    except CaptureError as error:
        raise AdapterError(f"the program cannot be lifted: {error.reason}. {_TRANSFORM}.") from error


def _lifted(program: ExportedProgram) -> fx.GraphModule:
    module, inputs, conditions = open_program(program)
    graph = module.graph
    root = _with_tensors_of(program)
    parameters: dict[str, Tensor] = dict(root.named_parameters(remove_duplicate=False))
    called = _call_layers(graph, root, find_layers(graph, parameters), parameters)
    if not called:
        raise AdapterError(_why_no_layer(graph, parameters))
    origin = origin_of_program(module_classes(graph), called)
    constants = name_constants(graph, program, module)
    simplify(graph, inputs, root)
    parts = {CHECKS: InputChecks(conditions, conditions), **call_nested(graph, constants)}
    lifted = captured_module(root, parts, graph)
    type(lifted).__name__ = origin.class_name
    keep_origin(lifted, origin)
    return lifted


def _check(program: Any) -> None:
    if not is_program(program):
        raise AdapterError(
            f"lift: expected an ExportedProgram, got {type(program).__name__}. Call torch.export.export(model, args) "
            "or torch.export.load(file) first. hra_fx.transform takes models and GraphModules as they are."
        )
    require("a program of torch.export")
    if program.graph_signature.backward_signature is not None:
        raise UnsupportedLayerError(
            "the program contains a backward pass, which would not compute gradients of the reflections. Lift it "
            "before adding the backward pass."
        )
    if adapter := next(filter(is_adapter_tensor, program.state_dict), None):
        raise AdapterError(
            f"the program already has the adapter {adapter}. Export the folded model (hra_fx.fold), or lift the "
            "program of the base model and load the adapter with hra_fx.load_adapter."
        )


def _with_tensors_of(program: ExportedProgram) -> nn.Module:
    """Create a module with the tensors of a program, in submodules without any other contents.

    Parameters are new objects that share the memory, so that the flags of the program do not change. Names that were
    tied when the program was saved share one parameter again.
    """
    non_persistent = program.graph_signature.non_persistent_buffers
    state: dict[str, Tensor] = program.state_dict | {name: program.constants[name] for name in non_persistent}
    for names in group_tied({name: tensor for name, tensor in state.items() if isinstance(tensor, nn.Parameter)}):
        tensor = state[names[0]]
        own = nn.Parameter(tensor.detach(), requires_grad=tensor.requires_grad)
        state |= dict.fromkeys(names, own)
    root = nn.Module()
    for path in _module_paths(state):
        root.set_submodule(path, nn.Module())
    for name, tensor in state.items():
        path, _, last = name.rpartition(".")
        owner = root.get_submodule(path)
        if isinstance(tensor, nn.Parameter):
            owner.register_parameter(last, tensor)
        else:
            owner.register_buffer(last, tensor, persistent=name not in non_persistent)
    return root


def _module_paths(names: Iterable[str]) -> list[str]:
    """The paths of all modules in the names except the root, parents first."""
    parts = [name.split(".")[:-1] for name in names]
    paths = dict.fromkeys(".".join(part[: length + 1]) for part in parts for length in range(len(part)))
    return list(paths)


def _why_no_layer(graph: fx.Graph, parameters: Mapping[str, Tensor]) -> str:
    reads = (node for node in graph.find_nodes(op="get_attr") if str(node.target).endswith(".weight"))
    found = (use for node in reads if node.target in parameters for use in uses(node, parameters[node.target].dim()))
    other = [f"; {use.name} is used by {use.operator.target}" for use in found if parameters[use.name].dim() > 1]
    return (
        "the program has no operator that can be the call of a linear layer or convolution, with a parameter named "
        f"'<layer>.weight'{next(iter(other), '')}. If the program was decomposed (run_decompositions), lift it before "
        f"that. {_TRANSFORM}."
    )


# --- layers -----------------------------------------------------------------------------------------------------------


def _call_layers(
    graph: fx.Graph, root: nn.Module, layers: Iterable[GraphLayer], parameters: Mapping[str, Tensor]
) -> list[str]:
    """Add layers to a module and call them in its graph, in place. Returns the paths of the layers."""
    called = {layer: replaced for layer in layers if (replaced := _replaced(layer, root, parameters))}
    for layer, calls in called.items():
        first = calls[0][1]
        holder = root.get_submodule(layer.path)
        made = _filled(_make_layer(first.kind, parameters[layer.name], **first.settings), holder)
        for path in (layer.path, *layer.aliases):
            root.set_submodule(path, made)
        for node, call in calls:
            if (call.kind, call.settings) == (first.kind, first.settings):
                replace_node(node, "call_module", layer.path, (arguments_of(node)[call.x],))
    for layer in called:
        _read_by_own_names(graph, layer)
    _call_embeddings(graph, root)
    return [layer.path for layer in called]


def _replaced(layer: GraphLayer, root: nn.Module, parameters: Mapping[str, Tensor]) -> list[tuple[fx.Node, LayerCall]]:
    """The operators that the layer replaces. Their bias must have the layer's name or be missing."""
    bias = root.get_submodule(layer.path)._parameters.get("bias")
    calls = [(use.operator, use.call) for use in layer.calls if use.call]
    return [(node, call) for node, call in calls if _tensor(call.bias, parameters) is bias]


def _make_layer(kind: LayerKind | Literal["Conv1D"], weight: Tensor, **settings: Any) -> nn.Module:
    """Create a layer without bias on the meta device, for a weight of its kind."""
    out, width = weight.shape[:2]
    if kind == "Conv1D":
        from transformers.pytorch_utils import Conv1D

        with torch.device("meta"):
            made: nn.Module = Conv1D(width, out)  # type: ignore[no-untyped-call]
        return made
    if kind in _CONVOLUTIONS:
        size, channels = tuple(weight.shape[2:]), width * settings["groups"]
        return _CONVOLUTIONS[kind](channels, out, size, bias=False, device="meta", **settings)  # type: ignore[arg-type]
    return nn.Linear(width, out, bias=False, device="meta")


def _tensor(node: Any, parameters: Mapping[str, Tensor]) -> Any:
    """The parameter that a node reads; `None` without a node; the node itself if it does not read a parameter."""
    return parameters.get(str(node.target), node) if isinstance(node, fx.Node) else node


def _filled(layer: nn.Module, holder: nn.Module) -> nn.Module:
    for held in ("_parameters", "_buffers", "_modules"):
        vars(layer)[held].update(vars(holder)[held])
    for name in non_persistent_buffers(holder):
        layer.register_buffer(name, layer._buffers[name], persistent=False)
    return layer


def _read_by_own_names(graph: fx.Graph, layer: GraphLayer) -> None:
    """Read the weight by its name in the layer of each use."""
    for use, name in (*((use, layer.name) for use in layer.uses), *layer.others):
        if use.weight.target == name or use.weight not in use.user.all_input_nodes:
            continue
        with graph.inserting_before(use.user):
            read = graph.get_attr(name)
        read.meta = dict(use.weight.meta)
        use.user.replace_input_with(use.weight, read)


def _call_embeddings(graph: fx.Graph, root: nn.Module) -> None:
    """Call embeddings too: fx unpickles a read of a tied weight by its first name, which may be a rotated weight."""
    for node in graph.find_nodes(op="call_function", target=_aten.embedding.default):
        given, path = arguments_of(node), module_path(node) or ""
        if given["weight"].op != "get_attr" or given["weight"].target != f"{path}.weight":
            continue
        holder = root.get_submodule(path)
        if "weight" not in holder._parameters or type(holder) not in (nn.Module, nn.Embedding):
            continue  # a buffer, or a layer whose weight is also used as a table
        if not isinstance(holder, nn.Embedding):
            padding = None if given["padding_idx"] == -1 else given["padding_idx"]
            options: Any = {name: given[name] for name in ("scale_grad_by_freq", "sparse")} | {"padding_idx": padding}
            rows, width = holder._parameters["weight"].shape  # type: ignore[union-attr]
            root.set_submodule(path, _filled(nn.Embedding(rows, width, **options, device="meta"), holder))
        replace_node(node, "call_module", path, (given["indices"],))
