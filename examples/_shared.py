"""What both demos do alike: count, compare, export, and print."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import hra_fx

console = Console(highlight=False)


def trainable(model: nn.Module) -> int:
    """How many numbers an optimiser would train."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def shuffled(size: int, batch_size: int, generator: torch.Generator) -> list[list[int]]:
    """The indices below `size` in a new order, in batches."""
    order = torch.randperm(size, generator=generator).tolist()
    return [order[start : start + batch_size] for start in range(0, size, batch_size)]


def train_head(head: nn.Linear, features: Tensor, labels: Tensor, batches: list[list[int]], lr: float) -> None:
    """The baseline: train a linear head on features that were computed once.

    The frozen model gives the same features each time, so this is head-only training exactly, only faster.
    """
    optimizer = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=len(batches), pct_start=0.1)
    for batch in batches:
        loss = nn.functional.cross_entropy(head(features[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of rows whose largest logit is the label's."""
    return float((logits.argmax(dim=1) == labels).float().mean())


def write_adapters(model: nn.Module, folder: Path) -> None:
    """Write the report and the picture of an adapted model into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.txt").write_text(str(hra_fx.report(model)), encoding="utf-8")
    hra_fx.visualize(model, folder / "adapters.svg")


def export_onnx(model: nn.Module, example: dict[str, Tensor], dynamic: dict[str, Any], file: Path) -> None:
    """Export with TorchDynamo; `dynamic` names the axes of each input that may vary."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # the exporter's own deprecations say nothing about this model
        torch.onnx.export(
            model,
            kwargs=example,
            f=file,
            dynamo=True,
            input_names=list(example),
            output_names=["logits"],
            dynamic_shapes=dynamic,
            verbose=False,
        )


def onnx_difference(model: nn.Module, inputs: dict[str, Tensor], file: Path) -> float:
    """Largest difference between PyTorch and onnxruntime on the same inputs."""
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    with torch.no_grad():
        return float((model(**inputs) - torch.from_numpy(logits)).abs().max())


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a small table; all columns but the first are aligned right."""
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def require(holds: bool, claim: str) -> None:
    """End the demo, unsuccessfully, if what it is there to show is not so.

    Raises:
        SystemExit: `claim` does not hold.
    """
    if not holds:
        raise SystemExit(f"This should hold, and does not: {claim}")
