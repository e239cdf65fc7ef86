"""A progress bar for bytes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def bar(what: str, total: int, *, wanted: bool) -> Iterator[Callable[[int], object]]:
    """Yield a function that advances the progress bar by some bytes; there is no bar unless `wanted`, on a terminal.

    Example:
        >>> with bar("folding", 100, wanted=False) as advance:
        ...     _ = advance(100)
    """
    if not wanted:
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        yield lambda count: progress.advance(task, count)
