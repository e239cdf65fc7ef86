"""Small adapted models of all kinds that pictures must handle."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torchvision
from tiny import bert
from torch import Tensor, nn

import hra_fx

#: Module names with a meaning in some format. A model with them can be captured.
HOSTILE = (
    *("<script>alert(1)</script>", "a&b", "&lt;", "apo'strophe", "]]>", "-->", "日本", "#quot;", "sla/sh", "arrow"),
    *("{{script}}", "style x:#a;b", "end", "back`tick`", "a@2", "x;y", "per%20cent"),
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


class Pair(nn.Module):
    """A block with two results of different sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.gate = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
        return self.fc(x) * gate.sum(), self.gate(x) + gate


class Pairs(nn.Module):
    """Blocks that read both results of the block before; the first reads those of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow, self.head = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(2, 3)
        self.blocks = nn.ModuleList(Pair() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.wide(x), self.narrow(x)
        for block in self.blocks:
            x, gate = block(x, gate)
        return self.head(gate) + x.sum()


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
    "shared": lambda: _adapted(Shared(), ["fc1", "fc2", "fc"]),
    "repeats": lambda: _adapted(nn.Sequential(*(Residual() for _ in range(40)), nn.Linear(4, 2)), ["fc1", "fc2"]),
    "pairs": lambda: _adapted(Pairs(), ["fc", "head"]),
    "two adapters": _two_adapters,
    "attention": lambda: _adapted(nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)), "all-linear"),
    "hostile": lambda: _adapted(named(*HOSTILE), list(HOSTILE)),
    "hostile, in Python": lambda: _adapted(Chosen(*HOSTILE, *UNSPEAKABLE), list(HOSTILE)),
    "one layer": lambda: _adapted(nn.Sequential(nn.Linear(4, 4)), ["0"]),
}
#: Example inputs of some of these models.
INPUTS: dict[str, Any] = {
    "resnet": torch.zeros(1, 3, 64, 64),
    "bert": {"input_ids": torch.arange(10).reshape(2, 5)},
    "pairs": torch.zeros(5, 4),
}


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


def draw(name: str, file: Path, **options: Any) -> Path:
    """Write the picture or page of a model."""
    file.write_bytes(_content(name, file.suffix, tuple(options.items())))
    return file


@cache
def _content(name: str, suffix: str, options: tuple[tuple[str, Any], ...]) -> bytes:
    """What is drawn of a model, once for all tests: a capture takes seconds."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, f"a{suffix}")
        return hra_fx.visualize(drawn(name), file, example_inputs=INPUTS.get(name), **dict(options)).read_bytes()
