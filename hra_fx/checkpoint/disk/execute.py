"""A planned result made: file after file beside the wanted folder, checked, renamed; and what is said when it fails."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from hra_fx.checkpoint.disk.arguments import Request
from hra_fx.checkpoint.disk.checking import check_copy, check_file
from hra_fx.checkpoint.disk.progress_bar import bar
from hra_fx.checkpoint.disk.result import Result, stamps
from hra_fx.checkpoint.disk.staging_dir import Partial
from hra_fx.checkpoint.disk.streams import read_bytes, write_all
from hra_fx.checkpoint.disk.writing import write_file
from hra_fx.errors import CheckpointError, FoldError, HRAError


class Making:
    """The making of one result.

    Attributes:
        sizes: path -> bytes of each file.
        rounding: name of a rotated tensor -> what rounding cost.
        reused: how many files were there from a call before.
    """

    def __init__(self, request: Request, result: Result, *, progress: bool) -> None:
        """Nothing is written yet."""
        self.sizes = result.sizes()
        self.rounding: dict[str, float] = {}
        self.reused = 0
        self._request = request
        self._result = result
        self._progress = progress
        self._partial = Partial(request.out)

    def run(self, *, overwrite: bool, verify: bool) -> None:
        """Make it.

        Raises:
            CheckpointError: the folder is there and not empty, the disk is too small or refuses, or the base changes.
            FoldError: a rotated weight is not finite, or `verify` finds a difference.
        """
        out, partial = self._request.out, self._partial
        with self._told():
            partial.tidy()
            if partial.is_published(self._result.inputs):
                self._take_up(verify)
                return
            if out.is_dir() and any(out.iterdir()) and not overwrite:
                raise CheckpointError(f"out_dir: {out} is there and not empty. Give another folder, or overwrite=True.")
            with partial.held(self._result.inputs):
                self._check_space()
                try:
                    self._make(verify)
                except HRAError:
                    partial.discard()
                    raise
                partial.publish()

    def _take_up(self, verify: bool) -> None:
        """End a call before this one, which had only to tidy up; what it made may have been changed since."""
        self.reused = len(self.sizes)
        for notes in self._partial.finished.values():
            self.rounding |= notes
        try:
            if verify:
                self._check(self._request.out)
        finally:  # else the next call would find the same
            self._partial.discard()

    def _make(self, verify: bool) -> None:
        with bar(f"writing {self._request.out.name}", sum(self.sizes.values()), wanted=self._progress) as done:
            for path in self._request.folders:
                (self._partial.content / path).mkdir(parents=True, exist_ok=True)
            for path in self.sizes:
                self._make_file(path, done)
        if stamps(self._request.files) != self._result.inputs["files"]:
            raise CheckpointError(f"{self._request.base}: its files changed while they were read. Call again.")
        if verify:
            self._check(self._partial.content)
        for path, folder in self._request.folders.items():
            mode = folder.stat().st_mode & 0o777
            (self._partial.content / path).chmod(mode | 0o700)  # for it is still to be renamed

    def _check(self, folder: Path) -> None:
        """Read all files that were written."""
        try:
            for path, plan in self._result.files.items():
                check_file(plan, folder / path)
            for path, file in self._result.copies.items():
                check_copy(file, folder / path)
        except OSError as error:
            raise FoldError(
                f"{folder / path}: cannot be read again ({error.strerror}). Is the disk failing?"
            ) from error

    def _make_file(self, path: str, done: Callable[[int], object]) -> None:
        partial, plan = self._partial, self._result.files.get(path)
        target = partial.content / path
        if partial.has(path, self.sizes[path]) and (plan is None or path in partial.finished):
            self.rounding |= partial.finished.get(path, {})
            self.reused += 1
            done(self.sizes[path])
            return
        mode = self._request.files[path].stat().st_mode & 0o777
        if plan is None:
            partial.write(target, lambda stream: self._copy(path, stream, done), mode)
            return
        turned: dict[str, float] = {}
        partial.write(target, lambda stream: turned.update(write_file(plan, stream, done)), mode)
        partial.finish(path, turned)
        self.rounding |= turned

    def _copy(self, path: str, target: BinaryIO, done: Callable[[int], object]) -> None:
        if path in self._result.texts:
            write_all(target, self._result.texts[path])
            return
        file = self._result.copies[path]
        with open(file, "rb", buffering=0) as source:
            for block in read_bytes(source, 0, self.sizes[path], file):
                write_all(target, block)
                done(len(block))

    def _check_space(self) -> None:
        there = sum(size for path, size in self.sizes.items() if self._partial.has(path, size))
        due, free = sum(self.sizes.values()) - there, shutil.disk_usage(self._partial.folder).free
        if due > free:
            self._partial.discard()
            raise CheckpointError(
                f"{self._request.out.parent}: {due:,} bytes are to be written, and the disk has {free:,} left. Make "
                "room, or give out_dir on another disk."
            )

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Say how to go on where the disk refuses, or the user stops it."""
        out = self._request.out
        try:
            yield
        except OSError as error:
            reason = str(error)
            if str(self._partial.folder.with_suffix("")) in reason:  # of a hidden folder, which nobody asked for
                reason = f"[Errno {error.errno}] {error.strerror}"
            state = self._state(" Make room, see to the disk, or give another out_dir.")
            raise CheckpointError(f"{out}: could not be written ({reason}). {state}") from error
        except KeyboardInterrupt as error:
            if hasattr(error, "add_note"):  # of Python 3.11
                error.add_note(f"{out}: {self._state()}")
            raise

    def _state(self, way_out: str = "") -> str:
        """What there is when a call was stopped, in sentences."""
        left = " and ".join(map(str, self._partial.left))
        if self._partial.is_done:
            return "All is written and in its place." + f" Only {left} is to be deleted." * bool(left)
        text = f"Nothing is in it that was not before.{way_out}"
        if self._partial.folder in self._partial.left:
            text += (
                f" Files that were finished wait in {self._partial.folder}: call again in the same way to go on, or "
            )
            text += "delete that folder."
        return text
