"""What the example of a capture does not show: the graph is right, or `transform` or the call raises an error."""

from __future__ import annotations

import collections
import copy
import enum
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from adapting import randomise
from layers.checking import assert_same
from torch import Tensor, nn
from tracing.captured import bert

import hra_fx
from hra_fx.errors import AdapterError

pytestmark = pytest.mark.needs("torch>=2.9")
CONFIG = hra_fx.HRAConfig(r=2, target_modules=["a", "b"])
X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


def cut(x: Tensor) -> Tensor:
    """A branch, so that torch.export captures the model."""
    return x if x.shape[0] < 100 else x[:100]


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 5)
        self.norm, self.state = nn.BatchNorm1d(8), None

    def forward(self, x: Tensor) -> Any:
        return self.b(self.a(cut(x)))


def model(forward: Callable[..., Any] = Two.forward, **attributes: Any) -> nn.Module:
    """Two layers with a forward, and attributes."""
    torch.manual_seed(0)
    made = type("Model", (Two,), {"forward": forward})()
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


class Pool(enum.Enum):
    MEAN = 1
    CLS = 2


class Encoder(nn.Module):
    """Dropout in another method than the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 8)

    def encode(self, x: Tensor) -> Tensor:
        return F.dropout(self.layer(x), 0.5, self.training)


# ---- forwards ----


def skipping(self: Any, x: Tensor, scale: Any = None, shift: Any = None) -> Any:
    h = self.a(cut(x)) if scale is None else self.a(x) * scale
    return self.b(h if shift is None else h + shift)


def keyed(self: Any, batch: dict[str, Tensor]) -> Any:
    h = self.a(batch["x"])
    return self.b(h * batch["mask"][:, None] if "mask" in batch else h)


def last(self: Any, x: Tensor, lengths: Tensor) -> Any:
    h = self.a(x)
    if h.shape[1] > 1:
        h = h - h.mean(1, keepdim=True)
    return self.b(h[torch.arange(h.shape[0]), lengths - 1])


def three(self: Any, x: Tensor, memory: Tensor) -> Any:
    h = self.a(x)
    return (h.relu() if x.shape[0] * x.shape[1] == 1 else h) + self.a(memory).mean(1, keepdim=True)


def masked(self: Any, x: Tensor, mask: Tensor) -> Any:
    return self.b(self.a(cut(x))) + (mask.sum() if mask.dtype is torch.bool else mask.mean())


def chosen(self: Any, x: Tensor, value: Any) -> Any:
    h = self.a(x)
    return self.b(F.normalize(h) if value is True or value is Pool.MEAN or isinstance(value, float) else h)


def counted(self: Any, x: Tensor) -> Any:
    self.state.append(1)
    return self.b(self.a(cut(x)) if len(self.state) <= 20 else self.a(x).relu())


def between(change: Callable[[Any, Tensor], Any]) -> Callable[..., Any]:
    return lambda self, x: self.b(change(self, self.a(cut(x))))


def penalized(self: Any, x: Tensor) -> Any:
    return self.b(self.a(cut(x))), sum(weight.abs().sum() for weight in self.parameters())


def in_train(change: Callable[[Any], float]) -> Callable[..., Any]:
    """A share of the output that depends on the layers, in train mode alone."""
    return lambda self, x: self.b(self.a(cut(x))) * (change(self) if self.training else 1.0)


def attention(self: Any, query: Tensor, key: Tensor) -> Any:
    return self.b(self.a(query) if query is key else self.a(query) + self.a(key).relu())


def twice_dropped(self: Any, x: Tensor) -> Any:
    return self.b(F.dropout(self.drop(self.a(x)), 0.5, self.drop.training))


class Meter:
    """An object that cannot be pickled."""

    def __init__(self, calls: int = 0) -> None:
        self.lock, self.calls = threading.Lock(), calls

    def __deepcopy__(self, memo: Any) -> Meter:
        return Meter(self.calls)

    def append(self, _: int) -> None:
        self.calls += 1

    def __len__(self) -> int:
        return self.calls


def in_order(self: Any, batch: dict[str, Tensor]) -> Any:
    first, *others = [self.a(cut(value)) for value in batch.values()]
    return self.b(first.relu() + sum(others))


def of_dtype(self: Any, x: Tensor) -> Any:
    return self.b(self.a(x.float()) * (2.0 if x.dtype is torch.float64 else 1.0))


def limited(self: Any, x: Tensor) -> Any:
    h = self.a(x)
    return self.b(h[:, :10] if self.training and x.shape[1] > 10 else h)


def frozen(part: str, graph: Any, *inputs: Any) -> Any:
    graph.train().get_submodule(part).eval()
    return graph(*inputs)


def cast(graph: Any, x: Tensor) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        return graph(x).float()


@dataclass
class Case:
    """A model, what it is captured for, and a later call. The error is that of `transform` or of the call."""

    model: nn.Module
    example: Any
    error: str
    call: Any = (X,)
    run: Callable[..., Any] = lambda graph, *args: graph(*args)


ONE_MODE = "parts of the graph have different modes"
ADAPTED = "its output.* differs for the example with (adapters|frozen parameters)"
COUNTED = "its forward changes state"
CASES = {
    "position": Case(model(skipping), {"x": X, "shift": torch.ones(8)}, "scale is None", (X, torch.ones(8))),
    "key": Case(model(keyed), ({"x": X},), r"set\(batch\) == \{'x'\}", ({"x": X, "mask": torch.ones(4)},)),
    "method": Case(model(between(lambda self, h: h + self.part.encode(X[:1])), part=Encoder()), X, ONE_MODE,
                   run=partial(frozen, "part")),
    "one token": Case(model(last), (torch.randn(2, 4, 6), torch.tensor([3, 4])), r"x\.size\(\)\[1\] > 1",
                      (torch.randn(2, 1, 6), torch.tensor([1, 1]))),
    "one query": Case(model(three), (torch.randn(4, 3, 6), torch.randn(4, 5, 6)),
                      r"x\.size\(\)\[0\] > 1 or x\.size\(\)\[1\] > 1", (torch.randn(1, 1, 6), torch.randn(1, 7, 6))),
    "mask": Case(model(masked), (X, X), r"mask\.dtype == torch\.float32", (X, X > 0)),
    "enum": Case(model(chosen), (X, Pool.CLS), "Pool"),
    "flag": Case(model(chosen), (X, False), "repr.value. == 'False'", (X, True)),
    "zero": Case(model(chosen), (X, False), "repr.value. == 'False'", (X, 0)),
    "order of keys": Case(model(in_order), ({"p": X, "q": X + 1},), r"list\(batch\) == \['p', 'q'\]",
                          ({"q": X + 1, "p": X},)),
    "order of keywords": Case(model(lambda self, **batch: in_order(self, batch)), {"p": X, "q": X + 1},
                              "differs for keywords in another order"),
    "dtype": Case(model(of_dtype), X, r"x\.dtype == torch\.float32", (X.double(),)),
    "offset": Case(model(lambda self, x: self.b(self.a(cut(x) * (2 if x.storage_offset() else 1)))), X,
                   r"x\.storage_offset\(\) == 0", (torch.cat([X, X])[4:],)),
    "autocast in train mode": Case(
        model(in_train(lambda self: 1.1 if torch.is_autocast_enabled("cpu") else 1.0)), X, "not torch.is_autocast",
        run=lambda graph, x: cast(graph.train(), x)),
    "number": Case(model(chosen), (X, torch.tensor(1.5)), r"isinstance\(value, torch\.Tensor\)", (X, 1.5)),
    "bytes": Case(model(lambda self, x: self.b(self.a(x.float() / 255 if x.dtype == torch.uint8 else x.float()))),
                  torch.randint(0, 9, (4, 6)), r"x\.dtype in \(torch\.int64", (X.to(torch.uint8),)),
    "contiguous": Case(model(lambda self, x: self.b(self.a(x if x.is_contiguous() else -x))), X,
                       r"x\.is_contiguous\(\)", (torch.randn(6, 4).T,)),
    "deque": Case(model(counted, state=collections.deque()), X, COUNTED),
    "lock": Case(model(counted, state=Meter()), X, COUNTED),
    "one tensor": Case(model(attention), (X, X), "differs for the example"),
    "two tensors": Case(model(attention), (X, X.clone()), "differs for one tensor as several inputs", (X, X)),
    "flag of a layer": Case(model(twice_dropped, drop=nn.Dropout(0.5)), X, ONE_MODE, run=partial(frozen, "drop")),
    "parameters in train mode": Case(model(in_train(lambda self: len([*self.parameters()]))), X, ADAPTED),
    "class in train mode": Case(model(in_train(lambda self: 1 + (type(self.a) is nn.Linear))), X, ADAPTED),
    "size in a set": Case(model(lambda self, x: self.b(self.a(x) * (2 if x.shape[1] in {4, 16} else 1))),
                          torch.ones(2, 7, 6), r"x\.size\(\)\[1\] == 7", (torch.ones(2, 4, 6),)),
    "size in train mode": Case(model(limited), torch.ones(2, 7, 6), r"x\.size\(\)\[1\] <= 10", (torch.ones(2, 14, 6),)),
    "parameters": Case(model(penalized), X, ADAPTED),
    "requires_grad": Case(model(between(lambda self, h: h if self.a.bias.requires_grad else h.relu())), X, ADAPTED),
    "class": Case(model(between(lambda self, h: h * (2 if type(self.a) is nn.Linear else 1))), X, ADAPTED),
    "inference mode": Case(model(between(lambda self, h: h.relu() if torch.is_inference_mode_enabled() else h)), X,
                           "differs for the example in inference mode"),
    "autocast": Case(model(between(lambda self, h: h * (1.1 if torch.is_autocast_enabled("cpu") else 1.0))), X,
                     "not torch.is_autocast_enabled", run=cast),
    "text": Case(model(lambda self, x, y: self.b(self.a(x).relu() if str(x[0, 0]) == str(y[0, 0]) else self.a(x))),
                 (X, X.clone()), "it makes text of a value or a size"),
    "defaultdict": Case(model(lambda self, x: collections.defaultdict(list, y=self.b(self.a(cut(x))))), X,
                        "it returns a defaultdict"),
    "integer keys": Case(model(lambda self, x: collections.OrderedDict({0: self.b(self.a(cut(x)))})), X,
                         "it returns a OrderedDict"),
    "keyword": Case(model(io=nn.ModuleDict({"in": nn.Linear(2, 2)})), X, r"'io\.in', a name .* Rename it"),
    "graph": Case(model(graph=nn.Linear(2, 2)), X, "'graph', a name that a graph cannot have"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_an_example_does_not_show_is_an_error(name: str) -> None:
    case = CASES[name]
    base = copy.deepcopy(case.model)
    with pytest.raises((AdapterError, AssertionError), match=case.error):
        graph: Any = hra_fx.transform(base, CONFIG, trace=True, example_inputs=case.example)
        graph.graph.eliminate_dead_code()  # the checks stay
        graph.recompile()
        case.run(graph, *case.call)


def test_a_skipped_argument_has_its_place() -> None:
    model = bert().eval()
    ids = torch.randint(3, 16, (2, 5))
    kinds = torch.tensor([[0, 0, 1, 1, 1]] * 2)
    eager = hra_fx.transform(copy.deepcopy(model), hra_fx.HRAConfig(r=2, target_modules=["query"]))
    inputs = {"input_ids": ids, "token_type_ids": kinds}
    graph = hra_fx.transform(model, hra_fx.HRAConfig(r=2, target_modules=["query"]), trace=True, example_inputs=inputs)
    graph.load_state_dict(eager.state_dict())
    wanted = eager(**inputs).logits
    for found in (graph(**inputs), graph(ids, None, kinds)):
        assert_same(found.logits, wanted, rtol=1e-5)
    with pytest.raises(AssertionError, match="attention_mask is None"):
        graph(ids, torch.ones_like(ids))


def test_what_is_behind_a_large_layer_of_zeros_is_compared() -> None:
    made: Any = model(lambda self, x: self.b(self.a(x) + self.zero(self.wide(x) * (2 if isinstance(x, Tensor) else 1))))
    made.wide, made.zero = nn.Linear(6, 1 << 16), nn.Linear(1 << 16, 8)
    nn.init.zeros_(made.zero.weight)
    eager = hra_fx.transform(copy.deepcopy(made), CONFIG)
    graph = hra_fx.transform(made, CONFIG, trace=True, example_inputs=X)
    for each in (eager, graph):
        nn.init.constant_(each.zero.weight, 1e-3)
        randomise(each)
    assert_same(graph(X), eager(X), rtol=1e-4)
