"""Trace the forward of one module into one graph for train and eval mode."""

from __future__ import annotations

import ast
import keyword
import threading
from collections.abc import Collection, Iterator
from contextlib import ExitStack
from typing import NamedTuple

from torch import fx, nn

from hra_fx.errors import CaptureError
from hra_fx.tracing.by_mode import ByMode, ModesDifferError, merge_modes
from hra_fx.tracing.tracer import ModelTracer
from hra_fx.tracing.unchanged import Snapshot

#: fx and torch.export patch classes for the whole process while they trace.
LOCK = threading.RLock()
#: Another thread may draw random numbers during a trace. After this many such traces, the forward draws them.
_DRAWS = 5


class Traced(NamedTuple):
    """The graph of a module.

    Attributes:
        graph: valid in train and in eval mode.
        modules: name -> module, for modules that the graph calls and the traced module does not have.
    """

    graph: fx.Graph
    modules: dict[str, ByMode]


def trace(module: nn.Module, layers: Collection[nn.Module]) -> Traced:
    """Trace a module in both modes. The module is not changed.

    A submodule that cannot be traced, and has no adapted layers inside, stays one call.

    Args:
        module: the module.
        layers: layers that must stay calls, such as those to be adapted.

    Raises:
        CaptureError: fx cannot trace it, or the graph would not compute what the forward does.
    """
    with LOCK:
        return _Trace(module, layers).run()


class _DrawnError(CaptureError):
    """Random numbers were drawn during a trace."""


class _Trace:
    """The traces of one module: after each failure, one more submodule becomes a call, until none is left."""

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
        draws = 0
        while True:
            try:
                in_train, in_eval = self._once(True), self._once(False)
                return Traced(in_train, merge_modes(in_train, in_eval, self._may_differ))
            except ModesDifferError as error:
                self._keep_one_of(error)
            except _DrawnError:
                draws += 1
                if draws == _DRAWS:
                    raise
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
            if unwritable := next((name for name in map(str, _targets(graph)) if not _can_be_written(name)), None):
                raise CaptureError(f"the code of a graph cannot contain the name {unwritable!r}")
            if tracer.has_drawn:
                raise _DrawnError(
                    "it draws random numbers in Python or seeds a generator, which happens once in a trace"
                )
            if changes := snapshot.changes():
                self._stack = [self._paths[path] for path, _ in changes]
                names = ", ".join(f"{path}.{name}".lstrip(".") for path, name in changes[:3])
                raise CaptureError(f"its forward changes {names}, which a graph drops")
        return graph

    def _may_differ(self, node: fx.Node) -> bool:
        """Whether a node may have one constant in train mode and another in eval mode.

        If not, its module becomes a call, which has its own mode, as a batch norm that is frozen in eval mode.
        """
        stack = _stack_of(node)
        return self._other_mode.isdisjoint(stack) and (not stack or self._paths[stack[-1]] in self._open)

    def _keep_innermost(self) -> bool:
        """Turn the innermost module of the failed trace, and others of its class, into calls; False if none can be."""
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


def _targets(graph: fx.Graph) -> Iterator[str]:
    return (node.target for node in graph.nodes if node.op in ("call_module", "get_attr", "placeholder"))


def _can_be_written(name: str) -> bool:
    """Whether fx can write a name into the generated code of a graph, in quotation marks."""
    try:
        is_same: bool = ast.literal_eval(f'"{name}"') == name
    except (SyntaxError, ValueError):
        return False
    return is_same and not any(map(keyword.iskeyword, name.split(".")))


def _stack_of(node: fx.Node) -> list[str]:
    """The paths of the modules in whose forward a node was made, outermost first."""
    return [path for path, _ in node.meta.get("nn_module_stack", {}).values()]


def _as_capture_error(error: Exception) -> CaptureError:
    if isinstance(error, CaptureError):
        return error
    line = str(error).strip().split("\n")[0]
    return CaptureError(f"fx cannot trace it ({type(error).__name__}: {line[:160]})")
