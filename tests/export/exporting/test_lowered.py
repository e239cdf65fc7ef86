"""An exported model consists of ATen products, with the outputs and gradients of the model."""

from __future__ import annotations

import torch
from adapting import randomise
from oracles import relative_error
from torch import Tensor, nn

import hra_fx


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


def image(batch: int = 2) -> Tensor:
    return torch.randn(batch, 4, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(batch))


def test_an_exported_model_has_only_products() -> None:
    torch.manual_seed(0)
    config = hra_fx.HRAConfig(r=3, target_modules=["conv", "fc", "attention", "out_proj"])
    model = hra_fx.transform(Net().double().eval(), config)
    hra_fx.add_adapter(model, "b", hra_fx.HRAConfig(r=2, target_modules=["fc"], apply_GS=True))
    hra_fx.set_adapter(model, ["default", "b"])
    randomise(model)
    program = torch.export.export(model, (image(),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not [name for name in operators if "linalg_qr" in name or "solve" in name or "hra_fx" in name]
    module = program.module()
    assert relative_error(module(image(5)), model(image(5))) < 1e-14
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    vectors = [model.get_parameter(name) for name in names]
    assert len(vectors) == 5
    assert all(module.get_parameter(name) is own for name, own in zip(names, vectors, strict=True))
    grads = [torch.autograd.grad(function(image()).square().sum(), vectors) for function in (module, model)]
    for ours, theirs in zip(*grads, strict=True):
        assert relative_error(ours, theirs) < 1e-12
