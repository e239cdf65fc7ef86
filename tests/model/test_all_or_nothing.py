"""After an error, a model is unchanged, also if memory runs out or another tool replaced a class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from model.many import adapted, assert_close, config, net, normal, oracle, refuses, run, weights
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import hra_fx


class NoMemory(TorchFunctionMode):
    """Memory runs out at call number `call` of a tensor's method."""

    def __init__(self, method: Any, call: int) -> None:
        super().__init__()
        self.method, self.left = method, call

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= func is self.method
        if func is self.method and self.left == 0:
            raise torch.OutOfMemoryError("no memory is left.")
        return func(*args, **(kwargs or {}))


def test_a_merge_that_runs_out_of_memory_leaves_the_model_and_a_second_one_succeeds() -> None:
    plain, model = adapted(net(torch.float32), a=config("first", "second"), b=config("second"))
    hra_fx.set_adapter(model, ["a", "b"])
    x = normal(3, 6).float()

    output, keys = run(model, x), list(model.state_dict())
    for call in (1, 2):
        with NoMemory(Tensor.clone, call), pytest.raises(torch.OutOfMemoryError, match="no memory is left"):
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
    with NoMemory(Tensor.copy_, write), pytest.raises(torch.OutOfMemoryError):
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
