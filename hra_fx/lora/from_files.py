"""Convert adapters in files to one LoRA, with the weights of their base model. The model is never loaded."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hra_fx.checkpoint.adapter import Adapter, read_adapter
from hra_fx.checkpoint.disk.architecture import CONFIG, IN_MEMORY, PIPELINE, Architecture, Source, base_folder
from hra_fx.checkpoint.disk.file_names import FileNames
from hra_fx.checkpoint.disk.plan import rotation_of
from hra_fx.checkpoint.disk.requests import (
    LayerChain,
    Renaming,
    check_base,
    check_complete,
    check_embeddings,
    check_given,
    is_new,
    renaming_of,
    requests_of,
    touches,
    unknown_tensor,
)
from hra_fx.checkpoint.disk.stored import FLOATS, SAFE, Rotation, StoredTensor, product_dtype, project, weight_sets
from hra_fx.checkpoint.disk.writing import progress_bar
from hra_fx.checkpoint.folder import PREFIX, copy_key
from hra_fx.errors import CheckpointError
from hra_fx.layers.experts_weight import parameter_of
from hra_fx.layers.target import LayerKind, describe
from hra_fx.lora.adapter import (
    AdaptedWeight,
    LoraAdapter,
    LoraLayer,
    Matrix,
    check_names,
    check_rank,
    from_configs,
    has_experts,
    renamings_of,
)
from hra_fx.lora.unsupported import OUTPUT_PROJECTION, OWN_FORWARD, check_reads, unsupported, why_not_convolution

_THREADS = min(4, os.cpu_count() or 1)
#: Names of the files that transformers, timm and diffusers load.
_LOADED = ("model", "diffusion_pytorch_model")
#: Number of dimensions of a weight -> kind of layer.
_KINDS: Mapping[int, LayerKind] = {2: "linear", 3: "conv1d", 4: "conv2d", 5: "conv3d"}
_PLAIN = (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)


def read_as_lora(
    adapters: Sequence[Source],
    base: Source,
    *,
    rank: int | None = None,
    columns: Collection[str] | None = None,
    progress: bool = True,
) -> LoraAdapter:
    """Convert adapters on disk, applied in order, to their LoRA form.

    Only the weights of adapted layers are read, in blocks. Products with 16-bit weights are computed in float32, others
    in float64. A model is only built (without weights) to find out about convolutions, experts, tied output layers,
    weights stored as `(in, out)` and weights that other modules may read. Unlike `hra_fx.convert_to_lora`, this does
    not check the classes of linear layers. For `columns`, see `hra_fx.fold_checkpoint`.
    """
    check_rank(rank)
    if not adapters:
        raise CheckpointError("adapters must name at least one adapter. Pass one or more folders, in order.")
    files = [read_adapter(source) for source in adapters]
    opened = _open_base(base, files)
    check_base(files, opened.names, base)
    chains, full = requests_of(files, opened.names)
    weights = _weights_of(opened, chains, files, columns)
    _check_layers(opened, {weight.path: weight.kind for weight in weights})
    copies = _copies_of(opened, full, files, {weight.path for weight in weights})
    check_embeddings(files, opened.names)
    for file in files:
        check_complete(file, opened.names)
    configs = [file.config for file in files]
    paths = [*opened.modules(), *(path for weight in weights for path in (weight.path, *_parents(weight.path)))]
    return from_configs(
        configs,
        layers=_converted(weights, rank, progress=progress),
        copies=copies,
        modules=tuple(dict.fromkeys(paths)),
        auto_mapping=next((config.auto_mapping for config in configs if config.auto_mapping), None),
        base_model=next((str(name) for config in configs if (name := config.base_model_name_or_path)), os.fspath(base)),
        model_config=opened.names.architecture.entries,
    )


def _converted(weights: Sequence[AdaptedWeight], rank: int | None, *, progress: bool) -> tuple[LoraLayer, ...]:
    """Convert several weights at a time, because reading and multiplying use different parts of the machine."""
    total, layers = sum(weight.size for weight in weights), []
    with (
        progress_bar("reading weights", total, wanted=progress) as advance,
        ThreadPoolExecutor(_THREADS, "hra_fx-lora") as pool,
    ):
        for weight, layer in zip(weights, pool.map(lambda each: each.as_lora(rank), weights), strict=True):
            layers.append(layer)
            advance(weight.size)
    return tuple(layers)


@dataclass(frozen=True)
class _BaseFiles:
    """The weights of a base model, and how the adapters name its modules."""

    names: FileNames
    renaming: Renaming

    def to_adapter(self, name: str) -> str:
        """The adapters' name of a tensor in the file. Any other name is already the adapters' name."""
        own = self.names.loaded.get(name, name)
        return self.renaming.to_adapter(own) if name in self.names.found.tensors else name

    def modules(self) -> Iterator[str]:
        """Paths of all modules with tensors and of their parents, as the adapters name them. Paths may repeat."""
        for name in self.names.found.tensors:
            yield from _parents(self.to_adapter(name))


def _open_base(base: Source, adapters: Sequence[Adapter]) -> _BaseFiles:
    """Find the weights that adapters were trained for, without reading any weight."""
    folder = base_folder(base)
    if (folder / PIPELINE).is_file():
        parts = sorted(file.parent.name for file in folder.glob(f"*/{CONFIG}"))
        raise CheckpointError(
            f"{base}: is a diffusers pipeline. Pass the folder of the adapted part, one of {', '.join(parts)}."
        )
    names = _files_of(folder, adapters)
    first, *others = [renaming_of(adapter, names) for adapter in adapters]
    for adapter, renaming in zip(adapters[1:], others, strict=True):
        if renaming != first:
            raise CheckpointError(
                f"{adapter.file}: names layers with another prefix than {adapters[0].file}, because they were trained "
                "on models with and without a head. Convert them one by one."
            )
    return _BaseFiles(names, first)


def _files_of(folder: Path, adapters: Sequence[Adapter]) -> FileNames:
    """The set of files with the layers of the adapters. If there are several, the set that libraries load."""
    architecture = Architecture(folder)
    sets = [FileNames(found, architecture) for found in weight_sets(folder)]
    having = [names for names in sets if touches(adapters, names)]
    loaded = [names for names in having if Path(names.found.name).name.partition(SAFE)[0] in _LOADED]
    chosen = loaded or having or sets[:1]  # without any layer, the first set reports what is missing
    if len(chosen) > 1:
        listed = " and ".join(Path(names.found.name).name for names in chosen)
        raise CheckpointError(f"{folder}: {listed} all have the adapter's layers. Use a folder with one of them.")
    return chosen[0]


def _parents(name: str) -> Iterator[str]:
    """The paths of the parents of a tensor or module, from the inside out."""
    while name := name.rpartition(".")[0]:
        yield name


def _weights_of(
    opened: _BaseFiles,
    chains: Mapping[str, list[LayerChain]],
    adapters: Sequence[Adapter],
    columns: Collection[str] | None,
) -> list[AdaptedWeight]:
    """The adapted weights, in the order of the adapters' layers."""
    parts: dict[str, list[tuple[StoredTensor, Rotation]]] = {}
    for name, own in chains.items():
        stored = opened.names.stored(name)
        if stored is None:
            raise unknown_tensor(name, adapters, opened.names)
        rotation = rotation_of(stored, own, opened.names.architecture, columns)
        parts.setdefault(own[0].path, []).extend(rotation.matrices(stored))
    return [_adapted_weight(path, opened, tensors, adapters) for path, tensors in parts.items()]


def _adapted_weight(
    path: str, opened: _BaseFiles, parts: Sequence[tuple[StoredTensor, Rotation]], adapters: Sequence[Adapter]
) -> AdaptedWeight:
    """The weight of a layer: one tensor, or for experts, one tensor for all or several tensors for each expert."""
    noise = sum(adapter.noise(path) for adapter in adapters)
    size = sum(stored.size for stored, _ in parts)
    if opened.names.parameter(path) is None:
        stored, rotation = parts[0]
        kind: LayerKind = "attention" if stored.name.endswith("in_proj_weight") else _KINDS[len(stored.shape)]
        kernel = stored.shape[2:]
        return AdaptedWeight(path, kind, [_matrix(parts)], noise, kernel, rotation.columns, size=size)
    owner = opened.names.architecture.find(path.rpartition(".")[0])
    if owner is None:
        raise CheckpointError(
            f"{opened.names.architecture.folder}: there is no {CONFIG} of a transformers model with "
            f"{parameter_of(path)}, so PEFT's names for the LoRA of its experts are unknown. {IN_MEMORY}"
        )
    count = next(len(adapter.chains[path]) for adapter in adapters if path in adapter.chains)
    # Several tensors of each expert, such as gate_proj and up_proj: all experts of the first one come first.
    experts = [_matrix(parts[i::count]) for i in range(count)]
    return AdaptedWeight(path, "experts", experts, noise, owner=owner, size=size)


def _matrix(parts: Sequence[tuple[StoredTensor, Rotation]]) -> Matrix:
    """A weight that consists of the rows of one or more tensors with the same rotation."""
    out = sum(stored.shape[1 if rotation.columns else 0] for stored, rotation in parts)
    return Matrix(parts[0][1].chain, out, partial(_project, parts))


def _project(parts: Sequence[tuple[StoredTensor, Rotation]], V: Tensor) -> Tensor:
    """`W V: (out, m)`, computed while the files are read."""
    products = []
    for stored, rotation in parts:
        left = V.mT.to(product_dtype(FLOATS[stored.dtype])).contiguous()
        products.append(project(left, stored.read().flatten(1), columns=rotation.columns))
        if not bool(torch.isfinite(products[-1]).all()):
            raise CheckpointError(
                f"{stored.file}: {stored.name} has values that are infinite, NaN, or too large for products in "
                f"{left.dtype}. Download the base model again, or store it in a wider dtype."
            )
    return torch.cat(products, dim=1).mT.double()


def _copies_of(
    opened: _BaseFiles, full: Mapping[str, Tensor], adapters: Sequence[Adapter], adapted: Collection[str]
) -> dict[str, Tensor]:
    """Trained biases and modules, by their keys in PEFT's file without its prefix."""
    copies = {}
    for name, tensor in full.items():
        stored = opened.names.stored(name)
        if stored is not None:
            check_given(name, tensor, stored)
        elif not is_new(name, adapters):
            raise unknown_tensor(name, adapters, opened.names)
        path, _, entry = opened.to_adapter(name).rpartition(".")
        copies[copy_key(path, entry, adapted=path in adapted).removeprefix(PREFIX)] = tensor
    return copies


def _check_layers(opened: _BaseFiles, layers: Mapping[str, LayerKind]) -> None:
    """Check that LoRA supports these layers.

    The shape of a convolution's weight does not show its groups, its dilation or its padding, but the model does. The
    model also shows which weights other modules read, and how PEFT renames layers.
    """
    architecture = opened.names.architecture
    for path, kind in layers.items():
        parent, _, name = path.rpartition(".")
        if name == "out_proj" and opened.names.find(f"{parent}.in_proj_weight", f"{parent}.q_proj_weight"):
            raise unsupported(path, "this layer", OUTPUT_PROJECTION)
        if kind.startswith("conv"):
            _check_convolution(path, architecture)
    renamings = renamings_of(architecture.model) if has_experts(opened.modules()) else ()
    check_names(layers, architecture.entries.get("model_type"), renamings)
    if architecture.model is not None:
        places = [place for path in layers if (place := architecture.place(path)) is not None]
        check_reads(architecture.model, {place: architecture.model.get_submodule(place) for place in places})


def _check_convolution(path: str, architecture: Architecture) -> None:
    layer: Any = architecture.find(path)
    if layer is None:
        raise CheckpointError(
            f"{architecture.folder}: there is no {CONFIG} of an installed transformers, diffusers or timm model with "
            f"{path}, so it is unknown whether this convolution has groups or a dilation, which LoRA does not support. "
            f"{IN_MEMORY}"
        )
    reason = why_not_convolution(layer) or (None if type(layer).forward in _PLAIN else OWN_FORWARD)
    if reason:
        raise unsupported(path, describe(layer), reason)
