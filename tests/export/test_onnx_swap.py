"""One ONNX graph for many adapters: onnxruntime computes what PyTorch does; errors."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import onnxruntime
import pytest
import torch
from adapting import QUIET, config as adapter_config, randomise
from torch import Tensor, nn
from torch.export import Dim

import hra_fx

config = partial(adapter_config, r=4)
INPUTS = [SimpleNamespace(name="0.hra_u", shape=[18, 4]), SimpleNamespace(name="3.hra_u", shape=[54, 4])]


def net(**fields: Any) -> nn.Sequential:
    """A convolution and a Linear, with an adapter "slot" on both."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(54, 5)).eval()
    return hra_fx.transform(model, config("0", "3", **{"pairs": False, **fields}), "slot")


def add(model: nn.Module, name: str, settings: hra_fx.HRAConfig) -> None:
    hra_fx.add_adapter(model, name, settings)
    randomise(model, name)


def exported(model: nn.Module, optimize: bool = False) -> Any:
    shapes = ({0: Dim("batch")},)
    return torch.onnx.export(
        model, (torch.ones(2, 2, 3, 3),), dynamo=True, optimize=optimize, dynamic_shapes=shapes, verbose=False
    )


def image() -> Tensor:
    return torch.randn(5, 2, 3, 3, generator=torch.Generator().manual_seed(0))


@QUIET
def test_one_graph_runs_adapters_of_every_kind() -> None:
    model = net(r=8)
    add(model, "even", config("0", "3"))
    add(model, "odd, Gram-Schmidt", config("3", r=3, apply_GS=True))
    add(model, "odd", config("0", r=7))
    add(model, "soft", config("0", "3", r=2))
    hra_fx.set_scale(model, "soft", 0.3)
    program = hra_fx.make_swappable(exported(model), model)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), options)
    inputs = session.get_overridable_initializers()
    assert {given.name: given.shape for given in inputs} == {"0.hra_u": [18, 8], "3.hra_u": [54, 8]}
    assert [given.name for given in session.get_inputs()] == ["input"]
    (alone,) = session.run(None, {"input": image().numpy()})
    for name in ("even", "odd, Gram-Schmidt", "odd", "soft", "even", "slot"):
        hra_fx.set_adapter(model, name)
        (actual,) = session.run(None, {"input": image().numpy()} | hra_fx.adapter_inputs(model, inputs))
        with torch.no_grad():
            expected = model(image())
        assert float((torch.from_numpy(actual) - expected).abs().max()) < 1e-6
        assert (abs(actual - alone).max() > 0.005) == (name != "slot")


@QUIET
@pytest.mark.slow
def test_a_graph_whose_factors_are_constants_is_refused() -> None:
    model = net()
    with pytest.raises(
        hra_fx.AdapterError, match=r"0: the graph does not use the vectors hra_u.slot\. .*optimize=False"
    ):
        hra_fx.make_swappable(exported(model, optimize=True), model)


class ONNXProgram:
    """Stands for a program: the model is checked first."""


@pytest.mark.parametrize("fields", [{"apply_GS": True}, {"pairs": True}, {"r": 2}], ids=str)
def test_an_adapter_that_would_be_part_of_all_others_is_refused(fields: dict[str, Any]) -> None:
    model = net(**fields)
    if "r" in fields:
        hra_fx.set_scale(model, "slot", 0.5)
    with pytest.raises(hra_fx.AdapterError, match=r"0: adapter 'slot' is not plain vectors at scale 1 .*add_adapter"):
        hra_fx.make_swappable(ONNXProgram(), model)  # type: ignore[arg-type]


def test_exactly_one_adapter_must_be_active() -> None:
    model = net()
    add(model, "b", config("0"))
    hra_fx.set_adapter(model, ["slot", "b"])
    text = r"exactly one active adapter, which is not merged or disabled, got \['slot', 'b'\]\. Call hra_fx.set_ad"
    with pytest.raises(hra_fx.AdapterError, match=text):
        hra_fx.make_swappable(ONNXProgram(), model)  # type: ignore[arg-type]
    hra_fx.set_adapter(model, "slot")
    with hra_fx.disable_adapters(model), pytest.raises(hra_fx.AdapterError, match=r"disabled, got \[\]"):
        hra_fx.adapter_inputs(model, INPUTS)


@pytest.mark.parametrize(
    ("name", "inputs", "message"),
    [
        ("wide", INPUTS, "3: adapter 'wide' has 6 reflections of width 54 here, .* at most 4 of width 54"),
        ("slot", INPUTS[:1], "3: adapter .slot. has 4 reflections of width 54 here, .* at most 0 of width 0"),
    ],
)
def test_a_graph_that_an_adapter_does_not_fit_is_refused(name: str, inputs: list[Any], message: str) -> None:
    model = net()
    add(model, "wide", config("3", r=6))
    with pytest.raises(hra_fx.AdapterError, match=message):
        hra_fx.adapter_inputs(model, inputs, name)


@pytest.mark.parametrize(("fields", "path"), [({"modules_to_save": ["4"]}, "4"), ({"bias": "all"}, "0")])
def test_an_adapter_with_trained_copies_is_refused(fields: dict[str, Any], path: str) -> None:
    """Every other adapter would run with them."""
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    hra_fx.transform(model, config("0", "2", **fields), "a")
    text = rf"{path}: adapter 'a' trains a copy of it \(modules_to_save or bias\), .*Export this adapter alone"
    with pytest.raises(hra_fx.AdapterError, match=text):
        hra_fx.make_swappable(ONNXProgram(), model)  # type: ignore[arg-type]
    with pytest.raises(hra_fx.AdapterError, match=text):
        hra_fx.adapter_inputs(model, INPUTS)
