"""Running one model of the zoo and its adapted copy from the same seeds, and comparing them with the oracle."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from layers.checking import vectors_of
from torch import Tensor, nn
from zoo.entry import Entry
from zoo.oracle import Oracle, buffers_of, kept_buffers
from zoo.outputs import LOOSEST, TIGHT, Differs, cast, check_usable, distances, flat, seed
from zoo.result import NOT_APPLICABLE

#: Relative change of the weights that has the size of the rounding error of a rotation.
_NOISE = {torch.float64: 1e-14, torch.float32: 2e-6}
#: A difference is an error if it is this many times as large as the effect of that change.
_BEYOND = 20.0
#: Rounding only has a larger effect where a model sorts or branches, and then on any of its tensors.
_JUMP = 1e-3
#: A gradient below this fraction of the largest one counts as zero.
_ZERO = {torch.float64: 1e-9, torch.float32: 1e-5}


class Runs:
    """One model and its adapted copy.

    Attributes:
        base: the plain model, in eval mode.
        model: the adapted copy; plain again after the last check.
        oracle: the plain model over the rotated weights.
        dtype: the dtype in which the models run.
    """

    base: nn.Module
    model: nn.Module
    oracle: Oracle
    dtype: torch.dtype

    def __init__(self, entry: Entry) -> None:
        self.entry = entry

    def inputs(self, batch: int = 0, size: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of a call, the same each time."""
        seed(7)
        args, kwargs = self.entry.call(self.entry.batches[batch], size)
        return cast(tuple(args), self.dtype), cast(dict(kwargs), self.dtype)

    def example(self) -> Any:
        """The same arguments as `example_inputs`: positional or keyword arguments, not both."""
        args, kwargs = self.inputs()
        if args and kwargs:
            kwargs |= dict(zip(inspect.signature(self.base.forward).parameters, args, strict=False))
        return kwargs or args

    def run(self, model: nn.Module, batch: int = 0, size: int = 0, *, grad: bool = False) -> dict[str, Tensor]:
        """The outputs of a model and, in train mode, its buffers, from the same seed; the buffers are restored."""
        args, kwargs = self.inputs(batch, size)
        with torch.set_grad_enabled(grad), kept_buffers(model):
            seed(11)
            output = flat(model(*args, **kwargs))
            return output | (dict(buffers_of(model)) if model.training else {})

    def gradients(self, model: nn.Module) -> None:
        """A backward pass from a random loss over every output that has a gradient."""
        model.zero_grad()
        generator = torch.Generator().manual_seed(3)
        loss: Any = 0
        for tensor in self.run(model, grad=True).values():
            if tensor.is_floating_point():
                weights = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype)
                if tensor.requires_grad:
                    loss = loss + (torch.where(torch.isfinite(tensor), tensor, 0) * weights).sum()
        if isinstance(loss, Tensor):
            loss.backward()

    def judge(
        self, actual: dict[str, Tensor], wanted: dict[str, Tensor], noisy: Callable[[float], dict[str, Tensor]]
    ) -> None:
        """Compare tensors with those of the oracle.

        A model that computes in float32 inside, or that has many layers, amplifies rounding errors. So if a difference
        is large, the oracle runs again with slightly changed weights, and the limit is the effect of these changes.
        """
        gaps = distances(actual, wanted)
        noise, tight = dict.fromkeys(gaps, 0.0), TIGHT[self.dtype]
        for scale in (0.0, 1.0, 0.5, 0.25):
            if scale:
                drawn = distances(noisy(scale * _NOISE[self.dtype]), wanted)
                noise = {name: max(noise[name], drawn[name]) for name in gaps}
            limits = {name: min(LOOSEST, max(tight, _BEYOND * noise[name])) for name in gaps}
            wrong = [name for name, gap in gaps.items() if gap > limits[name]]
            if not wrong:
                return
        name, largest = max(wrong, key=lambda name: gaps[name] / limits[name]), max(noise.values())
        if noise[name] > LOOSEST or (gaps[name] < LOOSEST and largest > _JUMP):
            raise Differs(f"{NOT_APPLICABLE}: rounding errors alone change a tensor by {largest:.1e}")
        raise Differs(f"{name} is off by {gaps[name]:.1e} of its largest value; rounding explains {noise[name]:.1e}")

    def agree(self, model: nn.Module, oracle: Oracle, batch: int = 0, size: int = 0) -> dict[str, Tensor]:
        """Compare the outputs of a model, and its buffers in train mode, with the oracle's; returns the oracle's."""
        wanted = self.run(oracle.plain.train(model.training), batch, size)
        check_usable({name: tensor for name, tensor in wanted.items() if name.startswith("output")})
        found = self.run(model, batch, size)  # a graph has more buffers
        actual = {name: tensor for name, tensor in found.items() if name in wanted or name.startswith("output")}
        self.judge(actual, wanted, lambda noise: self.run(oracle.noisy(noise).train(model.training), batch, size))
        return wanted

    def same(self, actual: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
        """Compare two runs of one program on the same values; kernels may still differ by memory layout."""
        self.judge(actual, wanted, lambda _: wanted)

    def agree_in_gradients(self, model: nn.Module) -> bool:
        """Compare the gradients of all vectors with the oracle's; `False` if no output has a gradient."""

        def of(plain: nn.Module) -> dict[str, Tensor]:
            self.gradients(plain.train(model.training))
            return self.oracle.gradients(plain)

        wanted = of(self.oracle.plain)
        self.gradients(model)
        # Where a layer has no effect, its gradient is rounding.
        zero = _ZERO[self.dtype] * max(float(gradient.abs().max()) for gradient in wanted.values())
        seen = {path: gradient for path, gradient in wanted.items() if float(gradient.abs().max()) > zero}
        actual = {
            path: torch.zeros_like(gradient) if (found := vectors_of(model)[path].grad) is None else found.double()
            for path, gradient in seen.items()
        }
        model.zero_grad()
        self.judge(
            actual,
            seen,
            lambda noise: {path: gradient for path, gradient in of(self.oracle.noisy(noise)).items() if path in seen},
        )
        return bool(seen)


def short(error: BaseException) -> str:
    """The class and the message of an error in one line of at most 400 characters."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) < 400 else text[:397] + "..."
