"""Layers that are reached more than once, by several paths, parents or calls: one layer, one reflection.

What such a model goes through is tested in `test_lifecycle.py`, with models of every other kind.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from layers.cases import SHARED
from oracles import relative_error
from peft_sides import by_peft, by_us, opened_by_peft, plain_name, randomise, same_tensors
from safetensors.torch import load_file
from torch import Tensor, nn

import hra_fx
from hra_fx.model.state import adapted_layers

cases = pytest.mark.parametrize("name", SHARED)


def base(name: str) -> nn.Module:
    return SHARED[name].pair()[0]


def run(name: str, model: nn.Module) -> Tensor:
    output = SHARED[name].run(model)
    return getattr(output, "logits", output)


@cases
def test_each_layer_carries_one_reflection(name: str) -> None:
    _, model = SHARED[name].pair()
    sites = list(SHARED[name].sites)
    assert list(adapted_layers(model)) == sites
    assert len({id(layer.hra_u) for layer in adapted_layers(model).values()}) == len(sites)
    assert [row.path for row in hra_fx.report(model).rows] == sites
    plan = hra_fx.plan_fold(model)
    assert [(layer.path, layer.untied) for layer in plan.layers] == [(path, ()) for path in sites]
    names = [name for name, _ in model.named_parameters() if ".hra_u." in name]
    assert names == [f"{path}.hra_u.default" for path in sites]


@cases
def test_a_file_has_each_layer_once_and_goes_through_peft(name: str, tmp_path: Path) -> None:
    fields = {"r": 4, "target_modules": list(SHARED[name].targets), "init_weights": False}
    ours, theirs = by_us(base(name), **fields).eval(), by_peft(base(name), **fields).eval()
    trained = {plain_name(key) for key, value in theirs.named_parameters() if value.requires_grad}
    assert {plain_name(key) for key, value in ours.named_parameters() if value.requires_grad} == trained
    randomise(ours)
    ours.save_pretrained(tmp_path / "ours")
    kept = [key for key in load_file(tmp_path / "ours" / "adapter_model.safetensors") if key.endswith(".hra_u")]
    assert sorted(kept) == sorted(f"base_model.model.{path}.hra_u" for path in SHARED[name].sites)
    opened_by_peft(base(name), tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    same_tensors(tmp_path / "ours", tmp_path / "theirs")
    again = hra_fx.load_adapter(base(name), tmp_path / "theirs")
    assert relative_error(run(name, again), run(name, ours)) < 1e-6


#: Where a shared block holds the layers. A layer by two paths is wrapped by PEFT at the first one alone.
@pytest.mark.parametrize("name", ["a list with a block twice", "albert"])
def test_outputs_and_counts_are_pefts(name: str) -> None:
    fields = {"r": 4, "target_modules": list(SHARED[name].targets), "init_weights": False}
    ours, theirs = by_us(base(name), **fields).eval(), by_peft(base(name), **fields).eval()
    randomise(ours)
    randomise(theirs)
    assert relative_error(run(name, ours), run(name, theirs)) < 1e-9
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()


@pytest.mark.parametrize("name", [name for name in SHARED if name != "albert" and "alone" not in name])
def test_every_call_is_in_a_graph_with_its_reflection(name: str) -> None:
    _, model = SHARED[name].pair()
    layers, graphs = set(adapted_layers(model).values()), hra_fx.graphs(model)
    assert list(graphs) == (["left", "right"] if name == "two parents" else [""])
    for path, graph in graphs.items():
        calls = [node for node in graph.graph.nodes if node.op == "call_module"]
        called = [node for node in calls if model.get_submodule(path).get_submodule(str(node.target)) in layers]
        reflections = [node for node in calls if str(node.target).endswith(".hra_u")]
        assert len(reflections) == len(called) > 0
        for node in called:
            assert node.args[1].target == f"{node.target}.hra_u"
            assert node.meta["hra"].path in SHARED[name].sites
