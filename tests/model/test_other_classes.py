"""Classes that another tool puts over ours, scripted children, and new objects of our classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from model.many import F64, adapted, assert_close, config, normal, oracle, refuses, run
from torch import Tensor, nn

import hra_fx


class Scaled(nn.Module):
    """A model with a parameter of its own: `(n, 6) -> (n, 6)`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.scale = nn.Parameter(torch.rand(6) + 0.5)
        self.to(F64).eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x) * self.scale))


class Mixin:
    """What another tool mixes in, such as FSDP's `fully_shard`."""


def cover(part: nn.Module) -> Callable[[], None]:
    """Put another class over the part's; gives what takes it off again."""
    ours = type(part)
    part.__class__ = type(f"Other{ours.__name__}", (Mixin, ours), {})
    return lambda: setattr(part, "__class__", ours)


STEPS: dict[str, tuple[type[Exception], Callable[[Any], object]]] = {
    "delete": (hra_fx.AdapterError, lambda model: hra_fx.delete_adapter(model, "x")),
    "add": (hra_fx.AdapterError, lambda model: hra_fx.add_adapter(model, "z", config("c"))),
    "fold": (hra_fx.FoldError, lambda model: hra_fx.fold(model)),
    "merge": (hra_fx.FoldError, lambda model: hra_fx.merge_adapter(model)),
    "unload": (hra_fx.AdapterError, lambda model: model.unload()),
}


@pytest.mark.parametrize("path", ["a", ""])
def test_a_class_over_ours_is_refused_and_all_works_again_without_it(path: str) -> None:
    settings = config("a", "b")
    plain, model = adapted(Scaled(), x=settings, y=config("b"))
    model = hra_fx.HRAModel(model, settings, "x")
    x, part = normal(3, 6), model.get_submodule(path)
    wanted, later = oracle(plain, model, ["x"], x), oracle(plain, model, ["y"], x)
    uncover = cover(part)
    text = rf"^{path or 'the model'}: another tool replaced its class \({type(part).__name__}\)\. Undo that first"
    for name, (kind, act) in STEPS.items():
        if (path, name) != ("", "merge"):  # which needs the classes of layers only
            with refuses(model, text, kind):
                act(model)
        assert_close(run(model, x), wanted)
    uncover()
    with pytest.warns(hra_fx.HRAWarning, match="'y' is active now"):
        hra_fx.delete_adapter(model, "x")
    assert_close(run(model, x), later)
    hra_fx.fold(model)
    assert_close(run(model, x), later)
    assert [type(part) for part in [*model.modules()][1:]] == [type(part) for part in [*plain.modules()][1:]]
