"""Small adapted models of all kinds that pictures must handle."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torchvision
from tiny_models import bert, llama
from torch import Tensor, nn

import hra_fx
from hra_fx.view.drawing import Drawing, drawing_of
from hra_fx.view.tree import Leaf

#: Module names with a meaning in some format. A model with them can be captured.
HOSTILE = (
    *("<script>alert(1)</script>", "a&b", "&lt;", "apo'strophe", "]]>", "-->", "日本", "#quot;", "sla/sh"),
    *("%%{init: {'theme': 'dark'}}%%", "style x:#a;b", "end", "click", "back`tick`", "**bold**", "a@2", "x;y"),
)
#: Names that generated code cannot contain, so a model with them cannot be captured.
UNSPEAKABLE = ('quo"te', "back\\slash\\N")


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(self.act(self.fc1(x)))


class Shared(nn.Module):
    """One block called three times, one layer called in between."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.fc = Residual(), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.block(self.fc(self.block(self.block(x)))))


class Turned(nn.Module):
    """A layer that reads two values."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor, angle: Tensor) -> Tensor:
        return x + self.fc(x * angle)


class Pattern(nn.Module):
    """Equal layers; each third one reads another value."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Turned() for _ in range(8))

    def forward(self, x: Tensor) -> Tensor:
        near, far = x.sin(), x.cos()
        for index, layer in enumerate(self.layers):
            x = layer(x, far if index % 3 == 2 else near)
        return x


class Chosen(nn.Module):
    """Cannot be traced, because its loop depends on an argument. Its layers have the given names."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.part = nn.Sequential()
        for name in names:
            self.part.add_module(name, nn.Linear(4, 4))

    def forward(self, x: Tensor, times: int = 1) -> Tensor:
        for _ in range(times):
            x = self.part(x)
        return x


def named(*names: str) -> nn.Sequential:
    """A chain of layers with these names, which can be captured."""
    model = nn.Sequential()
    for name in names:
        model.add_module(name, nn.Linear(4, 4))
    return model


def _adapted(model: nn.Module, targets: str | list[str], *, r: int = 2) -> nn.Module:
    return hra_fx.transform(model.eval(), hra_fx.HRAConfig(r=r, target_modules=targets))


def _two_adapters() -> nn.Module:
    model = _adapted(nn.Sequential(Residual(), Residual()), ["fc1", "fc2"])
    hra_fx.add_adapter(model, "second", hra_fx.HRAConfig(r=4, target_modules=["fc1"]))
    hra_fx.set_adapter(model, ["default", "second"])
    return model


MAKERS: dict[str, Callable[[], nn.Module]] = {
    "resnet": lambda: _adapted(torchvision.models.resnet18(), r".*(conv\d|downsample\.0|fc)"),
    "bert": lambda: _adapted(bert("BertModel", num_hidden_layers=3), ["query", "key", "value", "dense"]),
    "llama": lambda: _adapted(llama(num_hidden_layers=3), ["q_proj", "v_proj", "gate_proj", "up_proj"]),
    "shared": lambda: _adapted(Shared(), ["fc1", "fc2", "fc"]),
    "repeats": lambda: _adapted(nn.Sequential(*(Residual() for _ in range(40)), nn.Linear(4, 2)), ["fc1", "fc2"]),
    "pattern": lambda: _adapted(Pattern(), ["fc"]),
    "two adapters": _two_adapters,
    "attention": lambda: _adapted(nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)), "all-linear"),
    "hostile": lambda: _adapted(named(*HOSTILE), list(HOSTILE)),
    "hostile, in Python": lambda: _adapted(Chosen(*HOSTILE, *UNSPEAKABLE), list(HOSTILE)),
    "one layer": lambda: _adapted(nn.Sequential(nn.Linear(4, 4)), ["0"]),
}


def leaves(found: Drawing) -> list[Leaf]:
    return [leaf for _, leaf in found.picture.nodes(data="leaf")]


@cache
def drawn(name: str) -> nn.Module:
    """A model whose reflections rotate. All tests share the object, and must not change it."""
    model = MAKERS[name]()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if ".hra_u." in f".{path}":
                parameter += 0.5 * torch.randn(parameter.shape, generator=generator) * parameter.std()
    return model


@cache
def drawing(name: str) -> Drawing:
    """The drawing of that model, shared by all tests."""
    return drawing_of(drawn(name))
