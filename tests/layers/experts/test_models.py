"""Adapted experts of transformers against dense rotated weights, in every implementation of the experts."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from moe_models import (
    NAMES,
    built,
    call_of,
    experts_config,
    oracle,
    randomise,
    vectors_of,
)
from oracles import relative_error
from torch import Tensor, nn

import hra_fx


def gradients(model: nn.Module, call: Mapping[str, object]) -> tuple[Tensor, dict[str, Tensor]]:
    """The logits, and the gradients of the sum of their squares."""
    logits: Tensor = model(**call).logits
    logits.square().sum().backward()
    return logits.detach(), {name: v.grad for name, v in vectors_of(model).items() if v.grad is not None}


def check(name: str, implementation: str | None, dtype: torch.dtype, tolerance: float, **fields: object) -> None:
    """Compare a model with the oracle, with and without gradients."""
    base, call = built(name, dtype, implementation), call_of(name)
    model = hra_fx.transform(built(name, dtype, implementation), experts_config(**fields))
    assert relative_error(model(**call).logits, base(**call).logits) <= tolerance
    randomise(model)
    wanted, wanted_gradients = oracle(base, model, call, apply_GS=bool(fields.get("apply_GS")))
    logits, found = gradients(model, call)
    assert relative_error(wanted, base(**call).logits) > 0.01
    assert relative_error(logits, wanted) <= tolerance
    assert found.keys() == wanted_gradients.keys() and len(found) >= 2
    for parameter, gradient in wanted_gradients.items():
        assert relative_error(found[parameter], gradient) <= tolerance, parameter
    with torch.no_grad():
        assert relative_error(model(**call).logits, wanted) <= tolerance
    with torch.inference_mode():
        assert relative_error(model(**call).logits, wanted) <= tolerance


EXACT, NARROW = (torch.float64, 1e-9), (torch.float32, 1e-5)
CASES: list[tuple[str, str, tuple[torch.dtype, float], dict[str, object]]] = [
    *((name, "eager", EXACT, {}) for name in NAMES),
    *((name, "eager", EXACT, fields) for name in ("mixtral", "llama4") for fields in ({"apply_GS": True}, {"r": 3})),
    *((name, "batched_mm", EXACT, {}) for name in ("qwen3_moe", "gpt_oss")),
    *((name, "grouped_mm", NARROW, {"r": r}) for name in ("qwen3_moe", "gpt_oss") for r in (2, 3)),
]


@pytest.mark.parametrize(("name", "implementation", "accuracy", "fields"), CASES, ids=str)
def test_each_model_equals_dense_rotated_experts(
    name: str, implementation: str, accuracy: tuple[torch.dtype, float], fields: dict[str, object]
) -> None:
    check(name, implementation, *accuracy, **fields)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_no_rotated_weight_is_kept_for_backward(implementation: str) -> None:
    """Whatever autograd saves in the shape of an expert's weight is one of the base model's."""
    dtype = torch.float32 if implementation == "grouped_mm" else torch.float64
    model = hra_fx.transform(built("qwen3_moe", dtype, implementation), experts_config())
    randomise(model)
    weights = [p.detach() for n, p in model.named_parameters() if p.dim() == 3 and ".hra_u." not in n]
    known = [expert for weight in weights for expert in (*weight, *weight.mT)]
    shapes = {expert.shape for expert in known}
    others = {p.untyped_storage().data_ptr() for p in model.parameters() if p.dim() != 3}
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.shape[-2:] in shapes and tensor.untyped_storage().data_ptr() not in others:
            saved.extend(tensor.detach().reshape(-1, *tensor.shape[-2:]))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**call_of("qwen3_moe")).logits.sum().backward()
    assert saved
    for tensor in saved:
        assert any(torch.equal(tensor, expert) for expert in known)
