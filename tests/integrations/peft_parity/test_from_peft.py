"""`from_peft`: the same outputs, gradients, names and state as PEFT's model, and what it refuses."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from model.many import refuses
from oracles import dense_q, dense_weight, relative_error
from peft.tuners.hra import HRALayer
from peft_sides import (
    CASES,
    F32,
    F64,
    Net,
    agree,
    by_peft,
    net,
    opened_by_peft,
    peft_warnings_ignored,
    randomised_by_peft,
    same_line,
    same_tensors,
    saved_by_peft,
    tokens,
    trained,
    with_two_by_peft,
)
from tiny_models import inputs, tiny
from torch import Tensor, nn

import hra_fx


@pytest.mark.parametrize("case", CASES)
def test_outputs_gradients_and_counts_are_those_of_peft(case: str) -> None:
    theirs = randomised_by_peft(case)
    kept = copy.deepcopy(theirs)
    ours = hra_fx.from_peft(theirs)
    assert isinstance(ours, Net) and isinstance(ours, hra_fx.HRAModel)
    assert trained(ours).keys() == trained(kept).keys()
    agree(kept, ours, tokens(), F64)
    same_line(kept, ours)
    with peft_warnings_ignored(), ours.disable_adapter(), kept.disable_adapter():
        assert relative_error(ours(tokens()), kept(tokens())) < 1e-12
    assert ours.training is kept.get_base_model().training
    assert not any(type(part).__module__.startswith("peft.") for part in ours.modules())
    assert list(hra_fx.fold(ours).state_dict()) == list(net().state_dict()) and "peft_config" not in vars(ours)


@pytest.mark.parametrize("active", [["default"], ["other"], ["default", "other"], ["other", "default"]])
def test_all_adapters_and_the_order_of_the_active_ones(active: list[str]) -> None:
    model = with_two_by_peft()
    model.base_model.set_adapter(active)
    kept = copy.deepcopy(model)
    ours = hra_fx.from_peft(model)
    assert ours.active_adapters == active and list(ours.peft_config) == ["default", "other"]
    # PEFT computes layers without an active adapter in float32.
    agree(kept, ours, tokens(), F32)
    for names in (["default"], ["other"]):
        kept.base_model.set_adapter(names)
        ours.set_adapter(names)
        assert relative_error(ours(tokens()), kept(tokens())) < 1e-6


def test_frozen_and_disabled_adapters_stay_so() -> None:
    model = with_two_by_peft()
    model.base_model.set_adapter(["other"], inference_mode=True)
    ours = hra_fx.from_peft(copy.deepcopy(model))
    assert not trained(ours)
    model.base_model.disable_adapter_layers()
    ours = hra_fx.from_peft(model)
    assert relative_error(ours(tokens()), net(F64)(tokens())) < 1e-12
    ours.enable_adapter_layers()
    assert ours.active_adapters == ["other"]
    assert relative_error(ours(tokens()), net(F64)(tokens())) > 1e-3


def refused(model: nn.Module, text: str) -> None:
    with refuses(model, text):
        hra_fx.from_peft(model)


def test_what_cannot_be_taken_over_is_refused_and_unchanged() -> None:
    refused(
        net(),
        r"^Net contains 0 models with PEFT adapters\. Pass one whole model .* call hra_fx\.transform\(model, config\)",
    )
    with peft_warnings_ignored():
        lora = peft.get_peft_model(net(), peft.LoraConfig(r=2, target_modules=["query"]))
    refused(lora, r"query: this layer is from another PEFT method \(Linear\)\. Only HRA can be converted\.")
    with peft_warnings_ignored():
        peft.inject_adapter_in_model(peft.HRAConfig(r=2, target_modules=["conv"]), lora.get_base_model(), "hra")
    merged = randomised_by_peft()
    merged.merge_adapter()
    refused(merged, r"query: adapters \['default'\] are merged\. First call unmerge_adapter\(\) on the PEFT model\.")
    with peft_warnings_ignored():
        oblong = peft.get_peft_model(nn.Sequential(nn.Conv2d(2, 3, (1, 3))), peft.HRAConfig(target_modules=["0"]))
    refused(oblong, r"^0: PEFT's vectors of 'default' have length 2, but a row of the weight has 6 entries\.")
    changed = with_two_by_peft()
    changed.peft_config["other"].target_modules = ["query"]
    x = tokens()
    wanted = changed(x)
    refused(changed, r"adapter 'other': body\.layers\.0\.out does not match the adapter's configuration")
    assert torch.equal(changed(x), wanted)
    ours = hra_fx.get_peft_model(net(), hra_fx.HRAConfig(r=2, target_modules=["query"]))
    refused(ours, "^Net already has hra_fx adapters")
    with pytest.raises(hra_fx.AdapterError, match=r"^`model` must be a torch\.nn\.Module, got int\.$"):
        hra_fx.from_peft(3)  # type: ignore[arg-type]


def dense(layer: Any) -> tuple[Tensor, Tensor]:
    """`W` and `W Q_a Q_b ...` of a layer of PEFT, in float64."""
    weight = rotated = layer.base_layer.weight.detach().double()
    for name in layer.active_adapters:
        if name in layer.hra_u:
            rotated = dense_weight(rotated, dense_q(layer.hra_u[name].detach(), apply_GS=layer.hra_apply_GS[name]))
    return weight, rotated


@pytest.mark.parametrize("case", [*CASES, "two adapters"])
def test_lora_and_fold_are_those_of_the_dense_product(case: str, tmp_path: Path) -> None:
    """Also of the `PeftModel`, which the fold uses up."""
    model = with_two_by_peft() if case == "two adapters" else randomised_by_peft(case)
    base, output = model.get_base_model(), model(tokens())
    wanted = {path: dense(layer)[1] for path, layer in base.named_modules() if isinstance(layer, HRALayer)}
    hra_fx.from_peft(model)
    hra_fx.save_as_lora(model, tmp_path)
    with peft_warnings_ignored():
        served = peft.PeftModel.from_pretrained(net(F64), tmp_path)
    assert relative_error(served(tokens()), output) < 1e-5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", hra_fx.HRAWarning)  # the other adapter is removed
        folded = hra_fx.fold(model)
    assert folded is base and type(folded) is Net and [*folded.state_dict()] == [*net().state_dict()]
    for path, weight in wanted.items():
        assert relative_error(folded.get_submodule(path).weight, weight) < 1e-6, path
    for whole in (folded, model):
        assert relative_error(whole(tokens()), output) < 1e-6  # PEFT computes some layers in float32
    for use in (lambda: model.save_pretrained("unused"), lambda: model.base_model.merge_and_unload()):
        with pytest.raises(AttributeError, match=r"'Net' object has no attribute '"):
            use()


def test_models_that_contain_a_model_of_peft() -> None:
    """A wrapper such as DistributedDataParallel, a user's module, and the tuner without a `PeftModel`."""
    whole = nn.Module()
    whole.encoder = randomised_by_peft()
    wrappers = (nn.DataParallel, torch.compile, lambda model: model.base_model)
    for model in (whole, *(wrap(randomised_by_peft()) for wrap in wrappers)):
        ours = hra_fx.from_peft(model)
        assert type(hra_fx.fold(ours)) is Net and ours in set(model.modules())
    model = randomised_by_peft()
    refused(model.get_base_model().body, r"^Body contains 0 models with PEFT adapters\. Pass one whole")
    both = nn.ModuleList([model, randomised_by_peft()])
    refused(both, r"^ModuleList contains 2 models with PEFT adapters\. Pass one whole")


def test_functions_of_hra_fx_say_what_to_do_with_a_model_of_peft() -> None:
    advice = r"Call hra_fx\.from_peft\(model\) to use it with hra_fx, or `merge_and_unload\(\)` or `unload\(\)` on the"
    model = randomised_by_peft()
    for step in (
        hra_fx.report,
        hra_fx.fold,
        hra_fx.graphs,
        hra_fx.convert_to_lora,
        hra_fx.get_peft_model_state_dict,
        lambda model: hra_fx.save_adapter(model, "unused"),
    ):
        with pytest.raises(hra_fx.AdapterError, match=rf" was adapted by PEFT \(base_model.*query\), .*{advice}"):
            step(model)
    for step in (
        hra_fx.transform,
        hra_fx.get_peft_model,
        lambda model, _: hra_fx.PeftModel.from_pretrained(model, "x"),
    ):
        with pytest.raises(hra_fx.UnsupportedLayerError, match=rf"query: it already has a PEFT adapter\. {advice}"):
            step(model, hra_fx.HRAConfig(target_modules=["conv"]))
    with peft_warnings_ignored():
        lora = peft.get_peft_model(net(), peft.LoraConfig(r=2, target_modules=["query"]))
    with pytest.raises(hra_fx.AdapterError, match=r"not by hra_fx\. Call `merge_and_unload\(\)`"):
        hra_fx.report(lora)


@pytest.mark.parametrize("adapt", [hra_fx.transform, hra_fx.get_peft_model])
@pytest.mark.parametrize("target", ["query", "conv"], ids=["the same layer", "another layer"])
def test_peft_adds_its_adapters_only_to_a_folded_model(adapt: Any, target: str) -> None:
    """PEFT would merge `B A` into the weight before it is rotated."""
    model = adapt(net(F64), hra_fx.HRAConfig(r=2, target_modules=["query"], init_weights=False))
    wanted, lora = model(tokens()), peft.LoraConfig(r=2, target_modules=[target], init_lora_weights=False)
    for whole in (model, nn.Sequential(model)):
        for add in (peft.get_peft_model, lambda whole, lora: peft.inject_adapter_in_model(lora, whole)):
            text = r"^PEFT cannot add an adapter .* \(W \+ B A\) Q\. Call hra_fx\.fold\(model\) first"
            with refuses(model, text, hra_fx.UnsupportedLayerError):
                add(whole, lora)
    assert torch.equal(model(tokens()), wanted)
    with peft_warnings_ignored():
        top = peft.get_peft_model(hra_fx.fold(model), lora).eval()
    output = top(tokens())
    assert relative_error(output, wanted) > 1e-3
    assert relative_error(top.merge_and_unload()(tokens()), output) < 1e-6


# ---- the `PeftModel` afterwards: its methods are those of the adapted base model ----

TWO: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "down_proj"], "init_weights": False}


def wrapper_with_two(**fields: Any) -> Any:
    """A `PeftModelForCausalLM` with the adapters "default", which is active, and "other"."""
    model = by_peft(tiny("llama", torch.float32), task_type="CAUSAL_LM", **TWO, **fields)
    with peft_warnings_ignored():
        model.add_adapter("other", peft.HRAConfig(**{**TWO, "r": 2}))
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(**inputs(model)).logits


@pytest.mark.needs("peft>=0.21")
@pytest.mark.parametrize("fields", [{}, {"modules_to_save": ["lm_head"]}], ids=["vectors", "trained modules"])
def test_it_saves_the_same_files_as_before(fields: dict[str, Any], tmp_path: Path) -> None:
    model = wrapper_with_two(**fields)
    saved_by_peft(model, tmp_path / "before")
    before = [parameter for parameter in model.parameters() if parameter.requires_grad]
    hra_fx.from_peft(model)
    after = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {*map(id, before)} == {*map(id, after)}, "an optimizer keeps working"
    model.save_pretrained(tmp_path / "after")
    # As a Trainer does it in a checkpoint, which it resumes from the pairs in `model.safetensors`.
    model.save_pretrained(tmp_path / "checkpoint-1", state_dict=model.state_dict())
    for folder in (tmp_path / "after", tmp_path / "checkpoint-1"):
        written = {entry.name for entry in folder.iterdir()} - {"model.safetensors"}
        assert written == {entry.name for entry in (tmp_path / "before").iterdir()}
        for name in ("", "other"):
            same_tensors(folder / name, tmp_path / "before" / name, 1e-6)
    model.save_pretrained(tmp_path / "one", selected_adapters=["other"])
    assert not (tmp_path / "one" / "adapter_config.json").exists()
    after, before = (opened_by_peft(tiny("llama", torch.float32), tmp_path / side) for side in ("after", "before"))
    assert relative_error(logits(after), logits(before)) < 1e-5


def test_its_methods_are_those_of_the_base_model(tmp_path: Path) -> None:
    model = wrapper_with_two()
    kept, plain = copy.deepcopy(model), logits(tiny("llama", torch.float32))
    ours = hra_fx.from_peft(model)
    assert isinstance(model, peft.PeftModel) and model.get_base_model() is ours
    same_line(kept, model)
    prompt = torch.tensor([[3, 4, 5]])
    for name in ("default", "other"):
        for one in (kept, model):
            one.set_adapter(name)
        assert model.active_adapter == model.base_model.active_adapter == name
        assert model.active_adapters == ours.active_adapters == [name]
        assert relative_error(logits(model), logits(kept)) < 1e-5
        assert torch.equal(model.generate(prompt, max_new_tokens=4), kept.generate(prompt, max_new_tokens=4))
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(again), logits(model))
        again.save_pretrained(tmp_path / "again")
    for one in (model, model.base_model, ours):
        assert not any(one.load_state_dict(one.state_dict()))  # no missing and no unexpected keys
    wanted = logits(model)
    model.load_adapter(tmp_path / "again" / "other", "third")
    model.set_adapter("third")
    assert relative_error(logits(model), wanted) < 1e-5
    assert list(model.peft_config) == list(model.base_model.peft_config) == ["default", "other", "third"]
    assert [row.path for row in hra_fx.report(model)] == [row.path for row in hra_fx.report(ours)]
    # PEFT's functions only look for PEFT's layers.
    with pytest.raises(AttributeError, match="Call the function of hra_fx with the same name"):
        peft.get_peft_model_state_dict(model)
    assert "model.layers.0.self_attn.q_proj" in hra_fx.save_as_lora(model, tmp_path / "lora").errors


def test_a_wrapper_that_was_not_given_raises_an_error(tmp_path: Path) -> None:
    model = wrapper_with_two()
    hra_fx.from_peft(model.get_base_model())
    for use in (lambda: model.save_pretrained(tmp_path), lambda: peft.get_peft_model_state_dict(model)):
        with pytest.raises(AttributeError, match=r"HRAConfig is not a peft\.PeftConfig\. Call the function of hra_fx"):
            use()
    assert not [*tmp_path.rglob("*.safetensors")]
