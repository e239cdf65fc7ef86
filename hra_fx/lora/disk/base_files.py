"""The weights of a base model on disk, as an adapter names them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hra_fx.checkpoint.adapter import Adapter
from hra_fx.checkpoint.disk.architecture import Architecture
from hra_fx.checkpoint.disk.arguments import PIPELINE, Source, base_folder
from hra_fx.checkpoint.disk.file_names import FileNames
from hra_fx.checkpoint.disk.requests import Renaming, renaming_of, touches
from hra_fx.checkpoint.disk.stored import SAFE, StoredTensor, WeightSet, weight_sets
from hra_fx.checkpoint.disk.ties import tied_to
from hra_fx.errors import CheckpointError

#: Names of the files that transformers, timm and diffusers load.
_LOADED = ("model", "diffusion_pytorch_model")


@dataclass(frozen=True)
class BaseFiles:
    """The weights of a base model.

    Attributes:
        architecture: of its folder.
        found: the set of files.
        names: names in it.
        renaming: how the adapters name its modules.
    """

    architecture: Architecture
    found: WeightSet
    names: FileNames
    renaming: Renaming

    def stored(self, name: str) -> StoredTensor | None:
        """A tensor by its name in an adapter, or the one that it is tied to; `None` if there is none."""
        found = self.names.find(name) or tied_to(name, self.architecture, self.names)
        return None if found is None else self.found.tensors[found]

    def to_adapter(self, name: str) -> str:
        """The adapters' name of a tensor in the file; any other name is theirs already."""
        own = self.names.loaded.get(name, name)
        return self.renaming.to_adapter(own) if name in self.found.tensors else name

    def modules(self) -> Iterator[str]:
        """Paths of all modules with tensors and of those around them, as the adapters name them; with repetitions."""
        for name in self.found.tensors:
            yield from parents(self.to_adapter(name))


def open_base(base: Source, adapters: Sequence[Adapter]) -> BaseFiles:
    """Find the weights that adapters were trained for; no weight is read.

    Raises:
        CheckpointError: the folder does not exist, or has no weights or several sets of them; or the adapters name
            layers in different ways.
    """
    folder = base_folder(base)
    if (folder / PIPELINE).is_file():
        parts = sorted(file.parent.name for file in folder.glob("*/config.json"))
        raise CheckpointError(
            f"{base}: is a diffusers pipeline. Give the folder of the adapted part, one of {', '.join(parts)}."
        )
    architecture = Architecture(folder)
    found, names = _weights_of(folder, architecture, adapters)
    renamings = [renaming_of(adapter, names, architecture) for adapter in adapters]
    for adapter, renaming in zip(adapters, renamings, strict=True):
        if renaming != renamings[0]:
            raise CheckpointError(
                f"{adapter.file}: names layers with another prefix than {adapters[0].file}, because they were trained "
                "on models with and without a head. Convert them one by one."
            )
    return BaseFiles(architecture, found, names, renamings[0])


def parents(name: str) -> Iterator[str]:
    """The paths of the modules around a tensor or module.

    >>> list(parents("encoder.0.weight"))
    ['encoder.0', 'encoder']
    """
    while name := name.rpartition(".")[0]:
        yield name


def _weights_of(folder: Path, architecture: Architecture, adapters: Sequence[Adapter]) -> tuple[WeightSet, FileNames]:
    """The set with the layers of the adapters; of several, the one that libraries load."""
    sets = [(found, FileNames(found, architecture)) for found in weight_sets(folder)]
    having = [pair for pair in sets if touches(adapters, pair[1])]
    loaded = [pair for pair in having if Path(pair[0].name).name.partition(SAFE)[0] in _LOADED]
    chosen = loaded or having or sets[:1]  # without any layer, the first set reports what is missing
    if len(chosen) > 1:
        listed = " and ".join(Path(each.name).name for each, _ in chosen)
        raise CheckpointError(f"{folder}: {listed} all have the adapter's layers. Use a folder with one of them.")
    return chosen[0]
