"""Exported models consist of ATen operators with the same outputs and gradients; `freeze` makes factors constants."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adapting import randomise
from oracles import relative_error
from torch import Tensor, nn

import hra_fx

F64 = torch.float64
BATCH = torch.export.Dim.DYNAMIC


class Net(nn.Module):
    """A Linear, a grouped convolution, and an attention, whose weight is rotated."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, padding=1, groups=2, padding_mode="reflect")
        self.fc = nn.Linear(54, 12)
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc(self.conv(x).relu().flatten(1))[:, None]
        attended: Tensor = self.attention(hidden, hidden, hidden, need_weights=False)[0]
        return attended


TARGETS = ["conv", "fc", "attention", "out_proj"]
ANCHORED: dict[str, Any] = {"r": 3}
GRAM_SCHMIDT: dict[str, Any] = {"r": 3, "apply_GS": True}


def image(batch: int = 2) -> Tensor:
    return torch.randn(batch, 4, 3, 3, dtype=F64, generator=torch.Generator().manual_seed(batch))


def adapted(**fields: Any) -> Net:
    torch.manual_seed(0)
    model = hra_fx.transform(Net().double().eval(), hra_fx.HRAConfig(**({"target_modules": TARGETS} | fields)))
    randomise(model)
    return model


def exported(model: nn.Module, x: Tensor | None = None) -> torch.export.ExportedProgram:
    return torch.export.export(model, (image() if x is None else x,), dynamic_shapes=({0: BATCH},))


def operators(graph: torch.fx.Graph) -> set[str]:
    return {str(node.target) for node in graph.nodes if node.op == "call_function"}


def test_an_exported_model_has_only_products_and_a_frozen_one_constants() -> None:
    model = adapted(**ANCHORED)
    program = exported(model)
    assert not [name for name in operators(program.graph) if "linalg_qr" in name or "solve" in name or "hra_fx" in name]
    frozen = hra_fx.freeze(program)
    expected = model(image(5))
    assert relative_error(program.module()(image(5)), expected) < 1e-14
    assert relative_error(frozen.module()(image(5)), expected) < 1e-14
    assert len(frozen.graph.nodes) < len(program.graph.nodes) / 4
    names = [name for name in frozen.state_dict if ".hra_u." in name]
    assert len(names) == 8
    assert all(".frozen_" in name and frozen.state_dict[name].is_contiguous() for name in names)
    # The original program is unchanged.
    assert [name for name in program.state_dict if name.endswith(".default")]
    assert relative_error(program.module()(image(5)), expected) < 1e-14
    # The gradient through it is the model's.
    module = program.module()
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    vectors = [model.get_parameter(name) for name in names]
    assert len(vectors) == 4
    assert all(module.get_parameter(name) is own for name, own in zip(names, vectors, strict=True))
    grads = [torch.autograd.grad(function(image()).square().sum(), vectors) for function in (module, model)]
    for ours, theirs in zip(*grads, strict=True):
        assert relative_error(ours, theirs) < 1e-12
    # Constants have their own memory.
    with torch.no_grad():
        for vector in vectors:
            vector.zero_()
    assert relative_error(frozen.module()(image(5)), expected) < 1e-14


def test_several_adapters_and_scales_are_frozen_together() -> None:
    model = adapted(r=4)
    hra_fx.add_adapter(model, "b", hra_fx.HRAConfig(r=2, target_modules=["fc"]))
    randomise(model)
    hra_fx.set_scale(model, "b", 0.5)
    hra_fx.set_adapter(model, ["default", "b"])
    frozen = hra_fx.freeze(exported(model))
    assert relative_error(frozen.module()(image(5)), model(image(5))) < 1e-14
    assert not [name for name in (*frozen.state_dict, *frozen.constants) if name.endswith((".b", "_scaled"))]


def test_a_model_is_refused() -> None:
    text = r"freeze: expected an ExportedProgram, got Net\. Export .*\(torch.export.export\(mod"
    with pytest.raises(hra_fx.AdapterError, match=text):
        hra_fx.freeze(adapted())


class Casts(Net):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x)


def test_vectors_that_are_read_under_autocast_cannot_be_frozen() -> None:
    model = hra_fx.transform(Casts().eval(), hra_fx.HRAConfig(r=2, target_modules=["fc"]))
    with pytest.raises(hra_fx.errors.GraphInvariantError, match="Export the model in eval mode and without autocast"):
        hra_fx.freeze(exported(model, image().float()))


def test_a_graph_without_reflections_cannot_be_frozen() -> None:
    text = r"freeze: the graph has no reflections. It is already frozen, or comes from a model that was folded or not"
    model = hra_fx.transform(nn.Sequential(nn.Linear(3, 2)).eval(), hra_fx.HRAConfig(r=2, target_modules=["0"]))
    frozen = hra_fx.freeze(torch.export.export(model, (torch.ones(1, 3),)))
    for captured in (frozen, torch.export.export(hra_fx.fold(model), (torch.ones(1, 3),))):
        with pytest.raises(hra_fx.AdapterError, match=text):
            hra_fx.freeze(captured)
