"""Some quick models of the zoo, and what it finds: a right transform is damaged in one way at a time, as bugs do it.

`make zoo` checks all models.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from zoo.checks import check
from zoo.entry import Call, Entry
from zoo.models import entries, named
from zoo.result import BY_FX, CHECKS, OK

import hra_fx

TRANSFORM = hra_fx.transform
ENTRIES = entries()
#: Quick ones of each library: convolutions, attention, readers of weights (beit, swin), tied weights (gpt2).
QUICK = (
    *("torchvision/swin_t", "timm/vit_tiny_patch16_224", "timm/beit_base_patch16_224", "timm/test_nfnet"),
    "transformers/gpt2",
)


@pytest.mark.parametrize("name", QUICK)
def test_a_model_of_the_zoo(name: str) -> None:
    result = check(ENTRIES[name])
    assert not result.failures
    assert list(result.checks) == list(CHECKS)
    assert result.matched


def test_entries_are_named_by_patterns_with_or_without_the_library() -> None:
    wanted = ["torchvision/swin_s", "torchvision/swin_t", "transformers/bert"]
    assert list(named(["transformers/bert", "swin_[st]"])) == wanted


# ---- what it finds ----


def toy() -> nn.Sequential:
    first = [nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.3), nn.AdaptiveAvgPool2d(2)]
    return nn.Sequential(*first, nn.Flatten(), nn.Linear(24, 8), nn.Tanh(), nn.Linear(8, 4))


def images(batch: int, size: int) -> Call:
    return (torch.randn(batch, 3, 8 + 4 * size, 8),), {}


ENTRY = Entry("toy/toy", toy, images)


def reflecting(change: Callable[[Any, Any, Any], Any], *, graph: bool = False) -> Any:
    """Change what the reflections of one Linear give, in the model or in its graph."""

    def transform(model: Any, config: Any, **options: Any) -> Any:
        made = TRANSFORM(model, config, **options)
        if graph is bool(options):
            box = made.get_submodule("6").hra_u
            box.register_forward_hook(lambda module, args, output: change(module, args[0], output))
        return made

    return transform


def damaged(damage: Callable[[Any], object]) -> Any:
    """Damage the adapted model."""

    def transform(model: Any, config: Any, **options: Any) -> Any:
        made = TRANSFORM(model, config, **options)
        if not options:
            damage(made)
        return made

    return transform


def shared_with_copies(model: Any) -> None:
    model[6].hra_u.__deepcopy__ = lambda memo, own=model[6].hra_u: own


def not_in_the_state(model: Any) -> None:
    model[6].hra_u.register_state_dict_post_hook(lambda module, state, prefix, _: state.pop(prefix + "default"))


def counts_twice(model: Any) -> None:
    model[1].register_forward_hook(lambda module, *_: module.num_batches_tracked.add_(int(module.training)) and None)


def forgetful(model: Any, config: hra_fx.HRAConfig, **options: Any) -> Any:
    return TRANSFORM(model, hra_fx.HRAConfig(r=4, target_modules=["0", "8"]))


#: Name -> function in place of `transform` or `fold`, and the checks that must find it.
DAMAGES: dict[str, tuple[Any, set[str]]] = {
    "the reflections are missed": (reflecting(lambda m, x, y: x), {"eval", "train", "gradients"}),
    "missed at another batch size": (reflecting(lambda m, x, y: y if len(x) == 2 else x), {"sizes"}),
    "missed in a graph in train mode": (reflecting(lambda m, x, y: x if m.training else y, graph=True), {"trace"}),
    "the gradient is halved": (reflecting(lambda m, x, y: y / 2 + y.detach() / 2), {"gradients"}),
    "a millionth off": (reflecting(lambda m, x, y: y * (1 + 1e-6)), {"start", "eval", "train"}),
    "vectors are shared with copies": (damaged(shared_with_copies), {"deepcopy"}),
    "vectors are not in the state": (damaged(not_in_the_state), {"state_dict"}),
    "a buffer counts twice": (damaged(counts_twice), {"start", "train"}),
    "a layer is forgotten": (forgetful, {"transform"}),
    "fold does nothing": (lambda model: model, {"fold"}),
}


def test_the_toy_is_right() -> None:
    result = check(ENTRY)
    assert result.checks == dict.fromkeys(CHECKS, OK)
    assert (result.matched, result.traced, result.dtype) == (3, BY_FX, "float64")


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    broken, expected = DAMAGES[name]
    monkeypatch.setattr(hra_fx, "fold" if "fold" in name else "transform", broken)
    result = check(ENTRY)
    assert expected <= result.failures.keys(), result.checks
