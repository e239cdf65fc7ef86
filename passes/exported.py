"""Capture one call of a model with `torch.export`, in one mode, with layers as operators.

    y = layer(x)        is captured as        y = hra_fx.call_layer(x, "encoder.0.query")

`torch.export` records operators, which do not show the layers. This operator represents the call of a layer; the final
graph calls the layer as a module. Every module without children that takes and returns one tensor is a layer. Dropout
and batch norm are among them, so one graph is valid in train and in eval mode.
"""

from __future__ import annotations

import inspect
import io
import threading
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr
from functools import partial, wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hra_fx.compat import pytree
from hra_fx.errors import CaptureError
from hra_fx.example_inputs import Call, seed_everything, separated_inputs
from hra_fx.layers.class_swap import original_class
from hra_fx.layers.target import find_kind
from hra_fx.passes.compare import copied
from hra_fx.passes.inputs import argument_names
from hra_fx.passes.nodes import line_among
from hra_fx.passes.observed import without_unknown

if TYPE_CHECKING:
    from torch.export import ExportedProgram

#: fx and torch.export patch classes for the whole process while they trace.
LOCK = threading.RLock()
#: Tensors with more dimensions are images: models branch on their height and width, so only their batch is dynamic.
_LENGTHS = 3
#: Methods that return the tensor itself if it already has the dtype.
_CASTS = {Tensor.to, Tensor.type, Tensor.type_as, Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16}
_CASTS |= {Tensor.long, Tensor.int, Tensor.bool}


def export_call(model: nn.Module, call: Call, dynamic_shapes: Any, *, training: bool) -> ExportedProgram:
    """Capture a call in one mode, with each leaf as one `hra_fx::call_layer`.

    The forward may change the modules, so a copy of them is captured.
    """
    args, kwargs = separated_inputs(call)
    seed_everything(0)  # a branch on a random number is the same in both modes
    model = copied(model).train(not training).train(training)  # as compare does: some clear a cache
    leaves = {path: part for path, part in model.named_modules() if path and is_leaf(part)}
    with exporting(), ExitStack() as stack, _PlainOperators(), torch.enable_grad():
        stack.callback(_layers.clear)
        stack.callback(_recorded.clear)
        _layers.update(leaves)
        for path, layer in leaves.items():
            vars(layer)["_call_impl"] = partial(_call, path)
        vars(model)["forward"] = _without_unknown(model.forward, argument_names(model, args, kwargs))
        program = torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
        for node in program.graph.find_nodes(op="call_function", target=CALL_LAYER):
            if node.args[1] in _recorded and not node.users:
                program.graph.erase_node(node)
        return program


@contextmanager
def exporting() -> Iterator[None]:
    """Context manager for calls of `torch.export`, whose errors become a `CaptureError`. Hides what it prints."""
    try:
        # torch writes the graph of a failed capture to stderr.
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    except CaptureError:
        raise
    except Exception as error:
        line = str(error).strip().split("\n")[0]
        frames = [(frame.filename, frame.lineno, frame.line) for frame in traceback.extract_tb(error.__traceback__)]
        place = line_among(frames)
        raise CaptureError(f"torch.export fails{place} ({type(error).__name__}: {line[:200]})") from error


def examples_with_shapes(model: nn.Module, call: Call) -> list[tuple[Call, Any]]:
    """Examples to capture, with the sizes that may change."""
    tensors = [value for value in pytree.tree_leaves(call) if isinstance(value, Tensor)]
    tries = [(call, True), (call, False)]
    if tensors and all(x.dim() > 0 and x.shape[0] == 1 for x in tensors):
        # torch.export makes a size of 1 a constant. The call itself is for models that allow only this batch size.
        doubled = pytree.tree_map(lambda x: x.repeat_interleave(2, 0) if isinstance(x, Tensor) else x, call)
        tries = [(doubled, True), (doubled, False), (call, True)]
    return [(example, _shapes(model, example, lengths)) for example, lengths in tries]


def _shapes(model: nn.Module, call: Call, lengths: bool) -> dict[str, Any]:
    """Dynamic shapes in which every size may change; for images, and without `lengths`, only the batch size."""

    def free(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return None
        count = value.dim() if lengths and value.dim() <= _LENGTHS else min(value.dim(), 1)
        # torch.export makes a size of 1 a constant, and would write to its log.
        return {dimension: torch.export.Dim.AUTO for dimension, size in enumerate(value.shape[:count]) if size > 1}

    args, kwargs = call
    named = zip(argument_names(model, args, kwargs), (*args, *kwargs.values()), strict=True)
    return {name: pytree.tree_map(free, value) for name, value in named}


@contextmanager
def without_caches(model: nn.Module) -> Iterator[None]:
    """Context manager in which transformers models do not return a key-value cache, because a graph cannot do this."""
    configs = {id(value): value for part in model.modules() if (value := getattr(part, "config", None)) is not None}
    changed = [config for config in configs.values() if getattr(config, "use_cache", None) is True]
    for config in changed:
        config.use_cache = False
    try:
        yield
    finally:
        for config in changed:
            config.use_cache = True


def _without_unknown(forward: Callable[..., Any], names: Iterable[str]) -> Callable[..., Any]:
    """Wrap a forward to return None instead of outputs that `torch.export` does not support, such as caches.

    Its signature has the arguments of the call, because `torch.export` does not support `**kwargs`.
    """

    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        kept = without_unknown(output)
        return output if kept is None else kept

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    vars(run)["__signature__"] = inspect.Signature([inspect.Parameter(name, kind) for name in names])
    return run


class _PlainOperators(TorchFunctionMode):
    """Mode in which the recorded operators do not depend on the mode or on the dtypes of the example.

    - The fast path of torch's attention does not have a gradient, so it is not used.
    - `Tensor.contiguous` is recorded only if the previous kernel returns other strides, and the kernel of attention
      depends on dropout. Here it is always recorded.
    - A cast that does not change the dtype returns its input, and everything that reads the input would then read the
      cast. Under autocast, this would be another value. Here a cast returns an alias.
    """

    def __enter__(self) -> Any:
        self._before = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        torch.backends.mha.set_fastpath_enabled(self._before)
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.register_hook:
            raise CaptureError("it adds a hook to a tensor, which a graph drops")
        if func is Tensor.contiguous:
            return torch.ops.aten.contiguous.default(*args, **(kwargs or {}))
        if func in _CASTS:
            args = (torch.ops.aten.alias.default(args[0]), *args[1:])
        return func(*args, **(kwargs or {}))


# --- layers as operators ----------------------------------------------------------------------------------------------

# torch does not have types for its libraries.
_LIBRARY: Any = torch.library.Library("hra_fx", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("call_layer(Tensor input, str path) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))

#: The operator overload that graph nodes have as their target.
CALL_LAYER = torch.ops.hra_fx.call_layer.default

_MODES = (
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
)
#: Modules that return their input, and those without Python code, are not leaves.
_RECORDED = (nn.Identity, nn.Sequential, torch.jit.ScriptModule)
#: Suffixes of the names of layers that drop whole examples in torchvision, timm and transformers.
_DROP_PATHS = ("DropPath", "StochasticDepth")
# The layers of the model that is being captured, by path. The capture holds a lock.
_layers: dict[str, nn.Module] = {}
# The paths of layers whose operators are recorded after a failed `call_layer`. Its node is removed from the program.
_recorded: set[str] = set()


def is_leaf(module: nn.Module) -> bool:
    """Whether a graph calls a module as a whole: layers that can be adapted, and modules without children.

    The operators of a module of another library are recorded if its call may do more than running its forward.
    """
    if depends_on_mode(module) or find_kind(module) not in (None, "attention", "experts"):
        return True
    if module._modules or isinstance(module, _RECORDED):
        return False
    return _is_of_torch(module) or (type(module).__call__ is nn.Module.__call__ and "forward" not in vars(module))


def _is_of_torch(module: nn.Module) -> bool:
    return original_class(module).__module__.startswith("torch.nn.")


def depends_on_mode(module: nn.Module) -> bool:
    """Whether a layer acts differently in train mode; its output has the shape of its input."""
    return isinstance(module, _MODES) or type(module).__name__.endswith(_DROP_PATHS)


def _call(path: str, *args: Any, **kwargs: Any) -> Any:
    layer = _layers[path]
    run = partial(nn.Module._call_impl, layer)
    given = (*args, *kwargs.values())
    if len(given) != 1 or not isinstance(given[0], Tensor) or (kwargs and not find_kind(layer)):
        return run(*args, **kwargs)
    try:
        output = CALL_LAYER(given[0], path)
    except _MustBeRecordedError:
        _recorded.add(path)
        return run(*args, **kwargs)
    if output.is_floating_point() and any(parameter.requires_grad for parameter in layer.parameters()):
        # A model may check the type of the result, add hooks to it, and write into the copy, which `canonical` removes.
        output = torch.ops.aten.clone.default(output.requires_grad_())
    return output


class _MustBeRecordedError(Exception):
    """A layer does not return one tensor, such as a router that is an `nn.Linear`."""


class _Called(nn.ModuleDict):
    """Calls a layer, so that its own tensors can be replaced in the call."""

    def forward(self, x: Tensor) -> Any:
        layer = self["layer"]
        return original_class(layer).forward(layer, x)


def _output_of(x: Tensor, path: str) -> Tensor:
    """Create a tensor with the shape of a layer's output, for a fake input; raises `_MustBeRecordedError`."""
    layer: Any = _layers[path]
    if depends_on_mode(layer):
        return torch.empty_like(x)
    tensors = dict(layer.named_parameters()) | dict(layer.named_buffers())
    if isinstance(layer, nn.Linear) and not layer.weight.is_floating_point():  # packed, so its shape is unrelated
        return x.new_empty((*x.shape[:-1], layer.out_features))
    empty = {f"layer.{name}": x.new_empty(t.shape, dtype=t.dtype) for name, t in tensors.items()}
    output = torch.func.functional_call(_Called({"layer": layer}), empty, (x,))
    if not isinstance(output, Tensor):
        raise _MustBeRecordedError
    return output.clone()


torch.library.register_fake("hra_fx::call_layer", _output_of, lib=_LIBRARY)
