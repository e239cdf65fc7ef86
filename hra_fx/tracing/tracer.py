"""A `torch.fx.Tracer` that raises an error if fx would record a wrong graph.

The following is not detected: `is`, `type(x)` and f-strings of traced values, which give constants in the graph;
changes of globals and of attributes of objects that are not modules; and a leaf module that returns None.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import operator
from collections.abc import Callable, Collection, Iterator
from typing import Any, NoReturn

import torch
from torch import fx, nn
from torch.fx.proxy import Attribute

from hra_fx.compat import has_own_hooks, pytree
from hra_fx.errors import CaptureError
from hra_fx.layers.target import find_kind
from hra_fx.model.example_inputs import preserve_rng_state
from hra_fx.tracing.forward_state import GraphState, patched

#: Attributes of a traced value that fx itself sets.
_OWN = frozenset(("tracer", "node", "_node", "root", "attr"))


class TracedValue(fx.Proxy):
    """A traced value that raises an error if fx would return a wrong result.

    In fx, `isinstance(proxy, Tensor)` is False and `hasattr(proxy, ...)` is always True, and the graph would contain
    the wrong branch.
    """

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """The type, for fx only; `isinstance` reads `__class__` if `type(value)` does not match."""
        tracer = _tracer(self)
        if not tracer.is_internal:
            tracer.refuse("it checks the type of a value (isinstance), which a traced value does not have")
        return type(self)

    @classmethod
    def __torch_function__(cls, orig_method: Any, types: Any, args: Any = None, kwargs: Any = None) -> Any:
        """Record a node for a torch function."""
        found = [value for value in pytree.tree_leaves((args, kwargs)) if issubclass(type(value), TracedValue)]
        with _tracer(found[0]).internal():
            return super().__torch_function__(orig_method, types, args, kwargs)

    def __getattr__(self, name: str) -> Attribute:
        """Record an attribute that tensors have."""
        tracer = _tracer(self)
        if not hasattr(torch.Tensor, name) and not tracer.is_internal:
            tracer.refuse(f"it reads {name!r} of a value, which a tensor does not have")
        return TracedAttribute(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; only fx may do this. A graph cannot represent `value.data = ...`."""
        if name not in _OWN:
            _tracer(self).refuse(f"it sets {name!r} of a value")
        object.__setattr__(self, name, value)

    def __hash__(self) -> int:
        """Return the hash; only fx may use a traced value as a key."""
        tracer = _tracer(self)
        if not tracer.is_internal:
            tracer.refuse("it looks up a value in a set or dictionary")
        return object.__hash__(self)

    def _as_number(self) -> NoReturn:
        _tracer(self).refuse("it uses a value as a Python number, or asks for its length")

    __len__ = __int__ = __float__ = __complex__ = __index__ = _as_number


def _augment(name: str) -> None:
    """Define an augmented assignment: after `skip = h; h *= 0.5`, a proxy of fx would leave `skip` as it was.

    For a function of `operator`, fx generates the code `h *= 0.5`. If `h` is a number, this would reassign the variable
    of another node. So the target of the node is a function of this module.
    """
    act = getattr(operator, name)

    def apply(value: Any, other: Any) -> Any:
        return act(value, other)

    def record(self: TracedValue, other: Any) -> Any:
        made = _tracer(self).create_proxy("call_function", apply, (self, other), {})
        # This keeps it a node when fx unpickles the graph.
        object.__getattribute__(made, "node").meta["is_wrapped"] = True
        return made

    apply.__name__ = apply.__qualname__ = name
    globals()[name] = apply
    setattr(TracedValue, f"__{name}__", record)


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "matmul"):
    _augment(f"i{_name}")


class TracedAttribute(TracedValue, Attribute):
    """An attribute of a traced value."""


def _tracer(proxy: Any) -> ModelTracer:
    tracer: ModelTracer = object.__getattribute__(proxy, "tracer")
    return tracer


class ModelTracer(fx.Tracer):
    """Traces one module into a graph of calls to modules and operators.

    The required arguments of the root are the placeholders; optional arguments keep their defaults. Buffers are read
    like parameters, so that a write into a buffer becomes a node.
    """

    proxy_buffer_attributes = True
    trace_asserts = True

    def __init__(self, keep: Collection[nn.Module], training: bool) -> None:
        """Prepare for one trace."""
        super().__init__()
        self._keep = keep
        self._state = GraphState()
        self._training = training
        self.has_drawn = False
        self.refused: list[str] = []
        self.is_internal = False
        self.innermost: list[tuple[str, nn.Module]] = []

    @contextlib.contextmanager
    def internal(self) -> Iterator[None]:
        """Context manager for code in which fx itself inspects values."""
        before, self.is_internal = self.is_internal, True
        try:
            yield
        finally:
            self.is_internal = before

    def refuse(self, reason: str) -> NoReturn:
        """Raise an error, and store it in case the forward catches it."""
        self.refused.append(reason)
        raise CaptureError(reason)

    def trace(self, root: Any, concrete_args: Any = None) -> fx.Graph:
        """Trace a module."""
        with torch.enable_grad(), patched(self.refuse), preserve_rng_state():
            self._state = GraphState()
            try:
                graph = super().trace(root)
            finally:
                self.has_drawn = self._state.has_drawn()
        if self.refused:
            raise CaptureError(self.refused[0])
        for node in graph.nodes:
            node.type = None  # the annotation may be a string, and then fx cannot pickle the graph
        return graph

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Raise an error for a branch on a value."""
        self.refuse("it branches on a value (if, while, and, or, not, assert)")

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """Unpack a value if the code shows the number of items."""
        try:
            with self.internal():
                return super().iter(obj)
        except fx.proxy.TraceError:
            self.refuse("it loops over a value, or unpacks a value into an unknown number of items")

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module stays a call: modules to keep, layers that can be adapted, and the leaf modules of fx."""
        return m in self._keep or find_kind(m) is not None or super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Record a node for a leaf module, or the nodes of the forward for any other module."""
        path = self.path_of_module(m)
        self.innermost.append((path, m))
        is_leaf = self.is_leaf_module(m, path)
        if is_leaf and any(part.training != self._training for part in m.modules()):
            self.refuse(f"{path}: its train or eval mode is changed for this call, which a graph drops")
        if not is_leaf and has_own_hooks(m):
            self.refuse(f"{path}: it has hooks, which would not run")
        with self.internal() if is_leaf else contextlib.nullcontext():
            result = super().call_module(m, forward, args, kwargs)
        self.innermost.pop()
        return _leaf_result(m, args, kwargs, result) if is_leaf else result

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Create a node, if the graph can represent the current state."""
        if reason := self._state.why_not():
            self.refuse(reason)
        return super().create_node(*args, **kwargs)

    def create_arg(self, a: Any) -> Any:
        """Create an argument of a node. Subclasses of list and dict raise an error: fx would drop their class."""
        cls = type(a)  # not isinstance, which reads the class of a traced value
        if issubclass(cls, fx.Proxy):
            return object.__getattribute__(a, "node") if cls is not TracedAttribute else a.node
        container = issubclass(cls, (list, dict)) and cls not in (list, dict)
        if (container or dataclasses.is_dataclass(cls)) and not cls.__module__.startswith("torch.fx"):
            self.refuse(f"it creates or returns a {cls.__name__}, which a graph turns into a plain container")
        if issubclass(cls, torch.Tensor) and cls is not nn.Parameter and a not in self.tensor_attrs:
            self.refuse("it creates a tensor in Python, which would become a constant")
        with self.internal():
            return super().create_arg(a)

    def create_proxy(self, *args: Any, **kwargs: Any) -> Any:
        """Create a node and the traced value that represents it."""
        with self.internal():
            return super().create_proxy(*args, **kwargs)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """Create one placeholder for each required argument."""
        parameters = list(inspect.signature(type(self.root).forward).parameters.values())[1:]
        variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        names = [p.name for p in parameters if p.default is inspect.Parameter.empty and p.kind not in variadic]
        if not names:
            self.refuse("its forward does not have a required argument")
        proxies = {name: self.create_proxy("placeholder", name, (), {}) for name in names}
        by_place = [p.name for p in parameters if p.name in proxies and p.kind is not inspect.Parameter.KEYWORD_ONLY]

        def run(root: Any) -> Any:
            args = [proxies[name] for name in by_place]
            return root_fn(root, *args, **{name: proxies[name] for name in names if name not in by_place})

        return run, [self.root]

    def proxy(self, node: fx.Node) -> TracedValue:
        """The traced value that represents a node."""
        return TracedValue(node, self)


def _leaf_result(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
    """The result of a leaf module: attention without weights returns its output and None."""
    if isinstance(module, nn.Identity):
        return args[0] if args else result
    if not isinstance(module, nn.MultiheadAttention):
        return result
    wanted = kwargs["need_weights"] if "need_weights" in kwargs else args[4] if len(args) > 4 else True
    return result if wanted else (result[0], None)
