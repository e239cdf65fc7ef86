"""Small models that torch.fx traces correctly here, though plain fx often does not, and some that it refuses."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import StochasticDepth


class Two(nn.Module):
    """Two layers, 6 -> 8 -> 5."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Any:
        return self.second(self.middle(self.first(x)))

    def middle(self, hidden: Tensor) -> Any:
        """What is computed between both layers."""
        return torch.tanh(hidden)


class Branches(Two):
    """torch.fx refuses it; torch.export captures one call."""

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Any:
        hidden = self.first(x)
        hidden = hidden * 2 if hidden.shape[0] > 2 else hidden
        return {"out": self.second(self.middle(hidden)) * scale}


class Images(nn.Module):
    """torch.fx refuses it; it has every kind of adapted layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1, groups=2, padding_mode="circular")
        self.norm = nn.BatchNorm2d(4)
        self.attention = nn.MultiheadAttention(4, 2, dropout=0.2, batch_first=True)
        self.head = nn.Linear(4, 3)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        if x.shape[0] > 100:
            x = x[:100]
        rows = self.norm(self.conv(x)).flatten(2).mT
        if self.training:
            rows = F.dropout(rows, 0.2)
        read, _ = self.attention(rows, rows, rows)
        return {"again": self.head(read), "rows": self.drop(self.head(scale * rows))}


class Straight(torch.autograd.Function):
    """A rounding whose gradient is that of the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class Dropout(Two):
    def middle(self, hidden: Tensor) -> Tensor:
        return F.dropout(hidden, 0.5, self.training)


class Constants(Two):
    """Constants of each mode: by position, by keyword, in a tuple, in a slice; a float beside an int."""

    def middle(self, hidden: Tensor) -> Tensor:
        hidden = F.dropout(hidden, p=0.25 if self.training else 0, training=self.training)
        hidden = hidden.reshape((-1, 2, 4) if self.training else (-1, 4, 2)).flatten(1)
        hidden = hidden + hidden[:, (0 if self.training else 3) :].sum()
        return torch.add(hidden, 1 if self.training else 1.5)


class DropPath(nn.Module):
    """Stochastic depth with other operations in train mode than in eval mode."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * x.new_empty((x.shape[0], 1)).bernoulli_(0.5)


class Depths(Two):
    def __init__(self) -> None:
        super().__init__()
        self.path = DropPath()
        self.depth = StochasticDepth(0.5, "row")

    def middle(self, hidden: Tensor) -> Tensor:
        return hidden + self.depth(self.path(torch.tanh(hidden)))


class Norm(nn.BatchNorm1d):
    """A subclass outside of torch, which fx does not take for a leaf."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.num_batches_tracked.add_(1)
        mean, var = self.running_mean, self.running_var
        return torch.relu(F.batch_norm(x, mean, var, self.weight, self.bias, self.training, 0.1, self.eps))


class Norms(Two):
    def __init__(self) -> None:
        super().__init__()
        self.own = Norm(8)
        self.norm = nn.BatchNorm1d(8)

    def middle(self, hidden: Tensor) -> Tensor:
        return self.norm(self.own(hidden))


class Metadata(Two):
    """Shapes and dtypes are nodes, so the graph is valid for other batch sizes."""

    def middle(self, hidden: Tensor) -> Tensor:
        hidden = hidden.to(self.first.weight.dtype)
        batch, width = hidden.shape
        hidden = hidden.view(batch, 2, -1).transpose(1, 2).reshape(batch, width)
        return hidden * hidden.shape[0] + torch.zeros_like(hidden)


@dataclasses.dataclass
class Pair:
    left: Any
    right: Any


class Containers(Two):
    """Containers inside, a dictionary and a tuple as output."""

    def forward(self, x: Tensor) -> Any:
        pair = Pair(self.first(x), [x])
        return {"out": self.second(pair.left), "more": (pair.left, pair.right[0])}


class Attention(Two):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.2, batch_first=True)
        self.identity = nn.Identity()

    def middle(self, hidden: Tensor) -> Tensor:
        rows = hidden[:, None]
        found, _ = self.attention(rows, rows, rows, need_weights=False)
        return self.identity(found).flatten(1) + self.attention(rows, rows, rows)[1].sum()


class Shared(Two):
    """One layer on two paths, called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.again = nn.ModuleList([self.inner, nn.Tanh(), self.inner])

    def middle(self, hidden: Tensor) -> Tensor:
        for layer in self.again:
            hidden = layer(hidden)
        return self.inner(hidden)


class Reads(Two):
    """The weights of both layers are read, and one is called by keyword."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.linear(self.second(input=torch.tanh(self.first(x))), self.second.weight.T)
        return hidden @ self.first.weight * self.second.weight.shape[0]


class Optional(Two):
    """The graph is that of a call without the optional arguments."""

    def forward(self, x: Tensor, mask: Tensor | None = None, *, gain: float = 2.0) -> Tensor:
        hidden = self.first(x) if mask is None else self.first(x) * mask
        return self.second(torch.relu(hidden)) * gain


class Buffers(Two):
    """A buffer is written to in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(8, dtype=torch.float64))

    def middle(self, hidden: Tensor) -> Tensor:
        share = 0.1 if self.training else 0.0
        self.total.mul_(1 - share).add_(share * hidden.detach().mean(0))
        return hidden + self.total.clone()


class OneMode(Buffers):
    """Operators, a module and an output that only one mode has."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Any:
        hidden = self.first(x)
        if self.training:
            hidden = self.drop(F.dropout(hidden, 0.25))
            noise = torch.rand_like(hidden)
            self.total.lerp_(hidden.detach().mean(0), 0.1)
        hidden = F.linear(torch.tanh(hidden), self.second.weight.T @ self.second.weight) + self.total
        hidden = F.gumbel_softmax(hidden + noise) - noise if self.training else hidden.softmax(-1)
        out = self.second(hidden)
        return (out, hidden.square().mean()) if self.training else out


class Creates(Two):
    """Creates tensors in its forward, which torch.export makes constants; one is an attribute, and no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = torch.arange(8.0)

    def middle(self, hidden: Tensor) -> Tensor:
        width = torch.tensor([0.5, 2.0])
        width[0] = 0.25
        return torch.tanh(hidden * width.repeat(4) + self.shift)


TRACED: tuple[type[nn.Module], ...] = (
    Two,
    Dropout,
    Constants,
    Depths,
    Norms,
    Metadata,
    Containers,
    Attention,
    Shared,
    Reads,
    Optional,
    Buffers,
    OneMode,
)
