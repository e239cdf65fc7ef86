"""The residual blocks of a UNet's down path in plain torch, so that a GPU needs no diffusers."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional

GROUPS = 32


class Block(nn.Module):
    """GroupNorm, SiLU and a 3x3 convolution, twice, beside a shortcut."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(GROUPS, inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = nn.GroupNorm(GROUPS, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.shortcut = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.conv1(functional.silu(self.norm1(x)))
        h = self.conv2(functional.silu(self.norm2(h)))
        shortcut: Tensor = self.shortcut(x)
        return shortcut + h


class DownPath(nn.Module):
    """Two blocks at each resolution, which a convolution halves between them."""

    def __init__(self, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(4, channels[0], 3, padding=1)
        layers: list[nn.Module] = [Block(channels[0], channels[0]), Block(channels[0], channels[0])]
        for inputs, outputs in pairwise(channels):
            layers += [nn.Conv2d(inputs, inputs, 3, stride=2, padding=1)]
            layers += [Block(inputs, outputs), Block(outputs, outputs)]
        self.layers = nn.Sequential(*layers)

    def forward(self, latents: Tensor) -> Tensor:
        x: Tensor = self.layers(self.conv_in(latents))
        return x
