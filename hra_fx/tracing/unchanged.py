"""Detect and undo changes that a forward makes to its module during a trace, which the graph does not contain."""

from __future__ import annotations

from typing import Any

from torch import nn

_CONTAINERS = (dict, list, set)
_OWN = ("_parameters", "_buffers", "_modules")


class Snapshot:
    """A copy of the attributes of a module and its submodules, for comparing and restoring them."""

    def __init__(self, root: nn.Module) -> None:
        """Save the attributes, and the items of dictionaries, lists and sets in them, one level deep."""
        self._parts = [
            (path, part, dict(vars(part)), {name: _copy(value) for name, value in vars(part).items() if _holds(value)})
            for path, part in root.named_modules()
        ]

    def changes(self) -> list[tuple[str, str]]:
        """(path of the module, name of the attribute) for each attribute that changed, except `training`."""
        found = []
        for path, part, attributes, contents in self._parts:
            now = vars(part)
            names = [name for name in {**attributes, **now} if name != "training"]
            found += [
                (path, name)
                for name in names
                if attributes.get(name, _ABSENT) is not now.get(name, _ABSENT)
                or (name in contents and not _same(contents[name], now[name]))
            ]
        return found

    def is_plain(self, path: str, name: str) -> bool:
        """Whether an attribute is a number or a string now."""
        part = next(part for where, part, *_ in self._parts if where == path)
        return isinstance(vars(part).get(name), (bool, int, float, str))

    def restore(self) -> None:
        """Restore all attributes."""
        for _, part, attributes, contents in self._parts:
            for name, value in contents.items():
                if not _same(value, attributes[name]):
                    _refill(attributes[name], value)
            vars(part).clear()
            vars(part).update(attributes)


_ABSENT = object()


def _holds(value: Any) -> bool:
    return isinstance(value, _CONTAINERS)


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return dict(value)
    return set(value) if isinstance(value, set) else list(value)


def _same(before: Any, now: Any) -> bool:
    if len(before) != len(now):
        return False
    if isinstance(before, dict):
        return all(key in now and now[key] is value for key, value in before.items())
    if isinstance(before, set):
        return bool(before == now)
    return all(a is b for a, b in zip(before, now, strict=True))


def _refill(container: Any, contents: Any) -> None:
    container.clear()
    if isinstance(container, list):
        container.extend(contents)
    else:
        container.update(contents)
