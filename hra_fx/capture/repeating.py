"""Tracers for traces that share one copy of a module: what fx would set up for each is set up once, for all of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from hra_fx.capture.session import Session
from hra_fx.capture.tracer import RegionAttribute, RegionProxy, RegionTracer

_PROXIES = (RegionProxy, RegionAttribute)
_CONSTANTS = frozenset({bool, int, float, str, type(None), torch.dtype, torch.device})
DIFFER = "two traces of it differ: its forward depends on something that changes"


class Bench(NamedTuple):
    """What all traces of one module have in common.

    Attributes:
        session: the set-up of fx.
        paths: each module at or below the root, and its path.
        tensors: id -> (name, tensor) of the parameters and buffers.
        constants: tensors that are plain attributes, and their names.
    """

    session: Session
    paths: dict[nn.Module, str]
    tensors: Mapping[int, tuple[str, Tensor]]
    constants: dict[Any, str]


class SwiftTracer(RegionTracer):
    """Takes the short way where fx takes a long one to the same node."""

    def __init__(self, bench: Bench, *args: Any) -> None:
        """A tracer for `bench`; the others are those of `RegionTracer`."""
        super().__init__(*args)
        self._bench = bench

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
    """

    def __init__(self, followed: Iterator[fx.Node], *args: Any) -> None:
        """A tracer that follows these nodes; the others are those of `SwiftTracer`."""
        super().__init__(*args)
        self._followed = followed

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call or inline a child, without what fx writes down of each call beside the node."""
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
            or not is_same(node.args, args)
            or not is_same(node.kwargs, kwargs)
        ):
            self._followed = iter(())  # for good, also if the trace is begun anew
            self.refuse(DIFFER)
        return node


def is_same(a: Any, b: Any, twins: dict[fx.Node, fx.Node] | None = None) -> bool:
    """Whether two arguments of nodes are the same, to the type of every constant."""
    if isinstance(a, fx.Node):
        return (twins.get(a) if twins else a) is b
    if isinstance(a, (tuple, list)):
        return (
            isinstance(b, tuple) is isinstance(a, tuple)
            and isinstance(b, (tuple, list))
            and len(a) == len(b)
            and all(is_same(x, y, twins) for x, y in zip(a, b, strict=True))
        )
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(is_same(a[key], b[key], twins) for key in a)
    if isinstance(a, slice):
        return isinstance(b, slice) and all(
            is_same(getattr(a, end), getattr(b, end), twins) for end in ("start", "stop", "step")
        )
    return a is b or (type(a) is type(b) and repr(a) == repr(b))
