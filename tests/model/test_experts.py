"""What an adapted model can do, with adapters on the experts of a mixture of experts."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from adapting import randomise
from moe_models import built, call_of, experts_config, oracle, vectors_of
from oracles import dense_product, relative_error
from torch import Tensor, nn

import hra_fx

NAMES = ("qwen3_moe", "llama4")  # both layouts


def base_of(name: str) -> nn.Module:
    return built(name, implementation="eager")


def model_of(name: str, adapter: str = "default", **fields: Any) -> nn.Module:
    """A model with random vectors."""
    model = hra_fx.transform(base_of(name), experts_config(**fields), adapter)
    randomise(model)
    return model


def logits_of(name: str, model: nn.Module) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(**call_of(name)).logits
    return logits


@pytest.mark.parametrize("fields", [{}, {"apply_GS": True}, {"r": 3}], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_fold_gives_the_base_model_with_dense_rotated_experts(name: str, fields: dict[str, Any]) -> None:
    base, model = base_of(name), model_of(name, **fields)
    wanted, _ = oracle(base, model, call_of(name), apply_GS="apply_GS" in fields)
    plan = hra_fx.plan_fold(model)
    assert all(layer.change > 0.1 and layer.rounding < 1e-12 for layer in plan.layers)
    hra_fx.fold(model)
    assert relative_error(logits_of(name, model), wanted) <= 1e-12
    assert list(model.state_dict()) == list(base.state_dict())
    assert [type(part) for part in model.modules()] == [type(part) for part in base.modules()]
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_copies_pickles_and_states(name: str) -> None:
    model = model_of(name)
    wanted = logits_of(name, model)
    other = hra_fx.transform(base_of(name), experts_config())
    other.load_state_dict(model.state_dict())
    assigned = hra_fx.transform(base_of(name), experts_config())
    assigned.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    for same in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), other, assigned):
        assert torch.equal(logits_of(name, same), wanted)
        hra_fx.fold(same)
        assert relative_error(logits_of(name, same), wanted) <= 1e-12
    assert torch.equal(logits_of(name, model), wanted)


@pytest.mark.parametrize("name", NAMES)
def test_merge_disable_and_scale(name: str) -> None:
    model, base = model_of(name), logits_of(name, base_of(name))
    wanted = logits_of(name, model)
    hra_fx.merge_adapter(model)
    assert relative_error(logits_of(name, model), wanted) <= 1e-12
    hra_fx.unmerge_adapter(model)
    with hra_fx.disable_adapters(model):
        assert torch.equal(logits_of(name, model), base)
    hra_fx.set_scale(model, "default", 0.5)
    assert relative_error(logits_of(name, model), wanted) > 0.01
    # Half of it, folded, and half again is the whole.
    again = hra_fx.transform(hra_fx.fold(copy.deepcopy(model)), experts_config())
    randomise(again)
    hra_fx.set_scale(again, "default", 0.5)
    assert relative_error(logits_of(name, again), wanted) <= 1e-9
    hra_fx.set_scale(model, "default", 0)
    assert relative_error(logits_of(name, model), base) <= 1e-12
    hra_fx.set_scale(model, "default", 1)
    assert torch.equal(logits_of(name, model), wanted)


@pytest.mark.parametrize("name", NAMES)
def test_several_adapters_in_order(name: str) -> None:
    model = model_of(name)
    alone = logits_of(name, model)
    hra_fx.add_adapter(model, "b", experts_config(r=4, target_modules=["q_proj"], init_weights=False))
    hra_fx.set_adapter(model, ["default", "b"])
    both = logits_of(name, model)
    hra_fx.set_adapter(model, ["b", "default"])
    assert relative_error(logits_of(name, model), both) > 1e-3
    hra_fx.combine(model, ["default", "b"], "ab")
    hra_fx.set_adapter(model, "ab")
    assert relative_error(logits_of(name, model), both) <= 1e-12
    hra_fx.set_adapter(model, ["default", "b"])
    partly = hra_fx.fold(copy.deepcopy(model), ["default"])
    assert relative_error(logits_of(name, partly), both) <= 1e-12
    hra_fx.delete_adapter(model, "ab")
    hra_fx.delete_adapter(model, "b")
    assert torch.equal(logits_of(name, model), alone)
    hra_fx.delete_adapter(model, "default")
    assert list(model.state_dict()) == list(base_of(name).state_dict())


@pytest.mark.parametrize(("name", "fields"), [("qwen3_moe", {"r": 3}), ("llama4", {"apply_GS": True})])
def test_files(name: str, fields: dict[str, Any], tmp_path: Path) -> None:
    model = model_of(name, **fields)
    wanted = logits_of(name, model)
    hra_fx.save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_parameters"] == ["experts.gate_up_proj", "experts.down_proj"]
    loaded = hra_fx.load_adapter(base_of(name), tmp_path, is_trainable=True)
    assert relative_error(logits_of(name, loaded), wanted) <= 1e-12
    kept = vectors_of(loaded)
    assert {n: tuple(v.shape) for n, v in kept.items()} == {n: tuple(v.shape) for n, v in vectors_of(model).items()}
    randomise(loaded, seed=4)
    hra_fx.load_adapter(loaded, tmp_path, is_trainable=True)
    assert relative_error(logits_of(name, loaded), wanted) <= 1e-12
    hra_fx.load_adapter(loaded, tmp_path, "third")
    hra_fx.set_adapter(loaded, "third")
    assert relative_error(logits_of(name, loaded), wanted) <= 1e-12


def test_verify() -> None:
    model = hra_fx.transform(base_of("qwen3_moe"), experts_config(), verify=True, example_inputs=call_of("qwen3_moe"))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == [name for name, _ in model.named_parameters() if ".hra_u." in name]


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
    assert len(hra_fx.graphs(model)) == 4
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


def gradients(model: nn.Module, call: Any = None) -> dict[str, Tensor]:
    """The gradients of the vectors, from a call of the model or of what is made of it."""
    model.zero_grad()
    (model if call is None else call)(**call_of("qwen3_moe")).logits.square().sum().backward()
    return {name: vectors.grad.clone() for name, vectors in vectors_of(model).items()}


def test_saved_in_full_by_another_adapter() -> None:
    model = model_of("qwen3_moe")
    config = hra_fx.HRAConfig(target_modules=["q_proj"], modules_to_save=["0.mlp.experts"])
    with pytest.raises(hra_fx.UnsupportedLayerError, match="another adapter reflects its gate_up_proj"):
        hra_fx.add_adapter(model, "full", config)
