"""The example of PEFT's page of `HRAModel`, with the import changed: the contract of this project. Do not remove it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import diffusers
import peft
import pytest
import torch
import transformers
from peft_sides import opened_by_peft
from tiny_models import trainer_of

from hra_fx import HRAConfig, HRAModel, PeftModel

TEXT = ["k_proj", "q_proj", "v_proj", "out_proj", "fc1", "fc2"]
UNET = ["proj_in", "proj_out", "to_k", "to_q", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}


def text_encoder() -> Any:
    return transformers.CLIPTextModel(transformers.CLIPTextConfig(**SIZES))


def unet() -> Any:
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
    )


OPT = {"hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "word_embed_proj_dim": 16}


def opt() -> Any:
    torch.manual_seed(0)
    config = transformers.OPTConfig(**OPT, vocab_size=64, max_position_embeddings=32, pad_token_id=1, eos_token_id=None)
    return transformers.OPTForCausalLM(config).eval()


def resnet() -> Any:
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "bottleneck"}
    return transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes))


IDS = {"input_ids": torch.arange(6)[None]}
SOME = {"target_modules": ["q_proj", "v_proj"]}
CASES: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "text encoder": (text_encoder, {"target_modules": TEXT}, IDS),
    "unet": (
        unet,
        {"target_modules": UNET},
        {"sample": torch.ones(1, 4, 8, 8), "timestep": 3, "encoder_hidden_states": torch.ones(1, 2, 16)},
    ),
    "OPT": (opt, SOME, IDS),
    "exclude_modules": (opt, {**SOME, "exclude_modules": r".*layers\.0\.self_attn\.v_proj"}, IDS),
    "layers_to_transform": (opt, {**SOME, "layers_to_transform": [1], "layers_pattern": "layers"}, IDS),
    "ResNet": (resnet, {"target_modules": ["convolution"]}, {"pixel_values": torch.ones(2, 3, 32, 32)}),
}


def with_vectors_of(model: Any, reference: Any) -> Any:
    """PEFT's model with the vectors of ours, which have the same order and shapes."""
    theirs = [value for name, value in reference.named_parameters() if "hra_u" in name]
    for (name, ours), value in zip([(n, p) for n, p in model.named_parameters() if "hra_u" in n], theirs, strict=True):
        assert ours.shape == value.shape, name
        value.data.copy_(ours.data)
    return reference


@pytest.mark.parametrize("case", CASES)
def test_a_model_computes_what_pefts_does(case: str) -> None:
    make, fields, inputs = CASES[case]
    torch.manual_seed(0)
    model = make().double().eval()
    inputs = {name: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for name, x in inputs.items()}
    reference = peft.HRAModel(copy.deepcopy(model), peft.HRAConfig(r=8, **fields), "default")
    kind, plain = type(model), model
    model = HRAModel(model, HRAConfig(r=8, init_weights=False, pairs=False, **fields), "default")
    assert model is plain and isinstance(model, HRAModel) and isinstance(model, kind)
    assert model.prefix == "hra_" and model.base_model.prefix == "hra_"
    for each in (model, model.base_model):
        assert each.target_module_mapping == reference.target_module_mapping
    assert any(isinstance(part, model.tuner_layer_cls) for part in model.modules())
    with_vectors_of(model, reference)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs)[0], reference.model(**inputs)[0])


def test_two_adapters_files_and_generate(tmp_path: Path) -> None:
    """`PeftModel(model, config)`, `add_adapter`, `set_adapter`, `from_pretrained` and `generate`."""
    prompt, more = torch.tensor([[3, 4, 5]]), {"max_new_tokens": 5, "do_sample": False}
    first, second = ({"r": r, "target_modules": names, "init_weights": False} for r, names in ((4, TEXT), (2, ["fc1"])))
    first["task_type"] = second["task_type"] = "CAUSAL_LM"
    ours: Any = PeftModel(opt(), HRAConfig(pairs=False, **first))
    ours.add_adapter("other", HRAConfig(pairs=False, **second))
    theirs: Any = peft.PeftModelForCausalLM(opt(), peft.HRAConfig(**first))
    theirs.add_adapter("other", peft.HRAConfig(**second))
    with_vectors_of(ours, theirs)
    for name in ("default", "other"):
        ours.set_adapter(name), theirs.set_adapter(name)
        torch.testing.assert_close(ours(prompt).logits, theirs(prompt).logits)
        assert torch.equal(ours.generate(prompt, **more), theirs.generate(input_ids=prompt, **more))
    ours.save_pretrained(tmp_path)
    for load in (PeftModel.from_pretrained, opened_by_peft):
        loaded: Any = load(opt(), tmp_path / "other")
        torch.testing.assert_close(loaded(prompt).logits, ours(prompt).logits)
        assert torch.equal(loaded.generate(input_ids=prompt, **more), ours.generate(prompt, **more))


def test_low_cpu_mem_usage() -> None:
    model = HRAModel(opt(), HRAConfig(r=4, pairs=False, **SOME), "default", low_cpu_mem_usage=True)
    reference = peft.HRAModel(opt(), peft.HRAConfig(r=4, **SOME), "default", low_cpu_mem_usage=True)
    both = [{n: p.is_meta for n, p in each.named_parameters() if "hra_u" in n} for each in (model, reference.model)]
    assert both[0] == both[1] and all(both[0].values())


def test_the_trainer(tmp_path: Path) -> None:
    """The vectors after some steps are PEFT's."""
    fields = {"r": 4, "target_modules": TEXT, "init_weights": False}
    ours = HRAModel(opt(), HRAConfig(pairs=False, **fields), "default")
    theirs = with_vectors_of(ours, peft.get_peft_model(opt(), peft.HRAConfig(**fields)))
    for model in (ours, theirs):
        trainer_of(transformers.Trainer, "llama", model, tmp_path, max_steps=3).train()
    vectors = [[p for n, p in model.named_parameters() if "hra_u" in n] for model in (ours, theirs)]
    torch.testing.assert_close(*vectors, rtol=1e-3, atol=1e-4)
