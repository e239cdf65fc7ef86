"""All checks of one model of the zoo."""

from __future__ import annotations

import copy
import warnings

import torch
from adapting import randomise
from torch import nn
from zoo.entry import Entry
from zoo.oracle import Oracle, stir
from zoo.outputs import Differs, check_usable, seed
from zoo.refusing import candidates, transform_most
from zoo.result import BY_EXPORT, BY_FX, CHECKS, NOT_APPLICABLE, OK, REFUSED, Result
from zoo.runs import Runs, short

import hra_fx


class Skipped(Exception):
    """A check that does not apply to a model, or that ended in a refusal of the library; the message says why."""


def check(entry: Entry) -> Result:
    """Run all checks on one model, also after a failure; without an adapted model, the others are left out."""
    trial = Trial(entry)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in CHECKS:
            text = OK
            try:
                getattr(trial, f"check_{name}")()
            except (Skipped, Differs) as reason:
                text = str(reason)
            except Exception as error:
                text = short(error)
            trial.result.checks[name] = text
            if not hasattr(trial, "config"):
                break
    return trial.result


class Trial(Runs):
    """The checks, in the order of `CHECKS`.

    Attributes:
        result: the results so far.
        config: the configuration of the adapter.
        modes: the modes in which the model runs: eval mode, and train mode if that takes the same inputs.
    """

    config: hra_fx.HRAConfig
    modes: tuple[bool, ...] = (False, True)

    def __init__(self, entry: Entry) -> None:
        super().__init__(entry)
        self.result = Result(entry.name)

    def check_transform(self) -> None:
        """Every layer is adapted, or refused by name."""
        self._prepare()
        self.model = copy.deepcopy(self.base)
        wanted = candidates(self.model, self.entry.parameters)
        config, self.result.refused = transform_most(self.model, self.entry.parameters)
        if config is None:
            raise Skipped(f"{NOT_APPLICABLE}: {'every layer is refused' if wanted else 'no layer to adapt'}")
        self.config = config
        paths = {row.path for row in hra_fx.report(self.model).rows}
        self.result.matched = len(paths)
        missed = wanted.keys() - paths - self.result.refused.keys()
        if missed:
            raise Differs(f"neither adapted nor refused: {', '.join(sorted(missed)[:4])}")

    def _prepare(self) -> None:
        """Build the base model, in float64 if it runs in float64; find out whether it runs in train mode."""
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
        try:
            self.run(copy.deepcopy(self.base).train())
        except Exception:
            self.modes = (False,)

    def check_start(self) -> None:
        """Fresh reflections change nothing, in either mode."""
        start = Oracle(self.base, self.model)
        start.plain = copy.deepcopy(self.base)
        for training in self.modes:
            self.agree(self.model.train(training), start)

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
        if not self.modes[-1]:
            raise Skipped(f"{NOT_APPLICABLE}: the base model does not run in train mode with these inputs")
        self.agree(self.model.train(), self.oracle)

    def check_gradients(self) -> None:
        """`d loss / d U` of every adapter, in both modes, for a random loss."""
        seen = {self.agree_in_gradients(self.model.train(training)) for training in self.modes}
        if seen == {False}:
            raise Skipped(f"{NOT_APPLICABLE}: no output has a gradient")

    def check_sizes(self) -> None:
        """Another batch size, and another image size or length."""
        self.agree(self.model.eval(), self.oracle, batch=1)
        if self.entry.sizes > 1:
            self.agree(self.model, self.oracle, size=1)

    def check_deepcopy(self) -> None:
        """A deep copy has the same outputs, and shares nothing with the model."""
        twin = copy.deepcopy(self.model.eval())
        wanted = self.run(self.model)
        self.same(self.run(twin), wanted)
        randomise(twin, seed=2)
        self.same(self.run(self.model), wanted)
        self.agree(twin, Oracle(self.base, twin))

    def check_state_dict(self) -> None:
        """A newly transformed model has the same outputs after it loads the state."""
        state = self.model.state_dict()
        if odd := {name for name in state if ".hra_u." not in name} ^ self.base.state_dict().keys():
            raise Differs(f"keys of the base model: {sorted(odd)[:3]} are not in both")
        fresh = hra_fx.transform(copy.deepcopy(self.base), self.config)
        fresh.load_state_dict(state)
        self.same(self.run(fresh.eval()), self.run(self.model.eval()))

    def check_trace(self) -> None:
        """The graph of `trace=True` is the model, in both modes and for another batch, or `transform` refuses it."""
        traced = self._traced()
        traced.load_state_dict(self.model.state_dict())
        if list(self.model.state_dict()) != list(traced.state_dict()):
            raise Differs("the graph has other names than the model, or another order")
        for training in self.modes:
            self.agree(traced.train(training), self.oracle)
            try:
                self.agree(traced, self.oracle, batch=1)
            except (AssertionError, RuntimeError) as error:
                if "the graph was captured for inputs" not in str(error):
                    raise
        self.agree_in_gradients(traced.eval())

    def _traced(self) -> nn.Module:
        """A graph without example inputs if torch.fx can trace the model, else a capture of a whole call."""
        try:
            traced = hra_fx.transform(copy.deepcopy(self.base), self.config, trace=True)
            if "check_inputs" not in traced._modules:
                self.result.traced = BY_FX
                return traced
        except hra_fx.AdapterError:
            pass
        self.result.traced = BY_EXPORT
        base, example = copy.deepcopy(self.base), self.example()
        args, kwargs = self.inputs(0, 0)
        base.eval()(*args, **kwargs)  # as users do first; the first call of some models fills a buffer
        try:
            return hra_fx.transform(base, self.config, trace=True, example_inputs=example)
        except hra_fx.HRAError as error:
            self.result.traced = f"{REFUSED}{error}"
            raise Skipped(f"{NOT_APPLICABLE}: the model has no graph") from error

    def check_fold(self) -> None:
        """The folded model has the keys and classes of the base model, and the rotated weights."""
        before = self.run(self.model.eval())
        try:
            hra_fx.fold(self.model)
        except hra_fx.FoldError as error:
            self.same(self.run(self.model), before)
            raise Skipped(f"{REFUSED}{error}") from error
        folded, base = ([(path, type(part)) for path, part in m.named_modules()] for m in (self.model, self.base))
        if folded != base or list(self.model.state_dict()) != list(self.base.state_dict()):
            raise Differs("the folded model has other modules, classes or keys than the base model")
        flags = {name: p.requires_grad for name, p in self.base.named_parameters()}
        if any(p.requires_grad != flags.get(name, p.requires_grad) for name, p in self.model.named_parameters()):
            raise Differs("the folded model has other requires_grad flags than the base model")
        self.agree(self.model, self.oracle)
