"""The capture of a picture is kept until the model changes."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapting import adapted, randomise
from torch import Tensor, nn

import hra_fx
from hra_fx.view.network import to_networkx


class Counted(nn.Module):
    """A model that torch.fx cannot trace; all its copies count their calls together."""

    calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)
        self.act: Any = torch.relu
        self.acts = [torch.sin]
        self.register_buffer("shift", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        Counted.calls += 1
        hidden = self.acts[0](self.act(self.first(x if x.shape[0] < 100 else x[:100])))
        return self.second(hidden + self.shift if x.sum() > 0 else hidden)


def counted() -> Any:
    return adapted(Counted(), "first", r=2)


def runs(act: Callable[[], object]) -> int:
    """How often the model or a copy of it runs."""
    before = Counted.calls
    act()
    return Counted.calls - before


def test_other_formats_and_values_do_not_capture_again(tmp_path: Path) -> None:
    model, x = counted(), torch.rand(5, 4)
    assert runs(lambda: hra_fx.visualize(model, tmp_path / "page.html", example_inputs=x)) > 0

    def more() -> None:
        hra_fx.visualize(model, tmp_path / "picture.svg", example_inputs=x.clone())
        randomise(model)
        model.train()
        hra_fx.visualize(model, tmp_path / "picture.html", example_inputs=x)

    assert runs(more) == 0
    heat = [data["rotation"] for _, data in to_networkx(model, x).nodes(data=True) if data.get("r")]
    wanted = [row.rotation for row in hra_fx.report(model).rows]
    assert heat == pytest.approx(wanted, rel=1e-3)


CHANGES: dict[str, Callable[[Any], object]] = {
    "attribute": lambda model: setattr(model, "act", torch.tanh),
    "module": lambda model: setattr(model, "second", nn.Sequential(nn.Linear(6, 3), nn.Tanh())),
    "forward of the object": lambda model: setattr(model, "forward", lambda x: model.first(x).tanh()),
    "adapter": lambda model: hra_fx.add_adapter(model, "more", hra_fx.HRAConfig(r=1, target_modules=["second"])),
    "rank in use": lambda model: hra_fx.set_adapter(model, []),
    "gradient": lambda model: model.second.requires_grad_(True),
    "item of a list": lambda model: model.acts.__setitem__(0, torch.tanh),
    "buffer": lambda model: setattr(model, "shift", torch.zeros(1, 6)),
    "hook": lambda model: model.second.register_forward_hook(lambda *_: None),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_changed_model_is_drawn_as_it_is(change: Callable[[Any], object]) -> None:
    def drawn(model: Any) -> Any:
        picture = to_networkx(model, torch.ones(5, 4))
        return sorted(map(str, picture.nodes(data=True))), sorted(picture.edges), picture.graph

    model, fresh = counted(), counted()
    drawn(model)
    change(model)
    change(fresh)
    fresh.load_state_dict(model.state_dict())
    assert drawn(model) == drawn(fresh)


def test_another_example_is_drawn() -> None:
    model, first = counted(), torch.ones(5, 4)
    pictures = [to_networkx(model, x) for x in (first, torch.ones(7, 4), -first)]
    shapes = [next(data["shape"] for _, data in one.nodes(data=True) if data.get("r")) for one in pictures]
    assert shapes == ["5×6", "7×6", "5×6"]
    assert len(pictures[0]) > len(pictures[2])  # it takes another branch


def test_a_drawn_model_is_freed(tmp_path: Path) -> None:
    model = counted()
    hra_fx.visualize(model, tmp_path / "picture.svg", example_inputs=torch.rand(5, 4))
    parts = [weakref.ref(model), weakref.ref(model.first), weakref.ref(model.second.weight)]
    del model
    gc.collect()
    assert [part() for part in parts] == [None] * 3
