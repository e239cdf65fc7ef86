"""A base model, an adapted copy with random vectors, and the base model with dense weights `W Q` in float64.

The oracle only uses the names of the library's vectors: `torch.func.functional_call` runs the base model with each
adapted weight replaced by that of `tests/support/oracles.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from adapting import randomise
from moe_models import dense_experts, is_transposed
from one_layer import F64, normal
from oracles import dense_chain, reflected
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import hra_fx


def pair(
    make: Callable[[], nn.Module],
    targets: Sequence[str] | str,
    dtype: torch.dtype = F64,
    **fields: Any,
) -> tuple[nn.Module, nn.Module]:
    """A base model in eval mode, and an adapted copy with random vectors."""
    torch.manual_seed(0)
    base = make().to(dtype).eval()
    named = targets if isinstance(targets, str) else list(targets)
    config = hra_fx.HRAConfig(**({"r": 3, "target_modules": named} | fields))
    model = hra_fx.transform(copy.deepcopy(base), config)
    randomise(model)
    return base, model


def vectors_of(model: nn.Module, adapter: str = "default") -> dict[str, nn.Parameter]:
    """Path of a layer -> the vectors of one adapter."""
    ending = f".hra_u.{adapter}"
    return {name.removesuffix(ending): p for name, p in model.named_parameters() if name.endswith(ending)}


def weight_name(model: nn.Module, path: str) -> str:
    """The name of the parameter that the vectors at a path rotate."""
    owner, _, last = path.rpartition(".")
    if last.startswith("hra_"):  # represents a parameter of experts
        return f"{owner}.{last.removeprefix('hra_')}"
    is_attention = isinstance(model.get_submodule(path), nn.MultiheadAttention)
    return f"{path}.in_proj_weight" if is_attention else f"{path}.weight"


def rotated(layer: nn.Module, weight: Tensor, box: Any, adapter: str = "default") -> Tensor:
    """`W Q` of a layer in float64, for the vectors of an adapter in its container. Differentiable in both."""
    chain = dense_chain(box[adapter], apply_GS=box.specs[adapter].apply_GS)
    if isinstance(layer, Conv1D):
        return reflected(weight.mT, chain).mT
    return reflected(weight.flatten(1), chain).view(weight.shape)


def dense_weights(base: nn.Module, model: nn.Module, adapters: Sequence[str] = ("default",)) -> dict[str, Tensor]:
    """Name of a weight -> `W Q_a Q_b ...` for every adapted layer of `model`, from the weights of `base`.

    Differentiable in the vectors and in the weights.
    """
    found: dict[str, Tensor] = {}
    for adapter in adapters:
        for path in vectors_of(model, adapter):
            name, box = weight_name(base, path), model.get_submodule(f"{path}.hra_u")
            owner, _, last = name.rpartition(".")
            layer = base.get_submodule(owner)
            weight: Any = found.get(name, layer._parameters[last])
            if path == owner:
                found[name] = rotated(layer, weight, box, adapter)
            else:
                gs = box.specs[adapter].apply_GS
                found[name] = dense_experts(weight, box[adapter], is_transposed(base, name), apply_GS=gs)
    return found


def run_dense(
    base: nn.Module,
    model: nn.Module,
    *args: Any,
    adapters: Sequence[str] = ("default",),
    **kwargs: Any,
) -> Any:
    """The output of the base model with the dense weights."""
    # With tie_weights=True, functional_call changes a module that has two paths.
    return torch.func.functional_call(base, dense_weights(base, model, adapters), args, kwargs, tie_weights=False)


def tensors(output: Any) -> list[Tensor]:
    """The floating-point tensors of an output, in order."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    items = output.values() if isinstance(output, dict) else output if isinstance(output, (list, tuple)) else ()
    return [tensor for item in items for tensor in tensors(item)]


def assert_same(actual: Any, expected: Any, rtol: float = 1e-10) -> None:
    """Check number, shapes and values of outputs; `rtol` is relative to the largest value of each tensor."""
    got, wanted = tensors(actual), tensors(expected)
    assert wanted and [tensor.shape for tensor in got] == [tensor.shape for tensor in wanted]
    for one, other in zip(got, wanted, strict=True):
        finite = other.detach()[other.isfinite()]
        atol = rtol * float(finite.abs().max()) if finite.numel() else 0.0
        torch.testing.assert_close(one.double(), other.double(), rtol=0, atol=atol)


def gradients(output: Any, leaves: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of a fixed linear combination of all values of an output."""
    parts = [(value * normal(7 + place, *value.shape)).sum() for place, value in enumerate(tensors(output))]
    return list(torch.autograd.grad(torch.stack(parts).sum(), leaves))


def check(base: nn.Module, model: nn.Module, *args: Any, rtol: float = 1e-10, **kwargs: Any) -> None:
    """Check outputs in train and eval mode and without gradients, and the gradients of all vectors in both modes."""
    leaves = list(vectors_of(model).values())
    assert leaves
    for training in (True, False):
        base.train(training)
        model.train(training)
        outputs = []
        for run in (lambda: model(*args, **kwargs), lambda: run_dense(base, model, *args, **kwargs)):
            torch.manual_seed(5)
            outputs.append(run())
        assert_same(*outputs, rtol=rtol)
        for mine, oracle in zip(gradients(outputs[0], leaves), gradients(outputs[1], leaves), strict=True):
            assert float(oracle.abs().max()) > 1e-8  # every layer is trained
            assert_same(mine, oracle, rtol=100 * rtol)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert_same(model(*args, **kwargs), run_dense(base, model, *args, **kwargs), rtol=rtol)
    with torch.no_grad():
        moved = zip(tensors(model(*args, **kwargs)), tensors(base(*args, **kwargs)), strict=True)
        assert max(float((a - b).nan_to_num().abs().max()) for a, b in moved) > 1e-4


def check_fold(base: nn.Module, model: nn.Module, *args: Any, rtol: float = 1e-10, **kwargs: Any) -> nn.Module:
    """Check that a fold keeps outputs, has dense weights `W Q`, and the keys, classes and flags of the base model."""
    with torch.no_grad():
        wanted = {name: weight.clone() for name, weight in dense_weights(base, model).items()}
        before = model(*args, **kwargs)
    folded = hra_fx.fold(model)
    with torch.no_grad():
        assert_same(folded(*args, **kwargs), before, rtol=rtol)
    assert [(path, type(part)) for path, part in folded.named_modules()] == [
        (path, type(part)) for path, part in base.named_modules()
    ]
    state = folded.state_dict()
    assert list(state) == list(base.state_dict())
    for name, value in base.state_dict().items():
        if name in wanted:
            assert_same(state[name], wanted[name], rtol=rtol)
            assert state[name].stride() == value.stride()
        elif not any(name.endswith(end) for end in ("weight", "running_mean", "running_var", "num_batches_tracked")):
            assert torch.equal(state[name], value), name
    assert {name: p.requires_grad for name, p in folded.named_parameters()} == {
        name: p.requires_grad for name, p in base.named_parameters()
    }
    return folded
