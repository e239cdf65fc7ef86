"""A planned file written: its head, then tensor after tensor, with what is not touched copied by the kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import BinaryIO

import torch

from hra_fx.checkpoint.disk.behind import Behind
from hra_fx.checkpoint.disk.buffers import Buffers
from hra_fx.checkpoint.disk.edits import FilePlan, Given, Item, Rotation
from hra_fx.checkpoint.disk.reading_ahead import pieces
from hra_fx.checkpoint.disk.streams import copy, write_all
from hra_fx.checkpoint.disk.turning import readings, turn


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
        behind.then(partial(write_all, target, plan.head), len(plan.head))
        turned = ((item.source, item.edit) for item in plan.items if item.source)
        weights = (weight for stored, edit in turned if isinstance(edit, Rotation) for weight in readings(stored, edit))
        ahead = pieces(weights, opened.__getitem__, behind, buffers)
        for items in _runs(plan.items):
            first = items[0]
            if isinstance(first.edit, Rotation) and first.source:
                rounding[first.name] = turn(first.source, first.edit, ahead, behind, buffers, done)
            elif isinstance(first.edit, Given):
                data = first.edit.tensor.reshape(-1).view(torch.uint8).numpy()
                behind.then(partial(write_all, target, data), first.size)
            elif first.source:
                size = sum(item.size for item in items)
                start, file = first.source.start, first.source.file
                behind.then(partial(copy, opened[file], target, start, size, file, done), size)
    return rounding


def _runs(items: tuple[Item, ...]) -> Iterator[list[Item]]:
    """Items one by one, copies that follow each other in one file together."""
    run: list[Item] = []
    for item in items:
        if run and not _follows(run[-1], item):
            yield run
            run = []
        run.append(item)
    if run:
        yield run


def _follows(before: Item, item: Item) -> bool:
    if before.edit or item.edit or not before.source or not item.source:
        return False
    return before.source.file == item.source.file and before.source.start + before.size == item.source.start
