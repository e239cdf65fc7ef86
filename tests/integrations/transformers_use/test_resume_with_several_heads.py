"""A checkpoint is taken up again while another adapter acts than when it was written: to each its own head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import SHAPES, batch, bert, config_for, trainer_of, turn, vectors_of
from torch import Tensor
from transformers import Trainer

import hra_fx

pytestmark = pytest.mark.usefixtures("nothing_is_logged")

shapes = pytest.mark.parametrize("shape", SHAPES)
EVERY_SECOND = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}


def with_two_heads(shape: str, *, seed: int = 1, bias: str = "none") -> Any:
    """A classifier with the adapters "a", which acts, and "b", each with a head of its own."""
    torch.manual_seed(seed)
    model = SHAPES[shape](bert(), config_for("bert", target_modules=["query"], bias=bias), "a")
    hra_fx.add_adapter(model, "b", config_for("bert", target_modules=["value"], bias=bias))
    return model


def give_own_head(model: Any, adapter: str, value: float) -> None:
    hra_fx.set_adapter(model, adapter)
    with torch.no_grad():
        model.classifier.weight.add_(value)
        model.classifier.bias.sub_(value)


def of_adapter(model: Any, name: str) -> dict[str, Tensor]:
    """Head and vectors of one adapter, made to act for it."""
    hra_fx.set_adapter(model, name)
    head = {key: tensor.detach().clone() for key, tensor in model.classifier.named_parameters() if "hra_" not in key}
    vectors = {key: u.detach().clone() for key, u in vectors_of(model).items() if key.endswith(f".{name}")}
    return head | vectors


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=batch("bert")["input_ids"]).logits
    return found


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert got.keys() == wanted.keys()
    assert {"weight", "bias"} <= got.keys()
    for key, tensor in wanted.items():
        assert torch.equal(got[key], tensor), key


@shapes
def test_resuming_with_the_other_adapter_active_gives_each_its_own_head_and_vectors(shape: str, tmp_path: Path) -> None:
    model = with_two_heads(shape)
    turn(model)
    give_own_head(model, "b", 3.0)
    hra_fx.set_adapter(model, "a")
    trainer_of(Trainer, "bert", model, tmp_path, **EVERY_SECOND).train()
    wanted = {name: of_adapter(model, name) for name in ("a", "b")}
    assert not torch.equal(wanted["a"]["weight"], wanted["b"]["weight"])

    fresh = with_two_heads(shape, seed=9)
    hra_fx.set_adapter(fresh, "b")
    assert not torch.equal(fresh.classifier.weight, wanted["b"]["weight"])
    # All steps are done: nothing is trained between loading and looking.
    trainer_of(Trainer, "bert", fresh, tmp_path, **EVERY_SECOND).train(resume_from_checkpoint=True)
    for name in ("b", "a"):
        assert_same(of_adapter(fresh, name), wanted[name])
        assert_same(of_adapter(model, name), wanted[name])
        assert torch.equal(logits(fresh), logits(model))


@pytest.mark.parametrize("active", ["a", "b"])
def test_the_best_model_is_loaded_whichever_adapter_acts_by_then(active: str, tmp_path: Path) -> None:
    model = with_two_heads("transform")
    best: dict[str, dict[str, Tensor]] = {}
    settings = EVERY_SECOND | {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2}
    trainer = trainer_of(Trainer, "bert", model, tmp_path, **settings)
    trainer.train()
    for name in ("a", "b"):
        best[name] = of_adapter(model, name)
    for name in ("a", "b"):
        give_own_head(model, name, 5.0)
    turn(model)
    hra_fx.set_adapter(model, active)
    trainer._load_best_model()
    assert torch.equal(model.classifier.weight, best[active]["weight"])
    for name in ("a", "b"):
        assert_same(of_adapter(model, name), best[name])


def test_a_state_of_one_adapter_does_not_touch_the_head_of_another(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = SHAPES["transform"](bert(), config_for("bert", target_modules=["query"]), "a")
    give_own_head(model, "a", 3.0)
    model.save_pretrained(tmp_path / "checkpoint-1")
    wanted = of_adapter(model, "a")

    fresh = with_two_heads("transform", seed=9)
    give_own_head(fresh, "b", 7.0)
    kept = of_adapter(fresh, "b")
    fresh.load_state_dict(load_file(tmp_path / "checkpoint-1" / "model.safetensors"), strict=False)
    assert_same(of_adapter(fresh, "b"), kept)
    assert_same(of_adapter(fresh, "a"), wanted)
