"""Write a planned result into a temporary folder next to the output folder, which is renamed at the end.

A written file can be verified: a rotated weight has the row norms of the base model, because a rotation preserves them,
and everything else is identical.
"""

from __future__ import annotations

import contextlib
import filecmp
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from hra_fx.atomic_write import flush
from hra_fx.checkpoint.disk.plan import FilePlan, Plan
from hra_fx.checkpoint.disk.stored import Rotation, product_dtype, rotated
from hra_fx.checkpoint.folder import opened
from hra_fx.errors import CheckpointError, FoldError


def write_result(
    base: Path, out: Path, plan: Plan, *, overwrite: bool, verify: bool, progress: bool
) -> dict[str, float]:
    """Write a planned result. Returns path and name of each rotated tensor -> its relative rounding error."""
    rounding: dict[str, float] = {}
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise CheckpointError(
            f"{out}: the output folder is not empty. Choose another folder, or pass overwrite=True (on the command "
            "line: --overwrite)."
        )
    total = sum(file.stat().st_size for file in base.rglob("*") if file.is_file())
    with (
        _explained_errors(out),
        _staged(out) as folder,
        progress_bar(f"writing {out.name}", total, wanted=progress) as advance,
    ):
        if total > (free := shutil.disk_usage(out.parent).free):
            raise CheckpointError(
                f"{out.parent}: {total:,} bytes are needed, but only {free:,} are free. Free some space, or choose "
                "an output folder on another disk."
            )

        def write(source: str, target: str) -> None:
            file = Path(source)
            if not file.is_file():
                raise CheckpointError(f"{file}: is a broken link, or not a regular file. Remove it from the base.")
            # copytree collects errors of the type OSError and continues with the next file, so convert them here.
            with _explained_errors(out):
                planned = plan.files.get(file.relative_to(base).as_posix())
                rounding.update(_write(planned, file, Path(target), verify=verify))
            advance(file.stat().st_size)

        # Links are followed, as in the Hub cache.
        shutil.copytree(base, folder, copy_function=write, dirs_exist_ok=True)
        folder.chmod(folder.stat().st_mode | 0o700)  # a copy of a read-only folder could not be renamed
    return rounding


def _write(plan: FilePlan | bytes | None, source: Path, target: Path, *, verify: bool) -> dict[str, float]:
    """Write one file: new text, changed weights, or a copy. Returns the rounding errors of rotated weights."""
    rounding: dict[str, float] = {}
    if plan is None:
        shutil.copyfile(source, target)
    elif isinstance(plan, bytes):
        target.write_bytes(plan)
    else:
        rounding = _write_weights(plan, target)
    shutil.copymode(source, target)
    flush(target)
    if verify and plan is None:
        check_copy(source, target)
    elif verify and isinstance(plan, FilePlan):
        check_file(plan, target)
    return rounding


def _write_weights(plan: FilePlan, target: Path) -> dict[str, float]:
    rounding: dict[str, float] = {}
    tensors: dict[str, Tensor] = {}
    with opened(plan.header.file) as file:
        for name, change in plan.tensors.items():
            if isinstance(change, Tensor):
                tensors[name] = change
                continue
            stored = change[0] if isinstance(change, tuple) else change
            # A new tensor is a copy of another tensor, and must not share its memory.
            tensor = file.get_tensor(name) if name in plan.header.tensors else stored.read().clone()
            if isinstance(change, tuple):
                tensor, rounding[plan.part + name] = rotated(stored, tensor, change[1])
            tensors[name] = tensor
        save_file(tensors, target, dict(plan.header.metadata) or None)
    return rounding


@contextlib.contextmanager
def _staged(out: Path) -> Iterator[Path]:
    """Create a folder that becomes the output folder unless an exception is raised. An old one is replaced."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", suffix=".partial", dir=out.parent) as hidden:
        (content := Path(hidden, "content")).mkdir()
        yield content
        replaced = Path(hidden, "replaced")
        try:
            if out.is_dir():
                out.rename(replaced)
            content.rename(out)
        except BaseException:
            if replaced.is_dir() and not out.exists():
                replaced.rename(out)
            raise


@contextlib.contextmanager
def _explained_errors(out: Path) -> Iterator[None]:
    """Convert errors of the disk to an error that says what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        # The text of an OSError would contain the temporary folder.
        reason = f"[Errno {error.errno}] {error.strerror}" if isinstance(error, OSError) else error
        raise CheckpointError(
            f"{out}: cannot write the result ({reason}). The output folder is unchanged. Free some space, check the "
            "disk, or choose another output folder."
        ) from error


def check_copy(source: Path, target: Path) -> None:
    """Raise an error if a copied file differs."""
    if not filecmp.cmp(source, target, shallow=False):
        raise FoldError(f"{target}: the copy differs from {source}. Check the disk.")


def check_file(plan: FilePlan, file: Path) -> None:
    """Raise an error if a written file differs from the plan or from the base; the message names the tensor."""
    with opened(file) as written:
        if set(written.keys()) != plan.tensors.keys() or (written.metadata() or {}) != plan.header.metadata:
            raise FoldError(f"{file}: the names or the metadata differ from what was written. Check the disk.")
        for name, change in plan.tensors.items():
            found = written.get_tensor(name)
            if isinstance(change, tuple):
                _check_rows(file, name, change[0].read(), found, change[1])
                continue
            expected = change if isinstance(change, Tensor) else change.read()
            if not torch.equal(_bytes(expected), _bytes(found)):
                raise FoldError(f"{file}: {name} differs from what was written. Check the disk.")


def _bytes(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, for which NaN equals NaN."""
    return tensor.contiguous().flatten().view(torch.uint8)


def _check_rows(file: Path, name: str, base: Tensor, written: Tensor, rotation: Rotation) -> None:
    info = torch.finfo(base.dtype)
    # float64 weights are not rotated in a wider dtype, so reflections that nearly cancel add errors.
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


@contextlib.contextmanager
def progress_bar(what: str, total: int, *, wanted: bool) -> Iterator[Callable[[int], object]]:
    """Yield a function that advances a progress bar by a number of bytes. It is shown if `wanted`, on a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not (wanted and console.is_terminal)) as progress:
        task = progress.add_task(what, total=total)
        yield lambda count: progress.advance(task, count)
