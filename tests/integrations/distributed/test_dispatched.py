"""Models that accelerate dispatches over devices, before or after `transform`, against the same model without hooks."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_submodules
from adapting import config, randomise
from integrations.distributed.trained import CASES, F64, SIZES, Case, adapted, close, output, train, trained
from refusals import refused
from safetensors.torch import load_file
from second_device import LAZY
from torch import Tensor, fx, nn

import hra_fx
from hra_fx.layers.accelerate_hooks import has_class_forward
from hra_fx.layers.batching import factors_in_batches, factors_of, has_batch
from hra_fx.model.base_view import base_model_view

CPU = torch.device("cpu")
MLP = CASES["mlp, whole"]
#: Models whose base computes the same on both devices, to 1e-13. Llama's norms are in float32, which rounds.
ON_TWO = ["mlp, whole", "mlp, Gram-Schmidt", "mlp, copies", "convolutions", "attention"]
ON_ONE = ["llama", "llama, checkpointing", "resnet"]
RUNS = [*((name, (CPU, LAZY)) for name in ON_TWO), *((name, (CPU,)) for name in ON_ONE)]
#: The parts of a case that are on a device of their own; those of the other cases are `case.units`.
UNITS = {CASES["mlp, Gram-Schmidt"].units: ("0", "2")}


def dispatch(model: nn.Module, units: Sequence[str], devices: Sequence[torch.device]) -> nn.Module:
    """The units in turn on these devices, and all else on the CPU, with hooks on every module."""
    units = UNITS.get(tuple(units), units)
    places: dict[str, torch.device] = {}
    for path, _ in model.named_modules():
        if path in units:
            places[path] = devices[units.index(path) % len(devices)]
        inside = any(path.startswith(f"{place}.") for place in places)
        if path not in units and path and not inside and not any(unit.startswith(f"{path}.") for unit in units):
            places[path] = CPU
    logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)  # it takes the CPU for a place to offload to
    return accelerate.dispatch_model(model, places, main_device="cpu", force_hooks=True)


WHEN: dict[str, Callable[[Case, Sequence[torch.device]], nn.Module]] = {
    "before": lambda case, devices: adapted(dispatch(case.base(), case.units, devices), case),
    "after": lambda case, devices: dispatch(case.model(), case.units, devices),
}


@pytest.mark.parametrize(
    ("name", "devices", "when"), [(*run, when) for run, when in zip(RUNS, cycle(WHEN), strict=False)]
)
def test_outputs_losses_and_trained_vectors(name: str, devices: Sequence[torch.device], when: str) -> None:
    case = CASES[name]
    plain, model = case.model(), WHEN[when](case, devices)
    assert {parameter.device for parameter in model.parameters()} == set(devices)
    assert close(output(model.eval(), case), output(plain.eval(), case))
    wanted, losses = train(plain.train(), case), train(model.train(), case)
    assert max(abs(a - b) for a, b in zip(wanted, losses, strict=True)) < 1e-9
    assert wanted[0] != wanted[-1]
    found, expected = trained(model), trained(plain)
    assert found.keys() == expected.keys()
    assert all(close(found[key], expected[key]) for key in expected)
    hra_fx.fold(model)
    assert close(output(model.eval(), case), output(plain.eval(), case))
    assert not any("hra_" in key for key in model.state_dict())
    remove_hook_from_submodules(model)
    assert close(output(model.to(CPU), case), output(plain, case))


@pytest.mark.parametrize("when", WHEN)
def test_pairs(when: str) -> None:
    plain, model = MLP.model(), WHEN[when](MLP, (CPU, LAZY))
    wanted, losses = train(plain, MLP, pairs=True), train(model, MLP, pairs=True)
    assert max(abs(a - b) for a, b in zip(wanted, losses, strict=True)) < 1e-9
    found, expected = trained(model), trained(plain)
    assert all(close(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("when", WHEN)
def test_vectors_and_factors_are_on_the_device_of_their_layer(when: str) -> None:
    model: Any = WHEN[when](MLP, (CPU, LAZY))
    layers = [model[0], model[2], model[4]]
    devices = [CPU, LAZY, CPU]
    assert [layer.hra_u["default"].device for layer in layers] == devices
    with factors_in_batches(layers):
        for layer, device in zip(layers, devices, strict=True):
            assert has_batch(layer.hra_u)
            assert factors_of(layer.hra_u, F64).down.device == device  # type: ignore[union-attr]


def test_a_map_that_accelerate_infers_for_an_adapted_model() -> None:
    """It splits a layer with children unless it is told not to; then the vectors are not with the weight."""
    model = MLP.model()
    options: dict[str, Any] = {"max_memory": {0: 4400, "cpu": 10**6}}  # bytes; all but the vectors of layer 2
    assert any(place.endswith(".hra_u") for place in accelerate.infer_auto_device_map(model, **options))
    places = accelerate.infer_auto_device_map(model, **options, no_split_module_classes=["Linear"])
    assert not any(place.endswith(".hra_u") for place in places)
    devices = {name: LAZY if place == 0 else CPU for name, place in places.items()}
    accelerate.dispatch_model(model, devices, main_device="cpu", force_hooks=True)
    assert close(output(model, MLP), output(MLP.model(), MLP))


def test_a_move_to_another_device_moves_the_base_weight() -> None:
    """accelerate moves `getattr(layer, "weight")`, which is W Q for others."""
    model: Any = MLP.model()
    base, rotated = model[2].hra_base.detach().clone(), model[2].weight.detach().clone()
    dispatch(model, MLP.units, (CPU, LAZY))
    assert model[2].hra_base.device == LAZY
    assert torch.equal(model[2].hra_base.detach().cpu(), base)
    assert not close(rotated, base, 0.1)
    assert close(model[2].weight.detach().clone(), rotated, 1e-13)


def saved(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    hra_fx.save_adapter(model, folder, "b")
    hra_fx.save_as_lora(model, folder / "lora", "b")
    return load_file(folder / "adapter_model.safetensors") | load_file(folder / "lora" / "adapter_model.safetensors")


def test_every_function_does_what_it_does_on_one_device(tmp_path: Path) -> None:
    plain, model = MLP.model().eval(), WHEN["before"](MLP, (CPU, LAZY)).eval()
    second = hra_fx.transform(MLP.base(), hra_fx.HRAConfig(r=2, init_weights=False, target_modules=["0", "2"]))
    hra_fx.save_adapter(second, tmp_path / "second")
    steps: list[Callable[[nn.Module], object]] = [
        lambda model: hra_fx.load_adapter(model, tmp_path / "second", "b", is_trainable=True),
        lambda model: hra_fx.set_adapter(model, ["b", "default"]),
        lambda model: hra_fx.set_scale(model, "b", 0.5),
        lambda model: hra_fx.set_scale(model, "b", 1),
        lambda model: hra_fx.load_adapter(model, tmp_path / "second", "b", is_trainable=True),
        lambda model: hra_fx.add_adapter(model, "c", hra_fx.HRAConfig(r=3, target_modules=["2", "4"])),
        lambda model: hra_fx.combine(model, ["b", "default"], "both"),
        lambda model: hra_fx.set_adapter(model, "both"),
        lambda model: hra_fx.merge_adapter(model),
        lambda model: hra_fx.unmerge_adapter(model),
        lambda model: hra_fx.delete_adapter(model, "c"),
        lambda model: hra_fx.disable_adapters(model),
        lambda model: hra_fx.set_adapter(model, ["default", "b"]),
        lambda model: hra_fx.fold(model, "default"),
    ]
    for index, step in enumerate(steps):
        for each in (plain, model):
            torch.manual_seed(3)  # new vectors are random
            step(each)
        assert close(output(model, MLP), output(plain, MLP)), index
        assert close(hra_fx.orthogonality_loss(model), hra_fx.orthogonality_loss(plain)), index
    x = MLP.data()[0]
    rows = ["b", "__base__"] * (len(x) // 2)
    with torch.no_grad(), hra_fx.mixed_batch(plain, rows):
        expected = plain(x)
    with torch.no_grad(), hra_fx.mixed_batch(model, rows):
        assert close(model(x), expected)
    wanted, found = saved(plain, tmp_path / "plain"), saved(model, tmp_path / "dispatched")
    assert wanted.keys() == found.keys()
    assert all(close(wanted[key], found[key]) for key in wanted)
    assert hra_fx.report(model).rows[0].share == pytest.approx(hra_fx.report(plain).rows[0].share)


@pytest.mark.parametrize(
    "way", ["hooks, transform, fold", "transform, hooks, fold", "transform, hooks, off, fold, hooks"]
)
def test_hooks_come_and_go(way: str) -> None:
    plain = MLP.model()
    wanted, model = output(plain, MLP), MLP.base()
    acts: dict[str, Callable[[nn.Module], object]] = {
        "hooks": lambda model: dispatch(model, MLP.units, (CPU,)),
        "transform": lambda model: adapted(model, MLP),
        "off": remove_hook_from_submodules,
        "fold": hra_fx.fold,
    }
    for act in [*way.split(", "), "off", "transform", "hooks"]:
        before = output(model, MLP)
        acts[act](model)
        assert close(output(model, MLP), before) is (act != "transform")
    twice = adapted(hra_fx.fold(plain), MLP)
    assert close(output(model, MLP), output(twice, MLP))
    hra_fx.delete_adapter(model, "default")
    assert close(output(model, MLP), wanted)
    assert [type(part) for part in model] == [type(part) for part in MLP.base()]


def test_a_hook_runs_once_and_sees_what_the_adapted_layer_returns() -> None:
    class Seen(ModelHook):
        def __init__(self) -> None:
            self.outputs: list[Tensor] = []

        def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
            self.outputs.append(output)
            return output

    base, hook = MLP.base(), Seen()
    add_hook_to_module(base[4], hook)
    add_hook_to_module(base, ModelHook())
    model = adapted(base, MLP)
    found = output(model, MLP)
    assert len(hook.outputs) == 1
    assert torch.equal(hook.outputs[0], found)
    assert close(found, output(MLP.model(), MLP))


def test_copies_are_models_of_their_own() -> None:
    model = WHEN["before"](MLP, (CPU,))
    wanted = output(model, MLP)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].hra_u["default"].neg_()
        other[2].hra_u["default"].add_(1)
    assert close(output(model, MLP), wanted)
    assert not close(output(other, MLP), wanted)
    hra_fx.fold(model)
    remove_hook_from_submodules(other)
    hra_fx.delete_adapter(other, "default")
    assert close(output(other, MLP), output(MLP.base(), MLP))
    assert close(output(model, MLP), wanted)


@pytest.mark.parametrize("when", WHEN)
def test_generate(when: str) -> None:
    case = CASES["llama"]
    plain, model = case.model().eval(), WHEN[when](case, (CPU,)).eval()
    ids = case.data()[0][:2]
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    for each in (plain, model):
        torch.manual_seed(3)
        randomise(each)
    wanted = plain.generate(ids, **options)
    assert torch.equal(model.generate(ids, **options), wanted)
    rows = ["default", "__base__"]
    mixed = plain.generate(ids, **options, adapter_names=rows)
    assert torch.equal(model.generate(ids, **options, adapter_names=rows), mixed)
    hra_fx.delete_adapter(model, "default")
    assert not torch.equal(model.generate(ids, **options), wanted)


def test_an_hra_model_over_a_dispatched_model(tmp_path: Path) -> None:
    case = CASES["llama"]
    settings = hra_fx.HRAConfig(r=4, init_weights=False, **case.config)
    plain, model = case.base().eval(), dispatch(case.base().eval(), case.units, (CPU,))
    models: list[Any] = []
    for each in (plain, model):
        torch.manual_seed(3)
        models.append(hra_fx.HRAModel(each, settings))
    ids = case.data()[0]
    assert close(models[1](input_ids=ids).logits, models[0](input_ids=ids).logits)
    models[1].save_pretrained(tmp_path)
    again = hra_fx.HRAModel.from_pretrained(dispatch(case.base().eval(), case.units, (CPU,)), tmp_path)
    assert close(again(input_ids=ids).logits, models[0](input_ids=ids).logits)
    assert close(models[1].merge_and_unload()(input_ids=ids).logits, models[0](input_ids=ids).logits)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_head_that_is_tied_to_the_embeddings(when: str) -> None:
    def tied() -> Any:
        torch.manual_seed(0)
        sizes = {**SIZES, "num_key_value_heads": 1, "tie_word_embeddings": True}
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).to(F64)

    head = hra_fx.HRAConfig(r=4, init_weights=False, target_modules=["lm_head"])
    ids = torch.arange(5)[None]
    plain, model = tied(), tied()
    for step in ["hooks", "transform"] if when == "before" else ["transform", "hooks"]:
        torch.manual_seed(1)
        hra_fx.transform(model, head) if step == "transform" else dispatch(model, (), ())
    torch.manual_seed(1)
    wanted = hra_fx.transform(plain, head)(ids).logits
    assert close(model(ids).logits, wanted)
    assert model.lm_head.hra_base is model.model.embed_tokens.weight
    with pytest.warns(hra_fx.HRAWarning, match="untied: lm_head"):
        hra_fx.fold(model)
    assert close(model(ids).logits, wanted)


def test_a_look_at_the_base_model_does_not_bypass_the_adapters() -> None:
    """`graphs` and transformers' table of tied weights see the model without adapters, and put them back."""
    for hooks in (True, False):
        model = WHEN["before"](MLP, (CPU,))
        if not hooks:
            remove_hook_from_submodules(model)
        wanted = output(model, MLP)
        assert list(hra_fx.graphs(model)) == ["0", "2", "4"]  # the whole model has a forward of its own
        with base_model_view(model):
            assert close(output(model, MLP), output(MLP.base(), MLP))
        assert all(has_class_forward(layer) for layer in model)
        assert close(output(model, MLP), wanted)
        assert not close(wanted, output(MLP.base(), MLP))


# ---- what is refused ----


def test_a_graph_module_with_a_hook_is_refused() -> None:
    graph = fx.symbolic_trace(MLP.base())
    add_hook_to_module(graph, ModelHook())
    before = output(graph, MLP)
    with pytest.raises(hra_fx.UnsupportedLayerError, match="it is a GraphModule, and accelerate put its hook into"):
        hra_fx.transform(graph, config("0"))
    assert torch.equal(output(graph, MLP), before)
    remove_hook_from_submodules(graph)
    hra_fx.transform(graph, config("0"))


def test_a_graph_of_a_model_with_hooks_is_refused() -> None:
    model = dispatch(MLP.base(), MLP.units, (CPU,))
    before = output(model, MLP)
    with pytest.raises(hra_fx.AdapterError, match="trace=True: the model has a hook of accelerate, which a graph"):
        hra_fx.transform(model, config("0"), trace=True)
    assert torch.equal(output(model, MLP), before)
    remove_hook_from_submodules(model)
    hra_fx.transform(model, config("0"), trace=True)


def test_a_forward_of_the_users_below_a_hook_is_refused() -> None:
    model = MLP.base()
    model[0].forward = lambda x: x @ torch.zeros(8, 16, dtype=F64)
    dispatch(model, MLP.units, (CPU,))
    assert "its `forward` is set on the instance" in refused(model, config("0"))


def test_a_transform_that_fails_leaves_the_hooks_as_they_were() -> None:
    model = dispatch(nn.Sequential(MLP.base()), (), ())
    before = output(model, MLP)
    settings = hra_fx.HRAConfig(r=2, target_modules=["0.0"], modules_to_save=["0.2"], target_parameters=None)
    settings.bias = "all"
    model[0][2].register_parameter("odd", nn.UninitializedParameter())
    with pytest.raises(hra_fx.UnsupportedLayerError, match=r"0\.2 .*UninitializedParameter"):
        hra_fx.transform(model, settings)
    del model[0][2].odd
    assert type(model[0][0]) is nn.Linear
    assert torch.equal(output(model, MLP), before)
