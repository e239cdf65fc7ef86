"""Adapt a tiny Llama that GPTQModel has quantized, with "gptq" or "awq" as the argument:

    PYTHONPATH=tests/support python tests/layers/quantized/with_gptqmodel.py gptq

A program, because GPTQModel needs a newer torch than the tests. Its kernels that are compiled are not used.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # with fewer than three processors, its default is an error

import pytest
import torch
from adapting import randomise
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.quantization.config import AWQConfig
from oracles import layer_q, relative_error
from peft import PeftModel
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import hra_fx
from hra_fx.errors import FoldError

METHOD = sys.argv[1]
BACKENDS = {"gptq": BACKEND.GPTQ_TORCH, "awq": BACKEND.AWQ_TORCH}
#: AWQ's kernel multiplies in 16 bits.
TOLERANCE = {"gptq": 1e-5, "awq": 2e-3}[METHOD]
IDS = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(0))
CONFIG = hra_fx.HRAConfig(r=4, target_modules="all-linear")


def quantize(plain: Path, folder: Path) -> None:
    """Quantize a random model, with random text for the calibration."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, max_position_embeddings=64)).save_pretrained(plain)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", pad_token="w0").save_pretrained(plain)
    config = AWQConfig(bits=4, group_size=32) if METHOD == "awq" else QuantizeConfig(bits=4, group_size=32)
    model = GPTQModel.load(str(plain), config, device="cpu")
    ids = [torch.randint(3, 64, (1, 48)) for _ in range(16)]
    model.quantize([{"input_ids": one, "attention_mask": torch.ones_like(one)} for one in ids], batch_size=1)
    model.save(str(folder))


def load(folder: Path) -> Any:
    return GPTQModel.load(str(folder), device="cpu", backend=BACKENDS[METHOD]).model.float().eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def equal(one: Tensor, other: Tensor, what: str) -> None:
    error = relative_error(one, other)
    print(f"{what}: {error:.1e}")
    assert error < TOLERANCE, what


def check_layer(plain: Any, layer: Any) -> None:
    """The output and the gradients against `W Q`, with the outputs of the plain layer for the unit vectors as `W`."""
    with torch.no_grad():
        weight = plain(torch.eye(plain.in_features)).mT.double()
    x = torch.randn(3, layer.in_features, requires_grad=True)
    grad, leaves = torch.randn(3, len(weight)), [x, layer.hra_u["default"]]
    output, expected = layer(x), x.double() @ (weight @ layer_q(layer)).mT
    equal(output, expected, "output")
    ours = torch.autograd.grad(output, leaves, grad)
    for mine, theirs in zip(ours, torch.autograd.grad(expected, leaves, grad.double()), strict=True):
        equal(mine, theirs, "gradient")


def check(folder: Path, files: Path) -> None:
    base, model = load(folder), hra_fx.transform(load(folder), CONFIG).eval()
    assert len(hra_fx.report(model)) == 14
    equal(logits(model), logits(base), "start")
    randomise(model)
    check_layer(base.model.layers[0].mlp.down_proj, model.model.layers[0].mlp.down_proj)
    out = logits(model)
    hra_fx.save_adapter(model, files / "adapter")
    assert torch.equal(logits(hra_fx.load_adapter(load(folder), files / "adapter")), out)
    for fold in (hra_fx.fold, hra_fx.merge_adapter):
        with pytest.raises(FoldError, match="and cannot be folded"):
            fold(model)
    assert torch.equal(logits(model), out)
    hra_fx.save_as_lora(model, files / "lora")
    equal(logits(PeftModel.from_pretrained(load(folder), files / "lora").eval()), out, "LoRA in PEFT")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        quantize(Path(place) / "plain", Path(place) / "quantized")
        check(Path(place) / "quantized", Path(place))
    print(f"{METHOD}: passed")
