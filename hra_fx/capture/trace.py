"""Tracing one module in train and in eval mode, so that nothing is left behind and nothing is taken on trust."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx, nn

from hra_fx.capture.snapshot import Snapshot
from hra_fx.capture.tracer import RegionTracer
from hra_fx.capture.watch import watching
from hra_fx.errors import CaptureError


@dataclass(frozen=True)
class Traces:
    """The graphs of one module; `train is eval` where the mode makes no difference.

    Attributes:
        train: the graph of the forward in train mode.
        eval: the graph of the forward in eval mode.
        called: paths of the modules that are called in either.
    """

    train: fx.Graph
    eval: fx.Graph
    called: frozenset[str]


def trace(module: nn.Module, sites: set[nn.Module], recorded: tuple[type, ...]) -> Traces:
    """Trace a module in both modes.

    Raises:
        CaptureError: fx cannot trace it, or the graph would not say all that the forward does. The module is as it was.
    """
    train, evaluation = (_trace_once(module, mode, sites, recorded) for mode in (True, False))
    if _code(train) == _code(evaluation):
        train = evaluation
    else:
        for graph, mode in ((train, True), (evaluation, False)):
            if _code(_trace_once(module, mode, sites, recorded)) != _code(graph):
                raise CaptureError("two traces of it differ: its forward depends on something that changes")
    nodes = [*train.nodes, *evaluation.nodes]
    called = frozenset(str(node.target) for node in nodes if node.op == "call_module")
    read = frozenset(str(node.target) for node in nodes if node.op == "get_attr")
    if unused := _unused_state(module, called, read):
        raise CaptureError(f"{unused} has parameters or buffers, and is not used by the traced forward")
    return Traces(train, evaluation, called)


def _trace_once(module: nn.Module, training: bool, sites: set[nn.Module], recorded: tuple[type, ...]) -> fx.Graph:
    with _mode(module, training):
        before = Snapshot(module)
        try:
            with watching() as refused:
                tracer = RegionTracer(sites, recorded, refused)
                graph = tracer.trace(module)
        except CaptureError:
            raise
        except Exception as error:  # whatever the model's own code makes of a proxy
            line = str(error).strip().split("\n")[0]
            raise CaptureError(f"fx cannot trace it ({type(error).__name__}: {line[:160]})") from error
        finally:
            changes = before.changes()
            before.restore()
        if changes:
            raise CaptureError(f"its forward changes or makes {', '.join(changes[:3])} outside of the graph")
    return _plain(graph)


@contextlib.contextmanager
def _mode(module: nn.Module, training: bool) -> Iterator[None]:
    # Set directly: a train() of the model's own may keep parts in eval mode, which the region checks at each call.
    before = [(part, part.training) for part in module.modules()]
    try:
        for part, _ in before:
            part.training = training
        yield
    finally:
        for part, mode in before:
            part.training = mode


def _plain(graph: fx.Graph) -> fx.Graph:
    """The graph without its tie to our tracer, which GraphModule would use again to unpickle it."""
    copy = fx.Graph()
    copy.output(copy.graph_copy(graph, val_map={}))
    return copy


def _code(graph: fx.Graph) -> str:
    return graph.python_code("self").src


def _unused_state(module: nn.Module, called: frozenset[str], read: frozenset[str]) -> str | None:
    for path, part in module.named_modules():
        names = [name for name, _ in (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False))]
        inside_call = any(path == target or path.startswith(f"{target}.") for target in called)
        if names and not inside_call and not any(f"{path}.{name}".lstrip(".") in read for name in names):
            return path or "the module itself"
    return None
