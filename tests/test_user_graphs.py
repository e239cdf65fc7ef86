"""A GraphModule of the user's: the reflections are nodes of its own graph, which stays a graph to work on."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import refused
from sites.checking import assert_same, check, check_fold, normal, randomise, run_dense
from torch import Tensor, fx, nn
from torchvision.models import resnet18

import hra_fx
from hra_fx.errors import AdapterError, UnsupportedLayerError

X = normal(3, 4, 6)
IMAGES = normal(4, 2, 3, 8, 8)


class Mlp(nn.Module):
    """Two layers, one of them called twice, and a value that nobody reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        self.second(x)
        return self.second(torch.relu(self.first(x)) + x)


class Cnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular")
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.3)
        self.grouped = nn.Conv2d(4, 6, 3, stride=2, groups=2)
        self.first = nn.Linear(6, 6)

    def forward(self, x: Tensor, *, gain: float = 1.0) -> dict[str, Tensor]:
        hidden = self.drop(torch.relu(self.norm(self.conv(x))))
        return {"out": self.first(self.grouped(input=hidden).mean(dim=(2, 3))) * gain}


MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor, list[str]]] = {
    "mlp": (Mlp, X, ["first", "second"]),
    "cnn": (Cnn, IMAGES, ["conv", "grouped", "first"]),
    "resnet18": (lambda: resnet18(num_classes=5), normal(5, 2, 3, 32, 32), ["conv1", "conv2", "fc"]),
}


def config(*targets: str, **fields: Any) -> hra_fx.HRAConfig:
    return hra_fx.HRAConfig(**({"r": 3, "target_modules": list(targets or ("first", "second"))} | fields))


def traced(make: Callable[[], nn.Module] = Mlp) -> fx.GraphModule:
    torch.manual_seed(0)
    return fx.symbolic_trace(make().double())


def adapted(make: Callable[[], nn.Module] = Mlp, *targets: str, **fields: Any) -> tuple[fx.GraphModule, Any]:
    """A traced base model, and a transformed copy with random vectors."""
    base = traced(make)
    model = hra_fx.transform(copy.deepcopy(base), config(*targets, **fields))
    randomise(model)
    return base, model


def targets_of(module: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in module.graph.nodes if node.op == "call_module"]


@pytest.mark.parametrize("name", MODELS)
def test_outputs_gradients_and_fold_are_those_of_the_oracle(name: str) -> None:
    make, example, targets = MODELS[name]
    base, model = adapted(make, *targets)
    assert type(model) is not type(base) and isinstance(model, fx.GraphModule)
    calls = targets_of(model)
    sites = [row.path for row in hra_fx.report(model)]
    assert sites and all(row.region == "whole" for row in hra_fx.report(model))
    for place, target in enumerate(calls):
        assert (target in sites) == (place > 0 and calls[place - 1] == f"{target}.hra_u")
    assert [target for target in calls if not target.endswith("hra_u")] == targets_of(base)
    base.requires_grad_(False)
    check(base, model, example, rtol=1e-9)
    folded: Any = check_fold(traced(make), model, example, rtol=1e-9)
    assert folded.code == base.code and str(folded.graph) == str(base.graph)
    assert not any("hra" in node.meta for node in folded.graph.nodes)


def test_it_is_the_object_that_was_given_and_a_second_transform_does_nothing() -> None:
    model = traced()
    keys = list(model.state_dict())
    assert hra_fx.transform(model, config()) is model
    code, graph, vectors = model.code, model.graph, dict(model.named_parameters())
    assert hra_fx.transform(model, config()) is model
    assert model.code == code and model.graph is graph
    assert all(parameter is vectors[name] for name, parameter in model.named_parameters())
    assert [key for key in model.state_dict() if ".hra_u." not in key] == keys
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "first.hra_u.default",
        "second.hra_u.default",
    ]
    with pytest.raises(AdapterError, match="the model has it already, with another configuration"):
        hra_fx.transform(model, config(r=2))


def relu_for_tanh(module: fx.GraphModule) -> None:
    for node in module.graph.nodes:
        if node.target is torch.tanh:
            node.target = torch.relu


def doubled(module: fx.GraphModule) -> None:
    output = module.graph.find_nodes(op="output")[0]
    with module.graph.inserting_before(output):
        output.args = (module.graph.call_function(torch.mul, (output.args[0], 2.0)),)


def another_layer(module: fx.GraphModule) -> None:
    module.add_module("third", nn.Linear(4, 4).double())
    output = module.graph.find_nodes(op="output")[0]
    with module.graph.inserting_before(output):
        output.args = (module.graph.call_module("third", output.args),)


@pytest.mark.parametrize("change", [relu_for_tanh, doubled, another_layer])
def test_a_pass_of_the_users_after_transform(change: Callable[[fx.GraphModule], None]) -> None:
    base, model = adapted()
    for module in (base, model):
        torch.manual_seed(1)
        change(module)
        module.graph.eliminate_dead_code()
        module.graph.lint()
        module.recompile()
    assert len(targets_of(base)) * 2 - len(targets_of(model)) == (change is another_layer)
    check(base, model, X)
    again = copy.deepcopy(base)
    assert hra_fx.fold(model).code == again.code


def test_dead_code_goes_with_its_reflections_and_recompile_changes_nothing() -> None:
    base, model = adapted()
    code = model.code
    model.recompile()
    assert model.code == code and len(targets_of(model)) == 8
    assert model.graph.eliminate_dead_code()
    model.recompile()
    assert len(targets_of(model)) == 6
    check(base, model, X)


def test_interpreter_and_transformer_run_over_it() -> None:
    base, model = adapted(Cnn, "conv", "grouped", "first")
    base.eval(), model.eval()
    expected = run_dense(base, model, IMAGES)
    assert_same(fx.Interpreter(model).run(IMAGES), expected)
    assert_same(fx.Transformer(model).transform()(IMAGES), expected)

    class Names(fx.Interpreter):
        seen: list[str] = []  # noqa: RUF012

        def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
            self.seen.append(target)
            return super().call_module(target, args, kwargs)

    assert_same(Names(model).run(IMAGES), expected)
    assert Names.seen == targets_of(model)


def saved(model: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)


COPIES: list[Callable[[Any], Any]] = [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), saved]


@pytest.mark.parametrize("copied", COPIES, ids=["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_copies_and_pickles_are_adapted_and_on_their_own(copied: Callable[[Any], Any], name: str) -> None:
    make, example, targets = MODELS[name]
    base, model = adapted(make, *targets)
    twin = copied(model)
    check(base, twin, example)
    assert all(row.region == "whole" for row in hra_fx.report(twin))
    hra_fx.add_adapter(twin, "other", config("first", r=2))
    hra_fx.set_adapter(twin, "other")
    with hra_fx.disable_adapters(twin):
        assert_same(twin.eval()(example), base.eval()(example))
    hra_fx.set_adapter(twin, "default")
    hra_fx.delete_adapter(twin, "other")
    check_fold(base, twin, example)
    assert not [target for target in targets_of(twin) if "hra_u" in target]
    check(base, model, example)


def test_several_adapters() -> None:
    base, model = adapted(Mlp, "first")
    hra_fx.add_adapter(model, "other", config("second", r=2))
    randomise(model, 5)
    assert len(targets_of(model)) == 8
    hra_fx.set_adapter(model, ["default", "other"])
    assert_same(model(X), run_dense(base, model, X, adapters=("default", "other")))
    hra_fx.set_adapter(model, "other")
    assert_same(model(X), run_dense(base, model, X, adapters=("other",)))
    with hra_fx.disable_adapters(model):
        assert_same(model(X), base(X))
    hra_fx.merge_adapter(model)
    assert_same(model(X), run_dense(base, model, X, adapters=("other",)))
    hra_fx.unmerge_adapter(model)
    hra_fx.delete_adapter(model, "other")
    hra_fx.set_adapter(model, "default")
    assert [target for target in targets_of(model) if "second.hra_u" in target] == []
    check(base, model, X)
    assert {row.path: row.region for row in hra_fx.report(model)} == {"first": "whole"}
    check_fold(base, model, X)
    assert model.code == base.code


def test_the_last_adapter_deleted_leaves_the_graph_that_there_was() -> None:
    base, model = adapted()
    hra_fx.delete_adapter(model, "default")
    assert model.code == base.code and list(model.state_dict()) == list(base.state_dict())
    assert_same(model(X), base(X))
    assert all(p.requires_grad for p in model.parameters())
    hra_fx.transform(model, config("first"))
    randomise(model)
    check(base, model, X)


def test_an_adapter_is_saved_and_loaded(tmp_path: Path) -> None:
    base, model = adapted(Cnn, "conv", "first", bias="hra_only")
    hra_fx.save_adapter(model, tmp_path)
    again = hra_fx.load_adapter(traced(Cnn), tmp_path)
    assert_same(again.eval()(IMAGES), model.eval()(IMAGES))
    plain = torch.nn.Sequential()
    plain.load_state_dict({})
    original = Cnn().double()
    original.load_state_dict(base.state_dict())
    assert_same(hra_fx.load_adapter(original, tmp_path).eval()(IMAGES), model(IMAGES))
    other = hra_fx.transform(traced(Cnn), config("conv", "first", bias="hra_only"))
    other.load_state_dict(model.state_dict())
    assert_same(other.eval()(IMAGES), model(IMAGES))


def test_biases_and_modules_to_save_are_trained() -> None:
    base, model = adapted(Cnn, "conv", bias="all", modules_to_save=["first"])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model.eval()(IMAGES)["out"].square().sum().backward()
    optimizer.step()
    trained = model(IMAGES)["out"].detach()
    with hra_fx.disable_adapters(model):
        assert_same(model(IMAGES), base.eval()(IMAGES))
    folded = hra_fx.fold(model)
    assert_same(folded(IMAGES)["out"], trained)
    assert folded.code == base.code and list(folded.state_dict()) == list(base.state_dict())
    assert not torch.equal(folded.first.weight, base.first.weight)


class Reads(Mlp):
    """Reads the weight of a layer that it calls."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(super().forward(self.first(x))[:, :4] @ self.second.weight, self.first.weight)


class Asks(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.first.weight.dtype)) * self.second.weight.shape[0]


def test_a_read_of_the_weight_is_refused_and_the_graph_is_as_it_was() -> None:
    model = traced(Reads)
    code, graph = model.code, model.graph
    message = refused(model, config("first"))
    assert message == (
        "first: the graph reads its weight for node 'linear', and a copy of the graph would hold the weight without "
        "the layer, and so without reflections. Transform the model before it is traced, give a "
        "torch.export.ExportedProgram of it, or leave the layer out with exclude_modules."
    )
    assert model.code == code and model.graph is graph
    assert refused(model, config("first", "second")).startswith(("first: ", "second: "))
    asked = hra_fx.transform(traced(Asks), config("first", "second"))
    randomise(asked)
    check(traced(Asks), asked, X)


def test_any_later_error_leaves_the_graph_as_it_was() -> None:
    model = traced()
    code, graph, targets = model.code, model.graph, targets_of(model)
    with pytest.raises(AdapterError):
        hra_fx.transform(model, config(), example_inputs=X[:, :5])
    with pytest.raises(hra_fx.errors.SelectionError):
        hra_fx.transform(model, config(modules_to_save=["nowhere"]))
    assert model.code == code and model.graph is graph and targets_of(model) == targets
    model = hra_fx.transform(model, config("first"))
    code = model.code
    bad = Reads().double()
    module = fx.symbolic_trace(bad)
    hra_fx.transform(module, config("second"[:0] or "third", modules_to_save=None)) if False else None
    with pytest.raises(hra_fx.errors.SelectionError):
        hra_fx.add_adapter(model, "other", config("nowhere"))
    assert model.code == code


def test_verify_and_an_example_work_on_a_graph_too() -> None:
    model = traced(Cnn)
    base = copy.deepcopy(model)
    hra_fx.transform(model, config("conv", "grouped", "first"), example_inputs=IMAGES, verify=True)
    randomise(model)
    check(base, model, IMAGES)


def test_hra_model_is_refused() -> None:
    program = torch.export.export(Mlp().double(), (X,))
    for captured, kind in ((traced(), "Mlp"), (program, "ExportedProgram")):
        with pytest.raises(AdapterError) as caught:
            hra_fx.HRAModel(captured, config())
        assert kind in str(caught.value)
        assert str(caught.value).endswith(
            "is a captured graph, and cannot take on the methods of HRAModel. Call hra_fx.transform(model, config), "
            "which gives its like."
        )


def test_options_that_an_exported_program_has_no_use_for() -> None:
    program = torch.export.export(Mlp().double(), (X,))
    keys = list(program.state_dict)
    options: list[dict[str, Any]] = [{"low_cpu_mem_usage": True}, {"example_inputs": X}, {"verify": True}]
    for option in options:
        for captured in (program, program.module()):
            with pytest.raises(
                AdapterError, match="a captured program has no use for them. Leave them out, or transfo"
            ):
                hra_fx.transform(captured, config(), **option)
    assert list(program.state_dict) == keys
    transformed = hra_fx.transform(program, config())
    assert type(transformed) is type(program) and transformed is not program
    assert "first.hra_u.default" in transformed.state_dict
    assert_same(transformed.module()(X), program.module()(X), rtol=1e-6)


class Blocks(fx.Tracer):
    """Does not look into a Sequential."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.Sequential) or super().is_leaf_module(m, module_qualified_name)


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))
        self.first = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(self.block(x) + x)


def test_a_custom_tracer_whose_leaves_hold_layers() -> None:
    torch.manual_seed(0)
    root = Nested().double()
    base = fx.GraphModule(root, Blocks().trace(root))
    model = hra_fx.transform(copy.deepcopy(base), config("block.0", "block.2", "first"))
    randomise(model)
    assert targets_of(model) == ["block", "first.hra_u", "first"]
    assert {row.path: row.region for row in hra_fx.report(model)} == dict.fromkeys(
        ("block.0", "block.2", "first"), "whole"
    )
    check(base, model, X)
    for copied in COPIES:
        check(base, copied(model), X)
    check_fold(base, model, X)
    assert model.code == base.code


def test_a_graph_module_inside_of_a_bigger_model() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = traced(Cnn)
            self.second = nn.Linear(6, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.inner(x)["out"])

    torch.manual_seed(0)
    base = Holder()
    model = hra_fx.transform(copy.deepcopy(base), config("inner.conv", "inner.first", "second"))
    randomise(model)
    check(base, model, IMAGES)
    for copied in COPIES[:1]:
        check(base, copied(model), IMAGES)
    check_fold(base, model, IMAGES)
    assert model.inner.code == base.inner.code


def test_a_graph_of_a_transformed_model_is_refused_or_right() -> None:
    """The graphs that hra_fx hands out hold reflections already."""
    whole = hra_fx.transform(Mlp().double(), config())
    graph = hra_fx.graphs(whole)[""]
    with pytest.raises(AdapterError):
        hra_fx.transform(graph, config(r=2), "other")


def test_attention_in_a_graph_is_reflected_where_it_reads() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.MultiheadAttention(6, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x, x, x)[0]

    torch.manual_seed(0)
    base = traced(Attention)
    model = hra_fx.transform(copy.deepcopy(base), config("first", "first.out_proj"))
    randomise(model)
    assert [row.on_weight for row in hra_fx.report(model)] == [True, True]
    check(base, model, normal(6, 2, 3, 6))
    check_fold(base, model, normal(6, 2, 3, 6))


def test_a_shared_layer_and_a_layer_that_is_not_called() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 6)
            self.second = self.first

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.tanh(self.first(x)))

    base, model = adapted(Shared, "first")
    assert len(targets_of(model)) == 4
    assert_same(model(X), run_dense(base, model, X))
    folded = hra_fx.fold(model)
    assert folded.code == base.code


def test_refused_weights_carry_no_class_of_ours() -> None:
    model = traced(Reads)
    with pytest.raises(UnsupportedLayerError):
        hra_fx.transform(model, config("first", "second"))
    assert all(type(layer) is nn.Linear for layer in (model.first, model.second))
    assert_same(model(X), model(X))
