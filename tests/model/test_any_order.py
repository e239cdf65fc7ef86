"""Adapters are added, trained, switched, scaled, merged, disabled, folded and deleted in any order.

After each step the output, the weights and the gradients are those of dense products `W Q` in float64.
"""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from adapting import randomise
from hypothesis import Phase, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from model.many import config, net, normal
from oracles import dense_power, dense_q, relative_error
from torch import Tensor

import hra_fx

LAYERS = ("first", "second")
HEAD = ("head.weight", "head.bias")
X = normal(5, 6)
KINDS: dict[str, dict[str, Any]] = {
    "even": {"r": 4},
    "odd": {"r": 3},
    "Gram-Schmidt": {"r": 2, "apply_GS": True},
    "odd Gram-Schmidt": {"r": 3, "apply_GS": True},
    "head": {"r": 2, "modules_to_save": ["head"]},
}
CONTEXTS = {"plain": nullcontext, "no_grad": torch.no_grad, "inference": torch.inference_mode}
contexts = st.sampled_from(sorted(CONTEXTS))
targets = st.sampled_from([("first",), ("second",), LAYERS])
scales = st.sampled_from([0.0, 0.4, 1.0])


@dataclass
class Adapter:
    """What the reference knows of an adapter; its vectors are read from the model by their names."""

    layers: tuple[str, ...]
    r: int
    apply_GS: bool
    head: dict[str, Tensor]
    scale: float = 1.0


class AnyOrder(RuleBasedStateMachine):
    """The model, and a reference made of plain tensors."""

    @initialize(kinds=st.permutations(sorted(KINDS)), order=st.permutations("abc"))
    def begin(self, kinds: list[str], order: list[str]) -> None:
        """A model with three active adapters of different kinds."""
        self.model: Any = net()
        self.plain = net().requires_grad_(False)
        self.adapters: dict[str, Adapter] = {}
        self.active: list[str] = []
        self.merged = False
        self.disabled = False
        self.seed = 0
        for kind in kinds[:3]:
            self.add(kind, LAYERS, "plain")
        self.do(lambda: hra_fx.set_adapter(self.model, order), "plain")
        self.active = list(order)

    # ---- the reference ----

    def q(self, layer: str, name: str) -> Tensor:
        """`Q` of one adapter at one layer at its scale."""
        adapter, tensors = self.adapters[name], self.model.state_dict(keep_vars=True)
        q = dense_q(tensors[f"{layer}.hra_u.{name}"], apply_GS=adapter.apply_GS)
        return q if adapter.scale == 1 else dense_power(q.detach(), adapter.scale)

    def weight(self, layer: str, names: list[str]) -> Tensor:
        weight: Tensor = self.plain.get_submodule(layer).weight
        for name in names:
            if layer in self.adapters[name].layers:
                weight = weight @ self.q(layer, name)
        return weight

    def heads(self, names: list[str]) -> dict[str, Tensor]:
        """The trained copy of the head that one of these adapters has."""
        return next((self.adapters[name].head for name in names if self.adapters[name].head), {})

    def wanted(self) -> Tensor:
        names = [] if self.disabled else self.active
        weights = {f"{layer}.weight": self.weight(layer, names) for layer in LAYERS}
        return torch.func.functional_call(self.plain, weights | self.heads(names), (X,))

    def conflict(self, names: list[str]) -> bool:
        """Whether two adapters have a copy of the head, of which one can be in use."""
        return sum(bool(self.adapters[name].head) for name in names) > 1

    def do(self, act: Callable[[], object], context: str, *, refused: bool = False) -> bool:
        """Do a step, or check that it is refused. Returns whether it was done."""
        with CONTEXTS[context](), warnings.catch_warnings():
            warnings.simplefilter("ignore", hra_fx.HRAWarning)
            if not refused:
                act()
                return True
            with pytest.raises((hra_fx.AdapterError, hra_fx.FoldError)):
                act()
            return False

    # ---- the steps ----

    @precondition(lambda self: len(self.adapters) < 3)
    @rule(kind=st.sampled_from(sorted(KINDS)), layers=targets, context=contexts)
    def add(self, kind: str, layers: tuple[str, ...], context: str) -> None:
        name = next(name for name in "abcd" if name not in self.adapters)
        made = config(*layers, **KINDS[kind])
        add = hra_fx.add_adapter if self.adapters else lambda model, name, made: hra_fx.transform(model, made, name)
        if not self.do(lambda: add(self.model, name, made), context, refused=self.merged):
            return
        if not self.adapters:
            self.active, self.disabled = [name], False
        self.seed += 1
        randomise(self.model, name, seed=self.seed)
        copied = dict(zip(HEAD, (self.plain.head.weight, self.plain.head.bias), strict=True)) if kind == "head" else {}
        head = {key: value.detach().clone() for key, value in copied.items()}
        self.adapters[name] = Adapter(layers, made.r, made.apply_GS, head)

    @precondition(lambda self: self.adapters)
    @rule(data=st.data(), context=contexts, inside=st.booleans())
    def switch(self, data: st.DataObject, context: str, inside: bool) -> None:
        """Also inside of a block in which the base model acts."""
        names = data.draw(st.lists(st.sampled_from(sorted(self.adapters)), unique=True))
        inside = inside and not self.merged
        disabled, refused = self.disabled, self.merged or self.conflict(names)
        with hra_fx.disable_adapters(self.model) if inside else nullcontext():
            self.disabled = disabled or inside
            if self.do(lambda: hra_fx.set_adapter(self.model, names), context, refused=refused):
                self.active, self.disabled = names, inside
            self.agrees()
        self.disabled = disabled if inside else self.disabled

    @precondition(lambda self: self.adapters)
    @rule(data=st.data(), scale=scales, context=contexts)
    def scale(self, data: st.DataObject, scale: float, context: str) -> None:
        name = data.draw(st.sampled_from(sorted(self.adapters)))
        scale = 0.0 if self.adapters[name].apply_GS and scale == 0.4 else scale  # a half turn has two paths
        refused = self.merged or (self.adapters[name].r % 2 == 1 and scale != 1)
        if self.do(lambda: hra_fx.set_scale(self.model, name, scale), context, refused=refused):
            self.adapters[name].scale = scale

    @precondition(lambda self: self.adapters and not self.disabled)
    @rule(context=contexts)
    def merge(self, context: str) -> None:
        refused = not self.active or self.merged
        self.merged = self.do(lambda: hra_fx.merge_adapter(self.model), context, refused=refused) or self.merged

    @precondition(lambda self: self.merged)
    @rule(context=contexts)
    def unmerge(self, context: str) -> None:
        self.do(lambda: hra_fx.unmerge_adapter(self.model), context)
        self.merged = False

    @precondition(lambda self: self.adapters and not self.disabled)
    @rule(context=contexts)
    def fold(self, context: str) -> None:
        """The active adapters, while the others are removed."""
        wanted = {layer: self.weight(layer, self.active).detach() for layer in LAYERS}
        head = self.heads(self.active)
        if not self.do(lambda: hra_fx.fold(self.model), context, refused=not self.active):
            return
        for layer, weight in wanted.items():
            found = self.model.get_submodule(layer)._parameters["weight"].detach()
            assert relative_error(found, weight) < 1e-8
            self.plain.get_submodule(layer).weight.detach().copy_(found)
        for key, value in head.items():
            self.plain.get_parameter(key).detach().copy_(value.detach())
        self.adapters, self.active, self.merged = {}, [], False

    @precondition(lambda self: self.adapters)
    @rule(data=st.data(), context=contexts)
    def delete(self, data: st.DataObject, context: str) -> None:
        name = data.draw(st.sampled_from(sorted(self.adapters)))
        was_alone = self.active == [name]
        if self.do(lambda: hra_fx.delete_adapter(self.model, name), context, refused=self.merged):
            self.remove(name)
            if was_alone and self.adapters:
                self.active = [next(iter(self.adapters))]

    def remove(self, name: str) -> None:
        del self.adapters[name]
        self.active = [other for other in self.active if other != name]
        if not self.adapters:
            self.disabled = False

    @precondition(lambda self: self.adapters and not self.disabled)
    @rule()
    def disable(self) -> None:
        """Until an adapter is set. Nothing is merged or folded while the base model acts."""
        if not self.do(lambda: hra_fx.disable_adapters(self.model), "plain", refused=self.merged):
            return
        self.disabled = True
        for act in (hra_fx.merge_adapter, hra_fx.fold):
            self.do(lambda act=act: act(self.model), "plain", refused=True)

    @precondition(lambda self: self.adapters and not self.merged)
    @rule()
    def block(self) -> None:
        """The base model acts in nested blocks, and an error restores what was before."""
        disabled = self.disabled
        with pytest.raises(ZeroDivisionError), hra_fx.disable_adapters(self.model):
            self.disabled = True
            with hra_fx.disable_adapters(self.model):
                self.agrees()
            self.agrees()
            raise ZeroDivisionError
        self.disabled = disabled

    @rule(pickled=st.booleans())
    def twin(self, pickled: bool) -> None:
        """From here on, the steps are done to a copy."""
        self.model = pickle.loads(pickle.dumps(self.model)) if pickled else copy.deepcopy(self.model)

    @precondition(lambda self: self.adapters)
    @rule()
    def train(self) -> None:
        """The gradients, which belong to what acts at its full scale and is not merged, and a step along them.

        A step that would train heads alone raises an error.
        """
        names = [] if self.disabled else self.active
        trained = [name for name in names if not self.merged and self.adapters[name].scale == 1]
        keys = [f"{layer}.hra_u.{name}" for name in trained for layer in self.adapters[name].layers]
        head = self.heads(names)
        for value in head.values():
            value.requires_grad_(True)
        leaves = {key: self.model.get_parameter(key) for key in keys} | head
        wanted = self.wanted().square().sum()
        gradients = torch.autograd.grad(wanted, list(leaves.values())) if leaves else ()
        self.model.zero_grad()
        if head and not keys:
            with pytest.raises(hra_fx.AdapterError, match=r"^training would not change adapters"):
                self.model(X).square().sum().backward()
            return
        if leaves:
            self.model(X).square().sum().backward()
        found = {key: value.grad for key, value in self.model.named_parameters() if value.grad is not None}
        assert found.keys() == leaves.keys()
        with torch.no_grad():
            for (key, leaf), gradient in zip(leaves.items(), gradients, strict=True):
                assert relative_error(found[key], gradient, floor=1e-6) < 1e-7, key
                for moved in {id(leaf): leaf, id(found[key]): self.model.get_parameter(key)}.values():
                    moved.data.sub_(0.1 * gradient / (1 + gradient.norm()))  # does not change its version
        self.model.zero_grad()

    @invariant()
    def agrees(self) -> None:
        wanted = self.wanted().detach()
        with torch.no_grad():
            assert relative_error(self.model(X), wanted) < 1e-8
        merged = self.active if self.merged and not self.disabled else []
        for layer in LAYERS:
            weight = self.model.get_submodule(layer)._parameters["weight"]
            base = self.plain.get_submodule(layer).weight
            assert relative_error(weight, self.weight(layer, merged)) < 1e-8 if merged else torch.equal(weight, base)
        assert any(".hra_" in f".{key}" for key in self.model.state_dict()) is bool(self.adapters)


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(
    max_examples=60, stateful_step_count=20, deadline=None, derandomize=True, phases=[Phase.generate]
)
