"""What adapters do to the tensors of one set of files: each name found, each shape checked, before anything is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hra_fx.checkpoint.disk.adapter_files import AdapterFiles
from hra_fx.checkpoint.disk.architecture import Architecture
from hra_fx.checkpoint.disk.columns import Columns
from hra_fx.checkpoint.disk.edit_types import Edit, Given, Rotation
from hra_fx.checkpoint.disk.header import FLOATS, Stored, dtype_of
from hra_fx.checkpoint.disk.naming import Names
from hra_fx.checkpoint.disk.same_values import holds
from hra_fx.checkpoint.disk.ties import Untying, is_in_block, untying
from hra_fx.checkpoint.disk.weight_files import WeightSet
from hra_fx.errors import CheckpointError
from hra_fx.selection.select import is_target

_WEIGHTS = ("weight", "in_proj_weight")
_IN_MEMORY = "Fold it in memory: hra_fx.load_adapter, then hra_fx.fold"


@dataclass
class Edits:
    """What happens to a set of files.

    Attributes:
        tensors: key in the file -> what happens to it.
        added: new key -> (what it is made from, what happens to that on the way).
        untied: new keys of those that were tied to others, to the keys of these.
        configs: where in `config.json` tying goes off.
        returning: classes of configurations that say that it is on again.
    """

    tensors: dict[str, Edit] = field(default_factory=dict)
    added: dict[str, tuple[Stored | None, Edit | None]] = field(default_factory=dict)
    untied: dict[str, str] = field(default_factory=dict)
    configs: tuple[tuple[str, ...], ...] = ()
    returning: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Asked:
    """What adapters ask for: name, in the file or, where it is not there, as the adapter has it -> what."""

    chains: dict[str, list[tuple[str, Tensor]]]
    full: dict[str, Tensor]


def touches(found: WeightSet, adapters: Iterable[AdapterFiles], names: Names) -> bool:
    """Whether any layer of any adapter is in a set of files."""
    return any(_weight(names, path) for adapter in adapters for path in adapter.chains)


def edits_for(
    found: WeightSet, adapters: Sequence[AdapterFiles], architecture: Architecture, names: Names, columns: Columns
) -> Edits:
    """What adapters, in their order, do to a set of files.

    Raises:
        CheckpointError: an adapter does not fit; the key is named.
        FoldError: what is tied cannot come apart.
    """
    asked = _asked(adapters, names)
    _check_asked(found, asked)
    changed: dict[str, Tensor | None] = {**dict.fromkeys(asked.chains), **asked.full}
    tied = {
        name: value
        for name, value in changed.items()
        if name not in found.tensors or not is_in_block(name) or architecture.ties_in_blocks
    }
    apart = untying(architecture, names, tied) if tied else Untying()
    edits = Edits(untied=dict(apart.sources), configs=apart.configs, returning=apart.returning)
    for new, source in apart.sources.items():
        called = apart.changed.get(new)
        edits.added[new] = (
            found.tensors[source],
            None if called is None else _edit(called, found.tensors[source], asked, columns),
        )
    for name in changed:
        if name in found.tensors:
            edits.tensors[name] = _edit(name, found.tensors[name], asked, columns)
        elif name not in apart.changed.values() and name not in apart.one:
            edits.added[name] = (None, _new(name, found, adapters, names))
    _check_embeddings(found, adapters, names, apart)
    for adapter in adapters:
        _check_complete(found, adapter, architecture, names)
    return edits


def _asked(adapters: Iterable[AdapterFiles], names: Names) -> _Asked:
    asked = _Asked({}, {})
    for adapter in adapters:
        for path, chain in adapter.chains.items():
            name = _weight(names, path) or f"{path}.weight"
            asked.chains.setdefault(name, []).append((path, chain))
        for given, tensor in adapter.full.items():
            name = names.find(given) or given
            if name in asked.full:
                raise CheckpointError(
                    f"{adapter.file}: {given} has a trained copy in it and in an adapter before it, and only one can "
                    "be in place (modules_to_save or bias). Give one of the two."
                )
            asked.full[name] = tensor
    return asked


def _weight(names: Names, path: str) -> str | None:
    return names.find(*(f"{path}.{weight}" for weight in _WEIGHTS))


def _check_asked(found: WeightSet, asked: _Asked) -> None:
    for name in (*asked.chains, *asked.full):
        if name in asked.chains and name in asked.full:
            raise CheckpointError(
                f"{found.name}: one adapter rotates {name} and another one saves it in full (modules_to_save). Give "
                "one of the two."
            )
        also = [alias for alias, kept in found.aliases.items() if name in (alias, kept)]
        if also:
            raise CheckpointError(
                f"{found.name}: it stores {found.aliases[also[0]]} for {', '.join(also)} too, and does not say whether "
                f"they are one layer. {_IN_MEMORY}."
            )


def _edit(name: str, stored: Stored, asked: _Asked, columns: Columns) -> Edit:
    if name in asked.full:
        return _given(name, asked.full[name], stored)
    path, first = asked.chains[name][0]
    if stored.dtype not in FLOATS or len(stored.shape) < 2 or not stored.size:
        raise CheckpointError(
            f"{stored.file}: {stored.name} is {stored.dtype} of shape {stored.shape}, and weights of "
            f"{', '.join(FLOATS)} with two dimensions or more are folded. Take a base model that is not quantised."
        )
    in_columns = [columns.of(path, stored, chain.shape[0]) for path, chain in asked.chains[name]]
    chain = torch.cat([chain for _, chain in asked.chains[name]], dim=1) if len(in_columns) > 1 else first
    return Rotation(path, chain, in_columns[0])


def _given(name: str, tensor: Tensor, stored: Stored) -> Given:
    dtype = dtype_of(stored.dtype)
    if tuple(tensor.shape) != stored.shape or dtype is None or dtype.is_floating_point != tensor.is_floating_point():
        raise CheckpointError(
            f"{stored.file}: {stored.name} is {stored.dtype} of shape {stored.shape}, and the adapter's {name}, saved "
            f"in full, {tensor.dtype} of shape {tuple(tensor.shape)}. Was it trained on another base model?"
        )
    return Given(tensor.to(dtype).contiguous())


def _new(name: str, found: WeightSet, adapters: Iterable[AdapterFiles], names: Names) -> Given:
    """A tensor of a module that the base does not have, as the head of a classifier."""
    path = name.rpartition(".")[0]
    adapter = next(a for a in adapters if name in a.full or any(_names(name, p) for p in a.chains))
    if name not in adapter.full or not adapter.saves(path):
        raise CheckpointError(
            f"{adapter.file}: it changes {name}, which is not in {found.name}. {names.near(name)}. Was the adapter "
            "trained on another base model, or on one that transformers loads under other names? "
            f"{_IN_MEMORY}."
        )
    tensor = adapter.full[name]
    sizes = dict.fromkeys(FLOATS, 0)
    for stored in found.tensors.values():
        if stored.dtype in sizes:
            sizes[stored.dtype] += stored.size
    dtype = FLOATS[max(sizes, key=lambda kind: sizes[kind])]
    return Given((tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous())


def _names(name: str, path: str) -> bool:
    return name in [f"{path}.{weight}" for weight in _WEIGHTS]


def _check_embeddings(found: WeightSet, adapters: Iterable[AdapterFiles], names: Names, apart: Untying) -> None:
    """PEFT writes embeddings of the base model beside adapters of output layers: they must be these."""
    for adapter in adapters:
        for name, tensor in adapter.embeddings.items():
            key = names.find(name) or apart.sources.get(name)
            if key is None:
                raise CheckpointError(
                    f"{adapter.file}: {name} is no vector, in no module that the configuration saves, and not in "
                    f"{found.name}. {names.near(name)}. Was the adapter trained on another base model?"
                )
            if not holds(found.tensors[key], tensor):
                raise CheckpointError(
                    f"{adapter.file}: {name}, of shape {tuple(tensor.shape)}, is a tensor of the base model that it "
                    f"was trained on, and {found.tensors[key].file} has another {key}, of shape "
                    f"{found.tensors[key].shape}. Give that base model."
                )


def _check_complete(found: WeightSet, adapter: AdapterFiles, architecture: Architecture, names: Names) -> None:
    """Every layer that the configuration names has vectors, if the model has that layer at all."""
    keys = {_weight(names, path): path for path in adapter.chains}
    odd = next(((key, path) for key, path in keys.items() if key and not key.startswith(f"{path}.")), None)
    prefix = architecture.prefix if odd else ""
    stripped = bool(odd and odd[1].startswith(prefix))
    for key, stored in found.tensors.items():
        path, _, last = key.rpartition(".")
        theirs = f"{prefix}{path}" if stripped else path.removeprefix(prefix)
        if key in keys or last not in _WEIGHTS or len(stored.shape) < 2 or not is_target(adapter.config, theirs):
            continue
        if _is_loaded(architecture, path):
            raise CheckpointError(
                f"{adapter.file}: its configuration names {theirs}, and it has no vectors of it. Was the adapter "
                f"trained on another base model than {found.name}, or its configuration edited?"
            )


def _is_loaded(architecture: Architecture, path: str) -> bool:
    """Whether a model has a layer; files may have more than is loaded, such as heads that predict further tokens."""
    model = architecture.model
    if model is None:
        return True
    modules: Mapping[str, object] = dict(model.named_modules(remove_duplicate=False))
    return Names("config.json", modules.keys(), lambda: architecture.prefix).find(path) is not None
