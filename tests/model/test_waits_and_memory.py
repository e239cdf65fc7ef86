"""A step never waits for the device, and a model frees what it no longer needs and needs little memory for a fold."""

from __future__ import annotations

import gc
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from layers.checking import pair
from layers.quantized.bases import SCHEMES, adapted as quantized, inputs
from model.many import config
from one_layer import normal
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

import hra_fx

pytestmark = pytest.mark.filterwarnings("ignore:.*Profiler clears events")  # torch 2.10, once

CALLS = {
    *("__bool__", "__float__", "__int__", "__index__", "__contains__", "item", "tolist", "numpy", "cpu", "to_list"),
    *("equal", "allclose", "nonzero", "argwhere", "is_nonzero", "masked_select", "unique", "repeat_interleave"),
}
OPERATORS = {
    f"aten::{name}"
    for name in (
        *("item", "_local_scalar_dense", "is_nonzero", "equal", "allclose", "nonzero", "masked_select", "_unique2"),
        *("linalg_inv", "linalg_cholesky", "linalg_solve", "_linalg_check_errors"),
    )
}


class Calls(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        self.found += [name] * (name in CALLS)
        return function(*args, **(kwargs or {}))


@contextmanager
def no_waiting() -> Iterator[None]:
    """Fail if a value of a tensor is read on the host."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler, Calls() as calls:
        yield
    assert calls.found == []
    assert OPERATORS.isdisjoint(event.key for event in profiler.key_averages())


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Linear": (lambda: nn.Linear(8, 6), (2, 3, 8)),
    "Conv1D": (lambda: Conv1D(6, 8), (2, 3, 8)),
    "Conv2d": (lambda: nn.Conv2d(4, 6, 3), (8, 4, 9, 9)),
    "Conv2d, groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1, padding_mode="reflect"), (2, 4, 9, 9)),
}
ADAPTERS: dict[str, list[dict[str, Any]]] = {
    "plain": [{"r": 4}],
    "odd rank": [{"r": 3}],
    "Gram-Schmidt": [{"r": 4, "apply_GS": True}],
    "two": [{"r": 4}, {"r": 3, "apply_GS": True}],
}


def step(model: nn.Module, x: Tensor) -> None:
    model(x).square().mean().backward()
    with torch.no_grad():
        model(x)


@pytest.mark.parametrize(
    ("kind", "adapters"),
    [*((kind, "two") for kind in LAYERS), *(("Linear", adapters) for adapters in ADAPTERS if adapters != "two")],
)
def test_a_step_and_a_switch(kind: str, adapters: str) -> None:
    make, shape = LAYERS[kind]
    model, x = nn.Sequential(OrderedDict(layer=make())), normal(1, *shape, dtype=torch.float32).requires_grad_()
    names = [f"a{index}" for index in range(len(ADAPTERS[adapters]))]
    for name, fields in zip(names, ADAPTERS[adapters], strict=True):
        fitted = hra_fx.HRAConfig(target_modules=["layer"], **fields)
        if name == "a0":
            model = hra_fx.transform(model, fitted, name)
        else:
            hra_fx.add_adapter(model, name, fitted)
    hra_fx.set_adapter(model, names)
    step(model, x)
    with no_waiting():
        step(model, x)
        hra_fx.set_adapter(model, names[0])
        step(model, x)
    assert all(tensor.grad is not None for name, tensor in model.named_parameters() if ".hra_u." in name)


@pytest.mark.parametrize("scheme", [name for name in SCHEMES if "dynamic" not in name])
def test_a_quantized_base(scheme: str) -> None:
    model, x = quantized(scheme), inputs()
    step(model, x)
    with no_waiting():
        step(model, x)


# ---- a model frees what it no longer needs, and needs little memory for a fold ----


X = normal(1, 3, 6)


def two_outputs() -> nn.Module:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.left, self.right = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.left(x), self.right(torch.tanh(self.body(x)))

    return Net()


def test_the_class_of_a_model_and_what_it_closes_over_are_freed() -> None:
    def made() -> tuple[nn.Module, list[weakref.ref[Any]]]:
        large = torch.ones(6)

        class Net(nn.Sequential):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x * large)

        return Net(nn.Linear(6, 6), nn.Linear(6, 6)), [weakref.ref(one) for one in (large, Net)]

    model, references = made()
    model = hra_fx.get_peft_model(model, config("0", "1"))
    model(X.float()).sum().backward()
    model = hra_fx.fold(model)
    del model
    gc.collect()
    assert [reference() for reference in references] == [None, None]


def test_the_backward_pass_frees_the_factors_while_the_loss_is_kept() -> None:
    _, model = pair(two_outputs, "body|left|right")
    model(X)[0].sum().backward()
    model.zero_grad(set_to_none=False)
    with Allocated() as allocated:
        loss = sum(output.sum() for output in model(X))
        loss.backward()
    assert 0 < allocated.live <= loss.nbytes + sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)


# ---- peak memory of `fold` and `merge_adapter` on a model of many equal layers ----

WIDTH = 64
#: Bytes of one weight in float64, which a fold computes with.
LAYER = WIDTH * WIDTH * 8


class Allocated(TorchDispatchMode):
    """Counts the bytes of storages that are created in the block and still referenced."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak, self.seen = 0, 0, set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        before = {id(t.untyped_storage()) for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in pytree.tree_leaves(output):
            if isinstance(tensor, Tensor) and id(storage := tensor.untyped_storage()) not in before | self.seen:
                self.seen.add(id(storage))
                self.live += storage.nbytes()
                weakref.finalize(storage, self._free, id(storage), storage.nbytes())
        self.peak = max(self.peak, self.live)
        return output

    def _free(self, identity: int, size: int) -> None:
        self.seen.discard(identity)
        self.live -= size


def peak(act: Callable[[nn.Module], object], layers: int) -> int:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False, dtype=torch.bfloat16) for _ in range(layers)))
    hra_fx.transform(model, config(*map(str, range(layers)), init_weights=False))
    with Allocated() as allocated:
        act(model)
    return allocated.peak


def test_a_fold_holds_a_few_copies_of_one_layer() -> None:
    few, many = peak(hra_fx.fold, 4), peak(hra_fx.fold, 40)
    assert 0 < few < 6 * LAYER
    assert many < few + LAYER


def test_a_merge_holds_one_copy_of_each_base_weight() -> None:
    few, many = peak(hra_fx.merge_adapter, 4), peak(hra_fx.merge_adapter, 40)
    weight = WIDTH * WIDTH * torch.bfloat16.itemsize
    assert many < few + 36 * weight + LAYER
