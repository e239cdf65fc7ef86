"""A region: a module whose rewritten graphs run in place of its Python forward, as long as their facts hold."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.module import _has_any_global_hook

from hra_fx.errors import CaptureError
from hra_fx.layers.class_swap import original_class
from hra_fx.tracing.call_signature import Calling
from hra_fx.tracing.guards import Fact, ModuleWatch, Watch, fact, watch
from hra_fx.tracing.share_modules import over
from hra_fx.tracing.trace import Traces, is_within
from hra_fx.tracing.train_eval import put_in_mode
from passes.absorb import AbsorbPass


class Region:
    """The graphs of one module, for train and eval mode, and what they rest on.

    Attributes:
        sites: paths, below the region's root, of the sites that the graphs call.
        reason: why the region is not larger; empty for a model that was captured whole.
    """

    def __init__(self, root: nn.Module, traces: Traces, sites: frozenset[str], reason: str, calling: Calling) -> None:
        """A region over `root` whose graphs are not rewritten yet.

        Raises:
            CaptureError: the graphs rest on something that may change unseen.
        """
        self._graphs: dict[bool, fx.Graph] = {True: traces.train, False: traces.eval}
        self._varies = traces.varies
        self.sites = sites
        self.reason = reason
        self._calling = calling
        self._by_mode = traces.varies or traces.train is not traces.eval
        called = traces.called - sites
        self._asked = frozenset(path for path in traces.reads if _is_below(path, called, frozenset()))
        parts = [
            (path, part)
            for path, part in root.named_modules()
            if path in self._asked or not _is_below(path, called, sites)
        ]
        self._reads = {path: traces.reads.get(path, frozenset()) for path, _ in parts}
        self._facts: tuple[Fact, ...] = self._take_down(parts)
        self._unbind()

    def drafts(self) -> list[fx.Graph]:
        """The graphs to be rewritten, one for both modes where these differ in constants at most."""
        return list({id(graph): graph for graph in self._graphs.values()}.values())

    @property
    def graphs(self) -> dict[bool, fx.Graph]:
        """`training -> torch.fx.Graph`; one object twice where the mode makes no difference."""
        if self._varies:
            graphs = self._graphs.items()
            self._graphs = {mode: put_in_mode(copy.deepcopy(graph), training=mode) for mode, graph in graphs}
            self._varies = False
        return self._graphs

    def _unbind(self) -> None:
        self._root: weakref.ref[nn.Module] | None = None
        self._watches: tuple[Watch, ...] = ()
        self._modules: tuple[ModuleWatch, ...] = ()
        self._programs: dict[bool, Callable[..., Any]] = {}
        self._passed_by: set[tuple[bool, bool]] = set()

    def settle(self, root: nn.Module) -> None:
        """Take down the facts, once the reflections are in place below `root`."""
        parts = self._parts(root)
        self._facts = self._take_down(parts)
        self._watch(root, parts)

    def program(
        self, root: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Callable[..., Any], list[Tensor]] | None:
        """The compiled graph for a call and what to call it with, or `None` where the Python forward has to run.

        That is so while torch.compile, torch.export or another fx tracer reads the model; where the call is made in
        another way than the graph was (`hra_fx.tracing.call_signature`); under global hooks; and where a fact no longer holds.
        """
        if torch.compiler.is_compiling() or _has_any_global_hook():  # type: ignore[no-untyped-call]
            return None
        tensors = self._calling.tensors(args, kwargs)
        if tensors is None:
            return None
        if self._root is None:
            self._bind(root)
        # A shallow copy and a replica of DataParallel share this object, and not the attributes that it watches.
        if self._root is None or self._root() is not root:
            return None
        training = root.training
        if not self._holds(training):
            return None
        if training not in self._programs:
            graph_module = AbsorbPass().call(self.graph_module(root, training)).graph_module
            self._programs[training] = type(graph_module).forward
        return self._programs[training], tensors

    def is_new(self, root: nn.Module) -> bool:
        """Whether a call that runs the Python forward is the first for this mode, and for facts that hold or do not."""
        if self._root is None or self._root() is not root or len(self._passed_by) == 4:
            return False
        key = root.training, self._holds(root.training)
        known = key in self._passed_by
        self._passed_by.add(key)
        return not known

    def _holds(self, training: bool) -> bool:
        mode = training if self._by_mode else None
        return (
            bool(self._modules)
            and all(item.holds(mode) for item in self._modules)
            and all(item.holds() for item in self._watches)
        )

    def graph_module(self, root: nn.Module, training: bool) -> fx.GraphModule:
        """A GraphModule of its own over the modules and parameters of `root`."""
        graph = put_in_mode(copy.deepcopy(self._graphs[training]), training=training)
        module = over(root, graph, original_class(root).__name__)
        module.training = training
        return module

    def _bind(self, root: nn.Module) -> None:
        """Watch `root` from now on, if it is as its facts say."""
        self._root = weakref.ref(root)
        parts = self._parts(root)
        try:
            facts = self._take_down(parts)
        except CaptureError:
            return
        # A copy or an unpickled model may have been edited before its first call.
        if facts == self._facts:
            self._watch(root, parts)

    def _watch(self, root: nn.Module, parts: list[tuple[str, nn.Module]]) -> None:
        self._root = weakref.ref(root)
        bound = [watch(part, self._reads[path], self._role(path)) for path, part in parts]
        self._modules = tuple(module for module, _ in bound)
        self._watches = tuple(item for _, items in bound for item in items)

    def _role(self, path: str) -> str:
        if path in self._asked:
            return "asked"
        return "site" if path in self.sites else "dissolved" if path else "root"

    def _take_down(self, parts: list[tuple[str, nn.Module]]) -> tuple[Fact, ...]:
        return tuple(fact(path, part, self._reads[path]) for path, part in parts)

    def _parts(self, root: nn.Module) -> list[tuple[str, nn.Module]]:
        return [(path, part) for path, part in root.named_modules() if path in self._reads]

    def __getstate__(self) -> dict[str, Any]:
        """All but what is bound to the live modules."""
        state = dict(vars(self))
        for bound in ("_root", "_watches", "_modules", "_programs", "_passed_by"):
            del state[bound]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unbound, to be bound at the first call."""
        vars(self).update(state)
        self._unbind()


def _is_below(path: str, called: frozenset[str], sites: frozenset[str]) -> bool:
    return is_within(path, called) or is_within(path.rpartition(".")[0], sites)
