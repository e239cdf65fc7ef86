"""Tracing one module in train and in eval mode, so that nothing is left behind and nothing is taken on trust."""

from __future__ import annotations

import functools
import keyword
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from hra_fx.capture.calling import Calling
from hra_fx.capture.keeping import Keeping
from hra_fx.capture.sandbox import Sandbox
from hra_fx.capture.surroundings import Surroundings
from hra_fx.capture.tracer import RegionAttribute, RegionProxy, RegionTracer
from hra_fx.capture.watch import watching
from hra_fx.carrier.swap import below
from hra_fx.errors import CaptureError
from hra_fx.sources import can_be_written


@dataclass(frozen=True)
class Traces:
    """The graphs of one module; `train is eval` where the mode makes no difference.

    Attributes:
        train: the graph of the forward in train mode.
        eval: the graph of the forward in eval mode.
        called: paths of the modules that are called in either.
        reads: path of a module that is dissolved in the graphs -> names of the attributes that were read of it.
    """

    train: fx.Graph
    eval: fx.Graph
    called: frozenset[str]
    reads: dict[str, frozenset[str]]


def trace(module: nn.Module, sites: Collection[str], recorded: tuple[type, ...], calling: Calling) -> Traces:
    """Trace a copy of a module in both modes; the module itself is not run.

    Args:
        module: the root of the region to be.
        sites: paths, below the root, of layers that must stay calls.
        recorded: classes whose outputs transformers collects by hooks.
        calling: how it is called.

    Raises:
        CaptureError: fx cannot trace it, or the graph would not say all that the forward does.
    """
    bench = _Bench(module, sites, recorded, calling)
    graphs = {mode: bench.trace(mode) for mode in (True, False)}
    if _say_the_same(graphs[True], graphs[False]):
        graphs[True] = graphs[False]
    else:
        for mode in (False, True):
            bench.trace_again(mode, graphs[mode])
    nodes = [*graphs[True].nodes, *graphs[False].nodes]
    called = frozenset(str(node.target) for node in nodes if node.op == "call_module")
    read = frozenset(str(node.target) for node in nodes if node.op == "get_attr")
    if unused := _unused_state(module, called, read):
        raise CaptureError(f"{unused} has parameters or buffers, and is not used by the traced forward")
    return Traces(graphs[True], graphs[False], called, bench.reads())


class _Bench:
    """One copy of a module, on which all its traces run: each is refused that leaves a change behind."""

    def __init__(self, module: nn.Module, sites: Collection[str], recorded: tuple[type, ...], calling: Calling) -> None:
        self._recorded = recorded
        self._calling = calling
        # Those of one mode are known when it is traced again, so that the repeat begins once.
        self._keeping = {True: Keeping(), False: Keeping()}
        self._surroundings = Surroundings(module)
        self._box = Sandbox(module)
        self._sites = {self._box.parts[path] for path in sites}
        self._dissolved: dict[str, nn.Module] = {}

    def trace(self, training: bool) -> fx.Graph:
        """The graph of the forward in one mode."""
        graph = self._run(_SwiftTracer, training)
        names = [str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr", "placeholder")]
        if unsayable := [name for name in names if not can_be_written(name) or _has_keyword(name)]:
            raise CaptureError(f"no code can hold the name {unsayable[0]!r}")
        # GraphModule would use our tracer again to unpickle it, and go by the classes that log reads.
        graph._tracer_cls, graph._co_fields = None, {}
        graph.output_node().type = None  # an annotation, which the code of the graph would have to import
        for node in graph.nodes:
            if stack := node.meta.get("nn_module_stack"):
                node.meta["nn_module_stack"] = {key: (path, below(kind)) for key, (path, kind) in stack.items()}
        return graph

    def trace_again(self, training: bool, graph: fx.Graph) -> None:
        """Refuse a forward of which a second trace differs from `graph`."""
        nodes = iter(graph.nodes)
        self._run(functools.partial(_FollowingTracer, nodes), training)
        if next(nodes, None) is not None:
            raise CaptureError(_DIFFER)

    def reads(self) -> dict[str, frozenset[str]]:
        """What was read of the modules that are dissolved in the graphs, and from outside of those that are called."""
        read = {path: self._box.log.reads(part) for path, part in self._box.parts.items()}
        own = {path: names if path in self._dissolved else names - {"forward"} for path, names in read.items()}
        return {path: names for path, names in own.items() if names or path in self._dissolved}

    def _run(self, make: Callable[..., RegionTracer], training: bool) -> fx.Graph:
        box = self._box
        box.put_in_mode(training)
        with self._surroundings.unchanged(), watching() as refused:
            keeping = self._keeping[training]
            tracer = make(box.tensors, self._sites, self._recorded, refused, self._calling, keeping)
            self._dissolved = self._dissolved or {
                path: part for path, part in box.parts.items() if not path or not tracer.is_leaf_module(part, path)
            }
            try:
                graph = tracer.trace(box.twin)
            except CaptureError:
                raise
            except Exception as error:  # whatever the model's own code makes of a proxy
                line = str(error).strip().split("\n")[0]
                raise CaptureError(f"fx cannot trace it ({type(error).__name__}: {line[:160]})") from error
        if changes := box.differences():
            raise CaptureError(f"its forward changes or makes {', '.join(changes[:3])} outside of the graph")
        if box.log.writes:
            raise CaptureError(f"its forward sets {box.log.writes[0]!r} for a while, and a graph does not")
        tracer.refuse_what_was_kept()
        return graph


_PROXIES = (RegionProxy, RegionAttribute)
_CONSTANTS = frozenset({bool, int, float, str, type(None), torch.dtype, torch.device})
_DIFFER = "two traces of it differ: its forward depends on something that changes"


class _SwiftTracer(RegionTracer):
    """Takes the short way where fx takes a long one to the same node."""

    def __init__(self, tensors: Mapping[int, tuple[str, Tensor]], *args: Any) -> None:
        super().__init__(*args)
        self._tensors = tensors

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """A parameter or buffer as a node; fx looks through all of them each time."""
        name, tensor = self._tensors.get(id(attr_val), ("", None))
        if tensor is not attr_val or tensor is None:
            return super().getattr(attr, attr_val, parameter_proxy_cache)
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
        return parameter_proxy_cache[name]

    def create_arg(self, a: Any) -> Any:
        """An argument of a node; fx asks first of each whether it is a parameter, a buffer, a module or a script."""
        kind = type(a)
        if kind in _PROXIES:
            return a.node
        if kind in _CONSTANTS:
            return a
        return tuple([self.create_arg(item) for item in a]) if kind is tuple else super().create_arg(a)


class _FollowingTracer(_SwiftTracer):
    """Makes no graph, but compares each node to come with the next one of a graph, which then stands for it.

    So it sees what a second graph would show, constants included, and stops at the first difference.
    """

    def __init__(self, followed: Iterator[fx.Node], *args: Any) -> None:
        super().__init__(*args)
        self._followed = followed

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call or inline a child, without what fx writes down of each call beside the node."""
        if self.is_foreign():
            return forward(*args, **kwargs)
        path = self.path_of_module(m)
        if not self.is_leaf_module(m, path):
            return forward(*args, **kwargs)
        return self.given(m, args, kwargs, self.create_proxy("call_module", path, args, kwargs))

    def create_node(
        self, kind: str, target: Any, args: Any, kwargs: Any, name: Any = None, type_expr: Any = None
    ) -> fx.Node:
        """The next node of the graph."""
        node = next(self._followed, None)
        if (
            node is None
            or node.op != kind
            or not (node.target is target or node.target == target)
            or not _is_same(node.args, args)
            or not _is_same(node.kwargs, kwargs)
        ):
            self._followed = iter(())  # for good, also if the trace is begun anew
            self.refuse(_DIFFER)
        return node


def _say_the_same(graph: fx.Graph, other: fx.Graph) -> bool:
    """Whether two graphs are the same but for the names of their nodes."""
    if len(graph.nodes) != len(other.nodes):
        return False
    twins: dict[fx.Node, fx.Node] = {}
    for node, twin in zip(graph.nodes, other.nodes, strict=True):
        twins[node] = twin
        if node.op != twin.op or not (node.target is twin.target or node.target == twin.target):
            return False
        if not _is_same(node.args, twin.args, twins) or not _is_same(node.kwargs, twin.kwargs, twins):
            return False
    return True


def _is_same(a: Any, b: Any, twins: dict[fx.Node, fx.Node] | None = None) -> bool:
    """Whether two arguments of nodes are the same, to the type of every constant."""
    if isinstance(a, fx.Node):
        return (twins.get(a) if twins else a) is b
    if isinstance(a, (tuple, list)):
        return (
            isinstance(b, tuple) is isinstance(a, tuple)
            and isinstance(b, (tuple, list))
            and len(a) == len(b)
            and all(_is_same(x, y, twins) for x, y in zip(a, b, strict=True))
        )
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_is_same(a[key], b[key], twins) for key in a)
    if isinstance(a, slice):
        return isinstance(b, slice) and all(
            _is_same(getattr(a, end), getattr(b, end), twins) for end in ("start", "stop", "step")
        )
    return a is b or (type(a) is type(b) and repr(a) == repr(b))


def _has_keyword(name: str) -> bool:
    return any(keyword.iskeyword(part) for part in name.split("."))


def _unused_state(module: nn.Module, called: frozenset[str], read: frozenset[str]) -> str | None:
    for path, part in module.named_modules():
        spaces = (part._parameters, part._buffers)
        names = [name for space in spaces for name, tensor in space.items() if tensor is not None]
        if names and not is_within(path, called) and not any(f"{path}.{name}".lstrip(".") in read for name in names):
            return path or "the module itself"
    return None


def is_within(path: str, called: frozenset[str]) -> bool:
    """Whether a module is one of those that are called, or below one."""
    while path and path not in called:
        path = path.rpartition(".")[0]
    return bool(path)
