"""Models that assert, in a file whose asserts pytest does not rewrite."""

from __future__ import annotations

from capture.models import Two
from torch import Tensor, nn


class Asserts(Two):
    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[-1] == 6, f"{x.shape}"
        hidden = self.first(x)
        assert x.ndim == 2 and x.shape[0] < 9
        return self.second(hidden)


class Caught(Two):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        try:
            assert x.shape[0] < 4
            hidden = hidden * 2
        except AssertionError:
            hidden = hidden * 3
        return self.second(hidden)


class Checked(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[0] < 4
        return x * 2


class CaughtAbove(Two):
    """The assert is in a child, and the parent catches."""

    def __init__(self) -> None:
        super().__init__()
        self.check = Checked()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        try:
            return self.second(self.check(hidden))
        except AssertionError:
            return self.second(hidden * 3)


class Either(Two):
    """Of an `or`, the first condition is a branch."""

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[0] < 4 or x.shape[1] == 6
        return self.second(self.first(x))


class NotSo(Two):
    def forward(self, x: Tensor) -> Tensor:
        assert not x.shape[0] > 99
        return self.second(self.first(x))


class Raises(Two):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > 99:
            raise AssertionError("too many")
        return self.second(self.first(x))


class Falls(Two):
    """An assert after a branch, which is one."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        if x.shape[0] < 4:
            assert x.shape[1] == 6
            hidden = hidden * 2
        return self.second(hidden)


class Counted(Two):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        factor = 2 * (x.shape[0] < 4) if bool(x.shape[0] < 4) else 3
        assert factor
        return self.second(hidden * factor)
