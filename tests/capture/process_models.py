"""Models whose forward sets or asks the state of the process: contexts, grad mode, autocast, random generators."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from capture.models import Two
from torch import Tensor, is_grad_enabled
from torch.utils.checkpoint import checkpoint


class Autocast(Two):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).float()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = torch.mm(hidden, hidden.t()) @ hidden
        return self.second(hidden.double())


class AutocastOff(Two):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        with torch.amp.autocast("cpu", enabled=False):
            hidden = hidden * 2
        return self.second(hidden)


class AutocastDecorated(Two):
    @torch.autocast("cpu", dtype=torch.bfloat16)
    def middle(self, hidden: Tensor) -> Tensor:
        return torch.mm(hidden, hidden.t()) @ hidden

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.middle(self.first(x).float()).double())


class NoGrad(Two):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            hidden = self.first(x)
        return self.second(hidden)


class NoGradDecorated(Two):
    @torch.no_grad()
    def start(self, x: Tensor) -> Tensor:
        return self.first(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.start(x))


class EnableGrad(Two):
    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            return self.second(torch.tanh(self.first(x)))


class EnableGradDecorated(Two):
    @torch.enable_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class SetGrad(Two):
    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(False):
            hidden = self.first(x)
        return self.second(hidden)


class SetGradCall(Two):
    def forward(self, x: Tensor) -> Tensor:
        before = torch.is_grad_enabled()
        torch.set_grad_enabled(False)
        hidden = self.first(x)
        torch.set_grad_enabled(before)
        return self.second(hidden)


class SetGradDecorated(Two):
    @torch.set_grad_enabled(False)
    def start(self, x: Tensor) -> Tensor:
        return self.first(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.start(x))


class Inference(Two):
    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            hidden = self.first(x)
        return self.second(hidden.clone())


class InferenceDecorated(Two):
    @torch.inference_mode()
    def start(self, x: Tensor) -> Tensor:
        return self.first(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.start(x).clone())


class Straight(torch.autograd.Function):
    """Rounds, and lets three times the gradient through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 3


straight = Straight.apply


class CustomFunction(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(Straight.apply(self.first(x)))


class CustomFunctionBoundBefore(Two):
    """`apply` taken off the class when the module is imported, as most code does."""

    def forward(self, x: Tensor) -> Tensor:
        return self.second(straight(self.first(x)))


class Checkpoint(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(checkpoint(self.middle, self.first(x), use_reentrant=False))

    def middle(self, hidden: Tensor) -> Tensor:
        return torch.tanh(F.dropout(hidden, 0.3, self.training))


class ReentrantCheckpoint(Checkpoint):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.utils.checkpoint.checkpoint(self.middle, self.first(x), use_reentrant=True))


class AsksGrad(Two):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.second(hidden * 2 if torch.is_grad_enabled() else hidden)


class AsksGradByName(Two):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.second(hidden * 2 if is_grad_enabled() else hidden)


class AsksInference(Two):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.second(hidden * 2 if torch.is_inference_mode_enabled() else hidden)


class AsksAutocast(Two):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.second((hidden * 2 if torch.is_autocast_enabled("cpu") else hidden).to(x.dtype))


class PythonDice(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x) * random.random())


class NumpyDice(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x) * float(np.random.rand()))


class TorchDice(Two):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x) * torch.rand(8, dtype=torch.float64))


class UnusedDice(Two):
    """The number is not used, the state of the generator is what other code goes on with."""

    def forward(self, x: Tensor) -> Tensor:
        random.random()
        return self.second(self.first(x))


class Reseeds(Two):
    def forward(self, x: Tensor) -> Tensor:
        torch.manual_seed(5)
        return self.second(F.dropout(self.first(x), 0.5, True))


class ForksRng(Two):
    """Leaves the generator as it found it: only what is drawn in between tells."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        with torch.random.fork_rng():
            torch.manual_seed(3)
            hidden = F.dropout(hidden, 0.5, True)
        return self.second(hidden)


class PutsRngBack(Two):
    """The same by hand."""

    def forward(self, x: Tensor) -> Tensor:
        hidden, state = self.first(x), torch.get_rng_state()
        torch.manual_seed(3)
        hidden = F.dropout(hidden, 0.5, True)
        torch.set_rng_state(state)
        return self.second(hidden)
