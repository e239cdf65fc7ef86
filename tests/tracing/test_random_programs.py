"""Random programs of what graphs often get wrong: each graph is refused, or right on calls that nobody compared."""

from __future__ import annotations

import copy
import os
import pickle
import random
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from adapting import picture
from torch import Tensor, nn

import hra_fx
from hra_fx.errors import AdapterError

CONFIG = hra_fx.HRAConfig(r=2, target_modules=["first", "second"])

#: A part of a program: what it adds to the model, and what it computes from `(model, hidden, mask)`.
Part = tuple[Callable[[Any], Any], Callable[[Any, Tensor, Any], Any]]


def nothing(model: Any) -> None:
    """Most parts add nothing."""


def step(compute: Callable[[Any, Tensor, Any], Any], add: Callable[[Any], Any] = nothing) -> Part:
    return add, compute


def counted(holder: Callable[[Any], Any], add: Callable[[Any], Any]) -> Part:
    """Counts its calls in a dictionary that `holder` finds, in train mode."""

    def count(model: Any, hidden: Tensor, mask: Any) -> Tensor:
        state = holder(model)
        state["steps"] = state["steps"] + (1 if model.training else 0)
        return hidden + state["steps"]

    return add, count


def evaluated(model: Any, hidden: Tensor, mask: Any) -> Tensor:
    model.part.eval()
    found: Tensor = model.part(hidden)
    return found


def previous(model: Any, hidden: Tensor, mask: Any) -> Tensor:
    before, model.before = model.before, hidden.detach().mean()
    return hidden if before is None else hidden + before


def cached(model: Any, hidden: Tensor, mask: Any) -> Tensor:
    if model.shift is None:
        model.shift = hidden.detach().mean()
    return hidden + model.shift


def auxiliary(model: Any, hidden: Tensor, mask: Any) -> Tensor:
    model.aux = hidden.pow(2).mean()
    return hidden


def tried(model: Any, hidden: Tensor, mask: Any) -> Tensor:
    try:
        return hidden.view(-1, 3, 5, 7)
    except RuntimeError:
        return hidden * 2


def inverted(model: Any, hidden: Tensor, mask: Any) -> Tensor:
    if mask is None:
        return hidden * 2
    return hidden * (~mask if mask.dtype is torch.bool else mask)


def batch_norm(model: Any, hidden: Tensor, mask: Any) -> Tensor:
    norm = model.stats
    return F.batch_norm(hidden, norm.running_mean, norm.running_var, norm.weight, norm.bias, model.training)


def kept(name: str, value: Callable[[], Any]) -> Callable[[Any], Any]:
    return lambda model: setattr(model, name, value())


def offset(layer: nn.Linear, given: Any, output: Tensor | None = None) -> Any:
    """A hook before or after a layer, with a parameter that starts at zero."""
    return (given[0] + layer.offset,) if output is None else output * 3 + layer.offset


def hooked(register: str) -> Callable[[Any], Any]:
    def add(model: Any) -> None:
        model.leaf.offset = nn.Parameter(torch.zeros(8))
        getattr(model.leaf, register)(offset)

    return add


#: What a graph may get wrong, and parts that every graph computes correctly.
PARTS: dict[str, Part] = {
    "eval in forward": step(evaluated, kept("part", lambda: nn.Sequential(nn.BatchNorm1d(8), nn.Dropout(0.5)))),
    "hook": step(lambda model, hidden, mask: model.leaf(hidden), hooked("register_forward_hook")),
    "pre-hook": step(lambda model, hidden, mask: model.leaf(hidden), hooked("register_forward_pre_hook")),
    "mask": step(inverted),
    "type": step(lambda model, hidden, mask: hidden * (2 if type(hidden) is Tensor else 1)),
    "isinstance": step(lambda model, hidden, mask: hidden * 2 if isinstance(hidden, Tensor) else hidden),
    "hasattr": step(lambda model, hidden, mask: hidden if hasattr(hidden, "logits") else hidden * 2),
    "dtype as key": step(lambda model, hidden, mask: hidden * {"torch.float32": 2.0}.get(str(hidden.dtype), 1.0)),
    "size as key": step(lambda model, hidden, mask: hidden * (2 if hidden.shape[0] in {1, 3} else 1)),
    "tracing": step(lambda model, hidden, mask: hidden * 2 if torch.jit.is_tracing() else hidden),
    "try": step(tried),
    "grad mode": step(lambda model, hidden, mask: hidden * 2 if torch.is_grad_enabled() else hidden),
    "requires grad": step(lambda model, hidden, mask: hidden * (2 if hidden.requires_grad else 1)),
    "no_grad": step(lambda model, hidden, mask: torch.no_grad()(torch.tanh)(hidden) + hidden),
    "namespace": counted(lambda model: vars(model.state), kept("state", lambda: SimpleNamespace(steps=0))),
    "nested": counted(lambda model: model.state["a"], kept("state", lambda: {"a": {"steps": 0}})),
    "listed": counted(lambda model: model.state[0], kept("state", lambda: [{"steps": 0}])),
    "previous": step(previous, kept("before", lambda: None)),
    "cached": step(cached, kept("shift", lambda: None)),
    "auxiliary": step(auxiliary, kept("aux", lambda: None)),
    "one row": step(lambda model, hidden, mask: hidden * 2 if hidden.shape[0] == 1 else hidden),
    "few rows": step(lambda model, hidden, mask: hidden * 2 if hidden.shape[0] * hidden.shape[1] < 9 else hidden),
    "batch norm": step(batch_norm, kept("stats", lambda: nn.BatchNorm1d(8))),
    "in place": step(lambda model, hidden, mask: hidden.mul_(2) + hidden),
    "augmented": step(lambda model, hidden, mask: (lambda skip, h: h.__iadd__(1) + skip)(hidden * 1, hidden * 1)),
    "plain tensor": step(lambda model, hidden, mask: hidden + model.plain, kept("plain", lambda: torch.ones(8))),
    "fleeting": step(
        lambda model, hidden, mask: hidden + model.fleeting,
        lambda model: model.register_buffer("fleeting", torch.ones(8), persistent=False),
    ),
    "tanh": step(lambda model, hidden, mask: torch.tanh(hidden)),
    "noise": step(lambda model, hidden, mask: hidden + torch.rand_like(hidden) if model.training else hidden.sin()),
    "dropout": step(lambda model, hidden, mask: F.dropout(hidden, 0.5, model.training)),
    "norm": step(lambda model, hidden, mask: model.usual(hidden), kept("usual", lambda: nn.BatchNorm1d(8))),
    "scale": step(lambda model, hidden, mask: hidden * model.scale, kept("scale", lambda: nn.Parameter(torch.ones(8)))),
    "masked": step(lambda model, hidden, mask: hidden if mask is None else hidden * mask),
    "mean": step(lambda model, hidden, mask: hidden - hidden.mean(0, keepdim=True)),
}
#: Parts that torch.fx traces correctly.
RIGHT = (
    "plain tensor",
    "fleeting",
    "tanh",
    "noise",
    "dropout",
    "norm",
    "scale",
    "masked",
    "mean",
    "hook",
    "batch norm",
)


class Given(NamedTuple):
    """Inputs and outputs with names."""

    x: Tensor
    mask: Any = None


@dataclass
class Record:
    """The same as an object that torch does not look into."""

    x: Any
    mask: Any = None


#: What a program returns.
OUTPUTS: tuple[Callable[[Tensor], Any], ...] = (
    lambda out: out,
    lambda out: (out, out.shape[0]),
    lambda out: {"out": out, "half": out.shape[0] / 2, "all": [out.sum()]},
    lambda out: Given(out, out.mean()),
    lambda out: OrderedDict(last=out, none=None),
    lambda out: [out, {"sum": (out.sum(),)}, True],
    lambda out: Record(out),
)


def flagged(self: Any, x: Tensor, mask: Any = None, flag: Any = False) -> Any:
    return self.run(x.relu() if flag is True or flag == "relu" else x * (flag or 1), mask)


#: Other signatures of a forward, and the calls with them: each gives the arguments for `(x, mask, flag)`.
SIGNATURES: dict[str, tuple[Callable[..., Any], list[Callable[[Tensor, Any, Any], tuple[tuple[Any, ...], Any]]]]] = {
    "keywords only": (
        lambda self, *, x, mask=None: self.run(x, mask),
        [lambda x, mask, flag: ((), {"x": x, "mask": mask}), lambda x, mask, flag: ((), {"mask": mask, "x": x})],
    ),
    "positions only": (
        lambda self, x, mask=None, /: self.run(x, mask),
        [lambda x, mask, flag: ((x, mask), {}), lambda x, mask, flag: ((x,), {})],
    ),
    "*args": (
        lambda self, *args: self.run(args[0], args[1] if len(args) > 1 else None),
        [lambda x, mask, flag: ((x,) if mask is None else (x, mask), {})],
    ),
    "**kwargs": (
        lambda self, x, **kwargs: self.run(x, kwargs.get("mask")),
        [lambda x, mask, flag: ((x,), {} if mask is None else {"mask": mask})],
    ),
    "dict": (
        lambda self, batch: self.run(batch["x"], batch.get("mask")),
        [
            lambda x, mask, flag: (({"x": x, "mask": mask},), {}),
            lambda x, mask, flag: (({"mask": mask, "x": x},), {}),
            lambda x, mask, flag: (({"x": x},), {}),
        ],
    ),
    "nested": (
        lambda self, batch: self.run(batch[0]["x"][0], batch[1]),
        [lambda x, mask, flag: (([{"x": (x,)}, mask],), {})],
    ),
    "named tuple": (lambda self, batch: self.run(*batch), [lambda x, mask, flag: ((Given(x, mask),), {})]),
    "dataclass": (lambda self, batch: self.run(batch.x, batch.mask), [lambda x, mask, flag: ((Record(x, mask),), {})]),
    "flags": (
        flagged,
        [
            lambda x, mask, flag: ((x, mask, flag), {}),
            lambda x, mask, flag: ((x,), {"flag": flag}),
            lambda x, mask, flag: ((x,), {"flag": flag, "mask": mask}),
        ],
    ),
    "two tensors": (
        lambda self, x, other, mask=None: self.run(x + 2 * other[:1], mask),
        [lambda x, mask, flag: ((x, x.flip(0), mask), {}), lambda x, mask, flag: ((x, x), {"mask": mask})],
    ),
}
FLAGS = (False, True, None, 2, 0.5, "relu")


class Program(nn.Module):
    """Two layers with some parts between them. `train()` may leave one part as it is."""

    def __init__(self, seed: int, *, branches: bool, returns: tuple[int, ...]) -> None:
        super().__init__()
        choice = random.Random(seed)
        torch.manual_seed(seed)
        self.first, self.leaf, self.second = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 5)
        self.names = choice.sample(choice.choice((sorted(PARTS), RIGHT)), choice.choice((1, 1, 2, 3)))
        self.branches, self.returns = branches, choice.choice(returns)
        self.freezes = choice.random() < 0.15
        for name in self.names:
            PARTS[name][0](self)

    def train(self, mode: bool = True) -> Program:
        super().train(mode)
        if self.freezes:
            for part in self.children():
                if isinstance(part, (nn.BatchNorm1d, nn.Linear)):
                    part.eval()
        return self

    def forward(self, x: Tensor, mask: Any) -> Any:
        return self.run(x, mask)

    def run(self, x: Tensor, mask: Any) -> Any:
        if self.branches and x.shape[0] > 100:  # torch.fx refuses it
            x = x[:100]
        hidden = self.first(x)
        for name in self.names:
            hidden = PARTS[name][1](self, hidden, mask)
        return OUTPUTS[self.returns](self.second(hidden))


def mask_of(kind: str, rows: int) -> Any:
    values = torch.rand(rows, 8) > 0.4
    return {"none": None, "bool": values, "float": values.float(), "ones": torch.ones(rows, 8)}[kind]


MASKS = ("none", "bool", "float", "ones")


def observed(model: Any, call: tuple[tuple[Any, ...], dict[str, Any]], seed: int, *, grad: bool) -> Any:
    """All that a call computes and changes; an error is `None`."""
    torch.manual_seed(seed)
    args, kwargs = copy.deepcopy(call)
    model.zero_grad()
    try:
        with torch.set_grad_enabled(grad):
            output = nn.Module.__call__(model, *args, **kwargs)  # fx would print an error
    except Exception:
        return None
    plain = vars(output) if is_dataclass(output) else output
    found = {"output": plain, "type": type(output).__name__, "buffers": [b.clone() for b in model.buffers()]}
    tensors = [x for x in torch.utils._pytree.tree_leaves(plain) if isinstance(x, Tensor) and x.requires_grad]
    if tensors:
        sum(x.square().sum() for x in tensors).backward()  # type: ignore[union-attr]
        found["gradients"] = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    if isinstance(getattr(model, "aux", None), Tensor):
        found["aux"] = model.aux.detach().clone()
    return found


def program(seed: int, *, branches: bool, other: bool) -> tuple[Program, list[Any]]:
    """A random program, and the ways to call it: with `other`, of another signature."""
    if not other:
        return Program(seed, branches=branches, returns=(0, 0, 0, 1, 2)), [lambda x, mask, flag: ((x, mask), {})]
    forward, calls = SIGNATURES[random.Random(seed).choice(sorted(SIGNATURES))]
    made: Any = type("Program", (Program,), {"forward": forward})
    return made(seed, branches=branches, returns=(0, 0, 0, *range(1, len(OUTPUTS)))), calls


def check(seed: int, *, branches: bool, other: bool = False) -> str:
    """Make a graph of a random program, and compare it with the program on random calls."""
    choice = random.Random(seed)
    base, calls = program(seed, branches=branches, other=other)

    def drawn_call(sizes: tuple[int, ...]) -> Any:
        rows = choice.choice(sizes)
        return choice.choice(calls)(torch.randn(rows, 6), mask_of(choice.choice(MASKS), rows), choice.choice(FLAGS))

    example = next(call for call in iter(lambda: drawn_call((2, 4)), None) if not all(call))
    before, chance = picture(base), torch.get_rng_state()
    try:  # now both have the adapters
        graph = hra_fx.transform(base, CONFIG, trace=True, example_inputs=example[0] or example[1])
    except AdapterError:
        assert picture(base) == before and torch.equal(torch.get_rng_state(), chance)
        return "refused"
    with torch.no_grad():
        for value in base.parameters():
            value += 0.1 * torch.randn_like(value)
    for twin in (copied(graph) for copied in (copy.deepcopy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)))):
        own = copy.deepcopy(base)
        assert list(twin.state_dict()) == list(own.state_dict()), base.names
        for _ in range(5):
            training, call = choice.random() < 0.5, drawn_call((1, 2, 3, 6))
            options = {"call": call, "seed": choice.randrange(1000), "grad": choice.random() < 0.6}
            state = copy.deepcopy((own, twin))
            wanted, found = (observed(each.train(training), **options) for each in (own, twin))
            if wanted is None or found is None:  # an error of either is allowed, and what it does before
                own, twin = state
                continue
            where = f"seed {seed}: {base.names}, {options}, training={training}"
            assert found.keys() == wanted.keys() and found.pop("type") == wanted.pop("type"), where
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5, msg=where)
    return "right"


@pytest.mark.needs("torch>=2.9")
@pytest.mark.parametrize(
    ("branches", "other", "count"),
    [(False, False, 32), (True, False, 8), (False, True, 12), (True, True, 8)],
    ids=["torch.fx", "torch.export", "torch.fx, other signatures", "torch.export, other signatures"],
)
def test_graphs_are_right_or_refused(branches: bool, other: bool, count: int) -> None:
    """`RANDOM_PROGRAMS=150 pytest -s` checks 150 programs for each; no two are the same."""
    count, start = int(os.environ.get("RANDOM_PROGRAMS", count)), 1000 * branches + 2000 * other
    ways = Counter(check(seed, branches=branches, other=other) for seed in range(start, start + count))
    print(f"{ways['right']} equal, {ways['refused']} refused, 0 wrong")
    assert ways["right"] > count // (6 if other else 3) and ways["refused"]
