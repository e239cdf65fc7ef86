"""Adapters on experts: what `tests/layers/test_lifecycle.py` does not test for layers of every kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapting import randomise
from moe_models import built, call_of, experts_config, vectors_of
from oracles import dense_product, relative_error
from torch import Tensor, nn

import hra_fx


def base_of(name: str) -> nn.Module:
    return built(name, implementation="eager")


def model_of(name: str, adapter: str = "default", **fields: Any) -> nn.Module:
    """A model with random vectors."""
    model = hra_fx.transform(base_of(name), experts_config(**fields), adapter)
    randomise(model)
    return model


def test_report_and_pictures(tmp_path: Path) -> None:
    model = model_of("qwen3_moe")
    rows = hra_fx.report(model).rows
    assert len(rows) == 4
    row = rows[0]
    assert row.path == "model.layers.0.mlp.experts.hra_gate_up_proj"
    assert row.layer_type == "Qwen3MoeExperts.gate_up_proj 4x(16->32)"
    assert (row.d, row.r, row.parameters) == (16, 2, 4 * 16 * 2)
    assert len(row.angles) <= 4 and 0 < row.share < 1
    vectors = next(iter(vectors_of(model).values())).detach()
    dense = torch.block_diag(*(dense_product(own) for own in vectors))
    assert abs(row.rotation - float((dense - torch.eye(len(dense))).norm())) < 1e-9
    hra_fx.visualize(model, tmp_path / "picture.html")
    assert float(hra_fx.orthogonality_loss(model).detach()) > 0


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing(_kwargs)?` is deprecated:FutureWarning")
def test_gradient_checkpointing() -> None:
    model = model_of("qwen3_moe")
    wanted = gradients(model)
    for part in model.modules():
        if hasattr(part, "attention_dropout"):
            part.attention_dropout = 0.0
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    found = gradients(model.train())
    for name, gradient in wanted.items():
        assert relative_error(found[name], gradient) <= 1e-9


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients of the vectors."""
    model.zero_grad()
    model(**call_of("qwen3_moe")).logits.square().sum().backward()
    return {name: vectors.grad.clone() for name, vectors in vectors_of(model).items()}


def test_saved_in_full_by_another_adapter() -> None:
    model = model_of("qwen3_moe")
    config = hra_fx.HRAConfig(target_modules=["q_proj"], modules_to_save=["0.mlp.experts"])
    with pytest.raises(hra_fx.UnsupportedLayerError, match="another adapter reflects its gate_up_proj"):
        hra_fx.add_adapter(model, "full", config)
