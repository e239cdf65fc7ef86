"""A planned file written: tensors are turned one after the other, what is not touched is copied in between."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import BinaryIO

from hra_fx.checkpoint.disk.async_writer import Behind
from hra_fx.checkpoint.disk.buffers import Buffers
from hra_fx.checkpoint.disk.edit_types import FilePlan, Given, Item, Rotation
from hra_fx.checkpoint.disk.header import Stored
from hra_fx.checkpoint.disk.prefetch_reader import pieces
from hra_fx.checkpoint.disk.rotate_tensor import readings, turn
from hra_fx.checkpoint.disk.streams import Part, as_bytes, copy

#: Bytes that are copied at a time, between the pieces of what is turned.
_PART = 1 << 21


def write_file(plan: FilePlan, target: BinaryIO, buffers: Buffers, done: Callable[[int], object]) -> dict[str, float]:
    """Write a planned file.

    Args:
        plan: the file.
        target: where to, unbuffered.
        buffers: memory to work in.
        done: is told of bytes as they are written.

    Returns:
        Name of a rotated tensor -> what rounding to its dtype cost.

    Raises:
        CheckpointError: a file of the base ends before its tensors do.
        FoldError: a rotated weight is not finite.
    """
    rounding: dict[str, float] = {}
    with ExitStack() as stack:
        sources = {item.source.file for item in plan.items if item.source}
        opened = {file: stack.enter_context(open(file, "rb", buffering=0)) for file in sources}
        # Entered last, so that the files are open until all is written.
        behind = stack.enter_context(Behind(target))
        behind.write(0, plan.head)
        for part in _copied(plan):
            behind.later(partial(copy, part, opened[part.file], target, done), part.size)
        ahead = pieces(_turned(plan), opened.__getitem__, behind, buffers)
        for at, item in _places(plan):
            if isinstance(item.edit, Rotation) and item.source:
                rounding[item.name] = turn(item.source, item.edit, ahead, behind, at, buffers, done)
            elif isinstance(item.edit, Given):
                behind.write(at, as_bytes(item.edit.tensor.reshape(-1)))
    return rounding


def _places(plan: FilePlan) -> Iterator[tuple[int, Item]]:
    """Each tensor, and the byte of the file where it begins."""
    at = len(plan.head)
    for item in plan.items:
        yield at, item
        at += item.size


def _turned(plan: FilePlan) -> Iterator[Stored]:
    for item in plan.items:
        if isinstance(item.edit, Rotation) and item.source:
            yield from readings(item.source, item.edit)


def _copied(plan: FilePlan) -> Iterator[Part]:
    """What is not touched, in parts of which each is soon done; tensors that follow each other as one."""
    run: Part | None = None
    for at, item in _places(plan):
        if item.edit or not item.source:
            continue
        file, start = item.source.file, item.source.start
        if run and run.file == file and run.start + run.size == start and run.at + run.size == at:
            run = Part(file, run.start, run.at, run.size + item.size)
            continue
        yield from run.cut(_PART) if run else ()
        run = Part(file, start, at, item.size)
    yield from run.cut(_PART) if run else ()
