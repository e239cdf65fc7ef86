"""After an error or a warning at any step, the model is unchanged or completely changed, or computes the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from model.failing import At, folded, no_memory
from model.many import (
    adapted,
    assert_close,
    config,
    net,
    normal,
    oracle,
    refuses,
    run,
    seen,
    stored,
    weights,
)
from torch import Tensor, nn

import hra_fx
import hra_fx.model.add
import hra_fx.model.inject
import hra_fx.model.setup
from hra_fx.errors import GraphInvariantError
from hra_fx.layers.adapters import HouseholderAdapters
from hra_fx.layers.trained_copies import Copies
from hra_fx.model.state import get_state

BOTH: dict[str, Any] = {"modules_to_save": ["head", "norm"], "bias": "hra_only"}
#: Where a step is looked up, and at which of its calls it fails.
Step = tuple[ModuleType | type, str, int]
COMMON: list[Step] = [
    (hra_fx.model.inject, "adapters_for", 1),
    (hra_fx.model.inject, "swap", 1),
    (HouseholderAdapters, "put", 1),
    (HouseholderAdapters, "put", 2),
    (Copies, "make", 1),
    (Copies, "make", 2),
]
ADDING: list[Step] = [*COMMON, (hra_fx.model.add, "inject_adapter", 1), (hra_fx.model.add, "make_copies", 1)]
STARTING: list[Step] = [
    *COMMON,
    *(
        (hra_fx.model.setup, name, 1)
        for name in ("inject_adapter", "freeze", "make_copies", "attach_state", "activate")
    ),
]
COMBINING: list[Step] = [
    (HouseholderAdapters, "put", 1),
    (HouseholderAdapters, "put", 2),
    (hra_fx.model.add, "sync_layers", 1),
]


def second() -> tuple[nn.Module, nn.Module]:
    return adapted(net(), a=config("first", modules_to_save=["head"]), c=config("first", bias="all"))


def two() -> tuple[nn.Module, nn.Module]:
    return adapted(net(), a=config("first", "second"), c=config("first"))


#: The model, what is done to it (the folder holds an adapter), and the steps of it.
ACTS: dict[str, tuple[Callable[[], tuple[nn.Module, nn.Module]], Callable[[nn.Module, Path], object], list[Step]]] = {
    "add": (second, lambda model, folder: hra_fx.add_adapter(model, "b", config("first", "second", **BOTH)), ADDING),
    "load": (lambda: (net(), net()), lambda model, folder: hra_fx.load_adapter(model, folder, "b"), STARTING),
    "load another": (second, lambda model, folder: hra_fx.load_adapter(model, folder, "b"), ADDING),
    "combine": (two, lambda model, folder: hra_fx.combine(model, ["a", "c"], "b"), COMBINING),
}


class Failing:
    """Replaces a function by one that fails at one of its calls."""

    def __init__(self, real: Callable[..., Any], call: int) -> None:
        self.real, self.call, self.calls = real, call, 0

    def __get__(self, owner: Any, kind: Any = None) -> Callable[..., Any]:
        return lambda *args, **kwargs: self(owner, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls == self.call:
            raise GraphInvariantError("node 'x': put there by the test.")
        return self.real(*args, **kwargs)


@pytest.mark.parametrize(
    ("name", "step"),
    [
        pytest.param(name, step, id=f"{name} {step[1]} {step[2]}")
        for name, (*_, steps) in ACTS.items()
        for step in steps
    ],
)
def test_an_error_at_any_step_leaves_the_model_as_it_was(
    name: str, step: Step, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    make, act, _ = ACTS[name]
    hra_fx.save_adapter(adapted(net(), b=config("first", "second", r=3, **BOTH))[1], tmp_path)
    plain, model = make()
    x, (where, function, call) = normal(4, 6), step
    wanted = run(model, x)
    with monkeypatch.context() as patch:
        patch.setattr(where, function, Failing(getattr(where, function), call))
        with refuses(model, "put there by the test", GraphInvariantError):
            act(model, tmp_path)
    assert torch.equal(run(model, x), wanted)
    act(model, tmp_path)
    hra_fx.set_adapter(model, "b")
    if name == "add":
        assert_close(model(x), oracle(plain, model, ["b"], x))


@pytest.mark.parametrize("name", ["add", "load", "load another"])
def test_memory_that_runs_out_at_any_copy_leaves_the_model_as_it_was(name: str, tmp_path: Path) -> None:
    make, act, _ = ACTS[name]
    _, source = adapted(net(), b=config("first", "second", r=3, **BOTH))
    hra_fx.save_adapter(source, tmp_path)
    (_, model), (_, other), x = make(), make(), normal(3, 6)
    with At(Tensor.clone, 10**9, no_memory) as at:
        act(other, tmp_path)
    assert at.calls >= 2
    output = run(model, x)
    for call in range(1, at.calls + 1):
        with refuses(model, "no memory is left", torch.OutOfMemoryError), At(Tensor.clone, call, no_memory):
            act(model, tmp_path)
        assert torch.equal(run(model, x), output)
    act(model, tmp_path)
    hra_fx.set_adapter(model, "b")
    if name != "add":
        assert_close(run(model, x), run(source, x), 1e-14)


WRONG: dict[str, tuple[hra_fx.HRAConfig, type[Exception], str]] = {
    "no such layer": (config("nothing"), hra_fx.SelectionError, "nothing"),
    "neither Linear nor Conv2d": (config("norm"), hra_fx.SelectionError, "norm"),
    "rank over width": (
        config("first", r=7, apply_GS=True),
        hra_fx.UnsupportedLayerError,
        r"^first \(Linear\): with `apply_GS=True`, `r` must be at most 6, the input dimension of the layer, got 7\.",
    ),
    "saved by another": (
        config("head"),
        hra_fx.UnsupportedLayerError,
        r"^head \(Linear\): another adapter trains it in full \(`modules_to_save`\)\. Fold or delete that adapter",
    ),
    "adapted by another": (
        config("second", modules_to_save=["first"]),
        hra_fx.UnsupportedLayerError,
        r"^first \(Linear\): another adapter reflects this layer, so it cannot be saved in full too\. Fold or delete",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_configuration_that_does_not_fit_is_refused(case: str) -> None:
    wrong, kind, text = WRONG[case]
    model = adapted(net(), a=config("first", modules_to_save=["head"]))[1]
    state = torch.get_rng_state()
    with refuses(model, text, kind):
        hra_fx.add_adapter(model, "b", wrong)
    # The last case is found when the vectors are drawn already.
    assert torch.equal(torch.get_rng_state(), state) is (case != "adapted by another")


@pytest.mark.parametrize("name", ["first.weight", "second.hra_u"])
def test_a_file_that_does_not_fit_is_refused(name: str, tmp_path: Path) -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6 + (name == "first.weight"), 8), nn.Linear(9, 8)

    hra_fx.save_adapter(hra_fx.transform(Wide(), config("first", "second")), tmp_path)
    model = adapted(net(), a=config("first", modules_to_save=["head"]))[1]
    for adapter in ("a", "b"):
        with refuses(model, r"hra_u must have shape \(\d, 2\), got", hra_fx.CheckpointError):
            hra_fx.load_adapter(model, tmp_path, adapter)


# Warnings, which are errors in these tests, come after the change


def test_a_fold_is_complete_when_it_warns_of_removed_adapters() -> None:
    plain, model = adapted(net(), a=config("first", "second"), b=config("second"))
    wanted = weights(plain, model, ["a"])
    with pytest.raises(hra_fx.HRAWarning, match=r"adapters \['b'\] were not active and are removed"):
        hra_fx.fold(model)
    folded(plain, model, wanted)


def test_a_deletion_is_complete_when_it_warns_of_the_new_active_adapter() -> None:
    plain, model = adapted(net(), a=config("first", "second"), b=config("second"))
    x = normal(3, 6)
    wanted = oracle(plain, model, ["b"], x)
    with pytest.raises(hra_fx.HRAWarning, match="adapter 'a' was active and is deleted; 'b' is active now"):
        hra_fx.delete_adapter(model, "a")
    assert (list(get_state(model).configs), get_state(model).active) == (["b"], ("b",))
    assert_close(run(model, x), wanted)


# Weights that are written in place


def test_a_merge_that_runs_out_of_memory_leaves_the_model_and_a_second_one_succeeds() -> None:
    plain, model = adapted(net(torch.float32), a=config("first", "second"), b=config("second"))
    hra_fx.set_adapter(model, ["a", "b"])
    x = normal(3, 6).float()

    def look() -> dict[str, Any]:
        return {key: value for key, value in seen(model).items() if not key.startswith("tensor")}

    before, output = look(), run(model, x)
    for call in (1, 2):
        with At(Tensor.clone, call, no_memory), pytest.raises(torch.OutOfMemoryError, match="no memory is left"):
            hra_fx.merge_adapter(model)
        assert look() == before
        assert all(torch.equal(stored(model, name), value) for name, value in plain.named_parameters())
        assert torch.equal(run(model, x), output)
    hra_fx.merge_adapter(model)
    for name, weight in weights(plain, model, ["a", "b"]).items():
        assert_close(stored(model, name), weight, 1e-6)


#: What is interrupted, and whether the adapter is merged before.
INTERRUPTED: dict[str, tuple[Callable[[nn.Module], object], bool]] = {
    "fold": (hra_fx.fold, False),
    "unmerge": (hra_fx.unmerge_adapter, True),
    "fold of merged adapters": (hra_fx.fold, True),
}


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory is left."), KeyboardInterrupt()], ids=type)
@pytest.mark.parametrize("write", [1, 2, 3])
@pytest.mark.parametrize("name", INTERRUPTED)
def test_an_interrupted_fold_or_unmerge_leaves_the_outputs_and_a_second_fold_finishes_it(
    name: str, write: int, error: BaseException
) -> None:
    def fail() -> None:
        raise error

    act, merged = INTERRUPTED[name]
    plain, model = adapted(net(), a=config("first", "second", "head"), b=config("second"))
    hra_fx.set_adapter(model, ["a", "b"])
    x, wanted = normal(3, 6), weights(plain, model, ["a", "b"])
    output = run(model, x)
    if merged:
        hra_fx.merge_adapter(model)
    with At(Tensor.copy_, write, fail), pytest.raises(type(error)):
        act(model)
    assert_close(run(model, x), output)
    if act is hra_fx.fold:
        act(model)
        assert_close(run(model, x), output)
        folded(plain, model, wanted)
