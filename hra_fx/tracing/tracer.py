"""A `torch.fx.Tracer` that refuses where fx would go on with a wrong answer."""

from __future__ import annotations

import dataclasses
import gc
import sys
import types
import weakref
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import fx, nn
from torch.fx.proxy import Attribute

from hra_fx.errors import CaptureError
from hra_fx.layers.class_swap import below
from hra_fx.layers.target import find_kind
from hra_fx.tracing.admission import why_not_inlined
from hra_fx.tracing.branch_rules import asks_for_no_tensor, is_assertion, is_certainly_tensor, only_speaks
from hra_fx.tracing.call_signature import Calling
from hra_fx.tracing.inplace_ops import SPECIAL_METHODS
from hra_fx.tracing.leaf_modules import given, why_not_called
from hra_fx.tracing.memoized_forward import without_memory
from hra_fx.tracing.opaque_calls import Keeping


class StrayError(CaptureError):
    """A trace leaves the graph that it follows: no fault of the function where it does."""


class RegionProxy(fx.Proxy):
    """A traced value that will not answer questions about its type.

    fx says False to `isinstance(proxy, Tensor)` and True to any `hasattr(proxy, ...)`, and the branch of that answer
    becomes the graph.
    """

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """The type, for torch alone."""
        # isinstance() asks for this after looking at the type itself; torch asks it of everything that it handles.
        if not _asked_by_torch() and not _tracer(self).knows_no(self, sys._getframe(1)):
            _tracer(self).refuse("it asks for the type of a value (isinstance), and a traced value has none")
        return type(self)

    def __getattr__(self, name: str) -> Attribute:
        """An attribute that tensors have."""
        if not hasattr(torch.Tensor, name) and not _asked_by_torch():
            _tracer(self).refuse(f"it reads {name!r} of a value, which a tensor does not have")
        return RegionAttribute(self, name)

    def _as_number(self) -> NoReturn:
        _tracer(self).refuse("it takes a value for a Python number, or asks for its length")

    __len__ = __int__ = __float__ = __complex__ = __index__ = _as_number

    def __hash__(self) -> int:
        """For torch alone."""
        if not _asked_by_torch():
            _tracer(self).refuse("it looks a value up in a set or dictionary")
        return object.__hash__(self)

    def __setattr__(self, name: str, value: Any) -> None:
        """For fx alone: what is set on a traced value is set on no tensor."""
        if not _asked_by_torch():
            _tracer(self).refuse(f"it sets {name!r} of a value")
        object.__setattr__(self, name, value)

    def _in_words(self, *_: str) -> str:
        """For torch, and the messages of errors: the words for a traced value are not those for what it stands for."""
        if not _asked_by_torch() and not only_speaks(sys._getframe(1)):
            _tracer(self).refuse("it takes a value for text")
        return f"a value of {object.__getattribute__(self, 'node').name}"

    __repr__ = __str__ = __format__ = _in_words

    def _without_node(self, *args: Any) -> NoReturn:
        _tracer(self).refuse("it writes into a part of a value, copies one in Python, or asks what is in it")

    __setitem__ = __delitem__ = __contains__ = __copy__ = __deepcopy__ = _without_node  # type: ignore[assignment]


def _augmenting(act: Callable[[Any, Any], Any]) -> Callable[[RegionProxy, Any], Any]:
    def method(self: RegionProxy, other: Any) -> Any:
        return _tracer(self).create_proxy("call_function", act, (self, other), {})

    return method


for _name, _act in SPECIAL_METHODS.items():
    setattr(RegionProxy, _name, _augmenting(_act))


class RegionAttribute(RegionProxy, Attribute):
    """An attribute of a traced value, as guarded as the value itself."""


def _tracer(proxy: RegionProxy) -> RegionTracer:
    tracer: RegionTracer = object.__getattribute__(proxy, "tracer")
    return tracer


def _asked_by_torch() -> bool:
    # Only fx and the dispatch of operators: torch.is_tensor asks on behalf of the model.
    caller = sys._getframe(2).f_globals.get("__name__", "")
    return bool(caller.startswith(("torch.fx", "torch.overrides", "torch.nn", "torch._jit_internal")))


class RegionTracer(fx.Tracer):
    """Traces one module into a graph of calls to sites, to torch's own modules and to operators.

    Optional arguments of the root keep their defaults and are no placeholders; buffers are read as parameters are, so
    that writing one becomes a node and not an act of the trace.
    """

    proxy_buffer_attributes = True

    def __init__(
        self, sites: set[nn.Module], recorded: tuple[type, ...], refused: list[str], calling: Calling, keeping: Keeping
    ) -> None:
        """Prepare for modules of one model.

        Args:
            sites: layers that must stay calls, whatever their class.
            recorded: classes whose outputs transformers collects by hooks (`admission.recorded_classes`).
            refused: takes the reason of every refusal, also where the forward catches the error.
            calling: how the root is called.
            keeping: the functions that are kept, to which a trace adds.
        """
        super().__init__()
        self._sites = sites
        self._recorded = recorded
        self.refused = refused
        self._calling = calling
        self._keeping = keeping
        self._leaves: dict[nn.Module, bool] = {}
        self._made: list[weakref.ref[RegionProxy]] = []

    def refuse(self, reason: str) -> NoReturn:
        """Give up, even if the forward catches the error."""
        self.refused.append(reason)
        raise CaptureError(reason)

    def trace(self, root: Any, concrete_args: Any = None) -> fx.Graph:
        """Trace a module; a function that cannot be traced through is kept as one node, where it may be."""
        while True:
            before = len(self.refused)
            try:
                with self._keeping.active(self.create_proxy), without_memory():
                    return self.trace_once(root)
            except Exception as error:
                if isinstance(error, StrayError) or not self._keeping.add_culprit(error):
                    raise
            del self.refused[before:]
            self._made.clear()
            self.module_stack.clear()
            self.num_calls.clear()

    def trace_once(self, root: Any) -> fx.Graph:
        """As fx does."""
        return super().trace(root)

    def knows_no(self, proxy: RegionProxy, frame: types.FrameType) -> bool:
        """Whether the question in a line, `isinstance(value, list)`, is certainly answered by no."""
        node: fx.Node = object.__getattribute__(proxy, "node")
        return asks_for_no_tensor(frame) and is_certainly_tensor(node, self.root)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """A branch on a value; an assert becomes a node, which raises as it would."""
        frame = sys._getframe(2)  # beyond the __bool__ of fx
        if is_assertion(frame):
            where = f"{frame.f_code.co_name}, line {frame.f_lineno}"
            self.create_proxy("call_function", torch._assert, (obj, f"the assert in {where} does not hold"), {})
            return True
        self.refuse("it branches on a value (if, while, and, or, not, assert)")

    def iter(self, obj: fx.Proxy) -> NoReturn:
        """A loop over a value."""
        self.refuse("it loops over a value, or unpacks one in a way that does not tell how many there are")

    def keys(self, obj: fx.Proxy) -> NoReturn:
        """A value given as keyword arguments."""
        self.refuse("it unpacks a value as keyword arguments")

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Sites, others that could be some, and what fx itself takes for leaves."""
        if m not in self._leaves:
            leaf = m in self._sites or find_kind(m) is not None or super().is_leaf_module(m, module_qualified_name)
            if leaf and type(m).__call__ is not nn.Module.__call__:
                # It would be traced along by that __call__, and run again by the node.
                self.refuse(f"{module_qualified_name}: its class has a __call__ of its own")
            if leaf and (reason := why_not_called(m)):
                self.refuse(f"{module_qualified_name}: {reason}")
            self._leaves[m] = leaf
        return self._leaves[m]

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Call or inline a child; raises `CaptureError` for one that a graph cannot stand for.

        Writes down in `meta` what fx does, with the classes that the model has.
        """
        path = self.path_of_module(m)
        is_leaf = self.is_leaf_module(m, path)
        if not is_leaf and (reason := why_not_inlined(m, self._recorded)):
            self.refuse(f"{path}: {reason}")
        times = self.num_calls.get(path, 0)
        self.num_calls[path] = times + 1
        key = f"{path}@{times}" if times else path
        self.module_stack[key] = (path, below(type(m)))
        result = self.create_proxy("call_module", path, args, kwargs) if is_leaf else forward(*args, **kwargs)
        if self.module_stack.popitem()[0] != key:
            self.refuse(f"{path}: an error inside of it is caught, and a graph catches none")
        return self.given(m, args, kwargs, result) if is_leaf else result

    def given(self, m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
        """What the call of a leaf gives (`leaves.given`)."""
        try:
            return given(m, args, kwargs, result)
        except CaptureError as error:
            self.refuse(f"{self.path_of_module(m)}: {error.reason}")

    def create_arg(self, a: Any) -> Any:
        """An argument of a node; containers of other kinds than Python's own would come out as those."""
        kind = type(a)  # not isinstance, which asks a proxy for its class
        container = issubclass(kind, (list, dict)) and kind not in (list, dict)
        if (container or dataclasses.is_dataclass(kind)) and not kind.__module__.startswith("torch.fx"):
            self.refuse(f"it makes or returns a {kind.__name__}, which would come out as a plain container")
        return super().create_arg(a)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """One placeholder for each tensor that a call gives; what else it gives is the same each time."""
        proxies = [self.create_proxy("placeholder", name, (), {}) for name in self._calling.names]
        args, kwargs = self._calling.arguments(iter(proxies))

        def run(root: Any) -> Any:
            result = root_fn(root, *args, **kwargs)
            if not _is_same((args, kwargs), self._calling.arguments(iter(proxies))):
                self.refuse("it changes a list or dictionary that it is given, and a graph does not")
            return result

        return run, [self.root]

    def proxy(self, node: fx.Node) -> RegionProxy:
        """Wrap a node in the guarded proxy."""
        made = RegionProxy(node, self)
        if node.op != "get_attr":  # fx keeps the values of parameters in a cycle of its own
            self._made.append(weakref.ref(made))
        return made

    def refuse_what_was_kept(self) -> None:
        """Refuse a forward that left a traced value somewhere, once the trace is done: a graph leaves none.

        Raises:
            CaptureError: there is one.
        """
        # What only stood in a cycle was not left. The youngest first, which takes least and is nearly always enough.
        for generation in range(3):
            if all(made() is None for made in self._made):
                return
            gc.collect(generation)
        if any(made() is not None for made in self._made):
            self.refuse("it keeps a value beyond the call")


def _is_same(a: Any, b: Any) -> bool:
    """Whether two structures hold the same objects."""
    if type(a) is not type(b) or type(a) not in (tuple, list, dict):
        return a is b
    if isinstance(a, dict):
        return list(a) == list(b) and _is_same(list(a.values()), list(b.values()))
    return len(a) == len(b) and all(_is_same(x, y) for x, y in zip(a, b, strict=True))
