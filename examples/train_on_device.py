"""Train Householder reflections without Python: in ExecuTorch, and in a package of AOTInductor.

    python examples/train_on_device.py                   # MiniLM, a classifier, a few minutes
    python examples/train_on_device.py --model smollm2   # SmolLM2, a Llama

The last two blocks of a model with its real weights get adapters. `hra_fx.export_training_step` makes one program of
forward, loss and backward. PyTorch, ExecuTorch and AOTInductor train on the same batches, with the same losses. The
vectors that ExecuTorch trained go back into the model and into an adapter file, which PEFT loads. The adapter is then
served: folded into MiniLM, or as a LoRA of SmolLM2 in llama.cpp.

ExecuTorch's module for training is experimental, as is the backward pass of exported programs in PyTorch.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _quiet  # noqa: F401
import peft
import torch
import transformers
from _data import minilm_folder, newsgroups, smollm2
from _llama_cpp import llama_cpp_text
from _shared import WHEELS_NOTE, console, introduce, largest_difference, require, show, show_checks, track
from torch import Tensor, nn

import hra_fx

BATCH, LENGTH = 8, 32
MOMENTUM = 0.9
SENTENCE = "The capital of France is"
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Task:
    """A model with its adapters, its batches, the learning rate, and a function that loads the base model."""

    model: transformers.PreTrainedModel
    batches: list[Batch]
    lr: float
    load: Callable[[], transformers.PreTrainedModel]


def minilm(steps: int) -> Task:
    """all-MiniLM-L6-v2 with a new classifier for 20 Newsgroups, which is trained too."""

    def load() -> transformers.PreTrainedModel:
        torch.manual_seed(0)
        kind = transformers.AutoModelForSequenceClassification
        model: transformers.PreTrainedModel = kind.from_pretrained(minilm_folder(), num_labels=20)
        return model.eval()

    config = hra_fx.HRAConfig(
        r=8, target_modules=["query", "key", "value", "dense"], layers_to_transform=[4, 5], task_type="SEQ_CLS"
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_folder())
    texts, labels, _ = newsgroups("train", steps * BATCH)
    rows = tokenizer(
        [text[:2000] for text in texts], truncation=True, max_length=LENGTH, padding="max_length", return_tensors="pt"
    )
    names = ("input_ids", "attention_mask")
    parts = zip(*(rows[name].split(BATCH) for name in names), labels.split(BATCH), strict=True)
    batches = [dict(zip((*names, "labels"), part, strict=True)) for part in parts]
    return Task(hra_fx.transform(load(), config), batches, 0.1, load)


def smollm(steps: int) -> Task:
    """SmolLM2-135M-Instruct, which learns to continue posts of 20 Newsgroups."""

    def load() -> transformers.PreTrainedModel:
        kind = transformers.AutoModelForCausalLM
        model: transformers.PreTrainedModel = kind.from_pretrained(**smollm2(), dtype=torch.float32)
        return model.eval()

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = hra_fx.HRAConfig(r=8, target_modules=targets, layers_to_transform=[28, 29], task_type="CAUSAL_LM")
    tokenizer = transformers.AutoTokenizer.from_pretrained(**smollm2())
    texts, _, _ = newsgroups("train", 4 * steps * BATCH)
    rows = tokenizer([text[:2000] for text in texts], truncation=True, max_length=LENGTH)["input_ids"]
    ids = torch.tensor([row for row in rows if len(row) == LENGTH][: steps * BATCH])
    batches = [{"input_ids": part, "labels": part} for part in ids.split(BATCH)]
    return Task(hra_fx.transform(load(), config), batches, 0.1, load)


TASKS = {"minilm": minilm, "smollm2": smollm}


def train_in_torch(task: Task) -> list[float]:
    """Train a copy of the model; return the losses."""
    model = copy.deepcopy(task.model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], task.lr, MOMENTUM)
    losses = []
    for batch in track(task.batches, "PyTorch"):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def train_in_executorch(task: Task, step: Any, file: Path) -> tuple[list[float], dict[str, Tensor]]:
    """Write the program to `file` and train there; return the losses, and the trained parameters by name."""
    from executorch.exir import to_edge
    from executorch.extension.training import _load_for_executorch_for_training, get_sgd_optimizer

    with timed("lower for ExecuTorch"), open(file, "wb") as opened:
        to_edge(step).to_executorch().write_to_file(opened)
    module = _load_for_executorch_for_training(str(file))
    losses, optimizer = [], None
    for batch in track(task.batches, "ExecuTorch"):
        outputs = module.forward_backward("forward", tuple(batch.values()))
        if optimizer is None:  # the module has its parameters after the first step
            optimizer = get_sgd_optimizer(module.named_parameters(), task.lr, MOMENTUM, 0.0, 0.0, False)
        optimizer.step(module.named_gradients())
        losses.append(outputs[0].item())
    return losses, {name: value.detach().clone() for name, value in module.named_parameters().items()}


def train_in_package(task: Task, step: Any, file: Path) -> list[float]:
    """Compile the program to a package and train there; return the losses.

    The package computes with the parameters of a copy of the model, which any optimizer can change.
    """
    with timed("compile with AOTInductor"):
        torch._inductor.aoti_compile_and_package(step, package_path=str(file))
    package = torch._inductor.aoti_load_package(str(file))
    model = copy.deepcopy(task.model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    shared = {name: parameter.data for name, parameter in trained.items()}
    package.load_constants(shared, check_full_update=False, user_managed=True)
    optimizer = torch.optim.SGD(list(trained.values()), task.lr, MOMENTUM)
    losses = []
    for batch in track(task.batches, "AOTInductor"):
        loss, gradients = package(*batch.values())
        for name, gradient in gradients.items():
            trained[name].grad = gradient
        optimizer.step()
        losses.append(loss.item())
    return losses


@contextmanager
def timed(label: str) -> Iterator[None]:
    """Print how long a block takes."""
    began = time.perf_counter()
    yield
    console.print(f"  {label:<62}{time.perf_counter() - began:6.0f} s")


def check_adapter(task: Task, folder: Path) -> str:
    """Check that PEFT computes the same with the adapter file; say so."""
    batch = task.batches[0]
    with torch.no_grad():
        expected = task.model(**batch).logits
        base = task.load()
        logits = peft.PeftModel.from_pretrained(base, folder)(**batch).logits
    difference = largest_difference(logits, expected)
    require(difference < 1e-3, f"PEFT gives the same logits (largest difference {difference:.1e})")
    return f"PEFT loads the adapter file: logits within {difference:.1e}"


def serve(task: Task, output: Path) -> str:
    """Serve the trained model: SmolLM2 as a LoRA in llama.cpp, MiniLM folded; say what it answers."""
    if task.model.config.model_type == "llama":
        lora = hra_fx.save_as_lora(task.model, output / "adapter.gguf", dtype="float16")
        files = smollm2()
        prompt = transformers.AutoTokenizer.from_pretrained(**files)(SENTENCE)["input_ids"]
        base = Path(files["pretrained_model_name_or_path"], files["gguf_file"])
        text = llama_cpp_text(base, lora.path, prompt, 5)
        return f"llama.cpp, with the adapter as a LoRA: {SENTENCE!r} ... {text!r}"
    batch = task.batches[0]
    with torch.no_grad():
        before = task.model(**batch).logits
        after = hra_fx.fold(task.model)(**batch).logits
    task.model.save_pretrained(output / "folded")
    return f"Folded into a plain BERT, in {output}/folded: logits within {largest_difference(after, before):.1e}"


def main(name: str, steps: int, output: Path) -> None:
    """Run the demo, and write the results to `output`."""
    warnings.simplefilter("ignore")  # ExecuTorch, torch and transformers about their own code
    output.mkdir(parents=True, exist_ok=True)
    introduce(f"A training step of {name} as a program, {steps} steps in three runtimes", WHEELS_NOTE)
    task = TASKS[name](steps)
    with timed("export the training step"):
        step = hra_fx.export_training_step(task.model, task.batches[0])
    losses = {"PyTorch": train_in_torch(task)}
    losses["ExecuTorch"], trained = train_in_executorch(task, step, output / "step.pte")
    losses["AOTInductor"] = train_in_package(task, step, output / "step.pt2")
    difference = largest_difference(*(torch.tensor(losses[one]) for one in ("PyTorch", "ExecuTorch")))
    compiled = largest_difference(*(torch.tensor(losses[one]) for one in ("PyTorch", "AOTInductor")))
    require(max(difference, compiled) < 1e-2, "the losses are PyTorch's")

    before = mean_loss(task)
    write_back(task.model, trained)
    after = mean_loss(task)
    require(after < before, f"the mean loss is lower after the training ({after:.3f}, before {before:.3f})")
    hra_fx.save_adapter(task.model, output / "adapter")
    numbers = sum(value.numel() for value in trained.values())
    checks = [
        f"Losses: ExecuTorch within {difference:.1e} of PyTorch, AOTInductor within {compiled:.1e}",
        f"Gradients for {numbers:,} of {sum(p.numel() for p in task.model.parameters()):,} parameters",
        check_adapter(task, output / "adapter"),
        serve(task, output),
    ]
    chosen = sorted({0, min(1, steps - 1), steps // 2, steps - 1})
    rows = [(runtime, *(f"{values[at]:.5f}" for at in chosen)) for runtime, values in losses.items()]
    show("Training loss", ("runtime", *(f"step {at + 1}" for at in chosen)), rows)
    show_checks(checks)


def mean_loss(task: Task) -> float:
    """The mean loss of all batches."""
    with torch.no_grad():
        return statistics.mean(task.model(**batch).loss.item() for batch in task.batches)


def write_back(model: nn.Module, trained: dict[str, Tensor]) -> None:
    """Copy trained parameters into the model, by name."""
    with torch.no_grad():
        for name, value in trained.items():
            model.get_parameter(name).copy_(value)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(TASKS), default="minilm", help="default: minilm")
    parser.add_argument("--steps", type=int, default=20, help="steps of training (default 20)")
    parser.add_argument("--output", type=Path, default=Path("demo_output/device"), help="folder to write to")
    arguments = parser.parse_args()
    main(arguments.model, arguments.steps, arguments.output)
