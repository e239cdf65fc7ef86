"""Small models that the tests of capture share; at module level, so that they pickle."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Two(nn.Module):
    """Two sites with a nonlinearity between them: 6 -> 8 -> 5. What the tests' own models vary."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Any:
        return self.second(torch.tanh(self.first(x)))


class Scale(nn.Module):
    """A child that is dissolved into its parent's graph: an attribute, a function, a buffer, a method."""

    def __init__(self, rate: float = 2.0) -> None:
        super().__init__()
        self.rate = rate
        self.function = torch.tanh
        self.register_buffer("shift", torch.full((8,), 0.25, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x) * self.rate + self.shift


class Block(nn.Module):
    """Residual block 8 -> 8 with dropout that only the functional form has."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8)
        self.rate = 0.3

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.gelu(self.up(self.norm(x)))
        return x + self.down(nn.functional.dropout(hidden, self.rate, self.training))


class Stack(nn.Module):
    """A model that is captured whole, in two graphs: stem, scale, blocks, head, and methods beside forward."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.scale = Scale()
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.head = nn.Linear(8, 5)

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.scale(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


class Optional(nn.Module):
    """A whole model whose forward has an optional argument."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(8, 5)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, gain: float = 1.0) -> Tensor:
        hidden = torch.tanh(self.first(x))
        if mask is not None:
            hidden = hidden * mask
        return self.second(hidden) * gain


class Convolutions(nn.Module):
    """Conv2d sites, BatchNorm, and a head: 3x6x6 -> 4."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 6, 3, stride=2, groups=2)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv1(x)))
        return self.fc(self.conv2(x).mean(dim=(2, 3)))


class Host(nn.Module):
    """Cannot be traced itself, so its parts are regions: two Stacks, of which the sum decides what is returned."""

    def __init__(self) -> None:
        super().__init__()
        self.left = Stack(1)
        self.right = Stack(1)

    def forward(self, x: Tensor) -> Tensor:
        left = self.left(x)
        return left + self.right(x) if float(left.detach().sum()) > -1e9 else left
