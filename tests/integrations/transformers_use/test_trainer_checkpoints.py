"""The folders that the Trainer writes: they hold adapters, all of them, and PEFT opens them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from oracles import relative_error
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_models import (
    BASES,
    adapted,
    batch,
    config_for,
    llama,
    pairs,
    rotated,
    trainer_of,
    turn,
    vectors_of,
)
from torch import Tensor, nn
from transformers import Trainer

import hra_fx

pytestmark = [
    pytest.mark.usefixtures("nothing_is_logged"),
    # PEFT asks transformers for an attribute by its old name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

EVERY_THIRD = {"save_strategy": "steps", "save_steps": 3}
SITES = {
    "bert": [f"bert.encoder.layer.{i}.attention.self.{name}" for i in (0, 1) for name in ("query", "value")],
    "llama": [
        f"model.layers.{i}.{name}" for i in (0, 1) for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
    ],
}
HEAD = {"bert": ["classifier.weight", "classifier.bias"], "llama": []}
TRAINERS_OWN = {"optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json", "training_args.bin"}


def trained(kind: str, shape: str, folder: Path) -> tuple[Any, Path]:
    """A model after six steps, and its last checkpoint."""
    model = adapted(kind, shape)
    trainer_of(Trainer, kind, model, folder, **EVERY_THIRD).train()
    return model.eval(), folder / "checkpoint-6"


def logits(model: nn.Module, kind: str) -> Tensor:
    """In float64, where two ways to compute the same do not differ by their rounding."""
    with torch.no_grad():
        out: Tensor = copy.deepcopy(model).double().eval()(input_ids=batch(kind)["input_ids"]).logits
    return out


def keys_of(path: Path) -> set[str]:
    with safe_open(path, "pt") as file:
        return set(file.keys())


@pairs
def test_a_checkpoint_holds_the_adapter_alone_and_peft_opens_it(kind: str, shape: str, tmp_path: Path) -> None:
    model, folder = trained(kind, shape, tmp_path)
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    assert files - TRAINERS_OWN == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "model.safetensors",
    }
    chains = {f"base_model.model.{site}.hra_u" for site in SITES[kind]}
    assert keys_of(folder / "adapter_model.safetensors") == chains | {f"base_model.model.{n}" for n in HEAD[kind]}
    vectors = {f"{site}.hra_u.default" for site in SITES[kind]}
    anchors = {f"{name}_anchor" for name in vectors} if kind == "bert" else set()
    assert keys_of(folder / "model.safetensors") == vectors | anchors | set(HEAD[kind])
    opened = peft.PeftModel.from_pretrained(BASES[kind](), str(folder))
    assert type(opened) is {"bert": peft.PeftModelForSequenceClassification, "llama": peft.PeftModelForCausalLM}[kind]
    assert relative_error(logits(opened, kind), logits(model, kind)) < 1e-6
    assert (logits(BASES[kind](), kind) - logits(model, kind)).abs().max() > 1e-4
    assert torch.equal(logits(hra_fx.load_adapter(BASES[kind](), folder), kind), logits(model, kind))


def with_two(shape: str, active: str | list[str], seed: int = 1) -> Any:
    """A Llama with adapters "default" and "other", on layers that overlap."""
    model = adapted("llama", shape, seed=seed)
    hra_fx.add_adapter(model, "other", config_for("llama", r=3, target_modules=["v_proj", "o_proj"]))
    turn(model, seed)
    hra_fx.set_adapter(model, active)
    return model


@pytest.mark.parametrize("active", ["default", "other", ["other", "default"]], ids=str)
def test_a_checkpoint_contains_all_adapters_whichever_are_active(active: str | list[str], tmp_path: Path) -> None:
    model, resumed = with_two("transform", active), with_two("HRAModel", active, seed=7)
    before = {name: vectors.detach().clone() for name, vectors in vectors_of(model).items()}
    trainer_of(Trainer, "llama", model, tmp_path, **EVERY_THIRD).train()
    folder = tmp_path / "checkpoint-6"
    assert {path.parent.relative_to(folder).as_posix() for path in folder.rglob("adapter_config.json")} == {
        ".",
        "other",
    }
    saved = load_file(folder / "model.safetensors")
    assert {name for name in saved if not name.endswith("_anchor")} == set(before)
    for name, vectors in vectors_of(model).items():
        assert torch.equal(saved[name], vectors), name
        moves = name.rpartition(".")[2] in ([active] if isinstance(active, str) else active)
        assert torch.equal(vectors, before[name]) is not moves, name
    if active == "default":
        opened = peft.PeftModel.from_pretrained(llama(), str(folder))
        opened.load_adapter(str(folder / "other"), "other")
        for name in ("other", "default"):
            opened.set_adapter(name)
            hra_fx.set_adapter(model, name)
            assert relative_error(logits(opened, "llama"), logits(model, "llama")) < 1e-6
            assert relative_error(logits(rotated(llama(), model, name), "llama"), logits(model, "llama")) < 1e-6

    trainer_of(Trainer, "llama", resumed, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for name, value in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_the_trainer_saves_the_model_for_use_without_what_only_it_needs(tmp_path: Path) -> None:
    model = adapted("llama", "HRAModel")
    training = trainer_of(Trainer, "llama", model, tmp_path / "runs")
    training.train()
    training.save_model(str(tmp_path / "out"))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "adapter_config.json",
        "README.md",
        "adapter_model.safetensors",
        "training_args.bin",
    }
    assert torch.equal(logits(hra_fx.load_adapter(llama(), tmp_path / "out"), "llama"), logits(model, "llama"))
