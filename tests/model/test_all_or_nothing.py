"""An error at any step of `add_adapter`, `load_adapter` and `combine` leaves the model as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from model.many import adapted, assert_close, config, net, normal, oracle, run, seen
from torch import nn

import hra_fx
import hra_fx.model.add
import hra_fx.model.inject
import hra_fx.model.setup
from hra_fx.errors import GraphInvariantError
from hra_fx.layers.adapters import Reflection
from hra_fx.layers.trained_copies import Copies

BOTH: dict[str, Any] = {"modules_to_save": ["head", "norm"], "bias": "hra_only"}
#: Where a step is looked up, and at which of its turns it fails.
STEPS: list[tuple[ModuleType | type, str, int]] = [
    (hra_fx.model.inject, "select", 1),
    (hra_fx.model.inject, "check", 1),
    (hra_fx.model.inject, "reflection_for", 1),
    (hra_fx.model.inject, "swap", 1),
    (Reflection, "put", 1),
    (Reflection, "put", 2),
    (Copies, "make", 1),
    (Copies, "make", 2),
    (hra_fx.model.add, "introduce", 1),
    (hra_fx.model.add, "make_copies", 1),
]
NAMES = [f"{name} {turn}" for _, name, turn in STEPS]


def failing(monkeypatch: pytest.MonkeyPatch, where: Any, step: str, turn: int) -> list[int]:
    """Let a step fail at one of its turns; gives the list of its turns."""
    real, turns = getattr(where, step), []

    def fails(*args: Any, **kwargs: Any) -> Any:
        turns.append(1)
        if len(turns) == turn:
            raise GraphInvariantError("node 'x': put there by the test.")
        return real(*args, **kwargs)

    monkeypatch.setattr(where, step, fails)
    return turns


def check(act: Callable[[], object], model: nn.Module, x: Any, monkeypatch: Any, step: tuple[Any, str, int]) -> None:
    """Fail once, with nothing changed; then go through."""
    before, wanted = seen(model), run(model, x)
    with monkeypatch.context() as patch:
        turns = failing(patch, *step)
        with pytest.raises(GraphInvariantError, match="put there by the test"):
            act()
    assert len(turns) >= step[2]
    assert seen(model) == before
    assert torch.equal(run(model, x), wanted)
    act()


@pytest.mark.parametrize("step", STEPS, ids=NAMES)
def test_add_adapter(step: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, model = adapted(net(), a=config("first", modules_to_save=["head"]), c=config("first", bias="all"))
    x = normal(4, 6)
    new = config("first", "second", init_weights=False, **BOTH)
    check(lambda: hra_fx.add_adapter(model, "b", new), model, x, monkeypatch, step)
    hra_fx.set_adapter(model, "b")
    assert_close(model(x), oracle(plain, model, ["b"], x))


@pytest.mark.parametrize("step", STEPS, ids=NAMES)
def test_load_adapter_beside_another(step: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hra_fx.save_adapter(adapted(net(), b=config("first", "second", r=3, **BOTH))[1], tmp_path)
    _, model = adapted(net(), a=config("first", modules_to_save=["head"]))
    check(lambda: hra_fx.load_adapter(model, tmp_path, "b"), model, normal(4, 6), monkeypatch, step)


PLAIN = [step for step in STEPS if step[0] is not hra_fx.model.add]
PLAIN += [(hra_fx.model.setup, name, 1) for name in ("introduce", "freeze", "make_copies", "keep_record", "activate")]


@pytest.mark.parametrize("step", PLAIN, ids=[f"{name} {turn}" for _, name, turn in PLAIN])
def test_load_adapter_into_a_plain_model(step: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hra_fx.save_adapter(adapted(net(), b=config("first", "second", r=3, **BOTH))[1], tmp_path)
    model = net()
    check(lambda: hra_fx.load_adapter(model, tmp_path, "b"), model, normal(4, 6), monkeypatch, step)


@pytest.mark.parametrize(
    "step",
    [(Reflection, "put", 1), (Reflection, "put", 2), (hra_fx.model.add, "sync_layers", 1)],
    ids=lambda step: step[1],
)
def test_combine(step: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = adapted(net(), a=config("first", "second"), b=config("first"))
    check(lambda: hra_fx.combine(model, ["a", "b"], "ab"), model, normal(4, 6), monkeypatch, step)


WRONG: dict[str, tuple[hra_fx.HRAConfig, type[Exception], str]] = {
    "no such layer": (config("nothing"), hra_fx.SelectionError, "nothing"),
    "neither Linear nor Conv2d": (config("norm"), hra_fx.SelectionError, "norm"),
    "rank over width": (config("first", r=7, apply_GS=True), hra_fx.UnsupportedLayerError, r"^first \(Linear\): Gram-"),
    "saved by another": (config("head"), hra_fx.UnsupportedLayerError, r"^head \(Linear\): another adapter saves it"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_configuration_that_does_not_fit_changes_nothing(case: str) -> None:
    wrong, kind, text = WRONG[case]
    model = adapted(net(), a=config("first", modules_to_save=["head"]))[1]
    before, state = seen(model), torch.get_rng_state()
    with pytest.raises(kind, match=text):
        hra_fx.add_adapter(model, "b", wrong)
    assert seen(model) == before
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["first.weight", "second.hra_u"])
def test_a_file_that_does_not_fit_changes_nothing(name: str, tmp_path: Path) -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6 + (name == "first.weight"), 8), nn.Linear(9, 8)

    hra_fx.save_adapter(hra_fx.transform(Wide(), config("first", "second")), tmp_path)
    model = adapted(net(), a=config("first", modules_to_save=["head"]))[1]
    before = seen(model)
    for adapter in ("a", "b"):
        with pytest.raises(hra_fx.CheckpointError, match=r"hra_u must have shape \(\d, 2\), got"):
            hra_fx.load_adapter(model, tmp_path, adapter)
    assert seen(model) == before
