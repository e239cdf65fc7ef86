"""A training step, inference and `set_adapter` never wait for the device: nothing reads a value of a tensor.

On a CPU nothing waits, so the step runs under a mode that sees calls from Python, and under the profiler, which sees
what operators call. `benchmarks/gpu.py` runs a step under CUDA's own check.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from layers.quantized.bases import SCHEMES, adapted as quantized, inputs
from one_layer import normal
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
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


class _Calls(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        self.found += [name] * (name in CALLS)
        return function(*args, **(kwargs or {}))


@contextmanager
def no_waiting() -> Iterator[None]:
    """Fail where a value of a tensor is read on the host."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler, _Calls() as calls:
        yield
    assert calls.found == []
    assert OPERATORS.isdisjoint(event.key for event in profiler.key_averages())


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layer(x, x, x, need_weights=False)[0]
        return output


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Linear": (lambda: nn.Linear(8, 6), (2, 3, 8)),
    "Conv1D": (lambda: Conv1D(6, 8), (2, 3, 8)),
    "Conv2d": (lambda: nn.Conv2d(4, 6, 3), (8, 4, 9, 9)),
    "Conv2d, groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1, padding_mode="reflect"), (2, 4, 9, 9)),
    "MultiheadAttention": (Attention, (2, 3, 8)),
}
ADAPTERS: dict[str, list[dict[str, Any]]] = {
    "plain": [{"r": 4}],
    "anchor": [{"r": 3}],
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
    layer, x = make(), normal(1, *shape, dtype=torch.float32).requires_grad_()
    model = layer if isinstance(layer, Attention) else nn.Sequential(OrderedDict(layer=layer))
    names = [f"a{index}" for index in range(len(ADAPTERS[adapters]))]
    for name, fields in zip(names, ADAPTERS[adapters], strict=True):
        config = hra_fx.HRAConfig(target_modules=["layer"], **fields)
        if name == "a0":
            model = hra_fx.transform(model, config, name)
        else:
            hra_fx.add_adapter(model, name, config)
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
