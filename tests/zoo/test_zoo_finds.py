"""The zoo finds what is wrong: a right transform is damaged afterwards in one way at a time, as real bugs do it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from zoo.checks import check
from zoo.entry import Call, Entry
from zoo.result import BY_FX, CHECKS, OK, Result

import hra_fx

Damage = Callable[[Any], object]
TRANSFORM = hra_fx.transform


def toy() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, 8),
        nn.Tanh(),
        nn.Linear(8, 4),
    )


def images(batch: int, size: int) -> Call:
    return (torch.randn(batch, 3, 8 + 4 * size, 8),), {}


ENTRY = Entry("toy/toy", toy, images)


def looked_at(monkeypatch: pytest.MonkeyPatch, damage: Damage, entry: Entry = ENTRY) -> Result:
    """What the zoo says of a model that is damaged after each transform."""

    def broken(model: Any, config: hra_fx.HRAConfig, **options: Any) -> Any:
        made = TRANSFORM(model, config, **options)
        if not options:
            damage(made)
        return made

    monkeypatch.setattr(hra_fx, "transform", broken)
    return check(entry)


def on_reflection(change: Callable[[Any, Any, Any], Any]) -> Damage:
    """Change what the reflections of one Linear give."""

    def damage(model: Any) -> None:
        model[6].hra_u.register_forward_hook(lambda module, args, output: change(module, args[0], output))

    return damage


def shared_with_copies(model: Any) -> None:
    model[6].hra_u.__deepcopy__ = lambda memo, own=model[6].hra_u: own


def not_in_the_state(model: Any) -> None:
    model[6].hra_u.register_state_dict_post_hook(lambda module, state, prefix, _: state.pop(prefix + "default"))


def counts_twice(model: Any) -> None:
    model[1].register_forward_hook(
        lambda module, args, _: module.num_batches_tracked.add_(int(module.training)) and None
    )


#: name -> damage, and the checks that must find it.
DAMAGES: dict[str, tuple[Damage, set[str]]] = {
    "the reflections are missed": (on_reflection(lambda m, x, y: x), {"eval", "train", "gradients"}),
    "missed at another batch size": (on_reflection(lambda m, x, y: y if len(x) == 2 else x), {"sizes"}),
    "the gradient is halved": (on_reflection(lambda m, x, y: y / 2 + y.detach() / 2), {"gradients"}),
    "a millionth off": (on_reflection(lambda m, x, y: y * (1 + 1e-6)), {"start", "eval", "train"}),
    "vectors are shared with copies": (shared_with_copies, {"deepcopy"}),
    "vectors are not in the state": (not_in_the_state, {"state_dict"}),
    "a buffer counts twice": (counts_twice, {"start", "train"}),
}


def test_the_toy_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    result = looked_at(monkeypatch, lambda model: None)
    assert result.checks == dict.fromkeys(CHECKS, OK)
    assert result.right
    assert (result.matched, result.traced, result.dtype) == (3, BY_FX, "float64")


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    damage, expected = DAMAGES[name]
    result = looked_at(monkeypatch, damage)
    assert not result.right
    assert expected <= result.failures.keys(), result.checks


def forgetful(model: Any, config: hra_fx.HRAConfig, **options: Any) -> Any:
    return TRANSFORM(model, hra_fx.HRAConfig(r=3, target_modules=["0", "8"]))


def with_a_wrong_graph(model: Any, config: hra_fx.HRAConfig, **options: Any) -> Any:
    made = TRANSFORM(model, config, **options)
    if options:
        on_reflection(lambda m, x, y: x if m.training else y)({6: made.get_submodule("6")})
    return made


@pytest.mark.parametrize(
    ("name", "broken", "found"),
    [("transform", forgetful, "transform"), ("transform", with_a_wrong_graph, "trace"), ("fold", lambda m: m, "fold")],
)
def test_a_broken_function_is_found(monkeypatch: pytest.MonkeyPatch, name: str, broken: Any, found: str) -> None:
    monkeypatch.setattr(hra_fx, name, broken)
    failures = check(ENTRY).failures
    assert next(iter(failures)) == found
    assert failures[found] == "neither adapted nor refused: 6" or list(failures) == [found]
