"""Captures a step in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import torch


def captured(step: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A graph of a step, which ran three times on a side stream before, as torch's notes on CUDA graphs say.

    Raises:
        RuntimeError: the step uses an operation that cannot be captured, or CUDA is not available.
    """
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph
