"""Trained copies of a module's own tensors, which `modules_to_save` and `bias` train. They are switched with adapters.

While an adapter with a copy is active, the copy replaces the tensor itself (`classifier.weight`), so all code reads the
copy. Tensors that are not in use are in the child `<module>.hra_saved.<adapter>`; those of the base model are in
`hra_saved.base_layer`. They are moved and saved with the model. (PEFT stores copies of whole modules in a wrapper,
which renames the keys of the base model.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

from torch import Tensor, nn

from hra_fx.compat import non_persistent_buffers, state_modules
from hra_fx.layers.sharding import device_of_values
from hra_fx.layers.target import SAVED, check_adapter_name

T = TypeVar("T")
#: The name of the base model where an adapter name is expected.
BASE = "base_layer"


class Copies(nn.Module):
    """The tensors of one module that are not in use: a child for each adapter, or `BASE`, that is not in use.

    Attributes:
        copied: adapter name -> names of the tensors that it has a copy of.
        in_use: the adapter whose copies are in use, or `BASE`.
    """

    def __init__(self) -> None:
        """Start without copies."""
        super().__init__()
        self.copied: dict[str, tuple[str, ...]] = {}
        self.in_use = BASE

    @property
    def names(self) -> set[str]:
        """Names of the tensors that at least one adapter has a copy of."""
        return {name for names in self.copied.values() for name in names}

    def make(
        self,
        owner: nn.Module,
        adapter: str,
        names: tuple[str, ...],
        memo: dict[int, nn.Parameter],
        values: Mapping[str, Tensor],
    ) -> None:
        """Create copies of tensors of `owner` for an adapter. They are not in use.

        The values come from the base model, or from `values`; a parameter in `values` becomes the copy itself. `memo`
        maps the id of an original tensor to its copy for this adapter, so that a shared tensor stays shared.
        """
        check_adapter_name(adapter, self)
        made = nn.Module()
        for name in names:
            source = self.get(owner, BASE, name)
            value = values[name].to(device_of_values(source.device), source.dtype) if name in values else source
            if not isinstance(source, nn.Parameter):
                made.register_buffer(name, value.detach().clone(), persistent=name not in non_persistent_buffers(owner))
                continue
            if value is source or not isinstance(value, nn.Parameter):
                value = nn.Parameter(value.detach().clone(), requires_grad=source.is_floating_point())
            made.register_parameter(name, memo.setdefault(id(source), value))
        self.copied[adapter] = names
        self.add_module(adapter, made)

    def _holder(self, owner: nn.Module, adapter: str, name: str) -> nn.Module:
        """The module that has a tensor of an adapter or of `BASE`: `owner`, or a child of this module."""
        is_replaced = name in self.copied.get(self.in_use, ())
        is_in_owner = not is_replaced if adapter == BASE else adapter == self.in_use
        return owner if is_in_owner else self.get_submodule(adapter)

    def get(self, owner: nn.Module, adapter: str, name: str) -> Tensor:
        """A tensor of an adapter or of `BASE`, in use or not."""
        holder = self._holder(owner, adapter, name)
        tensor = holder._parameters[name] if name in holder._parameters else holder._buffers[name]
        assert tensor is not None
        return tensor

    def set(self, owner: nn.Module, adapter: str, name: str, tensor: Tensor) -> None:
        """Replace a tensor of an adapter, in use or not."""
        setattr(self._holder(owner, adapter, name), name, tensor)

    def tensors(self, owner: nn.Module, adapter: str) -> dict[str, Tensor]:
        """All copies of an adapter, by name."""
        return {name: self.get(owner, adapter, name) for name in self.copied.get(adapter, ())}

    def set_trainable(self, owner: nn.Module, adapter: str, wanted: bool) -> None:
        """Train the copies of an adapter, or freeze them."""
        for tensor in self.tensors(owner, adapter).values():
            if isinstance(tensor, nn.Parameter):
                tensor.requires_grad_(wanted and tensor.is_floating_point())

    def wanted(self, acting: Iterable[str]) -> str:
        """Whose tensors to use while these adapters act: of the one that has copies, or of `BASE`."""
        return next((name for name in acting if name in self.copied), BASE)

    def use(self, owner: nn.Module, adapter: str) -> None:
        """Use the copies of an adapter, or the tensors of `BASE`."""
        if adapter == self.in_use:
            return
        if self.in_use != BASE:
            self._exchange(owner, BASE, self.in_use)
        if adapter != BASE:
            self._exchange(owner, adapter, BASE)
        self.in_use = adapter
        # In an order that does not depend on earlier switches, because optimizers save states by the order.
        order = [*self.copied]
        order.insert(1, BASE)
        self._modules = {name: self._modules[name] for name in order if name in self._modules}

    def _exchange(self, owner: nn.Module, waiting: str, used: str) -> None:
        """Put the tensors of `waiting` into `owner`, and those of `used`, which they replace, into a child."""
        child = self.get_submodule(waiting)
        for name in own_tensors(child):
            tensor = getattr(owner, name)
            setattr(owner, name, getattr(child, name))
            setattr(child, name, tensor)
        del self._modules[waiting]
        self.add_module(used, child)

    def entries(self, owner: nn.Module) -> dict[tuple[str, str], str]:
        """(adapter or `BASE`, name of a tensor) -> its entry in the owner's `state_dict`, which depends on its use.

        The order does not: it is that of the entries while the first adapter is in use.
        """
        (first, names), *others = self.copied.items()
        keys = [(first if name in names else BASE, name) for name in own_tensors(owner) if name in self.names]
        keys += [(adapter, name) for adapter, names in ((BASE, names), *others) for name in names]
        return {key: key[1] if self._holder(owner, *key) is owner else ".".join((SAVED, *key)) for key in keys}

    def remove(self, owner: nn.Module, adapter: str) -> None:
        """Remove an adapter's copies. If they are in use, use the tensors of the base model instead."""
        if adapter in self.copied:
            if adapter == self.in_use:
                self.use(owner, BASE)
            del self.copied[adapter], self._modules[adapter]

    def promote_to_base(self, owner: nn.Module, adapter: str) -> None:
        """Make an adapter's copies the tensors of the base model."""
        if adapter in self.copied:
            self.use(owner, adapter)
            self.set_trainable(owner, adapter, False)
            self.in_use = BASE
            del self.copied[adapter], self._modules[BASE]


def all_copies(model: nn.Module) -> dict[str, tuple[nn.Module, Copies]]:
    """Path -> (owner, copies), for every module in `model` with trained copies."""
    found: dict[str, tuple[nn.Module, Copies]] = {}
    for path, owner in state_modules(model):  # TorchDynamo cannot trace an assignment in a comprehension
        copies = get_copies(owner)
        if copies is not None:
            found[path] = owner, copies
    return found


def in_order(model: nn.Module, named: Iterable[tuple[str, T]], prefix: str = "") -> list[tuple[str, T]]:
    """Tensors of a model by name, in an order that does not depend on the copies in use.

    Optimizers and averages of weights (EMA) find tensors by their position.
    """
    items = [*named]
    ordered, places = items.copy(), {name: place for place, (name, _) in enumerate(items)}
    for path, owner in state_modules(model, remove_duplicate=False):
        if (copies := get_copies(owner)) is not None:
            own = "".join(f"{part}." for part in (prefix.rstrip("."), path) if part)
            found = [places[own + name] for name in copies.entries(owner).values() if own + name in places]
            for place, source in zip(sorted(found), found, strict=True):
                ordered[place] = items[source]
    return ordered


def copies_of(model: nn.Module, adapter: str) -> dict[tuple[str, str], Tensor]:
    """(path of a module, name of its tensor) -> the copy of an adapter, for everything that is saved in files."""
    return {
        (path, name): tensor
        for path, (owner, copies) in all_copies(model).items()
        for name, tensor in copies.tensors(owner, adapter).items()
        if name not in non_persistent_buffers(owner)
    }


def get_copies(module: nn.Module) -> Copies | None:
    """The copies of a module's own tensors, or `None`."""
    # The children of a scripted module are not in a dict.
    if SAVED not in module._modules:
        return None
    child = module._modules[SAVED]
    return child if isinstance(child, Copies) else None


def own_tensors(module: nn.Module) -> tuple[str, ...]:
    """Names of the parameters and buffers of a module, without those of its children."""
    held = (*module._parameters.items(), *module._buffers.items())
    return tuple(name for name, tensor in held if tensor is not None)
