"""Tiny models with random weights, and the oracle that they are compared with.

The oracle uses nothing of the library but the names of its parameters. It runs the base model with
`torch.func.functional_call`, where each adapted weight is replaced by `W Q`, computed reflection by reflection in
float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torchvision
import transformers
from torch import Tensor, nn

import hra_fx

PREFIX = ".hra_u."
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One model: how to build it, and what to adapt.

    `inputs(batch, size)` returns keyword arguments; `floats(batch, size)` returns floating-point ones, for the gradient
    of the input.
    """

    name: str
    build: Callable[[], nn.Module]
    targets: list[str] | str
    inputs: Callable[[int, int], Inputs]
    floats: Callable[[int, int], Inputs]
    sizes: tuple[int, int]

    def base(self) -> nn.Module:
        """The model with the same random weights each time, float64, in eval mode."""
        torch.manual_seed(0)
        model = self.build().double().eval()
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if name.endswith("running_mean"):
                    buffer.normal_(std=0.1)
                elif name.endswith("running_var"):
                    buffer.uniform_(0.5, 1.5)
        return model

    def config(self) -> hra_fx.HRAConfig:
        """Three reflections for every target: an odd rank, hence with an anchor."""
        return hra_fx.HRAConfig(r=3, target_modules=self.targets)


def adapted(case: Case) -> tuple[nn.Module, nn.Module]:
    """A base model, and an adapted copy with random vectors."""
    base = case.base()
    model = hra_fx.transform(copy.deepcopy(base), case.config())
    randomise(model)
    return base, model


def randomise(model: nn.Module) -> None:
    """Give every vector random values, far from the start."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if PREFIX in name:
                parameter.normal_(generator=generator)


def vectors_of(model: nn.Module) -> dict[str, Tensor]:
    """Layer path -> its trained vectors."""
    return {name.partition(PREFIX)[0]: p for name, p in model.named_parameters() if PREFIX in name}


def rotated_weights(base: nn.Module, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name -> `W Q` for every adapted layer, differentiable in the vectors of `model`."""
    weights, state = dict(base.named_parameters()), dict(model.named_buffers())
    for path, vectors in vectors_of(model).items():
        anchor = state.get(f"{path}.hra_u.default_anchor")
        chain = vectors if anchor is None else torch.cat([anchor, vectors], dim=1)
        weight = weights[f"{path}.weight"].detach()
        yield f"{path}.weight", rotate(weight.flatten(1), chain).view_as(weight)


def rotate(weight: Tensor, chain: Tensor) -> Tensor:
    """`W H_1 H_2 ... H_k`, one reflection after the other: as an explicit matrix where that is small."""
    for u in chain.double().unbind(1):
        if len(u) <= 64:
            weight = weight @ (torch.eye(len(u), dtype=torch.float64) - 2 * torch.outer(u, u) / u.dot(u))
        else:
            weight = weight - torch.outer(weight @ u, 2 * u / u.dot(u))
    return weight


def run_oracle(base: nn.Module, model: nn.Module, inputs: dict[str, Any]) -> Any:
    """The base model over the rotated weights."""
    return torch.func.functional_call(base, dict(rotated_weights(base, model)), (), inputs)


def folded_copy(base: nn.Module, model: nn.Module) -> nn.Module:
    """A plain copy of the base model that holds the rotated weights."""
    plain = copy.deepcopy(base)
    parameters = dict(plain.named_parameters())
    with torch.no_grad():
        for name, weight in rotated_weights(base, model):
            parameters[name].copy_(weight)
    return plain


def tensors(output: Any) -> list[Tensor]:
    """Every floating-point tensor of an output, in order (caches apart)."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, dict):
        output = list(output.values())
    if isinstance(output, (list, tuple)):
        return [tensor for item in output for tensor in tensors(item)]
    return []


def assert_same(actual: Any, expected: Any, rtol: float = 1e-9) -> None:
    """Outputs agree in number, shape and value, to `rtol` of the largest value of each."""
    got, wanted = tensors(actual), tensors(expected)
    assert wanted
    assert [tensor.shape for tensor in got] == [tensor.shape for tensor in wanted]
    for one, other in zip(got, wanted, strict=True):
        scale = float(other.abs().max()) if other.numel() else 0.0
        torch.testing.assert_close(one, other, rtol=0, atol=rtol * scale)


# ---- the models ----

_TEXT = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
}


def _draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def _ids(batch: int, length: int) -> Tensor:
    return torch.randint(3, 60, (batch, length), generator=torch.Generator().manual_seed(batch * length))


def _image(name: str) -> Callable[[int, int], Inputs]:
    return lambda batch, size: {name: _draw(batch, 3, size, size)}


def _mask(batch: int, length: int) -> Tensor:
    mask = torch.ones(batch, length, dtype=torch.long)
    if batch > 1:
        mask[1, length - 2 :] = 0
    return mask


def _text(batch: int, length: int) -> Inputs:
    return {"input_ids": _ids(batch, length), "attention_mask": _mask(batch, length)}


def _text_floats(batch: int, length: int) -> Inputs:
    return {"inputs_embeds": _draw(batch, length, 16)}


def _pair(batch: int, length: int) -> Inputs:
    return _text(batch, length) | {"decoder_input_ids": _ids(batch, 5)}


def _pair_floats(batch: int, length: int) -> Inputs:
    return {"inputs_embeds": _draw(batch, length, 16), "decoder_inputs_embeds": _draw(batch, 5, 16)}


def _resnet() -> nn.Module:
    return torchvision.models.resnet18(num_classes=5)


def _timm_vit() -> nn.Module:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_classes": 5}
    rates = {"drop_path_rate": 0.5, "drop_rate": 0.1, "proj_drop_rate": 0.1, "attn_drop_rate": 0.1}
    return timm.create_model("vit_tiny_patch16_224", **sizes, **rates)


def _timm_convnext() -> nn.Module:
    return timm.create_model(
        "convnext_atto", depths=(1, 1, 2, 1), dims=(8, 12, 12, 16), drop_path_rate=0.6, num_classes=5
    )


def _timm_efficientnet() -> nn.Module:
    return timm.create_model("test_efficientnet", drop_path_rate=0.5, num_classes=5)


def _bert() -> nn.Module:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**_TEXT, num_labels=5))


def _opt() -> nn.Module:
    sizes = {k: v for k, v in _TEXT.items() if k != "intermediate_size"}
    return transformers.OPTForCausalLM(transformers.OPTConfig(**sizes, ffn_dim=24, word_embed_proj_dim=16))


def _t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=64, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


def _llama() -> nn.Module:
    config = transformers.LlamaConfig(**_TEXT, attention_dropout=0.1, num_key_value_heads=1)
    return transformers.LlamaForCausalLM(config)


def _vit() -> nn.Module:
    sizes = {k: v for k, v in _TEXT.items() if k not in ("vocab_size", "max_position_embeddings")}
    config = transformers.ViTConfig(
        **sizes, image_size=32, patch_size=8, num_labels=5, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1
    )
    return transformers.ViTForImageClassification(config)


RESNET = Case("resnet", _resnet, r"conv1|layer.*conv\d|.*downsample\.0|fc", _image("x"), _image("x"), (32, 48))
TIMM_VIT = Case("timm_vit", _timm_vit, ["proj", "qkv", "fc1", "fc2", "head"], _image("x"), _image("x"), (32, 32))
CONVNEXT = Case(
    "timm_convnext",
    _timm_convnext,
    r"stem\.0|.*(conv_dw|fc\d?|downsample\.1)",
    _image("x"),
    _image("x"),
    (64, 96),
)
EFFICIENTNET = Case(
    "timm_efficientnet",
    _timm_efficientnet,
    r"conv_stem|.*(conv_dw|conv_pw|conv_pwl|conv_head|classifier)",
    _image("x"),
    _image("x"),
    (32, 48),
)
BERT = Case("bert", _bert, ["query", "key", "value", "dense", "classifier"], _text, _text_floats, (7, 11))
OPT = Case("opt", _opt, ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"], _text, _text_floats, (7, 11))
T5 = Case("t5", _t5, ["q", "k", "v", "o", "wi", "wo"], _pair, _pair_floats, (7, 11))
LLAMA = Case(
    "llama",
    _llama,
    ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    _text,
    _text_floats,
    (7, 11),
)
VIT = Case(
    "vit",
    _vit,
    "all-linear",
    _image("pixel_values"),
    _image("pixel_values"),
    (32, 32),
)

VISION = [RESNET, TIMM_VIT, CONVNEXT, EFFICIENTNET]
HUGGING = [BERT, OPT, T5, LLAMA, VIT]
EVERY = [*VISION, *HUGGING]
