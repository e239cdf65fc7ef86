"""Running a forward under the tracer on a copy, and finding what it did to that copy.

Parameters and buffers are shared with the copy: a trace sees them as proxies, and cannot write them. All else, however
deep, is the copy's own, so the model cannot be touched; and what differs between the two afterwards is what the forward
would have changed, which a graph would not do again.
"""

from __future__ import annotations

import collections
import copy
import pickle
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hra_fx.carrier.swap import original_class
from hra_fx.errors import CaptureError

_UNCHANGING = (type, types.FunctionType, types.BuiltinFunctionType, types.ModuleType, torch.dtype, torch.device)


def sandbox(module: nn.Module, training: bool) -> nn.Module:
    """A copy of a module tree in one mode, with the parameters and buffers of the original.

    Raises:
        CaptureError: some attribute cannot be copied.
    """
    tensors = (*module.parameters(), *module.buffers())
    try:
        twin = copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})
    except Exception as error:
        raise CaptureError(f"it cannot be copied to trace the copy ({type(error).__name__}: {error})") from error
    for part in twin.modules():
        # Directly, for a train() of the model's own may keep parts in eval mode, which the region checks at each call.
        part.training = training
    return twin


def differences(module: nn.Module, twin: nn.Module, training: bool) -> list[str]:
    """Names of what a trace changed in the copy.

    Args:
        module: the original.
        twin: the copy that was traced.
        training: the mode that the copy was put into.
    """
    pairs: collections.deque[tuple[str, Any, Any]] = collections.deque([("", module, twin)])
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
