"""How a setting is named in tables."""

from __future__ import annotations

from speed.grid import LLAMA
from speed.models import WORKLOADS
from speed.setting import Mode, Setting

MODES: dict[Mode, str] = {
    "training": "training step",
    "inference": "inference",
    "generate": "`generate`, 8 tokens after a prompt",
    "transform": "insert the adapter",
    "fold": "merge it into the weights",
    "memory": "peak memory of a training step",
    "gradients": "forward and backward",
    "graphed": "CUDA graph of forward and backward",
}


def columns(setting: Setting) -> dict[str, str]:
    """What tells the settings of a table apart, by the head of its column.

    >>> columns(Setting("llama-768x3", "training", 512))
    {'model': 'Llama, d=768, 3 layers', 'size': '512 tokens', 'dtype': 'float32'}
    """
    workload = WORKLOADS[setting.workload]
    size = f"{setting.size} {workload.unit}" if setting.size else ""
    size = size.removesuffix("s") if setting.size == 1 else size
    return {"model": workload.title, "size": size, "dtype": setting.dtype}


def described(setting: Setting) -> str:
    """What is done; the model if it is not the main one, and the dtype if it is not float32.

    >>> described(Setting("llama-768x3", "training", 512, "bfloat16", compiled=True))
    'training step, 512 tokens, bfloat16, compiled'
    >>> described(Setting("resnet50", "inference", 1))
    'ResNet-50, its 3x3 convolutions, images of 64: inference, 1 image'
    """
    named = columns(setting)
    model = "" if setting.workload == LLAMA else f"{named['model']}: "
    dtype = "" if setting.dtype == "float32" else setting.dtype
    step = filter(None, [MODES[setting.mode], named["size"], dtype, "compiled" * setting.compiled])
    return f"{model}{', '.join(step)}"
