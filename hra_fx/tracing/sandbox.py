"""Running a forward under the tracer on a copy, and finding what it did to that copy.

Parameters and buffers are shared with the copy: a trace sees them as proxies, and cannot write them. All else, however
deep, is the copy's own, so the model cannot be touched; and what differs between the two afterwards is what the forward
would have changed, which a graph would not do again.

One copy serves all traces of a module. While it is made, every container that is copied is taken down with what it
holds. As long as each still holds the very objects that it held, the copy equals the original, for those objects were
either equal by construction or are compared anew each time; only where one does not are the two compared in full.
"""

from __future__ import annotations

import collections
import copy
import copyreg
import functools
import itertools
import operator
import pickle
import types
from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from hra_fx.errors import CaptureError
from hra_fx.layers.class_swap import original_class
from hra_fx.tracing.attribute_log import OF_TORCH, ReadingLog

_UNCHANGING = (type, types.FunctionType, types.BuiltinFunctionType, types.ModuleType, torch.dtype, torch.device)
#: Types whose values are never copied, and cannot change.
_ATOMS = frozenset({*_UNCHANGING, bool, int, float, complex, str, bytes, type(None), type(...), type(NotImplemented)})
#: `__setstate__` of torch that does nothing to a module that is complete.
_SETTERS = frozenset(
    kind.__setstate__ for kind in (nn.Module, nn.modules.conv._ConvNd, nn.Upsample, nn.MultiheadAttention)
)


#: A dotted name: (name of the owner, last part), or nothing; written out only where it is needed.
_Name: TypeAlias = tuple[Any, ...]


class Sandbox:
    """A copy of a module tree, with the parameters and buffers of the original, that logs what is read and written.

    Attributes:
        twin: the copy.
        parts: path -> module of the copy.
        tensors: id -> (name, tensor) of its parameters and buffers.
        log: the attributes that were read, and those that were set.
    """

    def __init__(self, module: nn.Module) -> None:
        """Copy `module`.

        Raises:
            CaptureError: some attribute cannot be copied.
        """
        self._module = module
        self.tensors = _tensors(module)
        self._copier = _Copier(tensor for _, tensor in self.tensors.values())
        self.log = ReadingLog()
        try:
            self.twin: nn.Module = self._copier.copy((), module)
            self.parts = dict(self.twin.named_modules())
            # Before the log is put on, for it would see each of them being asked for.
            self._spaces: list[dict[str, Any]] = [part.__dict__ for part in self.parts.values()]
            for part in self.parts.values():
                self.log.put_on(part)
        except Exception as error:
            raise CaptureError(f"it cannot be copied to trace the copy ({type(error).__name__}: {error})") from error
        self._modules = list(self.parts.values())
        self._kinds = [type(part) for part in self._modules]
        self._training = False

    def put_in_mode(self, training: bool) -> None:
        """Set the mode of every part of the copy."""
        self._training = training
        # Directly, for a train() of the model's own may keep parts in eval mode, which the region checks at each call.
        for space in (*self._spaces, *self._copier.of_modules):
            space["training"] = training

    def constants(self) -> dict[Any, str]:
        """Tensors, and objects of TorchScript, that are plain attributes of the copy, and the name of each."""
        return {
            space[key]: f"{path}.{key}".lstrip(".")
            for path, space in zip(self.parts, self._spaces, strict=True)
            for key in space.keys() - OF_TORCH
            if isinstance(space[key], (Tensor, torch.ScriptObject))
        }

    def differences(self) -> list[str]:
        """Names of what traces changed in the copy so far."""
        if self._holds_the_same():
            return differences([(_written(name), *pair) for name, *pair in self._copier.foreign], self._training)
        return differences([("", self._module, self.twin)], self._training)

    def _holds_the_same(self) -> bool:
        kinds = map(type, self._modules)
        return all(map(operator.is_, kinds, self._kinds)) and self._copier.holds_the_same()


def _tensors(module: nn.Module) -> dict[int, tuple[str, Tensor]]:
    """`id -> (name, tensor)` of parameters and buffers, under the name by which each is met first."""
    found: dict[int, tuple[str, Tensor]] = {}
    parts = list(module.named_modules())
    for path, space in [*((path, p._parameters) for path, p in parts), *((path, p._buffers) for path, p in parts)]:
        for name, tensor in space.items():
            if tensor is not None:
                found.setdefault(id(tensor), (f"{path}.{name}".lstrip("."), tensor))
    return found


class _Copier:
    """What `copy.deepcopy` does, several times faster for modules, and with a list of all that was copied.

    Attributes:
        foreign: (name, original, copy) of what `copy.deepcopy` itself had to copy.
        of_modules: the lists' entries for the attributes of modules.
    """

    def __init__(self, shared: Iterable[Tensor]) -> None:
        self._memo: dict[int, Any] = {id(tensor): tensor for tensor in shared}
        self._of_foreign: set[int] = set()
        self._empty: list[Any] = []
        self._held: list[tuple[Any, Any]] = []
        self.foreign: list[tuple[_Name, Any, Any]] = []
        self.of_modules: list[dict[str, Any]] = []

    def holds_the_same(self) -> bool:
        """Whether every container that was copied holds the very objects that it held then."""
        return not any(self._empty) and all(_identical(now, then) for now, then in self._held)

    def copy(self, name: _Name, value: Any) -> Any:
        """The copy of `value`, the same for the same object."""
        kind: Any = type(value)
        if kind in _ATOMS:
            return value
        made = self._memo.get(id(value))
        if made is None:
            if kind in _CONTAINERS and _is_plain(value):
                return self._copy_container(name, value)
            if issubclass(kind, nn.Module) and _copies_by_attributes(kind) and "_compiled_call_impl" not in vars(value):
                return self._copy_module(name, value)
            before = len(self._memo)
            made = copy.deepcopy(value, self._memo)
            self._of_foreign.update(itertools.islice(reversed(self._memo), len(self._memo) - before))
        if made is not value and id(value) in self._of_foreign:
            # Also where it was only a part of a foreign object, for `differences` need not reach it there.
            self.foreign.append((name, value, made))
        return made

    def _copy_module(self, name: _Name, module: nn.Module) -> nn.Module:
        made: nn.Module = object.__new__(type(module))
        self._memo[id(module)] = made
        space = vars(made)
        for key, value in vars(module).items():
            kind = type(value)
            if kind in _ATOMS:
                space[key] = value
            elif kind is collections.OrderedDict and not value and not vars(value):  # as most are: hooks, mostly
                space[key] = self._memo.get(id(value)) or self._make_empty(value)
            else:
                space[key] = self.copy((name, key), value)
        held = space.copy()
        self._held.append((space, held))
        self.of_modules.append(held)
        return made

    def _make_empty(self, value: Any) -> Any:
        made = self._memo[id(value)] = type(value)()
        self._empty.append(made)
        if type(made) is collections.OrderedDict:
            self._empty.append(vars(made))
        return made

    def _copy_container(self, name: _Name, value: Any) -> Any:
        kind = type(value)
        if kind is tuple:
            return self._copy_tuple(name, value)
        if not value:
            return self._make_empty(value)
        made = self._memo[id(value)] = kind()
        if kind is collections.OrderedDict:
            self._empty.append(vars(made))
        if kind is list:
            made.extend([self.copy((name, place), item) for place, item in enumerate(value)])
        else:
            for key, item in value.items():
                made[self.copy(name, key)] = self.copy((name, key), item)
        self._held.append((made, made.copy()))
        return made

    def _copy_tuple(self, name: _Name, value: tuple[Any, ...]) -> tuple[Any, ...]:
        if _ATOMS.issuperset(map(type, value)):
            return value
        made = tuple([self.copy((name, place), item) for place, item in enumerate(value)])
        if all(map(operator.is_, made, value)):
            return value
        # It may hold a list that holds it.
        return self._memo.setdefault(id(value), made)  # type: ignore[no-any-return]


_CONTAINERS = frozenset({dict, collections.OrderedDict, list, tuple, set})


def _is_plain(value: Any) -> bool:
    """Whether a container can be copied here: a set only if it is empty, an OrderedDict only without attributes."""
    kind = type(value)
    return not value if kind is set else kind is not collections.OrderedDict or not vars(value)


@functools.cache
def _copies_by_attributes(kind: Any) -> bool:
    """Whether `copy.deepcopy` copies modules of a class as attributes alone, with no say of the class's own."""
    own = ("__reduce_ex__", "__reduce__", "__getstate__", "__new__")
    return (
        not hasattr(kind, "__deepcopy__")
        and not hasattr(kind, "__getnewargs__")
        and not hasattr(kind, "__getnewargs_ex__")
        and kind not in copyreg.dispatch_table
        and all(getattr(kind, name, None) is getattr(nn.Module, name, None) for name in own)
        and kind.__setstate__ in _SETTERS
        and not any(vars(base).get("__slots__") for base in kind.__mro__)
    )


def _written(name: _Name) -> str:
    parts: list[str] = []
    while name:
        name, part = name
        parts.append(f"{part}")
    return ".".join(reversed(parts))


def _identical(now: Any, then: Any) -> bool:
    """Whether two containers hold the same objects, in one order."""
    if len(now) != len(then) or not all(map(operator.is_, now, then)):
        return False
    return type(now) is list or all(map(operator.is_, now.values(), then.values()))


def differences(named: Iterable[tuple[str, Any, Any]], training: bool) -> list[str]:
    """Names of what is not equal in two structures.

    Args:
        named: (name, original, copy) of the parts to begin with.
        training: the mode that the copy was put into.
    """
    pairs: collections.deque[tuple[str, Any, Any]] = collections.deque(named)
    seen: set[int] = set()
    found: list[str] = []
    while pairs:
        name, before, after = pairs.popleft()
        if name.endswith(".training") and isinstance(after, bool):
            before = training
        if before is after or id(after) in seen:
            continue
        seen.add(id(after))
        parts = _parts(before), _parts(after)
        if parts[0] is None or parts[1] is None:
            same = _same_value(before, after)
        else:
            odd = sorted(f"{key}" for key in parts[0].keys() ^ parts[1].keys())
            found.extend(f"{name}.{key}".strip(".") for key in odd)
            same = original_class(before) is original_class(after) and not odd
            same = same and (not _has_hidden_state(before) or _same_value(before, after))
            if same:
                pairs.extend((f"{name}.{key}", parts[0][key], parts[1][key]) for key in parts[0])
            same = same or bool(odd)
        if not same:
            found.append(name.strip("."))
    return found


def _parts(value: Any) -> dict[Any, Any] | None:
    """What a value is made of, by name; `None` for one that is compared as it stands."""
    if isinstance(value, (Tensor, *_UNCHANGING)):
        return None
    parts: dict[Any, Any] = {}
    if isinstance(value, dict):
        parts |= value
    elif isinstance(value, (list, tuple, collections.deque)):
        parts |= dict(enumerate(value))
    elif isinstance(value, (set, frozenset)):
        parts |= {("member", _key(item)): item for item in value}
    parts |= {f"{key}": item for key, item in _attributes(value)}
    known = isinstance(value, (dict, list, tuple, set, frozenset, collections.deque)) or hasattr(value, "__dict__")
    return parts if parts or known else None


def _has_hidden_state(value: Any) -> bool:
    """Whether a value pickles in a way of its own, so that its attributes need not be all of it (random.Random)."""
    if isinstance(value, (nn.Module, dict, list, tuple, set, frozenset, collections.deque)):
        return False
    kind: Any = type(value)
    return kind.__reduce__ is not object.__reduce__ or kind.__reduce_ex__ is not object.__reduce_ex__


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    yield from getattr(value, "__dict__", {}).items()
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for slot in (slots,) if isinstance(slots, str) else slots:
            if slot not in ("__dict__", "__weakref__") and hasattr(value, slot):
                yield slot, getattr(value, slot)


def _key(item: Any) -> Any:
    return item if isinstance(item, (str, int, float, bytes, bool, type(None))) else type(item).__qualname__


def _same_value(before: Any, after: Any) -> bool:
    if type(before) is not type(after):
        return False
    if isinstance(before, Tensor):
        return before.shape == after.shape and before.dtype == after.dtype and _equal_tensors(before, after)
    try:
        return bool(before == after) or pickle.dumps(before) == pickle.dumps(after)
    except Exception:  # neither comparable nor picklable: nothing is known of it
        return False


def _equal_tensors(before: Tensor, after: Tensor) -> bool:
    return bool(((before == after) | ((before != before) & (after != after))).all())
