"""trace: the graph of a model that calls its layers, by torch.fx, or by torch.export from an example call.

torch.fx traces without an example, and the graph is valid for all sizes. What it records wrong, `compare` finds. If it
cannot trace a model, `capture` records a call.
"""

from __future__ import annotations

import inspect
import keyword
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, fx, nn

from hra_fx.compat import forget_dataclasses, has_own_hooks, know_dataclasses, pytree
from hra_fx.errors import AdapterError, CaptureError
from hra_fx.example_inputs import Call, example_call, guessed_call, normalize_inputs, preserve_rng_state
from hra_fx.layers.target import FACTORS, find_kind
from hra_fx.passes.capture import capture_layers
from hra_fx.passes.compare import Attach, ExampleError, compare, compare_call, copied
from hra_fx.passes.exported import LOCK, depends_on_mode
from hra_fx.passes.graph import graph_module
from hra_fx.passes.modes import merge_modes
from hra_fx.passes.observed import attributes, changed_attribute, random_states


class TextError(CaptureError):
    """The model makes text of a value. In a capture of `torch.export`, too, it would be the name of a symbol."""


#: Device types with autocast.
_DEVICES = ("cpu", "cuda")


def trace(
    model: nn.Module,
    layers: Collection[nn.Module],
    example_inputs: Any = None,
    dynamic_shapes: Any = None,
    attach: Attach | None = None,
    *,
    only: bool = False,
) -> fx.GraphModule:
    """Trace a model into a GraphModule that shares its modules and parameters, for train and eval mode.

    Args:
        model: any module. It is not changed.
        layers: modules that stay calls, in addition to those that can be adapted or depend on the mode.
        example_inputs, dynamic_shapes: see `hra_fx.transform`.
        attach: adds adapters to a model or a graph. If it is given, both are compared with their adapters.
        only: whether the graph is for a picture: valid only for this call in eval mode, but traced much faster. It is
            not compared without an example.

    Raises:
        AdapterError: neither torch.fx nor torch.export can trace the model.
    """
    if odd := next(_odd_names(model), None):
        raise AdapterError(
            f"trace=True: {type(model).__name__} has an attribute {odd!r}, a name that a graph cannot have. Rename it,"
            " or leave out trace=True."
        )
    call = None if example_inputs is None else normalize_inputs(example_inputs)
    with LOCK:
        try:
            know_dataclasses(call)
            return _traced_or_captured(model, layers, call, dynamic_shapes, attach, only=only)
        finally:
            forget_dataclasses()


def _traced_or_captured(
    model: nn.Module,
    layers: Collection[nn.Module],
    call: Call | None,
    dynamic_shapes: Any,
    attach: Attach | None,
    *,
    only: bool,
) -> fx.GraphModule:
    reason = ""
    if dynamic_shapes is None:
        try:
            return trace_by_fx(model, layers, call, attach, only=only)
        except CaptureError as error:
            if isinstance(error, TextError) or (call and isinstance(error, ExampleError)):
                raise _refusal(model, error) from error
            reason = f"torch.fx cannot trace {type(model).__name__}: {error.reason}. "
    call = call if only else call or example_call(model)
    if call is None:
        raise AdapterError(
            f"{reason}Pass example_inputs, the arguments of one call, with which torch.export may capture it, or leave "
            "out trace=True."
        )
    try:
        return capture_layers(model, call, dynamic_shapes, attach, only=only)
    except CaptureError as error:
        raise _refusal(model, error) from error


def _odd_names(model: nn.Module) -> Iterator[str]:
    """The attributes whose name is a keyword of Python or an attribute of GraphModule."""
    for path, part in model.named_modules():
        for name in (*part._modules, *part._parameters, *part._buffers):
            if keyword.iskeyword(name) or (not path and (name == FACTORS or hasattr(fx.GraphModule, name))):
                yield f"{path}.{name}".lstrip(".")


def _refusal(model: nn.Module, error: CaptureError) -> AdapterError:
    """The error of a model that cannot be captured."""
    name = type(model).__name__
    if isinstance(error, ExampleError):
        return AdapterError(f"{name}: {error.reason}. Pass `example_inputs` that the model runs on.")
    return AdapterError(
        f"torch.export cannot capture {name}: {error.reason}. Leave out trace=True: the adapted layers work without a "
        "graph."
    )


def trace_by_fx(
    model: nn.Module, layers: Collection[nn.Module], call: Call | None, attach: Attach | None, *, only: bool
) -> fx.GraphModule:
    """Trace a model with torch.fx, and compare the graph with it. The arguments are those of `trace`.

    A graph of torch.fx takes the required arguments. It has the defaults of all others.
    """
    if has_own_hooks(model) and not only:
        raise CaptureError("it has forward hooks, which torch.fx does not run")
    graph, modules = _in_both_modes(model, layers)
    if call is not None:
        signature, (args, kwargs) = inspect.signature(model.forward), call
        try:
            given = list(signature.bind(*args, **kwargs).arguments)
        except TypeError as error:
            raise CaptureError(f"the example does not fit its forward: {error}") from error
        is_constant = not all(isinstance(value, Tensor) for value in pytree.tree_leaves(call))
        if is_constant or given != [str(node.target) for node in graph.find_nodes(op="placeholder")]:
            raise CaptureError("the example has constants or optional arguments")
    made = graph_module(model, graph, modules)
    example = call if only else call or guessed_call(model)  # without one, nothing can be compared
    if only and example:
        with suppress(ExampleError):  # a drawing warns of it
            compare_call(model, made, example)
    elif example:
        compare(model, made, example, attach=attach)
    return made


def _in_both_modes(model: nn.Module, layers: Collection[nn.Module]) -> tuple[fx.Graph, dict[str, nn.Module]]:
    """Trace a model in both modes. Returns the graph, and modules that the graph calls but the model does not have."""
    if "forward" in vars(model):
        raise CaptureError("its forward is set on the instance")
    with LOCK, preserve_rng_state():
        try:
            in_train, in_eval = (_traced(model, layers, training) for training in (True, False))
            return in_train, merge_modes(model, in_train, in_eval)
        except CaptureError:
            raise
        except Exception as error:
            line = str(error).strip().split("\n")[0]
            raise CaptureError(f"fx cannot trace it ({type(error).__name__}: {line[:160]})") from error


def _traced(model: nn.Module, layers: Collection[nn.Module], training: bool) -> fx.Graph:
    # The forward may change the modules, so a copy is traced.
    twin = copied(model)
    keep = {part for part, own in zip(twin.modules(), model.modules(), strict=True) if own in layers}
    for part in twin.modules():
        part.training = training
    before, random = attributes(twin), random_states()
    with torch.enable_grad(), _autocast(enabled=training):  # a block may enable or disable it
        tracer = ModelTracer(keep, autocast=training)
        graph = tracer.trace(twin)
    if not all(read.is_recorded for read in tracer.dtypes):  # `is` does not record it
        raise CaptureError("it reads the dtype of a value in Python, as in `x.dtype is torch.float32`")
    for node in graph.nodes:
        node.type = None  # the annotation may be a string, and then fx cannot pickle the graph
    compile(graph.python_code("self").src, "graph", "exec")  # a layer may have the name of a keyword
    if random_states() != random:
        raise CaptureError("it draws random numbers in Python or seeds a generator, which happens once in a trace")
    if changed := changed_attribute(before, twin):
        raise CaptureError(f"its forward changes {changed}, which a graph drops")
    return graph


@contextmanager
def _autocast(*, enabled: bool) -> Iterator[None]:
    """Context manager that sets the flags of autocast, also those of devices that do not exist here."""
    before = [(device, torch.is_autocast_enabled(device)) for device in _DEVICES]
    try:
        for device in _DEVICES:
            torch.set_autocast_enabled(device, enabled)
        yield
    finally:
        for device, own in before:
            torch.set_autocast_enabled(device, own)


class ValueProxy(fx.Proxy):
    """A value of a trace, which cannot be a key or text: that would be the name of its node, as in `layers[str(size)]`.

    In an f-string it is this name, because models write error messages so.
    """

    __hash__ = None  # type: ignore[assignment]

    def __getattr__(self, k: str) -> fx.proxy.Attribute:
        """An attribute, such as `x.shape`."""
        made = AttributeProxy(self, k)
        if k == "dtype" and isinstance(self.tracer, ModelTracer):
            self.tracer.dtypes.append(made)
        return made

    def __str__(self) -> str:
        """Raise an error for text."""
        raise TextError("it makes text of a value or a size (str), such as a key of a ModuleDict")

    def __format__(self, spec: str) -> str:
        """The name in an f-string."""
        return repr(self)


class AttributeProxy(ValueProxy, fx.proxy.Attribute):
    """An attribute of a value, which may be a method."""

    is_recorded = False

    @property
    def node(self) -> fx.Node:  # type: ignore[override]
        """The node that reads the attribute."""
        self.is_recorded = True
        return super().node


class ModelTracer(fx.Tracer):
    """Traces one module into a graph of calls to modules and operators.

    The required arguments of the root are the placeholders; optional arguments keep their defaults. Buffers are read
    like parameters, so that a write into a buffer becomes a node.
    """

    proxy_buffer_attributes = True
    trace_asserts = True

    def __init__(self, keep: Collection[nn.Module], *, autocast: bool) -> None:
        """Prepare for one trace. The modules in `keep` stay calls; `autocast` is whether it is enabled outside."""
        super().__init__()
        self._keep, self._autocast = keep, autocast
        self.dtypes: list[AttributeProxy] = []

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Create the value of a node."""
        return ValueProxy(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Raise an error for a branch on a value."""
        raise CaptureError("it branches on a value (if, while, and, or, not, assert)")

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module stays a call: layers that can be adapted, and those that depend on the mode or are torch's.

        Subclasses of batch norm and dropout, and layers that drop paths, run other operations in train mode.
        """
        if m in self._keep or find_kind(m) is not None or depends_on_mode(m):
            return True
        return super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Record a node for a leaf module, or the nodes of the forward for any other module."""
        path = self.path_of_module(m)
        if has_own_hooks(m) and not self.is_leaf_module(m, path):
            raise CaptureError(f"{path}: it has hooks, which would not run")
        return super().call_module(m, forward, args, kwargs)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Create a node, if it runs in the usual context."""
        autocast = [torch.is_autocast_enabled(device) for device in _DEVICES]
        if not torch.is_grad_enabled() or autocast != [self._autocast] * len(_DEVICES):
            raise CaptureError(
                "it changes grad mode or autocast, or calls a custom autograd function, which a graph drops"
            )
        return super().create_node(*args, **kwargs)

    def create_arg(self, a: Any) -> Any:
        """Create an argument of a node."""
        if isinstance(a, Tensor) and type(a) is not nn.Parameter and a not in self.tensor_attrs:
            raise CaptureError("it creates a tensor in Python, which would become a constant")
        return super().create_arg(a)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """Create one placeholder for each required argument."""
        parameters = list(inspect.signature(type(self.root).forward).parameters.values())[1:]
        variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        names = [p.name for p in parameters if p.default is inspect.Parameter.empty and p.kind not in variadic]
        if not names:
            raise CaptureError("its forward does not have a required argument")
        proxies = {name: self.create_proxy("placeholder", name, (), {}) for name in names}
        by_place = [p.name for p in parameters if p.name in proxies and p.kind is not inspect.Parameter.KEYWORD_ONLY]

        def run(root: Any) -> Any:
            args = [proxies[name] for name in by_place]
            return root_fn(root, *args, **{name: proxies[name] for name in names if name not in by_place})

        return run, [self.root]
