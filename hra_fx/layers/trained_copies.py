"""Trained copies of a module's own tensors, which `modules_to_save` and `bias` train. They are switched with adapters.

While an adapter with a copy is active, the copy replaces the tensor itself (`classifier.weight`), so all code reads the
copy. Tensors that are not in use are in the child `<module>.hra_saved.<adapter>`; those of the base model are in
`hra_saved.base_layer`. They are moved and saved with the model. (PEFT stores copies of whole modules in a wrapper,
which renames the keys of the base model.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from hra_fx.compat import non_persistent_buffers, state_modules
from hra_fx.layers.containers import FilledLater, check_adapter_name
from hra_fx.layers.sharding import device_of_values
from hra_fx.layers.target import SAVED

#: The name of the base model where an adapter name is expected.
BASE = "base_layer"


class Copies(FilledLater):
    """The tensors of one module that are not in use.

    Attributes:
        copied: adapter name -> names of the tensors that it has a copy of.
        in_place: tensor name -> its owner: an adapter, or `BASE`.
    """

    def __init__(self) -> None:
        """Start without copies."""
        super().__init__()
        self.copied: dict[str, tuple[str, ...]] = {}
        self.in_place: dict[str, str] = {}

    def make(
        self,
        owner: nn.Module,
        adapter: str,
        names: Iterable[str],
        memo: dict[int, nn.Parameter],
        values: Mapping[str, Tensor],
    ) -> None:
        """Create copies of tensors of `owner` for an adapter. They are not in use.

        The values come from the base model, or from `values`; a parameter in `values` becomes the copy itself. `memo`
        maps the id of an original tensor to its copy for this adapter, so that a shared tensor stays shared.
        """
        check_adapter_name(adapter, self)
        self.copied[adapter] = tuple(names)
        self.add_module(adapter, nn.Module())
        for name in self.copied[adapter]:
            self.in_place.setdefault(name, BASE)
            source = self.get(owner, BASE, name)
            value = (
                values[name].to(device_of_values(source.device), source.dtype) if name in values else source.detach()
            )
            made = value if isinstance(value, nn.Parameter) else value.clone()
            if isinstance(source, nn.Parameter):
                if not isinstance(made, nn.Parameter):
                    made = nn.Parameter(made, requires_grad=source.is_floating_point())
                made = memo.setdefault(id(source), made)
            self._put(adapter, name, made, owner)

    def get(self, owner: nn.Module, adapter: str, name: str) -> Tensor:
        """A tensor of an adapter or of `BASE`, in use or not."""
        holder = owner if self.in_place[name] == adapter else self._modules[adapter]
        assert holder is not None
        tensor = holder._parameters[name] if name in holder._parameters else holder._buffers[name]
        assert tensor is not None
        return tensor

    def set(self, owner: nn.Module, adapter: str, name: str, tensor: Tensor) -> None:
        """Replace a tensor of an adapter, in use or not."""
        setattr(owner if self.in_place[name] == adapter else self._modules[adapter], name, tensor)

    def tensors(self, owner: nn.Module, adapter: str) -> dict[str, Tensor]:
        """All copies of an adapter, by name."""
        return {name: self.get(owner, adapter, name) for name in self.copied.get(adapter, ())}

    def set_trainable(self, owner: nn.Module, adapter: str, wanted: bool) -> None:
        """Train the copies of an adapter, or freeze them."""
        for tensor in self.tensors(owner, adapter).values():
            if isinstance(tensor, nn.Parameter):
                tensor.requires_grad_(wanted and tensor.is_floating_point())

    def would_change(self, adapter: str) -> bool:
        """Whether `activate_copies` would switch any tensor."""
        return any(self._wanted(adapter, name) != present for name, present in self.in_place.items())

    def _wanted(self, adapter: str, name: str) -> str:
        return adapter if name in self.copied.get(adapter, ()) else BASE

    def activate_copies(self, owner: nn.Module, adapter: str) -> None:
        """Use the copies of `adapter`, and the base model's tensors where `adapter` does not have a copy."""
        for name, present in self.in_place.items():
            wanted = self._wanted(adapter, name)
            if wanted != present:
                tensor = self._take(wanted, name)
                self._put(present, name, getattr(owner, name), owner)
                setattr(owner, name, tensor)
                self.in_place[name] = wanted

    def remove(self, owner: nn.Module, adapter: str) -> None:
        """Remove an adapter's copies, and use the tensors of the base model instead."""
        if adapter in self.copied:
            for name in self.copied[adapter]:
                if self.in_place.get(name) == adapter:
                    setattr(owner, name, self._take(BASE, name))
                    self.in_place[name] = BASE
            self._modules.pop(adapter, None)
            del self.copied[adapter]
            self._tidy()

    def promote_to_base(self, owner: nn.Module, adapter: str) -> None:
        """Make an adapter's copies the tensors of the base model."""
        for name in self.copied.get(adapter, ()):
            tensor = self.get(owner, adapter, name)
            trained = tensor.requires_grad_(False) if isinstance(tensor, nn.Parameter) else tensor
            if self.in_place[name] == BASE:
                setattr(owner, name, trained)
                continue
            self._take(BASE, name)
            if self.in_place[name] == adapter:
                self.in_place[name] = BASE
            else:
                self._put(BASE, name, trained, owner)
        self.copied.pop(adapter, None)
        self._modules.pop(adapter, None)
        self._tidy()

    def _tidy(self) -> None:
        """Remove names without a copy, and empty holders."""
        kept = {name for names in self.copied.values() for name in names}
        self.in_place = {name: whose for name, whose in self.in_place.items() if name in kept}
        holder = self._modules.get(BASE)
        if holder is not None and not own_tensors(holder):
            del self._modules[BASE]

    def _take(self, adapter: str, name: str) -> Tensor:
        holder = self._modules[adapter]
        assert holder is not None
        held = holder._parameters if name in holder._parameters else holder._buffers
        tensor = held.pop(name)
        assert tensor is not None
        return tensor

    def _put(self, adapter: str, name: str, tensor: Tensor, owner: nn.Module) -> None:
        if adapter not in self._modules:
            self.add_module(adapter, nn.Module())
        holder = self._modules[adapter]
        assert holder is not None
        if isinstance(tensor, nn.Parameter):
            holder.register_parameter(name, tensor)
        else:
            holder.register_buffer(name, tensor, persistent=name not in non_persistent_buffers(owner))


def all_copies(model: nn.Module) -> dict[str, tuple[nn.Module, Copies]]:
    """Path -> (owner, copies), for every module in `model` with trained copies."""
    found: dict[str, tuple[nn.Module, Copies]] = {}
    for path, owner in state_modules(model):  # TorchDynamo cannot trace an assignment in a comprehension
        copies = get_copies(owner)
        if copies is not None:
            found[path] = owner, copies
    return found


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
