"""Helpers of the demos: train, compare, export, and print."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import onnxruntime
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from tqdm import tqdm

import hra_fx

Groups = Sequence[tuple[Iterable[nn.Parameter], float]]
T = TypeVar("T")

TOLERANCE = 1e-4  # relative to the largest logit: float32 rounding through dozens of layers

console = Console(highlight=False)


def trainable(model: nn.Module) -> int:
    """The number of trainable parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def epochs_of(size: int, epochs: int, batch_size: int) -> list[list[int]]:
    """Batches of the indices below `size`, shuffled in each epoch."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(epochs):
        order = torch.randperm(size, generator=generator).tolist()
        batches += [order[start : start + batch_size] for start in range(0, size, batch_size)]
    return batches


def bar(batches: Sequence[T], label: str) -> tqdm[T]:
    """A progress bar over batches."""
    return tqdm(batches, desc=f"{label:<20}", unit="batch", ncols=100, mininterval=0.5)


def fit(
    loss_of: Callable[[list[int]], Tensor],
    groups: Groups,
    batches: list[list[int]],
    label: str,
) -> None:
    """Train with AdamW and a one-cycle learning rate schedule.

    Args:
        loss_of: returns the loss of a batch of indices.
        groups: parameters, each with its maximal learning rate.
        batches: the batches, in order.
        label: text of the progress bar.
    """
    rates = [rate for _, rate in groups]
    optimizer = torch.optim.AdamW([{"params": list(group)} for group, _ in groups], lr=rates[0], weight_decay=0.0)
    warmup = 0.1 if len(batches) >= 20 else 0.3  # OneCycleLR needs at least one warmup step
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=len(batches), pct_start=warmup)
    progress = bar(batches, label)
    for batch in progress:
        loss = loss_of(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.2f}", refresh=False)


def reflections(model: nn.Module) -> list[nn.Parameter]:
    """The vectors that `hra_fx.transform` added and left trainable."""
    return [value for name, value in model.named_parameters() if ".hra_u." in name and value.requires_grad]


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """The fraction of rows whose largest logit is that of the label."""
    return float((logits.argmax(dim=1) == labels).float().mean())


def write_adapters(model: nn.Module, folder: Path) -> None:
    """Write the report, two pictures and the HTML page of an adapted model into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    report = hra_fx.report(model)
    with open(folder / "report.txt", "w", encoding="utf-8") as file:
        Console(file=file, width=180).print(report)
    report.plot_heatmap(folder / "heatmap.svg")
    for name in ("adapters.svg", "adapters.html"):
        hra_fx.visualize(model, folder / name, heat="mean_angle")


def export_onnx(model: nn.Module, example: dict[str, Tensor], dynamic: dict[str, Any], file: Path) -> None:
    """Export with TorchDynamo; `dynamic` gives the dynamic axes of each input."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # deprecation warnings of the exporter itself
        torch.onnx.export(
            model,
            kwargs=example,
            f=file,
            dynamo=True,
            input_names=list(example),
            output_names=["logits"],
            dynamic_shapes=dynamic,
            optimize=False,  # onnxruntime optimizes when it loads the model; here it would take most of the time
            verbose=False,
        )


def check_fold(folded: Tensor, adapted: Tensor, model: nn.Module, keys: list[str]) -> tuple[str, str]:
    """Check that the folded model has the outputs of the adapted model and the keys of the base model; return a row."""
    difference = largest_difference(folded, adapted)
    near = difference < TOLERANCE * float(adapted.abs().max())
    require(near, f"the folded model gives the same logits (largest difference {difference:.1e})")
    require(list(model.state_dict()) == keys, "the folded model has the base model's state_dict keys")
    return "folded against adapted, largest difference of a logit", f"{difference:.1e}"


def check_classes(folded: Tensor, adapted: Tensor) -> None:
    """Check that both models predict the same classes, from logits `(n, classes)`."""
    require(bool((folded.argmax(1) == adapted.argmax(1)).all()), "the folded model gives the same predictions")


def onnx_model(file: Path) -> Callable[..., Tensor]:
    """The exported model in onnxruntime, as a function of its inputs by name."""
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])

    def run(**inputs: Tensor) -> Tensor:
        (logits,) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
        return torch.from_numpy(logits)

    return run


def check_onnx(run: Callable[..., Tensor], model: nn.Module, inputs: dict[str, Tensor], size: str) -> tuple[str, str]:
    """Compare onnxruntime with PyTorch, for inputs of a size that was not used for export; return a row."""
    with torch.no_grad():
        expected = model(**inputs)
    difference = largest_difference(run(**inputs), expected)
    near = difference < TOLERANCE * float(expected.abs().max())
    require(near, f"onnxruntime gives PyTorch's logits (largest difference {difference:.1e})")
    return f"onnxruntime against PyTorch, {size}", f"{difference:.1e}"


def largest_difference(actual: Tensor, expected: Tensor) -> float:
    """The largest absolute difference."""
    return float((actual - expected).abs().max())


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a small table. All columns except the first are right-aligned."""
    table = Table(box=box.SIMPLE_HEAD)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    console.print(f"\n  {title}", style="bold", soft_wrap=True)
    console.print(table)


def require(holds: bool, claim: str) -> None:
    """End the demo with an error if a claim does not hold.

    Raises:
        SystemExit: `holds` is False.
    """
    if not holds:
        raise SystemExit(f"Check failed: {claim}")
