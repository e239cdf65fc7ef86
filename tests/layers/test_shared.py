"""Layers that are reached more than once, by several paths, parents or calls: one layer, one reflection."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import pytest
import torch
from integrations.peft_parity.sides import by_peft, by_us, opened_by_peft, plain_name, randomise, same_tensors
from oracles import relative_error
from safetensors.torch import load_file
from sharing import CASES, adapted, base, cases, config, leaves, oracle, run, turn, x_of
from torch import nn

import hra_fx
from hra_fx.model.state import adapted_layers

F64 = torch.float64


@cases
def test_each_layer_carries_one_reflection(name: str) -> None:
    _, model = adapted(name)
    assert list(adapted_layers(model)) == CASES[name].sites
    assert len({id(layer.hra_u) for layer in adapted_layers(model).values()}) == len(CASES[name].sites)
    assert [row.path for row in hra_fx.report(model).rows] == CASES[name].sites


@cases
@pytest.mark.parametrize("training", [False, True])
def test_outputs_and_gradients_are_those_of_the_dense_product(name: str, training: bool) -> None:
    plain, model = adapted(name)
    if name == "albert" and training:
        for part in (plain, model):
            for module in part.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
    plain.train(training)
    model.train(training)
    x, vectors = x_of(name), leaves(model)
    wanted, found = oracle(plain, model, x, vectors), run(model, x)
    assert relative_error(found, wanted) < 1e-12
    assert relative_error(found, run(plain, x)) > 1e-3
    weighting = torch.randn(wanted.shape, dtype=F64, generator=torch.Generator().manual_seed(2))
    (wanted * weighting).sum().backward()
    (found * weighting).sum().backward()
    for path, layer in adapted_layers(model).items():
        gradient = layer.hra_u["default"].grad
        assert gradient is not None, path
        assert float(gradient.norm()) > 1e-6
        assert relative_error(gradient, vectors[path].grad) < 1e-9, path


@cases
def test_it_starts_at_the_base_model(name: str) -> None:
    model = hra_fx.transform(base(name), config(name))
    assert relative_error(run(model, x_of(name)), run(base(name), x_of(name))) < 1e-12


@cases
def test_a_second_transform_adds_nothing(name: str) -> None:
    _, model = adapted(name)
    parameters, wanted = list(model.parameters()), run(model, x_of(name))
    assert hra_fx.transform(model, config(name)) is model
    assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]
    assert torch.equal(run(model, x_of(name)), wanted)


@cases
def test_a_fold_rotates_each_weight_once(name: str) -> None:
    plain, model = adapted(name)
    x, vectors = x_of(name), leaves(model)
    wanted = oracle(plain, model, x, vectors).detach()
    plan = hra_fx.plan_fold(model)
    assert [layer.path for layer in plan.layers] == CASES[name].sites
    assert {layer.untied for layer in plan.layers} == {()}
    held = {path: layer.hra_base for path, layer in adapted_layers(model).items()}
    plan.apply()
    assert relative_error(run(model, x), wanted) < 1e-12
    assert all(model.get_submodule(path).weight is weight for path, weight in held.items())
    twin = base(name)
    assert list(model.state_dict()) == list(twin.state_dict())
    assert [type(part) for part in model.modules()] == [type(part) for part in twin.modules()]


@cases
def test_a_merge_and_an_unmerge(name: str) -> None:
    plain, model = adapted(name)
    x = x_of(name)
    wanted = run(model, x)
    hra_fx.merge_adapter(model)
    assert relative_error(run(model, x), wanted) < 1e-12
    hra_fx.unmerge_adapter(model)
    assert torch.equal(run(model, x), wanted)
    for path in CASES[name].sites:
        assert torch.equal(model.get_submodule(path).hra_base, plain.get_submodule(path).weight)


@cases
def test_the_state_has_the_keys_of_every_path(name: str) -> None:
    plain, model = adapted(name)
    by_path = {
        f"{path}.hra_u.default"
        for path, part in model.named_modules(remove_duplicate=False)
        if part in adapted_layers(model).values()
    }
    keys = set(model.state_dict())
    assert {key for key in keys if key.endswith(".hra_u.default")} == by_path
    assert {key for key in keys if ".hra_u." not in key} == set(plain.state_dict())
    names = [name for name, _ in model.named_parameters() if ".hra_u." in name]
    assert names == [f"{path}.hra_u.default" for path in CASES[name].sites]


@cases
def test_a_state_goes_into_another_model_strictly(name: str) -> None:
    _, model = adapted(name)
    other = hra_fx.transform(base(name), config(name))
    turn(other, 9)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    assert torch.equal(run(other, x_of(name)), run(model, x_of(name)))


@cases
def test_a_copy_shares_inside_and_not_outside(name: str) -> None:
    _, model = adapted(name)
    other = copy.deepcopy(model)
    wanted = run(model, x_of(name))
    assert torch.equal(run(other, x_of(name)), wanted)
    assert len(list(other.parameters())) == len(list(model.parameters()))
    turn(other, 9)
    assert relative_error(run(other, x_of(name)), wanted) > 1e-3
    assert torch.equal(run(model, x_of(name)), wanted)
    moved = run(other, x_of(name))
    hra_fx.fold(other)
    assert relative_error(run(other, x_of(name)), moved) < 1e-12


@cases
def test_delete_adapter_takes_it_off_every_path(name: str) -> None:
    plain, model = adapted(name)
    hra_fx.add_adapter(model, "second", config(name, r=2))
    hra_fx.set_adapter(model, "second")
    turn(model, 8)
    second = run(model, x_of(name))
    hra_fx.delete_adapter(model, "default")
    assert not [key for key in model.state_dict() if key.endswith(("hra_u.default", "hra_u.default_anchor"))]
    assert torch.equal(run(model, x_of(name)), second)
    hra_fx.delete_adapter(model, "second")
    assert list(model.state_dict()) == list(plain.state_dict())
    assert torch.equal(run(model, x_of(name)), run(plain, x_of(name)))


@cases
def test_adapters_can_be_switched_off(name: str) -> None:
    plain, model = adapted(name)
    with hra_fx.disable_adapters(model):
        assert torch.equal(run(model, x_of(name)), run(plain, x_of(name)))


@cases
def test_a_file_has_each_layer_once_and_loads_again(name: str, tmp_path: Path) -> None:
    _, model = adapted(name)
    hra_fx.save_adapter(model, tmp_path)
    kept = [key for key in load_file(tmp_path / "adapter_model.safetensors") if key.endswith(".hra_u")]
    assert sorted(kept) == sorted(f"base_model.model.{path}.hra_u" for path in CASES[name].sites)
    other = hra_fx.load_adapter(base(name), tmp_path)
    assert torch.equal(run(other, x_of(name)), run(model, x_of(name)))


#: Where a shared block holds the layers. A layer by two paths is wrapped by PEFT at the first one alone.
LIKE_PEFT = ["a block called three times", "a list with a block twice", "albert"]


@cases
def test_the_file_goes_through_peft(name: str, tmp_path: Path) -> None:
    fields = {"r": 4, "target_modules": CASES[name].targets, "init_weights": False}
    ours = by_us(base(name).float(), **fields).eval()
    randomise(ours)
    ours.save_pretrained(tmp_path / "ours")
    theirs = opened_by_peft(base(name).float(), tmp_path / "ours").eval()
    theirs.save_pretrained(tmp_path / "theirs")
    same_tensors(tmp_path / "ours", tmp_path / "theirs")
    again = hra_fx.load_adapter(base(name).float(), tmp_path / "theirs")
    x = x_of(name) if name == "albert" else x_of(name).float()
    assert torch.equal(run(again, x), run(ours, x))


@cases
def test_the_trained_parameters_are_pefts(name: str) -> None:
    fields = {"r": 4, "target_modules": CASES[name].targets}
    ours, theirs = by_us(base(name), **fields), by_peft(base(name), **fields)
    named = {plain_name(key) for key, value in theirs.named_parameters() if value.requires_grad}
    assert {plain_name(key) for key, value in ours.named_parameters() if value.requires_grad} == named


@pytest.mark.parametrize("name", LIKE_PEFT)
def test_outputs_and_counts_are_pefts(name: str) -> None:
    fields = {"r": 4, "target_modules": CASES[name].targets, "init_weights": False}
    ours, theirs = by_us(base(name), **fields).eval(), by_peft(base(name), **fields).eval()
    randomise(ours)
    randomise(theirs)
    assert relative_error(run(ours, x_of(name)), run(theirs, x_of(name))) < 1e-9
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()


@pytest.mark.parametrize("name", [name for name in CASES if name != "albert" and "alone" not in name])
def test_every_call_is_in_a_graph_with_its_reflection(name: str) -> None:
    _, model = adapted(name)
    layers, graphs = set(adapted_layers(model).values()), hra_fx.graphs(model)
    assert list(graphs) == (["left", "right"] if name == "two parents" else [""])
    for path, graph in graphs.items():
        calls = [node for node in graph.graph.nodes if node.op == "call_module"]
        called = [node for node in calls if model.get_submodule(path).get_submodule(str(node.target)) in layers]
        reflections = [node for node in calls if str(node.target).endswith(".hra_u")]
        assert len(reflections) == len(called) > 0
        for node in called:
            assert node.args[1].target == f"{node.target}.hra_u"
            assert node.meta["hra"].path in CASES[name].sites


def test_a_part_that_is_folded_is_folded_for_the_other_parent_too() -> None:
    plain, model = adapted("two parents")
    x, vectors = x_of("two parents"), leaves(model)
    wanted = oracle(plain, model, x, vectors)
    hra_fx.fold(model.left)
    assert list(adapted_layers(model)) == ["right.own"]
    assert relative_error(run(model, x), wanted) < 1e-12
    hra_fx.fold(model)
    assert relative_error(run(model, x), wanted) < 1e-12
    assert model.left.shared is model.right.shared
