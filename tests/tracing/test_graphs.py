"""`hra_fx.graphs`: what is returned, that it runs, and that it is a copy over shared parameters."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import hra_fx
from hra_fx.errors import AdapterError
from hra_fx.layers.target import NodeTag


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, (3, 1), padding=(1, 0))
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(F.relu(self.norm(self.conv(x))), 0.5, self.training)
        return self.head(self.drop(x.mean((2, 3))))


class Branching(nn.Module):
    """Cannot be traced whole: it branches on a value. `mlp` can be, and `gate` is a single layer."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4))
        self.gate = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x) if x.sum() > 0 else self.gate(x)


def randomised(model: nn.Module, *targets: str) -> nn.Module:
    torch.manual_seed(0)
    model = hra_fx.transform(model.double(), hra_fx.HRAConfig(r=3, target_modules=list(targets)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".hra_u." in name:
                parameter.normal_()
    return model


def net() -> nn.Module:
    return randomised(Net(), "conv", "head")


def image() -> Tensor:
    return torch.randn(2, 3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_whole_model_has_the_empty_key() -> None:
    found = hra_fx.graphs(net())
    assert list(found) == [""]
    assert type(found[""]).__bases__[0] is fx.GraphModule
    assert type(found[""]).__name__ == "Net"


def test_parts_have_their_paths() -> None:
    model = randomised(Branching(), "mlp.0", "mlp.2", "gate")
    found = hra_fx.graphs(model)
    assert list(found) == ["gate", "mlp"]
    assert [n.target for n in found["mlp"].graph.nodes if n.op == "call_module"] == [
        "0.hra_u",
        "0",
        "1",
        "2.hra_u",
        "2",
    ]
    assert [n.target for n in found["gate"].graph.nodes if n.op == "call_module"] == ["gate.hra_u", "gate"]
    x = torch.randn(3, 4, dtype=torch.float64)
    torch.testing.assert_close(found["mlp"](x), model.mlp(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found["gate"](x), model.gate(x), rtol=1e-12, atol=1e-12)


def test_nodes_carry_notes() -> None:
    model = randomised(Branching(), "mlp.0", "mlp.2", "gate")
    found = hra_fx.graphs(model)
    notes = [node.meta["hra"] for node in found["mlp"].graph.nodes if "hra" in node.meta]
    assert notes == [
        NodeTag("mlp.0", "linear", "reflection"),
        NodeTag("mlp.0", "linear", "layer"),
        NodeTag("mlp.2", "linear", "reflection"),
        NodeTag("mlp.2", "linear", "layer"),
    ]
    assert [node.meta["hra"].path for node in found["gate"].graph.nodes if "hra" in node.meta] == ["gate", "gate"]
    kinds = {node.meta["hra"].kind for node in hra_fx.graphs(net())[""].graph.nodes if "hra" in node.meta}
    assert kinds == {"linear", "conv2d"}


def test_reflection_nodes_keep_the_module_stack_of_their_layer() -> None:
    nodes = {str(n.target): n for n in hra_fx.graphs(net())[""].graph.nodes if "hra" in n.meta}
    assert nodes["conv.hra_u"].meta["nn_module_stack"] == nodes["conv"].meta["nn_module_stack"]


def test_parameters_are_the_models_own() -> None:
    model = net()
    graph = hra_fx.graphs(model)[""]
    own = dict(model.named_parameters())
    for name, parameter in graph.named_parameters():
        assert parameter is own[name]
    assert dict(graph.named_parameters()).keys() == own.keys()
    graph(image()).sum().backward()
    assert own["conv.hra_u.default"].grad is not None
    with torch.no_grad():
        own["head.hra_u.default"].add_(1)
    model.eval()
    torch.testing.assert_close(hra_fx.graphs(model)[""](image()), model(image()), rtol=1e-12, atol=1e-12)


def test_one_graph_serves_both_modes() -> None:
    model = net()
    graph = hra_fx.graphs(model)[""]
    assert graph.training and hra_fx.graphs(model.eval())[""].code == graph.code
    for training in (True, False):
        found = []
        for each in (graph.train(training), model.train(training)):
            torch.manual_seed(3)
            found.append(each(image()))
        torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("training", [False, True])
def test_graph_equals_the_model(training: bool) -> None:
    model = net().train(training)
    twin = copy.deepcopy(model)
    torch.manual_seed(3)
    expected = model(image())
    graph = hra_fx.graphs(twin)[""]
    torch.manual_seed(3)
    torch.testing.assert_close(graph(image()), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(twin.norm.running_mean, model.norm.running_mean, rtol=1e-12, atol=1e-12)


def test_editing_a_graph_does_not_change_the_model() -> None:
    model = net().eval()
    before = model(image())
    graph = hra_fx.graphs(model)[""]
    for node in graph.graph.nodes:
        if node.op == "output":
            node.args = (next(n for n in graph.graph.nodes if n.target == "conv"),)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    assert graph(image()).shape == (2, 4, 5, 5)
    assert torch.equal(model(image()), before)
    assert hra_fx.graphs(model)[""].code != graph.code


def test_interpreter_and_shape_propagation() -> None:
    from torch.fx.passes.shape_prop import ShapeProp

    model = net().eval()
    graph = hra_fx.graphs(model)[""]
    torch.testing.assert_close(fx.Interpreter(graph).run(image()), model(image()), rtol=1e-12, atol=1e-12)
    ShapeProp(graph).propagate(image())
    shapes = {
        str(node.target): node.meta["tensor_meta"].shape
        for node in graph.graph.nodes
        if "hra" in node.meta and node.meta["hra"].role == "layer"
    }
    assert shapes == {"conv": (2, 4, 5, 5), "head": (2, 5)}


def test_export_of_a_graph() -> None:
    model = net().eval()
    program = torch.export.export(hra_fx.graphs(model)[""], (image(),))
    torch.testing.assert_close(program.module()(image()), model(image()), rtol=1e-12, atol=1e-12)


def test_deepcopy_of_a_graph() -> None:
    model = net().eval()
    graph = hra_fx.graphs(model)[""]
    twin = copy.deepcopy(graph)
    expected = model(image())
    torch.testing.assert_close(twin(image()), expected, rtol=1e-12, atol=1e-12)
    assert [n.meta["hra"] for n in twin.graph.nodes if "hra" in n.meta] == [
        n.meta["hra"] for n in graph.graph.nodes if "hra" in n.meta
    ]
    with torch.no_grad():
        twin.get_parameter("conv.hra_u.default").add_(1)
    torch.testing.assert_close(model(image()), expected, rtol=0, atol=0)


def test_pickle_of_a_graph() -> None:
    model = net().eval()
    loaded = pickle.loads(pickle.dumps(hra_fx.graphs(model)[""]))
    torch.testing.assert_close(loaded(image()), model(image()), rtol=1e-12, atol=1e-12)
    calls = [str(node.target) for node in loaded.graph.nodes if node.op == "call_module"]
    assert calls == [str(node.target) for node in hra_fx.graphs(model)[""].graph.nodes if node.op == "call_module"]


def test_a_layer_called_twice_has_two_pairs_of_nodes_and_one_parameter() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.lin(torch.tanh(self.lin(x)))

    graph = hra_fx.graphs(randomised(Twice(), "lin"))[""]
    assert [n.target for n in graph.graph.nodes if n.op == "call_module"] == ["lin.hra_u", "lin"] * 2
    assert [name for name, p in graph.named_parameters() if p.requires_grad] == ["lin.hra_u.default"]


def test_a_plain_model_has_no_graphs() -> None:
    with pytest.raises(AdapterError, match=r"Net has no adapters\. Call hra_fx\.transform"):
        hra_fx.graphs(Net())
