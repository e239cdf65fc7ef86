"""Trace a model, or the largest parts of it that torch.fx can trace, into graphs for train and eval mode."""

from __future__ import annotations

import ast
import keyword
import threading
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from inspect import Parameter, signature
from typing import Any, NamedTuple

from torch import fx, nn

from hra_fx.errors import CaptureError
from hra_fx.layers.class_swap import original_class
from hra_fx.model.state import adapted_layers, base_model_view
from hra_fx.tracing.by_mode import ModesDifferError, merge_modes
from hra_fx.tracing.forward_state import Snapshot
from hra_fx.tracing.tracer import ModelTracer

#: fx and torch.export patch classes for the whole process while they trace.
LOCK = threading.RLock()


class Traced(NamedTuple):
    """The graph of a module.

    Attributes:
        graph: valid in train and in eval mode.
        modules: name -> module, for modules that the graph calls but the traced module does not have.
    """

    graph: fx.Graph
    modules: Mapping[str, nn.Module]


def trace(module: nn.Module, layers: Collection[nn.Module]) -> Traced:
    """Trace a module in both modes. The module is not changed.

    A submodule that cannot be traced and does not contain adapted layers stays one call.

    Args:
        module: the module.
        layers: layers that must stay calls, such as those to be adapted.

    Raises:
        CaptureError: fx cannot trace the module, or the graph would not compute the same as the forward.
    """
    with LOCK:
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
        self._other_mode = {path for path, part in self._paths.items() if part.training != module.training}

    def run(self) -> Traced:
        """Trace until both modes succeed."""
        while True:
            try:
                in_train, in_eval = self._once(True), self._once(False)
                return Traced(in_train, merge_modes(in_train, in_eval, self._may_differ))
            except ModesDifferError as error:
                self._keep_one_of(error)
            except Exception as error:
                if not self._keep_innermost():
                    raise _as_capture_error(error) from error

    def _once(self, training: bool) -> fx.Graph:
        snapshot = Snapshot(self._module)
        tracer = ModelTracer(self._keep, training)
        self._stack = []
        with ExitStack() as restore:
            restore.callback(snapshot.restore)
            for part in self._paths.values():
                part.__dict__["training"] = training
            try:
                graph = tracer.trace(self._module)
            except BaseException:
                self._stack = [part for _, part in tracer.innermost]
                raise
            targets = (str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr"))
            if unwritable := next((name for name in targets if not _can_be_written(name)), None):
                raise CaptureError(f"the code of a graph cannot contain the name {unwritable!r}")
            if tracer.has_drawn:
                raise CaptureError(
                    "it draws random numbers in Python or seeds a generator, which happens once in a trace"
                )
            if changes := snapshot.changes():
                self._stack = [self._paths[path] for path, _ in changes]
                names = ", ".join(f"{path}.{name}".lstrip(".") for path, name in changes[:3])
                raise CaptureError(f"its forward changes {names}, which a graph drops")
        return graph

    def _may_differ(self, node: fx.Node) -> bool:
        """Whether a node may have one constant in train mode and another in eval mode.

        If not, its module becomes a call and has its own mode, such as a batch norm that is frozen in eval mode.
        """
        stack = _stack_of(node)
        return self._other_mode.isdisjoint(stack) and (not stack or self._paths[stack[-1]] in self._open)

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
        if odd := [path for path in stacks[0] if path in self._other_mode]:
            raise CaptureError(f"{odd[0]} is in another mode than the model. Call train() or eval() on the whole model")
        raise CaptureError(f"{where} runs different operations in train mode and in eval mode")


def _can_be_written(name: str) -> bool:
    """Whether fx can write a name into the generated code of a graph, in quotation marks."""
    try:
        is_same: bool = ast.literal_eval(f'"{name}"') == name
    except (SyntaxError, ValueError):
        return False
    return is_same and not any(map(keyword.iskeyword, name.split(".")))


def _stack_of(node: fx.Node) -> list[str]:
    """The paths of the modules whose forward created a node, from the outermost to the innermost."""
    return [path for path, _ in node.meta.get("nn_module_stack", {}).values()]


def _as_capture_error(error: Exception) -> CaptureError:
    if isinstance(error, CaptureError):
        return error
    line = str(error).strip().split("\n")[0]
    return CaptureError(f"fx cannot trace it ({type(error).__name__}: {line[:160]})")


@dataclass
class Captured:
    """The graphs that fx traced of a model.

    Attributes:
        parts: path of a module -> its graph. The only key is `""` if the whole model is traced.
        layers: path of a layer -> (path of the module whose graph contains it, or `None`; the reason why no larger
            graph contains it, `""` if it is in the graph of the whole model).
    """

    parts: dict[str, Traced] = field(default_factory=dict)
    layers: dict[str, tuple[str | None, str]] = field(default_factory=dict)


def capture(model: nn.Module, layers: Mapping[str, nn.Module]) -> Captured:
    """Trace the whole model, or the largest parts of it that fx can trace.

    Args:
        model: the model; it is not changed.
        layers: path -> layer that must stay a call.
    """
    search = _Search(layers)
    with base_model_view(model):
        search.visit("", model, "")
    return search.found


def capture_layers(model: nn.Module) -> dict[str, tuple[str | None, str]]:
    """Find out which parts of a transformed model fx can trace.

    Returns:
        Path of an adapted layer -> (path of the module whose graph contains it, or `None`; the reason why no larger
        graph contains it).
    """
    return capture(model, adapted_layers(model)).layers


class _Search:
    """Searches from the model down to its layers, and stops at each module that can be traced."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self.found = Captured()
        # A shared layer has several paths, but one name.
        self._names = {layer: path for path, layer in layers.items()}

    def visit(self, path: str, module: nn.Module, why: str) -> None:
        """Visit a module; `why` is the reason why its parent does not have a graph."""
        below = [part for part in module.modules() if part in self._names]
        if not below:
            return
        if module in self._names:
            self._note(below, None, why)
            return
        # A graph of a single layer is not useful, and a container is never called.
        if path and (len(below) == 1 or type(module).forward is nn.Module.forward):
            self._visit_children(path, module, why)
            return
        try:
            self.found.parts[path] = _trace_part(path, module, below)
        except CaptureError as error:
            reason = f"{path or 'the model'} ({original_class(module).__name__}): {error.reason}"
            self._visit_children(path, module, reason)
        else:
            self._note(below, path, why)

    def _visit_children(self, path: str, module: nn.Module, why: str) -> None:
        for name, child in module.named_children():
            self.visit(f"{path}.{name}".lstrip("."), child, why)

    def _note(self, layers: list[nn.Module], root: str | None, why: str) -> None:
        for layer in layers:
            self.found.layers.setdefault(self._names[layer], (root, why))


def _trace_part(path: str, module: nn.Module, layers: list[nn.Module]) -> Traced:
    if "forward" in vars(module):
        raise CaptureError("its forward is set on the instance")
    if isinstance(module, fx.GraphModule) and path:
        raise CaptureError("it is a GraphModule itself")
    if path and (optional := _optional_arguments(module)):
        names = ", ".join(optional)
        raise CaptureError(f"forward has optional arguments ({names}), and it is unknown how it is called")
    return trace(module, layers)


def _optional_arguments(module: Any) -> list[str]:
    """Arguments with defaults. For a submodule, it is unknown whether its callers pass them."""
    parameters = list(signature(type(module).forward).parameters.values())[1:]
    return [parameter.name for parameter in parameters if parameter.default is not Parameter.empty]
