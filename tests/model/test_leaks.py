"""A model frees what it no longer needs, such as classes and factors, and needs little memory for a fold."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from layers.checking import assert_same, normal, pair, run_dense
from model.many import config
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import hra_fx

X = normal(1, 3, 6)


def two_outputs() -> nn.Module:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.left, self.right = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.left(x), self.right(torch.tanh(self.body(x)))

    return Net()


@pytest.mark.parametrize("way", [hra_fx.transform, hra_fx.HRAModel])
def test_the_class_of_a_model_and_what_it_closes_over_are_freed(way: Callable[..., Any]) -> None:
    def made() -> tuple[nn.Module, list[weakref.ref[Any]]]:
        large = torch.ones(6)

        class Layer(nn.Linear):
            def forward(self, input: Tensor) -> Tensor:
                return super().forward(input) * large

        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.last = Layer(6, 6), nn.Linear(6, 6)

            def forward(self, x: Tensor) -> Tensor:
                return self.last(self.first(x * large))

        return Net(), [weakref.ref(one) for one in (large, Layer, Net)]

    model, references = made()
    model = way(model, config("first", "last"))
    model(X.float()).sum().backward()
    model = hra_fx.fold(model)
    del model
    gc.collect()
    assert [reference() for reference in references] == [None, None, None]


def tensors() -> set[int]:
    gc.collect()
    return {id(one) for one in gc.get_objects() if issubclass(type(one), Tensor)}


def test_the_backward_pass_frees_the_factors_while_the_loss_is_kept() -> None:
    _, model = pair(two_outputs, "body|left|right")
    model(X)[0].sum().backward()
    model.zero_grad(set_to_none=False)
    before = tensors()
    loss = sum(output.sum() for output in model(X))
    loss.backward()
    assert tensors() <= before | {id(loss), *(id(parameter.grad) for parameter in model.parameters())}


def test_backward_passes_over_parts_of_a_batch() -> None:
    """One after the other, again over a kept graph, and errors over what was freed or changed, as without adapters."""
    base, model = pair(two_outputs, "body|left|right")
    left, right = model(X)
    wanted_left, wanted_right = run_dense(base, model, X)
    parts = [(left, wanted_left, ["left"]), (right, wanted_right, ["body", "right"])]
    for keep in (True, False):
        for output, wanted, paths in parts:
            vectors = [model.get_submodule(path).hra_u["default"] for path in paths]
            found = torch.autograd.grad(output.square().sum(), vectors, retain_graph=keep)
            for mine, oracle in zip(
                found, torch.autograd.grad(wanted.square().sum(), vectors, retain_graph=True), strict=True
            ):
                assert_same(mine, oracle)
    with pytest.raises(RuntimeError, match="second time"):
        right.sum().backward()
    _, right = model(X)
    with torch.no_grad():
        model.right.hra_u["default"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an in-place operation"):
        right.sum().backward()


# ---- peak memory of `fold`, `merge_adapter` and `verify=True` on a model of many equal layers ----

WIDTH = 64
#: Bytes of one weight in float64, which a fold computes with.
LAYER = WIDTH * WIDTH * 8


class Allocated(TorchDispatchMode):
    """Counts the bytes of storages that are made inside, and still referenced."""

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
    assert peak(lambda model: hra_fx.plan_fold(model).apply(), 40) < 6 * LAYER


def test_a_merge_holds_one_copy_of_each_base_weight() -> None:
    few, many = peak(hra_fx.merge_adapter, 4), peak(hra_fx.merge_adapter, 40)
    weight = WIDTH * WIDTH * torch.bfloat16.itemsize
    assert many < few + 36 * weight + LAYER


def test_verification_holds_a_copy_and_its_gradients_in_float64() -> None:
    layers = 40
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False, dtype=torch.bfloat16) for _ in range(layers)))
    with Allocated() as allocated:
        names = map(str, range(layers))
        hra_fx.transform(model, config(*names), verify=True, example_inputs=torch.randn(2, WIDTH, dtype=torch.bfloat16))
    assert allocated.peak < 2 * layers * LAYER + 16 * LAYER
