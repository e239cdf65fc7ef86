"""Running one model of the zoo and its adapted copy from the same seeds, and comparing them with the oracle."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from layers.checking import vectors_of
from torch import Tensor, nn
from zoo.entry import Entry
from zoo.oracle import Oracle, buffers_of, kept_buffers
from zoo.outputs import LOOSEST, TIGHT, Differs, cast, check_usable, distances, flat, seed
from zoo.result import Result

import hra_fx

#: Relative change of the weights that has the size of the rounding error of a rotation.
_NOISE = {torch.float64: 1e-14, torch.float32: 2e-6}
#: A difference is an error if it is this many times as large as the effect of that change.
_BEYOND = 20.0


class Runs:
    """One model and its adapted copy.

    Attributes:
        result: the results so far.
        base: the plain model, in eval mode.
        model: the adapted copy; plain again after the last check.
        oracle: the plain model over the rotated weights.
        config: the configuration of the adapter.
        dtype: the dtype in which the models run.
    """

    base: nn.Module
    model: nn.Module
    oracle: Oracle
    config: hra_fx.HRAConfig
    dtype: torch.dtype

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.result = Result(entry.name)

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
        """The outputs of a model, from the same seed each time; its buffers are restored afterwards."""
        args, kwargs = self.inputs(batch, size)
        context: AbstractContextManager[Any] = nullcontext() if grad else torch.no_grad()
        with context, kept_buffers(model):
            seed(11)
            output = flat(model(*args, **kwargs))
            self._buffers = buffers_of(model) if model.training else {}
        return output

    def judge(
        self, actual: dict[str, Tensor], wanted: dict[str, Tensor], noisy: Callable[[], dict[str, Tensor]]
    ) -> None:
        """Compare tensors with those of the oracle.

        A model that computes in float32 inside, or that has many layers, amplifies rounding errors. So if a difference
        is above the tight limit, the oracle runs once more with slightly changed weights, and the limit is the effect
        of that change.

        Args:
            actual: the tensors of the model, by name.
            wanted: the tensors of the oracle.
            noisy: computes the tensors of the oracle with slightly changed weights.

        Raises:
            Differs: a difference is larger than rounding explains.
        """
        gaps = distances(actual, wanted)
        tight = TIGHT[self.dtype]
        if max(gaps.values(), default=0.0) <= tight:
            return
        noise = distances(noisy(), wanted)
        for name, gap in gaps.items():
            limit = min(LOOSEST, max(tight, _BEYOND * noise[name]))
            if gap > limit:
                raise Differs(f"{name} is off by {gap:.1e} of its largest value; rounding explains {noise[name]:.1e}")

    def agree(self, model: nn.Module, oracle: Oracle, batch: int = 0, size: int = 0) -> dict[str, Tensor]:
        """Compare the outputs of a model, and its buffers in train mode, with the oracle's; returns the oracle's."""
        oracle.plain.train(model.training)
        wanted = self.run(oracle.plain, batch, size)
        wanted_buffers = self._buffers
        check_usable(wanted)

        def noisy() -> dict[str, Tensor]:
            return self.run(self.noisy().train(model.training), batch, size)

        self.judge(self.run(model, batch, size), wanted, noisy)
        if model.training:
            actual = {name: self._buffers[name] for name in wanted_buffers}
            self.judge(actual, wanted_buffers, lambda: (noisy(), self._buffers)[1])
        return wanted

    def noisy(self) -> nn.Module:
        """The oracle with slightly changed weights."""
        return Oracle(self.base, self.model, _NOISE[self.dtype]).plain

    def _trains(self) -> bool:
        """Whether the base model runs in train mode; tested once."""
        if not hasattr(self, "_why_not_train"):
            self._why_not_train = "" if self.entry.trains else "train mode takes other inputs"
            if self.entry.trains:
                try:
                    self.run(copy.deepcopy(self.base).train())
                except Exception as error:
                    self._why_not_train = f"the base model fails in train mode: {short(error)}"
        return not self._why_not_train

    def _equal(self, actual: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
        """Compare two runs of one program on the same values; kernels may still differ by memory layout."""
        self.judge(actual, wanted, lambda: wanted)

    def _gradients(self, training: bool) -> tuple[dict[str, Tensor | None], dict[str, Tensor]]:
        """The gradients of the model and of the oracle; the latter are empty if no output has a gradient."""
        _backward(self.run(self.oracle.plain.train(training), grad=True))
        wanted = self.oracle.gradients()
        self.model.zero_grad()
        went = _backward(self.run(self.model.train(training), grad=True))
        actual = {path: vectors.grad for path, vectors in vectors_of(self.model).items()}
        self.model.zero_grad()
        self.model.eval()
        if not went and not any(bool(gradient.any()) for gradient in wanted.values()):
            return actual, {}
        return actual, wanted

    def vector_gradients(self, model: nn.Module) -> dict[str, Tensor]:
        """The gradients of the vectors of a model for a random loss."""
        model.zero_grad()
        _backward(self.run(model, grad=True))
        found = {path: vectors.grad for path, vectors in vectors_of(model).items() if vectors.grad is not None}
        model.zero_grad()
        return found

    def _judge_gradients(self, training: bool, actual: dict[str, Tensor | None], wanted: dict[str, Tensor]) -> None:
        if self.result.inert:
            raise Differs(f"none, while that of the weights is not zero: {', '.join(self.result.inert[:4])}")

        def pick(gradients: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
            found = {path: gradients[path] for path in wanted}
            return {path: torch.zeros_like(wanted[path]) if g is None else g.double() for path, g in found.items()}

        self.judge(pick(actual), wanted, lambda: pick(self.noisy_gradients(training)))

    def noisy_gradients(self, training: bool) -> dict[str, Tensor]:
        """The gradients of the vectors of the oracle with slightly changed weights."""
        other = Oracle(self.base, self.model, _NOISE[self.dtype])
        _backward(self.run(other.plain.train(training), grad=True))
        return other.gradients()


def _backward(output: dict[str, Tensor]) -> bool:
    """A backward pass from a random loss over every output that has a gradient."""
    generator = torch.Generator().manual_seed(3)
    loss: Any = 0
    for tensor in output.values():
        if tensor.is_floating_point():
            weights = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype)
            if tensor.requires_grad:
                loss = loss + (torch.where(torch.isfinite(tensor), tensor, 0) * weights).sum()
    if isinstance(loss, Tensor):
        loss.backward()
        return True
    return False


def short(error: BaseException) -> str:
    """The class and the message of an error in one line of at most 400 characters."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) < 400 else text[:397] + "..."
