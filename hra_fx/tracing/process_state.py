"""What a graph cannot hold: state of the process that a forward sets, asks for or draws from while it is traced.

A trace runs the forward once. A context such as autocast is left out of the graph, a question such as "is grad enabled"
is answered for good, a random number is drawn for good. Each is seen at the moment that it happens, so code that is
there but does not run (gradient checkpointing that is off) costs nothing.
"""

from __future__ import annotations

import contextlib
import operator
import random
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.autograd.function
import torch.autograd.graph
import torch.utils.checkpoint

from hra_fx.errors import CaptureError

_SEEDS = "it sets the state of a random generator, which a graph does not"

_SETTINGS = "it asks for a setting of the process, which may change between calls"

_FORBIDDEN: tuple[tuple[Any, str, str], ...] = (
    (torch.autocast, "__enter__", "it runs under its own autocast, which a graph drops"),
    (torch.no_grad, "__enter__", "it runs under no_grad, which a graph drops"),
    (torch.enable_grad, "__enter__", "it runs under enable_grad, which a graph drops"),
    (torch.set_grad_enabled, "__init__", "it sets grad mode, which a graph drops"),
    (torch.set_grad_enabled, "__enter__", "it sets grad mode, which a graph drops"),
    (torch.inference_mode, "__enter__", "it runs under inference_mode, which a graph drops"),
    (
        torch.autograd.graph.saved_tensors_hooks,
        "__enter__",
        "it changes what is saved for backward",
    ),
    # Looked up by Function.apply, which may have been bound to a name long before.
    (
        torch.autograd.function,
        "_is_setup_context_defined",
        "it calls a custom autograd function, whose backward is lost",
    ),
    (
        torch.utils.checkpoint,
        "_checkpoint_without_reentrant_generator",
        "it checkpoints activations, which a graph drops",
    ),
    *((home, name, _SEEDS) for home in (torch, torch.random) for name in ("manual_seed", "seed", "set_rng_state")),
    (torch.random, "fork_rng", _SEEDS),
    (random, "seed", _SEEDS),
    (torch, "is_grad_enabled", "it asks whether grad is enabled, which may change between calls"),
    (torch, "is_inference_mode_enabled", "it asks whether inference mode is on, which may change between calls"),
    *((torch, name, _SETTINGS) for name in ("get_default_dtype", "is_autocast_cpu_enabled", "get_autocast_dtype")),
    *((torch, name, _SETTINGS) for name in ("get_autocast_gpu_dtype", "are_deterministic_algorithms_enabled")),
    (torch, "is_autocast_enabled", "it asks whether autocast is on, which may change between calls"),
)


#: Parts of torch that act for the model's code that called or decorated with them; the rest of torch is excused.
_ON_BEHALF = ("torch.utils._contextlib", "torch.amp.autocast_mode", "torch.utils.checkpoint", "torch.autograd.function")


@contextlib.contextmanager
def watching() -> Iterator[list[str]]:
    """Run a trace; raises `CaptureError` as soon as it touches what a graph cannot hold, or drew a random number.

    Yields the list of reasons so far, which the tracer adds to: a forward that catches the error is refused all the
    same. The random states of Python, numpy and torch are put back in any case. Other threads are let alone.
    """
    refused: list[str] = []
    generators = _random_states()
    # set_grad_enabled acts when it is made, which may be before it is refused.
    grad = torch.is_grad_enabled()
    watched = [(owner, name, owner.__dict__[name], reason) for owner, name, reason in _FORBIDDEN]
    try:
        try:
            for owner, name, original, reason in watched:
                setattr(owner, name, _refusing(original, reason, refused))
            yield refused
        finally:
            for owner, name, original, _ in watched:
                setattr(owner, name, original)
        if refused:
            raise CaptureError(refused[0])
        if not all(generator.is_same(generator.before, generator.get()) for generator in generators):
            raise CaptureError("it draws random numbers outside of torch operators on its input")
    finally:
        torch.set_grad_enabled(grad)
        for generator in generators:
            generator.put(generator.before)


def _refusing(original: Any, reason: str, refused: list[str]) -> Any:
    thread = threading.get_ident()

    def refuse(*args: Any, **kwargs: Any) -> Any:
        caller = sys._getframe(1).f_globals.get("__name__", "")
        # torch asks and sets these for itself all the time; only the model's own code counts.
        excused = caller.split(".")[0] == "torch" and (caller not in _ON_BEHALF or reason is _SETTINGS)
        if threading.get_ident() != thread or excused:
            return original(*args, **kwargs)
        refused.append(reason)
        raise CaptureError(reason)

    return refuse


class _Generator(NamedTuple):
    """A source of random numbers: the state that it was in, and how to get, put back and compare one."""

    before: Any
    get: Callable[[], Any]
    put: Callable[[Any], Any]
    is_same: Callable[[Any, Any], bool]


def _random_states() -> list[_Generator]:
    sources: list[tuple[Callable[[], Any], Callable[[Any], Any], Callable[[Any, Any], bool]]] = [
        (random.getstate, random.setstate, operator.eq),
        (torch.get_rng_state, torch.set_rng_state, torch.equal),
    ]
    if numpy := sys.modules.get("numpy"):
        sources.append((numpy.random.get_state, numpy.random.set_state, _equal))
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        sources.append((torch.cuda.get_rng_state_all, torch.cuda.set_rng_state_all, _equal))
    return [_Generator(get(), get, put, is_same) for get, put, is_same in sources]


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    if hasattr(a, "shape"):
        return bool((a == b).all())
    return bool(a == b)
