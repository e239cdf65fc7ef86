"""The weights in a folder (one or more safetensors files with a state dict), and their rotation.

A rotated weight is `W Q = W - (W U) (T U^T)`.

Names, dtypes and shapes are read from the headers; values are read when they are needed. 16-bit weights are multiplied
in float32, wider weights in float64.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hra_fx.checkpoint.folder import opened
from hra_fx.errors import CheckpointError, FoldError
from hra_fx.functional import householder

SAFE = ".safetensors"
_INDEX = f"{SAFE}.index.json"
#: Weights in other formats, which are never read.
_OTHERS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".ot", ".gguf", ".onnx")
#: Files that training saves next to a model and that do not contain weights.
_NO_WEIGHTS = ("training_args", "optimizer", "scheduler", "scaler", "rng_state")
#: Dtypes of weights that can be folded, by their names in the format.
FLOATS: Mapping[str, torch.dtype] = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}
#: Dtypes of tensors that an adapter can replace.
DTYPES: Mapping[str, torch.dtype] = {
    **FLOATS,
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}
#: The number of values in a block.
_BLOCK = 1 << 19


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file, or the entry `index` of its first dimension.

    `dtype` is the name in the format, such as "BF16".
    """

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    index: int | None = None

    @property
    def size(self) -> int:
        """The size in bytes, if the dtype is in `DTYPES`."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def read(self) -> Tensor:
        """Read the values, as a view of the file in memory if possible."""
        with opened(self.file) as file:
            values: Tensor = file.get_tensor(self.name) if self.index is None else file.get_slice(self.name)[self.index]
        return values


@dataclass(frozen=True)
class Header:
    """The header of a file: text entries, and key -> tensor."""

    file: Path
    metadata: Mapping[str, str]
    tensors: Mapping[str, StoredTensor]


def read_header(file: Path) -> Header:
    """Read and check a header."""
    # With the framework torch, safe_open reserves memory for the whole file.
    with opened(file, framework="numpy") as opened_file:
        metadata = dict(opened_file.metadata() or {})
        slices = {key: opened_file.get_slice(key) for key in opened_file.keys()}  # noqa: SIM118, not a dict
        tensors = {
            key: StoredTensor(file, key, str(found.get_dtype()), tuple(found.get_shape()))
            for key, found in slices.items()
        }
    return Header(file, metadata, tensors)


@dataclass(frozen=True)
class WeightSet:
    """The files of one state dict, sorted by name, with the index file and its content."""

    files: tuple[Header, ...]
    index: Path | None = None
    index_entries: Mapping[str, Any] | None = None

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """Key -> tensor, for all files."""
        return {name: tensor for header in self.files for name, tensor in header.tensors.items()}

    @property
    def name(self) -> str:
        """The index or the only file, for messages."""
        return str(self.index or self.files[0].file)


def weight_sets(folder: Path) -> list[WeightSet]:
    """All sets in a folder, without its subfolders."""
    indices = sorted(folder.glob(f"*{_INDEX}"))
    sets = [_of_index(index) for index in indices]
    taken = {header.file for found in sets for header in found.files}
    lone = (file for file in sorted(folder.glob(f"*{SAFE}")) if file not in taken)
    sets += [WeightSet((read_header(file),)) for file in lone if file.is_file()]
    if sets:
        return sets
    if others := sorted(foreign(folder)):
        raise CheckpointError(
            f"{others[0]}: only safetensors files are read. Load the model and save it with "
            "model.save_pretrained(folder)."
        )
    below = sorted(file.parent.relative_to(folder).as_posix() for file in folder.glob(f"*/*{SAFE}"))
    suggestion = "Pass the folder of a checkpoint."
    if below:
        names = ", ".join(map(repr, dict.fromkeys(below)))
        suggestion = f"The subfolders {names} have some: pass one of them, or adapter_dir={{name: adapter}} (--part)."
    raise CheckpointError(f"{folder}: no {SAFE} files found. {suggestion}")


def foreign(folder: Path) -> Iterator[Path]:
    """Files at any depth that may contain weights in another format."""
    for file in folder.rglob("*"):
        if file.suffix in _OTHERS and not file.name.startswith(_NO_WEIGHTS):
            yield file


def _of_index(index: Path) -> WeightSet:
    try:
        entries = json.loads(index.read_text(encoding="utf-8"))
        places: dict[str, str] = dict(entries["weight_map"])
        names = sorted(set(places.values()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{index}: cannot read the file, or it has no weight_map ({error!r}). Download it again."
        ) from error
    files = [file for file in index.parent.glob(f"*{SAFE}") if file.name in names]
    headers = {file.name: read_header(file) for file in files}
    for key, name in places.items():
        if name not in headers or key not in headers[name].tensors:
            raise CheckpointError(
                f"{index}: lists {key!r} in {name!r}, but the file is missing or does not have it. Download both again."
            )
    return WeightSet(tuple(headers[name] for name in names), index, entries)


@dataclass(frozen=True)
class Rotation:
    """The rotation `W -> W Q` of a stored weight, `(in, out)` if `columns`, otherwise `(out, in)`.

    `chain` is `U: (d, k)` of `Q`; for a tensor with all experts, `(experts, d, k)`.
    """

    chain: Tensor
    columns: bool

    def matrices(self, stored: StoredTensor) -> Iterator[tuple[StoredTensor, Rotation]]:
        """The weight itself, or the weight of each expert, with its rotation."""
        if self.chain.dim() == 2:
            yield stored, self
            return
        for i, chain in enumerate(self.chain):
            one = dataclasses.replace(stored, shape=stored.shape[1:], index=i)
            yield one, dataclasses.replace(self, chain=chain)

    def split(self, weight: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The weight itself, or the weight of each expert, as a matrix, with its chain."""
        if self.chain.dim() == 2:
            yield weight.flatten(1), self.chain
        else:
            yield from zip(weight, self.chain, strict=True)


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of products with a weight: float32 for 16-bit weights, otherwise float64."""
    return torch.float32 if dtype.itemsize == 2 else torch.float64


def project(left: Tensor, weight: Tensor, *, columns: bool) -> Tensor:
    """Compute `V^T W^T: (k, out)` for a weight `W: (out, d)`, or `(d, out)` if `columns`.

    `left` is `V^T: (k, d)`, in `product_dtype(weight.dtype)`.
    """
    if not columns:
        return torch.cat([left @ weight[rows].to(left.dtype).mT for rows in _blocks(weight)], dim=1)
    result = left.new_zeros(left.shape[0], weight.shape[1])
    for rows in _blocks(weight):
        result.addmm_(left[:, rows], weight[rows].to(left.dtype))
    return result


def rotated(stored: StoredTensor, weight: Tensor, rotation: Rotation) -> tuple[Tensor, float]:
    """Rotate a weight. Returns it in its dtype, and the relative error `|W'' - W'|_F / |W'|_F` of the cast."""
    result = torch.empty_like(weight, memory_format=torch.contiguous_format)
    targets = [matrix for matrix, _ in rotation.split(result)]
    errors = []
    for (matrix, chain), target in zip(rotation.split(weight), targets, strict=True):
        left, right = _factors(chain, product_dtype(weight.dtype))
        errors.append(_rotate(matrix, left, right, target, columns=rotation.columns))
    if not math.isfinite(rounding := max(errors)):
        raise FoldError(
            f"{stored.file}: the folded {stored.name} is not finite in {stored.dtype}. Check the base weight for NaN "
            "and inf, or store the base model in a wider dtype."
        )
    return result, rounding


def _rotate(matrix: Tensor, left: Tensor, right: Tensor, target: Tensor, *, columns: bool) -> float:
    """Write a rotated matrix. Returns the error of the cast in its first rows; infinite if the result is not finite."""
    projected = project(left, matrix, columns=True) if columns else None
    rounding, largest = 0.0, torch.finfo(matrix.dtype).max
    for rows in _blocks(matrix):
        wide = matrix[rows].to(left.dtype, copy=True)
        if projected is None:
            wide.addmm_((left @ wide.mT).mT, right, alpha=-1)
        else:
            wide.addmm_(right[:, rows].mT, projected, alpha=-1)
        target[rows] = wide
        if not float(torch.linalg.vector_norm(wide, math.inf)) <= largest:  # NaN compares false
            return math.inf
        # The error is about the same in all rows, and computing it takes time.
        if rows.start == 0 and (size := float(torch.linalg.vector_norm(wide))):
            rounding = float(torch.dist(target[rows].to(wide.dtype), wide)) / size
    return rounding


def _blocks(matrix: Tensor) -> Iterator[slice]:
    """Blocks of rows that fit into the cache of a CPU."""
    step = max(1, _BLOCK // matrix.shape[1])
    yield from (slice(first, first + step) for first in range(0, len(matrix), step))


def _factors(chain: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`U^T` and `T U^T`, both `(k, d)`, computed in float64."""
    # Column-major, because every operation below runs along columns.
    chain = householder.normalize(chain.double().mT.contiguous().mT)
    left, right = chain.mT, householder.compact_wy(chain) @ chain.mT
    return left.to(dtype).contiguous(), right.to(dtype).contiguous()
