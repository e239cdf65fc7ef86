"""All checks of one model of the zoo."""

from __future__ import annotations

import copy
import warnings

import torch
from adapting import randomise
from torch import Tensor, nn
from zoo.entry import Entry
from zoo.oracle import Oracle, stir
from zoo.outputs import Differs, check_usable, seed
from zoo.refusing import candidates, transform_most
from zoo.result import BY_EXPORT, BY_FX, CHECKS, NOT_APPLICABLE, OK, REFUSED, Result
from zoo.runs import Runs, short

import hra_fx

#: A gradient below this fraction of the largest one counts as zero.
_ZERO = {torch.float64: 1e-9, torch.float32: 1e-5}


class NotApplicable(Exception):
    """A check that does not apply to a model; the message says why."""


def check(entry: Entry) -> Result:
    """Run all checks on one model, also after a failure."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trial = Trial(entry)
        for name in CHECKS:
            trial.make(name)
            if trial.over:
                break
    return trial.result


class Refused(Differs):
    """A refusal of the library."""

    def __init__(self, message: str) -> None:
        super().__init__(REFUSED + message)


class Trial(Runs):
    """The checks, in the order of `CHECKS`.

    Attributes:
        over: whether no check can follow.
    """

    def __init__(self, entry: Entry) -> None:
        super().__init__(entry)
        self.over = False

    def make(self, name: str) -> None:
        """Run one check and record its result."""
        text = OK
        try:
            getattr(self, f"check_{name}")()
        except NotApplicable as reason:
            text = f"{NOT_APPLICABLE}: {reason}"
        except Differs as error:
            text = str(error)
        except Exception as error:
            text = short(error)
            self.over = self.over or name == "transform"
        self.result.checks[name] = text

    def check_transform(self) -> None:
        """Every layer is adapted, or refused by name."""
        self._prepare()
        self.model = copy.deepcopy(self.base)
        wanted = candidates(self.model, self.entry.parameters)
        config, self.result.refused, seconds = transform_most(self.model, self.entry.parameters)
        if config is None:
            self.over = True
            raise NotApplicable("every layer is refused" if wanted else "there is no layer to adapt")
        self.config = config
        self.result.transform_s = round(seconds, 3)
        rows = hra_fx.report(self.model).rows
        self.result.matched = len(rows)
        missed = wanted.keys() - {row.path for row in rows} - self.result.refused.keys()
        if missed:
            raise Differs(f"neither adapted nor refused: {', '.join(sorted(missed)[:4])}")

    def _prepare(self) -> None:
        """Build the base model, in float64 if it runs in float64."""
        seed(0)
        base = self.entry.build().eval()
        stir(base, candidates(base))
        for dtype in (torch.float64, torch.float32) if self.entry.double else (torch.float32,):
            self.dtype = dtype
            self.base = copy.deepcopy(base).to(dtype) if dtype is torch.float64 else base
            try:
                check_usable(self.run(self.base))
                if all(p.dtype is dtype for p in self.base.parameters() if p.is_floating_point()):
                    break  # otherwise a part of it converts itself to float32
            except Exception:
                if dtype is torch.float32:
                    raise
        self.result.dtype = str(self.dtype).removeprefix("torch.")

    def check_start(self) -> None:
        """Fresh reflections change nothing, in either mode."""
        start = Oracle(self.base, self.model)
        start.plain = copy.deepcopy(self.base)
        for training in (False, True) if self._trains() else (False,):
            self.agree(self.model.train(training), start)
        self.model.eval()

    def check_eval(self) -> None:
        """With random vectors the outputs are those of the rotated weights, and differ from the base model's."""
        randomise(self.model)
        self.oracle = Oracle(self.base, self.model)
        outputs = self.agree(self.model.eval(), self.oracle)
        plain = self.run(self.base)
        if all(torch.equal(plain[name], wanted) for name, wanted in outputs.items() if name in plain):
            raise Differs("random reflections change no output, so the check is empty")

    def check_train(self) -> None:
        """The same in train mode: dropout draws the same numbers, and buffers are updated alike."""
        if not self._trains():
            raise NotApplicable(self._why_not_train)
        self.agree(self.model.train(), self.oracle)
        self.model.eval()

    def check_gradients(self) -> None:
        """`d loss / d U` of every adapter, in both modes, for a random loss."""
        reached = set[str]()
        for training in (False, True) if self._trains() else (False,):
            actual, wanted = self._gradients(training)
            if not wanted:
                raise NotApplicable("no output has a gradient")
            zero = _ZERO[self.dtype] * max(float(gradient.abs().max()) for gradient in wanted.values())
            seen = {path: g for path, g in wanted.items() if float(g.abs().max()) > zero}
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
            raise NotApplicable("the size is fixed")
        self.agree(self.model.eval(), self.oracle, size=1)

    def check_deepcopy(self) -> None:
        """A deep copy has the same outputs in both modes, and shares nothing with the model."""
        twin = copy.deepcopy(self.model.eval())
        wanted = self.run(self.model)
        self._equal(self.run(twin), wanted)
        if self._trains():
            self._equal(self.run(twin.train()), self.run(self.model.train()))
            self.model.eval()
        randomise(twin.eval(), seed=2)
        self._equal(self.run(self.model), wanted)
        self.agree(twin, Oracle(self.base, twin))

    def check_state_dict(self) -> None:
        """A newly transformed model has the same outputs after it loads the state."""
        state, plain = self.model.state_dict(), self.base.state_dict()
        own = {name for name in state if ".hra_u." not in name}
        if own != plain.keys():
            raise Differs(f"keys of the base model: {sorted(own ^ plain.keys())[:3]} are not in both")
        fresh = hra_fx.transform(copy.deepcopy(self.base), self.config)
        fresh.load_state_dict(state)
        self._equal(self.run(fresh.eval()), self.run(self.model.eval()))

    def check_trace(self) -> None:
        """The graph of `trace=True` is the model, in both modes and for another batch, or `transform` refuses it."""
        plain = copy.deepcopy(self.base)
        try:
            traced = hra_fx.transform(plain, self.config, trace=True)
            self.result.traced = BY_EXPORT if "check_inputs" in traced._modules else BY_FX
        except hra_fx.AdapterError:
            self.result.traced = BY_EXPORT
        if self.result.traced == BY_EXPORT:  # the call that is made from a configuration has few arguments
            traced = self._captured()
        traced.load_state_dict(self.model.state_dict())
        if list(self.model.state_dict()) != list(traced.state_dict()):
            raise Differs("the graph has other names than the model, or another order")
        for training in (False, True) if self._trains() else (False,):
            self.agree(traced.train(training), self.oracle)
            if self.entry.batches[0] != self.entry.batches[1]:
                self._agree_in_size(traced)
        self._agree_in_gradients(traced)

    def _captured(self) -> nn.Module:
        base, example = copy.deepcopy(self.base), self.example()
        try:
            return hra_fx.transform(base, self.config, trace=True, example_inputs=example)
        except hra_fx.HRAError as error:
            self.result.traced = f"{REFUSED}{error}"
            raise NotApplicable("the model has no graph") from error

    def _agree_in_size(self, traced: nn.Module) -> None:
        """For another batch, if the graph allows it."""
        try:
            self.agree(traced, self.oracle, batch=1)
        except (AssertionError, RuntimeError) as error:
            if "the graph was captured for inputs" not in str(error):
                raise

    def _agree_in_gradients(self, traced: nn.Module) -> None:
        """The gradients of the vectors are those of the eager model."""
        made = (self.vector_gradients(model.eval()) for model in (self.model, traced))
        wanted, found = ({path: gradient.double() for path, gradient in gradients.items()} for gradients in made)
        if missing := wanted.keys() ^ found.keys():
            raise Differs(f"a gradient in one of both only: {', '.join(sorted(missing)[:4])}")
        # Where a layer has no effect, its gradient is rounding.
        zero = _ZERO[self.dtype] * max((float(gradient.abs().max()) for gradient in wanted.values()), default=0.0)
        large = [path for path, gradient in wanted.items() if float(gradient.abs().max()) > zero]

        def noisy() -> dict[str, Tensor]:
            made = self.noisy_gradients(False)
            return {path: made[path] for path in large}

        self.judge({path: found[path] for path in large}, {path: wanted[path] for path in large}, noisy)

    def check_fold(self) -> None:
        """The folded model has the keys and classes of the base model, and the rotated weights."""
        before = self.run(self.model.eval())
        try:
            hra_fx.fold(self.model)
        except hra_fx.FoldError as error:
            self._equal(self.run(self.model), before)
            raise Refused(str(error)) from error
        folded, base = dict(self.model.named_modules()), dict(self.base.named_modules())
        for path, module in base.items():
            if type(folded.get(path)) is not type(module):
                raise Differs(f"{path or 'the model'}: after the fold it is a {type(folded.get(path))}")
        if folded.keys() != base.keys() or list(self.model.state_dict()) != list(self.base.state_dict()):
            raise Differs("the folded model has other modules or keys than the base model")
        flags = {name: p.requires_grad for name, p in self.base.named_parameters()}
        if any(p.requires_grad != flags.get(name, p.requires_grad) for name, p in self.model.named_parameters()):
            raise Differs("the folded model has other requires_grad flags than the base model")
        self.agree(self.model, self.oracle)
