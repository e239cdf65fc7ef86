"""The settings of a run: those for a GPU, most important first, and tiny ones for a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from speed.grid import STEPS
from speed.setting import Mode, Setting

METHODS = ("base", "lora", "ours", "ours-gs")
WITH_PEFT_HRA = ("base", "lora", "peft-hra", "ours", "ours-gs")
COMPILED = ("base-reduced", "lora-reduced", "ours-reduced")
TOKENS = (128, 512, 2048, 8192)
LLAMAS = ("llama-2048x8", "llama-4096x4")


@dataclass(frozen=True)
class Plan:
    """What a run does.

    Attributes:
        device: `cuda` or `cpu`.
        width: of the Linear, and `channels` of the Conv2d, that are compared with float64 products.
        waiting: settings in which the host must not wait, of mode `gradients`; no Llama, in which transformers makes
            the host wait for a value of its mask.
        graphs: settings that are captured, of mode `gradients` in float32; the first is compiled too.
        measured: settings whose steps are measured, with the methods, and `rounds` the most rounds of one.
        launches: settings in which launches are counted, of mode `gradients`, with the methods.
        host_blocks: blocks of the tiny Llama whose host time is measured.
        graph_steps: (width, layers, batch, length) of Llamas whose graph is compared with eager mode.
    """

    device: str
    width: int
    channels: int
    waiting: list[Setting]
    graphs: list[Setting]
    measured: list[tuple[Setting, tuple[str, ...]]]
    rounds: int
    launches: list[tuple[Setting, tuple[str, ...]]]
    host_blocks: int
    graph_steps: tuple[tuple[int, int, int, int], ...]


def for_gpu() -> Plan:
    """bf16 at the shapes of real models."""
    return Plan(
        device="cuda",
        width=2048,
        channels=128,
        waiting=[_on_gpu("vit-large", "gradients", 1), _on_gpu("resnet-blocks", "gradients", 1)],
        graphs=[
            Setting("llama-64x3", "gradients", 256, device="cuda"),
            Setting("resnet-blocks-32", "gradients", 2, device="cuda"),
        ],
        measured=list(_measured_on_gpu()),
        rounds=40,
        launches=[
            (_on_gpu("llama-64x12", "gradients", 256), WITH_PEFT_HRA),
            (_on_gpu("convolutions-16x12", "gradients", 2), METHODS[1:]),
        ],
        host_blocks=16,
        graph_steps=((64, 4, 2, 16), (2048, 4, 4, 512)),
    )


def _measured_on_gpu() -> Iterator[tuple[Setting, tuple[str, ...]]]:
    for r in (8, 32):
        for mode in STEPS:
            for workload in LLAMAS:
                for tokens in TOKENS:
                    few = r == 8 and mode == "training" and tokens == 2048
                    yield _on_gpu(workload, mode, tokens, r), WITH_PEFT_HRA if few else METHODS
        if r == 8:
            for mode in STEPS:
                yield _on_gpu("vit-large", mode, 8), METHODS
                yield _on_gpu("resnet-blocks", mode, 1), METHODS
            for workload, size in (
                ("llama-2048x8", 512),
                ("llama-2048x8", 8192),
                ("vit-large", 8),
                ("resnet-blocks", 1),
            ):
                # PEFT's HRA keeps matrices of 11520 x 11520 for each reflection of the widest convolutions.
                yield _on_gpu(workload, "memory", size), METHODS if workload == "resnet-blocks" else WITH_PEFT_HRA
            for workload, size in (*(("llama-2048x8", tokens) for tokens in TOKENS[:3]), ("resnet-blocks", 1)):
                yield _on_gpu(workload, "graphed", size), METHODS
    for tokens in (128, 2048):
        yield Setting("llama-2048x8", "gradients", tokens, "bfloat16", compiled=True, device="cuda"), COMPILED


def _on_gpu(workload: str, mode: Mode, size: int, r: int = 8) -> Setting:
    return Setting(workload, mode, size, "bfloat16", r, device="cuda")


def smoke() -> Plan:
    """The same parts on a CPU, as small as they can be."""
    sizes = {"llama-64x1": 16, "vit-64": 1, "resnet-blocks-32": 1}
    return Plan(
        device="cpu",
        width=64,
        channels=8,
        waiting=[Setting("vit-64", "gradients", 1, "bfloat16"), Setting("resnet-blocks-32", "gradients", 1)],
        graphs=[Setting("llama-64x1", "gradients", 16)],
        measured=[
            *((Setting(workload, "training", size, "bfloat16"), METHODS) for workload, size in sizes.items()),
            (Setting("llama-64x1", "inference", 16), METHODS),
            (Setting("llama-64x1", "graphed", 16), METHODS),
        ],
        rounds=2,
        launches=[(Setting("llama-64x1", "gradients", 16), METHODS[1:])],
        host_blocks=1,
        graph_steps=((16, 1, 2, 8),),
    )
