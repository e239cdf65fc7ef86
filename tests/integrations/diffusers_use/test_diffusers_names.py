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
from integrations.diffusers_use.test_stable_diffusion import TARGETS, WAYS, unet
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


def test_set_adapters_switches_by_one_name_and_by_several() -> None:
    model = both()
    wanted = {name: run(single(name)) for name in CONFIGS}
    assert relative_error(wanted["a"], wanted["b"]) > 1e-3
    assert torch.equal(run(model), wanted["a"])
    model.set_adapters("b")
    assert model.active_adapters == ["b"]
    assert torch.equal(run(model), wanted["b"])
    model.set_adapters(["a"])
    assert model.active_adapters == ["a"]
    assert torch.equal(run(model), wanted["a"])
    model.set_adapters(["b", "a"])
    assert model.active_adapters == ["b", "a"]
    folded = both()
    hra_fx.set_adapter(folded, ["b", "a"])
    hra_fx.fold(folded)
    assert relative_error(run(model), run(folded)) < 1e-12


@pytest.mark.parametrize("weights", [0.5, [0.5, 0.25]])
def test_set_adapters_takes_strengths(weights: Any) -> None:
    model, other = both(), both()
    whole = run(model)
    model.set_adapters(["a", "b"], weights)
    other.set_adapter(["a", "b"])
    hra_fx.set_scale(other, "a", 0.5)
    hra_fx.set_scale(other, "b", 0.5 if weights == 0.5 else 0.25)
    assert torch.equal(run(model), run(other))
    assert relative_error(run(model), whole) > 1e-3
    model.set_adapters(["a", "b"], 0.0)
    assert relative_error(run(model), run(fresh())) < 1e-12
    model.set_adapters("a", weights=1.0)
    assert torch.equal(run(model), whole)


def test_set_adapters_refuses_unknown_names_and_strengths_and_changes_nothing() -> None:
    model = both()
    before = seen(model)
    with pytest.raises(hra_fx.AdapterError, match="'c'"):
        model.set_adapters(["a", "c"])
    assert seen(model) == before
    with pytest.raises(hra_fx.AdapterError, match=r"alpha must be a number .* got 2\.0"):
        model.set_adapters("a", 2.0)
    assert torch.equal(run(model), run(single("a")))


@pytest.mark.parametrize("weights", [[0.5], [0.5, 2.0], [0.5, 0.5, 0.5], 2.0])
def test_strengths_that_do_not_fit_the_names_change_nothing(weights: Any) -> None:
    model = both()
    before = seen(model)
    with pytest.raises((hra_fx.AdapterError, ValueError), match=r"got 2\.0|weights|shorter|longer"):
        model.set_adapters(["a", "b"], weights)
    assert seen(model) == before


def test_disable_and_enable_adapters_give_the_base_and_the_adapter_again() -> None:
    model = both()
    active, base = run(model), run(fresh())
    model.disable_adapters()
    assert torch.equal(run(model), base)
    model.enable_adapters()
    assert torch.equal(run(model), active)
    assert relative_error(active, base) > 1e-3


@pytest.mark.parametrize("names", ["b", ["b"]])
def test_delete_adapters_takes_an_adapter_away_for_good(names: Any) -> None:
    model = both()
    model.delete_adapters(names)
    assert list(model.peft_config) == ["a"]
    assert [key for key in model.state_dict() if key.endswith(".b")] == []
    assert torch.equal(run(model), run(single("a")))
    # The name is free again.
    torch.manual_seed(ord("b"))
    model.add_adapter("b", hra_fx.HRAConfig(**B))
    model.set_adapters("b")
    assert torch.equal(run(model), run(single("b")))


def test_the_last_adapter_is_not_deleted() -> None:
    model = both()
    with pytest.warns(hra_fx.HRAWarning, match="adapter 'a' was active and is deleted; 'b' is active now"):
        model.delete_adapters("a")
    before = seen(model)
    message = "adapter 'b': it is the only one. Call unload() to get the base model."
    with pytest.raises(hra_fx.AdapterError, match=re.escape(message)):
        model.delete_adapters("b")
    assert seen(model) == before


def test_the_configurations_that_it_shows_are_a_copy_of_the_table() -> None:
    model = both()
    shown = model.peft_config
    shown.pop("a")
    shown["c"] = hra_fx.HRAConfig(**A)
    assert list(model.peft_config) == ["a", "b"]
    model.set_adapters("a")
    assert torch.equal(run(model), run(single("a")))


@ways
def test_saving_no_adapter_at_all_is_refused(way: str, tmp_path: Path) -> None:
    model = WAYS[way](fresh(), hra_fx.HRAConfig(**A))
    message = "selected_adapters must not be empty. Use None to save all adapters."
    with pytest.raises(hra_fx.AdapterError, match=f"^{re.escape(message)}$"):
        model.save_pretrained(tmp_path / "there", selected_adapters=[])
    assert list(tmp_path.iterdir()) == []


@ways
def test_the_class_of_an_adapted_model_builds_a_base_model_of_its_architecture(way: str) -> None:
    model = WAYS[way](fresh(), hra_fx.HRAConfig(**A))
    config = dict(model.config)
    built = type(model).from_config(model.config).double().eval()
    assert isinstance(built, diffusers.UNet2DConditionModel)
    plain = fresh()
    assert {key: t.shape for key, t in built.state_dict().items()} == {
        key: t.shape for key, t in plain.state_dict().items()
    }
    built.load_state_dict(plain.state_dict())
    assert torch.equal(run(built), run(plain))
    assert dict(model.config) == config
    assert built.config["block_out_channels"] == (8, 16)


@ways
def test_from_pretrained_of_the_class_and_of_the_object_loads_a_base_model(way: str, tmp_path: Path) -> None:
    plain = fresh()
    plain.save_pretrained(tmp_path)
    model = WAYS[way](fresh(), hra_fx.HRAConfig(**A))
    for loaded in (type(model).from_pretrained(tmp_path), model.from_pretrained(tmp_path)):
        assert isinstance(loaded, diffusers.UNet2DConditionModel)
        assert not any("hra_" in key for key in loaded.state_dict())
        # It is written in float64 and loaded in float32.
        assert relative_error(run(loaded.double().eval()), run(plain)) < 1e-5
    # The object itself is as it was.
    assert relative_error(run(model), run(plain)) > 1e-3


@ways
def test_what_its_class_built_is_saved_and_loaded_as_a_whole_model(way: str, tmp_path: Path) -> None:
    model = WAYS[way](fresh(), hra_fx.HRAConfig(**A))
    built = type(model).from_config(model.config)
    built.save_pretrained(tmp_path)
    written = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert written.keys() == fresh().state_dict().keys()
    again = diffusers.UNet2DConditionModel.from_pretrained(tmp_path)
    assert type(again) is diffusers.UNet2DConditionModel
    assert torch.equal(again.conv_in.weight, built.conv_in.weight)


@ways
def test_the_signature_of_its_class_is_that_of_the_base(way: str) -> None:
    model = WAYS[way](fresh(), hra_fx.HRAConfig(**A))
    wanted = inspect.signature(diffusers.UNet2DConditionModel.__init__)
    assert inspect.signature(type(model).__init__) == wanted
    assert inspect.signature(type(model)) == inspect.signature(diffusers.UNet2DConditionModel)


@ways
def test_a_moving_average_is_kept_and_saved(way: str, tmp_path: Path) -> None:
    model = WAYS[way](fresh().float(), hra_fx.HRAConfig(r=2, target_modules=TARGETS["unet"], init_weights=False))
    average = EMAModel(model.parameters(), decay=0.5, model_cls=type(model), model_config=model.config)
    before = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    average.step(model.parameters())
    after = [p.detach().clone() for p in model.parameters()]
    average.copy_to(model.parameters())
    moved = 0
    decay = average.cur_decay_value
    for parameter, old, new in zip(model.parameters(), before, after, strict=True):
        assert torch.allclose(parameter.detach(), decay * old + (1 - decay) * new, atol=1e-6)
        moved += not torch.equal(old, new)
    assert moved == 48


@ways
def test_a_moving_average_of_a_folded_model_is_saved_by_the_class_of_the_adapted_one(way: str, tmp_path: Path) -> None:
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
    with pytest.raises(hra_fx.AdapterError, match=r"copies the weights .* Fold the adapters first"):
        model.fuse_qkv_projections()
    assert not any("to_qkv" in name for name, _ in model.named_modules())
    folded = hra_fx.fold(model)
    with torch.no_grad():
        folded.fuse_qkv_projections()
        assert relative_error(folded(*sample).sample, adapted) < 1e-12
    assert any("to_qkv" in name for name, _ in folded.named_modules())
