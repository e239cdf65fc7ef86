"""`transform(..., trace=True)`: a GraphModule in which each reflection is a node, by torch.fx or by torch.export."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapting import picture
from graph_modules import COPIES
from layers.checking import assert_same, check, gradients, normal, randomise, vectors_of
from torch import Tensor, fx, nn
from torchvision.models.swin_transformer import SwinTransformer
from tracing.models import Dropout, Two

import hra_fx
from hra_fx.errors import AdapterError, SelectionError, UnsupportedLayerError

X = normal(7, 4, 6)


def config(*targets: str, **fields: Any) -> hra_fx.HRAConfig:
    return hra_fx.HRAConfig(**({"r": 3, "target_modules": list(targets or ("first", "second"))} | fields))


def traced(make: Callable[[], nn.Module] = Dropout, *targets: str, **fields: Any) -> tuple[nn.Module, Any]:
    """A base model, and its adapted GraphModule with random vectors."""
    torch.manual_seed(0)
    base = make().double()
    model = hra_fx.transform(copy.deepcopy(base), config(*targets, **fields), trace=True)
    randomise(model)
    return base, model


def calls(model: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in model.graph.find_nodes(op="call_module")]


class Branches(Two):
    """torch.fx refuses it; torch.export captures one call."""

    def forward(self, x: Tensor, *, scale: float = 1.0) -> dict[str, Tensor]:
        hidden = self.first(x)
        hidden = hidden * 2 if hidden.shape[0] > 2 else hidden
        return {"out": self.second(torch.relu(hidden)) * scale}


# ---- torch.fx ----


def test_each_reflection_is_a_node_and_modules_are_shared() -> None:
    torch.manual_seed(0)
    base = Dropout().double()
    parameters, keys = dict(base.named_parameters()), list(base.state_dict())
    model = hra_fx.transform(base, config(), trace=True)
    assert isinstance(model, fx.GraphModule) and type(model).__name__ == "Dropout"
    assert calls(model)[:2] == ["first.hra_u", "first"] and calls(model)[-2:] == ["second.hra_u", "second"]
    now = dict(model.named_parameters())
    assert all(now[name] is parameter for name, parameter in parameters.items())
    assert [key for key in model.state_dict() if "hra_u" not in key] == keys
    assert hra_fx.transform(model, config(), trace=True) is model


@pytest.mark.parametrize("fields", [{"r": 2}, {"apply_GS": True}, {"r": 2, "init_weights": False}], ids=str)
def test_it_computes_what_the_eager_adapted_model_does(fields: dict[str, Any]) -> None:
    base, model = traced(Dropout, **fields)
    eager = hra_fx.transform(copy.deepcopy(base), config(**fields))
    eager.load_state_dict(model.state_dict())
    for training in (True, False):
        found = []
        for each in (model.train(training), eager.train(training)):
            torch.manual_seed(5)
            output = each(X)
            found.append([output, *gradients(output, list(vectors_of(each).values()))])
        assert_same(*found)
    check(base, model, X)


def test_fold_gives_the_plain_graph() -> None:
    base, model = traced()
    with torch.no_grad():
        before = model.eval()(X)
    folded = hra_fx.fold(model)
    assert_same(folded(X), before)
    assert "hra_u" not in folded.code and list(folded.state_dict()) == list(base.state_dict())
    plain = hra_fx.fold(hra_fx.transform(copy.deepcopy(base), config(), trace=True))
    assert plain.code == folded.code


def test_adapters_are_added_switched_deleted_saved_and_loaded(tmp_path: Path) -> None:
    base, model = traced(Dropout, "first", bias="hra_only")
    hra_fx.add_adapter(model, "other", config("second"))
    randomise(model)
    assert calls(model)[-2:] == ["second.hra_u", "second"]
    for name in ("default", "other"):
        hra_fx.set_adapter(model, name)
        hra_fx.save_adapter(model, tmp_path / name, name)
        for loaded in (
            hra_fx.load_adapter(copy.deepcopy(base), tmp_path / name),
            hra_fx.load_adapter(fx.symbolic_trace(copy.deepcopy(base).eval()), tmp_path / name),
        ):
            assert_same(loaded.eval()(X), model.eval()(X))
    with hra_fx.disable_adapters(model):
        assert_same(model(X), base.eval()(X))
    hra_fx.set_adapter(model, "default")
    hra_fx.delete_adapter(model, "other")
    assert "second.hra_u" not in calls(model)
    for copied in COPIES:
        assert_same(copied(model)(X), model(X))


def swin() -> nn.Module:
    return SwinTransformer([2, 2], 8, [1, 1], [1, 2], [2, 2], num_classes=3, stochastic_depth_prob=0.3)


def beit() -> nn.Module:
    import timm

    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 3}
    model: Any = timm.create_model("beit_base_patch16_224", **sizes, drop_path_rate=0.3, init_values=1.0)
    nn.init.normal_(model.head.weight)  # it starts near zero
    return model


@pytest.mark.parametrize(
    ("make", "targets", "reads"),
    [
        (swin, ["qkv", "proj", "mlp.0", "mlp.3"], "features.1.0.attn.qkv.hra_u"),
        (beit, ["qkv", "attn.proj", "fc1", "fc2"], "blocks.0.attn.qkv.hra_u"),
    ],
    ids=["swin", "beit"],
)
def test_vision_models_and_readers_of_weights(make: Callable[[], nn.Module], targets: list[str], reads: str) -> None:
    base, model = traced(make, *targets)
    of_weights = [str(node.target) for node in model.graph.nodes if "weight" in node.kwargs and "hra" in node.meta]
    assert reads in of_weights
    check(base, model, normal(3, 2, 3, 16, 16))
    check(base, copy.deepcopy(model), normal(3, 2, 3, 16, 16))


class Unused(Two):
    """Has tensors that no call uses, and a buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5))
        self.token = nn.Parameter(torch.zeros(3))
        self.register_buffer("table", torch.ones(8, dtype=torch.float64), persistent=False)

    def middle(self, hidden: Tensor) -> Tensor:
        return torch.tanh(hidden * self.table)


def test_unused_layers_keep_their_keys_and_adapters() -> None:
    base, model = traced(Unused, "first", "second", "head.0")
    eager = hra_fx.transform(copy.deepcopy(base), config("first", "second", "head.0"))
    assert model.state_dict().keys() == eager.state_dict().keys()
    eager.load_state_dict(model.state_dict())
    assert_same(model(X), eager(X))
    assert hra_fx.fold(model).state_dict().keys() == base.state_dict().keys()


class Late(Two):
    """Its first layers, one of them shared, are called last."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(8))
        self.inner = nn.ModuleDict({"shared": self.second, "own": nn.Linear(8, 8)})
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.inner["own"](self.first(x)) * self.scale + self.token
        return self.inner["shared"](hidden)


def test_modules_and_parameters_keep_their_order_and_first_names() -> None:
    base, model = traced(Late, "second")
    assert list(dict(fx.symbolic_trace(base).named_modules())) == ["", "first", "inner", "inner.own", "second"]
    eager = hra_fx.transform(copy.deepcopy(base), config("second"))
    assert list(dict(model.named_parameters())) == list(dict(eager.named_parameters()))
    assert "second.hra_u.default" in dict(model.named_parameters())


# ---- torch.export ----


def bert() -> tuple[nn.Module, Any, Any]:
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids, mask = tokens(), torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    return (
        BertModel(BertConfig(vocab_size=16, **sizes)),
        {"input_ids": ids, "attention_mask": mask},
        ["query", "output.dense"],
    )


def llama() -> tuple[nn.Module, Any, Any]:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=16, use_cache=False, **sizes))
    return model, {"input_ids": tokens(), "labels": tokens()}, ["q_proj", "v_proj", "down_proj"]


def t5() -> tuple[nn.Module, Any, Any]:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": 16, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, use_cache=False))
    return model, {"input_ids": tokens(), "labels": tokens()}, ["q", "v", "wo"]


def tokens() -> Tensor:
    return torch.tensor([[5, 9, 3, 7], [8, 4, 11, 6]])


@pytest.mark.parametrize("make", [bert, pytest.param(llama, marks=pytest.mark.slow), t5])
def test_transformers_are_captured_from_an_example_call(make: Callable[[], tuple[nn.Module, Any, Any]]) -> None:
    torch.manual_seed(0)
    base, example, targets = make()
    base = base.eval()
    message = "Pass example_inputs to capture a call with torch.export, or leave out trace=True"
    with pytest.raises(AdapterError, match=f"torch.fx cannot trace {type(base).__name__}: .*{message}"):
        hra_fx.transform(base, config(*targets), trace=True)
    plain = copy.deepcopy(base)
    eager = hra_fx.transform(copy.deepcopy(base), config(*targets))
    model = hra_fx.transform(base, config(*targets), trace=True, example_inputs=example)
    assert isinstance(model, fx.GraphModule)
    randomise(eager)
    vectors = {name: value for name, value in eager.state_dict().items() if ".hra_u." in name}
    assert {name for name in model.state_dict() if ".hra_u." in name} == vectors.keys()
    model.load_state_dict(vectors, strict=False)
    found, wanted = model(**example), eager(**example)
    assert type(found) is type(wanted)
    name = next(iter(wanted))
    torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-5)
    mine, theirs = ([vectors_of(each)[path] for path in vectors_of(eager)] for each in (model, eager))
    for one, other in zip(gradients(found[name], mine), gradients(wanted[name], theirs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    folded = hra_fx.fold(model)
    torch.testing.assert_close(folded(**example)[name], wanted[name], rtol=1e-4, atol=1e-5)
    assert not any("hra_u" in key for key in folded.state_dict())
    torch.testing.assert_close(base(**example)[name], plain(**example)[name], rtol=0, atol=0)


def test_a_small_model_is_captured_as_it_is_called() -> None:
    torch.manual_seed(0)
    base = Branches().double().eval()
    model = hra_fx.transform(copy.deepcopy(base), config(), trace=True, example_inputs=X)
    randomise(model)
    eager = hra_fx.transform(copy.deepcopy(base), config())
    assert not any(eager.load_state_dict(model.state_dict(), strict=False))
    assert_same(model(X), eager(X))


def exported() -> Any:
    program = hra_fx.transform(torch.export.export(Branches().double().eval(), (X,)), config())
    return program.module()


def captured() -> Any:
    return hra_fx.transform(Branches().double().eval(), config(), trace=True, example_inputs=X)


FOR_LAYERS: dict[str, Callable[[Any], object]] = {
    "save_adapter": lambda graph: hra_fx.save_adapter(graph, "adapter"),
    "set_scale": lambda graph: hra_fx.set_scale(graph, "default", 0.5),
    "set_adapter": lambda graph: hra_fx.set_adapter(graph, "default"),
    "disable_adapters": hra_fx.disable_adapters,
    "orthogonality_loss": hra_fx.orthogonality_loss,
    "plan_fold": hra_fx.plan_fold,
    "graphs": hra_fx.graphs,
}


@pytest.mark.parametrize("make", [exported, captured])
def test_a_captured_graph_says_what_works_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[], Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    graph = make()
    for function in FOR_LAYERS.values():
        message = r"GraphModule is a graph of operators: only .*load_state_dict\(graph\.state_dict\(\), strict=False\)"
        with pytest.raises(AdapterError, match=message):
            function(graph)
    with pytest.raises(AdapterError, match=r"GraphModule has no adapters\. Call hra_fx\.transform"):
        hra_fx.set_adapter(hra_fx.fold(graph), "default")


def test_the_vectors_of_a_captured_graph_are_saved_from_a_model_without_trace(tmp_path: Path) -> None:
    base = Branches().double().eval()
    eager = hra_fx.transform(copy.deepcopy(base), config())
    graph = hra_fx.transform(copy.deepcopy(base), config(), trace=True, example_inputs=X)
    randomise(graph)
    eager.load_state_dict(graph.state_dict(), strict=False)
    hra_fx.save_adapter(eager, tmp_path)
    assert_same(hra_fx.load_adapter(base, tmp_path)(X), graph(X))


def test_with_an_example_torch_fx_still_goes_first() -> None:
    model = hra_fx.transform(Dropout().double(), config(), trace=True, example_inputs=X, verify=True)
    assert calls(model)[0] == "first.hra_u"


# ---- errors ----


class Breaks(Two):
    """Neither torch.fx nor torch.export can trace it."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.second(hidden * 2 if float(hidden.sum().detach()) > 0 else hidden)


def under(context: Callable[[], Any]) -> type[Two]:
    """A model that torch.fx cannot trace, with all layers under a context."""

    def forward(self: Branches, x: Tensor) -> dict[str, Tensor]:
        with context():
            return Branches.forward(self, x)

    return type("Under", (Branches,), {"forward": forward})


class Tied(Branches):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight


ERRORS: dict[str, tuple[type[nn.Module], dict[str, Any], type[Exception], str]] = {
    "torch.fx": (Branches, {}, AdapterError, r"torch\.fx cannot trace Branches: it branches on a value"),
    "torch.export": (Breaks, {"example_inputs": X}, AdapterError, "torch.export cannot capture Breaks"),
    "autocast": (
        under(lambda: torch.autocast("cpu", torch.bfloat16)),
        {"example_inputs": X},
        UnsupportedLayerError,
        r"first: the layer runs under torch\.autocast, .*exclude_modules.*without trace=True",
    ),
    "no_grad": (
        under(torch.no_grad),
        {"example_inputs": X},
        UnsupportedLayerError,
        r"first: the layer runs under torch\.no_grad\(\) or another grad mode, .*exclude_modules",
    ),
    "tied": (
        Tied,
        {"example_inputs": X, "config": config("first", "second")},
        AdapterError,
        r"first and second share a weight, .*Exclude one of them with exclude_modules=\['second'\], or leave out trace",
    ),
    "verify": (
        Branches,
        {"example_inputs": X, "verify": True},
        AdapterError,
        r"^verify=True: this works for graphs that torch\.fx traces\. .*Leave out verify or trace\.$",
    ),
    "low_cpu_mem_usage": (
        Branches,
        {"example_inputs": X, "low_cpu_mem_usage": True},
        AdapterError,
        r"^low_cpu_mem_usage=True: this works for graphs .*Leave out low_cpu_mem_usage or trace\.$",
    ),
    "selection": (Dropout, {"config": config("nowhere")}, SelectionError, "nowhere"),
    "modules_to_save": (Dropout, {"config": config(modules_to_save=["nowhere"])}, SelectionError, "nowhere"),
    "example_inputs": (Branches, {"example_inputs": 3}, AdapterError, "example_inputs must be a tensor, .*, got int"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_leaves_the_model_as_it_was(name: str) -> None:
    make, options, kind, message = ERRORS[name]
    model = make().double().eval()
    before = picture(model)
    with pytest.raises(kind, match=message):
        hra_fx.transform(model, **({"config": config(), "trace": True} | options))
    assert picture(model) == before
    assert model(X) is not None


def test_a_refusal_of_torch_export_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    before = logger.disabled
    with pytest.raises(AdapterError, match=r"torch\.export cannot capture Breaks"):
        hra_fx.transform(Breaks().double(), config(), trace=True, example_inputs=X)
    assert capfd.readouterr() == ("", "")
    assert logger.disabled is before


def test_a_model_with_adapters_is_refused() -> None:
    model = hra_fx.transform(Dropout(), config("first"))
    with pytest.raises(AdapterError, match=r"trace=True: Dropout has adapters already.*hra_fx\.graphs\(model\)"):
        hra_fx.transform(model, config("second"), "other", trace=True)


class Optional(nn.Module):
    """A forward with an argument that fx leaves at its default."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        return self.layer(x) if scale is None else self.layer(x) * scale


@pytest.mark.parametrize("with_scale", [False, True])
def test_the_graph_is_called_as_in_the_example(with_scale: bool) -> None:
    torch.manual_seed(0)
    base = Optional().double()
    inputs = {"x": torch.randn(3, 6).double()} | ({"scale": torch.randn(6).double()} if with_scale else {})
    settings = hra_fx.HRAConfig(r=2, target_modules=["layer"], init_weights=False)
    graph = hra_fx.transform(copy.deepcopy(base), settings, trace=True, example_inputs=inputs)
    eager = hra_fx.transform(copy.deepcopy(base), settings)
    eager.load_state_dict(graph.state_dict())
    torch.testing.assert_close(graph(**inputs), eager(**inputs), rtol=1e-12, atol=1e-13)
