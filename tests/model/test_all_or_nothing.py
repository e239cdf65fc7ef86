"""After an error, a model is unchanged, also if memory runs out or another tool replaced a class."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model.many import adapted, assert_close, config, net, normal, oracle, refuses, run, weights
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import hra_fx


class At(TorchFunctionMode):
    """Calls `do` before call number `call` of a tensor's method; `calls` counts all of them."""

    def __init__(self, method: Any, call: int, do: Callable[[], None]) -> None:
        super().__init__()
        self.method, self.call, self.do, self.calls = method, call, do, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is self.method:
            self.calls += 1
            if self.calls == self.call:
                self.do()
        return func(*args, **(kwargs or {}))


def no_memory() -> None:
    raise torch.OutOfMemoryError("no memory is left.")


BOTH: dict[str, Any] = {"modules_to_save": ["head", "norm"], "bias": "hra_only"}


def second() -> tuple[nn.Module, nn.Module]:
    return adapted(net(), a=config("first", modules_to_save=["head"]), c=config("first", bias="all"))


#: The model, and what is done to it (the folder holds an adapter).
ACTS: dict[str, tuple[Callable[[], tuple[nn.Module, nn.Module]], Callable[[nn.Module, Path], object]]] = {
    "add": (second, lambda model, folder: hra_fx.add_adapter(model, "b", config("first", "second", **BOTH))),
    "load": (lambda: (net(), net()), lambda model, folder: hra_fx.load_adapter(model, folder, "b")),
    "load another": (second, lambda model, folder: hra_fx.load_adapter(model, folder, "b")),
}


@pytest.mark.parametrize("name", ACTS)
def test_memory_that_runs_out_at_any_copy_leaves_the_model_as_it_was(name: str, tmp_path: Path) -> None:
    make, act = ACTS[name]
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
    if name.startswith("load"):
        assert_close(run(model, x), run(source, x), 1e-14)


# Weights that are written in place


def test_a_merge_that_runs_out_of_memory_leaves_the_model_and_a_second_one_succeeds() -> None:
    plain, model = adapted(net(torch.float32), a=config("first", "second"), b=config("second"))
    hra_fx.set_adapter(model, ["a", "b"])
    x = normal(3, 6).float()

    output, keys = run(model, x), list(model.state_dict())
    for call in (1, 2):
        with At(Tensor.clone, call, no_memory), pytest.raises(torch.OutOfMemoryError, match="no memory is left"):
            hra_fx.merge_adapter(model)
        assert list(model.state_dict()) == keys
        assert all(torch.equal(model.get_parameter(name), value) for name, value in plain.named_parameters())
        assert torch.equal(run(model, x), output)
    hra_fx.merge_adapter(model)
    for name, weight in weights(plain, model, ["a", "b"]).items():
        assert_close(model.get_parameter(name), weight, 1e-6)


@pytest.mark.parametrize("write", [1, 2, 3])
def test_a_fold_that_runs_out_of_memory_leaves_the_outputs_and_a_second_one_finishes_it(write: int) -> None:
    plain, model = adapted(net(), a=config("first", "second", "head"), b=config("second"))
    hra_fx.set_adapter(model, ["a", "b"])
    x, wanted = normal(3, 6), weights(plain, model, ["a", "b"])
    output = run(model, x)
    with At(Tensor.copy_, write, no_memory), pytest.raises(torch.OutOfMemoryError):
        hra_fx.fold(model)
    assert_close(run(model, x), output)
    hra_fx.fold(model)
    assert_close(run(model, x), output)
    assert list(model.state_dict()) == list(plain.state_dict())
    for name, weight in wanted.items():
        assert_close(model.get_parameter(name), weight, 1e-12)


# ---- classes that another tool puts over ours ----


class Mixin:
    """What another tool mixes in, such as FSDP's `fully_shard`."""


def cover(part: nn.Module) -> Callable[[], None]:
    """Put another class over that of a module. Returns a function that restores it."""
    ours = type(part)
    part.__class__ = type(f"Other{ours.__name__}", (Mixin, ours), {})
    return lambda: setattr(part, "__class__", ours)


STEPS: list[tuple[type[Exception], Callable[[Any], object]]] = [
    (hra_fx.AdapterError, lambda model: hra_fx.delete_adapter(model, "x")),
    (hra_fx.AdapterError, lambda model: hra_fx.add_adapter(model, "z", config("head"))),
    (hra_fx.FoldError, hra_fx.fold),
    (hra_fx.FoldError, hra_fx.merge_adapter),
]


@pytest.mark.parametrize("path", ["first", ""])
def test_a_class_over_ours_is_refused_and_all_works_again_without_it(path: str) -> None:
    settings = config("first", "second")
    plain, model = adapted(net(), x=settings, y=config("second"))
    model = hra_fx.get_peft_model(model, settings, "x")
    x, part = normal(3, 6), model.get_submodule(path)
    wanted, later = oracle(plain, model, ["x"], x), oracle(plain, model, ["y"], x)
    uncover = cover(part)
    text = rf"^{path or 'the model'}: another tool replaced its class \({type(part).__name__}\), .* Undo that first"
    for kind, act in STEPS:
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
