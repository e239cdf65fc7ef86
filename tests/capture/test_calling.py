"""How a module is called: which calls a graph may stand for, and what goes into its placeholders."""

from __future__ import annotations

import copy
import enum
import functools
import inspect
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

from hra_fx.errors import CaptureError
from hra_fx.tracing.call_signature import Calling, observed, optional_arguments, unobserved

A, B, C, D = (torch.full((2,), float(value)) for value in range(4))


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


class Number(enum.IntEnum):
    ONE = 1


def kind(forward: Callable[..., Any]) -> Any:
    """A module class with this forward."""
    return type("Kind", (nn.Module,), {"forward": forward})


def plain(self: Any, x: Tensor, y: Tensor) -> Any: ...


def optional(self: Any, x: Tensor, mask: Tensor | None = None, scale: float = 1.0, flag: bool = True) -> Any: ...


def by_keyword(self: Any, x: Tensor, *, gain: Tensor, bias: Tensor | None = None) -> Any: ...


def by_place(self: Any, x: Tensor, y: Tensor | None = None, /, z: int = 0, **others: Any) -> Any: ...


def variadic(self: Any, x: Tensor, *more: Tensor, **others: Any) -> Any: ...


def same(found: list[Tensor] | None, *wanted: Tensor) -> bool:
    """Whether these very tensors were found."""
    return found is not None and [id(tensor) for tensor in found] == [id(tensor) for tensor in wanted]


@pytest.mark.parametrize(
    ("forward", "args", "kwargs", "wanted"),
    [
        (plain, (A, B), {}, (A, B)),
        (plain, (A,), {"y": B}, (A, B)),
        (plain, (), {"y": B, "x": A}, (A, B)),
        (plain, (A,), {}, None),
        (plain, (A, B, C), {}, None),
        (plain, (A, B), {"z": C}, None),
        (plain, (A, B), {"x": A}, None),
        (plain, (A, A), {}, None),
        (plain, (A, None), {}, None),
        (plain, (A, 2.0), {}, None),
        (plain, ((A, B),), {}, None),
        (optional, (A,), {}, (A,)),
        (optional, (), {"x": A}, (A,)),
        (optional, (A, None), {}, (A,)),
        (optional, (A, None, 1.0, True), {}, (A,)),
        (optional, (A,), {"scale": 1.0, "mask": None}, (A,)),
        (optional, (A, B), {}, None),
        (optional, (A,), {"scale": 1}, None),
        (optional, (A,), {"flag": 1}, None),
        (optional, (A,), {"scale": torch.tensor(1.0)}, None),
        (by_keyword, (A,), {"gain": B}, (A, B)),
        (by_keyword, (A,), {"gain": B, "bias": None}, (A, B)),
        (by_keyword, (A, B), {}, None),
        (by_keyword, (A,), {}, None),
        (by_place, (A,), {}, (A,)),
        (by_place, (A, None), {"z": 0}, (A,)),
        (by_place, (A, B), {}, None),
        (by_place, (A,), {"y": None}, None),
        (by_place, (), {"x": A}, None),
        (variadic, (A,), {}, (A,)),
        (variadic, (A, B), {}, None),
        (variadic, (A,), {"gain": B}, None),
    ],
)
def test_a_call_that_nobody_has_seen(
    forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], wanted: tuple[Tensor, ...] | None
) -> None:
    found = unobserved(kind(forward)).tensors(args, kwargs)
    assert found is None if wanted is None else same(found, *wanted)


@pytest.mark.parametrize(
    ("value", "like", "unlike"),
    [
        (True, [True], [1, 1.0, False, None]),
        (1, [1], [True, 1.0, 2, Number.ONE]),
        (1.0, [1.0], [1, True, 1.5, 1 + 0j]),
        (0.0, [0.0], [-0.0, 0, False]),
        (0j, [0j], [-0j, 0.0]),
        (float("nan"), [float("nan")], [0.0, None]),
        (None, [None], [False, 0, ()]),
        ("silu", ["silu"], ["gelu", b"silu", A]),
        (Colour.RED, [Colour.RED], [Colour.BLUE, 1]),
        (Number.ONE, [Number.ONE], [1, True]),
        (torch.float16, [torch.float16], [torch.float32, "float16"]),
        (torch.device("cpu"), [torch.device("cpu")], [torch.device("meta"), "cpu"]),
        (torch.channels_last, [torch.channels_last], [torch.contiguous_format]),
        ((2, 3), [(2, 3)], [[2, 3], (2, 4), (2,), (2, 3, 4), torch.Size((2, 3))]),
        ([1, (True, None)], [[1, (True, None)]], [[1, (1, None)], [True, (True, None)], [1, [True, None]]]),
        ({"a": 1, "b": "c"}, [{"a": 1, "b": "c"}], [{"a": 1}, {"a": True, "b": "c"}, {"a": 1, "b": "c", "d": 0}]),
        ((), [()], [[], None]),
    ],
)
def test_a_constant_is_what_it_was_and_nothing_that_is_merely_equal(
    value: Any, like: list[Any], unlike: list[Any]
) -> None:
    calling = observed(kind(optional), (A,), {"scale": value})
    assert all(same(calling.tensors((B,), {"scale": other}), B) for other in like)
    assert not any(calling.tensors((B,), {"scale": other}) for other in unlike)


def test_what_was_given_must_be_given_again_and_what_was_not_may_have_its_default() -> None:
    calling = observed(kind(optional), (A, B), {"scale": 2.0})
    assert calling.names == ("x", "mask")
    assert same(calling.tensors((C, D, 2.0), {}), C, D)
    assert same(calling.tensors((), {"scale": 2.0, "mask": D, "x": C, "flag": True}), C, D)
    assert calling.tensors((C, D), {}) is None
    assert calling.tensors((C, None), {"scale": 2.0}) is None
    assert calling.tensors((C, D), {"scale": 2.0, "flag": False}) is None


def test_tensors_inside_of_tuples_lists_and_dictionaries_are_placeholders() -> None:
    calling = observed(kind(plain), ((A, [B, 2]), {"left-hand": C, "y": None}), {})
    assert calling.names == ("x_0", "x_1_0", "y_left_hand")
    assert all(name.isidentifier() for name in calling.names)
    assert same(calling.tensors(((B, [A, 2]), {"left-hand": D, "y": None}), {}), B, A, D)
    assert calling.tensors(((B, [A, 2]), {"y": None, "left-hand": D}), {}) is None, "the order of a dictionary"
    assert calling.tensors(((B, [A, 3]), {"left-hand": D, "y": None}), {}) is None
    assert calling.tensors(((B, [B, 2]), {"left-hand": D, "y": None}), {}) is None, "one tensor twice"
    args, kwargs = calling.arguments(iter("abc"))
    assert args == [("a", ["b", 2]), {"left-hand": "c", "y": None}] and kwargs == {}


def test_names_that_run_into_one_another_are_two_placeholders_all_the_same() -> None:
    calling = observed(kind(plain), ({"b": A, "b_": B}, (C,)), {})
    assert len(calling.names) == 3
    assert same(calling.tensors(({"b": B, "b_": C}, (D,)), {}), B, C, D)


@pytest.mark.parametrize(
    ("args", "kwargs", "reason"),
    [
        ((A, object()), {}, "it is called with y, a object, which may change from call to call"),
        ((A, {1: B}), {}, "it is called with y, a dict, which may"),
        ((A, {B, C}), {}, "it is called with y, a set, which may"),
        ((A, torch.Size((2,))), {}, "it is called with y, a Size, which may"),
        ((A, (B, slice(3))), {}, "it is called with y, a slice, which may"),
        ((1, 2), {}, "forward has no argument that every call must give"),
    ],
)
def test_what_no_graph_can_have_for_an_argument(args: tuple[Any, ...], kwargs: dict[str, Any], reason: str) -> None:
    with pytest.raises(CaptureError) as caught:
        observed(kind(plain), args, kwargs)
    assert caught.value.reason.startswith(reason)


def test_variadic_arguments_of_an_observed_call() -> None:
    with pytest.raises(CaptureError, match=r"it is called with more arguments by place than it names \(\*more\)"):
        observed(kind(variadic), (A, B), {})
    calling = observed(kind(variadic), (A,), {"gain": B, "rate": 0.5})
    assert calling.names == ("x", "gain")
    assert same(calling.tensors((C,), {"rate": 0.5, "gain": D}), C, D)
    for kwargs in ({"gain": D}, {"gain": D, "rate": 0.25}, {"gain": D, "rate": 0.5, "more": 1}):
        assert calling.tensors((C,), kwargs) is None


class Unused(nn.Module):
    def forward(self, x: Tensor, **others: Any) -> Tensor:
        return x


class Used(nn.Module):
    def forward(self, x: Tensor, **others: Any) -> Tensor:
        return x * others.get("gain", 1.0)


class UsedInside(nn.Module):
    def forward(self, x: Tensor, **others: Any) -> Tensor:
        return sum((x * value for value in others.values()), x)


class UsedByLocals(nn.Module):
    def forward(self, x: Tensor, **others: Any) -> Tensor:
        return x * len(locals())


class UsedByVars(nn.Module):
    def forward(self, x: Tensor, **others: Any) -> Tensor:
        return x * len(vars())


class HandedOn(Unused):
    def forward(self, x: Tensor, **others: Any) -> Tensor:
        return super().forward(x, **others)


class Replaced(Unused):
    """Its forward is not the one that its bases' sources show."""

    forward = Used.forward


def passed_on(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    return wrapper


class Decorated(nn.Module):
    @passed_on
    def forward(self, x: Tensor, gain: float = 1.0, **others: Any) -> Tensor:
        return x


@pytest.mark.parametrize(
    ("model", "ignores"),
    [
        (Unused, True),
        (Used, False),
        (UsedInside, False),
        (UsedByLocals, False),
        (UsedByVars, False),
        (HandedOn, False),
        (Replaced, False),
        (Decorated, False),
        (type("Sourceless", (nn.Module,), {"forward": variadic}), False),
    ],
)
def test_other_keywords_make_no_difference_where_the_source_says_so(model: Any, ignores: bool) -> None:
    found = unobserved(model).tensors((A,), {"cache": object()})
    assert same(found, A) if ignores else found is None
    if ignores:
        assert observed(model, (A,), {"cache": object()}).names == ("x",)
    else:
        with pytest.raises(CaptureError, match="it is called with cache, a object, which may change"):
            observed(model, (A,), {"cache": object()})


def test_behind_a_decorator_arguments_must_be_given_just_as_they_were() -> None:
    calling = unobserved(Decorated)
    assert same(calling.tensors((A,), {}), A)
    for args, kwargs in (((), {"x": A}), ((A, 1.0), {}), ((A,), {"gain": 1.0})):
        assert calling.tensors(args, kwargs) is None
    seen = observed(Decorated, (), {"x": A, "gain": 2.0})
    assert seen.arguments(iter("a")) == ([], {"x": "a", "gain": 2.0})
    assert same(seen.tensors((), {"gain": 2.0, "x": B}), B)
    assert seen.tensors((B,), {"gain": 2.0}) is None and seen.tensors((B, 2.0), {}) is None
    by_place = observed(Decorated, (A, 2.0), {})
    assert by_place.arguments(iter("a")) == (["a", 2.0], {})
    assert not seen.is_like(by_place) and by_place.is_like(observed(Decorated, (C, 2.0), {}))


def test_ways_are_alike_where_the_constants_and_the_places_of_tensors_are() -> None:
    first = observed(kind(optional), (A,), {"scale": float("nan")})
    assert first.is_like(observed(kind(optional), (), {"scale": float("nan"), "x": B}))
    for args, kwargs in (((A,), {}), ((A, B), {"scale": float("nan")}), ((A,), {"scale": 1.0})):
        assert not first.is_like(observed(kind(optional), args, kwargs))
    assert not observed(kind(optional), (A,), {"flag": 1}).is_like(observed(kind(optional), (A,), {"flag": True}))
    assert not observed(kind(optional), (A, "tensor"), {}).is_like(observed(kind(optional), (A, B), {}))


def with_a_default_of_its_own(self: Any, x: Tensor, act: Any = lambda x: x, rate: float = 0.5) -> Any: ...


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda calling: pickle.loads(pickle.dumps(calling))])
def test_a_copy_and_a_pickle_are_the_same_way(copied: Callable[[Calling], Calling]) -> None:
    calling = copied(observed(kind(optional), (A, (B, Colour.RED)), {"scale": torch.float16}))
    assert same(calling.tensors((C, (D, Colour.RED), torch.float16), {}), C, D)
    assert calling.tensors((C, (D, Colour.BLUE), torch.float16), {}) is None
    other = copied(unobserved(kind(with_a_default_of_its_own)))
    assert same(other.tensors((A,), {"rate": 0.5}), A)
    assert other.tensors((A,), {"act": torch.tanh}) is None


def test_optional_arguments() -> None:
    assert optional_arguments(by_place) == ["y", "z"]
    assert optional_arguments(variadic) == []


def test_a_forward_that_every_call_may_leave_empty() -> None:
    with pytest.raises(CaptureError, match="forward has no argument that every call must give"):
        unobserved(kind(lambda self, x=None: x))


P = inspect.Parameter
KINDS = (P.POSITIONAL_ONLY, P.POSITIONAL_OR_KEYWORD, P.KEYWORD_ONLY)
LEAVES = st.sampled_from([True, 1, 1.0, None, "text", Colour.RED, torch.float16, "TENSOR", "TENSOR"])


def structures(inner: Any) -> Any:
    keys = st.text("ab-", max_size=2)
    return st.tuples(inner, inner) | st.lists(inner, max_size=2) | st.dictionaries(keys, inner, max_size=2)


VALUES = st.recursive(LEAVES, structures, max_leaves=4)


def fresh(value: Any, made: list[Tensor]) -> Any:
    """The value with a tensor of its own for each "TENSOR", noted in the order of the structure."""
    if value == "TENSOR":
        made.append(torch.zeros(1))
        return made[-1]
    if isinstance(value, (tuple, list)):
        return type(value)(fresh(item, made) for item in value)
    if isinstance(value, dict):
        return {key: fresh(item, made) for key, item in value.items()}
    return value


@st.composite
def signatures_and_calls(draw: Any) -> tuple[inspect.Signature, int, dict[str, Any]]:
    """A signature, how many arguments are given by place, and the values of all that are given."""
    kinds = sorted(draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=5)))
    has_default = [draw(st.booleans()) for _ in kinds]
    places = [n for n, kind in enumerate(kinds) if kind is not P.KEYWORD_ONLY]
    for before, place in itertools.pairwise(places):
        has_default[place] |= has_default[before]
    names = [f"a{n}" for n in range(len(kinds))]
    defaults = [draw(st.sampled_from([None, 0, 1.5])) if has else P.empty for has in has_default]
    parameters = [P(n, k, default=d) for n, k, d in zip(names, kinds, defaults, strict=True)]
    signature = inspect.Signature([P("self", P.POSITIONAL_ONLY), *parameters])
    must = [n for n in places if kinds[n] is P.POSITIONAL_ONLY and not has_default[n]]
    by_place = draw(st.integers(len(must), len(places))) if places else 0
    given = {n for n in range(len(kinds)) if n < by_place or not has_default[n]}
    given |= {n for n in range(by_place, len(kinds)) if kinds[n] is not P.POSITIONAL_ONLY and draw(st.booleans())}
    return signature, by_place, {names[n]: draw(VALUES) for n in sorted(given)}


@settings(max_examples=150, deadline=None)
@given(signatures_and_calls())
def test_the_tensors_of_a_call_are_what_the_placeholders_stand_for(
    made: tuple[inspect.Signature, int, dict[str, Any]],
) -> None:
    """The forward, called with `arguments(tensors(call))`, gets what the call itself gives it."""
    signature, by_place, values = made

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any: ...

    forward.__signature__ = signature  # type: ignore[attr-defined]

    def call() -> tuple[tuple[Any, ...], dict[str, Any], list[Tensor]]:
        tensors: list[Tensor] = []
        filled = {name: fresh(value, tensors) for name, value in values.items()}
        names = list(filled)
        return tuple(filled[n] for n in names[:by_place]), {n: filled[n] for n in names[by_place:]}, tensors

    args, kwargs, tensors = call()
    if not tensors:
        with pytest.raises(CaptureError):
            observed(kind(forward), args, kwargs)
        return
    calling = observed(kind(forward), args, kwargs)
    assert len(calling.names) == len(tensors) and all(name.isidentifier() for name in calling.names)
    args, kwargs, tensors = call()
    found = calling.tensors(args, kwargs)
    assert same(found, *tensors)
    assert found is not None
    again_args, again_kwargs = calling.arguments(iter(found))
    bound, again = (signature.bind(None, *a, **k) for a, k in ((args, kwargs), (again_args, again_kwargs)))
    assert repr(bound.arguments) == repr(again.arguments)
    extra = {"unknown": torch.zeros(1)}
    assert calling.tensors(args, {**kwargs, **extra}) is None
    assert calling.tensors((*args, *[torch.zeros(1)] * 6), kwargs) is None
