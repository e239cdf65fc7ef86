"""Tracers for traces that share one copy of a module: what fx would set up for each is set up once, for all of them."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, fx, nn

from hra_fx.tracing.admission import HOOKS
from hra_fx.tracing.session import Session
from hra_fx.tracing.tracer import RegionAttribute, RegionProxy, RegionTracer, StrayError
from hra_fx.tracing.train_eval import Arguments, is_same, may_vary

_PROXIES = (RegionProxy, RegionAttribute)
_CONSTANTS = frozenset({bool, int, float, str, type(None), torch.dtype, torch.device})
_DIFFER = "two traces of it differ: its forward depends on something that changes"


class Bench(NamedTuple):
    """What all traces of one module have in common.

    Attributes:
        session: the set-up of fx.
        paths: each module at or below the root, and its path.
        tensors: id -> (name, tensor) of the parameters and buffers.
        constants: tensors that are plain attributes, and their names.
        leaves: the modules that were looked at so far -> whether they are called as they are.
        hooks: modules that have hooks -> the keys of these.
    """

    session: Session
    paths: dict[nn.Module, str]
    tensors: Mapping[int, tuple[str, Tensor]]
    constants: dict[Any, str]
    leaves: dict[nn.Module, bool]
    hooks: Mapping[nn.Module, list[int]]


def hooks_of(namespace: Mapping[str, Any]) -> list[int]:
    """The keys of the hooks of a module."""
    return [key for hooks in HOOKS for key in namespace[hooks]]


class SwiftTracer(RegionTracer):
    """Takes the short way where fx takes a long one to the same node."""

    def __init__(self, bench: Bench, *args: Any) -> None:
        """A tracer for `bench`; the others are those of `RegionTracer`."""
        super().__init__(*args)
        self._bench = bench
        self._leaves = bench.leaves

    def trace_once(self, root: Any) -> fx.Graph:
        """What is left to do of a trace, once fx is set up."""
        session = self._bench.session
        self.root, self.submodule_paths = root, self._bench.paths
        self.tensor_attrs = dict(self._bench.constants)
        self.graph = fx.Graph()
        run, args = self.create_args_for_root(type(root).forward, True)
        session.tracer, session.read = self, {}
        try:
            self.create_node("output", "output", (self.create_arg(run(*args)),), {})
        finally:
            session.tracer, session.read = None, {}
        return self.graph

    def given(self, m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
        """As for any call; hooks that the forward puts on for a while would not run where a graph makes it."""
        if hooks_of(m.__dict__) != self._bench.hooks.get(m, []):
            self.refuse(f"{self.path_of_module(m)}: its hooks are others for a call, which a graph does not do")
        return super().given(m, args, kwargs, result)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """A parameter or buffer as a node; fx looks through all of them each time."""
        name, tensor = self._bench.tensors.get(id(attr_val), ("", None))
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
        if kind is dict and not a:
            return {}
        return tuple([self.create_arg(item) for item in a]) if kind is tuple else super().create_arg(a)


class FollowingTracer(SwiftTracer):
    """Makes no graph, but compares each node to come with the next one of a graph, which then stands for it.

    So it sees what a second graph would show, constants included, and stops at the first difference.

    Attributes:
        otherwise: nodes that have other constants than in the graph -> their arguments.
    """

    def __init__(self, followed: fx.Graph, otherwise: dict[fx.Node, Arguments], *args: Any) -> None:
        """A tracer that follows `followed`, but for some arguments; the others are those of `SwiftTracer`."""
        super().__init__(*args)
        self._graph = followed
        self.otherwise = otherwise
        self._nodes: Iterator[fx.Node] = iter(())
        self._is_lost = False

    def trace_once(self, root: Any) -> fx.Graph:
        """Follow the graph from its beginning to its end."""
        self._nodes = iter(() if self._is_lost else self._graph.nodes)
        super().trace_once(root)
        if next(self._nodes, None) is not None:
            self._stray()
        return self._graph

    def create_node(
        self, kind: str, target: Any, args: Any, kwargs: Any, name: Any = None, type_expr: Any = None
    ) -> fx.Node:
        """The next node of the graph."""
        node = next(self._nodes, None)
        if node is None or node.op != kind or not (node.target is target or node.target == target):
            self._stray()
        expected_args, expected_kwargs = self.otherwise.get(node) or (node.args, node.kwargs)
        if not (is_same(expected_args, args) and is_same(expected_kwargs, kwargs)):
            self._differs(node, args, kwargs)
        return node

    def _differs(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._stray()

    def _stray(self) -> NoReturn:
        # For good, also where the forward catches the error.
        self._nodes, self._is_lost = iter(()), True
        raise StrayError(_DIFFER)


class VaryingTracer(FollowingTracer):
    """Follows the graph of the other mode, and takes down which constants differ."""

    def trace_once(self, root: Any) -> fx.Graph:
        """From the beginning, for it may be begun anew."""
        self.otherwise.clear()
        return super().trace_once(root)

    def knows_no(self, proxy: RegionProxy, frame: types.FrameType) -> bool:
        """The answer rests on the nodes so far, which have to be those of this mode."""
        if self.otherwise:
            self._stray()
        return super().knows_no(proxy, frame)

    def _differs(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not may_vary(node, args, kwargs):
            self._stray()
        self.otherwise[node] = args, kwargs


class RepeatingTracer(FollowingTracer):
    """Follows a graph of the same mode."""

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call or inline a child, of which the first trace of this mode has asked what there is to ask."""
        path = self.path_of_module(m)
        if not self.is_leaf_module(m, path):
            return forward(*args, **kwargs)
        return self.given(m, args, kwargs, self.create_proxy("call_module", path, args, kwargs))
