"""What diffusers calls the methods of an adapted model, and what it does with a model's class."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.training_utils import EMAModel
from diffusion_models import unet
from integrations.diffusers_use.test_stable_diffusion import WAYS
from model.many import seen
from oracles import relative_error
from safetensors.torch import load_file
from torch import Tensor

import hra_fx

ways = pytest.mark.parametrize("way", WAYS)
A, B = (
    {"r": 2, "target_modules": ["to_q", "to_k"], "init_weights": False},
    {"r": 4, "target_modules": ["to_v", "proj_in"], "init_weights": False},
)
CONFIGS = {"a": A, "b": B}


def fresh() -> Any:
    """The same random UNet each time."""
    torch.manual_seed(0)
    return unet().double().eval()


def single(name: str) -> Any:
    """A UNet with one of the adapters alone, drawn for its name."""
    base = fresh()
    torch.manual_seed(ord(name))
    return hra_fx.HRAModel(base, hra_fx.HRAConfig(**CONFIGS[name]), name)


def both() -> Any:
    """A UNet with the adapters "a", which acts, and "b", drawn as in `single`."""
    model = single("a")
    torch.manual_seed(ord("b"))
    model.add_adapter("b", hra_fx.HRAConfig(**B))
    return model


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents, states = ((2, 4, 8, 8), (2, 5, 16))
    return (
        torch.randn(latents, dtype=torch.float64, generator=generator),
        torch.tensor([3, 400]),
        torch.randn(states, dtype=torch.float64, generator=generator),
    )


def run(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(*inputs()).sample
    return found


def test_set_adapters_switches_and_sets_strengths() -> None:
    model, other = both(), both()
    wanted = {name: run(single(name)) for name in CONFIGS}
    assert relative_error(wanted["a"], wanted["b"]) > 1e-3
    assert torch.equal(run(model), wanted["a"])
    for name, given in (("b", "b"), ("a", ["a"])):
        model.set_adapters(given)
        assert model.active_adapters == [name]
        assert torch.equal(run(model), wanted[name])
    for strengths in (None, 0.5, [0.5, 0.25], 0.0):
        model.set_adapters(["b", "a"], *([] if strengths is None else [strengths]))
        other.set_adapter(["b", "a"])
        alphas = strengths if isinstance(strengths, list) else [1.0 if strengths is None else strengths] * 2
        for name, alpha in zip("ba", alphas, strict=True):
            hra_fx.set_scale(other, name, alpha)
        assert model.active_adapters == ["b", "a"]
        assert torch.equal(run(model), run(other))
    assert relative_error(run(model), run(fresh())) < 1e-12
    model.set_adapters("a", weights=1.0)
    assert torch.equal(run(model), wanted["a"])


@pytest.mark.parametrize(
    ("names", "weights", "message"),
    [
        (["a", "c"], None, "'c'"),
        ("a", 2.0, r"`alpha` must be a number .* got 2\.0"),
        (["a", "b"], 2.0, r"got 2\.0"),
        (["a", "b"], [0.5, 2.0], r"got 2\.0"),
        (["a", "b"], [0.5], "weights|shorter|longer"),
        (["a", "b"], [0.5, 0.5, 0.5], "weights|shorter|longer"),
    ],
)
def test_set_adapters_refuses_unknown_names_and_strengths_and_changes_nothing(
    names: Any, weights: Any, message: str
) -> None:
    model = both()
    before = seen(model)
    with pytest.raises((hra_fx.AdapterError, ValueError), match=message):
        model.set_adapters(names, *([] if weights is None else [weights]))
    assert seen(model) == before


def test_disable_adapters_and_enable_adapters() -> None:
    model = both()
    active, base = run(model), run(fresh())
    model.disable_adapters()
    assert torch.equal(run(model), base)
    model.enable_adapters()
    assert torch.equal(run(model), active)


@pytest.mark.parametrize("names", ["b", ["b"]])
def test_delete_adapters(names: Any) -> None:
    model = both()
    model.peft_config.pop("a")  # of a copy of the table
    assert list(model.peft_config) == ["a", "b"]
    model.delete_adapters(names)
    assert list(model.peft_config) == ["a"]
    assert [key for key in model.state_dict() if key.endswith(".b")] == []
    assert torch.equal(run(model), run(single("a")))
    # The name is free again.
    torch.manual_seed(ord("b"))
    model.add_adapter("b", hra_fx.HRAConfig(**B))
    with pytest.warns(hra_fx.HRAWarning, match="adapter 'a' was active and is deleted; 'b' is active now"):
        model.delete_adapters("a")
    assert torch.equal(run(model), run(single("b")))
    before = seen(model)
    message = "adapter 'b' is the only adapter of the model. Call unload() to get the base model."
    with pytest.raises(hra_fx.AdapterError, match=re.escape(message)):
        model.delete_adapters("b")
    assert seen(model) == before


@ways
def test_saving_no_adapter_at_all_is_refused(way: str, tmp_path: Path) -> None:
    model = WAYS[way](fresh(), hra_fx.HRAConfig(**A))
    message = "selected_adapters must not be empty. Use None to save all adapters."
    with pytest.raises(hra_fx.AdapterError, match=f"^{re.escape(message)}$"):
        model.save_pretrained(tmp_path / "there", selected_adapters=[])
    assert list(tmp_path.iterdir()) == []


@ways
def test_the_class_of_an_adapted_model_builds_saves_and_loads_base_models(way: str, tmp_path: Path) -> None:
    plain, model = fresh(), WAYS[way](fresh(), hra_fx.HRAConfig(**A))
    kind, config = diffusers.UNet2DConditionModel, dict(model.config)
    assert inspect.signature(type(model).__init__) == inspect.signature(kind.__init__)
    assert inspect.signature(type(model)) == inspect.signature(kind)
    built = type(model).from_config(model.config).double().eval()
    assert isinstance(built, kind)
    built.load_state_dict(plain.state_dict())
    assert torch.equal(run(built), run(plain))
    assert dict(model.config) == config
    assert built.config["block_out_channels"] == (8, 16)

    built.save_pretrained(tmp_path)
    assert load_file(tmp_path / "diffusion_pytorch_model.safetensors").keys() == plain.state_dict().keys()
    assert type(kind.from_pretrained(tmp_path)) is kind
    for loaded in (type(model).from_pretrained(tmp_path), model.from_pretrained(tmp_path)):
        assert isinstance(loaded, kind)
        assert loaded.state_dict().keys() == plain.state_dict().keys()
        # It is written in float64 and loaded in float32.
        assert relative_error(run(loaded.double().eval()), run(plain)) < 1e-5
    # The object itself is as it was.
    assert relative_error(run(model), run(plain)) > 1e-3


@ways
def test_a_moving_average_of_a_folded_model_is_saved_by_the_class_of_the_adapted_one(way: str, tmp_path: Path) -> None:
    """Moving averages of vectors are tested in `peft_parity/test_ported_scripts.py`."""
    model = WAYS[way](fresh().float(), hra_fx.HRAConfig(**A))
    kind, config = type(model), model.config
    hra_fx.fold(model)
    average = EMAModel(model.parameters(), model_cls=kind, model_config=config)
    average.save_pretrained(tmp_path)
    loaded = diffusers.UNet2DConditionModel.from_pretrained(tmp_path)
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name


def test_projections_are_not_fused_under_reflections_and_are_after_a_fold() -> None:
    model = single("a")
    sample = torch.randn(1, 4, 8, 8, dtype=torch.float64), torch.tensor([3]), torch.randn(1, 3, 16, dtype=torch.float64)
    with torch.no_grad():
        adapted = model(*sample).sample
    message = (
        "UNet2DConditionModel: fuse_qkv_projections copies weights into new layers, which would have no reflections. "
        "Fold the adapters first (hra_fx.fold)."
    )
    with pytest.raises(hra_fx.AdapterError, match=f"^{re.escape(message)}$"):
        model.fuse_qkv_projections()
    assert not any("to_qkv" in name for name, _ in model.named_modules())
    folded = hra_fx.fold(model)
    with torch.no_grad():
        folded.fuse_qkv_projections()
        assert relative_error(folded(*sample).sample, adapted) < 1e-12
    assert any("to_qkv" in name for name, _ in folded.named_modules())
