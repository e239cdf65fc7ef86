"""What TorchDynamo makes of one call, recorded by a backend that compiles nothing.

A call that is one graph is only traced: the backend stops it before anything runs. A call with graph breaks has to run,
since what follows a break depends on what came out before it: that of a copy, which has the parameters of the model and
buffers of its own. Either way the model, the random numbers and what the user has compiled are as before.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
import operator
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from hra_fx.compat import allowed_in_graph, dynamo_codes, dynamo_settings, pytree, reset_code
from hra_fx.functional.householder import orthonormalize
from hra_fx.layers import variants as forms
from hra_fx.layers.adapters import rotated_weight
from hra_fx.model.example_inputs import Call, fresh

#: What TorchDynamo is to leave whole.
ONE_NODE: tuple[Callable[..., Any], ...] = (
    forms.reflected_rows,
    forms.patch_coordinates,
    forms.patch_image,
    rotated_weight,
    orthonormalize,
)
#: Settings of TorchDynamo that a user may have, and under which nothing or something else would be recorded.
_SETTINGS = {
    "disable": False,
    "suppress_errors": False,
    "error_on_recompile": False,
    "automatic_dynamic_shapes": False,
    "recompile_limit": 1000,
    "accumulated_recompile_limit": 100_000,
}


@dataclass(frozen=True)
class Recorded:
    """One graph.

    Attributes:
        graph: a copy that no module owns.
        owned: what its nodes take from the module that it was recorded with, by target.
        values: what the call gave to each of its placeholders.
    """

    graph: fx.Graph
    owned: dict[str, Any]
    values: tuple[Any, ...]


class _Stop(BaseException):
    """Ends a call before it runs; no `Exception`, for those become errors of the backend."""


@dataclass
class _Recorder:
    """A backend that keeps the graphs, and runs them as they are, or stops."""

    stop: bool
    graphs: list[Recorded] = field(default_factory=list)

    def __call__(self, module: fx.GraphModule, values: list[Any]) -> Callable[..., Any]:
        targets = [str(node.target) for node in module.graph.nodes if node.op in ("get_attr", "call_module")]
        owned = {target: operator.attrgetter(target)(module) for target in targets}
        self.graphs.append(Recorded(copy.deepcopy(module.graph), owned, tuple(values)))
        if self.stop:
            raise _Stop
        return module.forward


def outputs(*found: Tensor) -> tuple[Tensor, ...]:
    """A node that names the outputs of a model, in their order; TorchDynamo has another, with more among them."""
    return found


def _call(self: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return self(*args, **kwargs)


def _flat_call(self: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
    return outputs(*[leaf for leaf in pytree.tree_leaves(self(*args, **kwargs)) if isinstance(leaf, Tensor)])


def record_whole(model: nn.Module, call: Call) -> Recorded | None:
    """The one graph of a call, with a node `outputs`; `None` where there is a graph break, or any trouble."""
    recorder = _Recorder(stop=True)
    with _undisturbed(model):
        compiled = _compile(_flat_call, recorder)
        # Whatever it was, the call in pieces meets it again, and says so.
        with contextlib.suppress(_Stop, Exception):
            compiled(model, *call)
    return recorder.graphs[0] if recorder.graphs else None


def record_pieces(model: nn.Module, call: Call) -> list[Recorded]:
    """The graphs of a call between its graph breaks, in the order in which they were first run.

    Args:
        model: it runs, and its buffers may change: `twin` of the model that is meant.
        call: it runs on a copy of these.
    """
    recorder = _Recorder(stop=False)
    with _undisturbed(model):
        _compile(_call, recorder)(model, *fresh(call))
    return recorder.graphs


def _compile(function: Callable[..., Any], recorder: _Recorder) -> Callable[..., Any]:
    settings: dict[str, Any] = {"fullgraph": recorder.stop, "dynamic": False}
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
        # What the user compiles has a limit for each code object, against which the runs of this one then do not count.
        settings["isolate_recompiles"] = True
    compiled: Callable[..., Any] = torch.compile(function, backend=recorder, **settings)
    return compiled


def error_of(model: nn.Module, call: Call) -> Exception | None:
    """What a model itself raises at a call, if it does: give a `twin` of the model that is meant."""
    args, kwargs = fresh(call)
    with warnings.catch_warnings(), _same_chance(model), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            model(*args, **kwargs)
        except Exception as error:
            return error
    return None


def twin(model: nn.Module) -> nn.Module:
    """A copy with the parameters of the model, and all else its own."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


@contextlib.contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """TorchDynamo with settings of ours and reflections as nodes; random numbers and its caches as before."""
    said = {warnings.warn, print, *(method for method in vars(logging.Logger).values() if callable(method))}
    known = {id(code) for code in dynamo_codes()}
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(_same_chance(model))
        stack.enter_context(dynamo_settings(_SETTINGS, ignored_functions=said))
        stack.enter_context(torch.compiler.set_stance("default"))
        stack.enter_context(allowed_in_graph((*ONE_NODE, outputs)))
        try:
            yield
        finally:
            # Those that were compiled before keep what they have: that of this backend serves no other.
            for code in dynamo_codes():
                if id(code) not in known or code in (_call.__code__, _flat_call.__code__):
                    reset_code(code)


@contextlib.contextmanager
def _same_chance(model: nn.Module) -> Iterator[None]:
    """The random numbers after are as if nothing had been drawn."""
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    numpy = sys.modules.get("numpy")
    states = random.getstate(), numpy.random.get_state() if numpy else None
    with torch.random.fork_rng(devices=list(devices)):
        try:
            yield
        finally:
            random.setstate(states[0])
            if numpy:
                numpy.random.set_state(states[1])
