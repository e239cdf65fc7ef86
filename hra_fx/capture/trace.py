"""Tracing one module in train and in eval mode, so that nothing is left behind and nothing is taken on trust."""

from __future__ import annotations

import keyword
from collections.abc import Collection
from dataclasses import dataclass

from torch import fx, nn

from hra_fx.capture.calling import Calling
from hra_fx.capture.reading import ReadingLog
from hra_fx.capture.sandbox import differences, sandbox
from hra_fx.capture.surroundings import unchanged_surroundings
from hra_fx.capture.tracer import RegionTracer
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
    """Trace copies of a module in both modes; the module itself is not run.

    Args:
        module: the root of the region to be.
        sites: paths, below the root, of layers that must stay calls.
        recorded: classes whose outputs transformers collects by hooks.
        calling: how it is called.

    Raises:
        CaptureError: fx cannot trace it, or the graph would not say all that the forward does.
    """
    runs = {mode: _trace_once(module, mode, sites, recorded, calling) for mode in (True, False)}
    graphs = {mode: graph for mode, (graph, _) in runs.items()}
    if _code(graphs[True]) == _code(graphs[False]):
        graphs[True] = graphs[False]
    else:
        for mode in (False, True):
            if _code(_trace_once(module, mode, sites, recorded, calling)[0]) != _code(graphs[mode]):
                raise CaptureError("two traces of it differ: its forward depends on something that changes")
    nodes = [*graphs[True].nodes, *graphs[False].nodes]
    called = frozenset(str(node.target) for node in nodes if node.op == "call_module")
    read = frozenset(str(node.target) for node in nodes if node.op == "get_attr")
    if unused := _unused_state(module, called, read):
        raise CaptureError(f"{unused} has parameters or buffers, and is not used by the traced forward")
    logs = [log for _, log in runs.values()]
    reads = {path: logs[0].get(path, frozenset()) | logs[1].get(path, frozenset()) for path in logs[0].keys() | logs[1]}
    return Traces(graphs[True], graphs[False], called, reads)


def _trace_once(
    module: nn.Module, training: bool, sites: Collection[str], recorded: tuple[type, ...], calling: Calling
) -> tuple[fx.Graph, dict[str, frozenset[str]]]:
    twin = sandbox(module, training)
    log = ReadingLog()
    with unchanged_surroundings(twin), watching() as refused:
        tracer = RegionTracer({twin.get_submodule(path) for path in sites}, recorded, refused, calling)
        dissolved = {
            path: part for path, part in twin.named_modules() if not path or not tracer.is_leaf_module(part, path)
        }
        try:
            for part in twin.modules():
                log.put_on(part)
            graph = _plain(tracer.trace(twin))
        except CaptureError:
            raise
        except Exception as error:  # whatever the model's own code makes of a proxy
            line = str(error).strip().split("\n")[0]
            raise CaptureError(f"fx cannot trace it ({type(error).__name__}: {line[:160]})") from error
    names = [str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr", "placeholder")]
    if unsayable := [name for name in names if not can_be_written(name) or _has_keyword(name)]:
        raise CaptureError(f"no code can hold the name {unsayable[0]!r}")
    if changes := differences(module, twin, training):
        raise CaptureError(f"its forward changes or makes {', '.join(changes[:3])} outside of the graph")
    if log.writes:
        raise CaptureError(f"its forward sets {log.writes[0]!r} for a while, and a graph does not")
    return graph, {path: log.reads(part) for path, part in dissolved.items()}


def _plain(graph: fx.Graph) -> fx.Graph:
    """The graph without its tie to our tracer, which GraphModule would use again to unpickle it."""
    copy = fx.Graph()
    copy.output(copy.graph_copy(graph, val_map={}))
    for node in copy.nodes:
        if stack := node.meta.get("nn_module_stack"):
            # The classes of the copy that was traced log reads; the graph is of the classes below them.
            node.meta["nn_module_stack"] = {key: (path, below(kind)) for key, (path, kind) in stack.items()}
    return copy


def _has_keyword(name: str) -> bool:
    return any(keyword.iskeyword(part) for part in name.split("."))


def _code(graph: fx.Graph) -> str:
    return graph.python_code("self").src


def _unused_state(module: nn.Module, called: frozenset[str], read: frozenset[str]) -> str | None:
    for path, part in module.named_modules():
        names = [name for name, _ in (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False))]
        inside_call = any(path == target or path.startswith(f"{target}.") for target in called)
        if names and not inside_call and not any(f"{path}.{name}".lstrip(".") in read for name in names):
            return path or "the module itself"
    return None
