"""Write a planned result: file by file into a staging folder, verified, then renamed."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from hra_fx.checkpoint.disk.arguments import Request
from hra_fx.checkpoint.disk.checking import check_file
from hra_fx.checkpoint.disk.plan import FilePlan, Plan, stamps
from hra_fx.checkpoint.disk.progress_bar import bar
from hra_fx.checkpoint.disk.staging_dir import StagingDir
from hra_fx.checkpoint.disk.writing import write_file
from hra_fx.errors import CheckpointError, FoldError, HRAError


def write_result(
    request: Request, plan: Plan, *, overwrite: bool, verify: bool, progress: bool
) -> tuple[dict[str, float], int]:
    """Write a planned result.

    Returns:
        Name of a rotated tensor -> its relative rounding error; and the number of files that an earlier call had
        finished, whose tensors are not among them.

    Raises:
        CheckpointError: the output folder is not empty, the disk is full or refuses, or the base changes.
        FoldError: a rotated weight is not finite, or `verify` finds a difference.
    """
    out, staging = request.out, StagingDir(request.out)
    with _explained_errors(staging):
        if out.is_dir() and any(out.iterdir()) and not overwrite:
            raise CheckpointError(
                f"{out}: the output folder is not empty. Choose another folder, or overwrite=True (--overwrite)."
            )
        with staging.locked(plan.inputs):
            try:
                _check_space(plan, staging)
                rounding, reused = _write_files(request, plan, staging, progress)
                if stamps(request.files) != plan.inputs["files"]:
                    raise CheckpointError(f"{request.base}: files changed while they were read. Call again.")
                if verify:
                    _verify(plan, staging.content)
                for path, folder in request.folders.items():
                    mode = folder.stat().st_mode & 0o777
                    (staging.content / path).chmod(mode | 0o700)  # it is still to be renamed
            except HRAError:
                staging.discard()
                raise
            staging.publish()
    return rounding, reused


def _write_files(request: Request, plan: Plan, staging: StagingDir, progress: bool) -> tuple[dict[str, float], int]:
    rounding: dict[str, float] = {}
    reused = 0
    for path in request.folders:
        (staging.content / path).mkdir(parents=True, exist_ok=True)
    with bar(f"writing {request.out.name}", plan.size, wanted=progress) as advance:
        for path, file in plan.files.items():
            if staging.has(path):
                reused += 1
                advance(file.size)
            else:
                mode = request.files[path].stat().st_mode & 0o777
                staging.write(staging.content / path, _writer(file, advance, rounding), mode)
    return rounding, reused


def _writer(file: FilePlan, advance: Callable[[int], object], rounding: dict[str, float]) -> Callable[[BinaryIO], None]:
    return lambda stream: rounding.update(write_file(file, stream, advance))


def _check_space(plan: Plan, staging: StagingDir) -> None:
    done = sum(file.size for path, file in plan.files.items() if staging.has(path))
    needed, free = plan.size - done, shutil.disk_usage(staging.folder).free
    if needed > free:
        raise CheckpointError(
            f"{staging.out.parent}: {needed:,} bytes are needed, but only {free:,} are free. Free some space, or "
            "choose an output folder on another disk."
        )


def _verify(plan: Plan, folder: Path) -> None:
    """Read all files again."""
    for path, file in plan.files.items():
        try:
            check_file(file, folder / path)
        except OSError as error:
            raise FoldError(
                f"{folder / path}: cannot read the file again ({error.strerror}). Check the disk."
            ) from error


@contextlib.contextmanager
def _explained_errors(staging: StagingDir) -> Iterator[None]:
    """Say how to continue if the disk refuses, or the user stops the call."""
    try:
        yield
    except OSError as error:
        reason = str(error)
        if str(staging.folder.with_suffix("")) in reason:  # do not show the hidden folder
            reason = f"[Errno {error.errno}] {error.strerror}"
        state = _state(staging, " Free some space, check the disk, or choose another output folder.")
        raise CheckpointError(f"{staging.out}: cannot write the result ({reason}). {state}") from error
    except KeyboardInterrupt as error:
        error.add_note(f"{staging.out}: {_state(staging)}")
        raise


def _state(staging: StagingDir, suggestion: str = "") -> str:
    """What exists when a call was stopped, in sentences."""
    left = os.path.isdir(staging.folder)
    if staging.is_done:
        return "The result is complete." + f" Delete the leftover {staging.folder}." * left
    kept = f" Finished files are kept in {staging.folder}: repeat the call to resume, or delete that folder." * left
    return f"The output folder is unchanged.{suggestion}{kept}"
