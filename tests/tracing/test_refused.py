"""What a graph cannot do is refused with a reason, and the model is as before; what errors of calls say."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from adapting import picture
from graph_modules import COPIES, X, config
from torch import Tensor, nn
from torch.export import Dim
from tracing.captured import bert, tokens
from tracing.models import Branches, Dropout, Straight, Two

import hra_fx
from hra_fx.errors import AdapterError, SelectionError


def middle(change: Callable[[Any, Tensor], Any], base: type[Two] = Branches) -> type[Any]:
    """A model that does something between its two layers. torch.fx does not trace `Branches`."""
    return type("Changed", (base,), {"middle": change})


def clamped(self: Any, hidden: Tensor) -> Tensor:
    return hidden.clamp(-1, 1) if (hidden.abs() > 100).any() else hidden


def detached(self: Any, hidden: Tensor) -> Tensor:
    with torch.no_grad():
        scale = hidden.abs().mean()
    return hidden * scale


def counted(self: Any, hidden: Tensor) -> Tensor:
    self.calls = getattr(self, "calls", 0) + 1
    return hidden


def rounded(self: Any, hidden: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return hidden @ hidden.T @ hidden


def widened(self: Any, hidden: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return hidden.exp()


class HooksModule(Branches):
    def __init__(self) -> None:
        super().__init__()
        self.register_full_backward_hook(lambda module, given, grads: None)


class Assigned(nn.Module):
    """Assigns a buffer. Its call has two arguments, so the graph has its operators."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: Tensor, share: float) -> Tensor:
        self.mean = (1 - share) * self.mean + share * x.detach().mean(0)
        return x


class Assigning(Branches):
    def __init__(self) -> None:
        super().__init__()
        self.average = Assigned()

    def middle(self, hidden: Tensor) -> Any:
        return self.average(hidden, 0.1)


LINE = r"at \w+\.py, line \d+, `.*`"
DRAWS = "in eval mode, its use of random numbers.* differs for the example"
CUSTOM = "in eval mode, its set of custom autograd functions differs for the example: {'Straight'}"
CAPTURES: dict[str, tuple[type[nn.Module], str]] = {
    "modes": (
        middle(lambda self, hidden: self.first(hidden[:, :6]) if self.training else hidden),
        f"it calls first in one mode only {LINE}",
    ),
    "values": (middle(clamped), f"torch.export fails {LINE} .*data-dependent"),
    "autocast": (middle(rounded), f"it runs a block of operators .wrap_with_autocast. {LINE}"),
    "autocast off": (middle(widened), f"it runs a block of operators .wrap_with_autocast. {LINE}"),
    "write": (
        middle(lambda self, hidden: torch.no_grad()(hidden.mul_)(2) + hidden),
        f"it writes into a tensor.* {LINE}",
    ),
    "cast": (middle(lambda self, hidden: torch.no_grad()(hidden.float)() * hidden), f"it may return an input.* {LINE}"),
    "cond": (
        middle(lambda self, hidden: torch.cond(hidden.sum() > 0, torch.sin, torch.cos, (hidden,))),
        f"it runs a block of operators .cond. {LINE}",
    ),
    "counter": (middle(counted), "in eval mode, its forward changes calls, which a graph drops"),
    "buffer": (Assigning, r"in eval mode, its buffer average\.mean differs"),
    # Behind a ReLU of negative values, the gradients are equal for this example alone.
    "autograd function": (middle(lambda self, hidden: torch.relu(Straight.apply(hidden) - 100)), CUSTOM),
    "tensor hook": (
        middle(lambda self, hidden: (hidden.register_hook(lambda grad: grad * 2), hidden)[1]),
        "it adds a hook to a tensor",
    ),
    "module hook": (HooksModule, "backward hooks are registered for it, which a graph drops"),
    "numpy": (middle(lambda self, hidden: hidden if np.random.rand() < 0.5 else torch.tanh(hidden)), DRAWS),
    "seed": (middle(lambda self, hidden: (torch.manual_seed(3), hidden)[1]), DRAWS),
}


@pytest.mark.parametrize("name", CAPTURES)
def test_what_a_capture_would_drop_is_refused(name: str) -> None:
    make, reason = CAPTURES[name]
    model = make().double().requires_grad_(name != "autograd function")
    before, draws = picture(model), (random.getstate(), np.random.get_state()[2], torch.get_rng_state().tolist())
    message = rf"torch\.export cannot capture {make.__name__}: {reason}.*\. Leave out trace=True"
    with pytest.raises(AdapterError, match=message):
        hra_fx.transform(model, config(), trace=True, example_inputs=X)
    assert picture(model) == before
    assert (random.getstate(), np.random.get_state()[2], torch.get_rng_state().tolist()) == draws


class Hooked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = Two()
        self.first.register_forward_hook(lambda module, args, output: output * 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x)


class NoArguments(Two):
    def forward(self, *x: Tensor) -> Tensor:
        return self.second(self.first(x[0]))


MODES, RANDOM = "it calls first in one mode only", "it draws random numbers in Python or seeds"
TRACES: dict[str, tuple[type[nn.Module], str]] = {
    "if": (middle(clamped, Two), "it branches on a value"),
    "autocast": (middle(rounded, Two), "it changes grad mode or autocast, or calls a custom autograd function"),
    "no_grad": (middle(detached, Two), "it changes grad mode or autocast"),
    "autocast off": (middle(widened, Two), "it changes grad mode or autocast"),
    "random": (middle(lambda self, hidden: hidden * random.random(), Two), RANDOM),
    "isinstance": (
        middle(lambda self, hidden: hidden * 2 if isinstance(hidden, Tensor) else hidden, Two),
        "its output 0 differs for .*Perhaps its forward asks for the class of a value",
    ),
    "int": (middle(lambda self, hidden: hidden * int(hidden.shape[0]), Two), "not 'ValueProxy'"),
    "tensor": (middle(lambda self, hidden: hidden * torch.tensor(2.0), Two), "it creates a tensor in Python"),
    "attribute": (middle(counted, Two), "its forward changes calls"),
    "hooks": (Hooked, "first: it has hooks"),
    "no arguments": (NoArguments, "its forward does not have a required argument"),
    "modes": (middle(lambda self, hidden: hidden if self.training else self.first(hidden[:, :6]), Two), MODES),
}


@pytest.mark.parametrize("name", TRACES)
def test_what_torch_fx_cannot_trace_is_refused_without_an_example(name: str) -> None:
    make, reason = TRACES[name]
    model = make().double()
    before, draws = picture(model), (random.getstate(), torch.get_rng_state().tolist())
    with pytest.raises(AdapterError, match=rf"torch\.fx cannot trace {make.__name__}: .*{reason}.*example_inputs"):
        hra_fx.transform(model, config(*(["first.first"] if make is Hooked else [])), trace=True)
    assert picture(model) == before
    assert (random.getstate(), torch.get_rng_state().tolist()) == draws
    assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


CALLS: dict[str, tuple[type[nn.Module], dict[str, Any], type[Exception], str]] = {
    "arguments": (Branches, {"example_inputs": (X, X, X)}, AdapterError, "the example does not fit its forward"),
    "example": (Branches, {"example_inputs": 3}, AdapterError, "example_inputs must be a tensor, .*, got int"),
    "dtype": (
        Branches,
        {"example_inputs": X.float()},
        AdapterError,
        r"Branches: in eval mode, it does not run on the example \(RuntimeError: mat1 and mat2.*\)\. Pass `example_in",
    ),
    "modules_to_save": (Dropout, {"config": config(modules_to_save=["nowhere"])}, SelectionError, "nowhere"),
    "dynamic_shapes": (
        Two,
        {"trace": False, "dynamic_shapes": ({0: Dim("batch")},)},
        AdapterError,
        "`dynamic_shapes` needs trace=True",
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_wrong_call_leaves_the_model_as_it_was(name: str) -> None:
    make, options, kind, message = CALLS[name]
    model = make().double().eval()
    before = picture(model)
    with pytest.raises(kind, match=message):
        hra_fx.transform(model, **({"config": config(), "trace": True} | options))
    assert picture(model) == before


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")  # a new name in transformers 6
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model.to("meta"), "bert.embeddings.word_embeddings.weight is on the meta device"),
        (lambda model: model.train().gradient_checkpointing_enable(), "checkpoints its activations, which a graph"),
        (lambda model: hra_fx.transform(model, config("key")), r"already has adapters.*hra_fx\.graphs\(model\)"),
    ],
)
def test_a_state_that_a_graph_would_drop_is_refused(change: Callable[[Any], object], message: str) -> None:
    model = bert()
    change(model)
    before = picture(model)
    with pytest.raises(AdapterError, match=message):
        hra_fx.transform(model, config("query"), "other", trace=True, example_inputs=tokens(2, 5))
    assert picture(model) == before


@pytest.mark.parametrize("copied", [lambda graph: graph, *COPIES], ids=["graph", "deepcopy", "pickle", "torch.save"])
def test_a_graph_says_that_it_is_one_of_its_call(copied: Callable[[Any], Any]) -> None:
    graph = copied(hra_fx.transform(Two().double(), config(), trace=True))
    with pytest.raises(TypeError, match="unexpected keyword argument 'labels'"):
        graph(X, labels=X)
    with pytest.raises(
        AttributeError, match=r"no attribute 'generate'\. This is a graph of one call: use the original"
    ):
        graph.generate(X)
    assert graph(X).shape == (4, 5) and not hasattr(graph, "config")
