"""Models that cannot be traced whole: the largest parts that can be, and the reasons for each layer."""

from __future__ import annotations

from typing import Any

import torch
from adapting import picture
from torch import Tensor, fx, nn

import hra_fx
from hra_fx.tracing.trace import capture_layers


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4))


class Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.b(self.a(x)) if mask is None else self.b(self.a(x) * mask)


class Host(nn.Module):
    """It branches on a value; its parts are of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = mlp()
        self.gate = nn.Linear(4, 4)
        self.one = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.optional = Optional()
        self.graph = fx.symbolic_trace(mlp())
        self.patched = mlp()
        self.patched.forward = self.patched.forward  # type: ignore[method-assign]
        self.shared = self.gate

    def forward(self, x: Tensor) -> Tensor:
        x = self.mlp(x) if x.sum() > 0 else self.gate(x)
        return self.shared(self.patched(self.graph(self.optional(self.one(x), mask=x))))


def adapted(model: nn.Module) -> Any:
    names = [name for name, part in model.named_modules() if isinstance(part, nn.Linear)]
    return hra_fx.transform(model, hra_fx.HRAConfig(r=2, target_modules=names))


def test_a_model_that_is_traced_whole() -> None:
    assert capture_layers(adapted(mlp())) == {"0": ("", ""), "2": ("", "")}


def test_the_largest_parts_and_the_reasons() -> None:
    model = adapted(Host())
    before = picture(model)
    found = capture_layers(model)
    assert picture(model) == before
    whole = "the model (Host): it branches on a value (if, while, and, or, not, assert)"
    optional = "optional (Optional): forward has optional arguments (mask), and it is unknown how it is called"
    graph = "graph (Sequential): it is a GraphModule itself"
    patched = "patched (Sequential): its forward is set on the instance"
    assert found == {
        "mlp.0": ("mlp", whole),
        "mlp.2": ("mlp", whole),
        "gate": (None, whole),
        "one.0": (None, whole),
        "optional.a": (None, optional),
        "optional.b": (None, optional),
        "graph.0": (None, graph),
        "graph.2": (None, graph),
        "patched.0": (None, patched),
        "patched.2": (None, patched),
    }
    assert set(hra_fx.graphs(model)) == {root or path for path, (root, _) in found.items()}


def test_a_part_in_eval_mode_does_not_change() -> None:
    model = adapted(Host())
    model.mlp.eval()
    graph = hra_fx.graphs(model)["mlp"]
    x = torch.ones(2, 4)
    torch.testing.assert_close(graph(x), model.mlp(x))
    assert not graph.training and model.training and not model.mlp.training
