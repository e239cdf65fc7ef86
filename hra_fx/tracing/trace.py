"""Tracing one module in train and in eval mode, so that nothing is left behind and nothing is taken on trust."""

from __future__ import annotations

import contextlib
import functools
import keyword
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from torch import fx, nn

from hra_fx.errors import CaptureError
from hra_fx.sources import can_be_written
from hra_fx.tracing.call_signature import Calling
from hra_fx.tracing.global_state import Surroundings
from hra_fx.tracing.opaque_calls import Keeping
from hra_fx.tracing.process_state import watching
from hra_fx.tracing.retrace import Bench, RepeatingTracer, SwiftTracer, VaryingTracer, hooks_of
from hra_fx.tracing.sandbox import Sandbox
from hra_fx.tracing.session import Session
from hra_fx.tracing.tracer import RegionTracer, StrayError
from hra_fx.tracing.train_eval import Arguments, note


@dataclass(frozen=True)
class Traces:
    """The graphs of one module; `train is eval` where the mode makes no difference but to constants.

    Attributes:
        train: the graph of the forward in train mode.
        eval: the graph of the forward in eval mode.
        varies: whether it makes one to constants (`hra_fx.tracing.train_eval`).
        called: paths of the modules that are called in either.
        reads: path of a module that is dissolved in the graphs -> names of the attributes that were read of it.
    """

    train: fx.Graph
    eval: fx.Graph
    varies: bool
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
    tracing = _Tracing(module, sites, recorded, calling)
    tracing.run()
    graphs = [tracing.train] if tracing.train is tracing.eval else [tracing.train, tracing.eval]
    nodes = [node for graph in graphs for node in graph.nodes]
    called = frozenset(str(node.target) for node in nodes if node.op == "call_module")
    read = frozenset(str(node.target) for node in nodes if node.op == "get_attr")
    if unused := _unused_state(module, called, read):
        raise CaptureError(f"{unused} has parameters or buffers, and is not used by the traced forward")
    return Traces(tracing.train, tracing.eval, tracing.varies, called, tracing.reads())


class _Tracing:
    """One copy of a module, on which all its traces run: each is refused that leaves a change behind."""

    train: fx.Graph
    eval: fx.Graph
    varies: bool

    def __init__(self, module: nn.Module, sites: Collection[str], recorded: tuple[type, ...], calling: Calling) -> None:
        self._recorded = recorded
        self._calling = calling
        # Those of one mode are known when it is traced again, so that the repeat begins once.
        self._keeping = {True: Keeping(), False: Keeping()}
        self._surroundings = Surroundings(module)
        self._box = box = Sandbox(module)
        paths = {part: path for path, part in box.parts.items()}
        hooks = {part: keys for part in box.parts.values() if (keys := hooks_of(part.__dict__))}
        self._bench = Bench(Session(), paths, box.tensors, box.constants(), {}, hooks)
        self._sites = {self._box.parts[path] for path in sites}
        self._dissolved: dict[str, nn.Module] = {}

    def run(self) -> None:
        """Trace in both modes, and each again where they differ: else they are each other's repeat."""
        with self._surroundings.unchanged(), _told():
            self._bench.session.run(self._box.twin, self._act)

    def _act(self) -> None:
        self.train = self.eval = self._trace(True)
        otherwise = self._vary(self.train)
        if otherwise is None:
            self.eval = self._trace(False)
        self.varies = bool(otherwise)
        if self.train is not self.eval or self.varies:
            self._run(functools.partial(RepeatingTracer, self.eval, otherwise or {}), False)
            self._run(functools.partial(RepeatingTracer, self.train, {}), True)
        for node, (args, kwargs) in (otherwise or {}).items():
            note(node, args, kwargs)

    def _vary(self, graph: fx.Graph) -> dict[fx.Node, Arguments] | None:
        """Trace in eval mode: the nodes that have other constants than in train mode; `None` for another graph."""
        otherwise: dict[fx.Node, Arguments] = {}
        try:
            self._run(functools.partial(VaryingTracer, graph, otherwise), False)
        except StrayError:
            self._keeping[False] = Keeping()
            return None
        return otherwise

    def _trace(self, training: bool) -> fx.Graph:
        """The graph of the forward in one mode."""
        graph = self._run(SwiftTracer, training)
        names = [str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr", "placeholder")]
        if unsayable := [name for name in names if not can_be_written(name) or _has_keyword(name)]:
            raise CaptureError(f"no code can hold the name {unsayable[0]!r}")
        return graph

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
            tracer = make(self._bench, self._sites, self._recorded, refused, self._calling, keeping)
            self._dissolved = self._dissolved or {
                path: part for path, part in box.parts.items() if not path or not tracer.is_leaf_module(part, path)
            }
            with _told():
                graph = tracer.trace(box.twin)
        if changes := box.differences():
            raise CaptureError(f"its forward changes or makes {', '.join(changes[:3])} outside of the graph")
        if box.log.writes:
            raise CaptureError(f"its forward sets {box.log.writes[0]!r} for a while, and a graph does not")
        tracer.refuse_what_was_kept()
        return graph


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Whatever the model's own code makes of a proxy is a `CaptureError`."""
    try:
        yield
    except CaptureError:
        raise
    except Exception as error:
        line = str(error).strip().split("\n")[0]
        raise CaptureError(f"fx cannot trace it ({type(error).__name__}: {line[:160]})") from error


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
