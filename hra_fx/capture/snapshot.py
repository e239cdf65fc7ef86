"""What running a forward under the tracer may have left behind in a module tree: found, and taken back."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_NOT_OPENED = (nn.Module, Tensor, type, types.ModuleType, types.FunctionType, types.MethodType)


class Snapshot:
    """The attributes of every module of a tree, and of the plain objects that they hold, as they were.

    Attributes hold by identity, containers (dict, list, set) by the identity of what is in them, tensors by their
    version, so rebinding, appending and writing in place are all seen. Plain tensors are kept by value as well, since a
    trace runs on them; parameters and buffers are proxies during a trace and cannot be written.
    """

    def __init__(self, root: nn.Module) -> None:
        """Take the snapshot of `root` and all modules below."""
        self._owners = list(_owners(root))
        self._attributes = [dict(vars(owner)) for _, owner in self._owners]
        self._contents = {
            id(value): (value, value.copy())
            for attributes in self._attributes
            for value in attributes.values()
            if type(value) in (dict, list, set)
        }
        self._tensors = [
            (tensor, tensor._version, tensor.detach().clone() if plain else None)
            for attributes in self._attributes
            for tensor, plain in _tensors(attributes)
            if not tensor.is_inference()
        ]

    def changes(self) -> list[str]:
        """Names of the attributes that are not what they were."""
        found = []
        for (name, owner), before in zip(self._owners, self._attributes, strict=True):
            now = vars(owner)
            for key in before.keys() | now.keys():
                value = before.get(key, _ABSENT)
                if now.get(key, _ABSENT) is not value or not self._content_is_kept(value):
                    found.append(f"{name}.{key}".lstrip("."))
        written = [tensor for tensor, version, _ in self._tensors if tensor._version != version]
        return sorted(found) + [f"a tensor of shape {tuple(tensor.shape)}" for tensor in written]

    def restore(self) -> None:
        """Put back every attribute, container and plain tensor."""
        for (_, owner), before in zip(self._owners, self._attributes, strict=True):
            namespace = vars(owner)
            if namespace.keys() != before.keys() or any(namespace[key] is not before[key] for key in before):
                namespace.clear()
                namespace.update(before)
        for container, content in self._contents.values():
            if not _same_content(container, content):
                container.clear()
                (container.extend if isinstance(container, list) else container.update)(content)
        with torch.no_grad():
            for tensor, version, value in self._tensors:
                if value is not None and tensor._version != version:
                    tensor.copy_(value)

    def _content_is_kept(self, value: Any) -> bool:
        if id(value) not in self._contents:
            return True
        return _same_content(*self._contents[id(value)])


_ABSENT = object()


def _owners(root: nn.Module) -> Iterator[tuple[str, Any]]:
    seen: set[int] = set()
    for name, module in root.named_modules():
        yield name, module
        for key, value in vars(module).items():
            opened = isinstance(getattr(value, "__dict__", None), dict) and not isinstance(value, _NOT_OPENED)
            if opened and id(value) not in seen:
                seen.add(id(value))
                yield f"{name}.{key}", value


def _tensors(attributes: dict[str, Any]) -> Iterator[tuple[Tensor, bool]]:
    for key, value in attributes.items():
        registered = key in ("_parameters", "_buffers")
        for item in value.values() if registered else (value,):
            if isinstance(item, Tensor):
                yield item, not registered


def _same_content(container: Any, content: Any) -> bool:
    if len(container) != len(content):
        return False
    if isinstance(container, dict):
        return all(key in container and container[key] is content[key] for key in content)
    if isinstance(container, list):
        return all(now is before for now, before in zip(container, content, strict=True))
    return {id(item) for item in container} == {id(item) for item in content}
