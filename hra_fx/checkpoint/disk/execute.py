"""Write a planned result: file by file into a staging folder, verified, then renamed."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from hra_fx.checkpoint.disk.arguments import Request
from hra_fx.checkpoint.disk.checking import check_copy, check_file
from hra_fx.checkpoint.disk.plan import Plan, stamps
from hra_fx.checkpoint.disk.progress_bar import bar
from hra_fx.checkpoint.disk.staging_dir import StagingDir
from hra_fx.checkpoint.disk.streams import read_bytes, write_all
from hra_fx.checkpoint.disk.writing import write_file
from hra_fx.errors import CheckpointError, FoldError, HRAError


class FoldExecution:
    """Writes one result.

    Attributes:
        sizes: path -> size of each file in bytes.
        rounding: name of a rotated tensor -> its relative rounding error.
        reused: number of files that an earlier call had finished.
    """

    def __init__(self, request: Request, plan: Plan, *, progress: bool) -> None:
        """Nothing is written yet."""
        self.sizes = plan.sizes()
        self.rounding: dict[str, float] = {}
        self.reused = 0
        self._request = request
        self._plan = plan
        self._progress = progress
        self._staging = StagingDir(request.out)

    def run(self, *, overwrite: bool, verify: bool) -> None:
        """Write the result.

        Raises:
            CheckpointError: the output folder is not empty, the disk is full or refuses, or the base changes.
            FoldError: a rotated weight is not finite, or `verify` finds a difference.
        """
        out, staging = self._request.out, self._staging
        with self._explained_errors():
            if out.is_dir() and any(out.iterdir()) and not overwrite:
                raise CheckpointError(
                    f"{out}: the output folder is not empty. Choose another folder, or overwrite=True (--overwrite)."
                )
            with staging.locked(self._plan.inputs):
                try:
                    self._check_space()
                    self._write_files(verify)
                except HRAError:
                    staging.discard()
                    raise
                staging.publish()

    def _write_files(self, verify: bool) -> None:
        content = self._staging.content
        with bar(f"writing {self._request.out.name}", sum(self.sizes.values()), wanted=self._progress) as advance:
            for path in self._request.folders:
                (content / path).mkdir(parents=True, exist_ok=True)
            for path in self.sizes:
                self._write_one(path, advance)
        if stamps(self._request.files) != self._plan.inputs["files"]:
            raise CheckpointError(f"{self._request.base}: files changed while they were read. Call again.")
        if verify:
            self._verify(content)
        for path, folder in self._request.folders.items():
            mode = folder.stat().st_mode & 0o777
            (content / path).chmod(mode | 0o700)  # it is still to be renamed

    def _verify(self, folder: Path) -> None:
        """Read all files again."""
        try:
            for path, plan in self._plan.files.items():
                check_file(plan, folder / path)
            for path, file in self._plan.copies.items():
                check_copy(file, folder / path)
        except OSError as error:
            raise FoldError(
                f"{folder / path}: cannot read the file again ({error.strerror}). Check the disk."
            ) from error

    def _write_one(self, path: str, advance: Callable[[int], object]) -> None:
        staging, plan = self._staging, self._plan.files.get(path)
        target = staging.content / path
        if staging.has(path, self.sizes[path]) and (plan is None or path in staging.finished):
            self.rounding |= staging.finished.get(path, {})
            self.reused += 1
            advance(self.sizes[path])
            return
        mode = self._request.files[path].stat().st_mode & 0o777
        if plan is None:
            staging.write(target, lambda stream: self._copy(path, stream, advance), mode)
            return
        rounding: dict[str, float] = {}
        staging.write(target, lambda stream: rounding.update(write_file(plan, stream, advance)), mode)
        staging.finish(path, rounding)
        self.rounding |= rounding

    def _copy(self, path: str, target: BinaryIO, advance: Callable[[int], object]) -> None:
        if path in self._plan.texts:
            write_all(target, self._plan.texts[path])
            return
        file = self._plan.copies[path]
        with open(file, "rb", buffering=0) as source:
            for block in read_bytes(source, 0, self.sizes[path], file):
                write_all(target, block)
                advance(len(block))

    def _check_space(self) -> None:
        done = sum(size for path, size in self.sizes.items() if self._staging.has(path, size))
        needed, free = sum(self.sizes.values()) - done, shutil.disk_usage(self._staging.folder).free
        if needed > free:
            raise CheckpointError(
                f"{self._request.out.parent}: {needed:,} bytes are needed, but only {free:,} are free. Free some "
                "space, or choose an output folder on another disk."
            )

    @contextlib.contextmanager
    def _explained_errors(self) -> Iterator[None]:
        """Say how to continue if the disk refuses, or the user stops the call."""
        out = self._request.out
        try:
            yield
        except OSError as error:
            reason = str(error)
            if str(self._staging.folder.with_suffix("")) in reason:  # do not show the hidden folder
                reason = f"[Errno {error.errno}] {error.strerror}"
            state = self._state(" Free some space, check the disk, or choose another output folder.")
            raise CheckpointError(f"{out}: cannot write the result ({reason}). {state}") from error
        except KeyboardInterrupt as error:
            if hasattr(error, "add_note"):  # Python 3.11
                error.add_note(f"{out}: {self._state()}")
            raise

    def _state(self, suggestion: str = "") -> str:
        """What exists when a call was stopped, in sentences."""
        folder = self._staging.folder
        left = os.path.isdir(folder)
        if self._staging.is_done:
            return "The result is complete." + f" Delete the leftover {folder}." * left
        kept = f" Finished files are kept in {folder}: repeat the call to resume, or delete that folder." * left
        return f"The output folder is unchanged.{suggestion}{kept}"
