"""Adapters with a `rank_pattern` in files: saved and loaded, shown, and converted for PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from checkpoint.disk import made
from cli.shell import Answer, answer, mistake
from safetensors.torch import load_file
from torch import Tensor

import hra_fx

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
IDS = torch.arange(3, 15).view(2, 6)
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
KINDS: dict[str, dict[str, Any]] = {
    "even": {"r": 4, "rank_pattern": {"layers.0.self_attn.q_proj": 6, "v_proj": 2}},
    "odd": {"r": 3, "rank_pattern": {"v_proj": 5}},
    "mixed": {"r": 4, "rank_pattern": {"0.self_attn.q_proj": 3, "v_proj": 1}},
    "equal": {"r": 4, "rank_pattern": {"v_proj": 3}},
    "orthonormal": {"r": 2, "rank_pattern": {"v_proj": 3}, "apply_GS": True},
    "at random": {"r": 2, "rank_pattern": {"v_proj": 4}, "apply_GS": True, "init_weights": False},
}


@pytest.fixture(autouse=True)
def _no_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers of pytest-xdist have a width of their own, which a pipe has not."""
    monkeypatch.delenv("COLUMNS", raising=False)


def base() -> Any:
    torch.manual_seed(1)
    model = made.llama()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval()


def trained(kind: str) -> Any:
    model = hra_fx.transform(base(), hra_fx.HRAConfig(target_modules=["q_proj", "v_proj"], **KINDS[kind]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def vectors(model: Any) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if ".hra_u." in name}


@pytest.mark.parametrize("kind", KINDS)
def test_training_goes_on_with_the_same_vectors(tmp_path: Path, kind: str) -> None:
    model = trained(kind)
    hra_fx.save_adapter(model, tmp_path)
    again = hra_fx.load_adapter(base(), tmp_path, is_trainable=True)
    assert torch.equal(logits(again), logits(model))
    ours, theirs = vectors(model), vectors(again)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    hra_fx.save_adapter(again, tmp_path / "again")
    assert (tmp_path / "again" / CONFIG).read_text() == (tmp_path / CONFIG).read_text()
    written, before = (load_file(folder / WEIGHTS) for folder in (tmp_path / "again", tmp_path))
    assert written.keys() == before.keys() and all(torch.equal(written[key], before[key]) for key in before)
    with torch.no_grad():
        for tensor in vectors(again).values():
            tensor.zero_()
    hra_fx.load_adapter(again, tmp_path)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("kind", KINDS)
def test_peft_opens_what_is_converted(tmp_path: Path, kind: str) -> None:
    model = trained(kind)
    hra_fx.save_adapter(model, tmp_path / "ours")
    answer("convert", tmp_path / "ours", tmp_path / "theirs", "--to", "peft")
    ranks = {tensor.shape[1] for tensor in load_file(tmp_path / "theirs" / WEIGHTS).values()}
    assert ranks == {json.loads((tmp_path / "theirs" / CONFIG).read_text())["r"]}
    opened = peft.PeftModel.from_pretrained(base(), tmp_path / "theirs")
    torch.testing.assert_close(logits(opened), logits(model), rtol=1e-4, atol=1e-4)
    back = hra_fx.load_adapter(base(), tmp_path / "theirs")
    torch.testing.assert_close(logits(back), logits(model), rtol=1e-4, atol=1e-4)


def test_odd_and_even_chains_have_no_form_for_peft(tmp_path: Path) -> None:
    fields = {"r": 2, "rank_pattern": {"v_proj": 3}, "init_weights": False}
    model = hra_fx.transform(base(), hra_fx.HRAConfig(target_modules=["q_proj", "v_proj"], **fields))
    hra_fx.save_adapter(model, tmp_path / "ours")
    text = mistake("convert", tmp_path / "ours", tmp_path / "theirs", "--to", "peft")
    assert ": model.layers.0.self_attn.q_proj: 2 reflections cannot be padded to 3: the difference must be" in text
    assert not (tmp_path / "theirs").exists()


def test_a_dry_run_shows_it(tmp_path: Path) -> None:
    made.base_of(made.llama(), tmp_path / "model")
    fields = KINDS["even"]
    hra_fx.HRAConfig(target_modules=["q_proj", "v_proj"], **fields).save_pretrained(tmp_path / "adapter")
    hra_fx.save_adapter(trained("even"), tmp_path / "ours")
    assert "r = 2 to 6" in answer("inspect", tmp_path / "ours")
    words = ("match", tmp_path / "model", "--config", tmp_path / "adapter")
    report = hra_fx.report(trained("even"))
    found = Answer(*words, "--json").json
    assert {layer["path"]: layer["r"] for layer in found["adapted"]} == {row.path: row.r for row in report}
    assert found["trained"] == sum(row.parameters for row in report)
    lines = answer(*words).splitlines()
    assert any("layers.0.self_attn.q_proj" in line and " 6 " in line for line in lines)
