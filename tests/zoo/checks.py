"""Everything that is held against one model of the zoo."""

from __future__ import annotations

import copy
import inspect
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, fx, nn
from zoo.entry import Entry
from zoo.oracle import Oracle, buffers_of, kept_buffers, randomise, stir, vectors_of
from zoo.outputs import LOOSEST, TIGHT, Differs, cast, check_usable, distances, flat, seed
from zoo.refusing import candidates, transform_most
from zoo.result import BY_EXAMPLE, CHECKS, NOT_APPLICABLE, OK, REFUSED, YES, Result

import hra_fx

#: Relative change of the weights that stands for the rounding of a rotation, and how far beyond its effect may be gone.
_NOISE = {torch.float64: 1e-14, torch.float32: 2e-6}
_BEYOND = 20.0
#: A gradient below this part of the largest one is nothing.
_NOTHING = {torch.float64: 1e-9, torch.float32: 1e-5}


class NotApplicable(Exception):
    """A check that a model has no use for; the message says why."""


def check(entry: Entry, *, by_example: bool = False) -> Result:
    """Make every check on one model, also after one has failed; `by_example`: see `Trial.check_trace`."""
    begin = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trial = Trial(entry, by_example=by_example)
        for name in CHECKS:
            trial.make(name)
            if trial.over:
                break
    trial.result.seconds = time.perf_counter() - begin
    return trial.result


class Trial:
    """One model, its adapted copy, and what is known of them so far.

    Attributes:
        result: what was found.
        base: the plain model, in eval mode.
        model: the adapted copy; plain again after the last check.
        over: whether there is nothing left to check.
    """

    def __init__(self, entry: Entry, *, by_example: bool = False) -> None:
        self.entry = entry
        self.by_example = by_example
        self.result = Result(entry.name)
        self.over = False
        self.base: nn.Module
        self.model: nn.Module
        self.oracle: Oracle
        self.config: hra_fx.HRAConfig

    def make(self, name: str) -> None:
        """Make one check, and note what it gives."""
        text = OK
        try:
            getattr(self, f"check_{name}")()
        except NotApplicable as reason:
            text = NOT_APPLICABLE
            if str(reason):
                self.result.notes.append(f"{name}: {reason}")
        except Differs as error:
            text = str(error)
        except Exception as error:
            text = _short(error)
            self.over = self.over or name == "transform"
        self.result.checks[name] = text

    # ---- running ----

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
        """What a model gives, from the same seed each time; its buffers are as before afterwards."""
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
        """Hold tensors against those of the oracle; `noisy` makes the latter with the weights a little off.

        A model that computes in float32 within, or piles up many layers, makes more of a rounding than another. Where
        the tight limit is passed it is asked how much.

        Raises:
            Differs: beyond what rounding does.
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
        """Hold a model's outputs, and its buffers in train mode, against the oracle's; returns the oracle's."""
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
        """The oracle with its turned weights a little off."""
        return Oracle(self.base, self.model, _NOISE[self.dtype]).plain

    def _first(self, model: nn.Module) -> None:
        """The first forward, in which the library looks for weights that are read unseen."""
        if self.entry.trains or not model.training:
            self.run(model)

    # ---- checks, in order ----

    def check_transform(self) -> None:
        """Adapt every layer, or have it refused by name."""
        self._prepare()
        self.model = copy.deepcopy(self.base)
        wanted = candidates(self.model)
        config, self.result.refused, first = transform_most(self.model, self._first)
        if config is None:
            self.over = True
            raise NotApplicable("every layer is refused" if wanted else "there is no layer to adapt")
        self.config = config
        self._time(first)
        rows = hra_fx.report(self.model).rows
        self.result.matched = len(rows)
        missed = wanted.keys() - {row.path for row in rows} - self.result.refused.keys()
        if missed:
            raise Differs(f"neither adapted nor refused: {', '.join(sorted(missed)[:4])}")

    def _prepare(self) -> None:
        """The base model, in float64 where it runs in that."""
        seed(0)
        base = self.entry.build().eval()
        stir(base, candidates(base))
        for dtype in (torch.float64, torch.float32) if self.entry.double else (torch.float32,):
            self.dtype = dtype
            self.base = copy.deepcopy(base).to(dtype) if dtype is torch.float64 else base
            try:
                check_usable(self.run(self.base))
                if all(p.dtype is dtype for p in self.base.parameters() if p.is_floating_point()):
                    break  # else a part of it casts itself to float32, and says nothing about float64
            except Exception:
                if dtype is torch.float32:
                    raise
        self.result.dtype = str(self.dtype).removeprefix("torch.")

    def _time(self, first: float) -> None:
        """Seconds of `transform` and of `symbolic_trace`, the better of two each."""
        self._fresh = copy.deepcopy(self.base)
        copying = time.perf_counter()
        hra_fx.transform(self._fresh, self.config)
        self.result.first_s = first
        self.result.transform_s = min(first, time.perf_counter() - copying)
        traces = []
        for _ in range(2):
            plain = copy.deepcopy(self.base)
            begin = time.perf_counter()
            try:
                fx.symbolic_trace(plain)
            except Exception:
                return
            traces.append(time.perf_counter() - begin)
        self.result.trace_s = min(traces)

    def check_start(self) -> None:
        """Fresh reflections change nothing, in either mode."""
        start = Oracle(self.base, self.model)
        start.plain = copy.deepcopy(self.base)
        for training in (False, True) if self._trains() else (False,):
            self.agree(self.model.train(training), start)
        self.model.eval()

    def check_eval(self) -> None:
        """Random reflections are the rotated weights, and are seen in the output."""
        randomise(self.model)
        self.oracle = Oracle(self.base, self.model)
        self._wanted = self.agree(self.model.eval(), self.oracle)
        plain = self.run(self.base)
        if all(torch.equal(plain[name], wanted) for name, wanted in self._wanted.items() if name in plain):
            raise Differs("random reflections change no output, which shows nothing")

    def check_train(self) -> None:
        """The same in train mode: dropout draws what it draws in the base model, and buffers move alike."""
        if not self._trains():
            raise NotApplicable(self._why_not_train)
        self._wanted_train = self.agree(self.model.train(), self.oracle)
        self.model.eval()

    def check_gradients(self) -> None:
        """`d loss / d U` of every adapter, in both modes, for a random loss."""
        reached = set[str]()
        for training in (False, True) if self._trains() else (False,):
            actual, wanted = self._gradients(training)
            if not wanted:
                raise NotApplicable("no output has a gradient")
            nothing = _NOTHING[self.dtype] * max(float(gradient.abs().max()) for gradient in wanted.values())
            seen = {path: g for path, g in wanted.items() if float(g.abs().max()) > nothing}
            reached |= seen.keys()
            inert = {path for path in seen if actual[path] is None or not bool(actual[path].any())}
            self.result.inert = sorted(inert.union(self.result.inert))
            self._judge_gradients(training, actual, seen)
        self.result.untouched = sorted(self.oracle.vectors.keys() - reached)

    def check_batch(self) -> None:
        """Another batch size."""
        if self.entry.batches[0] == self.entry.batches[1]:
            raise NotApplicable("the batch size is fixed")
        self.agree(self.model.eval(), self.oracle, batch=1)

    def check_size(self) -> None:
        """Another image size or length."""
        if self.entry.sizes < 2:
            raise NotApplicable
        self.agree(self.model.eval(), self.oracle, size=1)

    def check_deepcopy(self) -> None:
        """A deep copy gives the same in both modes, and is a model of its own."""
        twin = copy.deepcopy(self.model.eval())
        wanted = self.run(self.model)
        self._equal(self.run(twin), wanted)
        if self._trains():
            self._equal(self.run(twin.train()), self.run(self.model.train()))
            self.model.eval()
        randomise(twin.eval(), 2)
        self._equal(self.run(self.model), wanted)
        self.agree(twin, Oracle(self.base, twin))

    def check_state_dict(self) -> None:
        """The state loads into a model that was just transformed, which is then the same."""
        state, plain = self.model.state_dict(), self.base.state_dict()
        own = {name for name in state if ".hra_u." not in name}
        if own != plain.keys():
            raise Differs(f"keys of the base model: {sorted(own ^ plain.keys())[:3]} are not in both")
        self._fresh.load_state_dict(state)
        self._equal(self.run(self._fresh.eval()), self.run(self.model.eval()))
        del self._fresh

    def check_trace(self) -> None:
        """The GraphModule of `trace=True` gives what the adapted model does, in both modes, or is refused.

        With `by_example`, a model that torch.fx refuses is captured from an example call, in eval mode.
        """
        try:
            traced = hra_fx.transform(copy.deepcopy(self.base), self.config, trace=True)
            self.result.traced = YES
        except hra_fx.AdapterError as error:
            self.result.traced = f"{REFUSED}{error}"
            if not self.by_example:
                raise NotApplicable from error
            traced = self._captured()
        vectors = {name: value for name, value in self.model.state_dict().items() if ".hra_u." in name}
        traced.load_state_dict(vectors, strict=False)  # a captured call has no layers that it did not run
        if self.result.traced == YES and (odd := self.model.state_dict().keys() ^ traced.state_dict().keys()):
            raise Differs(f"keys of the model and of the traced one: {sorted(odd)[:3]} are not in both")
        if self.result.traced == YES:
            for training in (False, True) if self._trains() else (False,):
                self.agree(traced.train(training), self.oracle)
        else:
            self._equal(self.run(traced), self.run(self.model.eval()))

    def _captured(self) -> nn.Module:
        try:
            made = hra_fx.transform(copy.deepcopy(self.base), self.config, trace=True, example_inputs=self.example())
        except hra_fx.HRAError as error:
            raise NotApplicable from error
        self.result.traced = BY_EXAMPLE
        return made

    def check_fold(self) -> None:
        """Folded it is the base model again, key for key and class for class, over the rotated weights."""
        before = self.run(self.model.eval())
        try:
            hra_fx.fold(self.model)
        except hra_fx.FoldError as error:
            self._equal(self.run(self.model), before)
            raise Refused(str(error)) from error
        folded, base = dict(self.model.named_modules()), dict(self.base.named_modules())
        for path, module in base.items():
            if type(folded.get(path)) is not type(module):
                raise Differs(f"{path or 'the model'}: folded it is a {type(folded.get(path))}")
        if folded.keys() != base.keys() or list(self.model.state_dict()) != list(self.base.state_dict()):
            raise Differs("folded it has other modules or keys than the base model")
        flags = {name: p.requires_grad for name, p in self.base.named_parameters()}
        if any(p.requires_grad != flags.get(name, p.requires_grad) for name, p in self.model.named_parameters()):
            raise Differs("folded it has other requires_grad flags than the base model")
        self.agree(self.model, self.oracle)

    # ---- their parts ----

    def _trains(self) -> bool:
        """Whether the base model runs in train mode; found out once."""
        if not hasattr(self, "_why_not_train"):
            self._why_not_train = "" if self.entry.trains else "train mode takes other inputs"
            if self.entry.trains:
                try:
                    self.run(copy.deepcopy(self.base).train())
                except Exception as error:
                    self._why_not_train = f"the base model fails in train mode: {_short(error)}"
        return not self._why_not_train

    def _equal(self, actual: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
        """Two runs of one program over the same values; kernels may still differ by memory layout."""
        self.judge(actual, wanted, lambda: wanted)

    def _gradients(self, training: bool) -> tuple[dict[str, Tensor | None], dict[str, Tensor]]:
        """Those of the model, and those of the oracle; the latter empty where no output has any."""
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

    def _judge_gradients(self, training: bool, actual: dict[str, Tensor | None], wanted: dict[str, Tensor]) -> None:
        if self.result.inert:
            raise Differs(f"none, while that of the weights is not zero: {', '.join(self.result.inert[:4])}")

        def pick(gradients: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
            found = {path: gradients[path] for path in wanted}
            return {path: torch.zeros_like(wanted[path]) if g is None else g.double() for path, g in found.items()}

        def noisy() -> dict[str, Tensor]:
            other = Oracle(self.base, self.model, _NOISE[self.dtype])
            _backward(self.run(other.plain.train(training), grad=True))
            return pick(other.gradients())

        self.judge(pick(actual), wanted, noisy)


class Refused(Differs):
    """A refusal of the library."""

    def __init__(self, message: str) -> None:
        super().__init__(REFUSED + message)


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


def _short(error: BaseException) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) < 400 else text[:397] + "..."
