"""Trace the forward of one module into one graph for train and eval mode."""

from __future__ import annotations

import threading
from collections.abc import Collection
from contextlib import ExitStack
from typing import NamedTuple
from unittest import mock

import torch
from torch import fx, nn

from hra_fx.errors import CaptureError
from hra_fx.tracing.by_mode import ByMode, ModesDifferError, merge_modes
from hra_fx.tracing.opaque_calls import OpaqueCalls
from hra_fx.tracing.tracer import ModelTracer
from hra_fx.tracing.unchanged import Snapshot

# fx patches `nn.Module` for the whole process while it traces.
_LOCK = threading.RLock()


class Traced(NamedTuple):
    """The graph of a module.

    Attributes:
        graph: valid in train and in eval mode.
        modules: name -> module, for modules that the graph calls and the traced module does not have.
    """

    graph: fx.Graph
    modules: dict[str, ByMode]


def trace(module: nn.Module, layers: Collection[nn.Module]) -> Traced:
    """Trace a module in both modes; it is not run, and is the same afterwards.

    A module or function without adapted layers inside which cannot be traced stays one call.

    Args:
        module: the module.
        layers: layers that must stay calls, as those to be adapted.

    Raises:
        CaptureError: fx cannot trace it, or the graph would not compute what the forward does.
    """
    return _Trace(module, layers).run()


class _Trace:
    """The traces of one module: each failure makes one more part of it a call, until none is left that could be."""

    def __init__(self, module: nn.Module, layers: Collection[nn.Module]) -> None:
        self._module = module
        self._keep = set(layers)
        self._opaque = OpaqueCalls()
        self._paths = dict(module.named_modules())
        # Modules that must be dissolved, because adapted layers are inside.
        self._open = {part for part in self._paths.values() if not self._keep.isdisjoint(part.modules())}
        self._stack: list[nn.Module] = []

    def run(self) -> Traced:
        """Trace until both modes succeed."""
        while True:
            try:
                in_train, in_eval = self._once(True), self._once(False)
                return Traced(in_train, merge_modes(in_train, in_eval))
            except ModesDifferError as error:
                self._keep_one_of(error)
            except Exception as error:
                if not self._keep_innermost() and not self._opaque.add_culprit(error):
                    raise _as_capture_error(error) from error

    def _once(self, training: bool) -> fx.Graph:
        snapshot = Snapshot(self._module)
        tracer = ModelTracer(self._keep, self._opaque)
        self._stack = []
        with ExitStack() as restore:
            restore.enter_context(_LOCK)
            restore.callback(snapshot.restore)
            for part in self._paths.values():
                part.training = training
            # What is cached between calls is computed in each call while TorchScript traces, and so in a graph.
            restore.enter_context(mock.patch.object(torch.jit, "is_tracing", lambda: True))
            try:
                graph = tracer.trace(self._module)
            except BaseException:
                self._stack = [part for _, part in tracer.innermost]
                raise
            if reason := tracer.why_not_random():
                raise CaptureError(reason)
            if changes := snapshot.changes():
                self._stack = [self._paths[path] for path, _ in changes]
                names = ", ".join(f"{path}.{name}".lstrip(".") for path, name in changes[:3])
                raise CaptureError(f"its forward changes {names}, and a graph does not")
        return graph

    def _keep_innermost(self) -> bool:
        """Make the innermost module that was running a call, if it may be one, and all others of its class."""
        for part in reversed(self._stack):
            if part not in self._open and part not in self._keep:
                self._keep |= {other for other in self._paths.values() if type(other) is type(part)} - self._open
                return True
        return False

    def _keep_one_of(self, error: ModesDifferError) -> None:
        """Make the innermost module of one of the nodes that differ a call."""
        for node in error.nodes:
            stack = node.meta.get("nn_module_stack", {}).values()
            self._stack = [self._paths[path] for path, _ in stack if path in self._paths]
            if self._keep_innermost():
                return
        where = next((path for path, _ in reversed(stack)), "") or type(self._module).__name__
        raise CaptureError(f"{where} computes other operations in train mode than in eval mode")


def _as_capture_error(error: Exception) -> CaptureError:
    if isinstance(error, CaptureError):
        return error
    line = str(error).strip().split("\n")[0]
    return CaptureError(f"fx cannot trace it ({type(error).__name__}: {line[:160]})")
