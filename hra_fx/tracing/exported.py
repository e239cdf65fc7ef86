"""Capture one call of a model with `torch.export`, in one mode, with layers as operators."""

from __future__ import annotations

import contextlib
import io
import linecache
import logging
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor, nn

from hra_fx.compat import pytree
from hra_fx.errors import CaptureError
from hra_fx.model.example_inputs import Call, clone_inputs
from hra_fx.tracing.leaves import layers_as_operators
from hra_fx.tracing.unchanged import Snapshot

if TYPE_CHECKING:
    from torch.export import ExportedProgram

_LOUD = ("torch.fx.experimental.symbolic_shapes", "torch._subclasses.fake_tensor", "torch._export.non_strict_utils")
_OURS = (Path(torch.__file__).parent, Path(__file__).parents[1])
#: Tensors with more dimensions are images: models branch on their height and width, so only their batch is dynamic.
_LENGTHS = 3
#: Methods that return the tensor itself if it has the dtype already.
_CASTS = ("to", "type", "type_as", "float", "double", "half", "bfloat16", "long", "int", "bool")


def export_call(model: nn.Module, call: Call, dynamic_shapes: Any, *, training: bool) -> ExportedProgram:
    """Capture a call in one mode.

    Args:
        model: the model; its attributes may change.
        call: the example call.
        dynamic_shapes: as in `torch.export.export`.
        training: the mode of all modules.

    Raises:
        CaptureError: `torch.export` refuses, with the line of the model's code.
    """
    args, kwargs = clone_inputs(call)
    model.train(training)
    with ExitStack() as stack:
        for block in (
            exporting(),
            without_caches(model),
            layers_as_operators(model),
            _plain_operators(),
            torch.enable_grad(),
        ):
            stack.enter_context(block)
        vars(model)["forward"] = _without_unknown(model.forward)
        stack.callback(vars(model).pop, "forward", None)
        state = Snapshot(model)
        program = torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
        _refuse_changes(state)
        return program


@contextmanager
def exporting() -> Iterator[None]:
    """A block for `torch.export`, without what it prints.

    Raises:
        CaptureError: for any error in the block, with the line of the model's code.
    """
    with _quiet():
        try:
            yield
        except CaptureError:
            raise
        except Exception as error:
            line = str(error).strip().split("\n")[0]
            raise CaptureError(f"torch.export fails{_place(error)} ({type(error).__name__}: {line[:200]})") from error


def _refuse_changes(state: Snapshot) -> None:
    """Refuse a forward that counts or remembers in Python, because a graph does not.

    Raises:
        CaptureError: it changes a number or a string of a module.
    """
    for path, name in state.changes():
        where = f"{path}.{name}".lstrip(".")
        if state.is_plain(path, name):
            raise CaptureError(f"its forward changes {where}, which a graph drops")


def all_dynamic(model: nn.Module, call: Call) -> Any:
    """Dynamic shapes in which every size may change, but of images only the batch."""
    return _dynamic(model, call, lambda x: range(x.dim() if x.dim() <= _LENGTHS else 1))


def batch_dynamic(model: nn.Module, call: Call) -> Any:
    """Dynamic shapes in which only the first size may change."""
    return _dynamic(model, call, lambda x: range(min(x.dim(), 1)))


def _dynamic(model: nn.Module, call: Call, dimensions: Callable[[Tensor], range]) -> Any:
    shapes: Any = torch.export.ShapesCollection()  # type: ignore[no-untyped-call]
    for value in pytree.tree_leaves(call):
        if isinstance(value, Tensor):
            shapes[value] = dict.fromkeys(dimensions(value), torch.export.Dim.AUTO)
    return shapes.dynamic_shapes(model, *call)


def with_batch_of_two(call: Call) -> Call:
    """A call whose batch of 1 is repeated: `torch.export` makes a size of 1 a constant."""
    tensors = [value for value in pytree.tree_leaves(call) if isinstance(value, Tensor)]
    if not tensors or any(x.dim() == 0 or x.shape[0] != 1 for x in tensors):
        return call
    doubled: Call = pytree.tree_map(lambda x: x.repeat_interleave(2, 0) if isinstance(x, Tensor) else x, call)
    return doubled


@contextmanager
def without_caches(model: nn.Module) -> Iterator[None]:
    """A block in which models of transformers return no cache of keys and values, which a graph cannot return."""
    configs = {id(value): value for part in model.modules() if (value := getattr(part, "config", None)) is not None}
    changed = [config for config in configs.values() if getattr(config, "use_cache", None) is True]
    for config in changed:
        config.use_cache = False
    try:
        yield
    finally:
        for config in changed:
            config.use_cache = True


def _without_unknown(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward with None in place of outputs that `torch.export` does not know, such as caches."""
    known = (Tensor, int, float, str, type(None))

    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        kept = pytree.tree_map(lambda value: value if isinstance(value, known) else None, output)
        return output if kept is None else kept

    return run


@contextmanager
def _plain_operators() -> Iterator[None]:
    """A block in which what is recorded depends neither on the mode nor on the dtypes of the example.

    - The fast path of torch's attention has no gradient.
    - `Tensor.contiguous` is recorded only if the kernel before it gives other strides, and the kernel of attention
      depends on dropout; here it is always recorded.
    - A cast that changes nothing returns its input, which everything after it would read through the cast. Under
      autocast that would be another value; here a cast gets an alias.
    """

    def contiguous(x: Tensor, *, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
        made: Tensor = torch.ops.aten.contiguous.default(x, memory_format=memory_format)
        return made

    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    with ExitStack() as stack:
        stack.callback(torch.backends.mha.set_fastpath_enabled, before)
        stack.enter_context(mock.patch.object(Tensor, "contiguous", contiguous))
        for name in _CASTS:
            stack.enter_context(mock.patch.object(Tensor, name, _of_alias(getattr(Tensor, name))))
        yield


def _of_alias(cast: Any) -> Callable[..., Tensor]:
    @wraps(cast)
    def run(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        made: Tensor = cast(torch.ops.aten.alias.default(x), *args, **kwargs)
        return made

    return run


@contextmanager
def _quiet() -> Iterator[None]:
    """A block without warnings, and without the graph that `torch.export` prints to stderr where it refuses."""
    loggers = [logging.getLogger(name) for name in _LOUD]
    before = [logger.disabled for logger in loggers]
    try:
        for logger in loggers:
            logger.disabled = True
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, was in zip(loggers, before, strict=True):
            logger.disabled = was


def _place(error: BaseException) -> str:
    """The line of the model's code in which an error arose."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.lineno
        and not any(Path(frame.filename).is_relative_to(folder) for folder in _OURS)
        and not frame.filename.startswith("<")
        and Path(frame.filename) != Path(contextlib.__file__)
    ]
    if not frames:
        return ""
    last = frames[-1]
    code = linecache.getline(last.filename, last.lineno or 0).strip()
    return f" at {Path(last.filename).name}, line {last.lineno}, `{code}`"
