"""A region: a module whose rewritten graphs run in place of its Python forward, as long as their facts hold."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn

from hra_fx.capture.admission import required_arguments
from hra_fx.capture.facts import Fact, Watch, fact, watch
from hra_fx.capture.trace import Traces
from hra_fx.carrier.swap import original_class


class Region:
    """The graphs of one module, for train and eval mode, and what they rest on.

    Attributes:
        graphs: `training -> torch.fx.Graph`; one object twice where the mode makes no difference.
        sites: paths, below the region's root, of the sites that the graphs call.
        reason: why the region is not larger; empty for a model that was captured whole.
    """

    def __init__(self, root: nn.Module, traces: Traces, sites: frozenset[str], reason: str) -> None:
        """A region over `root` whose graphs are not rewritten yet."""
        self.graphs: dict[bool, fx.Graph] = {True: traces.train, False: traces.eval}
        self.sites = sites
        self.reason = reason
        self._arguments = tuple(required_arguments(original_class(root).forward))
        self._by_mode = traces.train is not traces.eval
        self._watched = tuple(
            path for path, _ in root.named_modules() if not _is_below(path, traces.called - sites, sites)
        )
        self._facts: tuple[Fact, ...] = ()
        self._unbind()

    def _unbind(self) -> None:
        self._bound = False
        self._watches: tuple[Watch, ...] | None = None
        self._programs: dict[bool, Callable[..., Any]] = {}

    def settle(self, root: nn.Module) -> None:
        """Take down the facts, once the reflections are in place below `root`."""
        self._facts = self._take_down(root)
        self._bind(root)

    def program(self, root: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Callable[..., Any] | None:
        """The compiled graph for a call, or `None` where the Python forward has to run.

        That is so while torch.compile, torch.export or another fx tracer reads the model, where an optional argument is
        given, and where a fact no longer holds.
        """
        if kwargs or len(args) != len(self._arguments) or torch.compiler.is_compiling():
            return None
        if any(isinstance(value, fx.Proxy) for value in args):
            return None
        if not self._bound:
            self._bind(root)
        training = root.training
        mode = training if self._by_mode else None
        if self._watches is None or not all(item.holds(mode) for item in self._watches):
            return None
        if training not in self._programs:
            self._programs[training] = type(self.graph_module(root, training)).forward
        return self._programs[training]

    def graph_module(self, root: nn.Module, training: bool) -> fx.GraphModule:
        """A GraphModule of its own over the modules and parameters of `root`."""
        module = fx.GraphModule(root, copy.deepcopy(self.graphs[training]), original_class(root).__name__)
        module.training = training
        return module

    def _bind(self, root: nn.Module) -> None:
        self._bound = True
        # A copy or an unpickled model may have been edited before its first call.
        if self._take_down(root) == self._facts:
            self._watches = tuple(
                watch(part, opaque=path in self.sites, dissolved=bool(path) and path not in self.sites)
                for path, part in self._parts(root)
            )

    def _take_down(self, root: nn.Module) -> tuple[Fact, ...]:
        return tuple(fact(path, part, opaque=path in self.sites) for path, part in self._parts(root))

    def _parts(self, root: nn.Module) -> list[tuple[str, nn.Module]]:
        return [(path, part) for path, part in root.named_modules() if path in self._watched]

    def __getstate__(self) -> dict[str, Any]:
        """All but what is bound to the live modules."""
        state = dict(vars(self))
        del state["_bound"], state["_watches"], state["_programs"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unbound, to be bound at the first call."""
        vars(self).update(state)
        self._unbind()


def _is_below(path: str, called: frozenset[str], sites: frozenset[str]) -> bool:
    in_call = any(path == target or path.startswith(f"{target}.") for target in called)
    return in_call or any(path.startswith(f"{site}.") for site in sites)
