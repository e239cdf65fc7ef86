"""Verify a written file: a rotated weight has the row norms of the base, everything else is identical.

A rotation preserves row norms, so only the two files are needed.
"""

from __future__ import annotations

import filecmp
import math
from pathlib import Path

import torch
from torch import Tensor

from hra_fx.checkpoint.disk.plan import FilePlan
from hra_fx.checkpoint.disk.rotation import Rotation, product_dtype
from hra_fx.checkpoint.weights import opened
from hra_fx.errors import FoldError


def check_copy(source: Path, target: Path) -> None:
    """Check a copied file.

    Raises:
        FoldError: it differs.
    """
    if not filecmp.cmp(source, target, shallow=False):
        raise FoldError(f"{target}: the copy differs from {source}. Check the disk.")


def check_file(plan: FilePlan, file: Path) -> None:
    """Check a written file against the base.

    Raises:
        FoldError: it differs; the message names the tensor.
    """
    with opened(file) as written:
        if set(written.keys()) != plan.tensors.keys() or (written.metadata() or {}) != plan.header.metadata:
            raise FoldError(f"{file}: the names or the metadata differ from what was written. Check the disk.")
        for name, stored in plan.tensors.items():
            edit, found = plan.edits.get(name), written.get_tensor(name)
            expected = edit if isinstance(edit, Tensor) else stored.read() if stored else found
            if isinstance(edit, Rotation):
                _check_rows(file, name, expected, found, edit)
            elif not torch.equal(_bytes(expected), _bytes(found)):
                raise FoldError(f"{file}: {name} differs from what was written. Check the disk.")


def _bytes(tensor: Tensor) -> Tensor:
    """The memory of a tensor, in which NaN equals itself."""
    return tensor.contiguous().flatten().view(torch.uint8)


def _check_rows(file: Path, name: str, base: Tensor, written: Tensor, rotation: Rotation) -> None:
    info = torch.finfo(base.dtype)
    # Without a wider dtype to compute in, reflections that nearly cancel each other add errors.
    steps = 64 * (1 + rotation.chain.shape[-1]) if base.dtype == torch.float64 else 64
    # Half a unit in the last place of each entry, and the rounding of products.
    relative = info.eps / 2 + steps * torch.finfo(product_dtype(base.dtype)).eps
    for (matrix, _), (changed, _) in zip(rotation.split(base), rotation.split(written), strict=True):
        across = 0 if rotation.columns else 1
        before, after = (torch.linalg.vector_norm(each.double(), dim=across) for each in (matrix, changed))
        slack = before * relative + math.sqrt(matrix.shape[across]) * info.smallest_normal * info.eps
        off = (after - before).abs() - slack
        if not bool((off <= 0).all()):
            row = int(off.nan_to_num(nan=math.inf).argmax())
            raise FoldError(
                f"{file}: row {row} of {name} has norm {float(after[row]):.8g}, but {float(before[row]):.8g} in the "
                "base, and a rotation preserves norms. Check the disk, and whether another process writes to the file."
            )
