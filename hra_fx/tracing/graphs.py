"""Create graphs of a whole model or of its parts, with torch.fx, or with torch.export from an example call."""

from __future__ import annotations

import copy
import inspect
import keyword
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

from torch import fx, nn

from hra_fx.compat import has_own_hooks
from hra_fx.errors import AdapterError, CaptureError
from hra_fx.layers.adapted_layer import AdaptedLayer
from hra_fx.layers.target import find_kind
from hra_fx.model.example_inputs import Call, example_call, guessed_call, normalize_inputs, preserve_rng_state
from hra_fx.model.graph_module import insert
from hra_fx.model.state import adapted_layers, base_model_view
from hra_fx.tracing.by_mode import ModesDifferError, merge_modes
from hra_fx.tracing.capture_layers import capture_in_eval, capture_layers
from hra_fx.tracing.compare import ExampleError, compare, compare_call, with_shared_tensors
from hra_fx.tracing.exported import LOCK
from hra_fx.tracing.graph_module import graph_module
from hra_fx.tracing.observed import attribute_changes, attributes, random_states
from hra_fx.tracing.tracer import ModelTracer


def is_graph_of_call(model: nn.Module, graph: fx.Graph, call: Call) -> bool:
    """Whether a graph of torch.fx takes exactly the arguments of a call. Others have their defaults in the graph."""
    args, kwargs = call
    names = [str(node.target) for node in graph.find_nodes(op="placeholder")]
    try:
        given = inspect.signature(type(model).forward).bind(model, *args, **kwargs).arguments
    except TypeError:
        return False
    return list(given)[1:] == names


def trace_model(
    model: nn.Module, layers: Collection[nn.Module], example_inputs: Any = None, dynamic_shapes: Any = None
) -> fx.GraphModule:
    """Trace a model into a GraphModule that shares its modules and parameters, for train and eval mode."""
    call = None if example_inputs is None else normalize_inputs(example_inputs)
    reason = ""
    if dynamic_shapes is None:
        try:
            if has_own_hooks(model):
                raise CaptureError("it has forward hooks, which torch.fx does not run")
            graph, modules = trace(model, layers)
            if call is None or is_graph_of_call(model, graph, call):
                made = graph_module(model, graph, modules)
                if example := call or guessed_call(model):  # without an example, nothing can be compared
                    compare(model, made, example)
                return made
        except CaptureError as error:
            if call and isinstance(error, ExampleError):
                raise _refusal(model, error) from error
            reason = f"torch.fx cannot trace {type(model).__name__}: {error.reason}. "
    call = call or example_call(model)
    if call is None:
        raise AdapterError(
            f"{reason}Pass example_inputs, the arguments of one call, so that torch.export can capture it, or leave "
            "out trace=True."
        )
    try:
        return capture_layers(model, call, dynamic_shapes)
    except CaptureError as error:
        raise _refusal(model, error, "Leave out trace=True: the adapted layers work without a graph.") from error


def _refusal(model: nn.Module, error: CaptureError, advice: str = "") -> AdapterError:
    name = type(model).__name__
    if isinstance(error, ExampleError):
        return AdapterError(f"{name}: {error.reason}. Pass `example_inputs` that the model runs on.")
    return AdapterError(f"torch.export cannot capture {name}: {error.reason}. {advice}")


def graphs_of(model: nn.Module, example_inputs: Any = None, *, is_drawn: bool = False) -> dict[str, fx.GraphModule]:
    """Trace a model, adapted or not, or the largest parts of it that torch.fx can trace, with the reflections.

    With example inputs, the result is the graph of this call, captured with `torch.export` if necessary. If it is only
    drawn, it is valid for this call in eval mode. For a `GraphModule`, the result is a copy of its graph.
    """
    if isinstance(model, fx.GraphModule):  # its own graph has the reflections
        return {"": graph_module(model, copy.deepcopy(model.graph), {})}
    adapted = adapted_layers(model)
    layers = adapted or {path: part for path, part in model.named_modules() if find_kind(part)}
    if example_inputs is not None:
        return {"": _graph_of_call(model, layers.values(), normalize_inputs(example_inputs), is_drawn=is_drawn)}
    with base_model_view(model):
        parts = dict(_parts("", model, set(layers.values())))
    found = {path: graph_module(model.get_submodule(path), *traced) for path, traced in parts.items()}
    for module in found.values():
        insert(module)
    inside = {part for path in parts for part in model.get_submodule(path).modules()}
    found |= {path: _alone(path, layer) for path, layer in adapted.items() if layer not in inside}
    return dict(sorted(found.items()))


def _graph_of_call(model: nn.Module, layers: Collection[nn.Module], call: Call, *, is_drawn: bool) -> fx.GraphModule:
    run_both = compare_call if is_drawn else partial(compare, with_gradients=False)
    with suppress(CaptureError):
        graph, modules = _trace_part("", model, layers)
        if is_graph_of_call(model, graph, call):
            made = graph_module(model, graph, modules)
            insert(made)
            with suppress(ExampleError):  # a drawing warns of it
                run_both(model, made, call)
            return made
    try:
        with base_model_view(model):
            made = capture_in_eval(model, call) if is_drawn else capture_layers(model, call, is_trained=False)
    except CaptureError as error:
        advice = "hra_fx.graphs and hra_fx.visualize use torch.fx, and show the parts that it can trace."
        raise _refusal(model, error, f"Without example_inputs, {advice}") from error
    insert(made)
    return made


def _alone(path: str, layer: AdaptedLayer) -> fx.GraphModule:
    """Create a graph of a single call, or of the weight that other modules read. The root has the layer as a child."""
    name = path.rpartition(".")[2]
    name = "layer" if keyword.iskeyword(name) else name
    root = nn.Module()
    root.add_module(name, layer)
    graph = fx.Graph()
    if layer.hra_u.reflects_input:
        use = graph.call_module(name, (graph.placeholder("input"),))
    else:
        use = graph.get_attr(f"{name}.{layer.hra_u.weight_name}")
    graph.output(use)
    module = graph_module(root, graph, {})
    insert(module)
    module.train(layer.training)
    return module


# --- torch.fx ---------------------------------------------------------------------------------------------------------


def trace(module: nn.Module, layers: Collection[nn.Module]) -> tuple[fx.Graph, Mapping[str, nn.Module]]:
    """Trace a module in both modes. Returns the graph, and modules that the graph calls but the module does not have.

    A submodule that cannot be traced and does not contain adapted layers stays one call. The module is not changed.
    """
    with LOCK, preserve_rng_state():
        return _Trace(module, layers).run()


class _Trace:
    """Traces one module repeatedly. After each failure, one more submodule becomes a call, until none is left."""

    def __init__(self, module: nn.Module, layers: Collection[nn.Module]) -> None:
        self._module = module
        self._keep = set(layers)
        self._paths = dict(module.named_modules())
        # Modules that must be inlined, because they contain adapted layers.
        self._open = {part for part in self._paths.values() if not self._keep.isdisjoint(part.modules())}
        self._stack: list[nn.Module] = []

    def run(self) -> tuple[fx.Graph, Mapping[str, nn.Module]]:
        """Trace until both modes succeed."""
        while True:
            try:
                in_train, in_eval = self._once(True), self._once(False)
                return in_train, merge_modes(in_train, in_eval)
            except ModesDifferError as error:
                self._keep_one_of(error)
            except Exception as error:
                if self._keep_innermost():
                    continue
                if isinstance(error, CaptureError):
                    raise
                line = str(error).strip().split("\n")[0]
                raise CaptureError(f"fx cannot trace it ({type(error).__name__}: {line[:160]})") from error

    def _once(self, training: bool) -> fx.Graph:
        # The forward may change the modules, so a copy is traced.
        copied = with_shared_tensors(self._module)
        own = dict(zip(copied.modules(), self._paths.values(), strict=True))
        for part in own:
            part.training = training
        tracer = ModelTracer({part for part, original in own.items() if original in self._keep})
        before, random = attributes(copied), random_states()
        self._stack = []
        try:
            graph = tracer.trace(copied)
        except BaseException:
            self._stack = [own[part] for part in tracer.innermost]
            raise
        compile(graph.python_code("self").src, "graph", "exec")  # a layer may have the name of a keyword
        if random_states() != random:
            raise CaptureError("it draws random numbers in Python or seeds a generator, which happens once in a trace")
        if changed := attribute_changes(before, copied):
            self._stack = [part for path, part in self._paths.items() if f".{changed[0]}".startswith(f".{path}.")]
            raise CaptureError(f"its forward changes {changed[0]}, which a graph drops")
        return graph

    def _keep_innermost(self) -> bool:
        """Turn the innermost module of the failed trace, and others of its class, into calls. False if not possible."""
        for part in reversed(self._stack):
            if part not in self._open and part not in self._keep:
                self._keep |= {other for other in self._paths.values() if type(other) is type(part)} - self._open
                return True
        return False

    def _keep_one_of(self, error: ModesDifferError) -> None:
        """Turn the innermost module of one of the nodes that differ into a call."""
        stacks = [_stack_of(node) for node in error.nodes]
        for stack in stacks:
            self._stack = [self._paths[path] for path in stack if path in self._paths]
            if self._keep_innermost():
                return
        where = next((path for path in reversed(stacks[0]) if path in stacks[1]), "") or type(self._module).__name__
        raise CaptureError(f"{where} runs different operations in train mode and in eval mode")


def _stack_of(node: fx.Node) -> list[str]:
    """The paths of the modules whose forward created a node, from the outermost to the innermost."""
    return [path for path, _ in node.meta.get("nn_module_stack", {}).values()]


def _parts(
    path: str, module: nn.Module, layers: Collection[nn.Module]
) -> Iterator[tuple[str, tuple[fx.Graph, Mapping[str, nn.Module]]]]:
    """Trace the largest modules that fx can trace, from a module down: path -> graph, and modules that it adds."""
    below = [part for part in module.modules() if part in layers]
    if not below or module in layers:
        return
    # A graph of a single layer is not useful, and a container is never called.
    if not path or (len(below) > 1 and type(module).forward is not nn.Module.forward):
        with suppress(CaptureError):
            yield path, _trace_part(path, module, below)
            return
    for name, child in module.named_children():
        yield from _parts(f"{path}.{name}".lstrip("."), child, layers)


def _trace_part(
    path: str, module: nn.Module, layers: Collection[nn.Module]
) -> tuple[fx.Graph, Mapping[str, nn.Module]]:
    if "forward" in vars(module):
        raise CaptureError("its forward is set on the instance")
    if isinstance(module, fx.GraphModule) and path:
        raise CaptureError("it is a GraphModule itself")
    # It is unknown whether the callers of a submodule pass its optional arguments.
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    optional = [parameter.name for parameter in parameters if parameter.default is not inspect.Parameter.empty]
    if path and optional:
        names = ", ".join(optional)
        raise CaptureError(f"forward has optional arguments ({names}), and it is unknown how it is called")
    return trace(module, layers)
